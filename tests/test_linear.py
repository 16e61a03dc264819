"""Few rows through linear layers: the kernel against float64, and the layers that take it."""

from __future__ import annotations

import pytest
import torch
from models import build
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from hf_tree_cache.integration import linears as linears_module
from hf_tree_cache.integration.linears import DecodeLinears
from hf_tree_cache.integration.norms import DecodeNorms
from hf_tree_cache.linear.launch import MOST_ROWS, few_rows_linear, find_obstacle

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
def test_norms_in_one_kernel_give_the_same(name):
    model = build(name)
    norms = DecodeNorms(model.modules())
    layers = model.config.num_hidden_layers
    # Gemma's add one to their weight, GPT-2's are layer norms.
    assert len(norms) == {"llama": 2 * layers + 1, "qwen3": 4 * layers + 1}.get(name, 0)
    ids = torch.tensor([[1, 2, 3, 4]])
    expected = model(ids).logits
    with norms.switched():
        assert (model(ids).logits - expected).abs().max() < 1e-5
    assert not any("forward" in vars(part) for part in model.modules())


def test_the_operator_is_known_to_the_compiler():
    with FakeTensorMode():
        x, weight = torch.empty(3, 1, 64), torch.empty(40, 64)
        y = few_rows_linear(x, [weight, weight], [], weight.view(-1))
    assert y.shape == (3, 1, 80) and y.dtype == x.dtype
