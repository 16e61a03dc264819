"""Gated units of a decode step: their kernel, what is recognised as one, and what is not."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from models import build
from torch import nn

pytest.importorskip("triton")

from forward_errors import TOLERANCE, draw, error_of_gated

from hf_tree_cache.forward import small
from hf_tree_cache.forward.linear import ACTIVATIONS, MOST_ROWS, few_rows_gated
from hf_tree_cache.forward.small import activate
from hf_tree_cache.integration import gated as gated_module
from hf_tree_cache.integration.gated import GatedUnits, find_style
from hf_tree_cache.integration.pending import Pending


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["bf16", "fp16"])
@pytest.mark.parametrize("rows", [1, 16, 33, MOST_ROWS])
@pytest.mark.parametrize(("width", "size"), [(14_336, 4096), (9728, 136), (130, 72), (4864, 896)])
def test_a_gated_product_agrees_with_float64(dtype, rows, width, size):
    x, weights, _ = draw(rows, (width, width), size, dtype, "cuda", False)
    weights = [weight * size**-0.5 for weight in weights]
    for activation in ACTIVATIONS[: 1 if width > 9728 else None]:
        got = few_rows_gated(x, *weights, activation)
        assert got.shape == (rows, 1, width) and got.dtype == dtype
        assert error_of_gated(got, x, *weights, activation) < TOLERANCE[dtype]
    both = torch.cat(weights)
    assert torch.equal(few_rows_gated(x, *both.chunk(2), activation), got)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma2", "phi3"])
def test_gated_units_take_the_kernel_and_are_given_back(name, monkeypatch):
    model = build(name, torch.bfloat16).cuda()
    units = GatedUnits(model.modules())
    kinds = {type(unit) for unit, _, _ in units.units}
    assert len(units.units) == model.config.num_hidden_layers and len(kinds) == 1
    launched = []

    def counted(x, *weights):
        launched.append(x.numel() // x.shape[-1])
        return few_rows_gated(x, *weights)

    monkeypatch.setattr(gated_module, "few_rows_gated", counted)
    mlp = model.model.layers[0].mlp
    for rows in (3, MOST_ROWS, MOST_ROWS + 1):
        x = torch.randn(rows, 1, model.config.hidden_size, dtype=torch.bfloat16, device="cuda")
        want = mlp(x)
        with units.switched():
            assert (mlp(x) - want).abs().max() <= 2**-6 * want.abs().max()
    assert launched == [3, MOST_ROWS]
    assert {type(unit) for unit, _, _ in units.units} == kinds


def test_units_that_compute_something_else_are_left_alone(monkeypatch):
    monkeypatch.setattr(gated_module, "find_obstacle", lambda layer: None)
    # GPT-2's has no gate.
    for name, served in (("llama", True), ("gemma2", True), ("phi3", True), ("gpt2", False)):
        model = build(name)
        count = model.config.num_hidden_layers if served else 0
        assert len(GatedUnits(model.modules()).units) == count, name
    unit = build("llama").model.layers[0].mlp
    assert len(GatedUnits([unit]).units) == 1
    hook = unit.register_forward_hook(lambda *args: None)
    assert not GatedUnits([unit]).units
    hook.remove()
    unit.gate_proj = nn.Linear(unit.gate_proj.in_features, unit.gate_proj.out_features)
    assert not GatedUnits([unit]).units  # it has a bias


class Unit(nn.Module):
    """A gated unit with weights that make gates as large as a trained model's, or larger."""

    def __init__(self, activation, bound=None):
        super().__init__()
        torch.manual_seed(0)
        self.gate_proj, self.up_proj = (nn.Linear(256, 512, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(512, 256, bias=False)
        self.act_fn, self.bound = activation, bound
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)
        self.to(torch.bfloat16)

    def forward(self, x):
        gate = self.gate_proj(x) if self.bound is None else self.gate_proj(x).clamp(max=self.bound)
        return self.down_proj(self.act_fn(gate) * self.up_proj(x))


class Joined(nn.Module):
    """A unit whose gate and up share a weight, the gate first or last."""

    def __init__(self, activation, gate_first=True):
        super().__init__()
        self.gate_up_proj = nn.Linear(64, 256, bias=False, dtype=torch.bfloat16)
        self.down_proj = nn.Linear(128, 64, bias=False, dtype=torch.bfloat16)
        self.act_fn, self.gate_first = activation, gate_first

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        if not self.gate_first:
            gate, up = up, gate
        return self.down_proj(self.act_fn(gate) * up)


class Failing(Joined):
    """Wants more than it is given."""

    def forward(self, x):
        return super().forward(x) * self.missing


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


@pytest.mark.parametrize(
    ("unit", "style"),
    [
        (Unit(nn.SiLU()), ("silu", False)),
        (Unit(nn.GELU()), ("gelu", False)),
        (Unit(nn.GELU(approximate="tanh")), ("gelu_tanh", False)),
        (Unit(lambda x: nn.functional.gelu(x.float()).to(x.dtype)), ("gelu", False)),
        (Unit(quick_gelu), None),
        (Unit(nn.functional.relu), None),
        (Unit(nn.SiLU(), bound=20.0), None),
        (Joined(nn.SiLU()), ("silu", True)),
        (Joined(nn.GELU()), ("gelu", True)),
        (Joined(nn.SiLU(), gate_first=False), None),
        (Failing(nn.SiLU()), None),
    ],
)
def test_rounding_does_not_pass_one_unit_for_another(unit, style, monkeypatch):
    monkeypatch.setattr(gated_module, "find_obstacle", lambda layer: None)
    assert find_style(unit) == style
    assert len(GatedUnits([unit]).units) == (style is not None)


@torch.no_grad()
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", [Unit, Joined])
def test_units_of_either_form_give_the_same_without_the_kernel(activation, kind, monkeypatch):
    monkeypatch.setattr(gated_module, "find_obstacle", lambda layer: None)
    unit = kind(lambda x: activate(x, activation)).float()
    units = GatedUnits([unit])
    x = torch.randn(MOST_ROWS + 1, 1, unit.down_proj.out_features)
    want = unit(x)
    with units.switched():
        assert type(unit) is not kind
        assert (unit(x) - want).abs().max() <= 1e-5 * want.abs().max()
    assert type(unit) is kind


@torch.no_grad()
def test_an_activation_waits_for_its_product(monkeypatch):
    monkeypatch.setattr(small, "serves", lambda x: True)
    launches = []

    def launch(gate, up, activation, *, kept):
        launches.append((activation, kept.copy_(activate(gate, activation))))
        return kept * up

    monkeypatch.setattr(small, "_launch_gated", launch)
    x, up = torch.randn(2, 3, 1, 8)
    ways = [
        (nn.functional.silu, "silu"),
        (nn.functional.gelu, "gelu"),
        (partial(nn.functional.gelu, approximate="tanh"), "gelu_tanh"),
    ]
    with Pending({8}):
        for act, name in ways:
            for swapped in (False, True):
                gate = act(x)
                got = up * gate if swapped else gate * up
                assert launches.pop()[0] == name
                assert torch.equal(gate, activate(x, name)) and torch.equal(got, gate * up)
        launches.clear()
        # Of another shape, with itself, by a number, or after somebody looked.
        wide = act(x) * torch.randn(3, 1, 1)
        square = (gate := act(x)) * gate
        twice = act(x) * 2
        seen = act(x)
        assert torch.equal(seen.neg() * up, -gate * up)
        assert torch.equal(seen * up, gate * up)
        assert wide.isfinite().all() and torch.equal(square, gate.square())
        assert torch.equal(twice, gate + gate) and not launches
