"""What users do around `generate`: go on, fan out, read its outputs, and all at random."""

from __future__ import annotations

import copy
import gc
import random
import weakref

import pytest
import torch
from generating import (
    TOLERANCE,
    Broken,
    FailsOnce,
    assert_continues,
    extended,
    forward,
    llama,
    prefill,
    tree_cache,
    tree_llama,
)
from models import COLUMNS, PAD, assert_same, build, generate, model, one_thread, prompts
from search_fakes import letters
from transformers import (
    DynamicCache,
    PreTrainedModel,
)

from hf_tree_cache import (
    InvalidArgument,
    OutOfBlocks,
    StaleHandle,
    TreeCache,
    enable_tree_attention,
)
from hf_tree_cache.naming import CACHE

__all__ = ["llama", "one_thread", "tree_llama"]  # fixtures
pytestmark = pytest.mark.core


# Going on


def test_conversation_continues_on_the_same_cache(llama: PreTrainedModel) -> None:
    cache, inputs = tree_cache(), prompts()
    first = generate(llama, inputs, past_key_values=cache)
    assert_same(first, generate(llama, inputs))
    longer = extended(first, inputs)
    assert_same(generate(llama, longer, past_key_values=cache), generate(llama, longer))
    # 9 generated, 5 new, 9 generated: the last token of each turn is not in the cache yet.
    assert cache.get_seq_length() == COLUMNS + 9 + 5 + 9 - 1
    cache.check_integrity()


def test_conversation_goes_on_after_sampling_and_beams(tree_llama: PreTrainedModel) -> None:
    cache, inputs = tree_cache(), prompts()
    options = {"do_sample": True, "num_return_sequences": 3}
    first = generate(tree_llama, inputs, past_key_values=cache, **options)
    longer = extended(first, inputs)
    second = generate(tree_llama, longer, past_key_values=cache)
    assert_same(second, generate(tree_llama, longer))
    last = extended(second, longer)
    cache.select([0, 4])
    last = {key: value[[0, 4]] for key, value in last.items()}
    beams = {"num_beams": 3, "do_sample": False}
    assert_same(
        generate(tree_llama, last, past_key_values=cache, **beams),
        generate(tree_llama, last, **beams),
    )
    cache.check_integrity()


@pytest.mark.parametrize("cached", [COLUMNS - 1, COLUMNS - 6], ids=["all but one", "all but six"])
def test_one_cached_prompt_fans_out(llama: PreTrainedModel, cached: int) -> None:
    cache, inputs = tree_cache(), prompts(num_rows=1)
    forward(llama, cache, inputs["input_ids"][:, :cached])
    blocks = cache.stats().blocks
    options = {"do_sample": True, "num_return_sequences": 4}
    ours = generate(llama, inputs, past_key_values=cache, **options)
    assert_same(ours, generate(llama, inputs, **options))
    if llama.config._attn_implementation == "tree_attention" and cached < COLUMNS - 1:
        assert cache.stats().prefill_tokens_computed == COLUMNS
    assert cache.stats().num_rows == 4
    # The prompt's 11 full blocks are there once.
    assert cache.stats().blocks < blocks + 4 * 5
    cache.check_integrity()


def test_cache_outlives_inference_mode(llama: PreTrainedModel) -> None:
    cache, inputs = tree_cache(block_size=16), prompts()
    with torch.inference_mode():
        prefill(llama, cache, inputs)
    assert_continues(llama, cache, inputs["input_ids"], inputs["attention_mask"])
    ids = inputs["input_ids"][:, :3]
    cache.reset()
    with torch.inference_mode():
        forward(llama, cache, ids)
    assert_continues(llama, cache, ids)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_is_as_close_as_transformers(dtype: torch.dtype) -> None:
    """Tokens of a random model may differ in half precision; logits must not stray further."""
    half, exact = build("llama", dtype), build("llama")
    exact.load_state_dict(half.state_dict())
    inputs = prompts()
    theirs = generate(half, inputs)
    tokens, mask = theirs.sequences, extended(theirs, inputs, 0)["attention_mask"]
    real = inputs["attention_mask"].bool()
    want = forward(exact, None, tokens, mask)
    cache, dense = tree_cache(), DynamicCache()
    with enable_tree_attention(half):
        worst = {}
        for name, kv in (("tree", cache), ("dense", dense)):
            start = prefill(half, kv, inputs).float() - want[:, :COLUMNS]
            steps = [
                forward(half, kv, tokens[:, [i]], mask[:, : i + 1]).float() - want[:, [i]]
                for i in range(COLUMNS, COLUMNS + 8)
            ]
            worst[name] = max(
                float(start[real].abs().max()), float(torch.cat(steps, 1).abs().max())
            )
        ours = generate(half, inputs, past_key_values=tree_cache())
    assert not cache.dense_reads
    assert worst["tree"] < 1.5 * worst["dense"] + torch.finfo(dtype).eps

    noise = 4 * worst["dense"]
    for row in range(2):
        for step, (a, b) in enumerate(zip(ours.logits, theirs.logits, strict=True)):
            torch.testing.assert_close(a[row], b[row], rtol=0, atol=noise)
            if ours.sequences[row, COLUMNS + step] != theirs.sequences[row, COLUMNS + step]:
                best = b[row].float().topk(2).values
                assert best[0] - best[1] < noise
                break


def test_generates_under_autocast(llama: PreTrainedModel) -> None:
    """Mixed precision makes float32 keys (rotary) and bfloat16 values."""
    inputs = prompts()
    with torch.autocast("cpu", torch.bfloat16):
        theirs = generate(llama, inputs, max_new_tokens=4)
        ours = generate(llama, inputs, max_new_tokens=4, past_key_values=tree_cache())
    exact = generate(llama, inputs, max_new_tokens=1).logits[0]
    noise = float((theirs.logits[0] - exact).abs().max())
    assert ours.logits[0].dtype == theirs.logits[0].dtype
    torch.testing.assert_close(ours.logits[0], exact, rtol=0, atol=1.5 * noise)
    torch.testing.assert_close(ours.logits[1], theirs.logits[1], rtol=0, atol=3 * noise)


def test_embeddings_instead_of_tokens(llama: PreTrainedModel) -> None:
    inputs, options = prompts(), {"do_sample": True, "num_return_sequences": 3}
    embeds = {
        "inputs_embeds": llama.get_input_embeddings()(inputs["input_ids"]).detach(),
        "attention_mask": inputs["attention_mask"],
    }
    cache = tree_cache()
    ours = generate(llama, embeds, past_key_values=cache, **options)
    assert_same(ours, generate(llama, embeds, **options))
    cache.check_integrity()


# Outputs and books


@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize("cached", [True, False], ids=["TreeCache", "DynamicCache"])
def test_stop_strings_end_rows(cached: bool, num_beams: int) -> None:
    """``generate`` hands their tokenizer on to every forward."""
    llama, tokenizer = model("llama"), letters()
    options = {"max_new_tokens": 12, "pad_token_id": 0, "num_beams": num_beams}
    options["num_return_sequences"] = num_beams
    ids = torch.arange(5, 12)[None]
    free = llama.generate(ids, **options)
    stop = {"stop_strings": [tokenizer.decode(free[0, 10])], "tokenizer": tokenizer}
    want = llama.generate(ids, **options, **stop)
    assert not torch.equal(want, free)
    with enable_tree_attention(llama):
        cache = {CACHE: TreeCache()} if cached else {}
        got = llama.generate(ids, **options, **stop, **cache)
    assert got.tolist() == want.tolist()


@pytest.mark.core
def test_memory_goes_with_the_cache_at_once(tree_llama: PreTrainedModel) -> None:
    cache = TreeCache()
    gc.disable()
    try:
        tree_llama.generate(
            torch.arange(3, 9)[None],
            past_key_values=cache,
            num_return_sequences=2,
            do_sample=True,
            max_new_tokens=4,
            pad_token_id=0,
        )
        kept, storage, layer = weakref.ref(cache), weakref.ref(cache.storages[0]), cache.layers[0]
        del cache
        assert kept() is None
        with pytest.raises(StaleHandle, match="keep the cache"):
            layer.get_seq_length()
        del layer
        assert storage() is None
    finally:
        gc.enable()


def test_hidden_states_of_collapsed_rows_have_the_callers_batch(
    tree_llama: PreTrainedModel,
) -> None:
    inputs, options = prompts(), {"do_sample": True, "num_return_sequences": 3}
    options |= {"output_hidden_states": True, "max_new_tokens": 3}
    theirs = generate(tree_llama, inputs, **options)
    cache = tree_cache()
    ours = generate(tree_llama, inputs, past_key_values=cache, **options)
    assert cache.stats().prefill_tokens_computed == 2 * COLUMNS
    real = inputs["attention_mask"].bool().repeat_interleave(3, 0)
    for step, (got, want) in enumerate(zip(ours.hidden_states, theirs.hidden_states, strict=True)):
        assert len(got) == len(want) == 4
        for a, b in zip(got, want, strict=True):
            assert a.shape == b.shape == (6, 1 if step else COLUMNS, 40)
            where = real if step == 0 else ...
            torch.testing.assert_close(a[where], b[where], rtol=0, atol=TOLERANCE)


def test_finished_rows_can_be_dropped(llama: PreTrainedModel) -> None:
    inputs, cache = prompts(num_rows=3), tree_cache()
    plain = generate(llama, inputs)
    eos = plain.sequences[1, COLUMNS + 3].item()
    output = generate(llama, inputs, past_key_values=cache, eos_token_id=eos)
    assert_same(output, generate(llama, inputs, eos_token_id=eos))
    generated = output.sequences[:, COLUMNS:]
    going = [row for row in range(3) if eos not in generated[row].tolist()]
    assert 1 not in going and going
    assert (generated[1, -3:] == PAD).all()
    longer = extended(output, inputs)
    blocks = cache.stats().blocks
    cache.select(going)
    assert cache.stats().blocks < blocks
    longer = {key: value[going] for key, value in longer.items()}
    assert_same(generate(llama, longer, past_key_values=cache), generate(llama, longer))


def test_prefill_books(tree_llama: PreTrainedModel) -> None:
    cache = tree_cache()
    inputs = prompts()
    prefill(tree_llama, cache, inputs)
    assert cache.stats().prefill_tokens_asked == 2 * COLUMNS
    cache = tree_cache()
    generate(tree_llama, inputs, past_key_values=cache, num_beams=5, do_sample=False)
    stats = cache.stats()
    assert stats.prefill_tokens_asked == 2 * 5 * COLUMNS
    assert stats.prefill_tokens_computed == 2 * COLUMNS
    assert (stats.num_rows, stats.num_held) == (10, 0)
    assert stats.unique_tokens < stats.logical_tokens == 5 * (45 + 38) + 10 * 8
    assert stats.kv_bytes == stats.blocks * 4 * 3 * 2 * 12 * 4
    assert stats.dense_bytes == 10 * (COLUMNS + 8) * 3 * 2 * 12 * 4
    assert stats.saving == 1 - stats.kv_bytes / stats.dense_bytes > 0.4
    assert stats.dense_reads == {}


def test_memory_cap_holds_until_it_is_hit(tree_llama: PreTrainedModel) -> None:
    block = 4 * 3 * 2 * 12 * 4
    cache = tree_cache(max_memory=30 * block + block // 2)
    inputs = prompts()
    with pytest.raises(OutOfBlocks, match="max_memory"):
        generate(tree_llama, inputs, past_key_values=cache, max_new_tokens=60)
    assert 28 * block <= cache.stats().kv_bytes <= 30 * block
    cache.check_integrity()
    cache.reset()
    ours = generate(tree_llama, inputs, past_key_values=cache)
    assert_same(ours, generate(tree_llama, inputs))

    with pytest.raises(InvalidArgument, match=r"model\.config"), torch.no_grad():
        build("llama")(**inputs, past_key_values=tree_cache(max_memory=block))
    short = tree_cache(max_memory=2 * block)
    with pytest.raises(OutOfBlocks, match="max_memory"):
        prefill(tree_llama, short, inputs)
    short.check_integrity()
    assert short.stats().blocks == 0


@pytest.mark.parametrize(
    ("size", "held"), [("1MB", 10**6), ("2MiB", 2 << 20), ("0.5 GB", 5 * 10**8), (12345, 12345)]
)
def test_memory_is_bounded_by_a_number_or_a_text(size: int | str, held: int) -> None:
    assert TreeCache(max_memory=size)._memory.pool.max_memory == held


@pytest.mark.parametrize("size", ["much", "1XB", "", "-1GB", 0])
def test_senseless_bounds_of_memory_are_refused(size: int | str) -> None:
    with pytest.raises(InvalidArgument, match=r"max_memory=.*give bytes"):
        TreeCache(max_memory=size)


# Everything together


class Walk:
    """Random operations on a cache, and the tokens that its branches should hold by now."""

    def __init__(self, model: PreTrainedModel, seed: int) -> None:
        self.model = model
        self.random = random.Random(seed)
        self.cache = tree_cache(block_size=self.random.choice([1, 3, 4, 16]))
        self.rows: list[list[int]] = [[] for _ in range(self.random.choice([1, 2, 3]))]
        self.held: dict[int, list[int]] = {}
        self.columns = 0

    def forward(self, fails: bool = False, fan_out: int = 1) -> None:
        """Some tokens for every row, often equal ones, with left padding where rows are empty."""
        rows = [list(row) for row in self.rows for _ in range(fan_out)]
        size = self.random.choice([1, 1, 1, 2, 3, 6, 17])
        common = [self.random.randrange(3, 90) for _ in range(size)]
        new = [common] * len(rows)
        if self.random.random() < 0.4:
            new = [[self.random.randrange(3, 90) for _ in range(size)] for _ in rows]
        pads = [
            0 if row or self.columns else self.random.choice([0, 0, 1, size // 2]) for row in rows
        ]
        pads[-1] = 0
        ids = torch.tensor([[PAD] * p + t[p:] for p, t in zip(pads, new, strict=True)])
        after = [row + t[p:] for row, p, t in zip(rows, pads, new, strict=True)]
        mask = torch.zeros(len(rows), self.columns + size, dtype=torch.int64)
        for row, tokens in enumerate(after):
            mask[row, mask.shape[1] - len(tokens) :] = 1
        if fails:
            layer = self.random.choice([*self.model.model.layers, self.model.lm_head])
            with FailsOnce(layer, 1), pytest.raises(Broken):
                forward(self.model, self.cache, ids, mask)
            return
        logits = forward(self.model, self.cache, ids, mask)
        self.rows, self.columns = after, mask.shape[1]
        for row, tokens in enumerate(after):
            count = size - pads[row]
            want = forward(self.model, None, torch.tensor([tokens]))[0, len(tokens) - count :]
            torch.testing.assert_close(logits[row, pads[row] :], want, rtol=0, atol=2 * TOLERANCE)

    def select(self) -> None:
        chosen = self.random.choices(range(len(self.rows)), k=self.random.randrange(1, 6))
        self.cache.select(chosen)
        self.rows = [list(self.rows[row]) for row in chosen]

    def crop(self) -> None:
        removed = self.random.randrange(min(self.columns, 9) + 1)
        self.cache.crop(-removed)
        self.columns -= removed
        self.rows = [row[: max(0, len(row) - removed)] for row in self.rows]

    def fork(self) -> None:
        row = self.random.randrange(len(self.rows))
        at = self.random.randrange(len(self.rows[row]) + 1)
        for branch in self.cache.fork(self.cache.rows[row], 2, at=at):
            self.held[branch] = self.rows[row][:at]

    def set_rows(self) -> None:
        known = dict(zip(self.cache.rows, self.rows, strict=True)) | self.held
        chosen = self.random.sample(list(known), self.random.randrange(1, min(len(known), 5) + 1))
        self.cache.set_rows(chosen)
        self.rows = [list(known[branch]) for branch in chosen]
        self.held = {branch: known[branch] for branch in known if branch not in chosen}
        self.columns = max(len(row) for row in self.rows)

    def prune(self) -> None:
        if self.held:
            branch = self.random.choice(list(self.held))
            self.cache.prune(branch)
            del self.held[branch]

    def copy(self) -> None:
        self.cache = copy.deepcopy(self.cache)

    def step(self) -> None:
        operations = [self.select, self.crop, self.fork, self.set_rows, self.prune, self.copy]
        operations += [self.forward] * 5 + [lambda: self.forward(fails=True)]
        if len(self.rows) < 4:
            operations.append(lambda: self.forward(fan_out=2))
        (self.random.choice(operations) if self.columns else self.forward)()
        self.cache.check_integrity()
        assert self.cache.get_seq_length() == self.columns
        assert self.cache.tree.row_lengths() == [len(row) for row in self.rows]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["llama", "mistral", "deepseek_v3"])
def test_random_walk(name: str, seed: int) -> None:
    with enable_tree_attention(model(name)):
        walk = Walk(model(name), seed)
        for _ in range(25):
            walk.step()
    assert not walk.cache.dense_reads
