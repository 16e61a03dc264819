"""What has to be done around one forward over a TreeCache: read, collapse, begin; then expand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import InvalidArgument
from ..naming import batch_dim
from ..sending import to_device
from . import pictures
from .cache import TreeCache


@dataclass
class Collapsed:
    """What the hook after a forward has to expand again.

    Attributes:
        inverse: computed row of each row of the caller.
        num_computed: U, rows that went through the model.
        restore: computed row of each row that the cache had before, to undo the collapse.
    """

    inverse: list[int]
    num_computed: int
    restore: list[int]


class Forward:
    """The keyword arguments of one forward over a TreeCache, made ready for it."""

    def __init__(self, cache: TreeCache, kwargs: dict[str, Any]) -> None:
        self.cache = cache
        self.kwargs = kwargs

    @property
    def mask(self) -> torch.Tensor | None:
        """The 2-D attention mask, if there is one."""
        mask = self.kwargs.get("attention_mask")
        return mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None

    def prepare(self) -> Collapsed | None:
        """Collapse equal rows, read the padding, and decide the step. Decoding reads nothing."""
        cache = self.cache
        inputs = self.kwargs.get("input_ids")
        if inputs is None:
            inputs = self.kwargs.get("inputs_embeds")
        if inputs is None:
            return None
        asked, num_new = inputs.shape[:2]
        if num_new == 0:
            raise InvalidArgument(
                "The forward has no tokens: an empty prompt, or a prompt that is cached already."
            )
        expected = cache.take_expected(asked, num_new)
        if expected is not None:
            cache.begin(asked, num_new, counts=expected, padding_known=True)
            return None
        before = cache.get_seq_length()
        if num_new == 1 and before:
            odd = self._hides_more_than_padding(before)
            cache.begin(asked, 1, padding_known=not odd, odd_mask=odd)
            return None
        if before:
            self._reject_repeated_prompt(before, num_new)
        collapsed = self._collapse(asked) if num_new > 1 else None
        mask = None if self.mask is None else self.mask.bool().cpu()
        num_rows = asked if collapsed is None else collapsed.num_computed
        counts, odd = _read_padding(cache, mask, num_rows, num_new, before)
        try:
            cache.begin(
                num_rows,
                num_new,
                counts=counts,
                asked_rows=asked,
                padding_known=not odd,
                odd_mask=odd,
            )
        except BaseException:
            if collapsed is not None and before:
                cache.select(collapsed.restore)
            raise
        return collapsed

    def _hides_more_than_padding(self, before: int) -> bool:
        """Whether the mask of a decoding step hides stored tokens.

        On a GPU reading it would wait for the device at every token: there masks may only grow.
        """
        if self.mask is None:
            return False
        if self.mask.shape[1] != before + 1:
            return True
        if self.mask.device.type != "cpu":
            return False
        lengths = self.cache.tree.row_lengths()
        return int(self.mask.sum()) * len(lengths) != len(self.mask) * (sum(lengths) + len(lengths))

    def _reject_repeated_prompt(self, before: int, num_new: int) -> None:
        """A prompt that begins again would be appended to itself, and nobody would notice."""
        positions = self.kwargs.get("position_ids")
        if self.mask is not None:
            again = self.mask.shape[1] < before + num_new
        elif self.kwargs.get("attention_mask") is not None:
            return
        elif isinstance(positions, torch.Tensor) and positions.ndim == 2:
            again = int(positions[:, 0].min()) < min(self.cache.tree.row_lengths(), default=0)
        else:
            return
        if again:
            raise InvalidArgument(
                f"The forward brings {num_new} tokens that begin before the end of the {before} "
                "columns that are cached already, so a prompt would be appended to itself. To "
                "compute its last token again call cache.crop(-1), to start over cache.reset(), "
                "to go on pass the whole conversation, longer than what is cached."
            )

    def _collapse(self, num_rows: int) -> Collapsed | None:
        """Keep the first of each set of equal rows, in the arguments and in the cache."""
        tree = self.cache.tree
        batched = self._batched_arguments(num_rows)
        have = len(tree.rows)
        if batched is None or (have and num_rows % have):
            return None
        # A cache with fewer rows would be forked, each row into neighbours.
        fan_out = num_rows // have if have else 1
        contents = [
            value.movedim(dim, 0).reshape(num_rows, -1).cpu().numpy()
            for value, dim in batched.values()
        ]
        pasts = [id(tip) for tip in tree.tips() for _ in range(fan_out)] or [0] * num_rows
        computed: dict[tuple[Any, ...], int] = {}
        first: list[int] = []
        inverse: list[int] = []
        for row, past in enumerate(pasts):
            content = (past, *(rows[row].tobytes() for rows in contents))
            if content not in computed:
                computed[content] = len(first)
                first.append(row)
            inverse.append(computed[content])
        if len(first) == num_rows:
            return None
        if any(self.kwargs.get(name) is not None for name in pictures.NAMES):
            cut = pictures.of_one_row(self.kwargs, num_rows) if len(first) == 1 else None
            if cut is None:
                return None
            self.kwargs.update(cut)
        for name, (value, dim) in batched.items():
            index = to_device(first, value.device)
            self.kwargs[name] = value.index_select(dim, index)
        if have:
            self.cache.select([row // fan_out for row in first])
        return Collapsed(inverse, len(first), inverse[::fan_out])

    def _batched_arguments(self, num_rows: int) -> dict[str, tuple[torch.Tensor, int]] | None:
        """Arguments with a batch, and where they have it; None when rows must not be collapsed."""
        if num_rows < 2 or self.kwargs.get("input_ids") is None or torch.is_grad_enabled():
            return None
        if self.kwargs.get("labels") is not None or self.kwargs.get("output_router_logits"):
            return None
        batched = {}
        for name, value in self.kwargs.items():
            if name in pictures.NAMES:
                continue
            if isinstance(value, (Mapping, list, tuple)) and value:
                return None
            if not isinstance(value, torch.Tensor):
                continue
            # Sound and the like: which row it belongs to, only the model knows.
            if value.is_floating_point():
                return None
            dim = batch_dim(name, value.ndim)
            if value.ndim > dim and value.shape[dim] == num_rows:
                batched[name] = value, dim
        return batched


def _read_padding(
    cache: TreeCache, mask: torch.Tensor | None, num_rows: int, num_new: int, before: int
) -> tuple[list[int] | None, bool]:
    """(new tokens of each row or None for T each, whether more is hidden than left padding)."""
    if mask is None or mask.shape[0] != num_rows:
        return None, mask is not None
    lengths = cache.tree.row_lengths() or [0]
    lengths = [length for length in lengths for _ in range(num_rows // len(lengths))]
    if mask.shape[1] != before + num_new or len(lengths) != num_rows:
        return None, not bool(mask.all())
    hidden = (~mask).sum(1)
    leading = (mask.cumsum(1) == 0).sum(1)
    odd = bool((hidden != leading).any())
    past = torch.tensor(lengths)
    # Padding behind a stored token cannot be left out any more: it is stored, and masked.
    new = torch.where(past == 0, (before + num_new - leading).clamp_max(num_new), num_new)
    expected = before - past
    odd |= bool(((past > 0) & (leading != expected)).any())
    return new.tolist(), odd


def expand_output(output: Any, collapsed: Collapsed) -> Any:
    """Give every row of the caller its outputs back: repeat along the batch whatever has one."""

    def expand(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if value.ndim < 2 or value.shape[0] != collapsed.num_computed:
                return value
            return value.index_select(0, to_device(collapsed.inverse, value.device))
        if type(value) in (tuple, list):
            return type(value)(expand(item) for item in value)
        return value

    if isinstance(output, tuple):
        return expand(output)
    for key in list(output.keys()):
        output[key] = expand(output[key])
    return output
