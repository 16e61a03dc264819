"""The two products of attention that a model does by itself, over blocks in place."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from models import build, generate, model, one_thread, prompts
from torch.nn.functional import scaled_dot_product_attention
from trees import SHAPES, fill, grow_randomly

from hf_tree_cache import TreeCache, UnsupportedModel, enable_tree_attention
from hf_tree_cache.attention.plan import build_plan
from hf_tree_cache.attention.products import times_keys, times_values
from hf_tree_cache.integration.operands import Operand
from hf_tree_cache.memory.storage import KVSpec

__all__ = ["one_thread"]  # a fixture for all of this file


@pytest.mark.parametrize("num_new", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_those_of_left_padded_tensors(shape: str, num_new: int) -> None:
    torch.manual_seed(1)
    grown = grow_randomly(random.Random(5), shape, 4, num_new, scale=30)
    tree = grown.shadow.tree
    spec = KVSpec(3, 8, 5, torch.float32, torch.device("cpu"))
    storage, k, v = fill(grown.shadow, spec)
    plan = build_plan(tree, grown.counts, num_new)
    columns = max(plan.lengths) + 2
    dense_k, dense_v = (torch.zeros(plan.num_rows, 3, columns, d) for d in (8, 5))
    for row, branch in enumerate(grown.shadow.rows):
        tokens = grown.shadow.tokens[branch]
        if tokens:
            dense_k[row, :, -len(tokens) :] = k[tokens].transpose(0, 1)
            dense_v[row, :, -len(tokens) :] = v[tokens].transpose(0, 1)
    q = torch.randn(plan.num_rows, 3, num_new, 8)
    scores = times_keys(q, storage, 0, plan, columns)
    torch.testing.assert_close(scores, q @ dense_k.transpose(2, 3), rtol=0, atol=1e-5)
    weights = torch.randn(plan.num_rows, 3, num_new, columns)
    out = times_values(weights, storage, 0, plan)
    torch.testing.assert_close(out, weights @ dense_v, rtol=0, atol=1e-4)


@pytest.fixture
def handles() -> tuple[Any, Any, torch.Tensor, torch.Tensor, TreeCache]:
    """Handles of K and V of three rows of 70 tokens and one more, and the same as tensors."""
    torch.manual_seed(2)
    cache = TreeCache(poison=True)
    cache.update(torch.randn(1, 2, 70, 8), torch.randn(1, 2, 70, 8), 0)
    cache.batch_repeat_interleave(3)
    k, v = cache.update(torch.randn(3, 2, 1, 8), torch.randn(3, 2, 1, 8), 0)
    return k, v, cache.layers[0].keys, cache.layers[0].values, cache


Q, W = torch.randn(3, 2, 1, 8), torch.randn(3, 2, 1, 71)
MASK = torch.randn(3, 1, 1, 71) > 0
FLAT_Q, FLAT_W, BIAS = Q.flatten(0, 1), W.flatten(0, 1), torch.randn(6, 1, 71)

IN_PLACE = {
    "scores": lambda k, v: torch.matmul(Q, k.transpose(-1, -2)),
    "scores by operator": lambda k, v: Q @ k.transpose(2, 3),
    "scores of a cast": lambda k, v: torch.matmul(
        Q.double(), k.to(torch.float64).transpose(-1, -2)
    ),
    "values": lambda k, v: torch.matmul(W, v),
    "flat scores": lambda k, v: torch.bmm(FLAT_Q, k.reshape(6, -1, 8).transpose(1, 2)),
    "flat values": lambda k, v: torch.bmm(FLAT_W, v.view(6, 71, 8)),
    "scores and a bias": lambda k, v: torch.baddbmm(
        BIAS, FLAT_Q, k.reshape((6, -1, 8)).transpose(1, 2), beta=0.5, alpha=2.0
    ),
    "a bias and scores": lambda k, v: BIAS.baddbmm(
        batch1=FLAT_Q, batch2=k.reshape(6, -1, 8).transpose(-1, -2), beta=2.0, alpha=0.5
    ),
    "torch's attention": lambda k, v: scaled_dot_product_attention(
        Q, k, v, attn_mask=BIAS[:3, None] > 0
    ),
}
FROM_DENSE = {
    "keys that are not turned": lambda k, v: torch.matmul(W, k),
    "values that are turned": lambda k, v: torch.matmul(Q, v.transpose(2, 3)),
    "another dtype": lambda k, v: torch.matmul(Q.double(), k.double().transpose(2, 3)),
    "one row for all": lambda k, v: torch.matmul(Q[:1], k.transpose(2, 3)),
    "other dimensions": lambda k, v: k.transpose(1, 2).sum(1),
    "another shape": lambda k, v: v.reshape(3, -1).sum(1),
    "more queries": lambda k, v: scaled_dot_product_attention(Q.expand(3, 2, 4, 8), k, v),
    "a gradient": lambda k, v: torch.matmul(Q.clone().requires_grad_(), k.transpose(2, 3)).detach(),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_read_in_place(name: str, handles: Any) -> None:
    k, v, dense_k, dense_v, cache = handles
    got, want = IN_PLACE[name](k, v), IN_PLACE[name](dense_k, dense_v)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert not cache.dense_reads


@pytest.mark.parametrize("name", FROM_DENSE)
def test_read_from_a_dense_copy(name: str, handles: Any) -> None:
    k, v, dense_k, dense_v, cache = handles
    got, want = FROM_DENSE[name](k, v), FROM_DENSE[name](dense_k, dense_v)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert cache.dense_reads


def test_one_head_serves_all_queries() -> None:
    """Multi-query attention, as Falcon's."""
    torch.manual_seed(3)
    cache = TreeCache(poison=True)
    cache.update(torch.randn(1, 1, 70, 8), torch.randn(1, 1, 70, 8), 0)
    cache.batch_repeat_interleave(3)
    k, v = cache.update(torch.randn(3, 1, 1, 8), torch.randn(3, 1, 1, 8), 0)
    q = torch.randn(3, 4, 1, 8)
    got, flat = scaled_dot_product_attention(q, k, v), torch.matmul(q, k.transpose(2, 3))
    dense_k, dense_v = cache.layers[0].keys, cache.layers[0].values
    want = scaled_dot_product_attention(q, dense_k, dense_v)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(flat, q @ dense_k.transpose(2, 3))
    assert not cache.dense_reads


def test_an_operand_says_what_it_is(handles: Any) -> None:
    k, _, dense_k, _, _ = handles
    for operand, dense in (
        (k.transpose(-1, -2), dense_k.transpose(-1, -2)),
        (k.reshape(6, -1, 8), dense_k.reshape(6, -1, 8)),
        (k.reshape(6, -1, 8).transpose(1, 2).contiguous(), dense_k.flatten(0, 1).transpose(1, 2)),
    ):
        assert isinstance(operand, Operand)
        assert operand.shape == dense.shape and operand.size(-1) == dense.size(-1)
        assert (operand.ndim, operand.device) == (dense.ndim, dense.device)
        assert torch.equal(operand.dense(), dense)


def test_no_gradient_is_lost_in_silence() -> None:
    cache = TreeCache()
    cache.update(torch.randn(1, 2, 40, 8), torch.randn(1, 2, 40, 8), 0)
    new = torch.randn(1, 2, 1, 8, requires_grad=True)
    k, _ = cache.update(new, new, 0)
    scores = torch.matmul(torch.randn(1, 2, 1, 8), k.transpose(2, 3))
    with pytest.raises(UnsupportedModel, match="backward through a TreeCache"):
        scores.sum().backward()


@pytest.mark.parametrize("name", ["bloom", "gptj", "falcon"])
def test_bfloat16_and_a_branching_cache(name: str) -> None:
    """Half precision goes through the same products, and nothing is read densely."""
    half = build(name, torch.bfloat16)
    inputs = prompts(name)
    with enable_tree_attention(half):
        cache = TreeCache(poison=True)
        ours = generate(half, inputs, past_key_values=cache, do_sample=True, num_return_sequences=3)
    assert not cache.dense_reads
    theirs = generate(half, inputs, do_sample=True, num_return_sequences=3)
    noise = (
        (
            theirs.logits[0]
            - generate(model(name), inputs, max_new_tokens=1).logits[0].repeat_interleave(3, 0)
        )
        .abs()
        .max()
    )
    torch.testing.assert_close(ours.logits[1], theirs.logits[1], rtol=0, atol=4 * float(noise))
