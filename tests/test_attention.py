from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from trees import SHAPES, Grown, ShadowTree, fill, grow_randomly

from hf_tree_cache.attention import plan as plan_module
from hf_tree_cache.attention import torch_backend
from hf_tree_cache.attention.dispatch import (
    BACKEND_VARIABLE,
    BACKENDS,
    choose_backend,
    run_tree_attention,
)
from hf_tree_cache.attention.plan import TreeAttentionPlan, Window, build_plan
from hf_tree_cache.attention.reference import tree_attention_reference
from hf_tree_cache.attention.torch_backend import tree_attention_torch
from hf_tree_cache.errors import InvalidArgument
from hf_tree_cache.memory.storage import KVSpec, KVStorage

SEEDS = 320
WINDOWS = [
    None,
    *(Window(kind, size) for kind in ("sliding", "chunked") for size in (1, 3, 16, 100)),  # type: ignore[arg-type]
]
THRESHOLDS = [(1, 1), (24, 8), (plan_module.RUN_TOKENS, plan_module.FOLD_TOKENS), (10**9, 10**9)]
MAX_SCORES = [torch_backend.MAX_SCORES, 1, 3000]
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}
LSE_TOLERANCE = 1e-5
"""The log-sum-exp is handed over in float32."""


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Products this small only wait for threads, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class Case:
    """Random queries over a random tree.

    Attributes:
        grown: the tree.
        plan: of its last forward.
        storage: NaN wherever no live branch has a token.
        layer: the one that is filled.
        keys, values: ``[num_tokens, Hkv, D]`` by token number.
        q: ``[B, Hq, T, Dk]``.
        options: keyword arguments of a backend.
        thresholds: RUN_TOKENS and FOLD_TOKENS of the plan.
        max_scores: scores that the torch backend may hold at a time.
    """

    grown: Grown
    plan: TreeAttentionPlan
    storage: KVStorage
    layer: int
    keys: torch.Tensor
    values: torch.Tensor
    q: torch.Tensor
    options: dict[str, Any]
    thresholds: tuple[int, int]
    max_scores: int


def make_case(
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    *,
    plain: bool = False,
) -> Case:
    """A case in which every feature is drawn anew; without any of them if ``plain``."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    scale = rng.choice([2, 12, 12, 40])
    grown = grow_randomly(
        rng,
        SHAPES[seed % len(SHAPES)],
        rng.choice([1, 3, 4, 16]),
        rng.choice([1, 1, 2, 5, 17]),
        scale=scale,
    )
    num_kv_heads, group = rng.choice([1, 2, 3]), rng.choice([1, 4, 7])
    k_head_dim = rng.choice([8, 16, 20])
    v_head_dim = k_head_dim if rng.random() < 0.5 else rng.choice([8, 16, 20])
    spec = KVSpec(num_kv_heads, k_head_dim, v_head_dim, dtype, torch.device(device))
    num_layers = rng.choice([1, 2])
    slab_blocks = rng.choice([2, 5, 64])
    storage, keys, values = fill(grown.shadow, spec, slab_blocks=slab_blocks, num_layers=num_layers)
    num_q_heads = num_kv_heads * group
    shape = (len(grown.counts), num_q_heads, grown.num_new, k_head_dim)
    q = torch.randn(shape, dtype=torch.float64).to(dtype).to(device)
    options: dict[str, Any] = {"scale": rng.choice([1.0, 0.3, k_head_dim**-0.5])}
    if not plain:
        options["window"] = rng.choice(WINDOWS)
        options["softcap"] = rng.choice([None, None, 0.7, 30.0])
        sinks = torch.randn(num_q_heads, dtype=torch.float64).to(dtype).to(device) * 3
        options["sinks"] = rng.choice([None, None, sinks])
    thresholds = THRESHOLDS[seed // len(SHAPES) % len(THRESHOLDS)]
    max_scores = rng.choice(MAX_SCORES)
    monkeypatch.setattr(plan_module, "RUN_TOKENS", thresholds[0])
    monkeypatch.setattr(plan_module, "FOLD_TOKENS", thresholds[1])
    monkeypatch.setattr(torch_backend, "MAX_SCORES", max_scores)
    plan = build_plan(grown.shadow.tree, grown.counts, grown.num_new)
    return Case(
        grown,
        plan,
        storage,
        num_layers - 1,
        keys,
        values,
        q,
        options,
        thresholds,
        max_scores,
    )


def attend(case: Case, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    arguments = (case.q, case.storage, case.layer, case.plan)
    return run_tree_attention(*arguments, backend=backend, **case.options)


def branch_by_branch(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense attention of each row over its list of tokens, knowing nothing of blocks and plans."""
    q, options = case.q.double(), case.options
    window, softcap, sinks = (options.get(name) for name in ("window", "softcap", "sinks"))
    num_rows, num_q_heads, num_new, _ = q.shape
    out = q.new_zeros(num_rows, num_q_heads, num_new, case.values.shape[-1])
    lse = q.new_full((num_rows, num_q_heads, num_new), -math.inf)
    for row, branch in enumerate(case.grown.shadow.rows):
        tokens = torch.tensor(case.grown.shadow.tokens[branch], dtype=torch.int64)
        length, count = len(tokens), case.grown.counts[row]
        if not count:
            continue
        # Query head h reads K/V head h // group.
        heads = torch.arange(num_q_heads) // (num_q_heads // case.keys.shape[1])
        k = case.keys[tokens].double()[:, heads].transpose(0, 1)
        v = case.values[tokens].double()[:, heads].transpose(0, 1)
        scores = q[row, :, num_new - count :] @ k.transpose(1, 2) * options["scale"]
        if softcap is not None:
            scores = (scores / softcap).tanh() * softcap
        query = torch.arange(length - count, length)[:, None]
        key = torch.arange(length)[None]
        visible = key <= query
        if window is not None and window.kind == "sliding":
            visible &= query - key < window.size
        elif window is not None:
            visible &= query // window.size == key // window.size
        scores = scores.masked_fill(~visible.to(scores.device), -math.inf)
        if sinks is not None:
            sink = sinks.double()[:, None, None].expand(-1, count, 1)
            scores = torch.cat([scores, sink], 2)
        weights = torch.softmax(scores, 2)[:, :, :length]
        out[row, :, num_new - count :] = weights @ v
        lse[row, :, num_new - count :] = scores.logsumexp(2)
    return out, lse


def check_same(
    got: tuple[torch.Tensor, torch.Tensor],
    want: tuple[torch.Tensor, torch.Tensor],
    tolerance: float,
) -> None:
    """``out`` and ``lse`` agree, relative to the size of ``out`` where that exceeds 1."""
    scale = max(1.0, float(want[0].abs().max()) if want[0].numel() else 0.0)
    torch.testing.assert_close(
        got[0].double() / scale, want[0].double() / scale, rtol=tolerance, atol=tolerance
    )
    torch.testing.assert_close(
        got[1].double(),
        want[1].double(),
        rtol=max(tolerance, LSE_TOLERANCE),
        atol=max(tolerance, LSE_TOLERANCE),
    )


def trees(seeds: range) -> Any:
    return pytest.mark.parametrize(
        "seed",
        [pytest.param(seed, id=f"{SHAPES[seed % len(SHAPES)]}, tree {seed}") for seed in seeds],
    )


@trees(range(SEEDS))
def test_the_reference_agrees_with_dense_attention_branch_by_branch(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(monkeypatch, seed)
    out, lse = attend(case, "reference")
    want_out, want_lse = branch_by_branch(case)
    assert out.dtype == case.q.dtype and lse.dtype == torch.float32
    torch.testing.assert_close(out, want_out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-6, atol=1e-6)


@trees(range(0, SEEDS, 3))
def test_the_reference_agrees_with_scaled_dot_product_attention(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(monkeypatch, seed, plain=True)
    out, _ = attend(case, "reference")
    shadow, num_new = case.grown.shadow, case.grown.num_new
    for row, count in enumerate(case.grown.counts):
        tokens = shadow.tokens[shadow.rows[row]]
        k, v = (x[tokens].transpose(0, 1)[None] for x in (case.keys, case.values))
        visible = torch.ones(count, len(tokens), dtype=torch.bool).tril(len(tokens) - count)
        want = torch.nn.functional.scaled_dot_product_attention(
            case.q[row : row + 1, :, num_new - count :],
            k,
            v,
            attn_mask=visible,
            scale=case.options["scale"],
            enable_gqa=True,
        )
        got = out[row : row + 1, :, num_new - count :]
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@trees(range(SEEDS))
def test_the_torch_backend_agrees_in_float64(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(monkeypatch, seed)
    got = attend(case, "torch")
    assert got[0].dtype == torch.float64 and got[1].dtype == torch.float32
    check_same(got, attend(case, "reference"), TOLERANCES[torch.float64])


@trees(range(SEEDS))
@pytest.mark.parametrize("threads", [3, 8])
def test_the_torch_backend_agrees_in_pieces(
    seed: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_backend, "STRETCH_TOKENS", 1 + seed % 9)
    monkeypatch.setattr(torch_backend, "PIECE_TOKENS", 1 + seed % 3)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    case = make_case(monkeypatch, seed)
    check_same(attend(case, "torch"), attend(case, "reference"), TOLERANCES[torch.float64])


@pytest.mark.parametrize("pieces", [2, 3, 5, 8])
@pytest.mark.parametrize("length", [8, 9, 13, 40, 41])
def test_pieces_for_threads_hold_every_token_once(length: int, pieces: int) -> None:
    tokens = torch.arange(length).expand(2, length).T[None].transpose(1, 2)[..., None]
    cut = torch_backend._overlapping(tokens, pieces)
    assert cut.shape[:2] == (pieces, 2) and cut.shape[2] < length
    step = cut.stride(0) // cut.stride(2)
    again = torch_backend._find_again(pieces, cut.shape[2], step)
    for head in range(2):
        assert cut[:, head, :, 0][~again.keys[:, 0, 0]].tolist() == list(range(length))


@pytest.mark.parametrize(
    ("heads", "queries", "num_tokens", "threads", "pieces"),
    [
        (3, 3, 10_000, 2, 2),
        (4, 3, 10_000, 2, 1),
        (3, 33, 10_000, 2, 1),
        (3, 3, 10_000, 8, 8),
        (3, 3, 3_000, 8, 2),
        (2, 3, 900, 8, 1),
    ],
)
def test_in_how_many_pieces_a_row_is_read(
    heads: int,
    queries: int,
    num_tokens: int,
    threads: int,
    pieces: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert torch_backend._count_pieces(heads, queries, num_tokens) == pieces


@trees(range(SEEDS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_torch_backend_agrees_in_lower_precision(
    seed: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(monkeypatch, seed, dtype)
    got = attend(case, "torch")
    assert got[0].dtype == dtype and got[1].dtype == torch.float32
    check_same(got, attend(case, "reference"), TOLERANCES[dtype])


@pytest.mark.gpu
@trees(range(0, SEEDS, 2))
@pytest.mark.parametrize("dtype", TOLERANCES, ids=["fp64", "fp32", "bf16"])
def test_the_torch_backend_agrees_on_a_gpu(
    seed: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(monkeypatch, seed, dtype, "cuda")
    check_same(attend(case, "torch"), attend(case, "reference"), TOLERANCES[dtype])


@pytest.mark.gpu
def test_layers_on_two_devices_share_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(16):
        case = make_case(monkeypatch, seed)
        other = make_case(monkeypatch, seed, device="cuda")
        for each in (case, replace(other, plan=case.plan), case):
            check_same(attend(each, "torch"), attend(each, "reference"), 1e-10)


def test_the_random_cases_are_what_they_should_be(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, set[Any]] = {}
    for seed in range(SEEDS):
        case = make_case(monkeypatch, seed)
        spec, options = case.storage.spec, case.options
        for feature, value in {
            "group": case.q.shape[1] // spec.num_kv_heads,
            "head dim": spec.k_head_dim,
            "equal head dims": spec.k_head_dim == spec.v_head_dim,
            "window": options["window"],
            "softcap": options["softcap"] is not None,
            "sinks": options["sinks"] is not None,
            "T": case.grown.num_new,
            "runs": bool(case.plan.runs),
            "runs and columns without tokens": bool(case.plan.runs)
            and min(case.plan.counts) < case.plan.num_new,
            "tails": case.plan.max_tail > 1,
            "a tail without tokens": 0 in map(len, case.plan.tail_blocks),
            "pieces": case.max_scores,
            "several slabs": case.storage.num_blocks > case.storage.slab_blocks,
        }.items():
            seen.setdefault(feature, set()).add(value)
    assert seen.pop("group") == {1, 4, 7}
    assert seen.pop("head dim") == {8, 16, 20}
    assert seen.pop("window") == set(WINDOWS)
    assert seen.pop("T") == {1, 2, 5, 17}
    assert seen.pop("pieces") == set(MAX_SCORES)
    assert all(values == {False, True} for values in seen.values()), seen


def grow_by_one(case: Case, last: TreeAttentionPlan | None) -> Case:
    """The next forward, one token a row, over a storage that is filled anew."""
    shadow = case.grown.shadow
    counts = [1] * len(shadow.rows)
    shadow.append(counts)
    slab_blocks = case.storage.slab_blocks
    storage, keys, values = fill(shadow, case.storage.spec, slab_blocks=slab_blocks)
    return replace(
        case,
        grown=Grown(shadow, counts, 1),
        plan=build_plan(shadow.tree, counts, 1, last),
        storage=storage,
        layer=0,
        keys=keys,
        values=values,
        q=torch.randn_like(case.q[:, :, :1]),
    )


@trees(range(0, SEEDS, 7))
def test_a_plan_kept_over_growth_gives_the_same_attention(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(monkeypatch, seed)
    for _ in range(3):
        attend(case, "torch")
        case = grow_by_one(case, case.plan)
        check_same(attend(case, "torch"), branch_by_branch(case), 1e-10)


def test_a_kept_plan_keeps_the_indices_of_its_runs_and_no_mask(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = make_case(monkeypatch, 1, plain=True)
    monkeypatch.setattr(plan_module, "FOLD_TOKENS", 1)
    monkeypatch.setattr(plan_module, "RUN_TOKENS", 512)
    plan = None
    for kept in (False, True, True):
        case = grow_by_one(case, plan)
        plan = case.plan
        assert plan.runs
        assert len(plan.scratch) == (len(plan.runs) if kept else 0)
        check_same(attend(case, "torch"), branch_by_branch(case), 1e-10)
        assert len(plan.scratch) > len(plan.runs)


@pytest.mark.parametrize("kind", ["sliding", "chunked"])
def test_a_run_beyond_every_window_is_not_read(kind: Any) -> None:
    shadow = ShadowTree(4)
    shadow.add_rows(1)
    shadow.append([128])
    shadow.select([0] * 3)
    shadow.append([20, 17, 18])
    counts = [2, 2, 2]
    shadow.append(counts)
    plan = build_plan(shadow.tree, counts, 2)
    (run,) = plan.runs
    spec = KVSpec(1, 8, 8, torch.float64, torch.device("cpu"))
    storage, _, _ = fill(shadow, spec)
    q = torch.randn(3, 4, 2, 8, dtype=torch.float64)
    options = {"scale": 0.5, "window": Window(kind, 16)}
    want = tree_attention_reference(q, storage, 0, plan, **options)
    storage.release(run.blocks)
    check_same(tree_attention_torch(q, storage, 0, plan, **options), want, 1e-10)


def test_layers_of_different_heads_and_windows_share_a_plan(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for seed in range(16):
        case = make_case(monkeypatch, seed)
        monkeypatch.setattr(torch_backend, "MAX_SCORES", 3000)
        for num_kv_heads, group in [(1, 4), (3, 4), (1, 4), (2, 1)]:
            spec = replace(case.storage.spec, num_kv_heads=num_kv_heads)
            storage, keys, values = fill(
                case.grown.shadow, spec, slab_blocks=case.storage.slab_blocks
            )
            shape = (*case.q.shape[:1], num_kv_heads * group, *case.q.shape[2:])
            for window in (None, Window("sliding", 5), Window("chunked", 7)):
                layer = replace(
                    case,
                    storage=storage,
                    layer=0,
                    keys=keys,
                    values=values,
                    q=torch.randn(shape, dtype=torch.float64),
                    options={"scale": 0.5, "window": window},
                )
                check_same(attend(layer, "torch"), branch_by_branch(layer), 1e-10)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_columns_before_the_new_tokens_are_zero_whatever_their_queries(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = 0
    for seed in range(64):
        case = make_case(monkeypatch, seed)
        for row, count in enumerate(case.grown.counts):
            case.q[row, :, : case.grown.num_new - count] = math.nan
            found += bool(count < case.grown.num_new and case.plan.runs)
        out, lse = attend(case, backend)
        for row, count in enumerate(case.grown.counts):
            unused = slice(case.grown.num_new - count)
            assert bool((out[row, :, unused] == 0).all())
            assert bool((lse[row, :, unused] == -math.inf).all())
        check_same((out, lse), branch_by_branch(case), 1e-10)
    assert found


@pytest.mark.parametrize("magnitude", [1e3, 1e5], ids="scores of about {:.0e}".format)
def test_large_scores_stay_finite(magnitude: float, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(32):
        case = make_case(monkeypatch, seed, torch.float32, plain=True)
        case.options["scale"] = magnitude
        out, lse = attend(case, "torch")
        assert bool(out.isfinite().all())
        assert not bool(lse.isnan().any())


def test_arguments_are_left_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(32):
        case = make_case(monkeypatch, seed)
        before = [x.clone() for x in (case.q, *case.storage._k_slabs, *case.storage._v_slabs)]
        attend(case, "torch")
        after = [case.q, *case.storage._k_slabs, *case.storage._v_slabs]
        for was, now in zip(before, after, strict=True):
            torch.testing.assert_close(now, was, rtol=0, atol=0, equal_nan=True)


def test_a_backend_is_chosen_by_argument_then_environment_then_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(BACKEND_VARIABLE, raising=False)
    assert choose_backend("reference") == "reference"
    assert choose_backend() in BACKENDS
    monkeypatch.setenv(BACKEND_VARIABLE, "reference")
    assert choose_backend() == "reference"
    assert choose_backend("torch") == "torch"


def test_an_unknown_backend_is_refused_with_the_ones_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(InvalidArgument, match=r"'fast' is unknown; choose from .*reference"):
        choose_backend("fast")
    monkeypatch.setenv(BACKEND_VARIABLE, "faster")
    with pytest.raises(InvalidArgument, match="'faster' is unknown"):
        choose_backend()


@pytest.mark.parametrize(
    ("name", "function"),
    [("torch", tree_attention_torch), ("reference", tree_attention_reference)],
    ids=["torch", "reference"],
)
def test_one_entry_runs_every_backend(
    name: str, function: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(monkeypatch, 3)
    arguments = (case.q, case.storage, case.layer, case.plan)
    got = run_tree_attention(*arguments, backend=name, **case.options)
    for ours, theirs in zip(got, function(*arguments, **case.options), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
