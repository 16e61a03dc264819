"""Table of attention over latents, from what benchmarks/latent_attention.py measured."""

from __future__ import annotations

from typing import Any


def docs_text(result: dict[str, Any] | None) -> str:
    """Everything that was measured."""
    if result is None:
        return "Not measured yet: `python benchmarks/latent_attention.py`."
    where, limits = result["environment"], result["ceilings"]
    ways = list(result["rows"][0]["ways"]) if result["rows"] else []
    lines = [
        f"{where.get('gpu', '?')}, driver {where.get('gpu_driver', '?')}, torch {where['torch']}, "
        f"commit {where.get('commit', '?')}.",
        f"Ceilings of that run: linear read {limits['read_tb_per_s']:.2f} TB/s, bf16 matrix "
        f"product {limits['matmul_tflops']:.0f} TFLOP/s.",
        "",
        f"| model | tree | unique MB | only reading | floor | {' | '.join(ways)} |",
        f"| :-- | :-- | --: | --: | --: | {' | '.join('--:' for _ in ways)} |",
    ]
    for row in result["rows"]:
        cells = " | ".join(_cell(row["ways"].get(way, {})) for way in ways)
        lines.append(
            f"| {row['model']} | {row['tree']} | {row['unique_bytes'] / 1e6:.0f} "
            f"| {row['read_us']:.1f} | {row['floor_us']:.1f} | {cells} |"
        )
    return "\n".join(lines)


def _cell(measured: dict[str, Any]) -> str:
    if "us" not in measured:
        return str(measured.get("failed", "not run"))
    return f"{measured['us']:,.0f} ({measured['host_us']:,.0f})"
