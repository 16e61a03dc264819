"""tree_generate: a decoding loop whose batch is the set of live branches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)

from ..errors import InvalidArgument, OutOfBlocks
from ..integration.cache import TreeCache
from ..naming import CACHE
from ..sending import Arriving, to_device, works_ahead
from .batch import LiveBatch
from .decide import NextRows, decide
from .options import Sampling
from .output import BranchEvent, EventKind, TreeGenerateOutput, TreeGenerateStats
from .processors import BranchingProcessor, run_processors
from .record import GenerationTree
from .sampling import check_drawn, draw_tokens
from .stopping import Stopping
from .uncertainty import Uncertainty


def tree_generate(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    generation_config: GenerationConfig | None = None,
    branching: Sequence[BranchingProcessor] | BranchingProcessor = (),
    max_branches: int = 64,
    keep_branches: bool = False,
    tree_streamer: Callable[[BranchEvent], None] | None = None,
    tree_tokenizer: Any = None,
    progress: bool | None = None,
    tokenizer: Any = None,
    **model_kwargs: Any,
) -> TreeGenerateOutput:
    """Generate a tree: pass it as ``model.generate(..., custom_generate=tree_generate)``.

    Each step runs the model on one token of every live branch, lets the processors fork and prune,
    draws the next tokens, and takes finished branches out of the batch. Without forks and prunes
    the tokens are those of ``generate`` under the same seed, as long as no branch ends early.
    ``stop_strings`` with ``tokenizer`` need an enabled model: ``generate`` by itself keeps the
    tokenizer from other loops.

    ``branching`` processors see the model's logits before ``logits_processor`` (temperature, top-p)
    changes them; a BranchingProcessor may also stand among the logits processors. Ctrl-C ends the
    run and returns what there is; any other exception leaves the cache usable.

    Args:
        branching: processors that fork and prune, or one.
        max_branches: most branches alive or finished at a time; forks beyond it are refused, those
            of least priority first. At least the number of rows to start with.
        keep_branches: hold finished branches in the cache instead of freeing them.
        tree_streamer: told of every event as it happens (``streamer`` cannot reach this loop).
        tree_tokenizer: decodes tokens in the views of the tree; default ``tokenizer``.
        progress: show a bar; default only on a terminal or in a notebook.

    Raises:
        InvalidArgument: ``max_branches`` below the rows to start with, a cache that is not a
            TreeCache, ``use_cache=False``, beams, something else for a processor.
        UnsupportedModel: a model that keeps its past elsewhere than in the cache.
        NonFiniteScores: NaN, +inf or nothing but -inf among the scores of a row.
        OutOfBlocks: no room for the next token of every branch.
    """
    config = generation_config or model.generation_config
    if config.num_beams > 1:
        raise InvalidArgument(
            "tree_generate has no beams: leave num_beams, fork and prune instead."
        )
    if not model_kwargs.setdefault("use_cache", True):
        raise InvalidArgument("tree_generate needs the cache: leave out use_cache=False.")
    if not len(input_ids) <= max_branches:
        raise InvalidArgument(
            f"tree_generate(max_branches={max_branches}): there are {len(input_ids)} rows to start "
            "with (prompts x num_return_sequences); give at least as many."
        )
    cache = _tree_cache(model, model_kwargs)
    run = _Run(
        model=model,
        config=config,
        cache=cache,
        logits_processor=logits_processor or LogitsProcessorList(),
        stopping=Stopping(stopping_criteria or ()),
        branching=_processors(branching),
        max_branches=max_branches,
        keep_branches=keep_branches,
        tree=GenerationTree(tokenizer if tree_tokenizer is None else tree_tokenizer),
        tell=tree_streamer,
    )
    with torch.no_grad():
        return run.drive(input_ids, model_kwargs, progress)


def _processors(
    branching: Sequence[BranchingProcessor] | BranchingProcessor,
) -> list[BranchingProcessor]:
    given = [branching] if callable(branching) or isinstance(branching, str) else list(branching)
    wrong = [each for each in given if isinstance(each, type) or not callable(each)]
    if wrong:
        raise InvalidArgument(
            f"tree_generate(branching={branching!r}): {wrong[0]!r} is no processor; pass objects, "
            "such as ForkOnEntropy(threshold=2.0)."
        )
    return given


def _tree_cache(model: PreTrainedModel, model_kwargs: dict[str, Any]) -> TreeCache:
    """The TreeCache of the run; one is made where the caller passed none."""
    given: Any = model_kwargs.get(CACHE)
    if isinstance(given, EncoderDecoderCache) and given.get_seq_length() == 0:
        inner = given.self_attention_cache
        given = given if isinstance(inner, TreeCache) else None
    elif type(given) is DynamicCache and given.get_seq_length() == 0:
        given = None
    if given is None and model.config.is_encoder_decoder:
        given = EncoderDecoderCache(TreeCache(), TreeCache())
    elif given is None:
        given = TreeCache(model.config)
    model_kwargs[CACHE] = given
    inner = given.self_attention_cache if isinstance(given, EncoderDecoderCache) else given
    if not isinstance(inner, TreeCache):
        raise InvalidArgument(
            f"tree_generate got a {type(given).__name__}: pass {CACHE}=TreeCache(), or nothing."
        )
    inner.configure(model.config)
    return inner


@dataclass
class _Run:
    """One call of :func:`tree_generate`."""

    model: Any
    config: GenerationConfig
    cache: TreeCache
    logits_processor: LogitsProcessorList
    stopping: Stopping
    branching: list[BranchingProcessor]
    max_branches: int
    keep_branches: bool
    tree: GenerationTree
    tell: Callable[[BranchEvent], None] | None
    stats: TreeGenerateStats = field(default_factory=TreeGenerateStats)
    finished: list[tuple[int, int, str]] = field(default_factory=list)  # (node, branch, reason)

    def __post_init__(self) -> None:
        """Temperature, top-k, top-p and min-p are for the sampler, the rest comes before it."""
        self.processors = [*self.branching, *self.logits_processor]
        if not self.config.do_sample:
            self.sampling = Sampling.greedy()
        elif self.config.output_scores:
            self.sampling = Sampling()
        else:
            self.processors, self.sampling = Sampling.behind(self.processors)

    def drive(
        self,
        input_ids: torch.Tensor,
        model_kwargs: dict[str, Any],
        progress: bool | None,
    ) -> TreeGenerateOutput:
        """Run to the end, or to Ctrl-C."""
        started, before = time.perf_counter(), self.cache.stats()
        num_prompt = input_ids.shape[1]
        batch = LiveBatch.of(input_ids, model_kwargs, self.tree)
        disable = None if progress is None else not progress
        total = self.config.max_length and self.config.max_length - num_prompt
        # Who draws from logits does so before the next forward; others may keep them.
        only_drawn = not self.processors and not self.config.output_scores
        lending = self.cache.lending_outputs() if only_drawn else nullcontext()
        try:
            with (
                lending,
                tqdm(total=total, desc="tree_generate", unit="step", disable=disable) as bar,
            ):
                for _ in self._steps(batch):
                    if not bar.disable:
                        finished = len(self.finished)
                        bar.set_postfix(branches=len(batch), finished=finished, refresh=False)
                        bar.update()
        except KeyboardInterrupt:
            self._step_back(num_prompt)
            for node, branch in zip(batch.nodes, batch.branches, strict=False):
                self.tree.finish(node, "interrupted")
                self.finished.append((node, branch, "interrupted"))
        except BaseException:
            self._step_back(num_prompt)
            raise
        self.stats.seconds = time.perf_counter() - started
        after = self.cache.stats()
        self.stats.prefill_tokens_asked = after.prefill_tokens_asked - before.prefill_tokens_asked
        self.stats.prefill_tokens_computed = (
            after.prefill_tokens_computed - before.prefill_tokens_computed
        )
        return self._output(input_ids, model_kwargs[CACHE])

    def _steps(self, batch: LiveBatch) -> Iterator[None]:
        """Step by step until no branch is left."""
        logits = batch.prefill(self.model, self.config, self.cache)
        while True:
            self._note_peak(batch)
            if self.processors:
                logits = logits.float()
            view = batch.view()
            scores, actions = run_processors(self.processors, batch.input_ids, logits, view)
            uncertainty = view.uncertainty
            if actions:
                budget = self.max_branches - len(batch) - len(self.finished)
                rows = decide(actions, len(batch), budget)
                index = to_device(rows.parents, logits.device)
                unchanged, uncertainty = scores is logits, Uncertainty()
                logits = logits[index]
                scores = logits if unchanged else scores[index]
                self._apply(rows, batch)
                distinct = [
                    [parent, *children] for parent, children, apart, _ in rows.forks if apart
                ]
            else:
                distinct = []
            if not len(batch):
                return
            drawn = self._draw(batch, logits, scores, distinct, uncertainty)
            ahead = self._run_ahead(batch)
            left = self._record(batch, drawn)
            yield
            if not left:
                return
            if ahead is None:
                logits = batch.forward(self.model)
            else:
                logits = ahead
                if len(left) < len(ahead):
                    logits = ahead[to_device(left, ahead.device)]

    def _apply(self, rows: NextRows, batch: LiveBatch) -> None:
        """Make the batch, the cache and the record what ``rows`` says."""
        old = list(batch.branches)
        for row, reason in rows.pruned:
            self.tree.prune(batch.nodes[row], reason)
        batch.select(rows.parents)
        for parent, children, _, reason in rows.forks:
            nodes = self.tree.fork(batch.nodes[parent], 1 + len(children), reason)
            for row, node in zip([parent, *children], nodes, strict=True):
                batch.nodes[row] = node
        self.stats.prunes += len(rows.pruned)
        self.stats.forks_refused += rows.refused
        for row, reason in rows.pruned:
            self._tell_gone(old[row])
            self._tell("prune", old[row], reason=reason)
        for parent, children, _, reason in rows.forks:
            branch = batch.branches[parent]
            made = tuple(batch.branches[child] for child in children)
            self.stats.forks += len(made)
            for processor in self._branching_processors():
                processor.on_fork(branch, made)
            self._tell("fork", branch, children=made, reason=reason)

    def _tell(self, kind: EventKind, branch: int, **what: Any) -> None:
        """The streamer, if there is one: most runs have none, and a step has many tokens."""
        if self.tell is not None:
            self.tell(BranchEvent(kind, branch, self.stats.steps, **what))

    def _draw(
        self,
        batch: LiveBatch,
        logits: torch.Tensor,
        scores: torch.Tensor,
        distinct: list[list[int]],
        uncertainty: Uncertainty,
    ) -> Arriving:
        """Draw and append the next tokens, on the device; the host need not wait for them."""
        drawn = draw_tokens(logits, scores, self.sampling, distinct, uncertainty=uncertainty)
        batch.input_ids = torch.cat([batch.input_ids, drawn.tokens[:, None]], 1)
        # As in generate, who stops by scores asks for them.
        shown: Any = scores if self.config.output_scores else None
        stopped = self.stopping.ask(batch.input_ids, shown)
        if stopped is None:
            return Arriving(drawn.table)
        return Arriving(torch.cat([drawn.table, stopped.to(drawn.table)[None]]))

    def _run_ahead(self, batch: LiveBatch) -> torch.Tensor | None:
        """Run the next step before the host knows what was drawn, so that the GPU never waits.

        Rows that turn out to be finished were computed in vain, and leave after it.
        """
        limit = self.config.max_length
        if limit and batch.input_ids.shape[1] >= limit:
            return None
        if not works_ahead(batch.input_ids.device) or self.keep_branches:
            return None
        if self.cache.has_states:
            return None
        try:
            return batch.forward(self.model)
        except OutOfBlocks:  # finished rows may still make room
            return None

    def _step_back(self, num_prompt: int) -> None:
        """Leave in the cache what ``generate`` leaves: all booked tokens but the last."""
        self.cache.rollback()
        excess = self.cache.get_seq_length() - (num_prompt + self.stats.steps - 1)
        if excess > 0 and not self.cache.has_states:
            self.cache.crop(-excess)

    def _record(self, batch: LiveBatch, drawn: Arriving) -> list[int]:
        """Wait for what was drawn, book it, and let finished rows go; which rows are left."""
        numbers, broken, logprobs, *stopped = drawn.read()
        check_drawn(broken, batch.branches)
        tokens = [int(number) for number in numbers]
        batch.note(tokens, logprobs, self.tree)
        self.stats.steps += 1
        if self.tell is not None:
            for branch, token, logprob in zip(batch.branches, tokens, logprobs, strict=True):
                self._tell("token", branch, token=token, logprob=logprob)
        done = self.stopping.known(tokens, batch.input_ids.shape[1])
        for asked in stopped:
            done = [known or bool(over) for known, over in zip(done, asked, strict=True)]
        left = [row for row, over in enumerate(done) if not over]
        if len(left) < len(done):
            self._finish([row for row, over in enumerate(done) if over], batch)
        return left

    def _finish(self, rows: list[int], batch: LiveBatch) -> None:
        gone = set(rows)
        for row in rows:
            node, branch = batch.nodes[row], batch.branches[row]
            reason = self._finish_reason(self.tree.nodes[node].tokens[-1], batch)
            self.tree.finish(node, reason)
            self.finished.append((node, branch, reason))
            self._tell_gone(branch)
            self._tell("finish", branch, reason=reason)
        left = [row for row in range(len(batch)) if row not in gone]
        batch.select(left, hold=self.keep_branches)

    def _finish_reason(self, token: int, batch: LiveBatch) -> str:
        eos = self.config.eos_token_id
        if eos is not None and token in (eos if isinstance(eos, (list, tuple)) else [eos]):
            return "eos"
        limit = self.config.max_length
        return "length" if limit and batch.input_ids.shape[1] >= limit else "stop"

    def _branching_processors(self) -> list[BranchingProcessor]:
        among = [p for p in self.logits_processor if isinstance(p, BranchingProcessor)]
        return [*self.branching, *among]

    def _tell_gone(self, branch: int) -> None:
        for processor in self._branching_processors():
            processor.on_prune(branch)

    def _note_peak(self, batch: LiveBatch) -> None:
        stats = self.stats
        stats.peak_branches = max(stats.peak_branches, len(batch))
        stats.peak_kv_bytes = max(stats.peak_kv_bytes, self.cache.kv_bytes)

    def _output(self, input_ids: torch.Tensor, cache: Any) -> TreeGenerateOutput:
        tree, stats = self.tree, self.stats
        order = {node: i for i, node in enumerate(tree.walk())}
        done = sorted(self.finished, key=lambda entry: order[entry[0]])
        leaves = [node for node, _, _ in done]
        pad = self.config.pad_token_id
        pad = pad[0] if isinstance(pad, (list, tuple)) else pad
        sequences = [torch.tensor(tree.tokens(leaf)) for leaf in leaves]
        logprobs = [torch.tensor(tree.logprobs(leaf), dtype=torch.float32) for leaf in leaves]
        stats.tokens_generated = tree.num_tokens
        stats.tokens_flat = tree.num_tokens_flat
        longest = max((len(sequence) for sequence in sequences), default=0)
        stats.dense_kv_bytes = self.cache.dense_bytes([longest] * len(leaves))
        return TreeGenerateOutput(
            sequences=_pad(sequences, 0 if pad is None else int(pad)).to(input_ids.device),
            logprobs=_pad(logprobs, float("nan")).to(input_ids.device),
            sequences_scores=torch.tensor([tree.logprob(leaf) for leaf in leaves]),
            prompts=[tree.nodes[leaf].prompt for leaf in leaves],
            finish_reasons=[reason for _, _, reason in done],
            branches=[branch for _, branch, _ in done],
            leaves=leaves,
            tree=tree,
            stats=stats,
            past_key_values=cache,
        )


def _pad(rows: list[torch.Tensor], value: float) -> torch.Tensor:
    if not rows:
        return torch.empty(0, 0)
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
