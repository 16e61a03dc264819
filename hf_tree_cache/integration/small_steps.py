"""Norms and rotary embeddings of a model as decode steps compute them: one launch each.

Transformers computes them by eight and ten operators, whose launches take longer than their work.
Whether ours does what a model's own does is asked of it with made-up values, not read from names.
In half precision ours rounds once where most models round twice.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from ..forward.rotary import ANGLES, Rotation, Turn, make_rotary, make_rotary_of_one
from ..forward.small import HALF, rms_norm
from .pending import Pending
from .trial import WITHIN, agree, is_untouched, made_up

EPS_NAMES = ("variance_epsilon", "eps")
MORE = (0.0, 1.0)
"""What models add to the weight of a norm."""

ROTARY = "apply_rotary_pos_emb"
TURNS = [Turn(interleaved, angles) for interleaved in (False, True) for angles in ANGLES]
TRIAL_ROWS, TRIAL_SIZE = 2, 64


class SmallSteps:
    """The norms among ``parts``, and the rotary embeddings of their modelling files.

    Outside of :meth:`switched` everything computes as ever.

    Args:
        besides: modules to be left as they are, with the files that they come from. Where there
            are none, norms, sums and rotations may wait for each other (:class:`.pending.Pending`).
    """

    def __init__(self, parts: Iterable[nn.Module], *, besides: Iterable[nn.Module] = ()) -> None:
        others = set(besides)
        self._pending: Pending | None = None
        parts = [part for part in dict.fromkeys(parts) if part not in others]
        device = next((x.device for part in parts for x in part.parameters()), None)
        self.norms = [
            (part, norm) for part in parts if (norm := self._fuse_norm(part, device)) is not None
        ]
        sizes = {x.numel() for module, _ in self.norms for x in module.parameters()}
        self._sizes = set() if others else sizes
        kept = {type(part).__module__ for part in others}
        names = dict.fromkeys(type(part).__module__ for part in parts)
        files = [sys.modules[name] for name in names if name in sys.modules and name not in kept]
        self.rotaries = [
            (file, theirs, fused)
            for file in files
            if device is not None and (theirs := _own_rotary(file)) is not None
            if (fused := self._fuse_rotary(theirs, device)) is not None
        ]

    @contextmanager
    def switched(self) -> Iterator[Pending | None]:
        """Within, they take one launch each; what may wait does so in what this yields."""
        for module, fused in self.norms:
            module.forward = fused
        for file, theirs, rotary in self.rotaries:
            setattr(file, ROTARY, _InThisThread(rotary, theirs))
        # Compiled functions would not run under a mode.
        self._pending = Pending(self._sizes) if self._sizes else None
        try:
            with self._pending or nullcontext():
                yield self._pending
        finally:
            self._pending = None
            for module, _ in self.norms:
                vars(module).pop("forward", None)
            for file, theirs, _ in self.rotaries:
                setattr(file, ROTARY, theirs)

    def _norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, more: float) -> torch.Tensor:
        norm = rms_norm if self._pending is None else self._pending.norm
        return norm(x, weight, eps, more=more)

    def _rotate(self, rotation: Rotation) -> None:
        if self._pending is None:
            rotation.write()
        else:
            self._pending.hold(rotation)

    def _fuse_norm(
        self, module: nn.Module, device: torch.device | None
    ) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """A forward in one launch that does what the module's own does; None if there is none."""
        eps = next((vars(module)[name] for name in EPS_NAMES if name in vars(module)), None)
        if not isinstance(eps, float) or not is_untouched(module):
            return None
        if len(inspect.signature(module.forward).parameters) != 1:
            return None
        parameters = list(module.parameters())
        if not parameters and device is not None:
            return self._fuse_bare_norm(module, eps, device)
        weight = module._parameters.get("weight")
        if len(parameters) != 1 or weight is None or weight.ndim != 1 or weight.is_meta:
            return None

        shape = TRIAL_ROWS, len(weight)
        exact = made_up(*shape, like=weight, dtype=torch.float64)
        other = made_up(len(weight), like=weight, dtype=torch.float64)

        def theirs(x: torch.Tensor) -> object:
            return functional_call(module, {"weight": other}, (x,))

        def adds(more: float) -> bool:
            return agree(theirs, lambda x: rms_norm(x, other, eps, more=more), exact, within=WITHIN)

        more = next(filter(adds, MORE), None)
        if more is None:
            return None

        def fused(hidden_states: torch.Tensor) -> torch.Tensor:
            weight = module._parameters["weight"]
            assert weight is not None
            return self._norm(hidden_states, weight, eps, more)

        return fused if agree(module, fused, made_up(*shape, like=weight)) else None

    def _fuse_bare_norm(
        self, module: nn.Module, eps: float, device: torch.device
    ) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """As :meth:`_fuse_norm`, of a module without a weight."""
        ones: dict[tuple[int, torch.dtype, torch.device], torch.Tensor] = {}

        def fused(hidden_states: torch.Tensor) -> torch.Tensor:
            key = hidden_states.shape[-1], hidden_states.dtype, hidden_states.device
            if key not in ones:
                with torch.inference_mode(False):  # it outlives the block that it may be made in
                    ones[key] = torch.ones(key[0], dtype=key[1], device=key[2])
            return self._norm(hidden_states, ones[key], eps, 0.0)

        like = torch.empty(0, dtype=HALF[0], device=device)
        trial = made_up(TRIAL_ROWS, TRIAL_SIZE, like=like)
        same = agree(module, fused, trial.double(), within=WITHIN) and agree(module, fused, trial)
        return fused if same else None

    def _fuse_rotary(
        self, theirs: Callable[..., Any], device: torch.device
    ) -> Callable[..., object] | None:
        """One launch that does what a file's rotary embedding does; None if there is none."""
        like = torch.empty(0, dtype=HALF[0], device=device)
        q, k = (made_up(TRIAL_ROWS, heads, 1, TRIAL_SIZE, like=like) for heads in (2, 1))
        turn = _find_turn(theirs, lambda turn: make_rotary(theirs, turn=turn), q, k)
        if turn is not None:
            return make_rotary(theirs, self._rotate, turn)
        turn = _find_turn(
            _either_way(theirs), lambda turn: _either_way(make_rotary_of_one(theirs, turn=turn)), q
        )
        return None if turn is None else make_rotary_of_one(theirs, self._rotate, turn)


class _InThisThread:
    """``ours`` where it was made; other threads, which share the file, get ``theirs``."""

    def __init__(self, ours: Callable[..., Any], theirs: Callable[..., Any]) -> None:
        self._ours, self.theirs = ours, theirs
        self._thread = threading.get_ident()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        is_here = threading.get_ident() == self._thread
        return (self._ours if is_here else self.theirs)(*args, **kwargs)


def _own_rotary(file: ModuleType) -> Callable[..., Any] | None:
    """The file's own, also while another thread captures a step."""
    found: Any = getattr(file, ROTARY, None)
    return found.theirs if isinstance(found, _InThisThread) else found


def _find_turn(
    theirs: Callable[..., Any], ours: Callable[[Turn], Callable[..., Any]], *heads: torch.Tensor
) -> Turn | None:
    """The turn with which ``ours`` does what ``theirs`` does with ``heads``; None if there is none.

    Args:
        theirs, ours: of heads ``[B, H, 1, D]``, cosines and sines; several tensors.
    """

    def narrow(*trial: torch.Tensor) -> Any:
        rotated = theirs(*trial)
        if rotated[0].dtype != heads[0].dtype:
            raise TypeError("it widens")  # no need to compile ours for that
        return rotated

    def turns(turn: Turn, num_angles: int, dtype: torch.dtype = HALF[0]) -> bool:
        angles = made_up(2, TRIAL_ROWS, 1, num_angles, like=heads[0], dtype=dtype)
        return agree(narrow, ours(turn), *heads, *angles)

    for turn in TURNS:
        num_angles = TRIAL_SIZE // 2 if turn.angles == "pair" else TRIAL_SIZE
        if turns(turn, num_angles):
            partial = turns(turn._replace(partial=True), num_angles // 2)
            wide = turns(turn._replace(wide=True), num_angles, torch.float32)
            return turn._replace(partial=partial, wide=wide)
    return None


def _either_way(rotary: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    """``rotary`` of one tensor, whose heads come before its tokens, and then behind them."""

    def both(x: torch.Tensor, *angles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return rotary(x, *angles), rotary(x.transpose(1, 2), *angles, unsqueeze_dim=2)

    return both
