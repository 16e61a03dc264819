"""Task: the search for one question: its steps, the branches that hold them, what it spent."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..errors import InvalidArgument
from ..generation.options import Branch, Stop
from ..generation.runner import BranchRunner
from .answers import AnswerClasses, AnswerFunction
from .policy import Action, Conclusion, Expand, SearchNode, SearchTree
from .result import EndedBy, SearchCost, SearchResult, make_result
from .scoring import Candidate


@dataclass(frozen=True, slots=True)
class Limits:
    """Where steps and sequences end.

    Attributes:
        delimiters: texts that end a step, and belong to it. A step holds more than white space.
        stop: texts that end a sequence, besides the end-of-sequence token.
        max_new_tokens: most generated tokens of a sequence.
        max_step_tokens: most tokens of a step; None for no bound of its own.
    """

    delimiters: tuple[str, ...] = ("\n",)
    stop: tuple[str, ...] = ()
    max_new_tokens: int = 512
    max_step_tokens: int | None = None

    def __post_init__(self) -> None:
        least = self.max_new_tokens if self.max_step_tokens is None else self.max_step_tokens
        if min(self.max_new_tokens, least) < 1:
            raise InvalidArgument(
                f"max_new_tokens={self.max_new_tokens}, max_step_tokens={self.max_step_tokens}: "
                "give at least 1."
            )
        for name in ("delimiters", "stop"):
            texts = getattr(self, name)
            if isinstance(texts, str) or not all(isinstance(t, str) and t for t in texts):
                raise InvalidArgument(
                    f"{name}={texts!r}: give a list of texts that are not empty, or no text at all."
                )


@dataclass(slots=True)
class Step:
    """A step that is being generated.

    Attributes:
        node: in the search of its question.
        branch: in the runner.
        start: tokens of the branch when the step began, prompt and prefix included.
        logprob: of the branch by then.
        spoken: characters of its text by then.
        left: tokens that the step may still generate.
        stop: ends it.
        tail: what it said last in earlier turns of the runner, and since: a stop string may have
            begun before the turn.
        carried: characters of ``tail`` from earlier turns.
    """

    node: SearchNode
    branch: Branch
    start: int
    logprob: float
    spoken: int
    left: int
    stop: Stop
    tail: str = ""
    carried: int = 0

    def begin_turn(self) -> None:
        """Remember the end of what was said, as the runner looks only at the text of its turn."""
        longest = max(map(len, self.stop.strings), default=1)
        self.tail = self.node.step[len(self.node.step) - longest + 1 :] if longest > 1 else ""
        self.carried = len(self.tail)

    def crosses(self, piece: str) -> bool:
        """Whether ``piece`` completes a stop string that began in an earlier turn."""
        if not self.carried:
            return False
        self.tail += piece
        # What lies in the carried part as a whole has been looked at when it was said.
        found = any(
            0 <= self.tail.find(text, max(0, self.carried - len(text) + 1)) < self.carried
            for text in self.stop.strings
        )
        if len(self.tail) > self.carried + max(map(len, self.stop.strings)):
            self.carried = 0  # whatever began before the turn has ended by now
        return found


@dataclass(slots=True)
class Task:
    """One question.

    Attributes:
        search: what its policy sees.
        runner: holds its branches.
        limits: where steps and sequences end.
        answer: finds an answer in a text.
        classes: makes equal answers one.
        root: branch of the prompt.
        held: branch of every node that can be expanded or asked about.
        steps: what is being generated, by node.
        ends: branch of every node that is done, live or not.
        holding: nodes that keep their branch when they are done.
        tokens: generated so far.
        branches: started so far.
        met: a bound that refused it something, and so shaped its end.
        ended_by, reason: how it ended.
        changed: something happened that its policy has not seen.
    """

    search: SearchTree
    runner: BranchRunner
    limits: Limits
    answer: AnswerFunction
    classes: AnswerClasses
    root: Branch
    held: dict[int, Branch] = field(default_factory=dict)
    steps: dict[int, Step] = field(default_factory=dict)
    ends: dict[int, Branch] = field(default_factory=dict)
    holding: set[int] = field(default_factory=set)
    tokens: int = 0
    branches: int = 0
    met: EndedBy | None = None
    ended_by: EndedBy | None = None
    reason: str = ""
    changed: bool = True

    def __post_init__(self) -> None:
        self.held[0] = self.root

    def start(self, action: Expand, branch: Branch) -> Step:
        """Begin a step on ``branch``, which stands where it starts."""
        parent = self.search.nodes[action.node]
        node = self.search.add(parent.id, action.kind, bool(action.prefix) or parent.aside)
        node.text = self.runner.text(branch) if action.prefix else parent.text
        left = self.limits.max_new_tokens
        if not node.aside:
            left -= self.search.num_tokens(parent.id)
        own = action.max_new_tokens
        if own is None and not (action.to_end or node.aside):
            own = self.limits.max_step_tokens
        ends = self.limits.stop
        if not (action.to_end or node.aside):
            ends = (*ends, *self.limits.delimiters)
        step = Step(
            node=node,
            branch=branch,
            start=self.runner.length(branch),
            logprob=self.runner.logprob(branch),
            spoken=len(node.text),
            left=left if own is None else min(left, own),
            stop=Stop(strings=ends),
        )
        if action.hold:
            self.holding.add(node.id)
        self.steps[node.id] = step
        self.branches += 1
        return step

    def sync(self, step: Step) -> None:
        """Bring a node up to date with its branch."""
        node = step.node
        if self.runner.length(step.branch) == step.start + node.num_tokens:
            return
        node.text = self.runner.text(step.branch)
        node.step = node.text[step.spoken :]
        node.num_tokens = self.runner.length(step.branch) - step.start
        node.logprob = self.runner.logprob(step.branch) - step.logprob

    def stop_step(self, step: Step, reason: str) -> bool:
        """The runner stopped a branch, "eos", "stop" or "length"; False if its step goes on."""
        self.sync(step)
        node = step.node
        if reason == "length" and step.left > 0:
            return False
        if reason == "stop" and not any(text in node.step for text in self.limits.stop):
            reason = "delimiter"
            if not node.step.strip() and step.left > 0:
                return False
        full = self.search.num_tokens(node.id) >= self.limits.max_new_tokens
        del self.steps[node.id]
        self.changed = True
        node.reason = "length" if full and reason == "delimiter" else reason
        if not (reason in ("eos", "stop") or full or node.aside):
            node.state = "open"
            self.held[node.id] = step.branch
            return True
        node.state = "done"
        self.ends[node.id] = step.branch
        if not node.aside:
            node.answer = self.classes.of(self.answer(node.text))
        if node.id in self.holding:
            self.held[node.id] = step.branch
        else:
            self.runner.finish(step.branch, node.reason)
        return True

    def prune(self, node: int, reason: str) -> None:
        """Give up ``node`` and all that follows it."""
        for below in self.search.below(node):
            step = self.steps.pop(below.id, None)
            if step is not None:
                self.sync(step)
                self.runner.prune(step.branch, reason)
            if below.state in ("running", "open", "closed"):
                below.state, below.reason = "pruned", reason
            self._release(below, reason)

    def cut(self, reason: str) -> None:
        """Stop what runs."""
        for step in self.steps.values():
            self.sync(step)
            step.node.state, step.node.reason = "cut", reason
            self.runner.prune(step.branch, reason)
        self.steps.clear()

    def end(self, ended_by: EndedBy, reason: str = "") -> None:
        """Stop here: what runs is cut, and no K/V are held any longer."""
        self.cut(reason or ended_by)
        self.ended_by, self.reason = ended_by, reason
        if ended_by == "policy" and self.met:
            self.ended_by = self.met
        for node in list(self.held):
            self._release(self.search.nodes[node], "held to the end")

    def _release(self, node: SearchNode, reason: str) -> None:
        branch = self.held.pop(node.id, None)
        if branch is None:
            return
        if node.state == "done":
            self.runner.finish(branch, node.reason or "")
        else:
            self.runner.prune(branch, reason)

    def node(self, action: Action, node: int) -> SearchNode:
        """The node that an action names.

        Raises:
            InvalidArgument: there is none.
        """
        if not 0 <= node < len(self.search.nodes):
            raise self.misfit(action, f"there are {len(self.search.nodes)} nodes")
        return self.search.nodes[node]

    def misfit(self, action: Action, why: str) -> InvalidArgument:
        """An error that names an action of the policy and what is wrong with it."""
        return InvalidArgument(f"The policy asked for {action!r:.120}, but {why}.")

    def candidate(self, action: Action, node: SearchNode) -> Candidate:
        """What the scorer sees of ``node``.

        Raises:
            InvalidArgument: it has a score, or no branch that could be read.
        """
        branch = self.ends.get(node.id, self.held.get(node.id))
        if branch is None or node.score is not None:
            state = "has a score" if branch is not None else f"is {node.state}"
            raise self.misfit(action, f"node {node.id} {state}")
        return Candidate(
            question=self.search.question,
            text=node.text,
            step=node.step,
            tokens=self.runner.tokens(branch, include_prompt=False),
            logprobs=self.runner.logprobs(branch),
            done=node.state == "done",
            answer=node.answer,
        )

    def result(self, found: Conclusion, cost: SearchCost) -> SearchResult:
        """What was found; the task has ended."""
        assert self.ended_by is not None
        tree, place = self.runner.tree.of_prompt(self.runner.prompt(self.root))
        return make_result(
            self.search,
            found,
            tree,
            {node: place[self.runner.node(branch)] for node, branch in self.ends.items()},
            ended_by=self.ended_by,
            reason=self.reason,
            tokens_generated=sum(node.num_tokens for node in self.search.nodes),
            branches=self.branches,
            cost=cost,
        )
