"""What kernels of a decode step are off by, and how often they are launched; for several tests."""

from __future__ import annotations

import sys

import pytest
import torch
from models import build

pytest.importorskip("triton")

from hf_tree_cache.forward import small
from hf_tree_cache.forward.linear import ACTIVATIONS
from hf_tree_cache.forward.rotary import HALVES, Rotation, Turn, make_rotary, make_rotary_of_one
from hf_tree_cache.forward.small import Activated, Sum, activate, gated_product, make_norm, rms_norm
from hf_tree_cache.integration.linears import DecodeLinears
from hf_tree_cache.integration.pending import Pending
from hf_tree_cache.integration.small_steps import SmallSteps
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


def error_of_gated(got, x, gate, up, activation="silu"):
    want = activate(x.double() @ gate.double().T, activation) * (x.double() @ up.double().T)
    return float((got.double() - want).norm() / want.norm())


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
