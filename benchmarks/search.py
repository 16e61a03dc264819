"""Search strategies at equal compute: share of puzzles solved against tokens computed, on a CPU.

    python benchmarks/search.py --out benchmarks/results/search.json
    python benchmarks/search_report.py        writes docs/search/comparison.md and its figure

Held-out Countdown puzzles of four numbers and the small model of examples/puzzle. Each strategy
runs at several sizes. Counted are all tokens that went through the model, and those of the verifier
by its size in parameters. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Threads that spin while they wait make a busy machine many times slower; read when torch loads.
os.environ["GOMP_SPINCOUNT"] = os.environ.get("GOMP_SPINCOUNT", "1000")


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from intervals import wilson
from puzzle import load_model, load_verifier
from puzzle.judge import Judge
from puzzle.merge import MergeEqual
from puzzle.task import answer, check, held_out_puzzles

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


Run = Callable[[list[str]], list[SearchResult]]
Choice = Callable[[SearchResult], str]


@dataclass(frozen=True)
class Point:
    """One strategy at one size.

    Attributes:
        solved: puzzles whose chosen solution makes the target.
        reached: puzzles of which any complete branch does; what a perfect choice would solve.
        tokens: computed by the model, a puzzle.
        verifier_tokens: computed by the verifier, a puzzle.
        cost: both, the verifier's weighed by its parameters.
        seconds: of the run, all puzzles.
    """

    strategy: str
    size: str
    puzzles: int
    solved: int
    reached: int
    tokens: float
    verifier_tokens: float
    cost: float
    seconds: float

    @property
    def share(self) -> float:
        return self.solved / self.puzzles

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the share (Wilson 1927)."""
        return wilson(self.solved, self.puzzles)


class Bench:
    """The models, the puzzles, and how a strategy runs on them."""

    def __init__(self, puzzles: int, seed: int = 0, together: int = 50) -> None:
        self.model, self.tokenizer = load_model()
        verifier, words = load_verifier()
        self.judge = Judge(verifier, words)
        self.weight = _size(verifier) / _size(self.model)
        self.puzzles = held_out_puzzles(puzzles, NUMBERS)
        self.seed = seed
        self.together = together

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

    def measure(self, size: str, run: Run, choices: dict[str, Choice]) -> list[Point]:
        """One run; a point for every way to choose among its solutions."""
        solved = dict.fromkeys(choices, 0)
        reached = tokens = 0
        self.judge.tokens = 0
        started = time.perf_counter()
        for first in range(0, len(self.puzzles), self.together):
            part = self.puzzles[first : first + self.together]
            results = run([puzzle.prompt for puzzle in part])
            tokens += results[0].cost.tokens_computed
            for puzzle, result in zip(part, results, strict=True):
                reached += any(check(puzzle, found.text).solved for found in result.solutions)
                for name, choose in choices.items():
                    solved[name] += check(puzzle, choose(result)).solved
        seconds, count = time.perf_counter() - started, len(self.puzzles)
        return [
            Point(
                strategy=name,
                size=size,
                puzzles=count,
                solved=hits,
                reached=reached,
                tokens=round(tokens / count, 1),
                verifier_tokens=round(self.judge.tokens / count, 1),
                cost=round((tokens + self.weight * self.judge.tokens) / count, 1),
                seconds=round(seconds, 1),
            )
            for name, hits in solved.items()
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


def strategies(bench: Bench) -> list[tuple[str, Run, dict[str, Choice]]]:
    """Size, run, and how to choose among its solutions, by name of the strategy."""
    greedy = bench.policy(SelfConsistency(1), greedy=True)
    points = [
        ("1", greedy, {"greedy": by_policy}),
        ("1", bench.policy(SelfConsistency(1)), {"single sample": by_policy}),
    ]
    # The same samples, chosen from in three ways.
    samples = {
        "self-consistency": by_vote,
        "best of n, log-prob": by_logprob,
        "best of n, checker": by_policy,
    }
    for n in (4, 16, 64):
        points.append((f"{n}", bench.policy(BestOfN(n), score=bench.judge), samples))
    for width, expand in ((1, 4), (2, 4), (4, 4), (8, 4), (16, 4)):
        size = f"{width} × {expand}"
        beam = bench.guided(StepBeam(width, expand, NUMBERS))
        points.append((size, beam, {"step beam": by_policy}))
        if width > 1:
            dvts = bench.guided(StepBeam(width, expand, NUMBERS, diverse=True))
            points.append((size, dvts, {"DVTS": by_policy}))
    for simulations, children in ((4, 4), (8, 4), (16, 8), (32, 16)):
        mcts = bench.guided(MCTS(simulations, children, good_enough=1.0, max_steps=NUMBERS))
        points.append((f"{simulations}, {children} children", mcts, {"MCTS": by_policy}))
    for propose, keep in ((4, 1), (6, 2), (8, 4), (8, 8)):
        thoughts = bench.guided(TreeOfThoughts(propose, keep, max_steps=NUMBERS))
        points.append((f"{propose}, keep {keep}", thoughts, {"tree of thoughts": by_policy}))
    for branches in (4, 16, 64):
        run = bench.entropy(ENTROPY, branches)
        points.append((f"{branches}", run, {"entropy branching": by_policy}))
    return points


def _size(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def main(argv: Sequence[str] | None = None) -> list[Point]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--puzzles", type=int, default=200)
    parser.add_argument("--only", default="", help="strategies whose name contains this")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    bench = Bench(arguments.puzzles)
    print(
        f"{'strategy':22}{'size':>12}{'solved':>8}{'95 %':>12}{'reached':>9}{'tokens':>9}{'s':>7}"
    )
    points = []
    for size, run, choices in strategies(bench):
        wanted = {name: choose for name, choose in choices.items() if arguments.only in name}
        for point in bench.measure(size, run, wanted) if wanted else ():
            points.append(point)
            low, high = point.interval
            print(
                f"{point.strategy:22}{size:>12}{point.share:>8.0%}{f'{low:.0%}-{high:.0%}':>12}"
                f"{point.reached / point.puzzles:>9.0%}{point.cost:>9,.0f}{point.seconds:>7.1f}",
                flush=True,
            )
    report = {
        "environment": environment(),
        "verifier_weight": round(bench.weight, 4),
        "temperature": TEMPERATURE,
        "points": [asdict(point) for point in points],
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report))
    return points


if __name__ == "__main__":
    main()
