"""TreeCache: transformers' Cache over a tree of shared blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import convert_file_size_to_int
from transformers import PretrainedConfig
from transformers.cache_utils import (
    Cache,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
)
from transformers.utils import logging

from ..attention.dispatch import choose_backend
from ..attention.plan import TreeAttentionPlan, build_plan
from ..errors import (
    AdapterMismatch,
    BatchMismatch,
    IntegrityError,
    InvalidArgument,
    OutOfBlocks,
    StorageMismatch,
    TreeCacheError,
    UnsupportedModel,
)
from ..memory.storage import KVSpec, KVStorage
from ..memory.tree import Branch, BranchTree
from ..memory.tree_memory import TreeMemory
from .handles import PagedKV
from .layers import OtherLayers, PagedLayer, make_layers
from .stats import KindStats, TreeCacheStats
from .step import UNKNOWN_READER, DenseView, LayerKV, Step, gather_dense

if TYPE_CHECKING:
    from .static import StaticDecode  # needs Triton

logger = logging.get_logger(__name__)


class TreeCache(Cache):
    """A KV cache whose rows share their common past, block by block.

    Pass it to ``model.generate(..., cache=TreeCache())``, or ``past_key_values=`` before
    transformers 5.24, in any decoding mode. Rows that descend from one prompt share its blocks;
    forking a row copies nothing, dropping one frees what only it held. With
    :func:`enable_tree_attention` shared blocks are also computed and read once.

    Batch surgery is one primitive, :meth:`select`; branches can also be taken out of the batch and
    brought back with :meth:`fork` and :meth:`set_rows`.

    Args:
        config: the model's config. Needed up front only for models with linear-attention layers
            that run without :func:`enable_tree_attention`, which configures a bare cache from its
            model.
        block_size: token slots of a block.
        max_blocks: most blocks in use at a time, whether or not all layers keep them.
        max_memory: most bytes of K/V in use at a time, over all layers, as a number or a text such
            as "8GB" or "8GiB"; needs a known config.
        backtrack: tokens that every branch can be taken back by at any time, with ``fork(at=)`` or
            :meth:`crop`, beyond those of the last forward. Layers with a sliding or chunked window
            let go what lies further back than that from the window of every branch; None keeps
            everything, so that one can go back anywhere. Without such layers it changes nothing.
        backend: attention backend, see :func:`hf_tree_cache.attention.dispatch.choose_backend`.
        deterministic: with the fused kernel, a branch's attention does not depend on its siblings,
            bit for bit; slower where much is shared.
        poison: fill free slots with NaN. For tests: a read of what was never written then shows.

    Raises:
        InvalidArgument: a bound or block size below 1, a negative ``backtrack``, an unknown
            backend, something that is not a config.

    Attributes:
        dense_reads: how often, and why, a layer's K/V had to be gathered into dense tensors.
        advise: say once how to make dense reads unnecessary.
    """

    layers: list[Any]

    def __init__(
        self,
        config: PretrainedConfig | None = None,
        *,
        block_size: int = 16,
        max_blocks: int | None = None,
        max_memory: int | str | None = None,
        backtrack: int | None = 256,
        backend: str | None = None,
        deterministic: bool = False,
        poison: bool = False,
    ) -> None:
        if config is not None and not isinstance(config, PretrainedConfig):
            raise InvalidArgument(
                f"TreeCache(config={type(config).__name__}): pass model.config, or nothing at all."
            )
        super().__init__(layers=[])
        self.block_size = block_size
        self.backend = choose_backend(backend)
        self.deterministic = deterministic
        self.dense_reads: Counter[str] = Counter()
        self.advise = True
        self._memory = TreeMemory(
            block_size,
            max_blocks=max_blocks,
            max_memory=_as_bytes(max_memory) if isinstance(max_memory, str) else max_memory,
            backtrack=backtrack,
            poison=poison,
        )
        self._configured = False
        self._columns = 0
        self._step: Step | None = None
        self._static: StaticDecode | None = None
        self._lends = False
        self._plan: TreeAttentionPlan | None = None
        self._prefill_asked = 0
        self._prefill_computed = 0
        self._odd_mask = False
        self._lost_state = False
        self._held_states: dict[Branch, list[torch.Tensor]] = {}
        self._expected: list[int] | None = None
        self._adapters: tuple[str, ...] = ()
        if config is not None:
            self.configure(config)

    def configure(self, config: PretrainedConfig) -> None:
        """Make the layers that ``config`` describes, unless there are layers already.

        Raises:
            UnsupportedModel: the model keeps no K/V that could be shared.
        """
        if self.layers:
            return
        self.layers = make_layers(self, config)
        self._configured = True

    def begin(
        self,
        num_rows: int,
        num_new: int,
        *,
        counts: Sequence[int] | None = None,
        asked_rows: int | None = None,
        padding_known: bool = False,
        odd_mask: bool = False,
    ) -> Step:
        """Decide everything about the next forward, before any layer runs. All or nothing.

        Changes the tree (new tokens, copy-on-write), grows the storages and copies shared partial
        blocks. An empty cache gets its rows here; one whose rows divide ``num_rows`` is forked,
        each row into neighbours, as ``generate`` expands its inputs.

        Args:
            num_rows: B.
            num_new: T.
            counts: new tokens of each row when rows begin with padding, which is never stored;
                default T for each.
            asked_rows: rows that the caller passed, when equal ones were collapsed; for the books.
            padding_known: what the 2-D mask hides is exactly the padding that is not stored.
            odd_mask: the 2-D mask hides more; attend densely from now on, with the mask.

        Raises:
            BatchMismatch: ``num_rows`` does not fit the rows of the cache.
            OutOfBlocks: no room; the cache is as it was.
        """
        self._settle()
        if self._lost_state:
            raise TreeCacheError(
                "A forward failed half way and left the linear-attention states of this model "
                "ahead of its K/V. Call reset() and run the prompt again."
            )
        if self._memory.pool.max_memory is not None and not self._configured:
            raise InvalidArgument(
                "TreeCache(max_memory=...) must know the model's layers: pass "
                "TreeCache(model.config, max_memory=...) or enable_tree_attention(model) first."
            )
        forked_from = self._fit_rows(num_rows)
        try:
            if num_new == 1 and counts is None:
                appended = self._memory.append(None)
            else:
                counts = [num_new] * num_rows if counts is None else list(counts)
                appended = self._memory.append(counts)
        except TreeCacheError:
            self._unfork(forked_from)
            raise
        self._end_step()
        self._plan = plan = build_plan(
            self.tree, counts, num_new, self._plan, deterministic=self.deterministic
        )
        self._odd_mask |= odd_mask
        is_prefill = num_new > 1 or self._columns == 0
        self._step = Step(
            before=self._columns,
            num_new=num_new,
            counts=plan.counts,
            plan=plan,
            appended=appended,
            read_tables=partial(_block_tables, self.tree),
            forked_from=forked_from,
            padding_known=padding_known and not self._odd_mask,
            prefill_asked=(asked_rows or num_rows) * num_new if is_prefill else 0,
            prefill_computed=num_rows * num_new if is_prefill else 0,
        )
        self._columns += num_new
        try:
            self._memory.make_room(appended)
        except OutOfBlocks:
            self._undo()
            raise
        return self._step

    def expect(self, counts: Sequence[int] | None) -> None:
        """Say how many tokens of each row the next forward brings; None takes it back.

        Rows may then differ in their new tokens even over a past. Each row's tokens are the last
        columns of ``input_ids``, the attention mask is that of the sequences as they will be,
        padded on the left. Heeded where :func:`enable_tree_attention` is active.
        """
        self._expected = None if counts is None else list(counts)

    def check_adapters(self, names: tuple[str, ...]) -> None:
        """K/V in this cache were made, and are used, under the PEFT adapters ``names``.

        Raises:
            AdapterMismatch: they were made under others.
        """
        if self.tree.branches and names != self._adapters:
            raise AdapterMismatch(
                f"The cache was filled under {_adapters(self._adapters)}, but the model now runs "
                f"under {_adapters(names)}: its K/V would be those of another model. Activate the "
                "adapter again, or run the prompt again in a new TreeCache()."
            )
        self._adapters = names

    def take_expected(self, num_rows: int, num_new: int) -> list[int] | None:
        """What :meth:`expect` was told, once.

        Raises:
            BatchMismatch: the forward is not the one that was announced.
        """
        counts, self._expected = self._expected, None
        if counts is not None and (len(counts), max(counts, default=0)) != (num_rows, num_new):
            raise BatchMismatch(
                f"A forward with {num_rows} rows of {num_new} columns came where expect() had "
                f"announced {len(counts)} rows of {max(counts, default=0)}."
            )
        return counts

    def write(
        self, layer: PagedLayer, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[PagedKV, PagedKV]:
        """Store one layer's new K ``[B, Hkv, T, Dk]`` and V, and return handles on all of its K/V.

        Raises:
            StorageMismatch: dtype, device or heads differ from what the layer holds.
            BatchMismatch: B or T do not fit.
            OutOfBlocks: no room; the cache is as it was.
        """
        if self._static is not None:
            assert layer.storage is not None
            kv = self._static.write(layer.storage, layer.position, keys, values)
            return PagedKV(kv, 0), PagedKV(kv, 1)
        spec = KVSpec.of(keys, values)
        if layer.spec is not None and spec != layer.spec:
            raise StorageMismatch(
                f"update got {spec}, but this layer holds {layer.spec}. A TreeCache belongs to one "
                "model in one dtype on one device: make a new TreeCache() for another."
            )
        step = self._step_for(layer, spec, keys.shape[0], keys.shape[2])
        if layer.storage is None:
            try:
                self._attach(layer, spec)
            except OutOfBlocks:
                self._undo()
                raise
        storage = layer.storage
        assert storage is not None
        keys, values = keys.to(spec.dtype), values.to(spec.dtype)
        slots, source = step.write_index(storage)
        storage.write(layer.position, slots, source, keys.detach(), values.detach())
        step.written.add(id(layer))
        kv = LayerKV(step, storage, layer.position, (keys, values), self.backend, self._note_dense)
        return PagedKV(kv, 0), PagedKV(kv, 1)

    @property
    def tree(self) -> BranchTree:
        """Who shares what; read it freely, change it only through the cache."""
        return self._memory.tree

    @property
    def step(self) -> Step | None:
        """The forward that is under way or was the last, until the tree changes."""
        return self._step

    @property
    def has_states(self) -> bool:
        """Whether there are linear-attention states, which cannot go back by a token."""
        return OtherLayers(self.layers).has_state

    @property
    def is_bounded(self) -> bool:
        """Whether it may have no room for one more token: ``max_blocks`` or ``max_memory``."""
        bounds = self.tree.allocator.max_blocks, self._memory.pool.max_memory
        return any(bound is not None for bound in bounds)

    @property
    def storages(self) -> list[KVStorage]:
        """Where K/V are, one for each kind of layer."""
        return self._memory.pool.storages

    @contextmanager
    def decode_through(self, static: StaticDecode) -> Iterator[None]:
        """Within, layers store into and read from the places that ``static`` keeps on the device.

        The step has begun; :meth:`mark_written` says when a forward has done it.
        """
        self._static = static
        try:
            yield
        finally:
            self._static = None

    @property
    def lends_outputs(self) -> bool:
        """Whether the output of a captured step need not outlive the next one."""
        return self._lends

    @contextmanager
    def lending_outputs(self) -> Iterator[None]:
        """Within, a captured step may return what the next one overwrites: no copy is made."""
        before, self._lends = self._lends, True
        try:
            yield
        finally:
            self._lends = before

    def mark_written(self) -> None:
        """A captured forward wrote every layer of the step."""
        assert self._step is not None
        self._step.written.update(id(x) for x in self.layers if isinstance(x, PagedLayer))

    def finish(self) -> None:
        """Close the forward: every layer that stores anything has been written."""
        step = self._step
        if step is None or step.finished:
            return
        if not step.written:
            self._undo()
            return
        step.finished = True
        self._prefill_asked += step.prefill_asked
        self._prefill_computed += step.prefill_computed

    def rollback(self) -> None:
        """Undo a forward that did not finish; without one, do nothing.

        K/V go back to what they were. Linear-attention states cannot: where such a layer may
        already have run over a past, the cache asks for :meth:`reset` at its next use.
        """
        step = self._step
        if step is None or step.finished:
            return
        layers = [layer for layer in self.layers if isinstance(layer, PagedLayer)]
        if self._configured and all(id(layer) in step.written for layer in layers):
            self.finish()
            return
        self.abandon()

    def abandon(self) -> None:
        """As :meth:`rollback`, also where every layer has written: what came after them failed."""
        step = self._step
        if step is None or step.finished:
            return
        self._undo()
        others = OtherLayers(self.layers)
        if step.before == 0:
            others.clear()
        elif others.has_state:
            self._lost_state = True

    def _step_for(self, layer: PagedLayer, spec: KVSpec, num_rows: int, num_new: int) -> Step:
        step = self._step
        if step is None or step.finished or id(layer) in step.written:
            return self.begin(num_rows, num_new)
        if (len(step.counts), step.num_new) == (num_rows, num_new):
            return step
        if not step.written:
            self._undo()
            return self.begin(num_rows, num_new)
        raise UnsupportedModel(
            f"Within one forward a layer wrote {num_new} tokens for {num_rows} rows where the "
            f"layers before it wrote {step.num_new} for {len(step.counts)}. An encoder-decoder "
            "model needs EncoderDecoderCache(TreeCache(), TreeCache()) as its past_key_values."
        )

    def _settle(self) -> None:
        """Close the last forward if all of it arrived, else say what is wrong."""
        step = self._step
        if step is None or step.finished:
            return
        layers = [layer for layer in self.layers if isinstance(layer, PagedLayer)]
        missing = sum(id(layer) not in step.written for layer in layers)
        if missing and step.written:
            raise TreeCacheError(
                f"The last forward wrote {len(layers) - missing} of {len(layers)} layers. If it "
                "failed, call cache.rollback() and go on (enable_tree_attention(model) does so by "
                "itself). If the model skips layers, TreeCache cannot serve it."
            )
        self.finish()

    def _end_step(self) -> None:
        if self._step is not None:
            self._step.alive = False
            self._step = None

    def _undo(self) -> None:
        step = self._step
        assert step is not None
        for branch, count in zip(self.tree.rows, step.counts, strict=True):
            self.tree.truncate(branch, self.tree.length(branch) - count)
        self._columns = step.before
        self._end_step()
        self._plan = None
        self._unfork(step.forked_from)
        self._memory.trim()

    def _fit_rows(self, num_rows: int) -> int | None:
        """Make the batch fit; the number of rows before, if it had to change."""
        have = len(self.tree.rows)
        if have == num_rows:
            return None
        if have == 0:
            self.tree.add_rows(num_rows)
            return 0
        if num_rows > have and num_rows % have == 0:
            self.batch_repeat_interleave(num_rows // have)
            return have
        raise BatchMismatch(
            f"A forward with a batch of {num_rows} met a cache of {have} rows with "
            f"{self._columns} columns. To start over call reset() or pass a new TreeCache(); to "
            "continue pass the same rows, or a multiple of them to fork each."
        )

    def _unfork(self, forked_from: int | None) -> None:
        if forked_from is None:
            return
        have = len(self.tree.rows)
        self.select(range(0, have, have // forked_from) if forked_from else [])

    def _attach(self, layer: PagedLayer, spec: KVSpec, blocks: Sequence[int] | None = None) -> None:
        """Give ``layer`` a place among all layers like it, that keeps ``blocks``, default all."""
        if self._step is not None and self._step.before:
            raise UnsupportedModel(
                f"A layer wrote its first K/V after {self._step.before} columns: its past is "
                "missing. Pass TreeCache(model.config), or report the model."
            )
        alike = sum(
            isinstance(other, PagedLayer)
            and other.storage is None
            and other.sliding_window == layer.sliding_window
            for other in self.layers
        )
        layer.storage, layer.position = self._memory.attach(
            spec, alike if self._configured else 1, layer.sliding_window, blocks
        )
        layer.spec = spec

    def _note_dense(self, reason: str) -> None:
        self.dense_reads[reason] += 1
        if reason == UNKNOWN_READER and self.advise:
            logger.warning_once(
                "TreeCache: attention reads gathered copies of K/V. enable_tree_attention(model) "
                "makes it read shared blocks in place, and computes a repeated prompt once."
            )

    @property
    def rows(self) -> list[Branch]:
        """The branches of the batch, in order."""
        return list(self.tree.rows)

    def select(self, indices: Sequence[int] | torch.Tensor) -> None:
        """New row i is old row ``indices[i]``: rows named twice fork, rows not named are pruned.

        Raises:
            InvalidArgument: an index outside of the batch; nothing has changed.
        """
        chosen = _as_ints(indices)
        self._settle()
        if chosen == list(range(len(self.tree.rows))):
            return
        self.tree.select(chosen)
        self._end_step()
        if not chosen:
            self._columns = 0
        OtherLayers(self.layers).select(chosen)
        self._memory.let_go()

    def fork(self, branch: Branch, count: int = 1, *, at: int | None = None) -> list[Branch]:
        """Make ``count`` held branches that share the first ``at`` tokens of ``branch``.

        Nothing is copied. Use :meth:`set_rows` to bring them into the batch.

        Args:
            at: tokens to share, default all; negative counts back from the tip.

        Raises:
            StaleBranch, InvalidArgument: nothing has changed.
            HistoryFreed: an earlier token, whose window reaches into what was let go.
            UnsupportedModel: an earlier token of a model with linear-attention states, which are
                only known at the tip.
        """
        self._settle()
        states = OtherLayers(self.layers)
        length = self.tree.length(branch)
        if states.has_state and at not in (None, 0, length):
            raise UnsupportedModel(
                f"fork(at={at}): this model has linear-attention states, which exist only at the "
                f"tip ({length}). Hold a branch where you mean to come back to."
            )
        position = length if at is None else at + length if at < 0 else at
        if 0 < position < length:
            self._memory.check_history(f"fork(branch {branch}, at={at})", branch, position)
        new = self.tree.fork(branch, count, at=at)
        self._end_step()
        if states.has_state and at != 0:
            self._held_states.update(dict.fromkeys(new, self._state_of(branch)))
        return new

    def set_rows(self, branches: Sequence[Branch]) -> None:
        """Make the batch exactly ``branches``; rows that are not among them are held.

        Rows may differ in length: the cache then counts columns of the longest and treats the
        others as left-padded, so give the next forward a left-padded attention mask.

        Raises:
            StaleBranch, InvalidArgument: nothing has changed.
        """
        self._settle()
        states = OtherLayers(self.layers)
        kept = {}
        if states.has_state:
            kept = {branch: self._state_of(branch) for branch in self.tree.branches}
        self.tree.set_rows(branches)
        self._end_step()
        self._columns = max(self.tree.row_lengths(), default=0)
        if states.has_state:
            self._held_states = {branch: kept[branch] for branch in self.tree.held}
            states.put([kept[branch] for branch in branches])

    def prune(self, branch: Branch) -> None:
        """End ``branch``, in the batch or held; blocks that only it held are free at once.

        Raises:
            StaleBranch: it is not alive.
        """
        if branch in self.tree.rows:
            row = self.tree.rows.index(branch)
            self.select([i for i in range(len(self.tree.rows)) if i != row])
            return
        self._settle()
        self.tree.prune(branch)
        self._held_states.pop(branch, None)
        self._memory.let_go()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Beam search's :meth:`select`."""
        self.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Fork every row into ``repeats`` neighbours."""
        if repeats < 1:
            raise InvalidArgument(f"batch_repeat_interleave({repeats}): give at least 1.")
        self.select([row for row in range(len(self.tree.rows)) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows ``indices`` (ints, or one bool a row)."""
        if isinstance(indices, torch.Tensor) and indices.dtype == torch.bool:
            indices = indices.nonzero().squeeze(1)
        self.select(indices)

    def crop(self, tokens_to_remove: int | torch.Tensor) -> None:
        """Forget the last ``-tokens_to_remove`` columns of every row; 0 changes nothing.

        Raises:
            InvalidArgument: a positive count, or more columns than there are.
            HistoryFreed: so many that a window reaches into what was let go; nothing has changed.
        """
        removed = -int(tokens_to_remove)
        self._settle()
        if removed < 0 or removed > self._columns:
            raise InvalidArgument(
                f"crop({-removed}): give minus the number of tokens to remove, from "
                f"{-self._columns} to 0."
            )
        if not removed:  # as generate asks after each token where it looks for ends a step late
            OtherLayers(self.layers).crop(0)
            return
        lengths = [max(0, length - removed) for length in self.tree.row_lengths()]
        for branch, length in zip(self.tree.rows, lengths, strict=True):
            self._memory.check_history(f"crop({-removed})", branch, length)
        OtherLayers(self.layers).crop(-removed)
        for branch, length in zip(self.tree.rows, lengths, strict=True):
            self.tree.truncate(branch, length)
        self._columns -= removed
        self._end_step()
        self._memory.let_go()

    def reset(self) -> None:
        """Forget everything, rows and held branches; slabs are kept for the next prompt."""
        self._end_step()
        self._expected = None
        self._memory.clear()
        self._plan = None
        self._columns = 0
        self._odd_mask = self._lost_state = False
        self._held_states.clear()
        OtherLayers(self.layers).clear()

    def _state_of(self, branch: Branch) -> list[torch.Tensor]:
        if branch in self.tree.rows:
            return OtherLayers(self.layers).take(self.tree.rows.index(branch))
        return self._held_states[branch]

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """Store new K/V of a layer; see :meth:`write`."""
        if layer_idx >= len(self.layers):
            if self._configured:
                raise UnsupportedModel(
                    f"The config describes {len(self.layers)} layers, but the model wrote layer "
                    f"{layer_idx}. Pass the config of this very model, or report the model."
                )
            while len(self.layers) <= layer_idx:
                self.layers.append(PagedLayer(self))
        return self.layers[layer_idx].update(key_states, value_states, *args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen by a layer: during a forward the written layers are ahead of the others."""
        if layer_idx >= len(self.layers):
            return 0
        layer = self.layers[layer_idx]
        if not isinstance(layer, PagedLayer):
            layer = next(layer for layer in self.layers if isinstance(layer, PagedLayer))
        return self.columns_of(layer)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """(kv length, kv offset): all columns, also for layers with a window."""
        return self.get_seq_length(layer_idx) + query_length, 0

    def columns_of(self, layer: PagedLayer) -> int:
        step = self._step
        if step is None or step.finished or id(layer) in step.written:
            return self._columns
        return step.before

    @property
    def batch_size(self) -> int:
        return len(self.tree.rows) or -1

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return bool(self._memory.pool.storages)

    @property
    def is_linear(self) -> list[bool]:
        return [
            isinstance(layer, LinearAttentionCacheLayerMixin)
            and not isinstance(layer, (PagedLayer, LinearAttentionAndFullAttentionLayer))
            for layer in self.layers
        ]

    def offload(self, *args: Any, **kwargs: Any) -> None:
        raise UnsupportedModel("TreeCache does not offload to the CPU; bound it with max_memory.")

    prefetch = offload

    def restore(
        self,
        tree_state: Any,
        columns: int,
        kv: dict[int, tuple[list[int] | None, torch.Tensor, torch.Tensor]],
    ) -> None:
        """Fill a new, configured cache with what another one held; see :mod:`.disk`.

        Args:
            tree_state: of :meth:`BranchTree.to_state`, its blocks numbered from 0 on.
            columns: of the other cache.
            kv: by layer, the blocks that it keeps (None: all), and their K and V
                ``[n, block_size, Hkv, D]``.

        Raises:
            InvalidArgument: the parts do not fit each other or this cache.
            OutOfBlocks: no room.
        """
        layers = {i: x for i, x in enumerate(self.layers) if isinstance(x, PagedLayer)}
        if self.tree.branches or set(layers) != set(kv):
            raise InvalidArgument(
                f"restore: a new cache of {len(layers)} layers with K/V is needed; this one has "
                f"{len(self.tree.branches)} branches, and {len(kv)} layers were given."
            )
        self._memory.restore(tree_state)
        every = self.tree.allocator.used
        for i, (given, keys, values) in kv.items():
            blocks = every if given is None else given
            if keys.shape[:2] != (len(blocks), self.block_size):
                raise InvalidArgument(
                    f"restore: layer {i} has K of {tuple(keys.shape)} for {len(blocks)} blocks."
                )
            spec = KVSpec.of(keys.transpose(1, 2), values.transpose(1, 2))
            self._attach(layers[i], spec, blocks)
            storage = layers[i].storage
            assert storage is not None
            storage.load(layers[i].position, blocks, keys, values)
        self._columns = columns
        self.check_integrity()

    def __repr__(self) -> str:
        return (
            f"TreeCache(rows={len(self.tree.rows)}, columns={self._columns}, "
            f"blocks={self.tree.allocator.num_used} of {self.block_size} tokens)"
        )

    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        return {**self.__dict__, "_step": None, "_static": None, "_plan": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for layer in self.layers:
            if isinstance(layer, PagedLayer):
                layer.join(self)

    @property
    def kv_bytes(self) -> int:
        """Bytes of what all layers keep of the blocks in use."""
        return self._memory.kept_bytes

    @property
    def token_bytes(self) -> int:
        """Bytes of one token, all layers."""
        return self._memory.pool.block_bytes // self.block_size

    def dense_bytes(self, lengths: Iterable[int]) -> int:
        """Bytes of K/V of sequences of ``lengths`` tokens that share nothing."""
        return self._memory.dense_bytes(lengths)

    def stats(self) -> TreeCacheStats:
        """What is held now and what was saved so far."""
        tree = self.tree
        longest = [max(self._columns, tree.length(branch)) for branch in tree.rows]
        held = [tree.length(branch) for branch in tree.held]
        return TreeCacheStats(
            num_rows=len(tree.rows),
            num_held=len(held),
            logical_tokens=tree.num_logical_tokens(),
            unique_tokens=tree.num_unique_tokens(),
            blocks=tree.allocator.num_used,
            block_size=self.block_size,
            kv_bytes=self.kv_bytes,
            kinds=tuple(map(self._kind, self.storages)),
            dense_bytes=self.dense_bytes(longest + held),
            allocated_bytes=self._memory.pool.allocated_bytes,
            forks=tree.num_forks,
            prunes=tree.num_prunes,
            copies=tree.num_copies,
            prefill_tokens_asked=self._prefill_asked,
            prefill_tokens_computed=self._prefill_computed,
            dense_reads=dict(self.dense_reads),
        )

    def _kind(self, storage: KVStorage) -> KindStats:
        kept = storage.num_kept(self.tree.allocator.num_used)
        held = kept * storage.attached_block_bytes
        return KindStats(storage.window, storage.num_attached, kept, held)

    def dense(self, layer: PagedLayer, which: int) -> torch.Tensor | None:
        """Dense K (``which`` 0) or V (1) ``[B, Hkv, L, D]``; None before the first update."""
        if layer.storage is None:
            return None
        view = DenseView(_block_tables(self.tree), self.tree.row_lengths(), self.columns_of(layer))
        # Where the blocks of a row follow each other, what was gathered is a view of them.
        return gather_dense(view, layer.storage, layer.position)[which].clone()

    def check_integrity(self) -> None:
        """Verify every invariant of cache, tree and allocator.

        Raises:
            IntegrityError: with the first thing that is wrong.
        """
        self._memory.check_integrity()
        lengths = self.tree.row_lengths()
        if max(lengths, default=0) > self._columns:
            raise IntegrityError(f"rows of {max(lengths)} tokens in {self._columns} columns")


def _adapters(names: tuple[str, ...]) -> str:
    return f"adapter {', '.join(names)}" if names else "no adapter"


def _as_bytes(size: str) -> int:
    try:
        return int(convert_file_size_to_int(size))
    except ValueError as error:
        raise InvalidArgument(
            f"TreeCache(max_memory={size!r}): give bytes, or a text such as '8GB' or '8GiB'."
        ) from error


def _block_tables(tree: BranchTree) -> list[list[int]]:
    return [tree.block_table(branch) for branch in tree.rows]


def _as_ints(indices: Any) -> list[int]:
    if isinstance(indices, torch.Tensor):
        indices = indices.tolist()
    chosen = list(indices)
    if any(not issubclass(kind, int) or kind is bool for kind in set(map(type, chosen))):
        raise InvalidArgument(f"select({chosen[:8]}...): give ints, one for each new row.")
    return chosen
