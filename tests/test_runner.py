"""BranchRunner: branches that advance together are what independent generate calls would give."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from models import build, model, one_thread  # noqa: F401

from hf_tree_cache import TreeCache
from hf_tree_cache.generation.options import Branch, Sampling
from hf_tree_cache.generation.runner import BranchRunner

GREEDY = Sampling.greedy()


class Letters:
    """A tokenizer of one letter a token: ids 3 to 28 are a to z."""

    eos_token_id = 2
    chat_template = None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1] * add_special_tokens + [ord(c) - 94 for c in text]}

    def decode(self, tokens: Sequence[int], **options: Any) -> str:
        return "".join(chr(94 + token) for token in tokens if token > 2)


def random_prompts(*lengths: int, seed: int = 3) -> list[list[int]]:
    numbers = random.Random(seed)
    return [[numbers.randrange(3, 90) for _ in range(length)] for length in lengths]


@pytest.fixture
def llama() -> Iterator[Any]:
    shared = model("llama")
    before = shared.config._attn_implementation
    yield shared
    assert shared.config._attn_implementation == before, "a runner was not closed"


def alone(model: Any, tokens: Sequence[int], count: int) -> list[int]:
    """What stock generate gives greedily behind ``tokens``, with transformers' own cache."""
    ids = torch.tensor([list(tokens)])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
    )
    return out[0, len(tokens) :].tolist()


def alone_logits(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    return model(torch.tensor([list(tokens)])).logits[0].float()


def assert_like_alone(runner: BranchRunner, branches: Sequence[Branch]) -> None:
    """Logits behind every branch and its log-probs are those of its tokens run alone."""
    assert_consistent(runner)
    logits = runner.logits(branches)
    for branch, row in zip(branches, logits, strict=True):
        tokens = runner.tokens(branch)
        expected = alone_logits(runner.model, tokens)
        torch.testing.assert_close(row, expected[-1], rtol=0, atol=1e-4)
        logprobs = runner.logprobs(branch)
        known = expected.log_softmax(-1)[-len(logprobs) - 1 : -1]
        new = torch.tensor(tokens[len(tokens) - len(logprobs) :], dtype=torch.int64)[:, None]
        expected_logprobs = known.gather(1, new).squeeze(1)
        torch.testing.assert_close(torch.tensor(logprobs), expected_logprobs, rtol=0, atol=1e-4)
        assert runner.logprob(branch) == pytest.approx(sum(logprobs), abs=1e-6)


def assert_consistent(runner: BranchRunner) -> None:
    runner.cache.check_integrity()
    runner.tree.check_integrity()
    held = {runner._ledger.get("test", b).tip for b in runner.branches}
    assert len(runner.cache.tree.branches) == len(held)


def reference(name: str) -> Any:
    """The same weights, never touched by tree attention."""
    return model(name)


NAMES = ["llama", "qwen3", "gemma3", "mistral", "gpt2", "falcon", "deepseek_v3", "gpt_oss"]


@pytest.mark.core
@pytest.mark.parametrize("name", [*NAMES, "qwen3_next", "falcon_h1"])
def test_ragged_branches_go_on_as_independent_runs_do(name: str) -> None:
    prompts = random_prompts(23, 5, 1, 17)
    with BranchRunner(build(name), sampling=GREEDY) as runner:
        roots = runner.add_prompts(prompts)
        first = runner.extend(roots[:2], max_new_tokens=[5, 9])
        second = runner.extend(roots, max_new_tokens=6)
        for root, prompt, count in zip(roots, prompts, (11, 15, 6, 6), strict=True):
            assert runner.tokens(root) == prompt + alone(reference(name), prompt, count)
        assert [len(turn.tokens) for turn in first] == [5, 9]
        assert second[0].tokens == tuple(runner.tokens(roots[0])[-6:])
        assert {turn.reason for turn in second} == {"length"}
        assert_like_alone(runner, roots)


@pytest.mark.core
@pytest.mark.parametrize("name", NAMES)
def test_forks_in_the_past_appends_and_prunes_change_nothing_for_the_others(name: str) -> None:
    prompts = random_prompts(19, 34)
    with BranchRunner(build(name), sampling=GREEDY, cache=TreeCache(poison=True)) as runner:
        a, b = runner.add_prompts(prompts)
        runner.extend([a, b], max_new_tokens=13)
        back = runner.fork(a, at=-7)[0]
        in_prompt = runner.fork(b, at=16)[0]
        at_first = runner.fork(b, at=1)[0]
        assert runner.tokens(back) == runner.tokens(a)[:-7]
        runner.prune(a, "tried")
        runner.append([back, in_prompt], [[5, 6, 7, 8, 9, 10], [11]])
        twin = runner.fork(back)[0]
        before = {branch: runner.tokens(branch) for branch in (back, in_prompt, at_first, b, twin)}
        runner.extend([in_prompt, back, at_first], max_new_tokens=8)
        runner.extend([twin, b], max_new_tokens=3)
        for branch, count in ((back, 8), (in_prompt, 8), (at_first, 8), (twin, 3), (b, 3)):
            assert runner.tokens(branch) == before[branch] + alone(
                reference(name), before[branch], count
            )
        assert_like_alone(runner, [at_first, b, back, twin, in_prompt])


@pytest.mark.core
@pytest.mark.parametrize("seed", range(6))
def test_any_sequence_of_actions_leaves_every_branch_as_if_it_were_alone(seed: int) -> None:
    numbers = random.Random(seed)
    with BranchRunner(build("llama"), seed=seed, cache=TreeCache(block_size=4, poison=True)) as run:
        branches = run.add_prompts(random_prompts(9, 3, 14, seed=seed))
        copies: dict[Branch, list[int]] = {branch: run.tokens(branch) for branch in branches}
        for _ in range(25):
            some = numbers.sample(branches, numbers.randint(1, len(branches)))
            one = some[0]
            match numbers.choice(["fork", "fork at", "prune", "append", "extend", "logits"]):
                case "fork":
                    branches += run.fork(one, numbers.randint(1, 3))
                case "fork at":
                    branches += run.fork(one, 2, at=numbers.randint(1, run.length(one)))
                case "prune" if len(branches) > 2:
                    run.prune(one)
                    branches.remove(one)
                case "append":
                    run.append(
                        some, [[numbers.randrange(3, 90)] * numbers.randint(1, 7)] * len(some)
                    )
                case "extend":
                    run.extend(some, max_new_tokens=[numbers.randint(1, 6) for _ in some])
                case "logits":
                    run.logits(some)
            assert_consistent(run)
            for branch in branches:  # nobody's past changes
                tokens = run.tokens(branch)
                known = copies.get(branch, tokens)
                assert tokens[: len(known)] == known
                copies[branch] = tokens
            branches = branches[-12:] if len(branches) > 12 else branches
        assert_like_alone(run, branches)
        for branch in run.branches:
            run.prune(branch)
        assert run.cache.kv_bytes == 0
