"""`generate` that looks for ends a token late: as transformers does on Apple's GPUs, and as enabled
models do on others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import build, prompts
from torch import distributed
from transformers import DynamicCache, LogitsProcessor, StoppingCriteria
from transformers.generation import utils as stock
from transformers.generation.streamers import BaseStreamer

from hf_tree_cache import TreeCache, enable_tree_attention

pytestmark = pytest.mark.skipif(
    not hasattr(stock, "DeferredStopCheck"), reason="transformers looks for ends at once"
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class NoEvent:
    """What a CPU has in the place of events: nothing is ever under way."""

    def __init__(self, **options: Any) -> None:
        pass

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


@pytest.fixture
def apple(monkeypatch):
    """Has every device treated as one of Apple's from here on; counts the loops."""
    loops = []

    def is_supported(device, cache, cache_is_returned, is_assistant):
        loops.append(cache)
        return not is_assistant and cache.is_croppable

    def use():
        monkeypatch.setattr(stock.DeferredStopCheck, "is_supported", staticmethod(is_supported))
        monkeypatch.setattr(torch, "Event", NoEvent)
        return loops

    return use


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    """One that works ahead of the host, or passes for it."""
    if request.param == "cpu":
        monkeypatch.setattr("hf_tree_cache.integration.late_ends.LATE_ON", ("cuda", "cpu"))
        monkeypatch.setattr(torch, "Event", NoEvent)
    return request.param


def run(model, inputs, cache, **options):
    torch.manual_seed(3)
    defaults = {
        "max_new_tokens": 30,
        "do_sample": True,
        "num_return_sequences": 2,
        "eos_token_id": list(range(3, 24)),
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    return model.generate(**inputs, past_key_values=cache, **{**defaults, **options})


def state(cache):
    return cache.tree.row_lengths(), cache.get_seq_length(), cache.tree.allocator.num_used


def draw(device):
    """The next random number there."""
    return torch.rand(1, device=device).item()


def prompts_on(device, name="llama"):
    return {key: value.to(device) for key, value in prompts(name).items()}


def count_forwards(model):
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("enabled", [True, False], ids=["tree attention", "plain"])
@pytest.mark.parametrize(
    ("name", "backtrack"), [("llama", 256), ("mistral", 256), ("mistral", 0), ("gemma2", 256)]
)
def test_on_apples_gpus_tokens_and_cache_are_the_same(name, backtrack, enabled, apple):
    model, inputs = build(name), prompts(name)
    handle = enable_tree_attention(model) if enabled else None
    dense = run(model, inputs, DynamicCache())
    caches = [TreeCache(poison=True, block_size=4, backtrack=backtrack) for _ in range(2)]
    at_once = run(model, inputs, caches[0])
    loops = apple()
    afterwards = run(model, inputs, caches[1])
    assert loops == [caches[1]]
    columns = at_once.sequences.shape[1]
    assert columns < inputs["input_ids"].shape[1] + 30  # all rows ended by themselves
    for out in (at_once, afterwards):
        assert out.sequences.tolist() == dense.sequences.tolist()
        assert (torch.stack(out.logits) - torch.stack(dense.logits)).abs().max() < 1e-4
    assert state(caches[0]) == state(caches[1])
    # Both go on.
    more = {"input_ids": at_once.sequences}
    turns = [run(model, more, cache, num_return_sequences=1, eos_token_id=None) for cache in caches]
    assert turns[0].sequences.tolist() == turns[1].sequences.tolist()
    for cache in caches:
        cache.check_integrity()
    if handle is not None:
        handle.disable()


@pytest.mark.parametrize("do_sample", [True, False])
@pytest.mark.parametrize("name", ["llama", "gemma2", "deepseek_v3"])
def test_enabled_models_do_so_and_nobody_can_tell(name, do_sample, device):
    model, inputs = build(name).to(device), prompts_on(device, name)
    forwards = count_forwards(model)
    options = {"do_sample": do_sample, "num_return_sequences": 2 if do_sample else 1}
    if not do_sample:
        first = run(model, inputs, DynamicCache(), **options, eos_token_id=None).sequences
        options["eos_token_id"] = first[:, -12].tolist()
    forwards.clear()
    dense = run(model, inputs, DynamicCache(), **options)
    on_time, next_number = len(forwards), draw(device)
    columns = inputs["input_ids"].shape[1]
    assert columns + on_time == dense.sequences.shape[1] < columns + 30  # all rows ended
    caches = [TreeCache(block_size=4), TreeCache(block_size=4, max_blocks=1 << 10)]
    with enable_tree_attention(model):
        for cache, late in zip(caches, (1, 0), strict=True):  # never with a bound
            forwards.clear()
            out = run(model, inputs, cache, **options)
            assert len(forwards) == on_time + late
            assert draw(device) == next_number
            assert out.sequences.tolist() == dense.sequences.tolist()
            assert len(out.logits) == len(dense.logits)
            assert (torch.stack(out.logits) - torch.stack(dense.logits)).abs().max() < 1e-4
            cache.check_integrity()
        assert state(caches[0]) == state(caches[1])
        more = {"input_ids": out.sequences}
        options = {"num_return_sequences": 1, "eos_token_id": None}
        turns = [run(model, more, cache, **options).sequences.tolist() for cache in caches]
        assert turns[0] == turns[1]


class Nothing(LogitsProcessor):
    """Code of the caller, which might count how often it is called."""

    def __call__(self, input_ids, scores):
        return scores


class Never(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


REASONS = {
    "none": {},
    "a processor": {"logits_processor": [Nothing()]},
    "a criterion": {"stopping_criteria": [Never()]},
    "a constraint": {"prefix_allowed_tokens_fn": lambda row, ids: list(range(40))},
}


@pytest.mark.parametrize("reason", [*REASONS, "a bound", "another process", "another cache"])
def test_on_time_where_somebody_could_tell(reason, device, monkeypatch):
    model, inputs = build("llama").to(device), prompts_on(device)
    forwards = count_forwards(model)
    bound = 1 << 10 if reason == "a bound" else None
    cache = DynamicCache() if reason == "another cache" else TreeCache(max_blocks=bound)
    if reason == "another process":
        monkeypatch.setattr(distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(distributed, "get_world_size", lambda *_: 2)
    with enable_tree_attention(model):
        out = run(model, inputs, cache, **REASONS.get(reason, {}))
        late = len(forwards) - (out.sequences.shape[1] - inputs["input_ids"].shape[1])
        assert late == (reason == "none")
        if reason in REASONS:  # it stands in the way of that call only
            forwards.clear()
            out = run(model, inputs, TreeCache())
            columns = inputs["input_ids"].shape[1]
            assert len(forwards) == out.sequences.shape[1] - columns + 1


def test_a_streamer_is_given_the_tokens_and_no_more(device):
    class Seen(BaseStreamer):
        def __init__(self):
            self.tokens, self.ended = [], 0

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended += 1

    model = build("llama").to(device)
    inputs = {"input_ids": torch.arange(3, 20, device=device)[None]}
    seen = Seen()
    with enable_tree_attention(model):
        out = run(model, inputs, TreeCache(), num_return_sequences=1, streamer=seen)
    assert out.sequences.shape[1] < 17 + 30
    assert seen.tokens == out.sequences[0].tolist() and seen.ended == 1


def test_transformers_is_given_back_after_the_last_model():
    original = stock.DeferredStopCheck
    models = [build("llama"), build("mistral")]
    before = [set(vars(model)) for model in models]
    handles = [enable_tree_attention(model) for model in models]
    assert stock.DeferredStopCheck is not original
    handles[0].disable()
    assert stock.DeferredStopCheck is not original
    handles[1].disable()
    handles[1].disable()
    assert stock.DeferredStopCheck is original
    assert [set(vars(model)) for model in models] == before
