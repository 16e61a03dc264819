"""The most branches of a long prompt that fit into the memory, beside what dense rows would."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from shapes import token_bytes
from steps import free_gb, peak_memory, settle
from transformers import PreTrainedModel
from ways import Workload, generate, prompt_of

from hf_tree_cache import TreeCache, enable_tree_attention

LARGEST = {
    "8B": (Workload(32_768, 2_048, 8, chunk=8_192), 60.0),
    "tiny": (Workload(70, 4, 8, chunk=32), 10.0),
}
"""Fewest branches to try, and seconds."""

SAMPLED_AT_ONCE = 1_024


def most_branches(
    model: PreTrainedModel,
    first: Workload,
    seconds: float,
    make_cache: Callable[[], TreeCache] = TreeCache,
) -> dict[str, Any]:
    """Doubles the branches of ``first`` until they do not fit, then halves the gap.

    The prompt is computed once and forked, as a search does; ``generate`` would hold the prompt's
    ids and mask for every branch. Steps run eagerly: graphs would hold memory for every size that
    is tried. After each failure the same cache must be sound, and serve a small batch.

    Args:
        seconds: nothing is started that would probably end later.
        make_cache: makes an empty cache, perhaps a bounded one.

    Returns:
        tree_rows: the most that fit; too_many: the fewest that did not, None where time ended
        first; dense_rows: how many rows of as many tokens fit as dense K/V; tries: each of them.
    """
    begin = time.perf_counter()
    dense = free_gb() * 1e9 // ((first.prompt + first.tokens) * token_bytes(model.config))
    fits, too_many, rows, last = 0, None, first.rows, 0.0
    tries: list[dict[str, Any]] = []
    with enable_tree_attention(model, cuda_graphs=False):
        while not tries or time.perf_counter() - begin + 2 * last < seconds:
            done = _try(model, first, rows, make_cache)
            tries.append(done)
            print(done, flush=True)
            last = done["seconds"]
            if "failed" in done:
                too_many = rows
            else:
                fits = rows
            rows = 2 * rows if too_many is None else (fits + too_many) // 2
            if too_many is not None and too_many - fits <= max(1, too_many // 8):
                break
    return {
        "prompt": first.prompt,
        "tokens": first.tokens,
        "tree_rows": fits,
        "too_many": too_many,
        "dense_rows": int(dense),
        "seconds": time.perf_counter() - begin,
        "tries": tries,
    }


def _try(
    model: PreTrainedModel, first: Workload, rows: int, make_cache: Callable[[], TreeCache]
) -> dict[str, Any]:
    cache = make_cache()
    done: dict[str, Any] = {"rows": rows}
    begin = time.perf_counter()
    work = Workload(first.prompt, rows, first.tokens, chunk=first.chunk)
    with peak_memory() as peak:
        try:
            _fork_and_decode(model, work, cache)
            done["kv_gb"] = cache.kv_bytes / 1e9
        except Exception as error:
            done["failed"] = f"{type(error).__name__}: {str(error)[:200]}"
        done["peak_above_weights_gb"] = peak()
    done["seconds"] = time.perf_counter() - begin
    gc.collect()
    if "failed" in done:
        done["usable_after"] = _is_usable(model, cache)
    return done


@torch.no_grad()
def _fork_and_decode(model: PreTrainedModel, work: Workload, cache: TreeCache) -> None:
    """Decode the tokens of all branches together."""
    for part in prompt_of(model, work.prompt).split(work.chunk or work.prompt, dim=1):
        out = model(input_ids=part, past_key_values=cache, logits_to_keep=1)
    cache.select([0] * work.rows)
    tokens = _sample(out.logits[:, -1].expand(work.rows, -1))
    for step in range(work.tokens - 1):
        positions = torch.full_like(tokens, work.prompt + step)
        out = model(input_ids=tokens, position_ids=positions, past_key_values=cache)
        tokens = _sample(out.logits[:, -1])
    settle()


def _sample(logits: torch.Tensor) -> torch.Tensor:
    """``[N, V]`` to ``[N, 1]``, a part of the rows at a time: probabilities are float32."""
    parts = logits.split(SAMPLED_AT_ONCE)
    return torch.cat([torch.multinomial(part.float().softmax(-1), 1) for part in parts])


def _is_usable(model: PreTrainedModel, cache: TreeCache) -> bool | str:
    """Whether the cache is sound as it was left, and serves another prompt after a reset."""
    try:
        cache.check_integrity()
        cache.reset()
        generate(model, Workload(40, 2, 4), 4, past_key_values=cache)
        cache.check_integrity()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return True
