"""What all strategies share: their options, and one call for one question or many."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, Concatenate, ParamSpec, Protocol, TypedDict, TypeVar, Unpack, overload

from ..errors import InvalidArgument
from ..generation.options import Sampling
from ..generation.runner import BranchRunner
from ..integration.cache import TreeCache
from .answers import AnswerFunction, SameFunction, extract_answer, same_answer
from .budget import Budget
from .driver import SearchDriver, Watch
from .policy import Policy
from .result import Question, SearchResult
from .scoring import ScoreLike, make_scorer
from .task import Limits

P = ParamSpec("P")
R_co = TypeVar("R_co", covariant=True)


class SearchOptions(TypedDict, total=False):
    """Keywords that every strategy takes.

    Attributes:
        seed: makes the search reproducible; default torch's global generator.
        sampling: how tokens are drawn; default the model's own generation config if it samples,
            else a temperature of 0.8.
        max_new_tokens: most generated tokens of a sequence, 512.
        max_step_tokens: most tokens of a step; default no bound of its own.
        delimiters: texts that end a step, ``["\\n"]``.
        stop: texts that end a sequence, besides the end-of-sequence token.
        budget: bounds of the search.
        prompt: makes the prompt of a question, text, token ids or chat messages; default the
            question itself, as it is.
        answer: finds the answer in a generated text, None where there is none; default
            :func:`~.answers.extract_answer`.
        same: tells whether two answers are equal; default :func:`~.answers.same_answer`.
        cache: an empty TreeCache with a backend of your choice; its bound must be that of
            ``budget.blocks``.
        progress: show a bar, and in a notebook the growing tree until the search ends; default only
            on a terminal or in a notebook.
        watch: called with the growing :class:`GenerationTree` and the searches of all questions
            whenever steps have ended.
    """

    seed: int | None
    sampling: Sampling | None
    max_new_tokens: int
    max_step_tokens: int | None
    delimiters: Sequence[str]
    stop: Sequence[str]
    budget: Budget | None
    prompt: Callable[[Any], Any] | None
    answer: AnswerFunction
    same: SameFunction
    cache: TreeCache | None
    progress: bool | None
    watch: Watch | None


def run_search(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    policy: Policy,
    *,
    score: ScoreLike | None = None,
    **options: Unpack[SearchOptions],
) -> list[SearchResult]:
    """Search for the answers of ``questions`` with any policy.

    Args:
        score: what answers the policy's :class:`~.policy.Score`; see :func:`~.scoring.make_scorer`.
        **options: see :class:`SearchOptions`.

    Returns:
        A result for each question, in their order.

    Raises:
        InvalidArgument: no questions, no tokenizer, an unknown scorer or option.
        OutOfBlocks: ``budget.blocks`` has no room for the prompts.
    """
    _refuse_unknown("run_search", options, ["score", *SearchOptions.__annotations__])
    scorer = make_scorer(score)
    budget = options.get("budget") or Budget()
    limits = Limits(
        delimiters=_texts(options.get("delimiters", ("\n",))),
        stop=_texts(options.get("stop", ())),
        max_new_tokens=options.get("max_new_tokens", 512),
        max_step_tokens=options.get("max_step_tokens"),
    )
    if tokenizer is None:
        raise InvalidArgument(
            "A search reads answers and the ends of steps from text: pass a tokenizer."
        )
    cache = options.get("cache")
    if cache is None:
        cache = TreeCache(max_blocks=budget.blocks)
    elif budget.blocks is not None:
        raise InvalidArgument(
            "cache= and budget.blocks: a cache has its own bound, TreeCache(max_blocks=...). Give "
            "one of the two."
        )
    runner = BranchRunner(
        model,
        tokenizer,
        cache=cache,
        seed=options.get("seed"),
        sampling=options.get("sampling") or default_sampling(model),
    )
    with runner:
        driver = SearchDriver(
            runner,
            policy,
            scorer=scorer,
            limits=limits,
            budget=budget,
            prompt=options.get("prompt"),
            progress=options.get("progress"),
            watch=options.get("watch"),
            answer=options.get("answer", extract_answer),
            same=options.get("same", same_answer),
        )
        return driver.run(questions)


class Strategy(Protocol[P]):
    """A strategy as users call it: one question gives a result, a list of them a list."""

    @overload
    def __call__(
        self, model: Any, tokenizer: Any, question: str, *args: P.args, **kwargs: P.kwargs
    ) -> SearchResult: ...

    @overload
    def __call__(
        self, model: Any, tokenizer: Any, question: Sequence[Any], *args: P.args, **kwargs: P.kwargs
    ) -> Any: ...


def one_or_many(
    function: Callable[Concatenate[Any, Any, Sequence[Question], P], list[SearchResult]],
) -> Strategy[P]:
    """Let a function of many questions take a single one too, and then return its one result."""
    parameters = inspect.signature(function).parameters.values()
    known = [each.name for each in parameters if each.kind is each.KEYWORD_ONLY]
    if any(each.kind is each.VAR_KEYWORD for each in parameters):
        known += SearchOptions.__annotations__

    @functools.wraps(function)
    def strategy(
        model: Any, tokenizer: Any, question: Any, *args: P.args, **kwargs: P.kwargs
    ) -> Any:
        _refuse_unknown(function.__name__, kwargs, known)
        single = is_one_question(question)
        results = function(model, tokenizer, [question] if single else question, *args, **kwargs)
        return results[0] if single else results

    return strategy


def _refuse_unknown(name: str, options: Mapping[str, Any], known: Sequence[str]) -> None:
    unknown = [option for option in options if option not in known]
    if not unknown:
        return
    drawn = [field.name for field in fields(Sampling) if field.name in unknown]
    hint = f" Sampling takes {', '.join(drawn)}: sampling=Sampling(...)." if drawn else ""
    raise InvalidArgument(
        f"{name}: unknown option {', '.join(unknown)}; known are {', '.join(known)}.{hint}"
    )


def is_one_question(question: Any) -> bool:
    """Whether this is one question, and not a list of them.

    A text is one, and so is a list of chat messages or of token ids; so is what is no list at all,
    for ``prompt=`` to make something of.
    """
    if isinstance(question, str) or not isinstance(question, Sequence):
        return True
    return len(question) > 0 and isinstance(question[0], (dict, int))


def _texts(texts: Sequence[str]) -> Any:
    return texts if isinstance(texts, str) else tuple(texts)


def default_sampling(model: Any) -> Sampling:
    """The model's own generation config if it samples, else a temperature of 0.8."""
    config = getattr(model, "generation_config", None)
    return Sampling.of(config) if config is not None and config.do_sample else Sampling(0.8)
