"""tree_generate on tiny models: every branch equals an independent run of its tokens."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from models import TINY, build
from search_fakes import letters
from transformers import (
    DynamicCache,
    EosTokenCriteria,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    RwkvConfig,
    RwkvForCausalLM,
    StoppingCriteria,
    StoppingCriteriaList,
)

from hf_tree_cache import (
    BranchingProcessor,
    ForkAtFirstToken,
    ForkAtPositions,
    ForkOnEntropy,
    GenerationTree,
    InvalidArgument,
    NonFiniteScores,
    OutOfBlocks,
    PruneBelow,
    PruneByRank,
    TreeCache,
    UnsupportedModel,
    enable_tree_attention,
    tree_generate,
)
from hf_tree_cache.generation import loop
from hf_tree_cache.generation.stopping import Stopping

PROMPTS = torch.tensor([[0, 0, 0, 11, 12, 13, 14, 15, 16], [21, 22, 23, 24, 25, 26, 27, 28, 29]])
MASK = (PROMPTS != 0).long()
FULL = PROMPTS.masked_fill(PROMPTS == 0, 17)  # nothing is hidden
SETTINGS = {"attention_mask": MASK, "pad_token_id": 0, "custom_generate": tree_generate}


@pytest.fixture(autouse=True, params=[False, True], ids=["in step", "ahead"])
def runs_ahead(request, monkeypatch):
    """On a GPU the next step begins before the last one is booked; here both ways are tested."""
    if request.param:
        monkeypatch.setattr("hf_tree_cache.sending.AHEAD_ON", ("cuda", "cpu"))
    return request.param


class Record(BranchingProcessor):
    """Keeps the model's logits of every branch, and what it was told."""

    def __init__(self):
        self.logits: dict[int, list[torch.Tensor]] = {}
        self.gone: list[int] = []

    def __call__(self, input_ids, scores):
        for row, branch in enumerate(self.batch.branches):
            self.logits.setdefault(branch, []).append(scores[row].clone())
        return scores

    def on_fork(self, parent, children):
        for child in children:
            self.logits[child] = list(self.logits[parent])

    def on_prune(self, branch):
        self.gone.append(branch)


class ForkAndPruneAtRandom(BranchingProcessor):
    def __init__(self, seed: int):
        self.random = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids, scores):
        for row, chance in enumerate(torch.rand(len(scores), generator=self.random).tolist()):
            if chance < 0.25:
                self.fork(row, 1 + int(chance < 0.08), distinct=chance < 0.15)
            elif chance > 0.9 and len(scores) > 2:
                self.prune(row)
        return scores


def dense_logits(model, prompts: torch.Tensor, generated: list[list[int]], stepwise: bool):
    """Logits ``[branches, tokens, V]`` before each token, of rows that share nothing.

    In one forward, or stepwise: linear attention rounds differently by chunk and by step.
    """
    most = max(map(len, generated))
    tails = torch.tensor([tokens + [0] * (most - len(tokens)) for tokens in generated])
    ids = torch.cat([prompts, tails], 1)
    mask = torch.cat([(prompts != 0).long(), torch.ones_like(tails)], 1)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    first = prompts.shape[1]
    if not stepwise:
        out = model(ids, attention_mask=mask, position_ids=positions, use_cache=False)
        return out.logits[:, first - 1 : -1].float()
    cache, logits = DynamicCache(config=model.config), []
    for end in range(first, ids.shape[1]):
        start = 0 if end == first else end - 1
        out = model(
            ids[:, start:end],
            attention_mask=mask[:, :end],
            position_ids=positions[:, start:end],
            past_key_values=cache,
        )
        logits.append(out.logits[:, -1].float())
    return torch.stack(logits, 1)


def check_law(model, out, record: Record, stepwise: bool, prompts=PROMPTS) -> None:
    # Alone and in a batch of six, transformers' own qwen3_next differs from itself by 2.5e-4.
    tolerance = 1e-3 if model.config.model_type == "qwen3_next" else 1e-4
    assert len(out) > 1
    tokens = [out.tree.tokens(leaf, include_prompt=False) for leaf in out.leaves]
    dense = dense_logits(model, prompts[list(out.prompts)], tokens, stepwise)
    for row, (leaf, branch, prompt) in enumerate(
        zip(out.leaves, out.branches, out.prompts, strict=True)
    ):
        expected = dense[row, : len(tokens[row])]
        got = torch.stack(record.logits[branch])
        assert (got - expected).abs().max() < tolerance
        chosen = torch.tensor(tokens[row])[:, None]
        logprobs = expected.log_softmax(-1).gather(1, chosen).squeeze(1)
        assert (logprobs - torch.tensor(out.tree.logprobs(leaf))).abs().max() < tolerance
        assert prompt == out.tree.nodes[leaf].prompt


@pytest.mark.parametrize("enabled", [True, False], ids=["tree attention", "stock attention"])
@pytest.mark.parametrize(
    "do_sample",
    [pytest.param(True, id="sampled", marks=pytest.mark.core), pytest.param(False, id="greedy")],
)
@pytest.mark.parametrize(
    "name", ["llama", "gemma2", "mistral", "gpt_oss", "llama4", "qwen3_next", "falcon_h1", "gpt2"]
)
def test_every_branch_equals_an_independent_run(name, do_sample, enabled):
    model = build(name)
    record = Record()
    prompts = PROMPTS if do_sample else FULL
    handle = enable_tree_attention(model) if enabled else None
    cache = TreeCache(block_size=4, poison=True)
    torch.manual_seed(5)
    out = model.generate(
        prompts,
        past_key_values=cache,
        branching=[record, ForkAtFirstToken(2), ForkAndPruneAtRandom(3)],
        max_branches=14,
        do_sample=do_sample,
        max_new_tokens=19,
        **{**SETTINGS, "attention_mask": (prompts != 0).long()},
    )
    if handle is not None:
        handle.disable()
    cache.check_integrity()
    out.tree.check_integrity()
    assert out.stats.forks > 4 and out.stats.prunes > 0
    assert out.stats.prefill_tokens_computed == PROMPTS.numel()
    assert cache.stats().blocks == 0
    check_law(model, out, record, TINY[name].states, prompts)


@pytest.fixture(scope="module")
def llama():
    model = build("llama")
    with enable_tree_attention(model):
        yield model


def generate(model, *, seed=0, ids=PROMPTS[1:], **kwargs):
    torch.manual_seed(seed)
    settings = {**SETTINGS, "attention_mask": torch.ones_like(ids), "max_new_tokens": 12}
    return model.generate(ids, **{**settings, **kwargs})


def test_without_forks_it_is_generate(llama):
    stock = generate(
        llama, custom_generate=None, num_return_sequences=5, do_sample=True, eos_token_id=None
    )
    out = generate(llama, num_return_sequences=5, do_sample=True, eos_token_id=None)
    assert torch.equal(out.sequences, stock)
    assert out.stats.prefill_tokens_asked == 5 * out.stats.prefill_tokens_computed
    assert out.tree.num_branches == 5 and len(out.tree.roots) == 1


def test_stock_processors_and_criteria_work_unchanged(llama):
    arguments = dict(temperature=0.7, top_k=5, top_p=0.9, repetition_penalty=1.3, do_sample=True)
    arguments |= dict(eos_token_id=None, num_return_sequences=3)
    stock = generate(llama, custom_generate=None, **arguments)
    assert torch.equal(generate(llama, **arguments).sequences, stock)

    class StopAtEven(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return input_ids[:, -1] % 7 == 0

    out = generate(
        llama, num_return_sequences=6, do_sample=True, max_new_tokens=40, eos_token_id=None,
        stopping_criteria=StoppingCriteriaList([StopAtEven()]),
    )  # fmt: skip
    assert "stop" in out.finish_reasons
    for leaf, reason in zip(out.leaves, out.finish_reasons, strict=True):
        assert (out.tree.tokens(leaf)[-1] % 7 == 0) == (reason == "stop")


@pytest.mark.core
@pytest.mark.parametrize("hides", [False, True], ids=["nothing hidden", "padded"])
def test_a_step_takes_on_what_transformers_would(llama, monkeypatch, hides):
    """The same arguments; transformers is not asked for them where nothing is hidden."""
    prompts = PROMPTS if hides else FULL
    options = dict(ids=prompts, attention_mask=(prompts != 0).long())
    monkeypatch.setattr("hf_tree_cache.generation.step_inputs.ROOM", 3)
    passed: list[dict[str, torch.Tensor]] = []

    def note(module, args, kwargs):
        tensors = {name: x for name, x in kwargs.items() if isinstance(x, torch.Tensor)}
        passed.append({name: x.clone() for name, x in tensors.items()})

    def run():
        passed.clear()
        with monkeypatch.context() as patch:
            prepare, asked = GenerationMixin.prepare_inputs_for_generation, []
            # Noted on the class that has it, so that it stays the model's own.
            patch.setattr(
                GenerationMixin,
                "prepare_inputs_for_generation",
                lambda *args, **kwargs: asked.append(1) or prepare(*args, **kwargs),
            )
            hook = llama.register_forward_pre_hook(note, with_kwargs=True)
            try:
                out = generate(llama, branching=[ForkAtPositions([3], 2)], **options)
            finally:
                hook.remove()
        return out.sequences, list(passed), len(asked)

    ours = run()
    monkeypatch.setattr("hf_tree_cache.generation.step_inputs.find_constant", lambda *args: None)
    theirs = run()
    assert torch.equal(ours[0], theirs[0])
    assert theirs[2] > 10 and ours[2] == (theirs[2] if hides else 2)
    assert len(ours[1]) == len(theirs[1])
    for mine, want in zip(ours[1], theirs[1], strict=True):
        assert mine.keys() == want.keys()
        assert all(torch.equal(mine[name], want[name]) for name in want)


@pytest.mark.parametrize("hides", [False, True], ids=["nothing hidden", "padded"])
def test_prompts_may_be_embeddings(llama, hides):
    prompts = PROMPTS if hides else FULL
    embeddings = llama.get_input_embeddings()(prompts)
    arguments = dict(attention_mask=(prompts != 0).long(), max_new_tokens=9, do_sample=False)
    stock = llama.generate(inputs_embeds=embeddings, pad_token_id=0, **arguments)
    out = llama.generate(
        inputs_embeds=embeddings,
        branching=[ForkAtPositions([4], 2)],
        custom_generate=tree_generate,
        pad_token_id=0,
        **arguments,
    )
    assert sorted(out.prompts) == [0, 0, 1, 1] and len(out.tree.roots) == 2
    for prompt, expected in enumerate(stock.tolist()):
        rows = [i for i, of in enumerate(out.prompts) if of == prompt]
        tokens = [out.tree.tokens(out.leaves[i]) for i in rows]
        assert expected in tokens and all(row[:4] == expected[:4] for row in tokens)


def test_the_host_knows_lengths_and_ends_and_asks_the_others():
    class Odd(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return input_ids[:, -1] % 2 == 1

    class Mine(MaxLengthCriteria):
        pass

    ids = torch.tensor([[1, 2, 3], [1, 2, 4]])
    known = Stopping([MaxLengthCriteria(4), MaxLengthCriteria(9), EosTokenCriteria([3, 7])])
    assert known.ask(ids, None) is None
    assert known.known([3, 4], 3) == [True, False]
    assert known.known([5, 4], 4) == [True, True]
    asked = Stopping([Odd(), Mine(3), EosTokenCriteria(4)])
    assert asked.known([3, 4], 3) == [False, True]
    assert asked.ask(ids, None).tolist() == [True, True], "a subclass may do anything"
    assert Stopping([Odd()]).ask(ids, None).tolist() == [True, False]
    # It would remind of the model's length, so it is called.
    assert Stopping([MaxLengthCriteria(4, 2)]).ask(ids, None).tolist() == [False, False]


def test_finished_branches_leave_the_batch_and_free_their_blocks(llama):
    rows = []

    class CountRows(LogitsProcessor):
        def __call__(self, input_ids, scores):
            rows.append(len(scores))
            scores[:, 2] += 2.5  # eos
            return scores

    cache = TreeCache(block_size=4)
    out = generate(
        llama, past_key_values=cache, num_return_sequences=8, do_sample=True, max_new_tokens=60,
        logits_processor=LogitsProcessorList([CountRows()]), eos_token_id=2,
    )  # fmt: skip
    assert rows[0] == 8 and rows == sorted(rows, reverse=True) and rows[-1] < 8
    assert sum(rows) == out.stats.tokens_generated
    assert "eos" in out.finish_reasons
    assert cache.stats().blocks == 0 and cache.get_seq_length() == 0


@pytest.mark.parametrize("is_sent", [False, True])
def test_kept_branches_can_be_continued(llama, is_sent):
    """Also in another process, to which all that came out was sent."""
    out = generate(
        llama, past_key_values=TreeCache(block_size=4), branching=[ForkAtFirstToken(3)],
        keep_branches=True, eos_token_id=None, do_sample=True,
    )  # fmt: skip
    if is_sent:
        before, out = out, pickle.loads(pickle.dumps(out))
        assert out.tree.to_dict() == before.tree.to_dict()
        assert torch.equal(out.sequences, before.sequences)
    cache = out.past_key_values
    assert cache.rows == [] and set(cache.tree.held) == set(out.branches)
    cache.set_rows([out.branches[1]])
    ids = torch.cat([out.sequences[1:2], torch.tensor([[31, 32, 33]])], 1)
    stock = llama.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    more = llama.generate(
        ids, past_key_values=cache, max_new_tokens=6, do_sample=False, pad_token_id=0
    )
    assert torch.equal(more, stock)
    cache.check_integrity()


def test_forks_beyond_the_bound_are_refused_by_priority(llama):
    out = generate(
        llama, branching=[ForkOnEntropy(0.0, children=3)], max_branches=5, do_sample=True
    )
    assert len(out) == 5
    assert out.stats.forks_refused > 0
    assert out.stats.peak_branches == 5


def test_pruning_frees_the_bound_for_new_forks(llama):
    out = generate(
        llama, branching=[ForkAtPositions(range(40), 2), PruneByRank(2, every=2)],
        max_branches=4, max_new_tokens=20, do_sample=True, eos_token_id=None,
    )  # fmt: skip
    assert out.stats.forks > 8 and out.stats.prunes > 5
    assert len(out) <= 4


def test_distinct_children_differ_in_their_next_token(llama):
    out = generate(llama, branching=[ForkAtFirstToken(9)], do_sample=False, max_new_tokens=3)
    assert len(set(out.sequences[:, PROMPTS.shape[1]].tolist())) == 9


def test_events_tell_the_whole_story(llama):
    events = []
    record = Record()
    out = generate(
        llama, branching=[record, ForkAtPositions([2, 4]), PruneBelow(-4.5, after=3)],
        tree_streamer=events.append, do_sample=True, eos_token_id=None, max_new_tokens=9,
    )  # fmt: skip
    tokens: dict[int, list[int]] = {0: []}
    ended = []
    for event in events:
        if event.kind == "token":
            tokens.setdefault(event.branch, []).append(event.token)
        elif event.kind == "fork":
            tokens.update({child: list(tokens[event.branch]) for child in event.children})
        else:
            ended.append(event.branch)
    first = PROMPTS.shape[1]
    for row, branch in enumerate(out.branches):
        assert tokens[branch] == out.sequences[row, first:].tolist()
    assert sorted(ended) == sorted(record.gone) == sorted(tokens)


def test_who_shows_nothing_and_listens_to_nothing_pays_for_neither(llama, monkeypatch):
    options = {"branching": [ForkAtFirstToken(3)], "max_new_tokens": 5, "eos_token_id": None}
    shown, totals = [], []

    class Bar(loop.tqdm):
        def set_postfix(self, **values):
            shown.append(values)
            super().set_postfix(**values)

        def close(self):
            totals.append((self.n, self.total))
            super().close()

    monkeypatch.setattr(loop, "tqdm", Bar)
    generate(llama, progress=True, **options)
    assert shown == [{"branches": 3, "finished": 0, "refresh": False}] * 4 + [
        {"branches": 0, "finished": 3, "refresh": False}
    ]
    assert (5, 5) in totals
    shown.clear()
    made = []
    monkeypatch.setattr(loop, "BranchEvent", lambda *args, **what: made.append(args))
    generate(llama, progress=False, **options)
    assert not shown and not made
    generate(llama, progress=False, tree_streamer=lambda event: None, **options)
    assert [kind for kind, *_ in made].count("token") == 15 and not shown


def test_the_record_survives_json_and_draws_itself(llama, tmp_path):
    out = generate(llama, branching=[ForkAtFirstToken(3)], do_sample=True)
    path = tmp_path / "tree.json"
    out.tree.to_json(path)
    again = GenerationTree.from_json(path)
    assert again.to_dict() == out.tree.to_dict() == json.loads(path.read_text())
    assert "3 branches" in out.tree.to_text()
    assert out.tree._repr_html_().startswith("<")


def test_outputs_have_one_row_a_branch(llama):
    out = generate(llama, branching=[ForkAtFirstToken(3)], do_sample=True, eos_token_id=None)
    assert out.sequences.shape == (3, PROMPTS.shape[1] + 12)
    assert out.logprobs.shape == (3, 12) and out.logprobs.isfinite().all()
    assert torch.allclose(out.logprobs.sum(1), out.sequences_scores, atol=1e-4)
    assert out.finish_reasons == ["length"] * 3
    assert len(out) == 3


def test_an_interrupt_returns_what_there_is_and_leaves_the_cache_usable(llama):
    cache = TreeCache(block_size=4)
    seen = []

    def stop(event):
        seen.append(event)
        if len(seen) == 14:
            raise KeyboardInterrupt

    out = generate(
        llama, past_key_values=cache, branching=[ForkAtFirstToken(3)], tree_streamer=stop,
        do_sample=True, eos_token_id=None, max_new_tokens=50,
    )  # fmt: skip
    assert out.finish_reasons == ["interrupted"] * 3
    assert out.stats.steps == 5
    cache.check_integrity()
    assert set(out.branches) == set(cache.rows)
    cache.select([1])
    ids = out.sequences[1:2]
    stock = llama.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    more = llama.generate(
        ids, past_key_values=cache, max_new_tokens=5, do_sample=False, pad_token_id=0
    )
    assert torch.equal(more, stock)


def test_a_processor_that_raises_leaves_the_cache_usable(llama):
    class Raise(LogitsProcessor):
        def __call__(self, input_ids, scores):
            if input_ids.shape[1] > 13:
                raise ZeroDivisionError
            return scores

    cache = TreeCache(block_size=4, poison=True)
    with pytest.raises(ZeroDivisionError):
        generate(
            llama, past_key_values=cache, branching=[ForkAtFirstToken(3)], do_sample=True,
            logits_processor=LogitsProcessorList([Raise()]), eos_token_id=None,
        )  # fmt: skip
    cache.check_integrity()
    cache.reset()
    assert torch.equal(
        generate(llama, past_key_values=cache, do_sample=False).sequences,
        generate(llama, do_sample=False).sequences,
    )


def test_running_out_of_blocks_says_so_and_leaves_the_cache_whole(llama):
    cache = TreeCache(block_size=4, max_blocks=12)
    with pytest.raises(OutOfBlocks, match="12"):
        generate(
            llama, past_key_values=cache, branching=[ForkAtFirstToken(6)], do_sample=True,
            eos_token_id=None, max_new_tokens=30,
        )  # fmt: skip
    cache.check_integrity()
    assert cache.stats().num_rows == 6
    cache.select([0])
    llama(torch.tensor([[5]]), past_key_values=cache)
    cache.check_integrity()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_allow_no_token_are_named(llama, value):
    class Spoil(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return torch.full_like(scores, value) if value < 0 else scores + value

    for do_sample in (True, False):
        with pytest.raises(NonFiniteScores, match="nothing but -inf"):
            generate(llama, do_sample=do_sample, logits_processor=LogitsProcessorList([Spoil()]))


def test_one_processor_may_come_without_a_list(llama):
    one, listed = (
        generate(llama, branching=branching, max_branches=4, do_sample=True)
        for branching in (ForkOnEntropy(0.0), [ForkOnEntropy(0.0)])
    )
    assert len(one) == 4 and one.sequences.tolist() == listed.sequences.tolist()


def test_stop_strings_end_branches():
    llama, tokenizer = build("llama").eval(), letters()
    before = set(vars(llama))
    options = {"do_sample": True, "num_return_sequences": 4, "eos_token_id": None}
    with enable_tree_attention(llama):
        free = generate(llama, **options)
        stop = tokenizer.decode(free.sequences[0, -6])
        out = generate(llama, **options, stop_strings=[stop], tokenizer=tokenizer)
    texts = tokenizer.batch_decode(out.sequences[:, PROMPTS.shape[1] :])
    assert {"stop", "length"} >= set(out.finish_reasons) and "stop" in out.finish_reasons
    for reason, text in zip(out.finish_reasons, texts, strict=True):
        assert (reason == "length") == (stop not in text)
    assert f"{stop} " in out.tree.to_text()  # by the tokenizer
    assert set(vars(llama)) == before


def test_senseless_calls_are_refused(llama):
    with pytest.raises(InvalidArgument, match="max_branches=0"):
        generate(llama, max_branches=0)
    with pytest.raises(InvalidArgument, match="rows to start with"):
        generate(llama, max_branches=3, num_return_sequences=4, do_sample=True)
    with pytest.raises(InvalidArgument, match="num_beams"):
        generate(llama, num_beams=2)
    with pytest.raises(InvalidArgument, match="use_cache"):
        generate(llama, use_cache=False)
    for branching in ("entropy", [ForkOnEntropy], [ForkOnEntropy(1.0), None]):
        with pytest.raises(InvalidArgument, match=r"branching=.* is no processor"):
            generate(llama, branching=branching)
    full = DynamicCache()
    llama(PROMPTS[1:, :4], past_key_values=full)
    with pytest.raises(InvalidArgument, match="DynamicCache"):
        generate(llama, past_key_values=full)


def test_a_model_with_a_past_of_its_own_is_refused():
    config = RwkvConfig(
        vocab_size=99,
        hidden_size=16,
        num_hidden_layers=2,
        context_length=64,
        attention_hidden_size=16,
    )
    model = RwkvForCausalLM(config).eval()
    with pytest.raises(UnsupportedModel, match="format of its own"):
        generate(model, max_new_tokens=3)


def test_a_model_with_an_encoder_branches_too():
    model = build("bart")
    out = model.generate(
        PROMPTS, branching=[ForkAtPositions([2, 3])], max_branches=12, do_sample=True,
        max_new_tokens=9, eos_token_id=None, **SETTINGS,
    )  # fmt: skip
    assert len(out) == 8
    encoded = model.get_encoder()(PROMPTS, attention_mask=MASK)
    for leaf, prompt in zip(out.leaves, out.prompts, strict=True):
        tokens = torch.tensor([out.tree.tokens(leaf)])
        row = out.sequences[out.leaves.index(leaf)]
        assert torch.equal(row, tokens[0])
        logits = model(
            attention_mask=MASK[:1], decoder_input_ids=tokens, use_cache=False,
            encoder_outputs=(encoded.last_hidden_state[:1],),
        ).logits  # fmt: skip
        assert logits.isfinite().all() and prompt in (0, 1)


@pytest.mark.parametrize("output_scores", [False, True])
def test_who_stops_by_scores_asks_for_them_as_in_generate(llama, output_scores):
    seen = []

    class Watch(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            seen.append(scores)
            return torch.zeros(len(input_ids), dtype=torch.bool)

    options = dict(top_k=5, top_p=0.9, do_sample=True, eos_token_id=None, max_new_tokens=4)
    stock = generate(llama, custom_generate=None, **options)
    options |= dict(output_scores=output_scores, stopping_criteria=[Watch()])
    assert torch.equal(generate(llama, **options).sequences, stock)
    if output_scores:
        assert all(((scores > -torch.inf).sum(1) <= 5).all() for scores in seen)
    else:
        assert seen == [None] * 4
