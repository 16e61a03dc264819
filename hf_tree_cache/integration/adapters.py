"""Which PEFT adapters are at work in a model: K/V made under one are wrong under another."""

from __future__ import annotations

import sys
from typing import Any


def active_adapters(model: Any) -> tuple[str, ...]:
    """Names of the adapters that change what ``model`` computes now; none without PEFT."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is None:
        return ()
    layers = (m for m in model.modules() if isinstance(m, tuners.BaseTunerLayer))
    layer = next(layers, None)
    if layer is None:
        return ()
    if layer.merged:
        return tuple(layer.merged_adapters)
    return () if layer.disable_adapters else tuple(layer.active_adapters)
