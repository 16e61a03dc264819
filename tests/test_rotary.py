"""Rotary embeddings of a decode step, and the norms that are computed with them."""

from __future__ import annotations

import pytest
import torch
from models import build

pytest.importorskip("triton")

from forward_errors import FORMS, turns_found

from hf_tree_cache.forward import small
from hf_tree_cache.forward.rotary import HALVES, Rotation, Turn
from hf_tree_cache.integration.pending import Pending
from hf_tree_cache.integration.small_steps import SmallSteps


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
