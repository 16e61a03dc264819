"""Attention over latents that a layer would expand for every branch (DeepSeek's MLA)."""

from __future__ import annotations

import copy
import os
import random
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import assert_same, build, generate, model, one_thread, prompts
from torch import nn
from transformers import DynamicCache
from trees import SHAPES, fill, grow_randomly

from hf_tree_cache import TreeCache, UnsupportedModel, enable_tree_attention
from hf_tree_cache.attention.latents import Expansion, tree_attention_latents
from hf_tree_cache.attention.plan import TreeAttentionPlan, Window, build_plan
from hf_tree_cache.integration import attention
from hf_tree_cache.memory.storage import KVSpec, KVStorage

__all__ = ["one_thread"]  # a fixture for all of this file

RANK, ROTARY, K_DIM, V_DIM = 20, 6, 10, 14
OPTIONS = {
    "plain": {},
    "window": {"window": Window("sliding", 7)},
    "softcap and sinks": {"softcap": 2.0, "sinks": torch.randn(3)},
}


def make_expansion(num_heads: int) -> Expansion:
    weight = torch.randn(num_heads, K_DIM + V_DIM, RANK) * RANK**-0.5

    def expand(latents: torch.Tensor, rotary: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = torch.einsum("xolr,hdr->xhld", latents, weight).split([K_DIM, V_DIM], 3)
        return torch.cat([k, rotary.expand(-1, num_heads, -1, -1)], 3), v

    return Expansion(expand, K_DIM, V_DIM, num_heads, weight)


def random_call(seed: int, shape: str, num_new: int) -> tuple[torch.Tensor, KVStorage, Any]:
    grown = grow_randomly(random.Random(seed), shape, 4, num_new, scale=30)
    torch.manual_seed(seed)
    spec = KVSpec(1, RANK, ROTARY, torch.float32, torch.device("cpu"))
    storage, _, _ = fill(grown.shadow, spec)
    plan = build_plan(grown.shadow.tree, grown.counts, num_new)
    return torch.randn(len(grown.counts), 3, num_new, K_DIM + ROTARY), storage, plan


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_new", [1, 3])
def test_absorbed_and_expanded_are_the_reference(
    shape: str, num_new: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    q, storage, plan = random_call(3, shape, num_new)
    expansion = make_expansion(3)
    call = (q, storage, 0, plan, expansion)
    want, want_lse = tree_attention_latents(*call, scale=0.3, backend="reference", **options)
    assert want.shape == (len(q), 3, num_new, V_DIM)
    for absorbs in (True, False):
        monkeypatch.setattr(Expansion, "absorbs", lambda *_, absorbs=absorbs: absorbs)
        out, lse = tree_attention_latents(*call, scale=0.3, **options)
        torch.testing.assert_close(out, want, rtol=0, atol=1e-5)
        torch.testing.assert_close(lse, want_lse, rtol=0, atol=1e-5)


def test_many_queries_expand_and_few_absorb() -> None:
    """DeepSeek-V3: from some 170 queries to a token on, expanding it once costs less."""

    def absorbs(rows: int, num_new: int) -> bool:
        tree = TreeCache(block_size=16).tree
        tree.add_rows(1)
        tree.append([1600])
        tree.select([0] * rows)
        plan = build_plan(tree, tree.append([num_new] * rows) and [num_new] * rows, num_new)
        expansion = Expansion(lambda *_: pytest.fail(), 128, 128, 128, torch.empty(128, 256, 512))
        spec = KVSpec(1, 512, 64, torch.bfloat16, torch.device("cpu"))
        return expansion.absorbs(spec, plan)

    assert absorbs(1, 1) and absorbs(64, 1) and absorbs(4, 8)
    assert not absorbs(400, 1) and not absorbs(1, 400)


class Counted:
    """Counts the tokens that attention layers expand, and how they do it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, layer: nn.Module) -> None:
        self.tokens = 0
        self.plans: list[TreeAttentionPlan] = []
        self.absorbed: list[bool] = []
        original = type(layer).expand_kv

        def expand(module: Any, latents: Any, rotary: Any) -> Any:
            self.tokens += latents.shape[0] * latents.shape[2]
            return original(module, latents, rotary)

        def attend(q: Any, storage: Any, layer: int, plan: Any, expansion: Any, **options: Any):
            self.plans.append(plan)
            self.absorbed.append(expansion.absorbs(storage.spec, plan))
            return tree_attention_latents(q, storage, layer, plan, expansion, **options)

        monkeypatch.setattr(type(layer), "expand_kv", expand)
        monkeypatch.setattr(attention, "tree_attention_latents", attend)


NAME = "deepseek_v3"
SAMPLING: dict[str, Any] = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 6}


@pytest.fixture
def deepseek() -> nn.Module:
    return build(NAME)


@pytest.fixture
def counted(deepseek: nn.Module, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counted]:
    yield Counted(monkeypatch, deepseek.model.layers[0].self_attn)


class Adapted(nn.Linear):
    """A projection that is more than a product with its weight, as with an adapter."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + x.mean(-1, keepdim=True)


def adapt(linear: nn.Linear) -> nn.Linear:
    adapted = Adapted(linear.in_features, linear.out_features, bias=False)
    adapted.load_state_dict(linear.state_dict())
    return adapted


def test_decoding_expands_nothing(deepseek: Any, counted: Counted) -> None:
    inputs = prompts(NAME)
    theirs = generate(model(NAME), inputs, **SAMPLING)
    counted.tokens = 0
    with enable_tree_attention(deepseek):
        cache = TreeCache(poison=True)
        assert_same(generate(deepseek, inputs, past_key_values=cache, **SAMPLING), theirs)
    assert not cache.dense_reads and counted.plans and all(counted.absorbed)
    # Two prompts of two layers in the prefill, and the token that each layer is asked about once.
    assert counted.tokens == 2 * 2 * 45 + 2


@pytest.mark.core
def test_what_is_no_plain_product_is_expanded_once_for_all_rows(
    deepseek: Any, counted: Counted
) -> None:
    for layer in deepseek.model.layers:
        layer.self_attn.kv_b_proj = adapt(layer.self_attn.kv_b_proj)
    inputs = prompts(NAME)
    theirs = generate(deepseek, inputs, **SAMPLING)
    counted.tokens = 0
    with enable_tree_attention(deepseek):
        cache = TreeCache(poison=True)
        assert_same(generate(deepseek, inputs, past_key_values=cache, **SAMPLING), theirs)
    assert not cache.dense_reads and not any(counted.absorbed)
    runs = sum(len(r.blocks) * p.block_size for p in counted.plans for r in p.runs)
    tails = sum(p.num_rows * p.max_tail for p in counted.plans)
    # Of prompts of 45 and 38 tokens two full blocks each, once for three rows.
    assert runs == len(counted.plans) * (32 + 32) and tails > 0
    assert counted.tokens == 2 * 2 * 45 + runs + tails


@pytest.mark.parametrize("how", ["a hook", "rows in another order", "a bias", "another dtype"])
def test_projections_that_must_be_called_are(deepseek: Any, counted: Counted, how: str) -> None:
    for layer in deepseek.model.layers:
        projection = layer.self_attn.kv_b_proj
        if how == "a hook":
            projection.register_forward_hook(lambda module, args, output: output * 0.5)
        elif how == "rows in another order":
            forward = type(layer.self_attn).expand_kv

            def swapped(module: Any, latents: Any, rotary: Any, forward: Any = forward) -> Any:
                k, v = forward(module, latents, rotary)
                return torch.cat([v[..., : module.qk_nope_head_dim], k[..., -8:]], 3), v

            kind = type("Swapped", (type(layer.self_attn),), {"expand_kv": swapped})
            layer.self_attn.__class__ = kind
        elif how == "a bias":
            projection.bias = nn.Parameter(torch.randn(projection.out_features))
        else:
            projection.double()
            projection.register_forward_pre_hook(lambda module, args: (args[0].double(),))
            projection.register_forward_hook(lambda module, args, output: output.float())
    inputs = prompts(NAME)
    theirs = generate(deepseek, inputs, **SAMPLING)
    with enable_tree_attention(deepseek):
        cache = TreeCache(poison=True)
        assert_same(generate(deepseek, inputs, past_key_values=cache, **SAMPLING), theirs)
    assert not cache.dense_reads and not any(counted.absorbed)


@pytest.mark.core
def test_chunks_of_a_prompt_are_expanded_or_absorbed(deepseek: Any, counted: Counted) -> None:
    inputs = prompts(NAME)
    theirs = generate(model(NAME), inputs, **SAMPLING)
    with enable_tree_attention(deepseek):
        cache = TreeCache(poison=True)
        options = {**SAMPLING, "prefill_chunk_size": 23}
        assert_same(generate(deepseek, inputs, past_key_values=cache, **options), theirs)
    assert not cache.dense_reads
    assert {p.num_new: a for p, a in zip(counted.plans, counted.absorbed, strict=True)} == {
        22: False,
        1: True,
    }


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_backends_agree(deepseek: Any, backend: str) -> None:
    inputs = prompts(NAME, num_rows=3)
    theirs = generate(model(NAME), inputs)
    with enable_tree_attention(deepseek):
        cache = TreeCache(backend=backend)
        assert_same(generate(deepseek, inputs, past_key_values=cache), theirs)
    assert not cache.dense_reads


def test_bfloat16_is_as_close_as_transformers(deepseek: Any) -> None:
    """Absorbing rounds other numbers than expanding does, but not more of them."""
    inputs = {"input_ids": prompts(NAME)["input_ids"][:1]}
    ids = inputs["input_ids"]

    def last_logits(each: Any, cache: Any) -> torch.Tensor:
        with torch.no_grad():
            each(ids[:, :30], past_key_values=cache)
            steps = [each(ids[:, i : i + 1], past_key_values=cache).logits for i in range(30, 45)]
        return torch.cat(steps, 1).float()

    exact = last_logits(deepseek, TreeCache())
    half = copy.deepcopy(deepseek).to(torch.bfloat16)
    theirs = (last_logits(half, DynamicCache()) - exact).abs().mean()
    with enable_tree_attention(half):
        cache = TreeCache()
        ours = (last_logits(half, cache) - exact).abs().mean()
    assert not cache.dense_reads
    assert ours < 1.5 * theirs


@pytest.mark.parametrize("why", ["autocast", "deterministic"])
def test_dense_where_latents_cannot_be_read_in_place(deepseek: Any, why: str) -> None:
    inputs, cache = prompts(NAME), TreeCache(deterministic=why == "deterministic")
    with torch.autocast("cpu", torch.bfloat16, enabled=why == "autocast"):
        theirs = generate(deepseek, inputs)
        with enable_tree_attention(deepseek):
            ours = generate(deepseek, inputs, past_key_values=cache)
    assert_same(ours, theirs, 5e-2 if why == "autocast" else 1e-4)
    assert cache.dense_reads


def test_another_attention_gets_expanded_tensors(deepseek: Any) -> None:
    inputs = prompts(NAME)
    theirs = generate(deepseek, inputs)
    for implementation in ("sdpa", "eager"):
        with enable_tree_attention(deepseek):
            deepseek.set_attn_implementation(implementation)
            cache = TreeCache()
            assert_same(generate(deepseek, inputs, past_key_values=cache), theirs)
        assert set(cache.dense_reads) == {"read outside of tree attention"}


def test_disable_gives_layers_their_method_back(deepseek: Any) -> None:
    layer = deepseek.model.layers[0].self_attn
    handle = enable_tree_attention(deepseek)
    assert "expand_kv" in vars(layer)
    twin = copy.deepcopy(deepseek)
    twin.model.layers[0].self_attn.kv_b_proj.weight.data.zero_()
    inputs = prompts(NAME)
    ours = generate(deepseek, inputs, past_key_values=TreeCache())
    other = generate(twin, inputs, past_key_values=TreeCache())
    assert_same(ours, generate(model(NAME), inputs))
    assert (ours.logits[0] - other.logits[0]).abs().max() > 0.01
    handle.disable()
    handle.disable()
    assert "expand_kv" not in vars(layer)


def test_no_gradient_is_lost_in_silence(deepseek: Any) -> None:
    """Only the projection is trained, so that neither queries nor new K/V need a gradient."""
    deepseek.requires_grad_(False)
    deepseek.model.layers[0].self_attn.kv_b_proj.requires_grad_(True)
    ids = prompts(NAME)["input_ids"]
    with enable_tree_attention(deepseek):
        cache = TreeCache()
        with torch.no_grad():
            deepseek(ids, past_key_values=cache)
        logits = deepseek(ids[:, :1], past_key_values=cache).logits
        with pytest.raises(UnsupportedModel, match="backward through a TreeCache"):
            logits.sum().backward()


@pytest.mark.skipif(sys.platform != "linux", reason="needs Triton")
def test_the_kernel_in_the_interpreter() -> None:
    script = Path(__file__).with_name("interpreted_latents.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["agrees"]


@pytest.mark.parametrize("arch, heads, tile", [(90, 128, 64), (80, 16, 16)])
def test_the_kernel_compiles_and_fits(arch: int, heads: int, tile: int) -> None:
    """For DeepSeek's sizes, without a GPU; its tiles need what `tile_bytes` says at most."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hf_tree_cache.attention import latent_launch
    from hf_tree_cache.attention.latent_kernel import latent_kernel

    sizes = {"H": heads, "R": 512, "P": 64, "S": 16, "M": tile, "KV": latent_launch.KV}
    sizes |= {"STAGES": latent_launch.STAGES, "PRECISION": "ieee"}
    names = latent_kernel.arg_names
    kinds = ["*bf16"] * 3 + ["*fp32"] * 2 + ["*i32"] * 3 + ["i32", "fp32"]
    signature = dict(zip(names, kinds, strict=False)) | dict.fromkeys(sizes, "constexpr")
    constants = {(names.index(name),): size for name, size in sizes.items()}
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(8)}
    source = ASTSource(latent_kernel, signature, constants, aligned)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = triton.compile(
            source, GPUTarget("cuda", arch, 32), {"num_warps": 8, "num_stages": 2}
        )
    spec = KVSpec(1, 512, 64, torch.bfloat16, torch.device("cpu"))
    assert made.metadata.shared <= latent_launch.tile_bytes(spec) <= (227 << 10)
    assert ("wgmma" in made.asm["ptx"]) == (arch == 90)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("heads", [16, 32, 128])
def test_the_kernel_on_a_gpu(heads: int, dtype: torch.dtype) -> None:
    from interpreted_latents import check

    for prompt, tails in ((2000, [40, 1, 16, 300]), (33, [700, 5]), (9000, [1] * 20)):
        error = check(16, prompt, tails, heads, 512, rotary=64, dtype=dtype, device="cuda")
        assert error < (3e-3 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.gpu
def test_decoding_with_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose latents the kernel serves, as near to float32 as transformers' own cache."""
    launch = pytest.importorskip("hf_tree_cache.attention.latent_launch")
    original, calls = launch.tree_attention_absorbed, []
    monkeypatch.setattr(
        launch,
        "tree_attention_absorbed",
        lambda *args, **options: calls.append(1) or original(*args, **options),
    )
    sizes = {"num_attention_heads": 16, "num_key_value_heads": 16, "hidden_size": 64}
    sizes |= {"kv_lora_rank": 32, "qk_rope_head_dim": 16}
    ids = prompts(NAME)["input_ids"][:1].cuda()
    half = build(NAME, torch.bfloat16, **sizes).cuda()
    logits = []
    with torch.no_grad():
        for each, cache in (
            (build(NAME, **sizes).cuda(), DynamicCache()),
            (half, DynamicCache()),
            (half, TreeCache(poison=True, block_size=16)),
        ):
            with enable_tree_attention(each):
                each(ids[:, :30], past_key_values=cache)
                steps = [
                    each(ids[:, i : i + 1], past_key_values=cache).logits for i in range(30, 45)
                ]
            logits.append(torch.cat(steps, 1).float())
    assert len(calls) == 15 * half.config.num_hidden_layers and not cache.dense_reads
    exact, theirs, ours = logits
    assert (ours - exact).abs().mean() < 1.5 * (theirs - exact).abs().mean()
