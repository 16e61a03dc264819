"""A model over two GPUs, layer by layer (device_map), or over two processes, head by head (TP)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import TINY, assert_same, build, generate, one_thread, prompts
from torch import distributed

from hf_tree_cache import (
    ForkAtFirstToken,
    ForkOnEntropy,
    PruneByRank,
    TreeCache,
    enable_tree_attention,
    tree_generate,
)

__all__ = ["one_thread"]  # a fixture for all of this file

needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
DEVICES = ("cuda:0", "cuda:1")
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False, "max_new_tokens": 24},
    "sampled": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"do_sample": False, "num_beams": 4},
    "chunked prefill": {"do_sample": False, "prefill_chunk_size": 16},
}


def spread(name: str, dtype: torch.dtype, folder: Path) -> Any:
    """The model with its first layer on one GPU and the others on the next, by ``device_map``."""
    build(name, dtype).save_pretrained(folder)
    parts = ["model.embed_tokens", "model.rotary_emb", "model.layers.0"]
    others = ["model.layers.1", "model.layers.2", "model.norm", "lm_head"]
    places = dict.fromkeys(parts, DEVICES[0]) | dict.fromkeys(others, DEVICES[1])
    kind = getattr(transformers, TINY[name].model)
    return kind.from_pretrained(folder, dtype=dtype, device_map=places).eval()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the fused kernel was launched on each device."""
    launch = pytest.importorskip("hf_tree_cache.attention.launch")
    original, counts = launch.tree_attention_triton, Counter()

    def counted(q: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        counts[str(q.device)] += 1
        return original(q, *args, **kwargs)

    monkeypatch.setattr(launch, "tree_attention_triton", counted)
    return counts


@pytest.mark.gpu
@needs_two_gpus
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_layers_on_two_gpus(name: str, mode: str, tmp_path: Path, launches: Counter[str]) -> None:
    dtype = torch.float64 if mode == "beams" else torch.float32
    inputs = {key: value.to(DEVICES[0]) for key, value in prompts(name, dtype).items()}
    model = spread(name, dtype, tmp_path)
    theirs = generate(model, inputs, **MODES[mode])
    alone = generate(build(name, dtype).to(DEVICES[0]), inputs, **MODES[mode])
    cache = TreeCache(poison=True, block_size=4)
    with enable_tree_attention(model) as handle:
        ours = generate(model, inputs, past_key_values=cache, **MODES[mode])
    cache.check_integrity()
    assert_same(ours, theirs)
    assert_same(ours, alone)
    assert not cache.dense_reads
    held = [str(layer.storage.spec.device) for layer in cache.layers]
    assert held == [DEVICES[0], DEVICES[1], DEVICES[1]]
    if dtype == torch.float32:
        assert launches[DEVICES[0]] > 0 and launches[DEVICES[1]] == 2 * launches[DEVICES[0]]
    assert handle.graphs is not None
    assert set(handle.graphs.eager) == {"the model is on several devices"}
    assert not (handle.graphs.captured or handle.graphs.warm_ups)


@pytest.mark.gpu
@needs_two_gpus
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_branches_on_two_gpus(name: str, tmp_path: Path, launches: Counter[str]) -> None:
    inputs = {key: value.to(DEVICES[0]) for key, value in prompts(name).items()}
    model = spread(name, torch.float32, tmp_path)
    stock = generate(model, inputs, do_sample=False).sequences
    cache = TreeCache(poison=True, block_size=4)
    options = {"custom_generate": tree_generate, "past_key_values": cache}
    policy = [ForkAtFirstToken(3), ForkOnEntropy(2.0, min_gap=4), PruneByRank(4, every=6)]
    with enable_tree_attention(model):
        plain = model.generate(**inputs, **options, do_sample=False, max_new_tokens=9)
        tails = [plain.tree.tokens(leaf)[-9:] for leaf in plain.leaves]
        assert tails == stock[:, -9:].tolist()
        cache.reset()
        torch.manual_seed(5)
        out = model.generate(
            **inputs, **options, branching=policy, max_branches=24, do_sample=True,
            max_new_tokens=30,
        )  # fmt: skip
    cache.check_integrity()
    assert launches[DEVICES[1]] == 2 * launches[DEVICES[0]] > 0
    assert out.stats.forks > 6 and out.stats.prunes > 0 and len(out) > 2
    for row, leaf in enumerate(out.leaves):
        tokens = torch.tensor([out.tree.tokens(leaf)], device=DEVICES[0])
        generated = len(out.tree.logprobs(leaf))
        with torch.no_grad():
            logprobs = model(tokens).logits[0, -generated - 1 : -1].log_softmax(-1)
        expected = logprobs.gather(1, tokens[0, -generated:, None]).squeeze(1)
        assert (out.logprobs[row, :generated] - expected).abs().max() < 1e-4


SPLIT: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 4},
    "qwen3": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "mistral": {},
}
"""Models whose heads and words are even in number."""


def run_split(folder: Path, names: list[str], **environment: str) -> None:
    """Two processes of tensor_parallel.py agree on every model."""
    for name in names:
        build(name, vocab_size=98, **SPLIT[name]).save_pretrained(folder / name)
    script = Path(__file__).with_name("tensor_parallel.py")
    path = os.pathsep.join([str(script.parents[1]), os.environ.get("PYTHONPATH", "")])
    launcher = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"
    done = subprocess.run(
        [sys.executable, *launcher, str(script), str(folder), *names],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
    )
    assert done.returncode == 0, done.stderr[-12000:]
    assert done.stdout.splitlines() == [f"{name} agrees" for name in names]


@pytest.mark.core
@pytest.mark.skipif(not distributed.is_available(), reason="torch was built without distributed")
def test_heads_split_over_two_processes(tmp_path: Path) -> None:
    """With the interpreter, so that CUDA graphs are asked for and refused on a CPU, too."""
    run_split(tmp_path, ["mistral"], CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET="1")


@pytest.mark.gpu
@needs_two_gpus
def test_heads_split_over_two_gpus(tmp_path: Path) -> None:
    run_split(tmp_path, list(SPLIT))
