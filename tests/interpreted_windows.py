"""Random lives behind windows with the fused kernel, in Triton's interpreter on a CPU.

A script, for a process of its own: whether a kernel is interpreted is decided when it is imported.

TRITON_INTERPRET=1 python tests/interpreted_windows.py [--long]
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from interpreter import quicken
from windowed import lives


def main(long: bool) -> None:
    quicken()
    torch.set_num_threads(1)
    failures, seen = lives("triton", range(6), *(8, 5) if long else (5, 3))
    every = {"let go", "fork", "fork back", "crop", "hold", "prune", "several"}
    missing = {"lives": every - seen}
    for seeds, size, options in (
        (range(3), (2, 30) if long else (1, 24), {"tight": True}),
        (range(2), (6, 5) if long else (4, 3), {"head_dims": (32, 16)}),
        (range(2), (6, 5) if long else (4, 3), {"deterministic": True}),
    ):
        more, seen = lives("triton", seeds, *size, **options)
        failures, missing[str(options)] = failures + more, {"let go"} - seen
    assert not failures, "\n".join(failures)
    assert not any(missing.values()), missing


if __name__ == "__main__":
    main("--long" in sys.argv)
