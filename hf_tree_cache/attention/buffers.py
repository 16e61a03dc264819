"""Small integers that a kernel reads: written on the host, sent to fixed addresses in one copy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch


def rounded(size: int) -> int:
    """The next power of two, at least 16: buffers then seldom move, and tiles divide evenly."""
    return max(16, 1 << (max(size, 1) - 1).bit_length())


class IntBuffer:
    """Named stretches of one int32 tensor, with a mirror on the host."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spans: dict[str, slice] = {}
        self._views: dict[str, torch.Tensor] = {}
        self._mirror = np.zeros(0, np.int32)

    def __getitem__(self, name: str) -> torch.Tensor:
        """On the device, at an address that changes only in :meth:`ensure`."""
        return self._views[name]

    def span(self, first: str, last: str) -> torch.Tensor:
        """On the device, the stretches from ``first`` to ``last`` as one."""
        return self._buffer[self._spans[first].start : self._spans[last].stop]

    def host(self, name: str) -> npt.NDArray[np.int32]:
        return self._mirror[self._spans[name]]

    def capacity(self, name: str) -> int:
        span = self._spans[name]
        return span.stop - span.start

    def ensure(self, **sizes: int) -> bool:
        """Make room, in this order; whether everything had to move."""
        if self._spans and all(size <= self.capacity(name) for name, size in sizes.items()):
            return False
        end = 0
        for name, size in sizes.items():
            had = self.capacity(name) if name in self._spans else 0
            self._spans[name] = slice(end, end + max(had, rounded(size)))
            end = self._spans[name].stop
        self._mirror = np.zeros(end, np.int32)
        self._source = torch.from_numpy(self._mirror)
        with torch.inference_mode(False):  # it outlives the block that it may be made in
            buffer = torch.zeros(end, dtype=torch.int32, device=self._device)
        self._views = {name: buffer[span] for name, span in self._spans.items()}
        self._buffer = buffer
        return True

    def send(self, first: str, last: str) -> None:
        """Copy the stretches from ``first`` to ``last`` to the device."""
        self._send(self._spans[first].start, self._spans[last].stop)

    def send_part(self, name: str, begin: int, end: int) -> None:
        start = self._spans[name].start
        self._send(start + begin, start + end)

    def _send(self, begin: int, end: int) -> None:
        source = self._source[begin:end]
        if self._device.type == "cuda":
            # A pinned copy of its own: the mirror may change before the GPU gets there.
            source = source.pin_memory()
        self._buffer[begin:end].copy_(source, non_blocking=True)
