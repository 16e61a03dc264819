"""Norms, sums and activations of a decode step, and how they wait for each other."""

from __future__ import annotations

import sys

import pytest
import torch
from models import build
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from forward_errors import (
    LAUNCHES,
    TOLERANCE,
    AtOnce,
    error_of_gated_product,
    error_of_norm,
    error_of_rotary,
    error_of_rotary_of_one,
    launches_of,
)

from hf_tree_cache.forward.small import Sum, rms_norm
from hf_tree_cache.integration import gated as gated_module
from hf_tree_cache.integration import linears as linears_module
from hf_tree_cache.integration.pending import Pending
from hf_tree_cache.integration.small_steps import SmallSteps
from hf_tree_cache.integration.substitutes import Substitutes


class Bare(nn.Module):
    """Without a weight."""

    def __init__(self, power):
        super().__init__()
        self.eps, self.power = 1e-6, power

    def forward(self, x):
        mean = x.float().pow(2).mean(-1, keepdim=True) + self.eps
        return (x.float() * mean.pow(self.power)).type_as(x)


@torch.no_grad()
@pytest.mark.parametrize(("power", "served"), [(-0.5, True), (-0.4, False)])
def test_norms_without_a_weight(power, served):
    module = nn.Sequential(Bare(power), nn.LayerNorm(64, elementwise_affine=False), nn.Linear(2, 2))
    steps = SmallSteps(module.modules())
    assert [part for part, _ in steps.norms] == [module[0]] * served
    x = 3 + torch.randn(3, 1, 2, 40)
    want = module[0](x)
    with steps.switched():
        assert (module[0](x) - want).abs().max() < 1e-5


class Norm(nn.Module):
    """With a weight so large that 1 more is within rounding."""

    def __init__(self, more):
        super().__init__()
        self.weight, self.eps, self.more = nn.Parameter(torch.full((64,), 100.0)), 1e-6, more
        self.to(torch.bfloat16)

    def forward(self, x):
        y = nn.functional.rms_norm(x.float(), (64,), eps=self.eps)
        return (y * (self.more + self.weight.float())).to(x.dtype)


@torch.no_grad()
@pytest.mark.parametrize("more", [0, 1, 2])
def test_rounding_does_not_pass_one_norm_for_another(more):
    steps = SmallSteps([Norm(more)])
    assert len(steps.norms) == (more < 2)
    for module, fused in steps.norms:
        module.float().weight.fill_(0.5)
        x = torch.randn(3, 64)
        assert (fused(x) - module(x)).abs().max() < 1e-6


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2"])
def test_small_steps_in_one_launch_give_the_same(name):
    model = build(name)
    steps = SmallSteps(model.modules())
    layers = model.config.num_hidden_layers
    # GPT-2's are layer norms.
    each = {"llama": 2, "qwen3": 4, "gemma2": 4}.get(name)
    assert len(steps.norms) == (0 if each is None else each * layers + 1)
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


class Sums(TorchDispatchMode):
    """Counts sums that operators write."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.add.Tensor, torch.ops.aten.add.out)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_norms_take_the_sum_before_them_along(monkeypatch):
    model = build("llama", torch.bfloat16)
    steps = SmallSteps(model.modules())
    ids = torch.tensor([[1, 2, 3, 4]])
    taken = []

    def counted(x, weight, eps, *, more, added=None):
        taken.append(added is not None)
        return rms_norm(x, weight, eps, more=more, added=added)

    # Where the kernel does not serve, norms do not wait themselves.
    for user in (Pending, SmallSteps):
        monkeypatch.setattr(sys.modules[user.__module__], "rms_norm", counted)
    with steps.switched():
        got = model(ids).logits
    monkeypatch.setattr(sys.modules[SmallSteps.__module__], "Pending", AtOnce)
    with steps.switched():
        want = model(ids).logits
    # All but the first, which is of embeddings.
    assert taken == [False] + [True] * 2 * model.config.num_hidden_layers
    assert torch.equal(got, want)


@torch.no_grad()
def test_a_sum_that_no_norm_takes_is_written_before_anyone_reads_it():
    x, y = torch.randn(2, 3, 1, 8, dtype=torch.bfloat16)
    weight = torch.ones(8, dtype=torch.bfloat16)
    with Sums() as written, Pending({8}) as pending:
        first = x + y
        assert written.count == 0
        assert first.view(3, 8).shape == (3, 8) and written.count == 0  # reads nothing
        second = first * 2
        assert written.count == 1
        third = x + y
        fourth = pending.norm(third, weight, 1e-6, 0.0)
        assert written.count == 2
        left = x + y
        for other in (x.float() + y.float(), x[:, 0] + y[:, 0], x[..., :4] + y[..., :4], x + 1):
            assert other.shape
        assert written.count == 3 + 4
        last = x + first
    assert written.count == 3 + 4 + 1
    for got, want in ((first, x + y), (second, (x + y) * 2), (third, x + y), (left, x + y)):
        assert torch.equal(got, want)
    assert torch.equal(last, x + (x + y))
    assert torch.equal(fourth, rms_norm(x + y, weight, 1e-6))


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAUNCHES)
def test_small_steps_that_wait_for_each_other_change_nothing(name, monkeypatch):
    assert launches_of(name, torch.bfloat16, "cuda", monkeypatch) == LAUNCHES[name]


@torch.no_grad()
def test_a_sum_that_waits_is_multiplied_by_a_number(monkeypatch):
    x, y = torch.randn(2, 3, 1, 8, dtype=torch.bfloat16)
    factor, row = torch.tensor([0.3]).to(x), torch.randn(8).to(x)
    plain = x + y
    with Pending({8}) as pending:
        for times in (1, 2):
            added = x + y
            for _ in range(times):
                assert added.mul_(factor) is added
            assert (times == 1) == bool(pending._waiting)
            want = plain * factor
            assert torch.equal(added, want if times == 1 else want * factor)
        for other in (row, factor.float()):
            added = x + y
            added *= other
            assert not pending._waiting and torch.equal(added, plain.clone().mul_(other))


def test_a_sum_is_written_where_the_kernel_does_not_serve_its_norm(monkeypatch):
    module = sys.modules[rms_norm.__module__]
    monkeypatch.setattr(module, "serves", lambda x: True)
    monkeypatch.setattr(module, "MOST_SIZE", 4)
    first, second, weight = torch.randn(3, 3, 1, 8, dtype=torch.bfloat16)
    added = Sum(first, second, torch.full_like(first, torch.nan))
    got = rms_norm(added.out, weight[0, 0], 1e-6, added=added)
    assert torch.equal(added.out, first + second) and got.isfinite().all()


def test_compiled_layers_keep_their_norms_and_their_file():
    model = build("llama")
    layers = [part for layer in model.model.layers for part in layer.modules()]
    steps = SmallSteps(model.modules(), besides=layers)
    assert [module for module, _ in steps.norms] == [model.model.norm]
    assert not steps.rotaries


@pytest.mark.parametrize(
    ("name", "served"),
    [("llama", True), ("gemma3", True), ("phi3", True), ("glm", True), ("cohere2", False)],
)
def test_whether_anything_is_left_to_compile(name, served, monkeypatch):
    for module in (gated_module, linears_module):
        monkeypatch.setattr(module, "find_obstacle", lambda layer: None)
    model = build(name)
    layers = list(model.model.layers)
    ours = Substitutes(model)
    assert not ours.names and not ours.serve(layers)
    ours.find()
    # Cohere's norms are layer norms.
    assert ours.names == ["linears", *["norms"] * served, "rotary", "gated units"]
    assert {ours.serve([layer]) for layer in layers} == {served}
    assert ours.serve(layers) == served
    units = ours.units.pop("gated units")
    assert not ours.serve(layers)
    ours.units["gated units"] = units
    layers[0].more = nn.Conv1d(1, 1, 1)
    assert not ours.serve(layers)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    "error", [error_of_norm, error_of_rotary, error_of_rotary_of_one, error_of_gated_product]
)
def test_small_steps_agree_with_float64(dtype, error):
    assert error(dtype, "cuda") < TOLERANCE[dtype]
