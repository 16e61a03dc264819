"""Linear layers of a decode step: kernels against float64, and the modules that take them."""

from __future__ import annotations

import pytest
import torch
from models import build
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from forward_errors import TOLERANCE, draw, error_of

from hf_tree_cache.forward.linear import (
    MOST_ROWS,
    TILES,
    Gpu,
    Tile,
    choose_tile,
    few_rows_linear,
    find_obstacle,
)
from hf_tree_cache.integration import linears as linears_module
from hf_tree_cache.integration.linears import DecodeLinears


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["bf16", "fp16"])
@pytest.mark.parametrize("rows", [1, 16, 17, 33, MOST_ROWS])
@pytest.mark.parametrize(
    ("widths", "size"),
    [
        ((4096, 1024, 1024), 4096),
        ((28_672,), 896),
        ((130,), 72),
        ((40_000, 8), 136),
        ((4096,), 1408),
    ],
    ids=["Q, K and V", "wide", "odd", "wide and narrow", "alone"],
)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_the_kernel_agrees_with_float64(dtype, rows, widths, size, bias):
    x, weights, biases = draw(rows, widths, size, dtype, "cuda", bias)
    got = few_rows_linear(x, weights, biases)
    assert got.shape == (rows, 1, sum(widths)) and got.dtype == dtype
    assert error_of(got, x, weights, biases) < TOLERANCE[dtype]
    # Each row by itself, bit for bit, whatever is beside it.
    if rows <= 16:
        assert torch.equal(few_rows_linear(x[:1], weights, biases), got[:1])


@pytest.mark.parametrize("rows", [1, 16, 17, 32, 64])
@pytest.mark.parametrize(
    "gpu", [Gpu(132, 200 << 10), Gpu(84, 99 << 10, multiplies_64=False), Gpu(16, 64 << 10)]
)
@pytest.mark.parametrize("gated", [False, True])
def test_tiles_fit_whatever_the_layer(rows, gpu, gated):
    for width in (64, 4096, 6144, 128_256):
        for size in (72, 896, 4096, 14_336):
            tile = choose_tile(rows, width, size, gpu, gated=gated)
            assert tile.shared_bytes(1 + gated) <= gpu.shared
            assert tile.rows >= rows and (gpu.multiplies_64 or tile.rows < max(32, 2 * rows))
            assert tile.stages >= 3 and tile.n >= 16 and tile.k >= 64


def test_tiles_are_of_the_kind_of_layer():
    gpu = Gpu(132, 200 << 10)
    for width, kind in ((4096, "alone"), (6144, "large"), (28_672, "wide")):
        assert choose_tile(16, width, 4096, gpu) == TILES[kind][0]
    # Half as many columns a step, but as many bytes on the way.
    assert choose_tile(16, 4096, 13_696, gpu) == Tile(16, 32, 128, 12)
    assert choose_tile(16, 28_672, 4096 + 64, gpu) == Tile(16, 128, 64, 10)
    # 32 rows cost as much as 64 where products have 64.
    assert choose_tile(17, 4096, 4096, gpu).rows == 64
    assert choose_tile(17, 4096, 4096, gpu._replace(multiplies_64=False)).rows == 32
    assert choose_tile(33, 14_336, 4096, gpu, gated=True) == TILES["gated"][2]
    assert choose_tile(33, 9_728, 4096, gpu, gated=True) == TILES["uneven"][2]


@pytest.mark.gpu
def test_layers_of_a_model_in_half_precision_take_the_kernel_and_are_given_back(monkeypatch):
    model = build("qwen2", torch.bfloat16).cuda()
    linears = DecodeLinears(list(model.modules()), join=False)
    assert linears.intact and len(linears) == 4 * model.config.num_hidden_layers + 1
    layer = model.model.layers[0]
    x = torch.randn(3, 1, model.config.hidden_size, dtype=torch.bfloat16, device="cuda")
    names = ("q_proj", "k_proj", "v_proj")
    before = [getattr(layer.self_attn, name)(x) for name in names]
    launched = []

    def counted(x, weights, *others):
        launched.append(len(weights))
        return few_rows_linear(x, weights, *others)

    monkeypatch.setattr(linears_module, "few_rows_linear", counted)
    with linears.switched():
        after = [getattr(layer.self_attn, name)(x) for name in names]
        many = torch.randn(MOST_ROWS + 1, model.config.hidden_size, dtype=x.dtype, device="cuda")
        wide = layer.mlp.up_proj(many)
    assert launched == [3]
    for one, other in zip(before, after, strict=True):
        assert (one - other).abs().max() <= 2**-6 * one.abs().max()
    assert torch.equal(wide, layer.mlp.up_proj(many))
    assert all(type(part) is nn.Linear for part in (layer.self_attn.q_proj, model.lm_head))
    layer.mlp.up_proj.weight = nn.Parameter(layer.mlp.up_proj.weight.detach().clone())
    assert not linears.intact


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Linear(8, 8, dtype=torch.bfloat16), "on cpu"),
        (nn.Linear(8, 8, device="meta"), "on meta"),
    ],
)
def test_other_layers_are_left_alone(layer, reason):
    assert reason in find_obstacle(layer)
    assert len(DecodeLinears([layer], join=False)) == 0


def test_the_operator_is_known_to_the_compiler():
    with FakeTensorMode():
        x, weight = torch.empty(3, 1, 64), torch.empty(40, 64)
        y = few_rows_linear(x, [weight, weight], [])
    assert y.shape == (3, 1, 80) and y.dtype == x.dtype
