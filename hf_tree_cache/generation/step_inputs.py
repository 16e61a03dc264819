"""What a decoding loop passes to the model besides the tokens, step after step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import GenerationMixin
from transformers.utils import ModelOutput

from ..integration.cache import TreeCache
from ..naming import CACHE, batch_dim

GROWING = "prepare_inputs_for_generation", "_update_model_kwargs_for_generation"
"""Transformers' functions between two forwards; they copy and grow tensors of all tokens."""

ROOM = 256
"""Columns by which a mask of ones grows at a time."""


class StepInputs:
    """The model's arguments, kept as transformers' own loop keeps them.

    Where they are positions, a mask that hides nothing, and values that stay, a step only takes the
    positions on by one: transformers' functions would make the same of them, in a dozen launches.

    Args:
        kwargs: ``model_kwargs`` of ``generate``.
        hides: the mask hides tokens of the prompts.

    Attributes:
        kwargs: as they are now, for the step that comes.
    """

    def __init__(self, kwargs: dict[str, Any], *, hides: bool) -> None:
        self.kwargs = kwargs
        self._hides = hides
        self._constant: dict[str, Any] | None = None  # what stays, once that is known
        self._mask: torch.Tensor | None = None  # of ones, where one is passed, with room to grow
        self._looked = False

    def of_step(self, model: Any, input_ids: torch.Tensor) -> dict[str, Any]:
        """The arguments of a forward of the last of ``input_ids [R, L]``."""
        if self._constant is not None:
            last = {"input_ids": input_ids[:, -1:], "position_ids": self._positions()}
            if self._mask is not None:
                last["attention_mask"] = self._ones(len(input_ids), input_ids.shape[1], self._mask)
            return {**last, **self._constant}
        inputs = model.prepare_inputs_for_generation(
            input_ids, next_sequence_length=1, **self.kwargs
        )
        if not self._looked and not self._hides:
            self._constant = find_constant(model, self.kwargs, inputs)
            if self._constant is not None:
                self._mask = self.kwargs.pop("attention_mask", None)
        self._looked = True
        return inputs

    def advance(self, model: Any, outputs: Any) -> None:
        """A forward is done; the next one is of one token more."""
        if self._constant is not None:
            self.kwargs["position_ids"] = self._positions() + 1
            return
        self.kwargs = model._update_model_kwargs_for_generation(
            outputs, self.kwargs, is_encoder_decoder=model.config.is_encoder_decoder
        )

    def select(self, index: torch.Tensor, num_rows: int) -> None:
        """Row i becomes old row ``index[i]`` of ``num_rows``; the cache is left alone."""
        self.kwargs = {
            key: value if key == CACHE else _select(key, value, index, num_rows)
            for key, value in self.kwargs.items()
        }

    def _positions(self) -> torch.Tensor:
        return self.kwargs["position_ids"][..., -1:]

    def _ones(self, rows: int, columns: int, mask: torch.Tensor) -> torch.Tensor:
        """``[rows, columns]``; a view of what is there already, most of the time."""
        if mask.shape[0] < rows or mask.shape[1] < columns:
            self._mask = mask = mask.new_ones(rows, columns + ROOM)
        return mask[:rows, :columns]


def find_constant(
    model: Any, kwargs: Mapping[str, Any], inputs: Mapping[str, Any]
) -> dict[str, Any] | None:
    """What is the same in every step; None if more than tokens, positions and a mask changes.

    Args:
        kwargs: a loop's own arguments for a step.
        inputs: what ``model.prepare_inputs_for_generation`` made of them.
    """
    for name in GROWING:
        own = getattr(type(model), name) is not getattr(GenerationMixin, name)
        if own or name in vars(model):
            return None
    ids, positions = inputs.get("input_ids"), kwargs.get("position_ids")
    if not (isinstance(ids, torch.Tensor) and isinstance(positions, torch.Tensor)):
        return None
    if ids.device != model.device or positions.device != model.device:
        return None
    changing = {"input_ids", "position_ids", "attention_mask"}
    constant = {name: value for name, value in inputs.items() if name not in changing}
    mask = inputs.get("attention_mask")
    if mask is not None and not (isinstance(mask, torch.Tensor) and mask.ndim == 2):
        return None
    for value in constant.values():
        if not (value is None or isinstance(value, (bool, int, float, str, TreeCache))):
            return None
    return constant


def _select(name: str, value: Any, index: torch.Tensor, num_rows: int) -> Any:
    """``value`` for the rows ``index``, where it has a batch of ``num_rows``."""
    if isinstance(value, torch.Tensor):
        dim = batch_dim(name, value.ndim)
        if value.ndim > dim and value.shape[dim] == num_rows:
            return value.index_select(dim, index.to(value.device))
        return value
    if isinstance(value, ModelOutput):
        return type(value)({k: _select(k, v, index, num_rows) for k, v in value.items()})
    if type(value) in (list, tuple):
        return type(value)(_select(name, item, index, num_rows) for item in value)
    return value
