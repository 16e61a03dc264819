"""The tokenizer that ``generate`` takes for its stop strings: who gets it, and who does not.

Transformers hands it on to every forward of its own loops, whose attention would have to say that
it means nothing, and takes it away from a ``custom_generate`` that asks for it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

TOKENIZER = "tokenizer"

METHOD = "_extract_generation_mode_kwargs"
"""Where ``generate`` sorts out what is for a loop; of transformers' own, so it may go."""


def drop_tokenizer(model: PreTrainedModel, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a forward without it, unless the forward has it by name."""
    if TOKENIZER not in kwargs or _asks(model.forward):
        return kwargs
    return {name: value for name, value in kwargs.items() if name != TOKENIZER}


def hand_tokenizer_on(model: PreTrainedModel) -> None:
    """Until :func:`undo`, a ``custom_generate`` with such a parameter gets it."""
    theirs = getattr(model, METHOD, None)
    if theirs is None:
        return

    @functools.wraps(theirs)
    def extract(
        custom_generate: Any, kwargs: dict[str, Any], *args: Any, **more: Any
    ) -> dict[str, Any]:
        tokenizer = kwargs.get(TOKENIZER)
        found: dict[str, Any] = theirs(custom_generate, kwargs, *args, **more)
        if tokenizer is not None and callable(custom_generate) and _asks(custom_generate):
            found[TOKENIZER] = tokenizer
        return found

    setattr(model, METHOD, extract)


def undo(model: PreTrainedModel) -> None:
    """Give the model its own method back."""
    vars(model).pop(METHOD, None)


def _asks(function: Callable[..., Any]) -> bool:
    return TOKENIZER in inspect.signature(function).parameters
