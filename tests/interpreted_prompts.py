"""First forwards with the fused kernel, in Triton's interpreter on a CPU: no mask is ever a tensor.

A script, for a process of its own: whether a kernel is interpreted is decided when it is imported.

TRITON_INTERPRET=1 python tests/interpreted_prompts.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from interpreter import quicken
from models import build, prompts
from transformers import DynamicCache

from hf_tree_cache import TreeCache, enable_tree_attention
from hf_tree_cache.integration import attention
from hf_tree_cache.integration.handles import TreeMask

LAUNCHES = {
    # Of three layers, or two, those that need more than causality, without and with padding.
    "llama": (0, 3),
    "mistral": (3, 3),  # a window
    "gemma2": (3, 3),  # softcap
    "gpt_oss": (2, 2),  # sinks
    "gemma3": (2, 3),  # two layers with a window
    "deepseek_v3": (0, 0),  # latents: its layers expand K/V by themselves
}


def main() -> None:
    quicken()
    torch.set_num_threads(1)
    for name, launches in LAUNCHES.items():
        found = tuple(count_launches(name, num_rows) for num_rows in (1, 3))
        assert found == launches, f"{name}: {found} launches, not {launches}"


def count_launches(name: str, num_rows: int) -> int:
    """Of a prompt, whose logits must be those without tree attention."""
    model, inputs = build(name), prompts(name, num_rows=num_rows)
    tokens = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**inputs, past_key_values=DynamicCache(config=model.config)).logits
    calls = []
    run = attention.run_tree_attention

    def counted(*args, **options):
        calls.append(args)
        return run(*args, **options)

    def refused(mask):
        raise AssertionError(f"{name}: {mask} became a tensor")

    with enable_tree_attention(model):
        cache = TreeCache(poison=True, block_size=4, backend="triton")
        with patch.object(attention, "run_tree_attention", counted), torch.no_grad():
            if name == "deepseek_v3":
                got = model(**inputs, past_key_values=cache).logits
            else:
                with patch.object(TreeMask, "dense", refused):
                    got = model(**inputs, past_key_values=cache).logits
        # A model that is trained has a gradient, which stored K/V cannot give.
        if num_rows == 1:
            cache = TreeCache(block_size=4, backend="triton")
            model(**inputs, past_key_values=cache).logits.sum().backward()
    cache.check_integrity()
    error = (got - expected)[tokens].abs().max()
    assert error < 1e-4, f"{name}: {error}"
    return len(calls)


if __name__ == "__main__":
    main()
