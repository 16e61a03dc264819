"""A tiny llama, forwards behind a cache, and failures, for tests of what users do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from models import model
from transformers import PreTrainedModel

from hf_tree_cache import TreeCache, enable_tree_attention

TOLERANCE = 1e-4
HYBRIDS = ["qwen3_next", "falcon_h1", "jamba"]
"""Models with linear attention."""


@pytest.fixture(params=["tree attention", "stock attention"])
def llama(request: pytest.FixtureRequest) -> Iterator[PreTrainedModel]:
    """A tiny llama, once with tree attention and once without."""
    enabled = request.param == "tree attention"
    with enable_tree_attention(model("llama")) if enabled else nullcontext():
        yield model("llama")


@pytest.fixture(params=[True, False], ids=["tree attention", "stock attention"])
def tree(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture
def tree_llama() -> Iterator[PreTrainedModel]:
    with enable_tree_attention(model("llama")):
        yield model("llama")


def tree_cache(**options: Any) -> TreeCache:
    return TreeCache(**{"block_size": 4, "poison": True, **options})


def positions(mask: torch.Tensor, num_new: int) -> torch.Tensor:
    return (mask.cumsum(1) - 1).clamp_min(0)[:, -num_new:]


@torch.no_grad()
def forward(
    model: PreTrainedModel, cache: Any, ids: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Logits of ``ids`` behind what ``cache`` holds; ``mask`` covers both."""
    if mask is None:
        past = 0 if cache is None else cache.get_seq_length()
        mask = torch.ones(len(ids), past + ids.shape[1], dtype=torch.int64)
    return model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions(mask, ids.shape[1]),
        past_key_values=cache,
        use_cache=cache is not None,
    ).logits


def prefill(model: PreTrainedModel, cache: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return forward(model, cache, inputs["input_ids"], inputs["attention_mask"])


def assert_continues(
    model: PreTrainedModel, cache: TreeCache, ids: torch.Tensor, mask: torch.Tensor | None = None
) -> None:
    """``cache`` holds ``ids``: three tokens more, and then one, give the logits of all at once.

    Leaves these four tokens in the cache. transformers' jamba is wrong where several tokens meet a
    past, whatever the cache, so it goes one by one.
    """
    cache.check_integrity()
    assert cache.get_seq_length() == ids.shape[1]
    more = torch.randint(3, 90, (len(ids), 4), generator=torch.Generator().manual_seed(11))
    mask = torch.ones_like(ids) if mask is None else mask
    mask = torch.cat([mask, torch.ones_like(more)], 1)
    whole = forward(model, None, torch.cat([ids, more], 1), mask)
    sizes, got, end = ([1] * 4 if model.config.model_type == "jamba" else [3, 1]), [], 0
    for size in sizes:
        end += size
        seen = mask[:, : ids.shape[1] + end]
        got.append(forward(model, cache, more[:, end - size : end], seen))
    cache.check_integrity()
    got = torch.cat(got, 1)
    torch.testing.assert_close(got, whole[:, -4:], rtol=0, atol=TOLERANCE)


def extended(output: Any, inputs: dict[str, torch.Tensor], count: int = 5) -> dict[str, Any]:
    """The conversation so far with ``count`` new tokens of the user, and its mask."""
    rows = len(output.sequences)
    new = torch.randint(3, 90, (rows, count), generator=torch.Generator().manual_seed(3))
    ids = torch.cat([output.sequences, new], 1)
    mask = inputs["attention_mask"].repeat_interleave(rows // len(inputs["attention_mask"]), 0)
    mask = torch.cat([mask, mask.new_ones(rows, ids.shape[1] - mask.shape[1])], 1)
    return {"input_ids": ids, "attention_mask": mask}


class Broken(RuntimeError):
    pass


class FailsOnce:
    """Makes a module fail at one of its calls."""

    def __init__(self, module: torch.nn.Module, call: int) -> None:
        self.left = call
        self.handle = module.register_forward_pre_hook(self)

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        self.left -= 1
        if self.left == 0:
            raise Broken

    def __enter__(self) -> FailsOnce:
        return self

    def __exit__(self, *error: object) -> None:
        self.handle.remove()


class Eager:
    """In the place of CUDA graphs: takes the place of the model's forward, and captures nothing."""

    stats = None

    def run(self, forward: Any, kwargs: dict[str, Any]) -> None:
        return None

    def close(self) -> None:
        pass
