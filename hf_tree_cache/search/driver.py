"""SearchDriver: runs a policy over held branches, for any number of questions together."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

from tqdm.auto import tqdm

from ..errors import InvalidArgument, OutOfBlocks
from ..generation.options import Branch
from ..generation.record import GenerationTree
from ..generation.runner import BranchRunner
from ..notebook.live import LiveView, notebook_shell
from .answers import AnswerClasses, AnswerFunction, SameFunction, extract_answer, same_answer
from .budget import Budget
from .policy import Expand, Finish, Policy, Prune, Score, SearchNode, SearchTree
from .result import EndedBy, Question, SearchCost, SearchResult
from .scoring import Scorer, check_scores
from .task import Limits, Step, Task

Watch = Callable[[GenerationTree, Sequence[SearchTree]], None]


class SearchDriver:
    """Runs a :class:`~.policy.Policy` on a :class:`BranchRunner`.

    All running steps of all questions go forward together, one token a forward. When steps end, the
    policy of their question is asked; new steps join the batch, and pruned ones leave it, at the
    next token. Open nodes keep their branch, so that going back to one computes nothing again.

    Args:
        runner: computes. Branches that it has already are left alone.
        policy: decides.
        scorer: answers the policy's :class:`~.policy.Score`.
        answer: finds the answer in the text of a complete sequence, None where there is none.
        same: tells whether two answers are equal.
        limits: where steps and sequences end.
        budget: bounds of the search; ``blocks`` is the bound of the runner's cache.
        prompt: makes the prompt of a question; default the question itself.
        progress: show a bar, and in a notebook the growing tree until the search ends; default only
            on a terminal or in a notebook.
        watch: told the tree and the searches whenever steps have ended.

    Raises:
        InvalidArgument: something that is no policy, a runner without a tokenizer.
    """

    def __init__(
        self,
        runner: BranchRunner,
        policy: Policy,
        *,
        scorer: Scorer | None = None,
        answer: AnswerFunction = extract_answer,
        same: SameFunction = same_answer,
        limits: Limits | None = None,
        budget: Budget | None = None,
        prompt: Callable[[Any], Any] | None = None,
        progress: bool | None = None,
        watch: Watch | None = None,
    ) -> None:
        if isinstance(policy, type) or not isinstance(policy, Policy):
            raise InvalidArgument(
                f"SearchDriver(policy={policy!r:.60}): a policy is an object with decide(search) "
                "and conclude(search)."
            )
        if runner.tokenizer is None:
            raise InvalidArgument(
                "A search reads answers and the ends of steps from text: pass a tokenizer."
            )
        self.runner = runner
        self.policy = policy
        self.scorer = scorer
        self.answer = answer
        self.same = same
        self.limits = limits or Limits()
        self.budget = budget or Budget()
        self.prompt = prompt or (lambda question: question)
        self.progress = progress
        self.watch = watch
        self._tasks: list[Task] = []
        self._going: dict[Branch, tuple[Task, Step]] = {}
        self._scored = 0
        self._started = 0.0

    def run(self, questions: Sequence[Question]) -> list[SearchResult]:
        """Search until every question has ended; Ctrl-C ends all and returns what there is.

        Raises:
            InvalidArgument: no questions, or an action that does not fit the search.
            OutOfBlocks: no room for the prompts.
            NonFiniteScores: of the scorer, or of the model.
        """
        if isinstance(questions, str) or not len(questions):
            raise InvalidArgument(
                f"SearchDriver.run({questions!r:.60}): give a list with at least one question."
            )
        self._started, before, self._scored = time.perf_counter(), self._cost(), 0
        others = set(self.runner.branches)
        roots = self.runner.add_prompts([self.prompt(question) for question in questions])
        self._tasks = [
            Task(
                SearchTree(question),
                self.runner,
                self.limits,
                self.answer,
                AnswerClasses(self.same),
                root,
            )
            for question, root in zip(questions, roots, strict=True)
        ]
        total = self.budget.tokens and self.budget.tokens * len(questions)
        disable = None if self.progress is None else not self.progress
        name = type(self.policy).__name__
        searching = True
        view = LiveView(
            lambda: self.runner.tree.to_html() if searching else "",
            notebook_shell() if self.progress is not False else None,
        )
        try:
            with tqdm(total=total, desc=name, unit="tok", disable=disable) as bar:
                try:
                    self._loop(bar, view)
                except OutOfBlocks:
                    self._end_all("blocks")
        except KeyboardInterrupt:
            self._end_all("interrupted")
        finally:
            # The results draw their trees themselves.
            searching = False
            view.show()
            self._going.clear()
            for branch in self.runner.branches:
                if branch not in others:
                    self.runner.prune(branch, "the search is over")
        cost = self._cost(before)
        return [task.result(self.policy.conclude(task.search), cost) for task in self._tasks]

    def _loop(self, bar: Any, view: LiveView) -> None:
        """Ask, generate, ask again, until nothing runs."""
        while True:
            self._consult()
            if self.watch is not None:
                self.watch(self.runner.tree, [task.search for task in self._tasks])
            turns = self._allot()
            held = sum(len(task.held) for task in self._tasks)
            bar.set_postfix(running=len(turns), held=held, refresh=False)
            if turns:
                self._generate(turns, bar, view)
            elif not any(task.steps for task in self._tasks):
                return

    def _generate(self, turns: list[tuple[Task, Step, int]], bar: Any, view: LiveView) -> None:
        """Token by token, until steps join or somebody must go on with other limits."""
        self._going = {step.branch: (task, step) for task, step, _ in turns}
        for task, step, _ in turns:
            task.sync(step)
            step.begin_turn()
        stream = self.runner.steps(
            list(self._going),
            max_new_tokens=[limit for _, _, limit in turns],
            stop=[step.stop for _, step, _ in turns],
            with_text=False,
        )
        with closing(stream):
            for events in stream:
                rejoin = False
                for event in events:
                    branch = Branch(event.branch)
                    if branch not in self._going:
                        continue
                    task, step = self._going[branch]
                    if event.kind == "token":
                        task.tokens += 1
                        step.left -= 1
                    if event.kind == "finish" or step.crosses(event.text or ""):
                        reason = event.reason if event.kind == "finish" else "stop"
                        del self._going[branch]
                        ended = task.stop_step(step, reason or "")
                        rejoin |= event.kind == "token" or not (ended or reason == "length")
                bar.update(sum(event.kind == "token" for event in events))
                view.follow()
                if self._is_over():
                    return
                if (any(task.changed for task in self._tasks) and self._consult()) or rejoin:
                    return

    def _is_over(self) -> bool:
        seconds = self.budget.seconds
        if seconds is None or time.perf_counter() - self._started < seconds:
            return False
        self._end_all("seconds")
        return True

    def _allot(self) -> list[tuple[Task, Step, int]]:
        """The tokens that each running step may now generate, within the budget of its question."""
        turns = []
        for task in self._tasks:
            steps = list(task.steps.values())
            share, rest = None, 0
            if steps and self.budget.tokens is not None:
                share, rest = divmod(self.budget.tokens - task.tokens, len(steps))
                if not share and not rest:
                    self._end([task], "tokens")
                    continue
            for i, step in enumerate(steps):
                limit = step.left if share is None else min(step.left, share or int(i < rest))
                if limit:
                    turns.append((task, step, limit))
        return turns

    def _consult(self) -> bool:
        """Ask the policies until none has more to say; True if new steps have begun."""
        joined = False
        while changed := [task for task in self._tasks if task.changed and not task.ended_by]:
            wanted: list[tuple[Task, Score, SearchNode]] = []
            expansions: list[tuple[Task, Expand]] = []
            for task in changed:
                task.changed = False
                for action in self.policy.decide(task.search):
                    if isinstance(action, Expand):
                        expansions.append((task, action))
                    elif isinstance(action, Score):
                        wanted += [(task, action, task.node(action, i)) for i in action.nodes]
                    elif isinstance(action, Prune):
                        task.prune(task.node(action, action.node).id, action.reason)
                        task.changed = True
                    elif isinstance(action, Finish):
                        task.end("policy", action.reason)
                        break
                    else:
                        raise task.misfit(action, "known are Expand, Score, Prune and Finish")
            self._score([item for item in wanted if not item[0].ended_by])
            joined |= self._expand([pair for pair in expansions if not pair[0].ended_by])
            for task in changed:
                if not (task.ended_by or task.steps or task.changed):
                    task.end("policy", "nothing left to do")
        return joined

    def _expand(self, expansions: list[tuple[Task, Expand]]) -> bool:
        """Begin new steps. A prefix is computed once for siblings, and together for all."""
        first: list[tuple[Task, Expand, Branch, int]] = []
        planned = dict.fromkeys((id(task) for task, _ in expansions), 0)
        for task, action in expansions:
            count = action.count
            if self.budget.branches is not None:
                free = self.budget.branches - task.branches - planned[id(task)]
                if count > free:
                    task.met, count = "branches", free
                # Not checked: what was expanded in part may be asked for again, and is closed.
                if not free:
                    continue
            self._check(task, action)
            planned[id(task)] += count
            node, base = task.search.nodes[action.node], task.held[action.node]
            if action.prefix or (action.keep and not action.distinct):
                base = self.runner.fork(base)[0]
            elif not action.keep:
                del task.held[node.id]
                node.state = "closed"
            first.append((task, action, base, count))
        prefixed = [(base, action.prefix) for _, action, base, _ in first if action.prefix]
        if prefixed:
            self.runner.append([base for base, _ in prefixed], [text for _, text in prefixed])
        for task, action, base, count in first:
            for branch in self._siblings(base, count, action):
                task.start(action, branch)
        return bool(first)

    def _siblings(self, base: Branch, count: int, action: Expand) -> list[Branch]:
        if not action.distinct:
            return [base, *self.runner.fork(base, count - 1)]
        siblings = self.runner.fork(base, count, distinct=True)
        if action.prefix or not action.keep:
            self.runner.prune(base)
        return siblings

    def _check(self, task: Task, action: Expand) -> None:
        node = task.node(action, action.node)
        if action.node not in task.held or not (node.state == "open" or action.prefix):
            raise task.misfit(action, f"node {node.id} is {node.state} and cannot go on")
        if action.count < 1 or (action.max_new_tokens is not None and action.max_new_tokens < 1):
            raise task.misfit(action, "counts start at 1")
        if action.count > 1 and not action.distinct and not self.runner.sampling.do_sample:
            raise task.misfit(action, "greedy branches of one node are all the same: sample")

    def _score(self, wanted: list[tuple[Task, Score, SearchNode]]) -> None:
        if not wanted:
            return
        if self.scorer is None:
            raise InvalidArgument(
                f"{type(self.policy).__name__} wants scores, and there is no scorer: pass score=."
            )
        candidates = [task.candidate(action, node) for task, action, node in wanted]
        scores = check_scores(self.scorer, self.scorer.score(candidates), len(candidates))
        self._scored += len(candidates)
        for (task, _, node), score in zip(wanted, scores, strict=True):
            node.score = score
            task.changed = True

    def _end_all(self, ended_by: EndedBy) -> None:
        self._end([task for task in self._tasks if not task.ended_by], ended_by)

    def _end(self, tasks: list[Task], ended_by: EndedBy) -> None:
        """End tasks early. What is complete still gets the scores that the policy asks for."""
        wanted: list[tuple[Task, Score, SearchNode]] = []
        for task in tasks:
            task.cut(ended_by)
            if ended_by != "interrupted":
                for action in self.policy.decide(task.search):
                    if isinstance(action, Score):
                        wanted += [(task, action, task.node(action, i)) for i in action.nodes]
        self._score(wanted)
        for task in tasks:
            task.end(ended_by)

    def _cost(self, before: SearchCost | None = None) -> SearchCost:
        """What the runner has done so far, or since ``before``."""
        stats, since = self.runner.stats, before or SearchCost()
        return SearchCost(
            prompt_tokens=stats.prompt_tokens - since.prompt_tokens,
            tokens_generated=stats.tokens_generated - since.tokens_generated,
            tokens_computed=stats.tokens_computed - since.tokens_computed,
            forwards=stats.forwards - since.forwards,
            candidates_scored=self._scored,
            kv_bytes_peak=stats.peak_kv_bytes,
            seconds=time.perf_counter() - self._started,
        )
