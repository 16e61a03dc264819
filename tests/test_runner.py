"""BranchRunner: branches that advance together are what independent generate calls would give."""

from __future__ import annotations

import random
import sys
import types
from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
import torch
from models import build, model, one_thread  # noqa: F401

from hf_tree_cache import (
    AdapterMismatch,
    BranchEvent,
    BranchingProcessor,
    BranchRunner,
    ForkAtPositions,
    InvalidArgument,
    NonFiniteScores,
    OutOfBlocks,
    Sampling,
    StaleBranch,
    Stop,
    TreeCache,
    UnsupportedModel,
    enable_tree_attention,
)
from hf_tree_cache.generation import frontier
from hf_tree_cache.generation.options import Branch
from hf_tree_cache.generation.text import TextStream, encode_prompt
from hf_tree_cache.sending import Arriving

GREEDY = Sampling.greedy()


@pytest.fixture(autouse=True, params=[False, True], ids=["in step", "ahead"])
def runs_ahead(request: Any, monkeypatch: pytest.MonkeyPatch) -> bool:
    """On a GPU a token is computed before the host knows it; here both ways are tested."""
    if request.param:
        monkeypatch.setattr("hf_tree_cache.sending.AHEAD_ON", ("cuda", "cpu"))
    return bool(request.param)


class Scripted:
    """Rows whose prompt is letter x go on as ``script[x]`` says, then with z."""

    def __init__(self, script: dict[str, str]) -> None:
        self.script = {ord(key) - 94: text for key, text in script.items()}

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = torch.full_like(scores, -torch.inf)
        for row, tokens in enumerate(ids.tolist()):
            first, *letters = tokens[tokens.index(1) + 1 :]
            text = self.script[first]
            letter = text[len(letters)] if len(letters) < len(text) else "z"
            scores[row, ord(letter) - 94] = 0.0
        return scores


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
            assert runner.tokens(root) == prompt + alone(model(name), prompt, count)
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
                model(name), before[branch], count
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


def test_a_step_delimiter_may_span_tokens_and_stays_in_the_turn() -> None:
    script = Scripted({"a": "bcxyzabc", "b": "xxy"})
    with BranchRunner(build("llama"), Letters(), sampling=GREEDY) as runner:
        a, b = runner.add_prompts(["a", "b"])
        read = {a: "", b: ""}
        stops = [Stop(strings=["cc", "yz"]), Stop(tokens=[27])]
        for event in runner.stream([a, b], max_new_tokens=9, stop=stops, logits_processor=script):
            if event.kind == "token":
                read[event.branch] += event.text
        assert read == {a: "bcxyz", b: "xxy"}
        turns = runner.extend(
            [a, b], max_new_tokens=3, stop=Stop(strings=["za"]), logits_processor=script
        )
        # The "z" of the last turn does not count.
        assert [(t.text, t.reason, t.stop) for t in turns] == [
            ("abc", "length", None),
            ("zzz", "length", None),
        ]
        assert runner.text(a) == "bcxyzabc"


def test_letters_of_several_tokens_come_whole(smollm2: tuple[Any, Any]) -> None:
    tokenizer = smollm2[1]
    text = "Näh, 🌳 and 日本語 — done.\n\nNext"
    ids = tokenizer(text)["input_ids"]
    stream = TextStream(tokenizer, tokenizer("Say:")["input_ids"])
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(ids) > len(text.split())


@pytest.mark.core
def test_one_sampled_branch_draws_what_generate_draws() -> None:
    prompt = random_prompts(12)[0]
    sampling = Sampling(temperature=0.8, top_k=20, top_p=0.9)
    torch.manual_seed(11)
    expected = model("llama").generate(
        torch.tensor([prompt]),
        max_new_tokens=12,
        do_sample=True,
        temperature=0.8,
        top_k=20,
        top_p=0.9,
    )
    with BranchRunner(build("llama"), sampling=sampling) as runner:
        branches = runner.add_prompts([prompt])
        torch.manual_seed(11)
        runner.extend(branches, max_new_tokens=12)
        assert runner.tokens(branches[0]) == expected[0].tolist()


def sampled(seed: int) -> list[list[int]]:
    with BranchRunner(build("llama"), seed=seed, sampling=Sampling(temperature=1.5)) as runner:
        roots = runner.add_prompts(random_prompts(7, 11))
        branches = [child for root in roots for child in runner.fork(root, 3)]
        runner.extend(branches, max_new_tokens=6)
        return [runner.tokens(branch) for branch in branches]


def test_samples_repeat_by_seed_and_branches_part() -> None:
    first = sampled(4)
    torch.manual_seed(99)
    assert sampled(4) == first
    assert sampled(5) != first
    assert len({tuple(tokens) for tokens in first}) == 6


@pytest.mark.parametrize("do_sample", [True, False], ids=["sampled", "greedy"])
def test_distinct_children_part_at_once_also_from_what_is_there(do_sample: bool) -> None:
    sampling = Sampling(do_sample=do_sample, temperature=0.05)
    with BranchRunner(build("llama"), seed=0, sampling=sampling) as runner:
        (root,) = runner.add_prompts(random_prompts(6))
        runner.extend([root], max_new_tokens=5)
        taken = runner.tokens(root)[-3]
        early = runner.fork(root, 3, at=-3, distinct=True)
        late = runner.fork(early[0], distinct=True)
        plain = runner.fork(root, 2, at=-3)
        runner.extend([*early, *plain], max_new_tokens=1)
        runner.extend(late, max_new_tokens=1)
        firsts = [runner.tokens(branch)[-1] for branch in (*early, *late)]
        assert len({taken, *firsts}) == 5
        assert [runner.tokens(branch)[-1] for branch in plain] == [taken] * 2


@pytest.mark.core
def test_what_has_not_parted_is_computed_once() -> None:
    prompts = random_prompts(40, 9)
    shared = prompts[0]
    longer = [[*shared, 5, 6], [*shared, 7, 8, 9], shared, prompts[1], prompts[1]]
    with BranchRunner(build("llama"), sampling=GREEDY) as runner:
        roots = runner.add_prompts(longer)
        assert runner.stats.prompt_tokens == 40 * 3 + 5 + 9 * 2
        assert runner.stats.tokens_computed == 40 + 5 + 9
        assert [runner.prompt(root) for root in roots] == [0, 1, 2, 3, 3]
        many = runner.fork(roots[0], 16)
        runner.extend(many, max_new_tokens=8)
        assert runner.stats.tokens_computed == 54 + 7  # the last token is still pending
        assert runner.stats.tokens_generated == 16 * 8
        assert runner.cache.stats().unique_tokens == 54 + 7
        assert len(runner.tree.leaves()) == 16
        assert_like_alone(runner, [*roots, *many])


@pytest.mark.core
def test_appended_tokens_have_the_models_log_probs_in_chunks_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(frontier, "LOGITS_AT_ONCE", 97 * 2 * 3)
    prompts = random_prompts(4, 18)
    with BranchRunner(build("llama"), Letters(), sampling=GREEDY) as runner:
        branches = runner.add_prompts(prompts)
        runner.extend(branches, max_new_tokens=2)
        given = ["thequickbrownfox", "jumps"]
        logprobs = runner.append(branches, given)
        assert [len(row) for row in logprobs] == [16, 5]
        assert [runner.logprobs(b)[2:] for b in branches] == logprobs
        assert [runner.text(b)[-5:] for b in branches] == ["wnfox", "jumps"]
        assert runner.stats.tokens_forced == 21
        assert_like_alone(runner, branches)


def test_a_branch_that_met_its_end_can_be_carried_on_by_hand() -> None:
    base = build("llama")
    base.generation_config.eos_token_id = [2, 7]
    with BranchRunner(base, sampling=GREEDY) as runner:
        (root,) = runner.add_prompts([[1, 5]])
        (turn,) = runner.extend([root], max_new_tokens=9, logits_processor=always(7))
        assert (turn.reason, turn.tokens) == ("eos", (7,))
        assert runner.tree.nodes[runner.node(root)].state == "finished"
        (child,) = runner.fork(root)
        runner.append(root, [9, 9])
        kept = Stop(eos=False)
        runner.extend([root, child], max_new_tokens=2, stop=kept, logits_processor=always(7))
        assert runner.tokens(root) == [1, 5, 7, 9, 9, 7, 7]
        assert runner.tokens(child) == [1, 5, 7, 7, 7]
        assert_like_alone(runner, [root, child])


def always(token: int) -> Any:
    return lambda ids, scores: torch.full_like(scores, -torch.inf).index_fill_(
        1, torch.tensor([token]), 0.0
    )


def test_ended_branches_can_be_read_and_free_their_blocks() -> None:
    with BranchRunner(build("llama"), sampling=GREEDY) as runner:
        a, b, c = runner.add_prompts(random_prompts(5, 40, 6))
        runner.extend([a, b], max_new_tokens=3)
        before = runner.cache.kv_bytes
        runner.finish(b, "answer")
        assert runner.cache.kv_bytes < before
        runner.prune(a, "too slow")
        states = [(n.state, n.reason) for n in map(runner.tree.nodes.__getitem__, (4, 3))]
        assert states == [("finished", "answer"), ("pruned", "too slow")]
        assert len(runner.tokens(b)) == 43
        assert len(runner.logprobs(a)) == 3
        assert runner.branches == [c]
        for use in (runner.fork, runner.prune, runner.finish):
            with pytest.raises(StaleBranch, match=r"was finished \(answer\)"):
                use(b)
        with pytest.raises(StaleBranch, match="too slow"):
            runner.extend([c, a], max_new_tokens=1)
        with pytest.raises(StaleBranch, match="3 branches"):
            runner.tokens(Branch(7))


@pytest.mark.core
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("layer", [0, 2, None], ids=["first layer", "last layer", "its very end"])
def test_a_forward_that_fails_leaves_every_branch_as_it_was(
    error: type[BaseException], layer: int | None
) -> None:
    base = build("llama")
    prompts = random_prompts(14, 3)
    with BranchRunner(base, sampling=GREEDY, cache=TreeCache(poison=True)) as runner:
        a, b = runner.add_prompts(prompts)
        runner.extend([a], max_new_tokens=4)
        tokens = [runner.tokens(a), runner.tokens(b)]
        for use in (
            lambda: runner.extend([a, b], max_new_tokens=2),
            lambda: runner.append([a, b], [[5, 6], [7]]),
            lambda: runner.logits([a]),
            lambda: runner.add_prompts([[8, 9]]),
        ):
            if layer is None:  # the cache has closed the step by then
                hook = base.register_forward_hook(fail(error))
            else:
                hook = base.model.layers[layer].mlp.register_forward_pre_hook(fail(error))
            with pytest.raises(error):
                use()
            hook.remove()
            assert_consistent(runner)
        assert runner.tokens(a) == tokens[0]
        assert_like_alone(runner, [a, b])
        runner.extend([a, b], max_new_tokens=5)
        assert runner.tokens(a) == prompts[0] + alone(model("llama"), prompts[0], 9)


def fail(error: type[BaseException]) -> Any:
    def hook(*_: Any) -> None:
        raise error("in the middle")

    return hook


def test_ctrl_c_between_steps_keeps_the_tokens_so_far() -> None:
    prompts = random_prompts(14, 3)
    with BranchRunner(build("llama"), sampling=GREEDY) as runner:
        branches = runner.add_prompts(prompts)
        seen = 0

        def interrupt(event: Any) -> None:
            nonlocal seen
            seen += 1
            if seen == 5:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            runner.extend(branches, max_new_tokens=9, on_token=interrupt)
        assert [runner.length(b) for b in branches] == [17, 6]
        runner.extend(branches, max_new_tokens=6)
        assert runner.tokens(branches[1]) == prompts[1] + alone(model("llama"), prompts[1], 9)


def test_tokens_are_computed_ahead_and_branches_stop_fork_and_go_on(
    runs_ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, ahead = random_prompts(14, 3, 9), []
    run_ahead = frontier.Frontier.run_ahead

    def counted(self: Any, tips: Any, tokens: torch.Tensor) -> Any:
        logits = run_ahead(self, tips, tokens)
        ahead.append(logits is not None)
        return logits

    monkeypatch.setattr(frontier.Frontier, "run_ahead", counted)
    with BranchRunner(build("llama"), sampling=GREEDY) as runner:
        branches = runner.add_prompts(prompts)
        steps = runner.steps(branches, max_new_tokens=[4, 12, 8])
        for _ in range(3):
            next(steps)
        # The others go on with whatever happens to one of them in between.
        (child,) = runner.fork(branches[1], distinct=False)
        runner.append(branches[2], [5, 6])
        for _ in steps:
            pass
        assert sum(ahead) == (0 if not runs_ahead else len(ahead) - 1) and len(ahead) > 7
        assert_like_alone(runner, [*branches, child])
        runner.extend([*branches, child], max_new_tokens=5)
        assert_like_alone(runner, [*branches, child])
        assert runner.tokens(child) == prompts[1] + alone(model("llama"), prompts[1], 8)
        assert runner.tokens(branches[0]) == prompts[0] + alone(model("llama"), prompts[0], 9)
        # Logits of a branch that stopped keep no batch alive.
        for branch in branches:
            tip = runner._ledger.get("test", branch).tip
            assert tip is None or tip.batch is None or len(tip.batch) == 1


@pytest.mark.parametrize("cut_by", ["scores", "ctrl-c"])
def test_what_was_computed_ahead_is_taken_back(
    cut_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = random_prompts(14, 3)
    broken = False

    def spoil(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return logits * torch.nan if broken else logits

    with BranchRunner(build("llama"), sampling=GREEDY) as runner:
        branches = runner.add_prompts(prompts)
        steps = runner.steps(branches, max_new_tokens=9, logits_processor=spoil)
        for _ in range(4):
            next(steps)
        read = Arriving.read
        if cut_by == "scores":
            broken = True
            with pytest.raises(NonFiniteScores):
                next(steps)
            broken = False
        else:
            monkeypatch.setattr(Arriving, "read", fail(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                next(steps)
            monkeypatch.setattr(Arriving, "read", read)
        assert [runner.length(branch) for branch in branches] == [18, 7]
        assert_like_alone(runner, branches)
        runner.extend(branches, max_new_tokens=5)
        assert runner.tokens(branches[0]) == prompts[0] + alone(model("llama"), prompts[0], 9)
        assert_like_alone(runner, branches)


def test_a_bounded_cache_refuses_and_goes_on_when_there_is_room_again() -> None:
    cache = TreeCache(block_size=4, max_blocks=6)
    with BranchRunner(build("llama"), sampling=GREEDY, cache=cache) as runner:
        (root,) = runner.add_prompts([random_prompts(9)[0]])
        children = runner.fork(root, 3, distinct=True)
        with pytest.raises(OutOfBlocks, match="prune"):
            runner.extend(children, max_new_tokens=12)
        with pytest.raises(OutOfBlocks):
            runner.append(root, [5] * 40)
        with pytest.raises(OutOfBlocks):
            runner.add_prompts([[7] * 60])
        assert_consistent(runner)
        runner.prune(children[0])
        runner.prune(children[1])
        tokens = runner.tokens(children[2])
        runner.extend(children[2:], max_new_tokens=3)
        assert runner.tokens(children[2]) == tokens + alone(model("llama"), tokens, 3)
        assert runner.length(root) == 9


class Ledger(BranchingProcessor):
    """Notes what it is told; at each step adds to nothing."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int, Any]] = []

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for row, (branch, length) in enumerate(
            zip(self.batch.branches, self.batch.lengths, strict=True)
        ):
            tokens = ids[row].tolist()
            self.told.append(("step", branch, (length, tokens[-2:])))
        return scores

    def on_fork(self, parent: int, children: Sequence[int]) -> None:
        self.told.append(("fork", parent, tuple(children)))

    def on_prune(self, branch: int) -> None:
        self.told.append(("prune", branch, None))


def test_processors_follow_branches_and_their_own_actions_are_refused() -> None:
    ledger = Ledger()
    with BranchRunner(build("llama"), sampling=GREEDY, processors=[ledger]) as runner:
        a, b = runner.add_prompts([[1, 5, 6], [1, 7]])
        (c,) = runner.fork(a)
        runner.append(c, [8])
        runner.prune(a)
        runner.extend([c, b], max_new_tokens=1)
        assert ledger.told == [
            ("fork", a, (c,)),
            ("prune", a, None),
            ("step", c, (1, [6, 8])),
            ("step", b, (0, [1, 7])),
        ]
        with pytest.raises(InvalidArgument, match="between two extends"):
            runner.extend([b], max_new_tokens=1, logits_processor=[ForkAtPositions([1])])
        assert_consistent(runner)


def test_a_branch_pruned_by_its_listener_leaves_the_batch() -> None:
    with BranchRunner(build("llama"), sampling=GREEDY) as runner:
        a, b = runner.add_prompts(random_prompts(5, 9))
        events: list[BranchEvent] = []

        def listen(event: BranchEvent) -> None:
            events.append(event)
            if event.branch == a and event.step == 3:
                runner.prune(a, "enough")

        turns = runner.extend(
            [a, b], max_new_tokens=6, on_token=listen, logits_processor=lambda ids, s: s
        )
        assert [(len(turn.tokens), turn.reason) for turn in turns] == [
            (3, "pruned (enough)"),
            (6, "length"),
        ]
        assert_like_alone(runner, [b])


def test_the_model_is_given_back_as_it_was() -> None:
    base = build("llama")
    before = base.config._attn_implementation, len(base._forward_pre_hooks)
    runner = BranchRunner(base)
    other = BranchRunner(base)
    (branch,) = other.add_prompts([[5]])
    runner.add_prompts([[5]])
    other.close()
    runner.extend(runner.branches, max_new_tokens=2)
    other.extend([branch], max_new_tokens=2)
    for each in (runner, other, runner):
        each.close()
    assert (base.config._attn_implementation, len(base._forward_pre_hooks)) == before
    with enable_tree_attention(base), BranchRunner(base) as inner:
        inner.add_prompts([[5]])
        inner.close()
        assert base.config._attn_implementation == "tree_attention"


def test_every_form_of_a_prompt(smollm2: tuple[Any, Any]) -> None:
    tokenizer = smollm2[1]
    chat = [{"role": "user", "content": "Hi"}]
    asked = tokenizer.decode(encode_prompt(chat, tokenizer))
    assert asked.endswith("<|im_start|>assistant\n")
    said = [*chat, {"role": "assistant", "content": "Well"}]
    assert tokenizer.decode(encode_prompt(said, tokenizer)).endswith("assistant\nWell")
    assert encode_prompt("Hi", tokenizer) == tokenizer("Hi")["input_ids"]
    assert encode_prompt(torch.tensor([[4, 5]]), None) == [4, 5]


CARELESS = {
    "one prompt in place of a list": lambda run, a: run.add_prompts("hello"),
    "an empty prompt": lambda run, a: run.add_prompts([[]]),
    "messages without a template": lambda run, a: run.add_prompts([[{"role": "user"}]]),
    "a prompt of floats": lambda run, a: run.add_prompts([[0.5]]),
    "one branch in place of a list": lambda run, a: run.extend(a, max_new_tokens=2),
    "no tokens": lambda run, a: run.extend([a], max_new_tokens=0),
    "two limits for one branch": lambda run, a: run.extend([a], max_new_tokens=[2, 3]),
    "a branch twice": lambda run, a: run.extend([a, a], max_new_tokens=2),
    "a text as stop": lambda run, a: run.extend([a], max_new_tokens=2, stop="\n"),
    "an empty stop string": lambda run, a: Stop(strings=[""]),
    "one stop string": lambda run, a: Stop(strings="\n\n"),
    "nothing to append": lambda run, a: run.append(a, ""),
    "two texts for one branch": lambda run, a: run.append([a], ["a", "b"]),
    "a fork beyond the tip": lambda run, a: run.fork(a, at=4),
    "a fork before the prompt": lambda run, a: run.fork(a, at=-3),
    "a negative number of forks": lambda run, a: run.fork(a, -1),
    "more branches than allowed": lambda run, a: run.fork(a, 4),
    "temperature 0": lambda run, a: Sampling(temperature=0),
    "top_p above 1": lambda run, a: Sampling(top_p=1.5),
    "a used cache": lambda run, a: BranchRunner(run.model, cache=run.cache),
    "no model": lambda run, a: BranchRunner("llama"),
    "train mode": lambda run, a: BranchRunner(build("llama").train()),
    "logits of nobody": lambda run, a: run.logits([]),
}


@pytest.mark.parametrize("use", CARELESS.values(), ids=CARELESS)
def test_careless_use_is_refused_and_harms_nothing(use: Any) -> None:
    with BranchRunner(build("llama"), Letters(), sampling=GREEDY, max_branches=4) as runner:
        (branch,) = runner.add_prompts(["ab"])
        with pytest.raises(InvalidArgument):
            use(runner, branch)
        assert_consistent(runner)
        runner.extend([branch], max_new_tokens=2)
        assert runner.length(branch) == 5


def test_train_mode_is_noticed_later_too() -> None:
    with BranchRunner(build("llama")) as runner:
        branches = runner.add_prompts([[5]])
        runner.model.train()
        with pytest.raises(InvalidArgument, match=r"model\.eval"):
            runner.extend(branches, max_new_tokens=1)


def test_models_without_a_tree_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="encoder-decoder"):
        BranchRunner(build("bart"))


def test_states_that_exist_only_at_the_tip_are_not_gone_back_to() -> None:
    with BranchRunner(build("qwen3_next"), sampling=GREEDY) as runner:
        a, b = runner.add_prompts(random_prompts(6, 9))
        runner.extend([a], max_new_tokens=4)
        with pytest.raises(UnsupportedModel, match="tip"):
            runner.fork(a, at=-2)
        children = runner.fork(a, 2, distinct=True)
        runner.append([b, children[0]], [[5, 6, 7], [8]])
        runner.extend([*children, b], max_new_tokens=3)
        assert_like_alone(runner, [a, b, *children])


class TunerLayer(torch.nn.Identity):
    """As far as the cache is concerned, a LoRA layer of PEFT."""

    merged = False
    disable_adapters = False
    active_adapters: ClassVar[list[str]] = ["first"]


def test_adapters_are_not_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    tuners = types.ModuleType("peft.tuners.tuners_utils")
    tuners.BaseTunerLayer = TunerLayer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "peft.tuners.tuners_utils", tuners)
    base = build("llama")
    layer = TunerLayer()
    base.model.layers[0].mlp.register_module("lora", layer)
    with BranchRunner(base, sampling=GREEDY) as runner:
        (branch,) = runner.add_prompts([[5, 6]])
        monkeypatch.setattr(layer, "active_adapters", ["second"], raising=False)
        with pytest.raises(AdapterMismatch, match=r"adapter first, but the model now .* second"):
            runner.extend([branch], max_new_tokens=2)
        monkeypatch.setattr(layer, "disable_adapters", True, raising=False)
        with pytest.raises(AdapterMismatch, match="no adapter"):
            runner.add_prompts([[7, 8]])
        monkeypatch.undo()
        runner.prune(branch)
        runner.add_prompts([[7, 8]])
