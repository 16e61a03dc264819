"""Entropy-triggered branching: one branch to begin with, forks where the model is unsure."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from transformers import StoppingCriteria

from ..errors import InvalidArgument
from ..generation.loop import tree_generate
from ..generation.options import Sampling
from ..generation.output import TreeGenerateOutput
from ..generation.processors import ForkOnEntropy
from ..generation.text import decode_after, encode_prompt
from ..integration.cache import TreeCache
from ..integration.enable import borrow_tree_attention
from ..naming import CACHE
from ..sending import to_device
from .answers import AnswerClasses, AnswerFunction, SameFunction, extract_answer, same_answer
from .policy import SearchNode, SearchTree, conclude_vote
from .result import EndedBy, Question, SearchCost, SearchResult, make_result
from .strategy import default_sampling, one_or_many


@one_or_many
def entropy_branching(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    threshold: float = 2.0,
    children: int = 2,
    min_gap: int = 4,
    max_branches: int = 16,
    weighted: bool = False,
    seed: int | None = None,
    sampling: Sampling | None = None,
    max_new_tokens: int = 512,
    max_tokens: int | None = None,
    max_seconds: float | None = None,
    prompt: Callable[[Any], Any] | None = None,
    answer: AnswerFunction = extract_answer,
    same: SameFunction = same_answer,
    progress: bool | None = None,
) -> list[SearchResult]:
    """Fork where the next token's entropy is high, let the ends vote.

    Branches part where the model is undecided, and share everything else: the few tokens of high
    entropy are those that decide how a solution goes on (Wang et al., "Beyond the 80/20 Rule:
    High-Entropy Minority Tokens Drive Effective Reinforcement Learning for LLM Reasoning", 2025).
    The children of a fork begin with different tokens. It is :func:`tree_generate` with
    :class:`ForkOnEntropy`, and a vote.

    Args:
        questions: one question, or a list of them (all advance together).
        threshold: entropy in nats above which a branch forks.
        children: branches that go on from one, itself included.
        min_gap: tokens between two forks of a branch.
        max_branches: most branches of a question, on average where there are several; forks of the
            highest entropy are granted first.
        weighted: votes weigh by the geometric mean of their token probabilities.
        seed: makes the search reproducible; default torch's global generator.
        sampling: how tokens are drawn; default as of the other strategies.
        max_new_tokens: most generated tokens of a sequence.
        max_tokens: bound on generated tokens a question, on average; may be exceeded by one token
            of every branch.
        max_seconds: bound on wall time, looked at after every token.
        prompt: makes the prompt of a question; default the question itself.
        answer, same, progress: as of the other strategies.

    Returns:
        A result for one question, a list of results for a list.

    Raises:
        InvalidArgument: an argument that makes no sense; nothing has run.
    """
    if tokenizer is None or not len(questions):
        raise InvalidArgument("entropy_branching: give a tokenizer and at least one question.")
    bounds = {"max_tokens": max_tokens, "max_seconds": max_seconds}
    for name, bound in {**bounds, "max_branches": max_branches, "threshold": threshold}.items():
        if bound is not None and not bound > 0:
            raise InvalidArgument(f"entropy_branching({name}={bound}): give a positive number.")
    if children > max_branches:
        raise InvalidArgument(
            f"entropy_branching(children={children}, max_branches={max_branches}): no fork could "
            "ever be granted; give at least as many branches as a fork has children."
        )
    policy = ForkOnEntropy(threshold, children, min_gap=min_gap)
    sampling = sampling or default_sampling(model)
    started = time.perf_counter()
    bound = _Bound(max_tokens and max_tokens * len(questions), max_seconds)
    encoded = [encode_prompt(prompt(q) if prompt else q, tokenizer) for q in questions]
    width = max(map(len, encoded))
    padding = [width - len(ids) for ids in encoded]
    give_back = borrow_tree_attention(model)
    try:
        devices = {x.device for x in model.parameters() if x.device.type == "cuda"}
        with torch.random.fork_rng(devices, enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            out = model.generate(
                to_device(
                    [[0] * n + ids for n, ids in zip(padding, encoded, strict=True)], model.device
                ),
                attention_mask=to_device(
                    [[0] * n + [1] * (width - n) for n in padding], model.device
                ),
                **{CACHE: TreeCache()},
                custom_generate=tree_generate,
                branching=[policy],
                max_branches=max_branches * len(questions),
                max_new_tokens=max_new_tokens,
                do_sample=sampling.do_sample,
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                stopping_criteria=[bound],
                tree_tokenizer=tokenizer,
                progress=progress,
            )
    finally:
        give_back()
    cost = SearchCost(
        prompt_tokens=sum(map(len, encoded)),
        tokens_generated=out.tree.num_tokens,
        # The last token of a branch is never put in.
        tokens_computed=out.stats.prefill_tokens_computed + out.tree.num_tokens - len(out),
        forwards=out.stats.steps,
        kv_bytes_peak=out.stats.peak_kv_bytes,
        seconds=time.perf_counter() - started,
    )
    results = []
    for i, question in enumerate(questions):
        classes = AnswerClasses(same)

        def find(text: str, classes: AnswerClasses = classes) -> Hashable | None:
            return classes.of(answer(text))

        results.append(_result(i, question, out, find, bound.met, weighted, cost))
    return results


class _Bound(StoppingCriteria):
    """Ends all branches when tokens or seconds are used up."""

    def __init__(self, tokens: int | None, seconds: float | None) -> None:
        self.left = tokens
        self.until = None if seconds is None else time.perf_counter() + seconds
        self.met: EndedBy = "policy"

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if self.left is not None:
            self.left -= len(input_ids)
            if self.left < len(input_ids):
                self.met = "tokens"
        if self.until is not None and time.perf_counter() >= self.until:
            self.met = "seconds"
        over = self.met != "policy"
        return torch.full((len(input_ids),), over, device=input_ids.device)


def _result(
    prompt: int,
    question: Question,
    out: TreeGenerateOutput,
    find: Callable[[str], Hashable | None],
    met: EndedBy,
    weighted: bool,
    cost: SearchCost,
) -> SearchResult:
    """The branches of one question as a search of one step each, and their vote."""
    search = SearchTree(question)
    search.root.state = "closed"
    tree, place = out.tree.of_prompt(prompt)
    before = tree.tokens(tree.roots[0])
    leaves = {}
    for leaf, owner, reason in zip(out.leaves, out.prompts, out.finish_reasons, strict=True):
        if owner != prompt:
            continue
        node = search.add(0)
        tokens = out.tree.tokens(leaf, include_prompt=False)
        node.text = node.step = decode_after(tree.tokenizer, before, tokens)
        node.num_tokens, node.logprob = len(tokens), out.tree.logprob(leaf)
        node.state, node.reason = "done", reason
        if reason == "interrupted":
            node.state, met = "cut", "interrupted"
        else:
            node.answer = find(node.text)
            leaves[node.id] = place[leaf]

    def probability(node: SearchNode) -> float:
        return math.exp(min(0.0, search.mean_logprob(node.id)))

    return make_result(
        search,
        conclude_vote(search, probability if weighted else None),
        tree,
        leaves,
        ended_by=met,
        reason="all branches ended" if met == "policy" else "",
        tokens_generated=tree.num_tokens,
        branches=len(search.nodes) - 1,
        cost=cost,
    )
