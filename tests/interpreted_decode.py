"""Decode steps through fixed buffers in Triton's interpreter, on a CPU: all but the capture.

A script, for a process of its own: whether a kernel is interpreted is decided when it is imported.

TRITON_INTERPRET=1 python tests/interpreted_decode.py [--compile]
"""

from __future__ import annotations

import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from interpreter import quicken
from transformers import (
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from hf_tree_cache import (
    ForkAtPositions,
    PruneByRank,
    TreeCache,
    enable_tree_attention,
    tree_generate,
)
from hf_tree_cache.forward.rotary import Rotation


def main() -> None:
    quicken()
    torch.set_num_threads(1)
    for compile in (False, True) if "--compile" in sys.argv else (False,):
        run(compile)
    in_half_precision()
    where_layers_read_what_others_keep()
    in_two_threads()


def run(compile: bool) -> None:
    """Plain layers or compiled ones."""
    warnings.simplefilter("ignore")  # the interpreter divides by zero where values are masked
    torch.manual_seed(0)
    model = tiny(LlamaConfig, LlamaForCausalLM)
    ids = torch.tensor([[0, 0, 7], [3, 5, 9]])
    options = {
        "attention_mask": (ids > 0).long(),
        "max_new_tokens": 5,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    dense = model.generate(ids, **options)
    with enable_tree_attention(model, cuda_graphs=True, compile=compile) as handle:
        cache = TreeCache(poison=True, block_size=4)
        ours = model.generate(ids, past_key_values=cache, **options)
        cache.check_integrity()
        assert not cache.dense_reads
        assert ours.sequences.tolist() == dense.sequences.tolist()
        error = (torch.stack(ours.logits) - torch.stack(dense.logits)).abs().max()
        assert error < 1e-5, error
        graphs = handle.graphs
        assert (graphs.warm_ups, graphs.captured, sum(graphs.eager.values())) == (4, 0, 0), graphs

        cache = TreeCache(poison=True, block_size=4)
        out = model.generate(
            ids[1:],
            past_key_values=cache,
            custom_generate=tree_generate,
            branching=[ForkAtPositions([1, 2]), PruneByRank(2, every=3)],
            max_branches=4,
            max_new_tokens=5,
        )
        cache.check_integrity()
        assert out.stats.forks > 1 and out.stats.prunes > 0 and not graphs.eager
    for row, leaf in enumerate(out.leaves):
        tokens = torch.tensor([out.tree.tokens(leaf)])
        count = len(out.tree.logprobs(leaf))
        logprobs = model(tokens).logits[0, -count - 1 : -1].log_softmax(-1)
        expected = logprobs.gather(1, tokens[0, -count:, None]).squeeze(1)
        assert (out.logprobs[row, :count] - expected).abs().max() < 1e-5
    behind_a_window(compile)


def in_half_precision() -> None:
    """Kernels of ours compute what surrounds attention; storing keys takes a rotation along."""
    stored = []
    write = Rotation.write

    def noted(rotation: Rotation, *where: Any) -> None:
        stored.append(bool(where))
        write(rotation, *where)

    torch.manual_seed(0)
    model = tiny(LlamaConfig, LlamaForCausalLM, num_hidden_layers=2).half()
    ids = torch.tensor([[3, 5, 9], [4, 4, 1]])
    options = {"max_new_tokens": 6, "output_logits": True, "return_dict_in_generate": True}
    dense = model.generate(ids, do_sample=False, **options)
    with enable_tree_attention(model, cuda_graphs=True) as handle:
        cache = TreeCache(poison=True, block_size=4)
        with patch.object(Rotation, "write", noted):
            ours = model.generate(ids, past_key_values=cache, do_sample=False, **options)
        cache.check_integrity()
        assert not cache.dense_reads and not handle.graphs.eager
    assert ours.sequences.tolist() == dense.sequences.tolist()
    error = (torch.stack(ours.logits) - torch.stack(dense.logits)).abs().max()
    assert error < 4e-3, error
    layers, steps = model.config.num_hidden_layers, options["max_new_tokens"] - 1
    assert stored.count(True) == layers * steps and len(stored) < 2 * layers * steps, stored


def where_layers_read_what_others_keep() -> None:
    """Gemma 4: the last layers keep no K/V, and global ones have longer heads than others."""
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "head_dim": 16,
        "global_head_dim": 32,
        "sliding_window": 5,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 50,
        "num_hidden_layers": 4,
    }
    model = tiny(Gemma4TextConfig, Gemma4ForCausalLM, **options)
    ids = torch.tensor([[2, 8, 7], [3, 5, 9]])
    options = {"max_new_tokens": 12, "output_logits": True, "return_dict_in_generate": True}
    dense = model.generate(ids, do_sample=False, **options)
    with enable_tree_attention(model, cuda_graphs=True) as handle:
        cache = TreeCache(poison=True, block_size=4)
        ours = model.generate(ids, past_key_values=cache, do_sample=False, **options)
        cache.check_integrity()
        assert not cache.dense_reads and not handle.graphs.eager, handle.graphs
    assert ours.sequences.tolist() == dense.sequences.tolist()
    error = (torch.stack(ours.logits) - torch.stack(dense.logits)).abs().max()
    assert error < 1e-5, error


def in_two_threads() -> None:
    """One computes as ever while the model of the other has kernels of ours in it."""
    torch.manual_seed(0)
    model = tiny(LlamaConfig, LlamaForCausalLM, num_hidden_layers=2).half()
    prompts = [torch.tensor([[3, 5, 9], [4, 4, 1]]), torch.tensor([[7, 2, 8, 1]])]

    def tokens(ids: torch.Tensor) -> list[list[int]]:
        cache = TreeCache(poison=True, block_size=4)
        return model.generate(ids, past_key_values=cache, max_new_tokens=7).tolist()

    with enable_tree_attention(model, cuda_graphs=True) as handle:
        want = [tokens(ids) for ids in prompts]
        with ThreadPoolExecutor(len(prompts)) as pool:
            assert list(pool.map(tokens, prompts)) == want
        assert not handle.graphs.eager, handle.graphs


def tiny(config: type[PretrainedConfig], kind: type[PreTrainedModel], **options: Any) -> Any:
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    model: Any = kind(config(**{**sizes, **heads, **options})).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def behind_a_window(compile: bool) -> None:
    """Steps go on through the same buffers while blocks are let go and their places reused."""
    model = tiny(MistralConfig, MistralForCausalLM, sliding_window=5)
    ids = torch.tensor([[0, 0, 7], [3, 5, 9]])
    options: dict[str, Any] = {
        "attention_mask": (ids > 0).long(),
        "max_new_tokens": 24,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    dense = model.generate(ids, **options)
    with enable_tree_attention(model, cuda_graphs=True, compile=compile) as handle:
        cache = TreeCache(poison=True, block_size=4, backtrack=0)
        ours = model.generate(ids, past_key_values=cache, **options)
        cache.check_integrity()
        assert not cache.dense_reads and not handle.graphs.eager
    assert ours.sequences.tolist() == dense.sequences.tolist()
    error = (torch.stack(ours.logits) - torch.stack(dense.logits)).abs().max()
    assert error < 1e-5, error
    (kind,) = cache.stats().kinds
    assert kind.window == 5 and kind.blocks < cache.stats().blocks, cache.stats()


if __name__ == "__main__":
    main()
