"""A decode step besides attention: kernels against float64, and the modules that take them."""

from __future__ import annotations

import sys

import pytest
import torch
from models import build
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from hf_tree_cache.forward.linear import MOST_ROWS, few_rows_linear, find_obstacle
from hf_tree_cache.forward.small import make_rotary, rms_norm
from hf_tree_cache.integration import linears as linears_module
from hf_tree_cache.integration.linears import DecodeLinears
from hf_tree_cache.integration.small_steps import SmallSteps

TOLERANCE = {torch.bfloat16: 3e-3, torch.float16: 5e-4}


CASES = [
    # rows, widths of the outputs, inputs
    (1, (33,), 64),
    (3, (64, 16, 16), 72),
    (17, (40, 8), 136),
]
"""For the interpreter, which interpreted.py runs."""


def draw(rows, widths, size, dtype, device, bias):
    torch.manual_seed(rows)
    x = torch.randn(rows, 1, size, dtype=torch.float64).to(dtype).to(device)
    weights = [torch.randn(n, size, dtype=torch.float64).to(dtype).to(device) for n in widths]
    biases = [torch.randn(n, dtype=torch.float64).to(dtype).to(device) for n in widths if bias]
    return x, weights, biases


def error_of(got, x, weights, biases):
    want = torch.cat([x.double() @ weight.double().T for weight in weights], -1)
    if biases:
        want += torch.cat(biases).double()
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["bf16", "fp16"])
@pytest.mark.parametrize("rows", [1, 15, 16, 33, MOST_ROWS])
@pytest.mark.parametrize(
    ("widths", "size"),
    [((4096, 1024, 1024), 4096), ((28_672,), 896), ((130,), 72), ((40_000, 8), 136)],
    ids=["Q, K and V", "wide", "odd", "wide and narrow"],
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


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2"])
def test_small_steps_in_one_launch_give_the_same(name):
    model = build(name)
    steps = SmallSteps(model.modules())
    layers = model.config.num_hidden_layers
    # Gemma's add one to their weight, GPT-2's are layer norms.
    assert len(steps.norms) == {"llama": 2 * layers + 1, "qwen3": 4 * layers + 1}.get(name, 0)
    assert len(steps.rotaries) == (name != "gpt2")
    file = sys.modules[type(model).__module__]
    before = getattr(file, "apply_rotary_pos_emb", None)
    ids = torch.tensor([[1, 2, 3, 4]])
    expected = model(ids).logits
    with steps.switched():
        assert (model(ids).logits - expected).abs().max() < 1e-5
        assert name == "gpt2" or file.apply_rotary_pos_emb is not before
    assert not any("forward" in vars(part) for part in model.modules())
    assert getattr(file, "apply_rotary_pos_emb", None) is before


def test_compiled_layers_keep_their_norms_and_their_file():
    model = build("llama")
    layers = [part for layer in model.model.layers for part in layer.modules()]
    steps = SmallSteps(model.modules(), besides=layers)
    assert [module for module, _ in steps.norms] == [model.model.norm]
    assert not steps.rotaries


def halves(q, k, cos, sin, unsqueeze_dim=1):
    """Rotary embedding as most models of transformers have it."""

    def turned(x):
        first, second = x.chunk(2, -1)
        return torch.cat([-second, first], -1)

    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + turned(q) * sin, k * cos + turned(k) * sin


def interleaved(q, k, cos, sin):
    def turned(x):
        return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)

    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + turned(q) * sin, k * cos + turned(k) * sin


def error_of_norm(dtype, device):
    """Largest relative error of a few shapes."""
    torch.manual_seed(0)
    worst = 0.0
    for shape in ((1, 1, 64), (3, 1, 96), (2, 5, 4, 24)):
        x = (30 * torch.randn(shape)).to(dtype).to(device)
        weight = torch.randn(shape[-1]).to(dtype).to(device)
        exact = x.double()
        exact = exact / (exact.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
        got = rms_norm(x, weight, 1e-5)
        assert got.dtype == dtype
        worst = max(worst, float((got.double() - exact).norm() / exact.norm()))
    return worst


def error_of_rotary(dtype, device):
    torch.manual_seed(0)

    def refused(*args):
        raise AssertionError("the kernel serves this")

    worst = 0.0
    for rows, num_q_heads, num_kv_heads, size in ((1, 4, 4, 64), (3, 7, 1, 80), (5, 2, 2, 6)):
        # As views of one product for all heads have them.
        joined = torch.randn(rows, 1, (num_q_heads + num_kv_heads) * size).to(dtype).to(device)
        q, k = (
            joined.unflatten(-1, (-1, size)).transpose(1, 2).split([num_q_heads, num_kv_heads], 1)
        )
        cos, sin = torch.randn(2, rows, 1, size).to(dtype).to(device)
        got = make_rotary(refused)(q, k, cos, sin)
        want = halves(*(x.double() for x in (q, k, cos, sin)))
        for one, other in zip(got, want, strict=True):
            assert one.shape == other.shape and one.dtype == dtype
            worst = max(worst, float((one.double() - other).norm() / other.norm()))
    return worst


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["bf16", "fp16"])
@pytest.mark.parametrize("error", [error_of_norm, error_of_rotary])
def test_small_steps_agree_with_float64(dtype, error):
    assert error(dtype, "cuda") < TOLERANCE[dtype]


@pytest.mark.gpu
def test_other_ways_to_rotate_are_left_alone(monkeypatch):
    model = build("llama", torch.bfloat16).cuda()
    file = sys.modules[type(model).__module__]
    assert len(SmallSteps(model.modules()).rotaries) == 1
    monkeypatch.setattr(file, "apply_rotary_pos_emb", interleaved)
    assert len(SmallSteps(model.modules()).rotaries) == 0


def test_the_operator_is_known_to_the_compiler():
    with FakeTensorMode():
        x, weight = torch.empty(3, 1, 64), torch.empty(40, 64)
        y = few_rows_linear(x, [weight, weight], [])
    assert y.shape == (3, 1, 80) and y.dtype == x.dtype
