"""Models whose heads are split over processes (``tp_plan="auto"``), a GPU or a CPU core for each.

    torchrun --nproc_per_node=2 tests/tensor_parallel.py FOLDER llama qwen3 mistral

FOLDER/NAME holds each model as ``save_pretrained`` left it. Every rank generates with a TreeCache,
with transformers' own cache, and with the whole model that nobody split. Rank 0 says one line for
each model that agrees on all ranks.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from models import TINY, assert_same, generate, prompts
from torch import distributed
from transformers import DynamicCache

from hf_tree_cache import ForkAtFirstToken, TreeCache, enable_tree_attention, tree_generate

MODES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "greedy": (torch.float32, {"do_sample": False, "max_new_tokens": 24}),
    "sampling": (torch.float32, {"do_sample": True, "num_return_sequences": 3}),
    # Sums in another order part beams of random models in float32.
    "beam search": (torch.float64, {"do_sample": False, "num_beams": 3}),
}


def load(folder: Path, name: str, dtype: torch.dtype, **options: Any) -> Any:
    kind = getattr(transformers, TINY[name].model)
    return kind.from_pretrained(folder / name, dtype=dtype, **options).eval()


def assert_equal_on_all_ranks(tokens: torch.Tensor) -> None:
    every = [torch.empty_like(tokens) for _ in range(distributed.get_world_size())]
    distributed.all_gather(every, tokens.contiguous())
    assert all(torch.equal(other, tokens) for other in every)


def check(folder: Path, name: str) -> None:
    for dtype in (torch.float32, torch.float64):
        split = load(folder, name, dtype, tp_plan="auto")
        whole = load(folder, name, dtype).to(split.device)
        inputs = {key: value.to(split.device) for key, value in prompts(name, dtype).items()}
        with enable_tree_attention(split) as handle:
            for wanted, options in MODES.values():
                if wanted == dtype:
                    check_mode(split, whole, inputs, options)
            if dtype == torch.float32:
                check_branches(split, whole, inputs)
        if handle.graphs is not None:
            assert set(handle.graphs.eager) == {"the model is split over several processes"}
            assert not (handle.graphs.captured or handle.graphs.warm_ups)


def check_mode(
    split: Any, whole: Any, inputs: dict[str, torch.Tensor], options: dict[str, Any]
) -> None:
    cache = TreeCache(poison=True, block_size=4)
    ours = generate(split, inputs, past_key_values=cache, **options)
    cache.check_integrity()
    assert not cache.dense_reads, cache.dense_reads
    heads = split.config.num_key_value_heads // distributed.get_world_size()
    assert {storage.spec.num_kv_heads for storage in cache.storages} == {heads}
    assert_equal_on_all_ranks(ours.sequences)
    assert_same(ours, generate(split, inputs, past_key_values=DynamicCache(), **options))
    assert_same(ours, generate(whole, inputs, **options))


def check_branches(split: Any, whole: Any, inputs: dict[str, torch.Tensor]) -> None:
    """Branches that fork while they grow are the same on all ranks, and what they say is true."""
    torch.manual_seed(5)
    out = split.generate(
        **inputs,
        past_key_values=TreeCache(poison=True, block_size=4),
        custom_generate=tree_generate,
        branching=[ForkAtFirstToken(3)],
        max_branches=6,
        do_sample=True,
        max_new_tokens=12,
    )
    assert_equal_on_all_ranks(out.sequences)
    assert out.stats.forks >= 4
    for row, leaf in enumerate(out.leaves):
        tokens = torch.tensor([out.tree.tokens(leaf)], device=out.sequences.device)
        generated = len(out.tree.logprobs(leaf))
        with torch.no_grad():
            logprobs = whole(tokens).logits[0, -generated - 1 : -1].log_softmax(-1)
        expected = logprobs.gather(1, tokens[0, -generated:, None]).squeeze(1)
        assert (out.logprobs[row, :generated] - expected).abs().max() < 1e-4


def main(folder: str, *names: str) -> None:
    for name in names:
        check(Path(folder), name)
        if distributed.get_rank() == 0:
            print(f"{name} agrees", flush=True)
    distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
