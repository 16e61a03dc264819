"""Batches for train.py, made by worker processes ahead of their use; no torch in here."""

from __future__ import annotations

import multiprocessing
import random
from collections import deque
from collections.abc import Callable, Generator, Iterator
from itertools import count
from typing import NamedTuple

import numpy as np

from .task import Puzzle, random_move, random_trace, reachable
from .vocabulary import END, IDS, PAD, encode

COUNTS, WEIGHTS = (3, 4, 5), (0.15, 0.6, 0.25)
"""How many numbers the puzzles have, and how often each."""


class Batch(NamedTuple):
    """Token ids, right padded, and what is asked of each position.

    Attributes:
        ids: `(B, L)` uint8.
        targets: `(B, L)` int8; for the model the id that comes next, for the verifier 1 where a
            step ends that a solution can still follow, 0 where none can; -1 where nothing is asked.
    """

    ids: np.ndarray
    targets: np.ndarray


def solutions(seed: int, size: int) -> Batch:
    """What the model is trained on: puzzles, each with the lines of one solution."""
    rng, rows = random.Random(f"solutions {seed}"), []
    for _ in range(size):
        puzzle, trace = random_trace(rng, rng.choices(COUNTS, WEIGHTS)[0])
        prompt, steps = encode(puzzle.prompt), [*encode(trace), IDS[END]]
        rows.append(([*prompt, *steps], [-1] * (len(prompt) - 1) + steps + [-1]))
    return _pad(rows)


def verdicts(seed: int, size: int) -> Batch:
    """What the verifier is trained on: the first lines of a solution, then random moves; now and
    then a line is wrong.
    """
    rng, rows = random.Random(f"verdicts {seed}"), []
    for _ in range(size):
        puzzle, trace = random_trace(rng, rng.choices(COUNTS, WEIGHTS)[0])
        ids = encode(puzzle.prompt)
        targets = [-1] * len(ids)
        for line, good in _judged(rng, puzzle, trace):
            step = encode(line)
            ids += step
            targets += [-1] * (len(step) - 1) + [int(good)]
        rows.append((ids, targets))
    return _pad(rows)


def stream(
    make: Callable[[int, int], Batch], size: int, seed: int, workers: int
) -> Generator[Batch, None, None]:
    """Batches without end, the same ones for the same seed, however many workers make them."""
    seeds = count(seed << 32)
    if workers == 0:
        yield from (make(next(seeds), size) for _ in count())
    # Forked before CUDA is touched; a spawned worker would import torch and transformers first.
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        pending = deque(pool.apply_async(make, (next(seeds), size)) for _ in range(4 * workers))
        while True:
            pending.append(pool.apply_async(make, (next(seeds), size)))
            yield pending.popleft().get()


def _judged(rng: random.Random, puzzle: Puzzle, trace: str) -> Iterator[tuple[str, bool]]:
    lines = trace.splitlines(keepends=True)
    left, follow = puzzle.numbers, rng.randrange(len(lines))
    wrong = rng.randrange(len(lines)) if rng.random() < 0.1 else None
    for index, line in enumerate(lines):
        if index == wrong:
            yield _garble(rng, line), False
            return
        if index >= follow:
            move = random_move(rng, left)
            line, left = f"{move}\n", move.left
        else:
            left = tuple(map(int, line.partition(":")[2].split()))
        yield line, puzzle.target in reachable(left)


def _garble(rng: random.Random, line: str) -> str:
    """The line with another digit in one place."""
    place = rng.choice([i for i, symbol in enumerate(line) if symbol.isdigit()])
    digit = rng.choice([d for d in "0123456789" if d != line[place]])
    return line[:place] + digit + line[place + 1 :]


def _pad(rows: list[tuple[list[int], list[int]]]) -> Batch:
    # Few different lengths, so that the GPU's allocator finds its blocks again.
    width = -(-max(len(ids) for ids, _ in rows) // 8) * 8
    ids = np.full((len(rows), width), IDS[PAD], np.uint8)
    targets = np.full((len(rows), width), -1, np.int8)
    for i, (row, wanted) in enumerate(rows):
        ids[i, : len(row)], targets[i, : len(row)] = row, wanted
    return Batch(ids, targets)
