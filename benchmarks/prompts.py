"""Prefill: one prompt by itself, in chunks, for many branches; and prompts of different lengths."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from steps import Marks, Timeline, peak_memory, settle
from transformers import DynamicCache, PreTrainedModel
from ways import Workload, prompt_of, with_tree

from hf_tree_cache import TreeCache, enable_tree_attention

REPEATS = 3


@dataclass(frozen=True)
class Prompts:
    """What is measured on a shape.

    Attributes:
        alone: prompts of one length, each with branches, in chunks or not.
        lengths: of prompts in one batch.
        rows: branches of each of these.
        tokens: new ones.
    """

    alone: tuple[Workload, ...]
    lengths: tuple[int, ...]
    rows: int
    tokens: int


PROMPTS = {
    "8B": Prompts(
        (
            Workload(2_000, 1, 1),
            Workload(2_000, 64, 1),
            Workload(32_768, 1, 1),
            Workload(32_768, 1, 1, chunk=8_192),
            Workload(32_768, 32, 1, chunk=8_192),
        ),
        (200, 457, 714, 971, 1_228, 1_485, 1_742, 2_000),
        rows=8,
        tokens=33,
    ),
    "tiny": Prompts(
        (Workload(40, 1, 1), Workload(40, 3, 1), Workload(70, 3, 1, chunk=32)),
        (5, 17, 40),
        rows=2,
        tokens=9,
    ),
}


def prefill(model: PreTrainedModel, shape: str) -> list[dict[str, Any]]:
    """Seconds and GB for a prompt, by the model alone (sdpa, its own cache) and with a TreeCache.

    A model alone computes one row. In chunks it is given the same chunks as ours.
    """
    works = PROMPTS[shape].alone
    found = []
    for alone in (True, False):
        if alone:
            model.set_attn_implementation("sdpa")
        handle = None if alone else enable_tree_attention(model)
        for work in works:
            if alone and work.rows > 1:
                continue
            branches = "1 branch" if work.rows == 1 else f"{work.rows} branches"
            how = "the model alone" if alone else f"TreeCache, {branches}"
            run = _model_alone if alone else _with_tree
            row: dict[str, Any] = {"prompt": work.prompt, "chunk": work.chunk, "how": how}
            found.append(row | _measured(lambda run=run, work=work: run(model, work)))
        if handle is not None:
            handle.disable()
    return found


def different_prompts(model: PreTrainedModel, shape: str) -> list[dict[str, Any]]:
    """A batch of prompts of different lengths, several branches each, beside DynamicCache.

    ``stored`` must be ``expected``: the tokens of the prompts, once, and those of the branches but
    for the last; no padding. ``dense_reads`` must be empty: no layer read padding, nor anything
    else, from a dense copy.
    """
    found = []
    for cache_type in (TreeCache, DynamicCache):
        handle = None
        if cache_type is TreeCache:
            handle = enable_tree_attention(model)
        else:
            model.set_attn_implementation("sdpa")
        row: dict[str, Any] = {"how": cache_type.__name__}
        try:
            _several(model, shape, cache_type())
            gc.collect()
            with peak_memory() as peak:
                cache = cache_type()
                timeline = _several(model, shape, cache)
                row |= {
                    "first_tokens_s": timeline.tokens[0],
                    "ms_per_step": timeline.ms_per_step,
                    "total_s": timeline.total,
                    "peak_above_weights_gb": peak(),
                }
            if isinstance(cache, TreeCache):
                stats = cache.stats()
                row |= {
                    "stored": stats.unique_tokens,
                    "expected": expected_tokens(PROMPTS[shape]),
                    "dense_reads": stats.dense_reads,
                }
            del cache
        except Exception as error:
            row["left_out"] = f"{type(error).__name__}: {str(error)[:300]}"
        if handle is not None:
            handle.disable()
        found.append(row)
    return found


def expected_tokens(prompts: Prompts) -> int:
    """Tokens that a cache has to hold at the end."""
    branches = len(prompts.lengths) * prompts.rows
    return sum(prompts.lengths) + branches * (prompts.tokens - 1)


def _measured(run: Callable[[], float]) -> dict[str, Any]:
    gc.collect()
    try:
        with peak_memory() as peak:
            return {"seconds": min(run() for _ in range(REPEATS)), "peak_above_weights_gb": peak()}
    except Exception as error:
        return {"left_out": f"{type(error).__name__}: {str(error)[:300]}"}


def _model_alone(model: PreTrainedModel, work: Workload) -> float:
    ids, cache = prompt_of(model, work.prompt), DynamicCache()
    settle()
    begin = time.perf_counter()
    with torch.no_grad():
        for part in ids.split(work.chunk or work.prompt, dim=1):
            model(input_ids=part, past_key_values=cache, logits_to_keep=1)
    settle()
    return time.perf_counter() - begin


def _with_tree(model: PreTrainedModel, work: Workload) -> float:
    return with_tree(model, work, 1).tokens[0]


def _several(model: PreTrainedModel, shape: str, cache: Any) -> Timeline:
    prompts = PROMPTS[shape]
    longest = max(prompts.lengths)
    ids = prompt_of(model, longest).repeat(len(prompts.lengths), 1)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(prompts.lengths):
        # Distinct from the first token on: nothing but what is said is shared.
        ids[row] = (ids[row] + row) % model.config.vocab_size
        mask[row, longest - length :] = 1
    ids[mask == 0] = 0
    marks = Marks()
    with marks.beside():
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            do_sample=True,
            top_k=0,
            num_return_sequences=prompts.rows,
            max_new_tokens=prompts.tokens,
            min_new_tokens=prompts.tokens,
        )
    timeline = marks.timeline()
    rows = len(prompts.lengths) * prompts.rows
    assert out.shape == (rows, longest + prompts.tokens), out.shape
    return timeline
