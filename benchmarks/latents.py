"""Decoding over cached latents (MLA): a step before and after attention read them in place.

DeepSeek-V2-Lite's attention (16 heads, latents of 512 and 64) in a model of two layers, random
weights, float32, on a CPU: one prompt, many branches. Ways: "dynamic" is transformers' own cache
and attention; "dense" gathers and expands the latents of every branch; "called" expands each shared
run once, by the layer's own function, as where the projection is quantised or has an adapter;
"absorbed" expands nothing. Last line: one JSON object. On a GPU: latent_attention.py.

    python benchmarks/latents.py [--prompt 1000] [--branches 16] [--steps 12]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DynamicCache

from hf_tree_cache import TreeCache, enable_tree_attention
from hf_tree_cache.env import environment
from hf_tree_cache.integration import latent

WAYS = ("dynamic", "dense", "called", "absorbed")


def build() -> DeepseekV2ForCausalLM:
    config = DeepseekV2Config(
        vocab_size=1000,
        hidden_size=512,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=16,
        num_key_value_heads=16,
        kv_lora_rank=512,
        q_lora_rank=None,
        qk_rope_head_dim=64,
        qk_nope_head_dim=128,
        v_head_dim=128,
        first_k_dense_replace=2,
        max_position_embeddings=8192,
    )
    torch.manual_seed(0)
    return DeepseekV2ForCausalLM(config).eval()


class Called(torch.nn.Linear):
    """A projection that nobody may take for a plain product."""


@contextmanager
def enabled(model: Any, way: str) -> Iterator[None]:
    layers = [layer.self_attn for layer in model.model.layers]
    if way == "dynamic":
        yield
        return
    with enable_tree_attention(model):
        if way == "dense":
            latent.undo(layers)
        for layer in layers:
            layer.kv_b_proj.__class__ = Called if way == "called" else torch.nn.Linear
        yield


@torch.no_grad()
def run(model: Any, way: str, prompt: int, branches: int, steps: int) -> dict[str, Any]:
    """Milliseconds of each step, and tokens expanded in one of them, all layers together."""
    kind, expanded = type(model.model.layers[0].self_attn), []
    original = kind.expand_kv

    def expand(self: Any, latents: Any, rotary: Any) -> Any:
        expanded.append(latents.shape[0] * latents.shape[2])
        return original(self, latents, rotary)

    ids = torch.randint(0, 1000, (1, prompt), generator=torch.Generator().manual_seed(1))
    new = torch.arange(branches)[:, None]
    times, logits = [], []
    kind.expand_kv = expand
    try:
        with enabled(model, way):
            cache = DynamicCache() if way == "dynamic" else TreeCache()
            model(ids, past_key_values=cache)
            cache.batch_repeat_interleave(branches)
            for step in range(steps):
                expanded.clear()
                started = time.perf_counter()
                logits.append(model(new + step, past_key_values=cache).logits)
                times.append((time.perf_counter() - started) * 1e3)
    finally:
        kind.expand_kv = original
    low, middle, high = (statistics.quantiles(times[2:], n=10)[i] for i in (1, 4, 7))
    return {
        "ms": round(middle, 1),
        "p20": round(low, 1),
        "p80": round(high, 1),
        "tokens_expanded": sum(expanded),
        "logits": torch.stack(logits),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt", type=int, default=1000)
    parser.add_argument("--branches", type=int, default=16)
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    model = build()
    results = {way: run(model, way, **vars(options)) for way in WAYS}
    want = results["dynamic"]["logits"]
    for way, result in results.items():
        difference = float((result.pop("logits") - want).abs().max())
        assert difference < 1e-4, (way, difference)
        print(f"{way:9} {result['ms']:8.1f} ms  {result['tokens_expanded']:6d} tokens expanded")
    print(json.dumps({"options": vars(options), "results": results, "environment": environment()}))


if __name__ == "__main__":
    main()
