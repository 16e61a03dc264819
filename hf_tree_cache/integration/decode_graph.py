"""DecodeGraphs: decode steps of a model replayed from captured CUDA graphs. Needs Triton."""

from __future__ import annotations

import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin
from transformers.utils import logging
from triton import knobs

from ..errors import InvalidArgument
from ..forward.linear import MOST_ROWS
from ..naming import cache_name
from .cache import TreeCache
from .compiled import CompiledLayers
from .decode_call import Call, outward, read_call, without_cache
from .fingerprint import find_hook, fingerprint
from .layers import PagedLayer
from .op_record import OpRecord, first_difference
from .static import StaticDecode, layouts
from .step import NotCapturable, Step
from .substitutes import Substitutes

logger = logging.get_logger(__name__)

MOST_GRAPHS = 48
"""Graphs kept for caches of one kind; the one that was not used for longest goes first."""

GRID_SLACK = 2.0
"""A graph serves steps of fewer work items, down to this part of those it has programs for."""


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
class _Program:
    """The forward for one kind of call.

    Attributes:
        inputs: by bucket, where the forward reads its arguments.
        obstacle: why it cannot be captured.
        proven: two steps of one bucket were recorded, and did the same.
        records: of the first of them, by bucket.
    """

    call: Call
    inputs: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    obstacle: str | None = None
    proven: bool = False
    records: dict[int, OpRecord] = field(default_factory=dict)

    def compare(self, bucket: int, record: OpRecord) -> None:
        """Learn from one more recorded step."""
        if record.blocked is not None:
            self.obstacle = f"the forward waits for the device ({record.blocked})"
        elif bucket not in self.records:
            self.records[bucket] = record
        else:
            difference = first_difference(self.records[bucket], record)
            self.obstacle = difference and f"the forward depends on lengths ({difference})"
            self.proven = difference is None
            self.records.clear()


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
        made: programs and buckets that have run once: all buffers are there.
        warm: those that have run as they will be captured: all kernels are compiled and loaded.
        graphs: by program, bucket and the cache's addresses.
        pool: memory of the graphs; it must not outlive the last of them, nor they it.
        moves: of ``static`` when ``graphs`` were captured.
    """

    static: StaticDecode = field(default_factory=StaticDecode)
    made: set[tuple[_Program, int]] = field(default_factory=set)
    warm: set[tuple[_Program, int]] = field(default_factory=set)
    graphs: OrderedDict[Hashable, list[_Graph]] = field(default_factory=OrderedDict)
    pool: Any = None
    moves: int = -1

    def find(self, key: Hashable) -> _Graph | None:
        """A graph for the work that is in the buffers now."""
        if self.moves != self.static.moves:
            self.graphs.clear()
            self.pool = None
            self.moves = self.static.moves
        if key not in self.graphs:
            return None
        self.graphs.move_to_end(key)
        items = self.static.items()
        return next((graph for graph in self.graphs[key] if graph.serves(items)), None)

    def add(self, key: Hashable, graph: _Graph) -> None:
        self.graphs.setdefault(key, []).append(graph)
        while sum(map(len, self.graphs.values())) > MOST_GRAPHS:
            self.graphs.popitem(last=False)


@dataclass(frozen=True, slots=True)
class _Place:
    """A cache that has been looked at since the last prompt."""

    cache: weakref.ref[TreeCache]
    kind: _Kind
    addresses: Hashable
    device: torch.device


class DecodeGraphs:
    """Runs the decode steps of ``model`` from CUDA graphs, and says which it leaves alone.

    A batch is padded to the next of a few sizes. For each size the first step runs as a warm-up,
    the next is captured, and all others are replays. Before a first capture two more warm-ups are
    recorded operator by operator: only a forward that does the same twice is captured. Graphs are
    dropped when weights move or when a buffer has to grow; a cache that lies elsewhere gets its
    own. One step at a time, on one stream: whoever calls :meth:`run` sees to that.

    Args:
        compile: compile the decoder layers for what is captured.

    Attributes:
        stats: how the steps so far ran.

    Raises:
        InvalidArgument: ``compile``, and a model whose layers cannot be told apart.
    """

    def __init__(self, model: nn.Module, *, compile: bool = False) -> None:
        self.stats = GraphStats()
        self._compiled = _compiled_layers(model) if compile else None
        self._model = model
        layers = self._compiled.layers if self._compiled is not None else ()
        self._substitutes = Substitutes(model, compiled=layers)
        self._kinds: dict[Hashable, _Kind] = {}
        self._programs: dict[Call, _Program] = {}
        self._fingerprint: Hashable = None
        self._place: _Place | None = None
        self._lent: weakref.ref[TreeCache] | None = None  # whose step has the last output
        self._stream: torch.cuda.Stream | None = None
        self._devices = ("cuda", "cpu") if knobs.runtime.interpret else ("cuda",)

    def close(self) -> None:
        """Drop all graphs, and leave the model as it was found."""
        self._kinds.clear()
        self._programs.clear()
        self._substitutes.release()
        self._compiled = None

    def run(self, forward: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        """The output of a decode step; None if ``forward`` must be called as ever."""
        cache: Any = kwargs.get(cache_name(kwargs))
        step = cache.step if isinstance(cache, TreeCache) else None
        if step is None or step.num_new != 1 or step.fresh or step.plan.grown is None:
            # Between prompts, weights may be loaded, adapters switched and hooks registered.
            self._place = None
            return None
        if cache.storages[0].spec.device.type not in self._devices:
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
        lent = None if self._lent is None else self._lent()
        if lent is not None and lent is not cache and lent.lends_outputs:
            raise NotCapturable("another tree_generate has yet to read its last step")
        rows = len(step.counts)
        bucket = bucket_of(rows)
        place = self._look_at(cache)
        linears = self._substitutes.linears
        if bucket > MOST_ROWS and linears.gain_if_joined:
            linears.join()
            self._place = None
            place = self._look_at(cache)
        kind, static = place.kind, place.kind.static
        call = read_call(step, kwargs)
        program = self._programs.get(call)
        if program is None:
            program = self._programs[call] = _Program(call)
        if program.obstacle is not None:
            raise NotCapturable(program.obstacle)
        inputs = program.inputs.get(bucket)
        if inputs is None:
            inputs = program.inputs[bucket] = call.make_inputs(bucket, place.device)
        arguments = {**dict(call.constants), **inputs, cache_name(kwargs): cache}

        def decode(compiled: CompiledLayers | None = None) -> Any:
            with ExitStack() as stack:
                stack.enter_context(cache.decode_through(static))
                stack.enter_context(_without_padding_check(self._model))
                static.pending = stack.enter_context(self._substitutes.switched())
                if compiled is not None:
                    stack.enter_context(compiled.swapped(static, cache.layers))
                static.reset()
                output = forward(**arguments)
            static.advance()
            return output

        cuda = place.device.type == "cuda"
        with torch.cuda.device(place.device) if cuda else nullcontext():
            call.fill(inputs, kwargs)
            static.prepare(step, cache.storages, bucket)
            try:
                if cuda and program.proven and (program, bucket) in kind.warm:
                    graph = self._graph(decode, kind, (program, bucket, place.addresses))
                    graph.graph.replay()
                    static.advanced()
                    self.stats.replayed += 1
                    copy = not cache.lends_outputs
                    self._lent = None if copy else weakref.ref(cache)
                    output = outward(graph.output, bucket, rows, cache, copy=copy)
                else:
                    output = self._warm_up(decode, kind, program, bucket)
                    static.advanced()
                    output = outward(without_cache(output), bucket, rows, cache, copy=False)
            except NotCapturable as obstacle:
                program.obstacle = str(obstacle)
                raise
            finally:
                static.release()
        cache.mark_written()
        return output

    def _warm_up(
        self, decode: Callable[..., Any], kind: _Kind, program: _Program, bucket: int
    ) -> Any:
        """Run a step as it will be captured; as long as needed, compare what it does."""
        self.stats.warm_ups += 1
        kind.static.fit(())
        if (program, bucket) not in kind.made:
            output = decode()
            kind.made.add((program, bucket))
        elif program.proven and self._compiled is not None:
            output = self._compile(decode)
            kind.warm.add((program, bucket))
        else:
            with nullcontext() if program.proven else OpRecord() as record:
                output = decode()
            if record is not None:
                program.compare(bucket, record)
        if self._compiled is None:
            kind.warm.add((program, bucket))
        return output

    def _compile(self, decode: Callable[..., Any]) -> Any:
        """Run a step through compiled layers; if that fails, never again."""
        try:
            return decode(self._compiled)
        except Exception as error:
            self._compiled = None
            first = str(error).strip().partition("\n")[0]
            logger.warning(
                f"enable_tree_attention(compile=True): {type(self._model).__name__} runs without "
                f"compiled layers: {type(error).__name__}: {first}"
            )
            return decode()

    def _graph(self, decode: Callable[..., Any], kind: _Kind, key: Hashable) -> _Graph:
        """A graph for the work that is in the buffers, captured now if need be."""
        graph = kind.find(key)
        if graph is None:
            grids = tuple(bucket_of(need + need // 8) for need in kind.static.items())
            kind.static.fit(grids)
            graph = _Graph(*self._capture(decode, kind), grids)
            kind.add(key, graph)
            self.stats.captured += 1
        return graph

    def _capture(self, decode: Callable[..., Any], kind: _Kind) -> tuple[torch.cuda.CUDAGraph, Any]:
        if kind.pool is None:
            kind.pool = torch.cuda.MemPool()
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        graph, here, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), self._stream
        stream.wait_stream(here)
        # torch.cuda.graph would collect garbage and empty the allocator's cache first.
        try:
            with torch.cuda.stream(stream):
                graph.capture_begin(pool=kind.pool.id, capture_error_mode="thread_local")
                try:
                    output = decode(self._compiled)
                finally:
                    graph.capture_end()
        except NotCapturable:
            raise
        except Exception as error:
            raise NotCapturable(f"the capture failed ({type(error).__name__}: {error})") from error
        here.wait_stream(stream)
        return graph, without_cache(output)

    def _look_at(self, cache: TreeCache) -> _Place:
        """What there is to know of ``cache`` and the model; looked up once for each prompt.

        Raises:
            NotCapturable: the model or the cache rules graphs out as they are now.
        """
        if torch.is_grad_enabled():
            raise NotCapturable("gradients are on")
        if self._model.training:
            raise NotCapturable("the model is in training mode")
        place = self._place
        if place is not None and place.cache() is cache:
            if torch.is_autocast_enabled(place.device.type):
                raise NotCapturable("autocast is on")
            return place
        now = fingerprint(self._model)
        if now != self._fingerprint:
            self._kinds.clear()
            self._programs.clear()
            self._find_substitutes()
            self._fingerprint = fingerprint(self._model)
        obstacle = _find_model_obstacle(self._model) or _find_obstacle(cache)
        if obstacle is not None:
            raise NotCapturable(obstacle)
        specs, addresses = layouts(cache.storages)
        kind = self._kinds.setdefault((specs, cache.deterministic), _Kind())
        self._place = _Place(weakref.ref(cache), kind, addresses, cache.storages[0].spec.device)
        return self._look_at(cache)

    def _find_substitutes(self) -> None:
        self._substitutes.find()
        if self._compiled is not None and self._substitutes.serve(self._compiled.layers):
            logger.warning_once(
                f"enable_tree_attention(compile=True): kernels serve all that the layers of "
                f"{type(self._model).__name__} hold; compiled ones were slower wherever both "
                "were measured. Leave compile out."
            )


def _compiled_layers(model: nn.Module) -> CompiledLayers:
    try:
        return CompiledLayers(model)
    except NotCapturable as obstacle:
        raise InvalidArgument(
            f"enable_tree_attention(compile=True): {type(model).__name__}: {obstacle}. Leave "
            "compile out."
        ) from obstacle


def bucket_of(count: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, 24, ..."""
    power = 1 << max(count - 1, 0).bit_length()
    return power if count > power * 3 // 4 or power < 4 else power * 3 // 4


def _find_model_obstacle(model: nn.Module) -> str | None:
    """Why ``model`` cannot be captured as it is now; None if it can."""
    if len({parameter.device for parameter in model.parameters()}) != 1:
        return "the model is on several devices"
    if any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        # Processes would have to capture together, and tree and addresses are their own.
        return "the model is split over several processes"
    hooked = find_hook(model)
    return hooked and f"{hooked} has a forward hook, which a replay would not call"


def _find_obstacle(cache: TreeCache) -> str | None:
    """Why decode steps over ``cache`` cannot be captured; None if they can."""
    if cache.backend not in ("auto", "triton"):
        return f"backend {cache.backend!r} was chosen"
    for layer in cache.layers:
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            return f"the cache has states that are not K/V ({type(layer).__name__})"
        # Others keep nothing: they read the K/V of a layer before them.
        if isinstance(layer, PagedLayer) and layer.storage is None:
            return "a layer has stored nothing yet"
    devices = {storage.spec.device for storage in cache.storages}
    if len(devices) != 1:
        return f"K/V are on {len(devices)} devices"
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
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
