"""SmolLM2-135M on tasks of reasoning-gym: accuracy against tokens computed, with 95 % intervals.

    pip install -e ".[demo,reasoning]"
    python examples/reasoning.py [--questions 20] [--samples 64] [--tasks chain_sum gsm_symbolic]

Every question is answered by 64 samples, of which a single one, votes among 4, 16 and 64, and the
likeliest one of 64 are read off (votes among n are averaged over all groups of n); and by a step
beam search that is guided by log-prob. Tokens are those of a tree, each shared one once.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

# Threads that spin while they wait make a busy machine many times slower; read when torch loads.
os.environ["GOMP_SPINCOUNT"] = os.environ.get("GOMP_SPINCOUNT", "1000")

from intervals import wilson
from weights import load_smollm2

from hf_tree_cache import Sampling, SearchResult, best_of_n, step_beam
from hf_tree_cache.search.answers import same_answer
from hf_tree_cache.search.policy import tally

SIZES = (1, 4, 16, 64)
STORIES = [
    (
        "Tom has 4 boxes of 6 pens and gives 5 pens away. How many pens are left?",
        "4 boxes of 6 pens are 4 * 6 = 24 pens.\nHe gives 5 away, so 24 - 5 = 19.\n"
        "The answer is 19.",
    ),
    (
        "Ann buys 3 books for 7 dollars each and pays with 50 dollars. How much does she get back?",
        "3 books cost 3 * 7 = 21 dollars.\nShe gets 50 - 21 = 29 dollars back.\nThe answer is 29.",
    ),
    (
        "Sam had 15 apples. He gave 7 to Ben and picked 12 more. How many does he have?",
        "He gave 7 away, so 15 - 7 = 8 are left.\nHe picked 12 more, so 8 + 12 = 20.\n"
        "The answer is 20.",
    ),
]


@dataclass(frozen=True)
class Row:
    """One strategy on one task.

    Attributes:
        accuracy: mean over the questions.
        interval: 95 %, from resampling the questions.
        tokens: computed, a question.
    """

    strategy: str
    accuracy: float
    interval: tuple[float, float]
    tokens: float


def task(name: str, count: int) -> tuple[Any, list[tuple[str, str]]]:
    """A data set of reasoning-gym, and worked examples for the prompt."""
    import reasoning_gym

    if name == "chain_sum":
        options = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}
        examples = reasoning_gym.create_dataset(name, size=3, seed=1, **options)
        shots = [(example["question"], working(example["question"])) for example in examples]
        return reasoning_gym.create_dataset(name, size=count, seed=2, **options), shots
    if name == "gsm_symbolic":
        return reasoning_gym.create_dataset(name, size=count, seed=2), STORIES
    raise SystemExit(f"--tasks {name}: known are chain_sum and gsm_symbolic.")


def working(question: str) -> str:
    """A chain of sums, one step a line."""
    terms = re.findall(r"[-+]?\s*\d+", question.partition(":")[2])
    total, lines = int(terms[0].replace(" ", "")), []
    for term in terms[1:]:
        value = int(term.replace(" ", ""))
        lines.append(f"{total} {'-' if value < 0 else '+'} {abs(value)} = {total + value}")
        total += value
    return "\n".join([*lines, f"The answer is {total}."])


def chat(shots: Sequence[tuple[str, str]], question: str) -> list[dict[str, str]]:
    turns = []
    for asked, answered in shots:
        turns += [("user", asked), ("assistant", answered)]
    return [{"role": role, "content": text} for role, text in [*turns, ("user", question)]]


def tree_tokens(sequences: Sequence[Sequence[int]]) -> int:
    """Tokens of these sequences, what they share at their beginning once."""
    return len({tuple(s[:length]) for s in sequences for length in range(1, len(s) + 1)})


def groups(count: int, size: int) -> list[range]:
    return [range(first, first + size) for first in range(0, count - size + 1, size)]


def answer_of(result: SearchResult, members: Sequence[int]) -> Any:
    """What most of these samples say, None where none says anything."""
    done = result.search.done
    return next(iter(tally(done[i] for i in members)), None)


def bootstrap(values: Sequence[float], rounds: int = 2_000) -> tuple[float, float]:
    """95 % interval of the mean; Wilson's where all values are 0, or all 1."""
    if len(set(values)) == 1 and values[0] in (0, 1):
        return wilson(int(sum(values)), len(values))
    rng = random.Random(0)
    means = sorted(fmean(rng.choices(values, k=len(values))) for _ in range(rounds))
    return means[int(0.025 * rounds)], means[int(0.975 * rounds)]


def measure(
    name: str, model: Any, tokenizer: Any, count: int, samples: int, say: Callable[[str], None]
) -> list[Row]:
    data, shots = task(name, count)
    marks: dict[str, list[float]] = {}
    spent: dict[str, list[float]] = {}

    def note(strategy: str, mark: float, tokens: float) -> None:
        marks.setdefault(strategy, []).append(mark)
        spent.setdefault(strategy, []).append(tokens)

    options = {"max_new_tokens": 96, "seed": 0, "progress": False}
    for entry in data:

        def mark(answer: Any, entry: Any = entry) -> float:
            right = entry["answer"]
            return float(answer is not None and same_answer(str(answer), right))

        question = chat(shots, entry["question"])
        # As a vote it would stop as soon as the rest cannot change it.
        drawn = best_of_n(
            model, tokenizer, question, num_branches=samples, score="mean_logprob",
            sampling=Sampling(0.7), **options,
        )  # fmt: skip
        prompt = drawn.cost.prompt_tokens
        sequences = [drawn.tree.tokens(s.leaf, include_prompt=False) for s in drawn.solutions]
        for size in (size for size in SIZES if size <= samples):
            parts = groups(samples, size)
            right = fmean(mark(answer_of(drawn, part)) for part in parts)
            tokens = fmean(tree_tokens([sequences[i] for i in part]) for part in parts)
            strategy = "single sample" if size == 1 else f"self-consistency, {size}"
            note(strategy, right, prompt + tokens)
        note(f"likeliest of {samples}", mark(drawn.answer), prompt + tree_tokens(sequences))
        beam = step_beam(
            model, tokenizer, question, score="mean_logprob", width=4, expand=4, max_steps=10,
            sampling=Sampling(0.7), **options,
        )  # fmt: skip
        note("step beam, 4 × 4", mark(beam.answer), beam.cost.tokens_computed)
        say(f"{name}: {len(spent['single sample'])} of {count} questions")
    return [
        Row(strategy, fmean(found), bootstrap(found), fmean(spent[strategy]))
        for strategy, found in marks.items()
    ]


def show(name: str, rows: Sequence[Row]) -> str:
    lines = [f"\n{name}", f"  {'':22}{'accuracy':>10}{'95 %':>16}{'tokens computed':>18}"]
    for row in rows:
        low, high = row.interval
        lines.append(
            f"  {row.strategy:22}{row.accuracy:>10.1%}{f'{low:.0%} to {high:.0%}':>16}"
            f"{row.tokens:>18,.0f}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> dict[str, list[Row]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=20, help="of each task")
    parser.add_argument("--samples", type=int, default=64, choices=SIZES[1:])
    parser.add_argument("--tasks", nargs="+", default=["chain_sum", "gsm_symbolic"])
    parser.add_argument("--out", type=Path, help="figures as JSON")
    arguments = parser.parse_args(argv)
    model, tokenizer = load_smollm2()
    found = {}
    for name in arguments.tasks:
        found[name] = measure(
            name,
            model,
            tokenizer,
            arguments.questions,
            arguments.samples,
            lambda line: print(f"\r{line}", end="", file=sys.stderr, flush=True),
        )
        print(show(name, found[name]), flush=True)
    if arguments.out:
        figures = {name: [vars(row) for row in rows] for name, rows in found.items()}
        arguments.out.write_text(json.dumps(figures, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main()
