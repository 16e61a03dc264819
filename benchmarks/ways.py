"""Ways to generate N branches of a prompt: ours, and transformers' own."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from steps import Marks, Timeline, settle
from transformers import (
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_tree_cache import (
    BranchingProcessor,
    BranchRunner,
    Sampling,
    Stop,
    TreeCache,
    tree_generate,
)

BATCHING_BLOCK = 256
"""Tokens of a block in continuous batching, as it is by default."""
BATCHING_SECONDS = 60.0


@dataclass(frozen=True)
class Workload:
    """P, N and T.

    Attributes:
        churn: forks and prunes all the time.
        chunk: tokens of the parts that a prompt is computed in; None for all at once.
    """

    prompt: int
    rows: int
    tokens: int
    churn: bool = False
    chunk: int | None = None

    def __str__(self) -> str:
        return f"{self.rows} x {self.prompt:,}{', forking' if self.churn else ''}"


class Churn(BranchingProcessor):
    """Every ``every`` tokens the ``count`` least likely branches go, and the likeliest fork."""

    def __init__(self, rows: int, every: int = 8, count: int = 8) -> None:
        self.rows, self.every, self.count = rows, every, min(count, rows // 2)
        self.step = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.step += 1
        order = sorted(range(len(scores)), key=lambda row: self.batch.logprobs[row])
        if len(scores) < self.rows:
            self.fork(order[-1], self.rows - len(scores))
        elif self.step % self.every == 0:
            for row in order[: self.count]:
                self.prune(row)
            for row in order[-self.count :]:
                self.fork(row, 1)
        return scores


def prompt_of(model: PreTrainedModel, length: int) -> torch.Tensor:
    """``[1, length]`` random tokens, the same ones each time."""
    torch.manual_seed(1)
    most = min(120_000, model.config.vocab_size)
    return torch.randint(0, most, (1, length), device=model.device)


def generate(model: PreTrainedModel, work: Workload, tokens: int, **options: Any) -> Timeline:
    """Sample ``tokens`` for every branch; ``options`` go to ``model.generate``."""
    ids = prompt_of(model, work.prompt)
    marks = Marks()
    if "custom_generate" in options:
        options["stopping_criteria"] = [marks]
    with nullcontext() if "custom_generate" in options else marks.beside():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            top_k=0,
            num_return_sequences=work.rows,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            prefill_chunk_size=work.chunk,
            **options,
        )
    timeline = marks.timeline()
    sequences = getattr(out, "sequences", out)
    assert sequences.shape == (work.rows, work.prompt + tokens), sequences.shape
    return timeline


def with_dynamic(model: PreTrainedModel, work: Workload, tokens: int) -> Timeline:
    return generate(model, work, tokens, past_key_values=DynamicCache())


def with_static(model: PreTrainedModel, work: Workload, tokens: int) -> Timeline:
    """On a GPU ``generate`` compiles the forward by itself. One length of cache, so once."""
    most = work.prompt + work.tokens
    return generate(model, work, tokens, cache_implementation="static", max_cache_len=most)


def forget_compiled(model: PreTrainedModel) -> None:
    """So that the next size of batch is compiled for itself, not for any size."""
    torch.compiler.reset()
    for name in ("_compiled_call", "_previous_max_cache_length"):
        model.__dict__.pop(name, None)


def with_tree(model: PreTrainedModel, work: Workload, tokens: int) -> Timeline:
    return generate(model, work, tokens, past_key_values=TreeCache())


def with_tree_generate(model: PreTrainedModel, work: Workload, tokens: int) -> Timeline:
    options: dict[str, Any] = {"custom_generate": tree_generate, "past_key_values": TreeCache()}
    options["max_branches"] = work.rows
    if work.churn:
        options["branching"] = [Churn(work.rows)]
    return generate(model, work, tokens, progress=False, **options)


def with_runner(model: PreTrainedModel, work: Workload, tokens: int) -> Timeline:
    """As sessions and searches carry branches on; on the clock of the host."""
    ids = prompt_of(model, work.prompt)[0].tolist()
    settle()
    begin, marks = time.perf_counter(), []
    runner = BranchRunner(model, sampling=Sampling())
    branches = runner.add_prompts([ids])
    branches += runner.fork(branches[0], work.rows - 1)
    for _ in runner.steps(branches, max_new_tokens=tokens, stop=Stop(eos=False), with_text=False):
        marks.append(time.perf_counter() - begin)
    settle()
    return Timeline(marks, time.perf_counter() - begin)


@dataclass(frozen=True)
class Paged:
    """An attention that continuous batching can have.

    Attributes:
        block_tables: whether its decode steps may read blocks in place.
    """

    name: str
    block_tables: bool = True


def paged_attentions() -> list[Paged]:
    """What is installed, the fastest first."""
    found = []
    # Newer versions of transformers find out by themselves.
    prefix = "paged|" if "paged|sdpa" in ALL_ATTENTION_FUNCTIONS.valid_keys() else ""
    if find_spec("flash_attn_interface"):
        found.append(Paged(f"{prefix}flash_attention_3"))
    elif find_spec("fa3_fwd_interface"):
        found.append(Paged(f"{prefix}flash_attention_3", block_tables=False))
    elif find_spec("flash_attn"):
        found.append(Paged(f"{prefix}flash_attention_2"))
    return [*found, Paged(f"{prefix}sdpa", block_tables=False)]


@contextmanager
def attending(model: PreTrainedModel, attention: Paged) -> Iterator[None]:
    """``model`` with an attention that transformers may not know to be installed."""
    before = model.config._attn_implementation
    alias = "flash_attn_interface"
    borrowed = "flash_attention_3" in attention.name and not attention.block_tables
    if borrowed:
        # FlashAttention-3's forward by itself (fa3-fwd) is installed under a name of its own.
        sys.modules[alias] = import_module("fa3_fwd_interface")
    # set_attn_implementation would ask for the distribution's name.
    model.config._attn_implementation = attention.name
    try:
        yield
    finally:
        model.config._attn_implementation = before
        if borrowed:
            del sys.modules[alias]


def with_batching(
    model: PreTrainedModel, work: Workload, tokens: int, *, graphs: bool, ahead: bool
) -> Timeline:
    """transformers' continuous batching, its prompt computed once and forked N times.

    ``generate_batch`` does the same, and then drops all but the first of a prompt's sequences.

    Args:
        graphs: steps from CUDA graphs, padded to 32 tokens a branch; the likeliest token instead of
            one that is drawn, as padded rows have no attention: multinomial aborts at their NaN.
        ahead: prepare a step while the last one runs.
    """
    *fast, plain = paged_attentions()
    for attention in fast:
        try:
            with attending(model, attention):
                return _batch(model, work, tokens, attention, graphs, ahead)
        except Exception as error:
            print(f"{attention.name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
    with attending(model, plain):
        return _batch(model, work, tokens, plain, graphs, ahead)


def _batch(
    model: PreTrainedModel,
    work: Workload,
    tokens: int,
    attention: Paged,
    graphs: bool,
    ahead: bool,
) -> Timeline:
    config = GenerationConfig(
        do_sample=True,
        top_k=0,
        eos_token_id=-1,
        pad_token_id=0,
        num_return_sequences=work.rows,
        max_new_tokens=tokens,
    )
    config.do_sample = not graphs  # its constructor refuses several sequences without drawing
    # A step reads at most as many tokens as the cache has room for, shared ones once a branch.
    blocks = work.rows * (2 + (work.prompt + tokens) // BATCHING_BLOCK)
    batching = ContinuousBatchingConfig(
        num_blocks=blocks,
        max_blocks_per_request=None if attention.block_tables else 0,
        max_batch_tokens=max(2_048, work.rows),
        max_requests_per_batch=work.rows,
        use_cuda_graph=graphs,
        use_async_batching=ahead,
        q_padding_interval_size=work.rows if graphs else 0,
        kv_padding_interval_size=32 * work.rows if graphs else 0,
        seed=0,
    )
    ids = prompt_of(model, work.prompt)[0].tolist()
    begun = time.perf_counter()
    outputs: list[Any] = []
    with model.continuous_batching_context_manager(
        generation_config=config, continuous_batching_config=batching, timeout=10
    ) as manager:
        settle()
        begin = time.perf_counter()
        manager.add_request(ids, max_new_tokens=tokens, record_timestamps=True, eos_token_id=-1)
        while len(outputs) < work.rows and time.perf_counter() - begin < BATCHING_SECONDS:
            output = manager.get_result(timeout=1)
            if output is not None and output.is_finished():
                outputs.append(output)
            elif output is None and not manager.is_running():
                break
        total = time.perf_counter() - begin
        if len(outputs) < work.rows:
            manager.stop(block=True, timeout=10, hard_stop=True)
    errors = {output.error for output in outputs if output.error is not None}
    if errors or len(outputs) < work.rows:
        raise RuntimeError(f"{len(outputs)} of {work.rows} came back: {errors or 'no error'}")
    assert all(len(output.generated_tokens) == tokens for output in outputs)
    stamps = [output.timestamps[:tokens] for output in outputs]
    timeline = Timeline([max(row) - begin for row in zip(*stamps, strict=True)], total)
    timeline.notes = {"setup_s": begin - begun, "attention": attention.name}
    return timeline


def _batching(graphs: bool, ahead: bool) -> Callable[[PreTrainedModel, Workload, int], Timeline]:
    def run(model: PreTrainedModel, work: Workload, tokens: int) -> Timeline:
        return with_batching(model, work, tokens, graphs=graphs, ahead=ahead)

    return run


@dataclass
class Way:
    """One way to generate.

    Attributes:
        run: generates T tokens.
        enable: settings of :func:`enable_tree_attention`, None to leave the model as it is.
        kv_per_row: whether each branch stores its whole prompt.
        for_churn: whether it can fork and prune.
        around: called before and after each workload.
        warm_up: tokens of a run that is not measured; 0 for what warms up by itself.
        repeats: runs, of which the fastest counts.
        most_rows, most_prompt: largest workloads that are measured, for those that take minutes.
        most_tokens: fewer tokens than the workload has, likewise.
        most_seconds: rough time of one workload at 8B, to leave out what no longer fits.
    """

    run: Callable[[PreTrainedModel, Workload, int], Timeline]
    enable: dict[str, Any] | None = field(default_factory=dict)
    kv_per_row: bool = False
    for_churn: bool = False
    around: Callable[[PreTrainedModel], None] | None = None
    warm_up: int = 12
    repeats: int = 2
    most_rows: int = 1 << 20
    most_prompt: int = 1 << 20
    most_tokens: int = 1 << 20
    most_seconds: float = 15

    def takes(self, work: Workload) -> bool:
        if work.churn and not self.for_churn:
            return False
        return work.rows <= self.most_rows and work.prompt <= self.most_prompt


def _peer(run: Callable[..., Timeline], **limits: Any) -> Way:
    defaults = {"most_rows": 64, "most_prompt": 2_000, "repeats": 1, "warm_up": 0}
    return Way(run, None, kv_per_row=True, **(defaults | limits))


WAYS = {
    "tree_generate": Way(with_tree_generate, {}, for_churn=True),
    "tree_generate, compiled": Way(with_tree_generate, {"compile": True}, for_churn=True),
    "stock generate, TreeCache": Way(with_tree, {}),
    "stock generate, TreeCache, compiled": Way(with_tree, {"compile": True}),
    "stock generate, DynamicCache": _peer(with_dynamic, warm_up=3, most_seconds=40),
    "continuous batching": _peer(_batching(False, False), most_tokens=32, most_seconds=30),
    "continuous batching, graphs": _peer(_batching(True, False), most_tokens=32, most_seconds=30),
    "stock generate, static cache, compiled": _peer(
        with_static, around=forget_compiled, warm_up=6, most_tokens=64, most_seconds=90
    ),
    "continuous batching, graphs, async": _peer(
        _batching(True, True), most_tokens=32, most_seconds=30
    ),
    "stock generate, TreeCache, no graphs": Way(
        with_tree, {"cuda_graphs": False}, repeats=1, most_rows=64, most_prompt=2_000
    ),
    "BranchRunner": Way(with_runner, {}, most_rows=64, most_prompt=2_000),
}
"""In the order of importance: what the clock cuts off is at the end."""
