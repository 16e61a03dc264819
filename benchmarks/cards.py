"""Files of results by the card that they were measured on."""

from __future__ import annotations


def card_of(where: dict[str, str]) -> str:
    """A short name for file names: h100, h200."""
    return where["gpu"].removeprefix("NVIDIA ").partition(" ")[0].lower()
