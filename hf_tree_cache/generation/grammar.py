"""Grammars for branches: xgrammar's masks, with a state that is forked and rolled back with them.

Needs ``pip install hf_tree_cache[grammar]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import InvalidArgument
from ..sending import send
from .processors import BranchingProcessor

try:
    import xgrammar
except ImportError as error:
    raise ImportError(
        "hf_tree_cache.generation.grammar builds on xgrammar, which cannot be imported. Run "
        "`pip install xgrammar`."
    ) from error


@dataclass
class _Constraint:
    """Where one branch is in its grammar: ``accepted`` tokens from generated token ``start`` on."""

    grammar: Any
    matcher: Any = field(default=None, repr=False)
    start: int = -1
    accepted: int = 0


class GrammarProcessor(BranchingProcessor):
    """Keeps each branch within a grammar: its own, or one for all.

    For ``BranchRunner(processors=[...])`` and for ``tree_generate(branching=[...])``. A fork goes
    on where its parent is in the grammar, also from an earlier token; appended tokens count.
    A branch that has come to the end of its grammar (its end token included) is free.

    Args:
        grammar: an ``xgrammar.CompiledGrammar`` for branches without one of their own; it begins
            with the first token behind the prompt.

    Raises:
        InvalidArgument: not a compiled grammar.
    """

    def __init__(self, grammar: Any = None) -> None:
        self._default = _compiled(grammar)
        self._constraints: dict[int, _Constraint] = {}

    def constrain(self, branch: int, grammar: Any) -> None:
        """From here on ``branch``, and what is forked from it, follows ``grammar``; None frees it.

        Raises:
            InvalidArgument: not a compiled grammar.
        """
        self._constraints[branch] = _Constraint(_compiled(grammar))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        mask = xgrammar.allocate_token_bitmask(*scores.shape)
        bound, last = [], self.batch.last_tokens
        for row, (branch, length) in enumerate(
            zip(self.batch.branches, self.batch.lengths, strict=True)
        ):
            constraint = self._constraints.get(branch)
            if constraint is None:
                constraint = _Constraint(self._default, start=0)
                self._constraints[branch] = constraint
            if constraint.grammar is None:
                continue
            self._follow(constraint, input_ids[row], length, last[row] if last else None)
            if not constraint.matcher.is_terminated():
                constraint.matcher.fill_next_token_bitmask(mask, row)
                bound.append(row)
        if not bound:
            return scores
        scores = scores.clone()
        xgrammar.apply_token_bitmask_inplace(scores, send(mask, scores.device), indices=bound)
        return scores

    def on_fork(self, parent: int, children: Sequence[int]) -> None:
        known = self._constraints.get(parent)
        if known is not None:
            for child in children:
                matcher = None if known.matcher is None else known.matcher.fork()
                self._constraints[child] = _Constraint(
                    known.grammar, matcher, known.start, known.accepted
                )

    def on_prune(self, branch: int) -> None:
        self._constraints.pop(branch, None)

    def _follow(
        self, constraint: _Constraint, tokens: torch.Tensor, length: int, last: int | None
    ) -> None:
        """Bring the matcher to the ``length`` generated tokens at the end of ``tokens``.

        Args:
            last: of these, if the host knows it: reading would wait for the device.
        """
        if constraint.start < 0 or constraint.start > length:
            constraint.start, constraint.accepted, constraint.matcher = length, 0, None
        if constraint.matcher is None:
            constraint.matcher = xgrammar.GrammarMatcher(constraint.grammar)
        wanted = length - constraint.start
        if wanted < constraint.accepted:
            constraint.matcher.rollback(constraint.accepted - wanted)
            constraint.accepted = wanted
        behind = wanted - constraint.accepted
        is_known = behind == 1 and last is not None
        for token in [last] if is_known else tokens[len(tokens) - behind :].tolist():
            if not constraint.matcher.is_terminated() and not constraint.matcher.accept_token(
                token
            ):
                raise InvalidArgument(
                    f"GrammarProcessor: token {token} does not fit the grammar of its branch. It "
                    "was appended by hand, or another processor overruled the mask; constrain the "
                    "branch anew, or fork it before that token."
                )
            constraint.accepted += 1


def _compiled(grammar: Any) -> Any:
    if grammar is not None and not isinstance(grammar, xgrammar.CompiledGrammar):
        raise InvalidArgument(
            f"GrammarProcessor: {type(grammar).__name__} is not a compiled grammar. Make one with "
            "xgrammar.GrammarCompiler(xgrammar.TokenizerInfo.from_huggingface(tokenizer, "
            "vocab_size=model.config.vocab_size)).compile_regex(...), or compile_json_schema."
        )
    return grammar
