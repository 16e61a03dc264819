"""Answers: finding them in a text, and telling when two are the same."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Hashable
from fractions import Fraction
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

from ..errors import InvalidArgument

AnswerFunction = Callable[[str], Hashable | None]
SameFunction = Callable[[Any, Any], bool]

_BOXED = "\\boxed{"
_PHRASE = re.compile(r"\banswer\s*(?:is\b\s*[:=]?|[:=])\s*([^\n]+)", re.IGNORECASE)
_NUMBER = re.compile(r"[-−]?\d[\d,]*(?:\.\d+)?(?:/\d+)?")
# What stands around an answer without being part of it: emphasis, quotes, a full stop.
_AROUND = " \t\r\n*_`'\"$.,;:!"


def extract_answer(text: str) -> str | None:
    """The answer that a text gives: the last ``\\boxed{...}``, else what follows the last "answer
    is" or "answer:" on its line (its number, if it holds one), else the last number.

    Returns:
        The answer as written; None where there is nothing of the kind.
    """
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed
    phrases = _PHRASE.findall(text)
    if phrases:
        numbers = _NUMBER.findall(phrases[-1])
        said = numbers[0] if numbers else phrases[-1].strip(_AROUND)
        if said:
            return said.rstrip(",")
    numbers = _NUMBER.findall(text)
    return numbers[-1].rstrip(",") if numbers else None


def _last_boxed(text: str) -> str | None:
    """What the last complete ``\\boxed{...}`` holds, braces within it balanced."""
    end = len(text)
    while (start := text.rfind(_BOXED, 0, end)) >= 0:
        depth = 0
        for i in range(start + len(_BOXED) - 1, len(text)):
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            if depth == 0:
                return text[start + len(_BOXED) : i].strip() or None
        end = start
    return None


def has_math_verify() -> bool:
    """Whether the optional extra ``math`` is installed."""
    return find_spec("math_verify") is not None


def same_answer(a: Any, b: Any) -> bool:
    """Whether two answers are the same: as text, as a number, or (with math-verify) in mathematics.

    Without the extra ``math`` (``pip install hf_tree_cache[math]``), ``1/2`` and ``0.5`` are the
    same but ``\\frac{1}{2}`` is another. Answers that are not strings are compared with ``==``.
    """
    if not (isinstance(a, str) and isinstance(b, str)):
        return bool(a == b)
    plain = _plain(a), _plain(b)
    if plain[0] == plain[1]:
        return True
    numbers = _number(plain[0]), _number(plain[1])
    if None not in numbers:
        return numbers[0] == numbers[1]
    return has_math_verify() and _same_mathematics(a, b)


def _plain(answer: str) -> str:
    return re.sub(r"\s+", " ", answer.strip(_AROUND)).replace("−", "-").casefold()


def _number(text: str) -> Fraction | None:
    try:
        return Fraction(text.replace(",", "").replace("\\$", "").strip("$ "))
    except (ValueError, ZeroDivisionError):
        return None


@lru_cache(maxsize=4096)
def _same_mathematics(a: str, b: str) -> bool:
    from math_verify import parse, verify

    # Its time limits are signals, which only the main thread can receive.
    seconds = 5 if threading.current_thread() is threading.main_thread() else None
    first, second = (parse(f"${text}$", parsing_timeout=seconds) for text in (a, b))
    return bool(first and second and verify(first, second, timeout_seconds=seconds))


class AnswerClasses:
    """Makes equal answers one: the first of its class stands for all.

    Args:
        same: tells whether two answers are equal, default :func:`same_answer`.
    """

    def __init__(self, same: SameFunction = same_answer) -> None:
        self.same = same
        self._known: dict[Hashable, Hashable] = {}
        self._classes: list[Hashable] = []

    def of(self, answer: Any) -> Hashable | None:
        """What stands for the class of ``answer``; None stays None.

        Raises:
            InvalidArgument: an answer that cannot be hashed, and so cannot be counted.
        """
        if answer is None:
            return None
        try:
            known = self._known.get(answer)
        except TypeError as error:
            raise InvalidArgument(
                f"answer(text) returned a {type(answer).__name__}, which cannot be counted: return "
                "a string, a number, a tuple or None."
            ) from error
        if known is None:
            known = next((rep for rep in self._classes if self.same(rep, answer)), None)
            if known is None:
                self._classes.append(answer)
                known = answer
            self._known[answer] = known
        return known
