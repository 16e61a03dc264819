"""Layers with a window let go what no branch sees any more, and nobody notices but the memory."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import TINY, Tiny, assert_same, build, generate, model, one_thread, prompts  # noqa: F401
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import DynamicCache
from windowed import lives

from hf_tree_cache import (
    BranchRunner,
    ForkAtPositions,
    HistoryFreed,
    InvalidArgument,
    PruneByRank,
    TreeCache,
    TreeSession,
    enable_tree_attention,
    load_cache,
    save_cache,
    tree_generate,
)
from hf_tree_cache.memory.history import PASS_BLOCKS

WINDOWS = {
    "mistral": [11],
    "phi3": [9],
    "gemma2": [19, None],
    "gemma3": [5, None],
    "cohere2": [7, None],
    "gpt_oss": [6, None],
    "llama4": [5, None],
}
"""Of the kinds of layers of each architecture."""

SHARED = {
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 12,
    "sliding_window": 6,
    "num_hidden_layers": 5,
    "num_kv_shared_layers": 2,
    "vocab_size": 97,
    "pad_token_id": 0,
    "layer_types": [
        "sliding_attention",
        "sliding_attention",
        "full_attention",
        "sliding_attention",
        "full_attention",
    ],
}
"""The last layers read the K/V of earlier ones."""

SHARING = {
    "gemma3n": Tiny(
        "Gemma3nTextConfig",
        "Gemma3nForCausalLM",
        {
            **SHARED,
            "intermediate_size": [56] * 5,
            "activation_sparsity_pattern": [0.0] * 5,
            "vocab_size_per_layer_input": 97,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 4,
        },
    ),
    "gemma4": Tiny(
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        {
            **SHARED,
            "global_head_dim": 16,
            "vocab_size_per_layer_input": 97,
            "hidden_size_per_layer_input": 8,
        },
    ),
}

MODES = {
    "greedy": {},
    "sampled": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "chunked prefill": {"prefill_chunk_size": 8},
    "prompt lookup": {"prompt_lookup_num_tokens": 4},
}


def cache_of(which, **options):
    return TreeCache(which.config, **{"block_size": 4, "poison": True, "backtrack": 3, **options})


def far(which, mode, cache, **options):
    """Tens of tokens beyond every window, from prompts of which one is padded."""
    inputs = prompts(num_rows=1 if mode == "prompt lookup" else 2)
    options = {"max_new_tokens": 40, "do_sample": False, **MODES[mode], **options}
    return generate(which, inputs, past_key_values=cache, **options)


@pytest.mark.core
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", WINDOWS)
def test_generation_far_beyond_the_window_equals_the_default_cache(name, mode):
    which = model(name)
    dense = far(which, mode, DynamicCache(config=which.config))
    cache = cache_of(which)
    with enable_tree_attention(which):
        ours = far(which, mode, cache)
    cache.check_integrity()
    assert not cache.dense_reads
    assert_same(ours, dense)
    kinds = cache.stats().kinds
    assert sorted((kind.window or 0) for kind in kinds) == sorted(w or 0 for w in WINDOWS[name])
    for kind in kinds:
        assert (kind.blocks < cache.stats().blocks) == (kind.window is not None)


@pytest.mark.core
@pytest.mark.parametrize("name", SHARING)
def test_layers_that_read_the_keys_of_others(name, monkeypatch):
    monkeypatch.setitem(TINY, name, SHARING[name])
    which = build(name)
    dense = far(which, "sampled", DynamicCache(config=which.config))
    cache = cache_of(which)
    with enable_tree_attention(which):
        assert_same(far(which, "sampled", cache), dense)
    cache.check_integrity()
    assert not cache.dense_reads
    assert {kind.window for kind in cache.stats().kinds} == {6, None}
    assert min(kind.blocks for kind in cache.stats().kinds) < cache.stats().blocks


@pytest.mark.core
@pytest.mark.parametrize("name", ["mistral", "gemma3", "gpt_oss", "llama4"])
def test_a_tree_that_forks_and_prunes_far_beyond_the_window(name):
    which = model(name)
    cache = cache_of(which)
    with enable_tree_attention(which):
        out = which.generate(
            prompts(num_rows=1)["input_ids"],
            past_key_values=cache,
            custom_generate=tree_generate,
            branching=[ForkAtPositions([3, 20, 37]), PruneByRank(3, every=9)],
            max_branches=5,
            max_new_tokens=50,
        )
    cache.check_integrity()
    assert out.stats.forks > 2 and out.stats.prunes > 0 and not cache.dense_reads
    for row, leaf in enumerate(out.leaves):
        tokens = torch.tensor([out.tree.tokens(leaf)])
        count = len(out.tree.logprobs(leaf))
        with torch.no_grad():
            logits = which(tokens).logits[0, -count - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, tokens[0, -count:, None]).squeeze(1)
        assert (out.logprobs[row, :count] - expected).abs().max() < 1e-4


def grown(which, cache, tokens=60):
    """``cache`` with one row: a prompt of 45 tokens, and more of them one by one."""
    cut = prompts(num_rows=1)
    generate(which, cut, past_key_values=cache, max_new_tokens=tokens, do_sample=False)
    return cache


def test_memory_of_a_model_that_only_slides_is_flat():
    which, held, allocated = model("mistral"), [], []
    cache = cache_of(which)
    with enable_tree_attention(which), torch.no_grad():
        which(**prompts(num_rows=1), past_key_values=cache)
        for step in range(300):
            which(torch.tensor([[3 + step % 90]]), past_key_values=cache)
            held.append(cache.kv_bytes)
            allocated.append(cache.stats().allocated_bytes)
    (kind,) = cache.stats().kinds
    # A window, what one may go back by, a pass that is not due yet and partial blocks.
    most = (11 + 3 + PASS_BLOCKS * 4 + 2 * 4) // 4
    assert max(held[40:]) <= most * kind.kv_bytes // kind.blocks
    assert allocated[-1] == allocated[0]
    assert cache.stats().blocks == -(-345 // 4)


def test_a_bound_counts_what_is_kept():
    which = model("gemma3")
    whole = grown(which, TreeCache(which.config, block_size=4))
    with enable_tree_attention(which):
        kept = grown(which, cache_of(which)).kv_bytes
        assert kept < whole.kv_bytes // 2
        cache = cache_of(which, max_memory=(kept + whole.kv_bytes) // 2)
        grown(which, cache)
    assert cache.kv_bytes <= kept
    cache.check_integrity()


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_going_back_too_far_is_refused_and_changes_nothing(name):
    which = model(name)
    window, length = WINDOWS[name][0], 104
    cache = cache_of(which)
    with enable_tree_attention(which):
        grown(which, cache)
    (row,) = cache.rows
    assert cache.tree.length(row) == length
    before = cache.stats(), [layer.keys for layer in cache.layers]
    for call, asked in (
        (lambda: cache.fork(row, at=-40), f"fork\\(branch {row}, at=-40\\)"),
        (lambda: cache.fork(row, at=5), "at=5"),
        (lambda: cache.crop(-40), "crop\\(-40\\)"),
    ):
        with pytest.raises(HistoryFreed, match=f"{asked}.*window of {window}.*backtrack=") as info:
            call()
        assert cache.stats() == before[0]
        for layer, keys in zip(cache.layers, before[1], strict=True):
            assert torch.equal(layer.keys, keys)
    furthest = int(str(info.value).split("can go back to ")[1].split(",")[0])
    assert length - 3 - 4 * 4 - 8 < furthest <= length - 3
    with pytest.raises(HistoryFreed):
        cache.fork(row, at=furthest - 1)
    assert cache.fork(row, at=furthest) and cache.fork(row, at=0) and cache.fork(row, at=-3)
    cache.check_integrity()


@pytest.mark.core
@pytest.mark.parametrize("name", ["mistral", "gemma3", "llama4"])
def test_a_branch_taken_back_goes_on_as_one_that_was_never_further(name):
    which = model(name)
    cache = cache_of(which, backtrack=12)
    with enable_tree_attention(which), torch.no_grad():
        grown(which, cache)
        (row,) = cache.rows
        (fork,) = cache.fork(row, at=-10)
        tokens = generate(which, prompts(num_rows=1), max_new_tokens=60, do_sample=False)
        tokens = tokens.sequences[:, :94]
        cache.crop(-10)
        cache.set_rows([row, fork])
        for step in range(40):
            new = torch.tensor([[5 + step], [50 + step]])
            if step == 0:
                tokens = tokens.expand(2, -1)
            tokens = torch.cat([tokens, new], 1)
            ours = which(new, past_key_values=cache).logits[:, -1]
        assert not cache.dense_reads
    cache.check_integrity()
    with torch.no_grad():
        assert (ours - which(tokens).logits[:, -1]).abs().max() < 1e-4


@pytest.mark.core
def test_everything_is_kept_where_it_is_asked_for():
    which = model("gemma3")
    cache = cache_of(which, backtrack=None)
    with enable_tree_attention(which):
        grown(which, cache)
    stats = cache.stats()
    assert all(kind.window is None and kind.blocks == stats.blocks for kind in stats.kinds)
    assert cache.fork(cache.rows[0], at=5)
    with pytest.raises(InvalidArgument, match="backtrack=-1"):
        TreeCache(backtrack=-1)


@pytest.mark.core
def test_nothing_is_let_go_under_other_attention():
    which = model("gemma3")
    dense = generate(which, prompts(num_rows=1), max_new_tokens=60, do_sample=False)
    cache = cache_of(which)
    ours = generate(
        which, prompts(num_rows=1), past_key_values=cache, max_new_tokens=60, do_sample=False
    )
    assert_same(ours, dense)
    assert all(kind.blocks == cache.stats().blocks for kind in cache.stats().kinds)


@pytest.mark.core
def test_a_reader_that_may_look_further_back_is_refused():
    which = model("gemma3")
    cache = cache_of(which)
    with enable_tree_attention(which), torch.no_grad():
        grown(which, cache)
        seen = torch.ones(1, 1, 1, 105, dtype=torch.bool)
        with pytest.raises(HistoryFreed, match=r"window is 5 tokens.*4-D mask"):
            which(torch.tensor([[5]]), past_key_values=cache, attention_mask=seen)
        cache.check_integrity()
        assert cache.get_seq_length() == 104
    with torch.no_grad(), pytest.raises(HistoryFreed, match=r"all the way back"):
        which(torch.tensor([[5]]), past_key_values=cache)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("reach", [5, 6])
def test_a_mask_of_the_callers_keeps_what_it_shows(reach, dtype):
    which = model("gemma3")
    cache = cache_of(which)
    ids = prompts(num_rows=1)["input_ids"]
    whole = torch.ones(70, 70, dtype=torch.bool).tril().triu(1 - reach)[None, None]
    if dtype != torch.bool:
        whole = torch.zeros(whole.shape).masked_fill(~whole, torch.finfo(dtype).min)
    with enable_tree_attention(which), torch.no_grad():
        which(ids, past_key_values=cache, attention_mask=whole[:, :, :45, :45])
        for row in range(45, 70):
            seen = whole[:, :, row : row + 1, : row + 1]
            got = which(torch.tensor([[row]]), past_key_values=cache, attention_mask=seen).logits
        tokens = torch.cat([ids, torch.arange(45, 70)[None]], 1)
        want = which(tokens, attention_mask=whole).logits[:, -1:]
    assert (got - want).abs().max() < 1e-4
    kept = [kind.blocks == cache.stats().blocks for kind in cache.stats().kinds]
    assert all(kept) == (reach > 5)


@pytest.mark.core
@pytest.mark.parametrize("name", ["gemma3", "gpt_oss"])
def test_copies_and_files_go_on_as_they_were(name, tmp_path):
    which = model(name)
    cache = cache_of(which)
    with enable_tree_attention(which), torch.no_grad():
        grown(which, cache)
        cache.fork(cache.rows[0], 2)
        save_cache(cache, tmp_path / "cache.safetensors")
        others = [
            copy.deepcopy(cache),
            load_cache(tmp_path / "cache.safetensors", which.config, poison=True, backtrack=3),
        ]
        for other in others:
            other.check_integrity()
            assert other.stats().kinds == cache.stats().kinds
        with pytest.raises(InvalidArgument, match=r"let go.*backtrack"):
            load_cache(tmp_path / "cache.safetensors", which.config, backtrack=None)
        for step in range(20):
            new = torch.tensor([[5 + step]])
            logits = [which(new, past_key_values=c).logits for c in (cache, *others)]
            for other in logits[1:]:
                assert (other - logits[0]).abs().max() < 1e-5
    for other in others:
        other.check_integrity()
        assert min(k.blocks for k in other.stats().kinds) < other.stats().blocks
        with pytest.raises(HistoryFreed):
            other.fork(other.rows[0], at=20)


def test_a_file_whose_layers_keep_different_blocks_is_refused(tmp_path):
    which, path = model("gemma3"), tmp_path / "cache.safetensors"
    cache = cache_of(which)
    with enable_tree_attention(which):
        save_cache(grown(which, cache), path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    blocks = tensors["layers.2.blocks"]
    for wrong in (blocks - 1, blocks + 10**6):
        save_file(tensors | {"layers.2.blocks": wrong}, path, metadata)
        with pytest.raises(InvalidArgument, match=r"damaged|let go"):
            load_cache(path, which.config)


def test_runners_and_sessions_go_back_anywhere():
    which = model("gemma3")
    with BranchRunner(which, seed=0) as runner:
        (root,) = runner.add_prompts([prompts(num_rows=1)["input_ids"][0].tolist()])
        runner.extend([root], max_new_tokens=40)
        assert runner.fork(root, at=9)
    with BranchRunner(which, seed=0, cache=cache_of(which)) as runner:
        (root,) = runner.add_prompts([prompts(num_rows=1)["input_ids"][0].tolist()])
        runner.extend([root], max_new_tokens=40)
        before = runner.branches
        with pytest.raises(HistoryFreed, match=r"window of 5.*backtrack="):
            runner.fork(root, at=9)
        assert runner.branches == before
        (near,) = runner.fork(root, at=-2)
        runner.extend([root, near], max_new_tokens=20)
        runner.cache.check_integrity()
    prompt = prompts(num_rows=1)["input_ids"][0].tolist()
    session = TreeSession(which, None, prompt, live=False)
    session.root.generate(max_new_tokens=30)
    (back,) = session.root.fork(at=8)
    back.generate(max_new_tokens=3)
    assert session.runner.length(back.handle) == 11


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_random_lives_against_dense_tensors(backend):
    failures, seen = lives(backend, range(4 if backend == "torch" else 2), 8, 8)
    assert not failures
    assert {"let go", "fork back", "crop", "hold", "prune", "several"} <= seen


@pytest.mark.skipif(sys.platform != "linux", reason="needs Triton")
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "options", [[], pytest.param(["--long"], marks=pytest.mark.slow)], ids=["short", "long"]
)
def test_random_lives_in_the_interpreted_kernel(options):
    script = Path(__file__).with_name("interpreted_windows.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(script), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=380)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.gpu
@pytest.mark.parametrize("tight", [False, True], ids=["", "tight"])
@pytest.mark.parametrize("head_dims", [(64, 64), (96, 64)], ids=str)
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_lives_in_the_kernel(dtype, deterministic, head_dims, tight):
    """Most of the time goes into compiling: apart, so that processes share it."""
    options = {
        "device": "cuda",
        "dtype": dtype,
        "deterministic": deterministic,
        "head_dims": head_dims,
    }
    if tight:
        failures, _ = lives("triton", range(3), 3, 60, tight=True, **options)
    else:
        failures, seen = lives("triton", range(8), 12, 20, scale=6, **options)
        assert "let go" in seen
    assert not failures


@pytest.mark.gpu
@pytest.mark.parametrize("name", WINDOWS)
def test_replayed_steps_far_beyond_the_window_equal_the_default_cache(name):
    which = build(name).cuda()
    inputs = {key: value.cuda() for key, value in prompts(num_rows=2).items()}
    options = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 45}
    dense = generate(which, inputs, past_key_values=DynamicCache(config=which.config), **options)
    with enable_tree_attention(which, cuda_graphs=True) as handle:
        for _ in range(2):
            cache = cache_of(which)
            ours = generate(which, inputs, past_key_values=cache, **options)
            cache.check_integrity()
            assert ours.sequences.tolist() == dense.sequences.tolist()
            assert any(kind.blocks < cache.stats().blocks for kind in cache.stats().kinds)
    if name == "llama4":  # scales its queries by position
        assert any("depends on lengths" in reason for reason in handle.graphs.eager)
    else:
        assert handle.graphs.replayed > 60 and not handle.graphs.eager
