"""Countdown: reach a target from a few numbers with + - * /, each number used exactly once.

    make 22 from 3 4 7 25
    25-3=22 left: 22 4 7
    7-4=3 left: 3 22
    ...

One step a line, so that every prefix of a solution can be checked. Numbers stay positive whole
numbers of at most `LARGEST`. The puzzles whose numbers hash into one sixteenth are held out: no
multiset of numbers of theirs is ever trained on, whatever the target.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

LARGEST = 999
NUMBERS = range(1, 26)
TARGETS = range(10, 100)

_STEP = re.compile(r"(\d{1,4})([-+*/])(\d{1,4})=(\d{1,4}) left:((?: \d{1,4})+)")
_SPLIT = 16


@dataclass(frozen=True)
class Puzzle:
    numbers: tuple[int, ...]
    target: int

    @property
    def prompt(self) -> str:
        """What the model is given, with the line's end."""
        return f"make {self.target} from {_join(self.numbers)}\n"

    @classmethod
    def parse(cls, prompt: str) -> Puzzle:
        """The puzzle in the first line of ``prompt``.

        Raises:
            ValueError: The line is not of the form ``make 22 from 3 4 7 25``.
        """
        line = prompt.partition("\n")[0]
        found = re.fullmatch(r"make (\d+) from((?: \d+)+)", line)
        if found is None:
            raise ValueError(f"a puzzle reads 'make 22 from 3 4 7 25', not {line!r}")
        return cls(tuple(map(int, found[2].split())), int(found[1]))


@dataclass(frozen=True)
class Move:
    """``a op b = result``, with the numbers that are left after it, the result first."""

    a: int
    op: str
    b: int
    result: int
    left: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.a}{self.op}{self.b}={self.result} left: {_join(self.left)}"


@dataclass(frozen=True)
class Check:
    """What the checker found in the lines after a prompt.

    Attributes:
        left: The numbers after the last valid step.
        steps: Valid steps, from the first on.
        expression: What was computed, such as ``((25-3)*(7-4))``; None until one number is left.
        solved: One number is left, and it is the target.
        error: Why the first invalid line is refused; empty if every whole line is a valid step.
    """

    left: tuple[int, ...]
    steps: int
    expression: str | None
    solved: bool
    error: str


def moves(numbers: Sequence[int]) -> Iterator[Move]:
    """All moves from ``numbers``; of equal ones one, the larger operand first."""
    seen = set()
    for i, x in enumerate(numbers):
        for j in range(i):
            a, b = max(x, numbers[j]), min(x, numbers[j])
            if (a, b) in seen:
                continue
            seen.add((a, b))
            rest = tuple(n for k, n in enumerate(numbers) if k != i and k != j)
            for op, result in _results(a, b):
                yield Move(a, op, b, result, (result, *rest))


def check(puzzle: Puzzle, text: str) -> Check:
    """Checks the steps in ``text``, the lines after the prompt.

    A last line without its end is still being written, and is not looked at.
    """
    left, steps, error = puzzle.numbers, 0, ""
    # One expression a number, in step with `left`.
    terms = [str(n) for n in left]
    for line in text.split("\n")[:-1]:
        if len(left) == 1:
            error = f"a step after the last one: {line!r}"
            break
        found = _STEP.fullmatch(line)
        if found is None:
            error = f"not a step: {line!r}"
            break
        a, b, result = int(found[1]), int(found[3]), int(found[4])
        if a not in left or b not in left or (a == b and left.count(a) < 2):
            error = f"{a} and {b} are not among {_join(left)}: {line!r}"
            break
        if (found[2], result) not in _results(a, b):
            error = f"wrong result: {line!r}"
            break
        i = left.index(a)
        j = left.index(b, i + 1) if a == b else left.index(b)
        keep = [k for k in range(len(left)) if k not in (i, j)]
        expected = (result, *(left[k] for k in keep))
        if sorted(map(int, found[5].split())) != sorted(expected):
            error = f"the numbers left are {_join(expected)}: {line!r}"
            break
        terms = [f"({terms[i]}{found[2]}{terms[j]})", *(terms[k] for k in keep)]
        left, steps = expected, steps + 1
    done = len(left) == 1 and not error
    return Check(left, steps, terms[0] if done else None, done and left[0] == puzzle.target, error)


@lru_cache(maxsize=1 << 18)
def _reachable(numbers: tuple[int, ...]) -> frozenset[int]:
    if len(numbers) == 1:
        return frozenset(numbers)
    nexts = {tuple(sorted(move.left)) for move in moves(numbers)}
    return frozenset().union(*map(_reachable, nexts))


def reachable(numbers: Sequence[int]) -> frozenset[int]:
    """Every target that ``numbers`` can still make; four numbers take a few milliseconds."""
    return _reachable(tuple(sorted(numbers)))


def solve(puzzle: Puzzle) -> str | None:
    """The lines of one solution, or None."""
    lines, left = [], puzzle.numbers
    if puzzle.target not in reachable(left):
        return None
    while len(left) > 1:
        move = next(m for m in moves(left) if puzzle.target in reachable(m.left))
        lines.append(f"{move}\n")
        left = move.left
    return "".join(lines)


def heuristic(puzzle: Puzzle, text: str) -> float:
    """How promising the steps in ``text`` look, from 0 to 1, without looking ahead further than
    the last step: 0 after an invalid step, 1 for a solution or one move before it, and otherwise
    more the closer a single move comes to the target.
    """
    state = check(puzzle, text)
    if state.error:
        return 0.0
    if len(state.left) == 1:
        return float(state.solved)
    if len(state.left) == 2:
        return float(puzzle.target in reachable(state.left))
    near = min(abs(move.result - puzzle.target) for move in moves(state.left))
    return 1 / (2 + near)


def answer(text: str) -> tuple[str, ...] | None:
    """The calculations of a complete solution, in an order that does not depend on that of its
    lines and operands, so that the same solutions vote together; None if it is not complete.
    """
    found = [_STEP.fullmatch(line) for line in text.split("\n")[:-1]]
    if not found or None in found or len(found[-1][5].split()) != 1:
        return None
    terms = []
    for step in found:
        a, b = sorted((int(step[1]), int(step[3])), reverse=step[2] in "+*")
        terms.append(f"{a}{step[2]}{b}" if step[2] in "+*" else f"{step[1]}{step[2]}{step[3]}")
    return tuple(sorted(terms))


def held_out(numbers: Sequence[int]) -> bool:
    """Whether puzzles of these numbers are kept from training."""
    return zlib.crc32(_join(sorted(numbers)).encode()) % _SPLIT == 0


def random_trace(rng: random.Random, count: int, *, test: bool = False) -> tuple[Puzzle, str]:
    """A puzzle of ``count`` numbers with the lines of one solution: random moves, then the
    target is what they made. Of the held-out puzzles if ``test``, of the others if not.
    """
    while True:
        numbers = tuple(rng.choice(NUMBERS) for _ in range(count))
        if held_out(numbers) != test:
            continue
        left, lines = numbers, []
        while len(left) > 1:
            move = random_move(rng, left)
            lines.append(f"{move}\n")
            left = move.left
        if left[0] in TARGETS:
            return Puzzle(numbers, left[0]), "".join(lines)


def random_move(rng: random.Random, numbers: Sequence[int]) -> Move:
    """A random pair, then a random operation of those that it allows."""
    i, j = rng.sample(range(len(numbers)), 2)
    a, b = max(numbers[i], numbers[j]), min(numbers[i], numbers[j])
    op, result = rng.choice(_results(a, b))
    rest = (n for k, n in enumerate(numbers) if k != i and k != j)
    return Move(a, op, b, result, (result, *rest))


def held_out_puzzles(number: int, count: int, seed: int = 0) -> list[Puzzle]:
    """``number`` different held-out puzzles of ``count`` numbers that have a solution, every
    target as likely as another.
    """
    rng, found = random.Random(f"held out {seed} {count}"), {}
    while len(found) < number:
        numbers = tuple(rng.choice(NUMBERS) for _ in range(count))
        target = rng.choice(TARGETS)
        if held_out(numbers) and target in reachable(numbers):
            found[tuple(sorted(numbers)), target] = Puzzle(numbers, target)
    return list(found.values())


def _results(a: int, b: int) -> list[tuple[str, int]]:
    """The operations that ``a op b`` allows, with their results."""
    out = [("+", a + b)] if a + b <= LARGEST else []
    if a > b:
        out.append(("-", a - b))
    if a * b <= LARGEST:
        out.append(("*", a * b))
    if b and a % b == 0:
        out.append(("/", a // b))
    return out


def _join(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers))
