"""When each token was there, and where the time of a decode step goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation import utils as stock

from hf_tree_cache.generation import loop
from hf_tree_cache.integration.decode_graph import DecodeGraphs


def settle() -> None:
    """Wait for the device, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def free_gb() -> float:
    """Memory of the GPU that nobody uses."""
    return torch.cuda.mem_get_info()[0] / 1e9 if torch.cuda.is_available() else 0.0


@contextmanager
def peak_memory() -> Iterator[Callable[[], float]]:
    """A function that says how many GB were held at most, above what is held now."""
    if not torch.cuda.is_available():
        yield lambda: 0.0
        return
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    yield lambda: (torch.cuda.max_memory_allocated() - before) / 1e9


@dataclass
class Timeline:
    """One run.

    Attributes:
        tokens: seconds until the first, second, ... token of all branches was drawn.
        total: seconds in all.
        notes: what else there is to say of it.
    """

    tokens: list[float]
    total: float
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def ms_per_step(self) -> float:
        """From a quarter of the tokens to the last one, a step."""
        first = max(1, len(self.tokens) // 4)
        return 1e3 * (self.tokens[-1] - self.tokens[first - 1]) / (len(self.tokens) - first)


class Marks(StoppingCriteria):
    """Notes when a token is there, on the clock of the device; stops nothing.

    Not a logits processor: for those, tree_generate makes float32 scores that nobody else wants.
    """

    def __init__(self) -> None:
        settle()
        self._on_gpu = torch.cuda.is_available()
        self._begin = time.perf_counter()
        self._marks = [self._mark()]

    def _mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self._marks.append(self._mark())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Note it where stock ``generate`` asks its own criteria, instead of as one of them.

        To criteria of its caller an enabled model listens after every token, to its own a token
        late.
        """

        def noting(ask: Callable[..., Any]) -> Callable[..., Any]:
            def noted(criteria: Any, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
                self._marks.append(self._mark())
                return ask(criteria, input_ids, scores, **kwargs)

            return noted

        with _replaced(StoppingCriteriaList, "__call__", noting):
            yield

    def timeline(self) -> Timeline:
        settle()
        total = time.perf_counter() - self._begin
        begin, *marks = self._marks
        if self._on_gpu:
            return Timeline([begin.elapsed_time(mark) / 1e3 for mark in marks], total)
        return Timeline([mark - begin for mark in marks], total)


@dataclass
class Watch:
    """What :func:`watched` sees of a run.

    Attributes:
        waits: (begin, end) of each time that the host waits for tokens, one a step.
        forwards: seconds of the host for each replayed forward.
        graphs: events around each replay.
    """

    waits: list[tuple[float, float]] = field(default_factory=list)
    forwards: list[float] = field(default_factory=list)
    graphs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    def profile(self) -> dict[str, float]:
        """Milliseconds a step, without the first quarter of the steps.

        Returns:
            step: on the host's clock; waiting: of the host, for the device; host: its own work;
            forward: the part of that which books and launches the forward; graph: the forward on
            the device.
        """
        settle()
        waits = self.waits[len(self.waits) // 4 :]
        if len(waits) < 2:
            return {}
        step = 1e3 * (waits[-1][1] - waits[0][1]) / (len(waits) - 1)
        waiting = 1e3 * _mean([end - begin for begin, end in waits[1:]])
        found = {"step": step, "waiting": waiting, "host": step - waiting}
        if self.forwards:
            found["forward"] = 1e3 * _mean(self.forwards[len(self.forwards) // 4 :])
        if self.graphs:
            replays = self.graphs[len(self.graphs) // 4 :]
            found["graph"] = _mean([begin.elapsed_time(end) for begin, end in replays])
        return found


@contextmanager
def watched() -> Iterator[Watch]:
    """Look at a run of stock ``generate`` or ``tree_generate``; costs it some 10 µs a step."""
    watch = Watch()

    def waiting(read: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            begin = time.perf_counter()
            found = read(*args)
            watch.waits.append((begin, time.perf_counter()))
            return found

        return timed

    def forwarding(run: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            begin = time.perf_counter()
            output = run(*args)
            if output is not None:
                watch.forwards.append(time.perf_counter() - begin)
            return output

        return timed

    def replaying(replay: Callable[..., Any]) -> Callable[..., Any]:
        def timed(graph: Any) -> None:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            replay(graph)
            end.record()
            watch.graphs.append((begin, end))

        return timed

    with ExitStack() as stack:
        stack.enter_context(_replaced(loop.Arriving, "read", waiting))
        # Absent from versions of transformers that write the check into their loop.
        for name in ("StopCheck", "DeferredStopCheck"):
            if hasattr(stock, name):
                stack.enter_context(_replaced(getattr(stock, name), "__call__", waiting))
        stack.enter_context(_replaced(DecodeGraphs, "run", forwarding))
        stack.enter_context(_replaced(torch.cuda.CUDAGraph, "replay", replaying))
        yield watch


@contextmanager
def _replaced(owner: Any, name: str, change: Callable[..., Any]) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, change(before))
    try:
        yield
    finally:
        setattr(owner, name, before)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
