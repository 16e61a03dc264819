"""TreeCache: transformers' Cache over a tree of shared blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)
from transformers.utils import logging

from ..attention.dispatch import choose_backend
from ..attention.plan import TreeAttentionPlan, build_plan
from ..errors import (
    BatchMismatch,
    IntegrityError,
    InvalidArgument,
    OutOfBlocks,
    StorageMismatch,
    TreeCacheError,
    UnsupportedModel,
)
from ..memory.allocator import PhysicalKVAllocator
from ..memory.storage import KVSpec, KVStorage
from ..memory.tree import Branch, BranchTree
from .handles import UNKNOWN_READER, DenseView, LayerKV, PagedKV, Step, gather_dense

logger = logging.get_logger(__name__)

SLAB_BYTES = 128 << 20
"""Aim for the size of a slab, over all layers that share it."""


@dataclass(frozen=True, slots=True)
class TreeCacheStats:
    """What a cache holds and what it saved.

    Attributes:
        num_rows: branches in the batch.
        num_held: branches outside of it.
        logical_tokens: tokens of all branches, as independent sequences would store them.
        unique_tokens: tokens stored.
        blocks: blocks in use.
        block_size: token slots of a block.
        kv_bytes: bytes of the blocks in use, all layers.
        dense_bytes: bytes of the same branches as independent sequences of equal length (columns).
        allocated_bytes: bytes of the slabs that the blocks live in.
        forks, prunes, copies: branches made and ended, partial blocks copied on write.
        prefill_tokens_asked: tokens of multi-token forwards as the caller passed them (rows x
            columns).
        prefill_tokens_computed: how many of them went through the model.
        dense_reads: layer reads that had to gather dense K/V, by reason.
    """

    num_rows: int
    num_held: int
    logical_tokens: int
    unique_tokens: int
    blocks: int
    block_size: int
    kv_bytes: int
    dense_bytes: int
    allocated_bytes: int
    forks: int
    prunes: int
    copies: int
    prefill_tokens_asked: int
    prefill_tokens_computed: int
    dense_reads: dict[str, int]

    @property
    def saving(self) -> float:
        """Share of the dense bytes that is not stored, 0 to 1."""
        return 1 - self.kv_bytes / self.dense_bytes if self.dense_bytes else 0.0


class TreeCache(Cache):
    """A KV cache whose rows share their common past, block by block.

    Pass it to ``model.generate(..., past_key_values=TreeCache())`` in any decoding mode. Rows that
    descend from one prompt share its blocks; forking a row copies nothing, dropping one frees what
    only it held. With :func:`enable_tree_attention` shared blocks are also computed and read once.

    Batch surgery is one primitive, :meth:`select`; branches can also be taken out of the batch and
    brought back with :meth:`fork` and :meth:`set_rows`.

    Args:
        config: the model's config. Needed up front only for models with linear-attention layers
            that run without :func:`enable_tree_attention`, which configures a bare cache from its
            model.
        block_size: token slots of a block.
        max_blocks: most blocks in use at a time.
        max_memory: most bytes of K/V in use at a time, over all layers; needs a known config.
        backend: attention backend; see :func:`~hf_tree_cache.attention.dispatch.choose_backend`.
        poison: fill free slots with NaN. For tests: a read of what was never written then shows.

    Raises:
        InvalidArgument: for a bound below 1, an unknown backend or a block size below 1.
    """

    def __init__(
        self,
        config: PretrainedConfig | None = None,
        *,
        block_size: int = 16,
        max_blocks: int | None = None,
        max_memory: int | None = None,
        backend: str | None = None,
        poison: bool = False,
    ) -> None:
        if config is not None and not isinstance(config, PretrainedConfig):
            raise InvalidArgument(
                f"TreeCache(config={type(config).__name__}): pass model.config, or nothing at all."
            )
        if max_memory is not None and max_memory < 1:
            raise InvalidArgument(f"max_memory={max_memory}: give bytes, or None for no bound.")
        super().__init__(layers=[])
        self.block_size = block_size
        self.backend = choose_backend(backend)
        self.tree = BranchTree(block_size, PhysicalKVAllocator(max_blocks, track_freed=poison))
        self.dense_reads: Counter[str] = Counter()
        self.prefill_tokens_asked = 0
        self.prefill_tokens_computed = 0
        self._max_blocks = max_blocks
        self._max_memory = max_memory
        self._poison = poison
        self._storages: list[KVStorage] = []
        self._slab_blocks = 0
        self._columns = 0
        self._step: Step | None = None
        self._plan: TreeAttentionPlan | None = None
        self._odd_mask = False
        self._lost_state = False
        self._held_states: dict[Branch, list[torch.Tensor]] = {}
        self._configured = False
        self.advise = True
        if config is not None:
            self.configure(config)

    # Configuration

    def configure(self, config: PretrainedConfig) -> None:
        """Make the layers that ``config`` describes, unless there are layers already.

        Raises:
            UnsupportedModel: the model keeps no K/V that could be shared.
        """
        if self.layers:
            return
        layers = [self._translate(layer) for layer in DynamicCache(config=config).layers]
        if not any(isinstance(layer, PagedLayer) for layer in layers):
            raise UnsupportedModel(
                f"{config.model_type} has no attention layer with a K/V cache, so there is nothing to "
                "share: use the cache that transformers makes for it."
            )
        self.layers = layers
        self._configured = True

    def _translate(self, layer: Any) -> Any:
        """Our layer in place of one of transformers', which stays where it is not attention."""
        window = getattr(layer, "sliding_window", None)
        if isinstance(layer, DynamicLayer) and isinstance(layer, LinearAttentionLayer):
            return HybridPagedLayer(self, window, number_of_states=layer.number_of_states)
        if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
            return PagedLayer(self, window)
        return layer

    @property
    def paged_layers(self) -> list[PagedLayer]:
        return [layer for layer in self.layers if isinstance(layer, PagedLayer)]

    # One forward

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
                "A forward failed half way and left the linear-attention states of this model ahead of "
                "its K/V. Call reset() and run the prompt again."
            )
        if self._max_memory is not None and not self._configured:
            raise InvalidArgument(
                "TreeCache(max_memory=...) must know the model's layers: pass TreeCache(model.config, "
                "max_memory=...) or call enable_tree_attention(model) first."
            )
        forked_from = self._fit_rows(num_rows)
        counts = [num_new] * num_rows if counts is None else list(counts)
        try:
            appended = self.tree.append(counts)
        except TreeCacheError:
            self._unfork(forked_from)
            raise
        self._end_step()
        self._plan = build_plan(self.tree, counts, num_new, self._plan)
        self._odd_mask |= odd_mask
        is_prefill = num_new > 1 or self._columns == 0
        self._step = Step(
            before=self._columns,
            num_new=num_new,
            counts=counts,
            plan=self._plan,
            slots=appended.slots,
            read_tables=self._block_tables,
            forked_from=forked_from,
            padding_known=padding_known and not self._odd_mask,
            prefill_asked=(asked_rows or num_rows) * num_new if is_prefill else 0,
            prefill_computed=num_rows * num_new if is_prefill else 0,
        )
        self._columns += num_new
        try:
            for storage in self._storages:
                self._grow(storage)
                if appended.copies:
                    storage.copy(appended.copies)
        except OutOfBlocks:
            self._undo()
            raise
        return self._step

    def write(
        self, layer: PagedLayer, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[PagedKV, PagedKV]:
        """Store one layer's new K ``[B, Hkv, T, Dk]`` and V, and return handles on all of its K/V.

        Raises:
            StorageMismatch: dtype, device or heads differ from what the layer holds.
            BatchMismatch: B or T do not fit.
            OutOfBlocks: no room; the cache is as it was.
        """
        spec = KVSpec.of(keys, values)
        if layer.spec is not None and spec != layer.spec:
            raise StorageMismatch(
                f"update got {spec}, but this layer holds {layer.spec}. A TreeCache belongs to one model "
                "in one dtype on one device: make a new TreeCache() for another."
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
        slots, source = step.write_index(storage)
        storage.write(layer.position, slots, source, keys.detach(), values.detach())
        step.written.add(id(layer))
        kv = LayerKV(step, storage, layer.position, (keys, values), self.backend, self._note_dense)
        return PagedKV(kv, 0), PagedKV(kv, 1)

    def finish(self) -> None:
        """Close the forward: every layer that stores anything has been written."""
        step = self._step
        if step is None or step.finished:
            return
        if not step.written:
            self._undo()
            return
        step.finished = True
        self.prefill_tokens_asked += step.prefill_asked
        self.prefill_tokens_computed += step.prefill_computed

    def rollback(self) -> None:
        """Undo a forward that did not finish; without one, do nothing.

        K/V go back to what they were. Linear-attention states cannot: where such a layer may
        already have run over a past, the cache asks for :meth:`reset` at its next use.
        """
        step = self._step
        if step is None or step.finished:
            return
        self._undo()
        if self._state_layers():
            if step.before:
                self._lost_state = True
            else:
                self._clear_states()

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
            f"Within one forward a layer wrote {num_new} tokens for {num_rows} rows where the layers "
            f"before it wrote {step.num_new} for {len(step.counts)}. An encoder-decoder model needs "
            "EncoderDecoderCache(TreeCache(), TreeCache()) as its past_key_values."
        )

    def _settle(self) -> None:
        """Close the last forward if all of it arrived, else say what is wrong."""
        step = self._step
        if step is None or step.finished:
            return
        layers = self.paged_layers
        missing = sum(id(layer) not in step.written for layer in layers)
        if missing and step.written:
            raise TreeCacheError(
                f"The last forward wrote {len(layers) - missing} of {len(layers)} layers. If it failed, "
                "call cache.rollback() and go on; enable_tree_attention(model) does this by itself. If "
                "the model skips layers, TreeCache cannot serve it."
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
        self.tree.allocator.trim()
        self._poison_freed()

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
            f"A forward with a batch of {num_rows} met a cache of {have} rows with {self._columns} "
            "columns. To start over call reset() or pass a new TreeCache(); to continue pass the same "
            "rows, or a multiple of them to fork each."
        )

    def _unfork(self, forked_from: int | None) -> None:
        if forked_from is None:
            return
        have = len(self.tree.rows)
        self.select(range(0, have, have // forked_from) if forked_from else [])

    def _attach(self, layer: PagedLayer, spec: KVSpec) -> None:
        """Give ``layer`` a place in a storage of its kind, making one for all layers like it."""
        if self._step is not None and self._step.before:
            raise UnsupportedModel(
                f"A layer wrote its first K/V after {self._step.before} columns: its past is missing. "
                "Pass TreeCache(model.config), or report the model."
            )
        storage = next((s for s in self._storages if s.spec == spec and s.has_room), None)
        if storage is None:
            alike = [
                other
                for other in self.paged_layers
                if other.storage is None and other.is_sliding == layer.is_sliding
            ]
            num_layers = len(alike) if self._configured else 1
            block_bytes = num_layers * spec.block_bytes(self.block_size)
            if not self._slab_blocks:
                fitting = max(16, min(1024, SLAB_BYTES // block_bytes))
                self._slab_blocks = 1 << (fitting.bit_length() - 1)
            storage = KVStorage(
                spec, num_layers, self.block_size, self._slab_blocks, poison=self._poison
            )
            self._storages.append(storage)
            self._apply_memory_cap()
            self._grow(storage)
        layer.spec, layer.storage, layer.position = spec, storage, storage.add_layer()

    def _apply_memory_cap(self) -> None:
        if self._max_memory is None:
            return
        allocator = self.tree.allocator
        block_bytes = sum(
            storage.num_layers * storage.layer_block_bytes for storage in self._storages
        )
        blocks = self._max_memory // block_bytes
        bounds = [blocks] if self._max_blocks is None else [blocks, self._max_blocks]
        allocator.max_blocks = min(bounds)
        if allocator.num_used > allocator.max_blocks:
            self._storages.pop()
            raise OutOfBlocks(
                f"max_memory={self._max_memory} holds {blocks} blocks of {block_bytes} bytes, but this "
                f"forward needs {allocator.num_used}. The cache is unchanged: raise max_memory.",
                allocator.num_used,
                blocks,
            )

    def _grow(self, storage: KVStorage) -> None:
        try:
            storage.ensure(self.tree.allocator.num_blocks)
        except (RuntimeError, MemoryError) as error:
            if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and (
                "alloc" not in str(error)
            ):
                raise
            allocator = self.tree.allocator
            raise OutOfBlocks(
                f"{storage.spec.device} has no memory for another slab of "
                f"{storage.slab_bytes >> 20} MiB; {allocator.num_used} blocks are in use. The cache is "
                "unchanged: prune branches, or give max_memory to be stopped earlier.",
                allocator.num_blocks - storage.num_blocks,
                0,
            ) from error

    def _block_tables(self) -> list[list[int]]:
        return [self.tree.block_table(branch) for branch in self.tree.rows]

    def _note_dense(self, reason: str) -> None:
        self.dense_reads[reason] += 1
        if reason == UNKNOWN_READER and self.advise:
            logger.warning_once(
                "TreeCache: attention reads gathered copies of K/V. enable_tree_attention(model) makes "
                "it read shared blocks in place, and computes a repeated prompt once."
            )

    def _poison_freed(self) -> None:
        freed = self.tree.allocator.take_freed()
        if freed:
            for storage in self._storages:
                storage.poison(freed)

    # Rows and branches

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
        order = torch.tensor(chosen, dtype=torch.int64)
        for layer in self.layers:
            if isinstance(layer, LinearAttentionCacheLayerMixin):
                LinearAttentionLayer.reorder_cache(layer, order)
            elif not isinstance(layer, PagedLayer):
                layer.reorder_cache(order)
        self._poison_freed()

    def fork(self, branch: Branch, count: int = 1, *, at: int | None = None) -> list[Branch]:
        """Make ``count`` held branches that share the first ``at`` tokens of ``branch``.

        Nothing is copied. Use :meth:`set_rows` to bring them into the batch.

        Args:
            at: tokens to share, default all; negative counts back from the tip.

        Raises:
            StaleBranch, InvalidArgument: nothing has changed.
            UnsupportedModel: an earlier token of a model with linear-attention states, which are
                only known at the tip.
        """
        self._settle()
        states = self._state_layers()
        if states and at is not None and at not in (0, self.tree.length(branch)):
            raise UnsupportedModel(
                f"fork(at={at}): this model has linear-attention states, which exist only at the tip "
                f"({self.tree.length(branch)}). Hold a branch where you mean to come back to."
            )
        if states and at != 0:
            state = self._state_of(branch)
        new = self.tree.fork(branch, count, at=at)
        self._end_step()
        if states and at != 0:
            self._held_states.update(dict.fromkeys(new, state))
        return new

    def set_rows(self, branches: Sequence[Branch]) -> None:
        """Make the batch exactly ``branches``; rows that are not among them are held.

        Rows may differ in length: the cache then counts columns of the longest and treats the
        others as left-padded, so give the next forward a left-padded attention mask.

        Raises:
            StaleBranch, InvalidArgument: nothing has changed.
        """
        self._settle()
        states = self._state_layers()
        old = self.tree.rows
        kept = {branch: self._state_of(branch) for branch in self.tree.branches} if states else {}
        self.tree.set_rows(branches)
        self._end_step()
        self._columns = max(self.tree.row_lengths(), default=0)
        if states and list(branches) != old:
            self._held_states = {branch: kept[branch] for branch in self.tree.held}
            self._restore_states([kept[branch] for branch in branches])

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
        self._poison_freed()

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
        """
        removed = -int(tokens_to_remove)
        self._settle()
        if removed < 0 or removed > self._columns:
            raise InvalidArgument(
                f"crop({-removed}): give minus the number of tokens to remove, from {-self._columns} "
                "to 0."
            )
        for layer in self.layers:
            if isinstance(layer, LinearAttentionCacheLayerMixin):
                if removed or layer.record_past:
                    LinearAttentionLayer.crop(layer, -removed)
            elif not isinstance(layer, PagedLayer):
                layer.crop(-removed)
        if not removed:
            return
        for branch in self.tree.rows:
            self.tree.truncate(branch, max(0, self.tree.length(branch) - removed))
        self._columns -= removed
        self._end_step()
        self._poison_freed()

    def reset(self) -> None:
        """Forget everything, rows and held branches; slabs are kept for the next prompt."""
        self._end_step()
        self.tree.clear()
        self._plan = None
        self._columns = 0
        self._odd_mask = self._lost_state = False
        self._held_states.clear()
        self._clear_states()
        self._poison_freed()

    # Linear-attention states: fixed in size, one a row, copied where K/V are shared

    def _state_layers(self) -> list[LinearAttentionCacheLayerMixin]:
        return [
            layer
            for layer in self.layers
            if isinstance(layer, LinearAttentionCacheLayerMixin)
            and any(layer.has_previous_state.values())
        ]

    def _clear_states(self) -> None:
        for layer in self.layers:
            if isinstance(layer, LinearAttentionCacheLayerMixin):
                LinearAttentionCacheLayerMixin.__init__(layer, layer.number_of_states)
            elif not isinstance(layer, PagedLayer):
                layer.reset()

    def _state_of(self, branch: Branch) -> list[torch.Tensor]:
        if branch not in self.tree.rows:
            return self._held_states[branch]
        row = self.tree.rows.index(branch)
        return [
            states[i][row].clone()
            for layer in self._state_layers()
            for states in (layer.conv_states, layer.recurrent_states)
            for i in states
            if states[i] is not None
        ]

    def _restore_states(self, rows: list[list[torch.Tensor]]) -> None:
        columns = iter(zip(*rows, strict=True))
        for layer in self._state_layers():
            for states in (layer.conv_states, layer.recurrent_states):
                for i in states:
                    if states[i] is not None:
                        states[i] = torch.stack(next(columns))

    # What transformers asks

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
        layers = self.layers
        if layer_idx < len(layers) and isinstance(layers[layer_idx], PagedLayer):
            return self.columns_of(layers[layer_idx])
        first = next((layer for layer in layers if isinstance(layer, PagedLayer)), None)
        if first is not None:
            return self.columns_of(first)
        return super().get_seq_length(layer_idx) if layers else 0

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
        return bool(self._storages)

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

    def __repr__(self) -> str:
        return (
            f"TreeCache(rows={len(self.tree.rows)}, columns={self._columns}, "
            f"blocks={self.tree.allocator.num_used} of {self.block_size} tokens)"
        )

    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        return {**self.__dict__, "_step": None, "_plan": None}

    # Books

    def stats(self) -> TreeCacheStats:
        """What is held now and what was saved so far."""
        tree, used = self.tree, self.tree.allocator.num_used
        layer_bytes = sum(storage.attached_block_bytes for storage in self._storages)
        longest = [max(self._columns, tree.length(branch)) for branch in tree.rows]
        held = [tree.length(branch) for branch in tree.held]
        return TreeCacheStats(
            num_rows=len(tree.rows),
            num_held=len(held),
            logical_tokens=tree.num_logical_tokens(),
            unique_tokens=tree.num_unique_tokens(),
            blocks=used,
            block_size=self.block_size,
            kv_bytes=used * layer_bytes,
            dense_bytes=(sum(longest) + sum(held)) * layer_bytes // self.block_size,
            allocated_bytes=sum(storage.allocated_bytes for storage in self._storages),
            forks=tree.num_forks,
            prunes=tree.num_prunes,
            copies=tree.num_copies,
            prefill_tokens_asked=self.prefill_tokens_asked,
            prefill_tokens_computed=self.prefill_tokens_computed,
            dense_reads=dict(self.dense_reads),
        )

    def dense(self, layer: PagedLayer, which: int) -> torch.Tensor | None:
        """Dense K (``which`` 0) or V (1) ``[B, Hkv, L, D]`` of a layer; None before its first update."""
        if layer.storage is None:
            return None
        view = DenseView(self._block_tables(), self.tree.row_lengths(), self.columns_of(layer))
        return gather_dense(view, layer.storage, layer.position)[which]

    def check_integrity(self) -> None:
        """Verify every invariant of cache, tree and allocator.

        Raises:
            IntegrityError: with the first thing that is wrong.
        """
        self.tree.check_integrity()
        lengths = self.tree.row_lengths()
        if max(lengths, default=0) > self._columns:
            raise IntegrityError(f"rows of {max(lengths)} tokens in {self._columns} columns")
        for storage in self._storages:
            if storage.num_blocks < self.tree.allocator.num_blocks:
                raise IntegrityError(
                    f"{self.tree.allocator.num_blocks} blocks, room for {storage.num_blocks}"
                )


class PagedLayer(CacheLayerMixin):
    """The cache's face towards one attention layer; everything else is shared by all layers.

    Attributes:
        storage: where the layer's K/V are, None before its first update.
        position: of the layer in ``storage``.
        spec: heads, dims, dtype and device, as its first update had them.
    """

    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, cache: TreeCache, sliding_window: int | None = None) -> None:
        self.cache = cache
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window is not None
        self.storage: KVStorage | None = None
        self.position = 0
        self.spec: KVSpec | None = None

    @property
    def is_initialized(self) -> bool:
        return self.storage is not None

    @property
    def keys(self) -> torch.Tensor | None:
        """Dense ``[B, Hkv, L, Dk]`` copy of the stored keys, left-padded with zeros."""
        return self.cache.dense(self, 0)

    @property
    def values(self) -> torch.Tensor | None:
        """Dense ``[B, Hkv, L, Dv]`` copy of the stored values, left-padded with zeros."""
        return self.cache.dense(self, 1)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        return self.cache.write(self, key_states, value_states)

    def get_seq_length(self) -> int:
        return self.cache.columns_of(self)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.columns_of(self) + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        raise UnsupportedModel("TreeCache layers take their shapes from their first update.")

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        raise UnsupportedModel("Reorder the whole TreeCache: its layers share one tree.")


class HybridPagedLayer(LinearAttentionLayer, PagedLayer):
    """A layer with both attention and a linear-attention state (falcon_h1)."""

    is_compileable = False

    def __init__(
        self, cache: TreeCache, sliding_window: int | None = None, number_of_states: int = 1
    ) -> None:
        PagedLayer.__init__(self, cache, sliding_window)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)


def _as_ints(indices: Any) -> list[int]:
    if isinstance(indices, torch.Tensor):
        indices = indices.tolist()
    chosen = list(indices)
    if not all(isinstance(index, int) and not isinstance(index, bool) for index in chosen):
        raise InvalidArgument(
            f"select({chosen[:8]}...): indices must be ints, one for each new row."
        )
    return chosen
