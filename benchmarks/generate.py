"""Stock generate on a GPU: N branches of one prompt, TreeCache beside DynamicCache, eager.

    python benchmarks/generate.py --out benchmarks/results/generate.json

A model of the shape of Llama-3.1-8B with random weights in bfloat16. For each workload (P prompt
tokens, N branches, T new tokens): milliseconds a decode step, which is the time of T tokens less
that of T/4, over their difference; time to the first tokens; and the peak of memory above the
weights. The floor is what a step must read, weights and unique K/V, over the measured bandwidth.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from ceilings import linear_read
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_tree_cache import TreeCache, enable_tree_attention
from hf_tree_cache.env import environment

WORKLOADS = ((2_000, 16, 64), (2_000, 64, 64), (32_768, 32, 64))
"""P, N, T."""
DENSE_BYTES = 100 << 30
"""DynamicCache is left out where its K/V alone would take more."""


def llama_8b() -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=4_096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131_072,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model = model.to_empty(device="cuda")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02) if parameter.ndim > 1 else parameter.fill_(1)
        model.model.rotary_emb = type(model.model.rotary_emb)(config=config, device="cuda")
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def generate(model: PreTrainedModel, prompt: int, rows: int, tokens: int, cache: Any) -> float:
    """Seconds to sample ``tokens`` new tokens in ``rows`` branches of one random prompt."""
    torch.manual_seed(1)
    ids = torch.randint(0, 128_000, (1, prompt), device="cuda")
    torch.cuda.synchronize()
    begin = time.perf_counter()
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        do_sample=True,
        top_k=0,
        num_return_sequences=rows,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        prefill_chunk_size=8_192 if prompt > 8_192 else None,
    )
    torch.cuda.synchronize()
    assert out.shape == (rows, prompt + tokens)
    return time.perf_counter() - begin


def measure(model: PreTrainedModel, make_cache: Any, prompt: int, rows: int, tokens: int) -> Any:
    weights = torch.cuda.memory_allocated()
    generate(model, prompt, rows, 2, make_cache())
    torch.cuda.reset_peak_memory_stats()
    first = generate(model, prompt, rows, 1, make_cache())
    short = min(generate(model, prompt, rows, tokens // 4, make_cache()) for _ in range(2))
    long = generate(model, prompt, rows, tokens, make_cache())
    return {
        "ms_per_step": 1e3 * (long - short) / (tokens - tokens // 4),
        "first_tokens_s": first,
        "total_s": long,
        "peak_above_weights_gb": (torch.cuda.max_memory_allocated() - weights) / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--no-dense", action="store_true", help="TreeCache alone")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA GPU; benchmarks/cpu_generate.py runs without")
    bandwidth = statistics.median(linear_read() for _ in range(3))
    print(f"ceiling: linear read {bandwidth:.2f} TB/s", flush=True)
    model = llama_8b()
    embeddings = model.get_input_embeddings().weight
    weight_bytes = sum(p.nbytes for p in model.parameters()) - embeddings.nbytes
    token_bytes = 2 * 2 * 8 * 128 * 32
    rows_out = []
    for prompt, rows, tokens in WORKLOADS:
        unique = (prompt + rows * tokens // 2) * token_bytes
        floor = 1e-9 * (weight_bytes + unique) / bandwidth
        row: dict[str, Any] = {"prompt": prompt, "rows": rows, "tokens": tokens, "floor_ms": floor}
        with enable_tree_attention(model) as handle:
            row["TreeCache"] = measure(model, TreeCache, prompt, rows, tokens)
            print(handle.graphs, flush=True)
        torch.cuda.empty_cache()
        if not arguments.no_dense and rows * (prompt + tokens) * token_bytes < DENSE_BYTES:
            model.set_attn_implementation("sdpa")
            row["DynamicCache"] = measure(model, DynamicCache, prompt, rows, tokens)
            torch.cuda.empty_cache()
        rows_out.append(row)
        print(json.dumps(row), flush=True)
    result = {"environment": environment(), "linear_read_tb_s": bandwidth, "rows": rows_out}
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
