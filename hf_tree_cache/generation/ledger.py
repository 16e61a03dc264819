"""Ledger: which branches there are, and where in the record each of them stands."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from ..errors import InvalidArgument, StaleBranch
from .frontier import Tip
from .options import Branch
from .record import GenerationTree


@dataclass(eq=False)
class BranchState:
    """What a runner knows of one branch.

    A branch gets a leaf of its own in the record with its first own token; until then it stands at
    position ``length`` of a node that others may share.

    Attributes:
        branch: its id.
        prompt: index of its prompt.
        prompt_length: tokens of the prompt.
        node: node of the record.
        length: tokens, prompt included.
        tip: where it stands in the cache; None once it is pruned or finished.
        apart: its first token must differ from those of its siblings.
        counted: it stands at the open end of ``node``.
        logprob: sum over the generated tokens.
        ended: how, once it has no tip.
    """

    branch: Branch
    prompt: int
    prompt_length: int
    node: int
    length: int
    tip: Tip | None
    apart: bool = False
    counted: bool = False
    logprob: float = 0.0
    ended: str = ""


class Ledger:
    """Branches by id, and their places in a :class:`GenerationTree`."""

    def __init__(self, tree: GenerationTree) -> None:
        self.tree = tree
        self._states: list[BranchState] = []
        self.num_live = 0
        self._standing: Counter[int] = Counter()  # branches at the open end of a node

    @property
    def live(self) -> list[Branch]:
        return [state.branch for state in self._states if state.tip is not None]

    def add_prompt(self, root: int, tip: Tip) -> BranchState:
        node = self.tree.nodes[root]
        return self._add(node.prompt, node.end, root, node.end, tip)

    def fork(self, parent: BranchState, tip: Tip, position: int) -> BranchState:
        """A branch with the first ``position`` tokens of ``parent``."""
        prompt_length = min(parent.prompt_length, position)
        child = self._add(parent.prompt, prompt_length, parent.node, position, tip)
        if position == parent.length:
            child.logprob = parent.logprob
            if parent.counted:
                child.counted = True
                self._standing[child.node] += 1
        else:
            child.logprob = sum(self.logprobs(child))
        return child

    def append(self, state: BranchState, token: int, logprob: float) -> None:
        """Record a token of a branch."""
        if not (self._is_alone(state) and self.tree.nodes[state.node].state == "alive"):
            self._open(state)
        self.tree.append(state.node, token, logprob)
        state.length += 1
        state.logprob += logprob

    def end(self, state: BranchState, how: str, reason: str) -> None:
        """Close a branch as "pruned" or "finished"."""
        self.num_live -= 1
        state.tip, state.ended = None, f"{how} ({reason})" if reason else how
        if not state.counted:
            return
        state.counted = False
        self._standing[state.node] -= 1
        if self._standing[state.node]:
            return  # others go on from here
        node = self.tree.nodes[state.node]
        if how == "pruned":
            if node.state in ("alive", "finished"):
                self.tree.prune(node.id, reason or None)
        elif node.state == "alive":
            self.tree.finish(node.id, reason or None)

    def mark_finished(self, state: BranchState, reason: str) -> None:
        """Its last token ended the text; it may still be carried on by hand."""
        if self._standing[state.node] == 1:
            self.tree.finish(state.node, reason)

    def tokens(self, state: BranchState) -> list[int]:
        return self.tree.tokens(state.node)[: state.length]

    def logprobs(self, state: BranchState) -> list[float]:
        return self.tree.logprobs(state.node)[: state.length - state.prompt_length]

    def get(self, call: str, branch: int) -> BranchState:
        """The state of ``branch``, live or ended.

        Raises:
            StaleBranch: there never was one.
            InvalidArgument: not an int.
        """
        if isinstance(branch, bool) or not isinstance(branch, int):
            raise InvalidArgument(
                f"{call}({branch!r:.60}): give a branch, as add_prompts and fork return them."
            )
        if not 0 <= branch < len(self._states):
            raise StaleBranch(
                f"{call}({branch}): this runner has made {len(self._states)} branches; {branch} is "
                "not one of them. It belongs to another runner, or to the cache below."
            )
        return self._states[branch]

    def get_live(self, call: str, branch: int) -> BranchState:
        """As :meth:`get`.

        Raises:
            StaleBranch: it was pruned or finished, or there never was one.
        """
        state = self.get(call, branch)
        if state.tip is None:
            raise StaleBranch(
                f"{call}({branch}): branch {branch} was {state.ended}, and its K/V are freed. Its "
                "tokens and text can still be read. Fork a branch before you end it, to go on from "
                "it later."
            )
        return state

    def _add(
        self, prompt: int, prompt_length: int, node: int, length: int, tip: Tip
    ) -> BranchState:
        branch = Branch(len(self._states))
        state = BranchState(branch, prompt, prompt_length, node, length, tip)
        self._states.append(state)
        self.num_live += 1
        tip.users += 1
        return state

    def _is_alone(self, state: BranchState) -> bool:
        """Whether it stands at the open end of a node, and nobody else does."""
        return state.counted and self._standing[state.node] == 1

    def _open(self, state: BranchState) -> None:
        """Give ``state`` a leaf that it alone appends to."""
        node = self.tree.nodes[state.node]
        if self._is_alone(state) and node.state == "finished":
            self.tree.reopen(node.id)
            return
        if state.counted:
            self._standing[node.id] -= 1
        if node.end == state.length and node.state == "alive":
            leaf = self.tree.fork(node.id, 1)[0]
        elif node.end == state.length and node.state == "forked":
            leaf = self.tree.open_branch(node.id)
        else:
            leaf = self.tree.fork_at(node.id, state.length)
        state.node, state.counted = leaf, True
        self._standing[leaf] = 1
