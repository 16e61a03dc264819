"""A view that follows what happens: in place in a notebook, nowhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

SHARE = 0.1
"""At most this part of the time goes into drawing."""

LEAST = 0.25
"""Seconds between two pictures."""


def notebook_shell() -> Any:
    """IPython's shell when its front end shows HTML (Jupyter, VS Code), else None."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell if hasattr(shell, "kernel") else None


class LiveView:
    """One picture of one cell, drawn anew while something runs.

    A later :class:`LiveView` of the same owner in the same cell goes on with the same picture.

    Args:
        draw: makes the HTML.
        shell: of :func:`notebook_shell`; None shows nothing.
    """

    def __init__(self, draw: Callable[[], str], shell: Any = None) -> None:
        self._draw = draw
        self._shell = shell
        self._handle: Any = None
        self._cell = -1
        self._due = 0.0

    @property
    def is_shown(self) -> bool:
        """Whether the cell that runs now has this picture."""
        return self._handle is not None and self._cell == self._shell.execution_count

    def show(self) -> None:
        """Draw now: what the cell has already, else a new picture."""
        if self._shell is None:
            return
        display = sys.modules["IPython.display"]
        started = time.perf_counter()
        picture = display.HTML(self._draw())
        if self.is_shown:
            self._handle.update(picture)
        else:
            self._cell = self._shell.execution_count
            self._handle = display.display(picture, display_id=True)
        took = time.perf_counter() - started
        self._due = time.perf_counter() + max(LEAST, took / SHARE)

    def follow(self) -> None:
        """Draw if the last picture is old enough."""
        if self._shell is not None and time.perf_counter() >= self._due:
            self.show()
