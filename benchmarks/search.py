"""Search strategies at equal compute: share of puzzles solved against tokens computed, on a CPU.

    python benchmarks/search.py --tuning          on the puzzles that settings were chosen on
    python benchmarks/search.py --out benchmarks/results/search.json
    python benchmarks/search_report.py            writes docs/search/comparison.md and its figure

Held-out Countdown puzzles of four numbers and the small model of examples/puzzle. A seed is a set
of puzzles of its own and the randomness of the samples; every strategy gets the same ones, at sizes
that compute about the same number of tokens. Counted are all tokens that went through the model,
and those of the verifier by its size in parameters. With ``--out`` every seed is stored when it is
done, and a run that was stopped goes on behind the last. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Threads that spin while they wait make a busy machine many times slower; read when torch loads.
os.environ["GOMP_SPINCOUNT"] = os.environ.get("GOMP_SPINCOUNT", "1000")


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from puzzle import load_model, load_verifier
from puzzle.judge import Judge
from puzzle.merge import MergeEqual
from puzzle.task import Puzzle, answer, check, held_out_puzzles

from hf_tree_cache import Sampling, SearchResult, run_search
from hf_tree_cache.env import environment
from hf_tree_cache.search.best_of_n import BestOfN
from hf_tree_cache.search.entropy_branching import entropy_branching
from hf_tree_cache.search.mcts import MCTS
from hf_tree_cache.search.policy import conclude_vote
from hf_tree_cache.search.self_consistency import SelfConsistency
from hf_tree_cache.search.step_beam import StepBeam
from hf_tree_cache.search.tree_of_thoughts import TreeOfThoughts

NUMBERS = 4
NEW_TOKENS = 96
TEMPERATURE = 1.0
ENTROPY = 0.5
"""Threshold of entropy branching, in nats; all 22 symbols alike would have 3.1."""
TUNING = 200
"""The first so many puzzles of ``held_out_puzzles(seed=0)`` are for choosing settings."""
LEVELS = (200, 400, 800)
"""Tokens a puzzle at which strategies are compared."""


Run = Callable[[list[str]], list[SearchResult]]
Choice = Callable[[SearchResult], str]


@dataclass(frozen=True)
class Point:
    """One strategy at one size with one seed.

    Attributes:
        level: about how many tokens a puzzle it is meant to compute; 0 for one sample.
        solved: a digit for each puzzle, 1 where the chosen solution makes the target.
        reached: 1 where any complete branch does; what a perfect choice would solve.
        tokens: computed by the model, a puzzle.
        verifier_tokens: computed by the verifier, a puzzle.
        cost: both, the verifier's weighed by its parameters.
        seconds: of the run, all puzzles.
    """

    strategy: str
    level: int
    size: str
    seed: int
    solved: str
    reached: str
    tokens: float
    verifier_tokens: float
    cost: float
    seconds: float

    @property
    def share(self) -> float:
        return self.solved.count("1") / len(self.solved)


@dataclass(frozen=True)
class Entry:
    """A strategy at one size, and the ways to choose among its solutions, by name."""

    level: int
    size: str
    run: Run
    choices: dict[str, Choice]


def tuning_puzzles(count: int = TUNING) -> list[Puzzle]:
    """Those that settings may be chosen on."""
    return held_out_puzzles(count, NUMBERS)


def evaluation_puzzles(seeds: int, count: int) -> list[list[Puzzle]]:
    """``count`` puzzles for each seed from 1 on; no two of them, and none of them and of those for
    tuning, have the same numbers, whatever the targets.
    """
    used = {tuple(sorted(puzzle.numbers)) for puzzle in tuning_puzzles()}
    sets = []
    for seed in range(1, seeds + 1):
        chosen: list[Puzzle] = []
        for puzzle in held_out_puzzles(4 * count, NUMBERS, seed):
            numbers = tuple(sorted(puzzle.numbers))
            if len(chosen) < count and numbers not in used:
                used.add(numbers)
                chosen.append(puzzle)
        if len(chosen) < count:
            raise ValueError(
                f"evaluation_puzzles({seeds}, {count}): seed {seed} has {len(chosen)} puzzles of "
                "numbers that no other has. Ask for fewer."
            )
        sets.append(chosen)
    return sets


class Bench:
    """The models, the puzzles, and how a strategy runs on them."""

    def __init__(self, puzzles: Sequence[Puzzle], seed: int = 0) -> None:
        self.model, self.tokenizer = load_model()
        verifier, words = load_verifier()
        self.judge = Judge(verifier, words)
        self.weight = _size(verifier) / _size(self.model)
        self.puzzles, self.seed = puzzles, seed

    def policy(self, policy: Any, *, score: Any = None, greedy: bool = False) -> Run:
        """Runs a policy of the library."""

        def run(questions: list[str]) -> list[SearchResult]:
            return run_search(
                self.model,
                self.tokenizer,
                questions,
                policy,
                score=score,
                sampling=Sampling.greedy() if greedy else Sampling(TEMPERATURE),
                **self._options(),
            )

        return run

    def guided(self, policy: Any) -> Run:
        """Runs a policy that goes by steps, with the judge as its process reward."""
        return self.policy(MergeEqual(policy), score=self.judge)

    def entropy(self, threshold: float, branches: int) -> Run:
        """Runs `entropy_branching`, which is no policy."""

        def run(questions: list[str]) -> list[SearchResult]:
            return entropy_branching(
                self.model,
                self.tokenizer,
                questions,
                threshold=threshold,
                max_branches=branches,
                min_gap=1,
                sampling=Sampling(TEMPERATURE),
                **self._options(),
            )

        return run

    def measure(self, entry: Entry) -> list[Point]:
        """One run; a point for every way to choose among its solutions."""
        self.judge.tokens = 0
        started = time.perf_counter()
        results = entry.run([puzzle.prompt for puzzle in self.puzzles])
        seconds, count = time.perf_counter() - started, len(self.puzzles)
        tokens, judged = results[0].cost.tokens_computed, self.judge.tokens
        pairs = list(zip(self.puzzles, results, strict=True))
        reached = _digits(
            any(check(puzzle, found.text).solved for found in result.solutions)
            for puzzle, result in pairs
        )
        return [
            Point(
                strategy=name,
                level=entry.level,
                size=entry.size,
                seed=self.seed,
                solved=_digits(check(puzzle, choose(result)).solved for puzzle, result in pairs),
                reached=reached,
                tokens=round(tokens / count, 1),
                verifier_tokens=round(judged / count, 1),
                cost=round((tokens + self.weight * judged) / count, 1),
                seconds=round(seconds, 1),
            )
            for name, choose in entry.choices.items()
        ]

    def _options(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "max_new_tokens": NEW_TOKENS,
            "answer": answer,
            "progress": False,
        }


def by_policy(result: SearchResult) -> str:
    """What the policy itself came to."""
    return result.text


def by_logprob(result: SearchResult) -> str:
    """The solution of the highest mean log-prob."""
    return max(result.solutions, key=lambda found: found.mean_logprob).text


def by_vote(result: SearchResult) -> str:
    """The likeliest of the solutions that most samples agree on."""
    node = conclude_vote(result.search).node
    return "" if node is None else result.search.nodes[node].text


def by_check(result: SearchResult) -> str:
    """A solution that makes the target, if there is one."""
    puzzle = Puzzle.parse(result.search.question)
    return next((f.text for f in result.solutions if check(puzzle, f.text).solved), "")


def strategies(bench: Bench) -> list[Entry]:
    """Every strategy at sizes that compute about as many tokens as `LEVELS` say."""
    one = SelfConsistency(1)
    entries = [
        Entry(0, "1", bench.policy(one, greedy=True), {"greedy": by_policy}),
        Entry(0, "1", bench.policy(one), {"single sample": by_policy}),
    ]
    # The same samples, chosen from in three ways.
    samples = {
        "self-consistency": by_vote,
        "best of n, log-prob": by_logprob,
        "best of n, checker": by_policy,
    }
    forks = {"entropy branching": by_vote, "entropy branching, checker": by_check}

    def guided(level: int, name: str, size: str, policy: Any) -> Entry:
        return Entry(level, size, bench.guided(policy), {name: by_policy})

    for level, n in zip(LEVELS, (5, 12, 31), strict=True):
        entries.append(Entry(level, f"{n}", bench.policy(BestOfN(n), score=bench.judge), samples))
    for level, (width, expand) in zip(LEVELS, ((2, 3), (4, 4), (11, 4)), strict=True):
        beam = StepBeam(width, expand, NUMBERS)
        entries.append(guided(level, "step beam", f"{width} × {expand}", beam))
    for level, (width, expand) in zip(LEVELS, ((2, 3), (5, 4), (20, 4)), strict=True):
        dvts = StepBeam(width, expand, NUMBERS, diverse=True)
        entries.append(guided(level, "DVTS", f"{width} × {expand}", dvts))
    for level, (simulations, children) in zip(LEVELS, ((8, 3), (16, 8), (44, 16)), strict=True):
        mcts = MCTS(simulations, children, good_enough=1.0, max_steps=NUMBERS)
        entries.append(guided(level, "MCTS", f"{simulations}, {children} children", mcts))
    for level, (propose, keep) in zip(LEVELS, ((5, 2), (8, 5), (12, 12)), strict=True):
        thoughts = TreeOfThoughts(propose, keep, max_steps=NUMBERS)
        entries.append(guided(level, "tree of thoughts", f"{propose}, keep {keep}", thoughts))
    for level, branches in zip(LEVELS, (4, 10, 45), strict=True):
        entries.append(Entry(level, f"{branches}", bench.entropy(ENTROPY, branches), forks))
    return entries


def _size(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _digits(hits: Iterable[bool]) -> str:
    return "".join("1" if hit else "0" for hit in hits)


def run_seed(bench: Bench, only: str = "") -> list[Point]:
    """All strategies whose name contains ``only``, printed as they end."""
    points = []
    for entry in strategies(bench):
        if not any(only in name for name in entry.choices):
            continue
        for point in bench.measure(entry):
            points.append(point)
            print(
                f"{point.seed:>4}  {point.strategy:28}{point.size:>16}{point.share:>8.0%}"
                f"{point.cost:>9,.0f}{point.seconds:>7.1f}",
                flush=True,
            )
    return points


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--puzzles", type=int, default=25, help="for each seed")
    parser.add_argument("--only", default="", help="strategies whose name contains this")
    parser.add_argument("--tuning", action="store_true", help="on the tuning puzzles, seed 0")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    if arguments.tuning:
        sets = {0: tuning_puzzles(arguments.puzzles)}
    else:
        sets = dict(enumerate(evaluation_puzzles(arguments.seeds, arguments.puzzles), 1))
    points: list[dict[str, Any]] = []
    if arguments.out and arguments.out.exists():
        points = json.loads(arguments.out.read_text(encoding="utf-8"))["points"]
    report: dict[str, Any] = {}
    print(f"seed  {'strategy':28}{'size':>16}{'solved':>8}{'tokens':>9}{'s':>7}")
    for seed, puzzles in sets.items():
        if any(point["seed"] == seed for point in points):
            continue
        bench = Bench(puzzles, seed)
        points += [asdict(point) for point in run_seed(bench, arguments.only)]
        report = {
            "environment": environment(),
            "verifier_weight": round(bench.weight, 4),
            "temperature": TEMPERATURE,
            "points": points,
        }
        if arguments.out:
            arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report))
    return points


if __name__ == "__main__":
    main()
