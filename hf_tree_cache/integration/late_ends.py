"""Stock ``generate`` looks a token late whether all rows have ended, so that its host works ahead.

Its loop reads that after every token, and a GPU then waits for the host to ask for the next
forward. On Apple's GPUs transformers reads it a token late and takes the forward that was too many
back; here TreeCaches get the same on other devices that work ahead, wherever nobody can tell.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import distributed
from transformers import PreTrainedModel
from transformers.generation import utils as stock

from .cache import TreeCache

LATE_ON = ("cuda",)
"""Devices where an enabled model looks late; where transformers does by itself, anyway."""

METHODS = {
    "_get_logits_processor": ("logits_processor", "prefix_allowed_tokens_fn"),
    "_get_stopping_criteria": ("stopping_criteria",),
}
"""Where ``generate`` turns to its model with code of its caller, and under which names."""


class LateEnds:
    """Allows it for one model, until :meth:`undo`.

    Not where code of the caller (logits processors, stopping criteria) would be called once more
    after the last end; not for a bounded cache, which may have no room for one more token, nor one
    with linear-attention states, of which copies would be kept; not among several processes, which
    may wait for each other's forwards.

    Args:
        cache: the TreeCache that the model was last called with.
    """

    def __init__(self, model: PreTrainedModel, cache: Callable[[], TreeCache | None]) -> None:
        self._model = model
        self._cache = cache
        self._foreign = _Foreign()
        # Transformers' own helpers, which may go.
        if hasattr(stock, "DeferredStopCheck") and all(hasattr(model, m) for m in METHODS):
            for method, names in METHODS.items():
                setattr(model, method, self._watched(method, names))
            _install(self)

    def undo(self) -> None:
        """Give the model its methods back, and transformers its class after the last model."""
        for method in METHODS:
            vars(self._model).pop(method, None)
        _remove(self)

    def allows(self, cache: Any) -> bool:
        """Whether ``generate`` may look late, which has just computed its prompt with ``cache``."""
        return (
            isinstance(cache, TreeCache)
            and cache is self._cache()
            and not cache.is_bounded
            and not cache.has_states
            and not any(vars(self._foreign).values())
            and _num_processes() == 1
        )

    def _watched(self, method: str, names: tuple[str, ...]) -> Callable[..., Any]:
        prepare = getattr(self._model, method)

        @functools.wraps(prepare)
        def watch(*args: Any, **kwargs: Any) -> Any:
            vars(self._foreign)[method] = bool(args) or any(map(kwargs.get, names))
            return prepare(*args, **kwargs)

        return watch


class _Foreign(threading.local):
    """By method, whether the thread's last ``generate`` came with code of its caller."""


def _install(late: LateEnds) -> None:
    """Have ``generate`` ask ``late``, too."""
    current: Any = stock.DeferredStopCheck
    if not hasattr(current, "asked"):
        stock.DeferredStopCheck = _make_check(current)  # type: ignore[misc]
    stock.DeferredStopCheck.asked.append(late)  # type: ignore[attr-defined]


def _remove(late: LateEnds) -> None:
    current: Any = getattr(stock, "DeferredStopCheck", None)
    asked = getattr(current, "asked", [])
    if late in asked:
        asked.remove(late)
        if not asked:
            stock.DeferredStopCheck = current.original  # type: ignore[misc]


def _make_check(base: Any) -> Any:
    """A subclass of transformers' check that also serves whom the ``asked`` allow it."""

    class LateStopCheck(base):
        """Also leaves the generator of random numbers as if the last forward had not been."""

        original = base
        asked: ClassVar[list[LateEnds]] = []

        def __init__(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> None:
            super().__init__(input_ids, *args, **kwargs)
            self._generator = _default_generator(input_ids.device)
            self._states: list[torch.Tensor] = []

        @staticmethod
        def is_supported(device: torch.device, cache: Any, *args: Any, **kwargs: Any) -> bool:
            if base.is_supported(device, cache, *args, **kwargs):
                return True
            if device.type not in LATE_ON or not any(late.allows(cache) for late in own.asked):
                return False
            # All else that transformers demands of an Apple GPU.
            return base.is_supported(torch.device("mps"), cache, *args, **kwargs)

        def __call__(self, *args: Any, **kwargs: Any) -> bool:
            if self._generator is not None:
                self._states = [*self._states[-1:], self._generator.get_state()]
            return super().__call__(*args, **kwargs)

        def finish(self) -> int:
            steps = super().finish()
            if self._generator is not None and steps:
                self._generator.set_state(self._states[-1 - steps])
            return steps

    own = LateStopCheck
    return own


def _num_processes() -> int:
    is_distributed = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if is_distributed else 1


def _default_generator(device: torch.device) -> torch.Generator | None:
    """That tokens on ``device`` are drawn with, where its state is at hand without waiting."""
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return torch.cuda.default_generators[index]
    return torch.default_generator if device.type == "cpu" else None
