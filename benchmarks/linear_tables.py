"""Tables of linear layers of few rows, from what benchmarks/linear.py measured on each card."""

from __future__ import annotations

from typing import Any

TITLES = {
    "qkv": "Q, K, V",
    "o": "O",
    "gate_up": "gate, up",
    "gated": "gated unit",
    "down": "down",
    "head": "head",
}
TWICE = "gate_up"
"""Part of a gated unit, so not of a step."""


def docs_text(cards: list[dict[str, Any]]) -> str:
    """Everything that was measured, a section for each card."""
    return "\n\n".join(map(_card_text, cards))


def _card_text(result: dict[str, Any]) -> str:
    where = result["environment"]
    lines = [
        f"### Linear layers on {where['gpu']}",
        "",
        f"Driver {where['gpu_driver']}, torch {where['torch']}, triton {where['triton']}, commit "
        f"{where['commit']}.",
        f"Ceiling of that run: linear read {result['linear_read_tb_s']:.2f} TB/s.",
        "",
        f"| shape | rows | | {' | '.join(TITLES.values())} | a step, ms |",
        f"| :-- | --: | :-- |{' --: |' * (len(TITLES) + 1)}",
    ]
    works: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for row in sorted(result["rows"], key=lambda row: row["rows"]):
        works.setdefault((row["shape"], row["rows"]), {})[row["layer"]] = row
    shapes = list(dict.fromkeys(row["shape"] for row in result["rows"]))
    for shape, rows in sorted(works, key=lambda work: (shapes.index(work[0]), work[1])):
        work = works[shape, rows]
        for way in ("floor", "torch", "ours"):
            cells = [_cell(work.get(name), way) for name in TITLES]
            lines.append(f"| {shape} | {rows} | {way} | {' | '.join(cells)} | {_step(work, way)} |")
    return "\n".join(lines)


def _us(row: dict[str, Any], way: str) -> float | None:
    if way == "floor":
        return row.get("floor_us")
    return row[way]["us"] if way in row else None


def _cell(row: dict[str, Any] | None, way: str) -> str:
    if row is None or (us := _us(row, way)) is None:
        return str((row or {}).get("left_out", "not run"))
    if way != "ours":
        return f"{us:.1f}"
    ratio = row["torch"]["us"] / us
    verdict = f"{ratio:.2f} ×" if ratio >= 1 else f"**we lose: {1 / ratio:.2f} × longer**"
    return f"**{us:.1f}** ({verdict})"


def _step(work: dict[str, dict[str, Any]], way: str) -> str:
    """Milliseconds of all layers of a model, if each kind of them was measured."""
    total = 0.0
    for name in TITLES:
        if name == TWICE:
            continue
        us = _us(work[name], way) if name in work else None
        if us is None:
            return ""
        total += work[name]["count"] * us
    return f"{total / 1000:.2f}"
