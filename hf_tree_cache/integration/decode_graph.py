"""DecodeGraphs: decode steps of a model replayed from captured CUDA graphs. Needs Triton."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin
from transformers.utils import ModelOutput, logging
from triton import knobs

from .cache import TreeCache
from .fingerprint import find_hook, fingerprint
from .layers import PagedLayer
from .op_record import OpRecord, first_difference
from .static import StaticDecode, layouts
from .step import NotCapturable, Step

logger = logging.get_logger(__name__)

MOST_GRAPHS = 48
"""Graphs kept; the one that was not used for longest goes first."""

_CACHE = object()
"""Stands in a kept output for the cache, which must not live as long."""

GRID_SLACK = 2.0
"""A graph serves steps of fewer work items, down to this part of those it has programs for."""


@dataclass(frozen=True)
class Call:
    """The arguments of a decode step, but for what tensors hold.

    Attributes:
        tensors: name, batch dimension, shape of one row and dtype.
        constants: name and value.
    """

    tensors: tuple[tuple[str, int, torch.Size, torch.dtype], ...]
    constants: tuple[tuple[str, Hashable], ...]


@dataclass
class GraphStats:
    """How decode steps ran.

    Attributes:
        captured: graphs made.
        replayed: steps from a graph.
        warm_ups: steps run to get ready for a capture.
        eager: steps that could not be captured, by reason.
    """

    captured: int = 0
    replayed: int = 0
    warm_ups: int = 0
    eager: Counter[str] = field(default_factory=Counter)


@dataclass(eq=False)
class _Graph:
    """One captured forward.

    Attributes:
        output: as the model returned it, in memory that each replay overwrites.
        grids: work items that its launches have programs for.
    """

    graph: torch.cuda.CUDAGraph
    output: Any
    grids: tuple[int, ...]

    def serves(self, items: tuple[int, ...]) -> bool:
        return all(
            need <= grid <= GRID_SLACK * need + 16
            for need, grid in zip(items, self.grids, strict=True)
        )


@dataclass(eq=False)
class _Kind:
    """What belongs to caches of equal specs, block size and settings.

    Attributes:
        warm: calls and buckets that have run once: all kernels are compiled and loaded.
        moves: of ``static`` when ``graphs`` were captured.
    """

    static: StaticDecode = field(default_factory=StaticDecode)
    warm: set[tuple[Call, int]] = field(default_factory=set)
    graphs: OrderedDict[Hashable, list[_Graph]] = field(default_factory=OrderedDict)
    moves: int = -1

    def find(self, key: Hashable) -> _Graph | None:
        """A graph for the work that is in the buffers now."""
        if self.moves != self.static.moves:
            self.graphs.clear()
            self.moves = self.static.moves
        if key in self.graphs:
            self.graphs.move_to_end(key)
        items = self.static.items()
        return next((graph for graph in self.graphs.get(key, ()) if graph.serves(items)), None)

    def add(self, key: Hashable, graph: _Graph) -> None:
        self.graphs.setdefault(key, []).append(graph)
        while sum(map(len, self.graphs.values())) > MOST_GRAPHS:
            self.graphs.popitem(last=False)


class DecodeGraphs:
    """Runs the decode steps of ``model`` from CUDA graphs, and says which it leaves alone.

    A batch is padded to the next of a few sizes. For each size the first step runs as a warm-up,
    the next is captured, and all others are replays. Before a first capture two more warm-ups are
    recorded operator by operator: only a forward that does the same twice is captured. Graphs share
    one memory pool. They are dropped when weights move or when a buffer has to grow; a cache that
    lies elsewhere gets its own.

    Attributes:
        stats: how the steps so far ran.
    """

    def __init__(self, model: nn.Module) -> None:
        self.stats = GraphStats()
        self._model = model
        self._kinds: dict[Hashable, _Kind] = {}
        self._inputs: dict[tuple[Call, int], dict[str, torch.Tensor]] = {}
        self._records: dict[tuple[Call, int], OpRecord] = {}
        self._verdicts: dict[Call, str | None] = {}  # why a call cannot be captured; None if it can
        self._fingerprint: Hashable = None
        self._model_obstacle: str | None = None
        self._unchecked = True
        self._pool: torch.cuda.MemPool | None = None
        self._stream: torch.cuda.Stream | None = None

    def run(self, forward: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        """The output of a decode step; None if ``forward`` must be called as ever."""
        cache: Any = kwargs.get("past_key_values")
        step = cache.step if isinstance(cache, TreeCache) else None
        if step is None or step.num_new != 1 or step.fresh:
            # Between prompts, weights may be loaded, adapters switched and hooks registered.
            self._unchecked = True
            return None
        if not (cache.storages[0].spec.device.type == "cuda" or knobs.runtime.interpret):
            return None
        try:
            return self._run(forward, cache, step, kwargs)
        except NotCapturable as obstacle:
            self.stats.eager[str(obstacle)] += 1
            logger.warning_once(
                f"enable_tree_attention: decode steps of {type(self._model).__name__} run without "
                f"CUDA graphs: {obstacle}."
            )
            return None

    def _run(
        self, forward: Callable[..., Any], cache: TreeCache, step: Step, kwargs: dict[str, Any]
    ) -> Any:
        device = self._check(cache)
        call = _read_call(step, kwargs)
        verdict = self._verdicts.get(call)
        if verdict is not None:
            raise NotCapturable(verdict)
        rows, bucket = len(step.counts), bucket_of(len(step.counts))
        places = layouts(cache.storages)
        kind = self._kinds.setdefault(
            (tuple(place[:-1] for place in places), step.plan.deterministic), _Kind()
        )
        inputs = self._fill(call, bucket, kwargs, device)
        arguments = {**dict(call.constants), **inputs, "past_key_values": cache}

        def decode() -> Any:
            with cache.decode_through(kind.static), _without_padding_check(self._model):
                return forward(**arguments)

        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            kind.static.prepare(step, cache.storages, bucket)
            try:
                known = call in self._verdicts and (call, bucket) in kind.warm
                if known and device.type == "cuda":
                    output = self._replay(decode, kind, (call, bucket, places))
                else:
                    output = self._warm_up(decode, kind, call, bucket)
            except NotCapturable as obstacle:
                self._verdicts[call] = str(obstacle)
                raise
            finally:
                kind.static.release()
        cache.mark_written()
        return _outward(output, bucket, rows, cache)

    def _warm_up(self, decode: Callable[[], Any], kind: _Kind, call: Call, bucket: int) -> Any:
        """Run a step as it will be captured; as long as needed, compare what it does."""
        self.stats.warm_ups += 1
        kind.static.fit(())
        if call in self._verdicts or (call, bucket) not in kind.warm:
            output = decode()  # kernels are compiled, and buffers made
            kind.warm.add((call, bucket))
            return output
        with OpRecord() as record:
            output = decode()
        other = self._records.setdefault((call, bucket), record)
        if record.blocked is not None:
            self._verdicts[call] = f"the forward waits for the device ({record.blocked})"
        elif other is not record:
            difference = first_difference(other, record)
            self._verdicts[call] = difference and f"the forward depends on lengths ({difference})"
            self._records.clear()
        return output

    def _replay(self, decode: Callable[[], Any], kind: _Kind, key: Hashable) -> Any:
        graph = kind.find(key)
        if graph is None:
            grids = tuple(bucket_of(need + need // 8) for need in kind.static.items())
            kind.static.fit(grids)
            graph = _Graph(*self._capture(decode), grids)
            kind.add(key, graph)
            self.stats.captured += 1
        graph.graph.replay()
        self.stats.replayed += 1
        return _copied(graph.output)

    def _capture(self, decode: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
        if self._stream is None or self._pool is None:
            # A pool of its own outlives all of its graphs; a bare handle does not.
            self._pool, self._stream = torch.cuda.MemPool(), torch.cuda.Stream()
        graph, here, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), self._stream
        stream.wait_stream(here)
        # torch.cuda.graph would collect garbage and empty the allocator's cache first.
        try:
            with torch.cuda.stream(stream):
                graph.capture_begin(pool=self._pool.id, capture_error_mode="thread_local")
                try:
                    output = decode()
                finally:
                    graph.capture_end()
        except NotCapturable:
            raise
        except Exception as error:
            raise NotCapturable(f"the capture failed ({type(error).__name__}: {error})") from error
        here.wait_stream(stream)
        return graph, _map(output, lambda x: _CACHE if isinstance(x, TreeCache) else x)

    def _check(self, cache: TreeCache) -> torch.device:
        """The device of all of ``cache``.

        Raises:
            NotCapturable: the model or the cache rules graphs out as they are now.
        """
        if self._unchecked:
            now = fingerprint(self._model)
            if now != self._fingerprint:
                self._kinds.clear()
                self._records.clear()
                self._verdicts.clear()
            self._fingerprint, self._model_obstacle = now, _find_model_obstacle(self._model)
            self._unchecked = False
        obstacle = self._model_obstacle or _find_obstacle(self._model, cache)
        if obstacle is not None:
            raise NotCapturable(obstacle)
        return cache.storages[0].spec.device

    def _fill(
        self, call: Call, bucket: int, kwargs: dict[str, Any], device: torch.device
    ) -> dict[str, torch.Tensor]:
        """Copy the tensors of ``kwargs`` to where the forward reads them, padded with zeros."""
        inputs = self._inputs.get((call, bucket))
        if inputs is None:
            inputs = {}
            with torch.inference_mode(False):
                for name, dim, shape, dtype in call.tensors:
                    full = (*shape[:dim], bucket, *shape[dim:])
                    inputs[name] = torch.zeros(full, dtype=dtype, device=device)
            self._inputs[call, bucket] = inputs
        for name, dim, _, _ in call.tensors:
            value = kwargs[name]
            inputs[name].narrow(dim, 0, value.shape[dim]).copy_(value)
        return inputs


def bucket_of(count: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, 24, ..."""
    power = 1 << max(count - 1, 0).bit_length()
    return power if count > power * 3 // 4 or power < 4 else power * 3 // 4


def _read_call(step: Step, kwargs: dict[str, Any]) -> Call:
    """What the arguments of a decode step are.

    Raises:
        NotCapturable: something that cannot be read from a fixed address.
    """
    rows = len(step.counts)
    tensors: list[tuple[str, int, torch.Size, torch.dtype]] = []
    constants: list[tuple[str, Hashable]] = []
    for name, value in kwargs.items():
        if name == "past_key_values":
            continue
        if name == "attention_mask" and value is not None:
            # What it hides was never stored.
            if not step.padding_known:
                raise NotCapturable("the attention mask hides more than padding")
            constants.append((name, None))
        elif isinstance(value, torch.Tensor):
            dim = 1 if name == "position_ids" and value.ndim == 3 else 0
            if value.is_floating_point() or value.ndim <= dim or value.shape[dim] != rows:
                raise NotCapturable(f"{name} is a tensor of {tuple(value.shape)}, {value.dtype}")
            shape = torch.Size((*value.shape[:dim], *value.shape[dim + 1 :]))
            tensors.append((name, dim, shape, value.dtype))
        elif value is None or isinstance(value, (bool, int, float, str)):
            constants.append((name, value))
        else:
            raise NotCapturable(f"{name} is a {type(value).__name__}")
    if not {"input_ids", "position_ids"} <= {tensor[0] for tensor in tensors}:
        raise NotCapturable("the step comes without input_ids or without position_ids")
    return Call(tuple(sorted(tensors)), tuple(sorted(constants, key=lambda item: item[0])))


def _find_model_obstacle(model: nn.Module) -> str | None:
    """Why ``model`` cannot be captured as it is now; None if it can."""
    if len({parameter.device for parameter in model.parameters()}) != 1:
        return "the model is on several devices"
    hooked = find_hook(model)
    return hooked and f"{hooked} has a forward hook, which a replay would not call"


def _find_obstacle(model: nn.Module, cache: TreeCache) -> str | None:
    """Why decode steps over ``cache`` cannot be captured now; None if they can."""
    if torch.is_grad_enabled():
        return "gradients are on"
    if model.training:
        return "the model is in training mode"
    if cache.backend not in ("auto", "triton"):
        return f"backend {cache.backend!r} was chosen"
    for layer in cache.layers:
        if not isinstance(layer, PagedLayer) or isinstance(layer, LinearAttentionCacheLayerMixin):
            return f"the cache has states that are not K/V ({type(layer).__name__})"
        if layer.storage is None:
            return "a layer has stored nothing yet"
    devices = {storage.spec.device for storage in cache.storages}
    if len(devices) != 1:
        return f"K/V are on {len(devices)} devices"
    device = devices.pop()
    if torch.is_autocast_enabled(device.type):
        return "autocast is on"
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return "a capture is under way already"
    return None


@contextmanager
def _without_padding_check(model: nn.Module) -> Iterator[None]:
    """GPT-2 reads its ids to warn of padding without a mask; ours is known, and reading waits."""
    models = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    for part in models:
        part.warn_if_padding_and_no_attention_mask = lambda *args: None
    try:
        yield
    finally:
        for part in models:
            del part.warn_if_padding_and_no_attention_mask


def _map(value: Any, change: Callable[[Any], Any]) -> Any:
    """``value`` with ``change`` applied to what its containers hold."""
    if isinstance(value, ModelOutput):
        return type(value)(**{key: _map(item, change) for key, item in value.items()})
    if type(value) in (tuple, list):
        return type(value)(_map(item, change) for item in value)
    return change(value)


def _copied(output: Any) -> Any:
    """Out of the memory that the next replay overwrites."""
    return _map(output, lambda x: x.clone() if isinstance(x, torch.Tensor) else x)


def _outward(output: Any, bucket: int, rows: int, cache: TreeCache) -> Any:
    """The output for the caller's rows and cache."""

    def change(value: Any) -> Any:
        if value is _CACHE or isinstance(value, TreeCache):
            return cache
        batched = isinstance(value, torch.Tensor) and value.ndim and value.shape[0] == bucket
        return value[:rows] if batched and rows < bucket else value

    return _map(output, change)
