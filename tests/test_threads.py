"""Threads that share an enabled model, with caches of their own: as if one came after the other."""

from __future__ import annotations

import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from generating import Eager
from models import build, one_thread, prompts
from transformers import LogitsProcessor
from transformers.generation import utils as stock

from hf_tree_cache import (
    BranchRunner,
    ForkAtPositions,
    PruneByRank,
    Sampling,
    TreeCache,
    enable_tree_attention,
    tree_generate,
)
from hf_tree_cache.integration import enable, small_steps
from hf_tree_cache.naming import CACHE

__all__ = ["one_thread"]  # a fixture for all of this file

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def impatient() -> Iterator[None]:
    """Threads take turns often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def at_once(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """What each call returned, all begun together in threads of their own."""
    begin = threading.Barrier(len(calls))
    results: list[Any] = [None] * len(calls)
    errors: list[BaseException] = []

    def run(place: int) -> None:
        begin.wait()
        try:
            results[place] = calls[place]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def beams(model: Any, inputs: dict[str, torch.Tensor]) -> list[Any]:
    options = {"num_beams": 3, "num_return_sequences": 3, "do_sample": False}
    found = model.generate(**inputs, **{CACHE: TreeCache(poison=True)}, **options, max_new_tokens=9)
    return found.tolist()


def branches(model: Any, inputs: dict[str, torch.Tensor]) -> list[Any]:
    policy = [ForkAtPositions([1, 3]), PruneByRank(2, every=4)]
    options = {"custom_generate": tree_generate, "branching": policy, "do_sample": False}
    return model.generate(**inputs, **options, max_new_tokens=9).sequences.tolist()


def runner(model: Any, inputs: dict[str, torch.Tensor]) -> list[Any]:
    ids = inputs["input_ids"][0][inputs["attention_mask"][0].bool()].tolist()
    with BranchRunner(model, sampling=Sampling(do_sample=False)) as alone:
        (root,) = alone.add_prompts([ids])
        tips = [root, *alone.fork(root, 1, at=-3)]
        for _ in range(3):
            alone.extend(tips, max_new_tokens=3)
        return [alone.tokens(tip) for tip in tips]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.core
def test_threads_get_what_they_would_get_alone(device: str) -> None:
    model = build("llama").to(device).eval()
    everything = {name: value.to(device) for name, value in prompts("llama").items()}
    inputs = [{k: v[[row]] for k, v in everything.items()} for row in range(2)]
    ways = (beams, branches, runner, beams, branches, runner)
    calls = [lambda w=way, i=inputs[n % 2]: w(model, i) for n, way in enumerate(ways)]
    with enable_tree_attention(model):
        want = [call() for call in calls]
        for _ in range(4):
            assert at_once(calls) == want
    assert want[0] != want[1]


@pytest.mark.core
def test_runners_share_what_none_has_enabled_before() -> None:
    model, inputs = build("llama").eval(), prompts("llama")
    before = set(vars(model))
    want = runner(model, inputs)
    assert not enable.is_enabled(model)
    for _ in range(8):
        assert at_once([lambda: runner(model, inputs)] * 4) == [want] * 4
    assert not enable.is_enabled(model) and set(vars(model)) == before


@pytest.mark.core
def test_the_last_runner_gives_the_model_back_unless_its_user_enabled_it() -> None:
    model, ids = build("llama").eval(), [5, 6, 7]

    def begun() -> BranchRunner:
        fresh = BranchRunner(model)
        fresh.add_prompts([ids])
        return fresh

    first, second = begun(), begun()
    for one in (first, first, second):
        assert enable.is_enabled(model)
        one.close()
    assert not enable.is_enabled(model)
    with enable_tree_attention(model):
        third = begun()
        third.close()
        assert enable.is_enabled(model)
    with third:
        third.extend(third.branches, max_new_tokens=1)
        assert enable.is_enabled(model)
    assert not enable.is_enabled(model)


@pytest.mark.core
def test_where_steps_are_captured_forwards_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    inside, most = [], []

    def enter(*ignored: Any) -> None:
        inside.append(threading.get_ident())
        most.append(len(inside))
        time.sleep(1e-4)

    monkeypatch.setattr(enable, "_make_graphs", lambda *arguments: Eager())
    model = build("llama").eval()
    model.model.register_forward_pre_hook(enter)
    model.model.register_forward_hook(lambda *ignored: inside.pop() and None)
    inputs = prompts("llama")
    calls = [lambda: beams(model, inputs), lambda: branches(model, inputs)] * 2
    want = [call() for call in calls[:2]] * 2
    with enable_tree_attention(model):
        assert at_once(calls) == want
    assert max(most) == 1


def test_steps_of_others_leave_alone_what_has_yet_to_be_read() -> None:
    decode_graph = pytest.importorskip("hf_tree_cache.integration.decode_graph")
    graphs = decode_graph.DecodeGraphs(build("llama").eval())
    reader, other = TreeCache(), TreeCache()
    graphs._lent = weakref.ref(reader)

    def step(cache: TreeCache) -> str:
        with pytest.raises(decode_graph.NotCapturable) as refusal:
            graphs._run(None, cache, SimpleNamespace(counts=[1]), {})
        return str(refusal.value)

    # All ask for gradients, which is refused after that.
    with reader.lending_outputs():
        assert "yet to read" in step(other) and "gradients" in step(reader)
    assert "gradients" in step(other)


def test_a_rotation_of_ours_is_for_the_thread_that_captures() -> None:
    shared = small_steps._InThisThread(lambda x, *, y: ("ours", x, y), lambda x, *, y: (x, y))
    assert shared(1, y=2) == ("ours", 1, 2)
    assert at_once([lambda: shared(1, y=2)]) == [(1, 2)]


@pytest.mark.skipif(
    not hasattr(stock, "DeferredStopCheck"), reason="transformers looks for ends at once"
)
def test_processors_of_one_thread_are_not_those_of_another() -> None:
    class Theirs(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return scores

    model, inputs = build("llama").eval(), prompts("llama")
    with enable_tree_attention(model) as handle:

        def allowed(**options: Any) -> bool:
            cache = TreeCache()
            model.generate(**inputs, **{CACHE: cache}, **options, max_new_tokens=3)
            at_once([lambda: beams(model, inputs)])
            return handle._late_ends.allows(cache)

        plain, processed = at_once([allowed, lambda: allowed(logits_processor=[Theirs()])])
        assert plain and not processed
