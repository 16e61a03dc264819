"""A decode step besides attention: kernels against float64, and the modules that take them."""

from __future__ import annotations

import sys
from functools import partial

import pytest
import torch
from models import build
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from hf_tree_cache.forward import small
from hf_tree_cache.forward.linear import (
    ACTIVATIONS,
    MOST_ROWS,
    TILES,
    Gpu,
    Tile,
    choose_tile,
    few_rows_gated,
    few_rows_linear,
    find_obstacle,
)
from hf_tree_cache.forward.rotary import (
    HALVES,
    Rotation,
    Turn,
    make_rotary,
    make_rotary_of_one,
)
from hf_tree_cache.forward.small import (
    Activated,
    Sum,
    activate,
    gated_product,
    make_norm,
    rms_norm,
)
from hf_tree_cache.integration import gated as gated_module
from hf_tree_cache.integration import linears as linears_module
from hf_tree_cache.integration.gated import GatedUnits, find_style
from hf_tree_cache.integration.linears import DecodeLinears
from hf_tree_cache.integration.pending import Pending
from hf_tree_cache.integration.small_steps import SmallSteps
from hf_tree_cache.integration.substitutes import Substitutes
from hf_tree_cache.memory.scatter import Slots

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


def error_of_gated(got, x, gate, up, activation="silu"):
    want = activate(x.double() @ gate.double().T, activation) * (x.double() @ up.double().T)
    return float((got.double() - want).norm() / want.norm())


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


class Noted(Rotation):
    """Notes what it is written with."""

    def __init__(self, written):
        tensors = torch.zeros(6, 2, 1, 1, 4)
        super().__init__(*tensors)
        object.__setattr__(self, "written", written)

    def write(self, values=None, slots=None):
        self.written.append(slots)


def test_a_rotation_waits_for_the_next_operator_or_for_whoever_takes_it():
    written = []
    one, other = Noted(written), Noted(written)
    with Pending({8}) as pending:
        pending.hold(one)
        assert written == []
        assert pending.take_rotation(one.k_out) is one
        assert pending.take_rotation(one.k_out) is None and written == []
        pending.hold(one)
        pending.hold(other)  # one thing waits at a time
        assert len(written) == 1
        # Those who store other keys may have been given the waiting queries.
        assert pending.take_rotation(one.k_out) is None and len(written) == 2
        pending.hold(one)
        assert one.q_out.view(-1).shape == (8,) and len(written) == 2  # reads nothing
        assert one.q_out.add(1).shape == (2, 1, 1, 4) and len(written) == 3
        pending.hold(other)
    assert len(written) == 4


class AtOnce(Pending):
    """Nothing waits."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))

    def norm(self, x, weight, eps, more):
        return rms_norm(x, weight, eps, more=more)

    def hold(self, rotation):
        rotation.write()


LAUNCHES = {
    # of norms, of rotations with norms and without; of three layers, Gemma 4 of four
    "llama": (7, 0, 3),
    "qwen3": (7, 3, 0),
    "gemma2": (7, 0, 3),
    "gemma3": (7, 3, 0),
    "gemma4": (16, 6, 0),
    "olmo2": (12, 0, 3),
}
"""One before each layer's attention, one before its unit, one at the end, with the norms behind
both. OLMo 2 has those only, and norms of queries and keys over all heads. Gemma 4 rotates them one
after the other, and has norms of values, without a weight, and of inputs of a layer."""


@torch.no_grad()
def launches_of(name, dtype, device, monkeypatch):
    """Launches of small steps of a decode step, which by being fewer change roundings at most."""
    model = build(name, dtype).to(device)
    inputs = {"input_ids": torch.tensor([[5], [6], [7]], device=device)}
    inputs["position_ids"] = torch.zeros_like(inputs["input_ids"])
    linears = DecodeLinears(model.modules(), join=False)  # Q, K and V together
    steps, module = SmallSteps(model.modules()), sys.modules[SmallSteps.__module__]
    with monkeypatch.context() as patch:
        patch.setattr(module, "Pending", AtOnce)
        with linears.switched(), steps.switched():
            want = model(**inputs, output_hidden_states=True)
    norms, rotations = [], []
    launch, write = small._launch, Rotation.write
    with monkeypatch.context() as patch:
        patch.setattr(small, "_launch", lambda *given: norms.append(launch(*given)))
        patch.setattr(
            Rotation, "write", lambda self: rotations.append(not self.norms) or write(self)
        )
        with linears.switched(), steps.switched():
            got = model(**inputs, output_hidden_states=True)
    pairs = [(got.logits, want.logits), *zip(got.hidden_states, want.hidden_states, strict=True)]
    for one, other in pairs:
        if any(each is False for each in rotations):  # squares are added up in another order
            assert (one - other).abs().max() <= 2**-6 * other.abs().max()
        else:
            assert torch.equal(one, other)
    return len(norms), rotations.count(False), rotations.count(True)


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAUNCHES)
def test_small_steps_that_wait_for_each_other_change_nothing(name, monkeypatch):
    assert launches_of(name, torch.bfloat16, "cuda", monkeypatch) == LAUNCHES[name]


@torch.no_grad()
def test_norms_wait_for_their_rotation_or_for_the_next_operator(monkeypatch):
    monkeypatch.setattr(small, "serves", lambda x: True)
    written = []
    monkeypatch.setattr(small, "_launch", lambda added, norm: written.append(norm.out))
    x, weight = torch.randn(2, 1, 24, 4), torch.ones(4)

    def of_heads(first, last, transposed=False):
        heads = x[:, :, first:last]
        out = pending.norm(heads.transpose(1, 2) if transposed else heads, weight, 1e-6, 0.0)
        return out if transposed else out.transpose(1, 2)

    def rotate(q, k):
        rotation = Rotation(q, k, weight, weight, torch.empty(q.shape), torch.empty(k.shape))
        pending.hold(rotation)
        return pending.take_rotation(rotation.k_out).norms

    with Pending({8}) as pending:
        for transposed in (False, True):
            q, k = of_heads(0, 16, transposed), of_heads(16, 24, transposed)
            assert not written
            norms = rotate(q, k)
            assert len(norms) == 2 and not written
            assert [norm.out.data_ptr() for norm in norms] == [q.data_ptr(), k.data_ptr()]
        q = of_heads(0, 16)
        k = of_heads(0, 16)
        # Of a norm that still waits; of the wrong ones; of one only; of keys that went on.
        again = pending.norm(q.transpose(1, 2), weight, 1e-6, 0.0)
        assert len(written) == 2
        assert rotate(k, q) == () and written[2] is again
        assert rotate(of_heads(0, 16), q) == () and len(written) == 4
        assert rotate(of_heads(0, 16), of_heads(16, 24)[:, 1:]) == () and len(written) == 6
        # Whoever else asks sees it.
        of_heads(0, 16).neg()
        assert len(written) == 7


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


def halves(q, k, cos, sin, unsqueeze_dim=1):
    """Rotary embedding as most models of transformers have it."""

    def turned(x):
        first, second = x.chunk(2, -1)
        return torch.cat([-second, first], -1)

    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + turned(q) * sin, k * cos + turned(k) * sin


def interleaved(q, k, cos, sin):
    """As Cohere's."""

    def turned(x):
        return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)

    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + turned(q) * sin, k * cos + turned(k) * sin


def interleaved_by_first(q, k, cos, sin):
    """As GLM's: what has no angles stays as it is."""
    cos, sin = (x[..., : x.shape[-1] // 2].repeat_interleave(2, -1) for x in (cos, sin))
    size = cos.shape[-1]
    rotated = interleaved(q[..., :size], k[..., :size], cos, sin)
    rest = q[..., size:], k[..., size:]
    return tuple(torch.cat(parts, -1) for parts in zip(rotated, rest, strict=True))


def halves_by_pair(q, k, cos, sin):
    """As gpt-oss's."""
    return halves(q, k, *(torch.cat([x, x], -1) for x in (cos, sin)))


def widened(q, k, cos, sin):
    """As Ernie's: angles may be float32, results are as what came in."""
    rotated = interleaved_by_first(q.float(), k.float(), cos.float(), sin.float())
    return tuple(x.to(q.dtype) for x in rotated)


def unusual(q, k, cos, sin):
    return halves(q, k, sin, cos)


FORMS = {
    "halves": (halves, HALVES),
    "interleaved": (interleaved, Turn(True, "own")),
    "by first": (interleaved_by_first, Turn(True, "first", partial=True)),
    "by pair": (halves_by_pair, Turn(False, "pair")),
    "widened": (widened, Turn(True, "first", partial=True, wide=True)),
}


def error_of_norm(dtype, device):
    """Largest relative error of a few shapes."""
    torch.manual_seed(0)
    worst = 0.0
    for shape in ((1, 1, 64), (3, 1, 96), (2, 5, 4, 24)):
        x = (30 * torch.randn(shape)).to(dtype).to(device)
        weight = torch.randn(shape[-1]).to(dtype).to(device)
        exact = x.double()
        exact = exact / (exact.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        for more in (0.0, 1.0):
            got = rms_norm(x, weight, 1e-5, more=more)
            want = exact * (weight.double() + more)
            assert got.dtype == dtype
            worst = max(worst, float((got.double() - want).norm() / want.norm()))
        added = Sum(x / 3, x - x / 3, torch.empty_like(x))
        got = rms_norm(added.out, weight, 1e-5, added=added)
        assert torch.equal(added.out, added.first + added.second)
        assert torch.equal(got, rms_norm(added.out, weight, 1e-5))
        # A sum with a norm, written by itself and by the norm behind it.
        other = torch.randn(shape[-1]).to(dtype).to(device)
        one, more_after = rms_norm(x, other, 1e-6, more=1.0), (0.0, 1.0)
        for last in (None, *more_after):
            first = make_norm(x, other, 1e-6, 1.0)
            added = Sum(x / 3, first.out, torch.empty_like(x), first)
            if last is None:
                added.write()
            else:
                got = rms_norm(added.out, weight, 1e-5, more=last, added=added)
                assert torch.equal(got, rms_norm(x / 3 + one, weight, 1e-5, more=last))
            assert torch.equal(first.out, one) and torch.equal(added.out, x / 3 + one)
        # Times a number; a sum with a norm before it and without, and a norm behind it.
        factor = torch.tensor([0.7], dtype=dtype, device=device)
        for first in (None, make_norm(x, other, 1e-6, 1.0)):
            for last in (False, True):
                added = Sum(x / 3, one, torch.empty_like(x), first, factor)
                if last:
                    got = rms_norm(added.out, weight, 1e-5, added=added)
                    assert torch.equal(got, rms_norm((x / 3 + one) * factor, weight, 1e-5))
                else:
                    added.write()
                assert torch.equal(added.out, (x / 3 + one) * factor)
    # Heads of one product for these and others, as they come and transposed; a part of a row.
    joined = torch.randn(3, 1, 7 * 24).to(dtype).to(device)
    heads = joined[..., 48:120].unflatten(-1, (3, 24))
    for part in (heads, heads.transpose(1, 2), joined[..., 48:72], joined[..., ::7]):
        assert torch.equal(rms_norm(part, weight, 1e-5), rms_norm(part.contiguous(), weight, 1e-5))
    return worst


def error_of_gated_product(dtype, device):
    torch.manual_seed(0)
    worst = 0.0
    for rows, size in ((1, 24), (65, 200), (3, 2100)):
        gate, up = torch.randn(rows, 1, 2 * size).to(dtype).to(device).chunk(2, -1)
        for activation in ACTIVATIONS:
            want = activate(gate.double(), activation) * up.double()
            got = gated_product(gate, up, activation)
            assert got.shape == (rows, 1, size) and got.dtype == dtype
            worst = max(worst, float((got.double() - want).norm() / want.norm()))
            # As the model's two operators have it, and where a model looks at the first alone.
            kept = Activated(gate, activation, torch.empty(rows, 1, size).to(gate))
            got = kept.times(up)
            near = (kept.out - activate(gate, activation)).abs()
            assert (near <= 2**-7 * kept.out.abs() + 1e-6).all()
            assert torch.equal(got, kept.out * up)
            again = Activated(gate, activation, torch.empty_like(kept.out))
            again.write()
            assert torch.equal(again.out, activate(gate, activation))
    return worst


def store(rotation):
    """Rotate and store; keys and values, and nothing else, are in the slots then."""
    k_out = rotation.k_out
    rows, num_heads, _, size = k_out.shape
    block_size, v_size = 4, size + 2
    # As a view of all heads of a row, and a row behind the last that is in use.
    values = torch.randn(rows, 1, num_heads * v_size).to(k_out).unflatten(-1, (-1, v_size))
    values = values.transpose(1, 2)
    used = max(1, rows - 1)
    planes = [k_out.new_full((2 * rows, block_size, num_heads, n), 7) for n in (size, v_size)]
    expected = [plane.clone() for plane in planes]
    blocks = [torch.randperm(2 * rows)[:rows] for _ in planes]
    offsets = torch.randint(block_size, (rows,))
    ints = [x.int().to(k_out.device) for x in (torch.tensor([used]), *blocks, offsets)]
    rotation.write(values, Slots(*planes, *ints, block_size))
    for plane, block, new in zip(expected, blocks, (k_out, values), strict=True):
        plane[block[:used], offsets[:used]] = new[:used, :, 0]
    assert all(torch.equal(one, other) for one, other in zip(planes, expected, strict=True))


def behind_norms(q, k, cos, sin, turn, refused):
    """Norms that have still to be written, and then the rotation, are as one after the other."""
    size = q.shape[3]
    weights = 1 + torch.randn(2, size).to(q)
    for more in (0.0, 1.0):
        for write in (Rotation.write, store):

            def launch(rotation, norms, write=write):
                rotation = rotation.behind(norms)
                assert rotation is not None
                write(rotation)

            norms = [make_norm(x, w, 1e-5, more) for x, w in zip((q, k), weights, strict=True)]
            fused = make_rotary(refused, lambda rotation, n=norms: launch(rotation, n), turn)
            got = fused(*(norm.out for norm in norms), cos, sin)
            want = [rms_norm(x, w, 1e-5, more=more) for x, w in zip((q, k), weights, strict=True)]
            for norm, one in zip(norms, want, strict=True):  # squares are added up in another order
                assert (norm.out - one).abs().max() <= torch.finfo(q.dtype).eps * one.abs().max()
            want = make_rotary(refused, turn=turn)(*(norm.out for norm in norms), cos, sin)
            assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


def error_of_rotary(dtype, device):
    torch.manual_seed(0)

    def refused(*args):
        raise AssertionError("the kernel serves this")

    worst = 0.0
    for rows, num_q_heads, num_kv_heads, size in ((1, 4, 4, 64), (3, 7, 1, 80), (5, 2, 2, 12)):
        # As views of one product for all heads have them.
        joined = torch.randn(rows, 1, (num_q_heads + num_kv_heads) * size).to(dtype).to(device)
        q, k = (
            joined.unflatten(-1, (-1, size)).transpose(1, 2).split([num_q_heads, num_kv_heads], 1)
        )
        for form, turn in FORMS.values():
            whole = size // 2 if turn.angles == "pair" else size
            for num_angles in [whole, whole // 2] if turn.partial else [whole]:
                angles = torch.randn(2, rows, 1, num_angles).to(device)
                cos, sin = angles if turn.wide else angles.to(dtype)
                got = make_rotary(refused, turn=turn)(q, k, cos, sin)
                again = make_rotary(refused, store, turn)(q, k, cos, sin)
                assert all(torch.equal(one, other) for one, other in zip(got, again, strict=True))
                behind_norms(q, k, cos, sin, turn, refused)
                exact = (x.double() for x in (q, k, cos, sin))
                want = (interleaved_by_first if form is widened else form)(*exact)
                for one, other in zip(got, want, strict=True):
                    assert one.shape == other.shape and one.dtype == dtype
                    worst = max(worst, float((one.double() - other).norm() / other.norm()))
    return worst


def error_of_rotary_of_one(dtype, device):
    """Queries and keys one after the other, whichever way heads lie, with a norm and without."""
    torch.manual_seed(0)
    worst = 0.0

    def refused(*args, **kwargs):
        raise AssertionError("the kernel serves this")

    for rows, heads, size in ((1, 4, 64), (3, 1, 80), (5, 7, 12)):
        joined = torch.randn(rows, 1, (heads + 2) * size).to(dtype).to(device)
        x = joined[..., size:-size].unflatten(-1, (heads, size))
        cos, sin = torch.randn(2, rows, 1, size).to(dtype).to(device)
        heads_first = x.transpose(1, 2)
        one = make_rotary_of_one(refused)
        got = one(x, cos, sin, unsqueeze_dim=2)
        assert got.shape == x.shape and got.dtype == dtype
        assert torch.equal(one(heads_first, cos, sin), got.transpose(1, 2))
        want, _ = halves(*(y.double() for y in (heads_first, heads_first, cos, sin)))
        error = (got.transpose(1, 2).double() - want).norm() / want.norm()
        worst = max(worst, float(error))
        norm = make_norm(x, torch.ones(size).to(x), 1e-5, 0.0)

        def launch(rotation, norm=norm):
            rotation = rotation.behind([norm])
            assert rotation is not None
            rotation.write()

        got = make_rotary_of_one(refused, launch)(norm.out, cos, sin, unsqueeze_dim=2)
        assert torch.equal(got, one(norm.out, cos, sin, unsqueeze_dim=2))
        # Not one token, another way of heads, angles that do not fit.
        theirs = []
        other = make_rotary_of_one(lambda *given, seen=theirs, **options: seen.append(options))
        other(joined.new_empty(rows, 2, heads, size), cos, sin, unsqueeze_dim=2)
        other(x, cos, sin, unsqueeze_dim=3)
        other(x, cos[..., :4], sin[..., :4], unsqueeze_dim=2)
        assert theirs == [{"unsqueeze_dim": dim} for dim in (2, 3, 2)]
    return worst


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    "error", [error_of_norm, error_of_rotary, error_of_rotary_of_one, error_of_gated_product]
)
def test_small_steps_agree_with_float64(dtype, error):
    assert error(dtype, "cuda") < TOLERANCE[dtype]


def turns_found(model, monkeypatch):
    """How each form above is recognised in the modelling file of ``model``."""
    found = {}
    file = sys.modules[type(model).__module__]
    steps = sys.modules[SmallSteps.__module__]
    make = steps.make_rotary
    for name, form in [*((name, form) for name, (form, _) in FORMS.items()), ("no", unusual)]:
        monkeypatch.setattr(file, "apply_rotary_pos_emb", form)
        turns = []

        def noted(theirs, launch=None, turn=HALVES, turns=turns):
            if launch is not None:
                turns.append(turn)
            return make(theirs, turn=turn)

        monkeypatch.setattr(steps, "make_rotary", noted)
        assert len(SmallSteps(model.modules()).rotaries) == len(turns)
        found[name] = turns
    return found


@pytest.mark.gpu
def test_ways_to_rotate_are_told_apart(monkeypatch):
    model = build("llama", torch.bfloat16).cuda()
    assert len(SmallSteps(model.modules()).rotaries) == 1
    expected = {name: [turn] for name, (_, turn) in FORMS.items()}
    assert turns_found(model, monkeypatch) == {**expected, "no": []}


def test_angles_that_do_not_fit_are_left_to_the_model():
    assert HALVES.serves(64, 64) and not HALVES.serves(64, 32)
    assert Turn(True, "first", partial=True).serves(64, 32)
    assert not Turn(True, "first", partial=True).serves(64, 128)
    assert Turn(False, "pair").serves(64, 32) and not Turn(False, "pair").serves(64, 64)
    assert not Turn(True, "first", partial=True).serves(64, 33)


def test_the_operator_is_known_to_the_compiler():
    with FakeTensorMode():
        x, weight = torch.empty(3, 1, 64), torch.empty(40, 64)
        y = few_rows_linear(x, [weight, weight], [])
    assert y.shape == (3, 1, 80) and y.dtype == x.dtype
