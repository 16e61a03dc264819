"""The same parity on a GPU, so that nothing here is right on CPUs by accident."""

from __future__ import annotations

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from models import TINY, build, prompts
from transformers import DynamicCache

from hf_tree_cache import (
    BranchRunner,
    ForkAtFirstToken,
    ForkOnEntropy,
    OutOfBlocks,
    PruneByRank,
    Sampling,
    Stop,
    TreeCache,
    enable_tree_attention,
    tree_generate,
)
from hf_tree_cache.memory.storage import KVStorage

pytestmark = pytest.mark.gpu

ARCHITECTURES = [name for name in TINY if name not in ("bart", "t5", "llava")]
MODES = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 4, "do_sample": False},
    "chunked prefill": {"do_sample": False, "prefill_chunk_size": 16},
}


def on_gpu(inputs):
    return {key: value.cuda() for key, value in inputs.items()}


def run(model, inputs, **options):
    torch.manual_seed(5)
    return model.generate(
        **inputs,
        **{"max_new_tokens": 9, "output_logits": True, "return_dict_in_generate": True, **options},
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_generate_equals_the_default_cache(name, mode):
    dtype = torch.float64 if mode == "beams" and TINY[name].double else torch.float32
    model = build(name, dtype).cuda()
    inputs = on_gpu(prompts(name, dtype))
    theirs = run(model, inputs, **MODES[mode])
    cache = TreeCache(poison=True, block_size=4)
    with enable_tree_attention(model):
        ours = run(model, inputs, past_key_values=cache, **MODES[mode])
    cache.check_integrity()
    # Falcon calls torch's attention itself, which is put together from products for one query only.
    others = {"read outside of tree attention"} if name == "falcon" else set()
    assert set(cache.dense_reads) <= {*TINY[name].dense, *(others if "chunked" in mode else ())}
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    difference = (torch.stack(ours.logits) - torch.stack(theirs.logits)).abs().max()
    assert difference < (1e-3 if TINY[name].states else 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_is_as_near_to_float32_as_the_default_cache(dtype):
    inputs = on_gpu(prompts("llama"))
    exact = build("llama").cuda()
    ids = run(exact, inputs, do_sample=False).sequences
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(ids[:, -9:])], 1)
    first = inputs["input_ids"].shape[1]
    reference = exact(ids, attention_mask=mask).logits[:, first:]
    half = build("llama", dtype).cuda()

    def error(cache):
        half(ids[:, :first], attention_mask=mask[:, :first], past_key_values=cache)
        steps = [
            half(ids[:, i : i + 1], attention_mask=mask[:, : i + 1], past_key_values=cache).logits
            for i in range(first, ids.shape[1])
        ]
        return (torch.cat(steps, 1).float() - reference).abs().max()

    with torch.no_grad():
        default = error(DynamicCache())
        with enable_tree_attention(half):
            assert error(TreeCache(poison=True)) < 2 * default


def test_branches_equal_dense_runs():
    model = build("llama").cuda()
    inputs = on_gpu(prompts("llama"))
    cache = TreeCache(poison=True, block_size=4)
    with enable_tree_attention(model):
        out = model.generate(
            **inputs,
            past_key_values=cache,
            custom_generate=tree_generate,
            branching=[ForkAtFirstToken(3), ForkOnEntropy(2.0, min_gap=4), PruneByRank(4, every=6)],
            max_branches=24,
            do_sample=True,
            max_new_tokens=30,
        )
    cache.check_integrity()
    assert out.stats.forks > 6 and out.stats.prunes > 0 and len(out) > 2
    for row, leaf in enumerate(out.leaves):
        tokens = torch.tensor([out.tree.tokens(leaf)], device="cuda")
        generated = len(out.tree.logprobs(leaf))
        logprobs = model(tokens).logits[0, -generated - 1 : -1].log_softmax(-1)
        expected = logprobs.gather(1, tokens[0, -generated:, None]).squeeze(1)
        assert (out.logprobs[row, :generated] - expected).abs().max() < 1e-4


def test_running_out_of_device_memory_is_told_and_leaves_the_cache_usable(monkeypatch):
    model = build("llama").cuda()
    ids = torch.arange(3, 83, device="cuda").remainder(90)[None]
    cache = TreeCache(model.config, poison=True)
    monkeypatch.setattr("hf_tree_cache.memory.pool.SLAB_BYTES", 1)
    grow = KVStorage._new_slab

    def refuse(self):
        torch.empty(1 << 50, dtype=torch.uint8, device="cuda")

    with enable_tree_attention(model), torch.no_grad():
        model(ids, past_key_values=cache)
        before = cache.layers[0].keys
        monkeypatch.setattr(KVStorage, "_new_slab", refuse)
        with pytest.raises(OutOfBlocks, match="no memory"):
            model(ids.repeat(1, 4), past_key_values=cache)
        monkeypatch.setattr(KVStorage, "_new_slab", grow)
        cache.check_integrity()
        assert torch.equal(cache.layers[0].keys, before)
        logits = model(ids[:, :7], past_key_values=cache).logits
        expected = model(torch.cat([ids, ids[:, :7]], 1)).logits[:, -7:]
    assert (logits - expected).abs().max() < 1e-4


def test_a_runner_of_branches_equals_generate():
    model = build("llama").cuda()
    runner = BranchRunner(model, sampling=Sampling(do_sample=False))
    long, short = runner.add_prompts([list(range(3, 40)), list(range(5, 12))])
    runner.extend([long, short], max_new_tokens=9)
    back = runner.fork(long, 1, at=-5)[0]
    runner.append(back, [7, 8, 9])
    runner.extend([short, back], max_new_tokens=16)
    for branch, prompt in ((long, 37), (short, 7), (back, len(runner.tokens(back)) - 16)):
        tokens = torch.tensor([runner.tokens(branch)], device="cuda")
        alone = model.generate(
            tokens[:, :prompt], do_sample=False, max_new_tokens=tokens.shape[1] - prompt
        )
        assert tokens.tolist() == alone.tolist()


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt_oss", "gpt2", "deepseek_v3"])
def test_a_runner_draws_the_same_whether_or_not_it_computes_ahead(name, monkeypatch):
    model = build(name).cuda()

    def drawn(ahead):
        monkeypatch.setattr("hf_tree_cache.sending.AHEAD_ON", ahead)
        runner = BranchRunner(model, sampling=Sampling(top_p=0.95), seed=3)
        branches = runner.add_prompts([list(range(3, 40)), list(range(5, 12))])
        branches += runner.fork(branches[0], 4)
        runner.extend(branches, max_new_tokens=[30, 20, 10, 25, 30, 7], stop=Stop(tokens=range(9)))
        runner.prune(branches[4])
        branches += runner.fork(branches.pop(3), 2, at=-3)
        runner.extend([b for b in branches if not runner.ended(b)], max_new_tokens=20)
        runner.cache.check_integrity()
        return [(runner.tokens(b), runner.logprob(b)) for b in branches]

    for ours, plain in zip(drawn(("cuda",)), drawn(()), strict=True):
        assert ours[0] == plain[0]
        assert ours[1] == pytest.approx(plain[1], abs=1e-3)


@pytest.mark.parametrize("second", ["cpu", "cuda:1"])
@pytest.mark.parametrize("name", ["llama", "deepseek_v3", "bloom"])
def test_layers_on_two_devices(name, second):
    """As `device_map` does: accelerate's hooks take a layer's arguments to its device and back."""
    if second == "cuda:1" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    inputs = on_gpu(prompts(name))
    theirs = run(build(name).cuda(), inputs, **MODES["sampled"])
    model = build(name).cuda()
    layers = model.transformer.h if name == "bloom" else model.model.layers
    hook = AlignDevicesHook(
        second, io_same_device=True, skip_keys=["past_key_values", "layer_past"]
    )
    add_hook_to_module(layers[1].to(second), hook)
    cache = TreeCache(poison=True, block_size=4)
    with enable_tree_attention(model):
        ours = run(model, inputs, past_key_values=cache, **MODES["sampled"])
    cache.check_integrity()
    assert {layer.storage.spec.device.type for layer in cache.layers} >= {torch.device(second).type}
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    assert (torch.stack(ours.logits) - torch.stack(theirs.logits)).abs().max() < 1e-4
