"""Sparse experts in stock generate: which products they keep while it decodes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from models import assert_same, build, generate, one_thread, prompts
from transformers import DynamicCache, GenerationMixin, PreTrainedModel

from hf_tree_cache import TreeCache, enable_tree_attention
from hf_tree_cache.integration import experts

__all__ = ["one_thread"]  # a fixture for all of this file

SAMPLING = {"do_sample": True, "num_return_sequences": 3}


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[PreTrainedModel]:
    """The models that transformers prepared for decoding, with experts as if on a GPU."""
    models: list[PreTrainedModel] = []

    @contextmanager
    def prepare(self: PreTrainedModel) -> Iterator[None]:
        models.append(self)
        yield

    monkeypatch.setattr(GenerationMixin, "_optimize_model_for_decode", prepare)
    monkeypatch.setattr(experts, "_is_served", lambda weight: True)
    return models


@pytest.mark.core
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_rows_of_a_tree_keep_grouped_products(name: str, prepared: list[PreTrainedModel]) -> None:
    model = build(name)
    assert set(model.get_experts_implementation().values()) == {"grouped_mm"}
    theirs = generate(model, prompts(name), **SAMPLING)
    prepared.clear()
    with enable_tree_attention(model):
        ours = generate(model, prompts(name), past_key_values=TreeCache(), **SAMPLING)
    assert_same(ours, theirs)
    assert not prepared
    assert "_optimize_model_for_decode" not in vars(model)
    generate(model, prompts(name), **SAMPLING)
    assert prepared == [model]


@pytest.mark.core
@pytest.mark.parametrize(
    ("name", "options", "implementation"),
    [
        ("qwen3_moe", {"num_rows": 1}, "grouped_mm"),
        ("qwen3_moe", {"past_key_values": DynamicCache}, "grouped_mm"),
        ("qwen3_moe", {}, "eager"),
        ("llama", {}, None),
    ],
    ids=["one row", "another cache", "another implementation", "no experts"],
)
def test_all_else_is_left_to_transformers(
    name: str,
    options: dict[str, Any],
    implementation: str | None,
    prepared: list[PreTrainedModel],
) -> None:
    model = build(name)
    if implementation is not None:
        model.set_experts_implementation(implementation)
    inputs = prompts(name, num_rows=options.pop("num_rows", 2))
    with enable_tree_attention(model):
        # The rows of an earlier call must not count.
        generate(model, prompts(name), past_key_values=TreeCache())
        prepared.clear()
        generate(model, inputs, past_key_values=options.pop("past_key_values", TreeCache)())
    assert prepared == [model]


@pytest.mark.core
def test_float32_and_cpus_have_no_such_products() -> None:
    assert not experts._is_served(torch.zeros(1, dtype=torch.bfloat16))
    assert not experts._are_grouped_on_device(build("qwen3_moe"))
    assert len(list(experts._expert_weights(build("qwen3_moe")))) == 2


@pytest.mark.gpu
def test_grouped_products_are_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    changes: list[Any] = []
    change = PreTrainedModel.set_experts_implementation

    def record(model: PreTrainedModel, name: Any) -> None:
        changes.append(name)
        change(model, name)

    monkeypatch.setattr(PreTrainedModel, "set_experts_implementation", record)
    model = build("qwen3_moe", torch.bfloat16).cuda()
    inputs = {key: value.cuda() for key, value in prompts("qwen3_moe").items()}
    options = {**SAMPLING, "max_new_tokens": 24}
    with enable_tree_attention(model, cuda_graphs=False):
        off = generate(model, inputs, past_key_values=TreeCache(), **options)
    with enable_tree_attention(model, cuda_graphs=True) as handle:
        on = generate(model, inputs, past_key_values=TreeCache(), **options)
    assert not changes
    assert handle.graphs is not None and handle.graphs.replayed > 10, handle.graphs
    first = [torch.stack(run.logits)[:2] for run in (on, off)]
    torch.testing.assert_close(*first, rtol=0, atol=0.1)
    generate(model, inputs, **options)
    assert len(changes) == 2, "transformers no longer does what is undone here"
