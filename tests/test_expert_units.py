"""Sparse experts in decode steps: the kernels against float64, and the modules that take them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import build, generate, prompts
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.integrations.moe import ExpertsInterface

pytest.importorskip("triton")

from hf_tree_cache import TreeCache, enable_tree_attention, tree_generate
from hf_tree_cache.forward import experts
from hf_tree_cache.forward.experts import few_rows_experts, is_small, route
from hf_tree_cache.integration import expert_units, routers
from hf_tree_cache.integration.expert_units import ExpertUnits
from hf_tree_cache.integration.fingerprint import fingerprint
from hf_tree_cache.integration.routers import Routers, Style

CASES = [
    # rows, experts, width, inner size, chosen of each row
    (5, 4, 24, 16, 2),
    (33, 3, 72, 40, 2),
    (40, 2, 16, 24, 1),
]
"""For the interpreter, which interpreted.py runs."""


def draw(
    rows: int, num_experts: int, width: int, size: int, top: int, dtype: torch.dtype, device: str
) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(rows)
    x = torch.randn(rows, width)
    gate_up = torch.randn(num_experts, 2 * size, width) * width**-0.5
    down = torch.randn(num_experts, width, size) * size**-0.5
    chosen = torch.stack([torch.randperm(num_experts)[:top] for _ in range(rows)]).to(device)
    shares = torch.rand(rows, top, device=device)
    x, gate_up, down = (each.to(dtype).to(device) for each in (x, gate_up, down))
    return x, gate_up, down, chosen, shares.to(dtype)


def in_float64(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    chosen: torch.Tensor,
    shares: torch.Tensor,
) -> torch.Tensor:
    want = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for expert in chosen.unique():
        row, place = (chosen == expert).nonzero().T
        gate, up = (x[row].double() @ gate_up[expert].double().T).chunk(2, -1)
        part = (nn.functional.silu(gate) * up) @ down[expert].double().T
        want.index_add_(0, row, part * shares[row, place, None].double())
    return want


def error_of(got: torch.Tensor, *inputs: torch.Tensor) -> float:
    want = in_float64(*inputs)
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("rows", [1, 2, 17, 64, 130])
@pytest.mark.parametrize(
    ("num_experts", "width", "size", "top"),
    [(128, 2048, 768, 8), (8, 512, 1792, 2), (3, 136, 72, 3), (1, 64, 40, 1)],
    ids=["many", "few large", "odd", "one"],
)
def test_the_kernels_agree_with_float64(
    dtype: torch.dtype, rows: int, num_experts: int, width: int, size: int, top: int
) -> None:
    inputs = draw(rows, num_experts, width, size, top, dtype, "cuda")
    got = few_rows_experts(*inputs)
    assert got.shape == (rows, width) and got.dtype == dtype
    assert error_of(got, *inputs) < {torch.bfloat16: 4e-3, torch.float16: 6e-4}[dtype]
    again = few_rows_experts(*inputs)
    assert torch.equal(got, again)


@pytest.mark.gpu
def test_all_rows_may_choose_the_same_experts() -> None:
    x, gate_up, down, chosen, shares = draw(100, 64, 256, 128, 4, torch.bfloat16, "cuda")
    chosen = torch.tensor([63, 0, 7, 8], device="cuda").expand(100, 4)
    inputs = (x, gate_up, down, chosen, shares.float())
    assert error_of(few_rows_experts(*inputs), *inputs) < 4e-3


def route_and_compare(
    rows: int, num_experts: int, top: int, dtype: torch.dtype, device: str
) -> list[str]:
    """What is wrong with the choice of experts; few logits are equal."""
    torch.manual_seed(rows)
    order = torch.stack([torch.randperm(num_experts) for _ in range(rows)])
    logits = (order / num_experts * 6 - 3).to(dtype).to(device)
    wrong = []
    for normed in (False, True):
        for wide in (False, True):
            shares, chosen = route(logits, top, normed, wide)
            want, places = logits.double().softmax(-1).topk(top)
            if normed:
                want = want / want.sum(-1, keepdim=True)
            same = torch.equal(logits.gather(1, chosen), logits.gather(1, places))
            distinct = all(len(row.unique()) == top for row in chosen)
            close = (shares - want).abs().max() <= (1e-6 if wide else 4e-3) * want.max()
            dtypes = shares.dtype == (torch.float32 if wide else dtype), chosen.dtype == torch.int64
            if not (same and distinct and close and all(dtypes)):
                wrong.append(f"{rows} of {num_experts}, top {top}, normed {normed}, wide {wide}")
    return wrong


ROUTED = [(3, 5, 2), (1, 128, 8), (2, 1, 1), (4, 60, 4)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_the_likeliest_experts_are_chosen(dtype: torch.dtype) -> None:
    for case in (*ROUTED, (64, 512, 10), (300, 1024, 32)):
        assert not route_and_compare(*case, dtype, "cuda")
    shares, chosen = route(torch.full((1, 3), torch.nan, device="cuda").to(dtype), 2, True, False)
    assert shares.isnan().all() and chosen.max() < 3


@pytest.mark.core
@pytest.mark.parametrize(
    ("name", "style"),
    [
        ("qwen3_moe", Style(normed=False, wide=False)),
        ("qwen3_next", Style(normed=True, wide=False)),
        ("mixtral", Style(normed=True, wide=True)),
        ("gpt_oss", None),
        ("deepseek_v3", None),
        ("llama", None),
    ],
)
def test_routers_are_recognised(
    name: str, style: Style | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routers, "find_weight_obstacle", lambda weight: None)
    model = build(name)
    kinds = [type(module) for module in model.modules()]
    found = Routers(model.modules())
    assert bool(found.units) == (style is not None)
    for module, _, _ in found.units:
        assert routers._find_style(module) == style
        with monkeypatch.context() as patch:
            patch.setattr(routers, "route", lambda logits, top, *style: style)
            patch.setattr(routers, "few_rows_linear", lambda x, weights, biases: x)
            with found.switched():
                assert module(torch.zeros(1, 2, module.weight.shape[1]))[1:] == style
            hook = module.register_forward_hook(lambda *args: None)
            assert not Routers([module]).units
            hook.remove()
    assert [type(module) for module in model.modules()] == kinds


def test_shapes_are_known_without_running() -> None:
    with FakeTensorMode():
        x = torch.empty(4, 1, 64).transpose(0, 1)[0]
        y = few_rows_experts(
            x, torch.empty(8, 64, 64), torch.empty(8, 64, 32), torch.empty(4, 2), torch.empty(4, 2)
        )
        shares, chosen = route(torch.empty(4, 8), 2, False, False)
    assert y.shape == (4, 64) and y.is_contiguous()
    assert shares.shape == chosen.shape == (4, 2) and chosen.dtype == torch.int64


@pytest.mark.parametrize("shared", [99 << 10, 163 << 10, 227 << 10])
def test_tiles_fit_whatever_the_experts(shared: int) -> None:
    for num_pairs in (1, 512, 4096):
        for width, size in ((2048, 768), (4096, 14_336), (72, 40)):
            gated, down = experts.choose_tiles(num_pairs, 64, width, size, shared)
            assert gated.shared_bytes(2) <= shared and down.shared_bytes() <= shared
    few, many = (experts.choose_tiles(n, 64, 2048, 768, shared)[0] for n in (1023, 1024))
    assert few.rows < many.rows


def test_many_rows_are_no_longer_bound_by_reading() -> None:
    assert is_small(256 * 8, 128) and is_small(64 * 8, 8)
    assert not is_small(65 * 8, 8) and not is_small(513 * 8, 128)


@pytest.mark.core
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize(
    ("name", "served"),
    # The last has biases, other gates and transposed weights.
    [("qwen3_moe", 2), ("mixtral", 2), ("deepseek_v3", 1), ("llama", 0), ("gpt_oss", 0)],
)
def test_experts_are_recognised(
    name: str, served: int, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expert_units, "find_obstacle", lambda *weights: None)
    model = build(name)
    if name != "llama":
        model.set_experts_implementation(implementation)
    assert len(ExpertUnits(model.modules()).units) == served


def bounded(self: Any, gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, -1)
    return self.act_fn(gate.clamp(max=20)) * up


def interleaved(self: Any, gate_up: torch.Tensor) -> torch.Tensor:
    return self.act_fn(gate_up[..., ::2]) * gate_up[..., 1::2]


@pytest.mark.core
def test_experts_that_compute_something_else_are_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(expert_units, "find_obstacle", lambda *weights: None)
    unit = next(x for x in build("qwen3_moe").modules() if hasattr(x, "has_gate"))
    assert len(ExpertUnits([unit]).units) == 1
    for name, value in (
        ("has_bias", True),
        ("has_post_expert_norm", True),
        ("_is_expert_parallel", True),
        ("forward", lambda *args: None),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(unit, name, value, raising=False)
            assert not ExpertUnits([unit]).units, name
    with monkeypatch.context() as patch:
        patch.setitem(unit._modules, "act_fn", nn.GELU())
        assert not ExpertUnits([unit]).units
    for gate in (bounded, interleaved):
        # A loop that asks the module, as transformers' functions do.
        kind = type("Experts", (type(unit),), {"_apply_gate": gate, "forward": by_module})
        with monkeypatch.context() as patch:
            patch.setattr(unit, "__class__", kind)
            assert not ExpertUnits([unit]).units, gate
    hook = unit.register_forward_hook(lambda *args: None)
    assert not ExpertUnits([unit]).units
    hook.remove()
    assert len(ExpertUnits([unit]).units) == 1


def by_module(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    parts = torch.einsum("rk,rtnk->rtn", hidden_states, self.gate_up_proj[top_k_index])
    parts = torch.einsum("rtn,rtkn->rtk", self._apply_gate(parts), self.down_proj[top_k_index])
    return (parts * top_k_weights[..., None]).sum(1)


@pytest.mark.core
@torch.no_grad()
def test_what_the_kernels_do_not_serve_is_left_to_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[int] = []

    def counted(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        return in_float64(x, *rest).to(x.dtype)

    monkeypatch.setattr(expert_units, "find_obstacle", lambda *weights: None)
    monkeypatch.setattr(expert_units, "few_rows_experts", counted)
    model = build("qwen3_moe")
    unit = next(x for x in model.modules() if hasattr(x, "has_gate"))
    num_experts, width, _ = unit.down_proj.shape
    units = ExpertUnits([unit])
    theirs = type(unit)
    most = experts.MOST_EACH * num_experts // 2

    def differ(rows: int) -> float:
        torch.manual_seed(0)
        x = torch.randn(rows, width)
        inputs = x, torch.arange(2 * rows).view(rows, 2) % num_experts, torch.rand(rows, 2)
        want = unit(*inputs)
        with units.switched():
            return float((unit(*inputs) - want).abs().max())

    assert differ(3) < 1e-5 and differ(most) < 1e-5 and calls == [3, most]
    assert differ(most + 1) == 0 and calls == [3, most]
    monkeypatch.setitem(ExpertsInterface._global_mapping, "my own", by_module)
    model.set_experts_implementation("my own")
    assert differ(3) == 0 and calls == [3, most]
    own = fingerprint(model)
    model.set_experts_implementation("eager")
    eager = fingerprint(model)
    model.set_experts_implementation("batched_mm")
    assert fingerprint(model) == eager != own
    with pytest.raises(ZeroDivisionError), units.switched():
        assert type(unit) is not theirs
        raise ZeroDivisionError
    assert type(unit) is theirs


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # the compiler has some of its own
@pytest.mark.parametrize("compile", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
def test_captured_steps_take_the_kernels(
    compile: bool,
    implementation: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    calls: list[int] = []
    before = expert_units.few_rows_experts

    def counted(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        return before(x, *rest)

    if not compile:  # a compiler would not see through the count
        monkeypatch.setattr(expert_units, "few_rows_experts", counted)
    model = build("qwen3_moe", torch.bfloat16).cuda()
    model.set_experts_implementation(implementation)
    inputs = {key: value.cuda() for key, value in prompts("qwen3_moe").items()}
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 24}
    kinds = [type(x) for x in model.modules()]
    ways: list[dict[str, Any]] = [{}, {"custom_generate": tree_generate, "progress": False}]

    def first_logprobs() -> list[torch.Tensor]:
        runs = [generate(model, inputs, past_key_values=TreeCache(), **options, **x) for x in ways]
        stock = model.compute_transition_scores(runs[0].sequences, runs[0].scores)
        return [each[:, :2].float().cpu() for each in (stock, runs[1].logprobs)]

    with enable_tree_attention(model, cuda_graphs=False):
        off = first_logprobs()
    assert not calls
    with enable_tree_attention(model, compile=compile) as handle:
        on = first_logprobs()
    assert "without compiled layers" not in caplog.text
    for one, other in zip(on, off, strict=True):
        assert (one - other).norm() < 0.02 * other.norm()
    assert handle.graphs is not None and handle.graphs.replayed > 10, handle.graphs
    assert compile or calls
    assert [type(x) for x in model.modules()] == kinds
