"""Tables of generation on a GPU, from what benchmarks/generate.py measured."""

from __future__ import annotations

from typing import Any

README_WORKLOADS = ((2_000, 16), (2_000, 64), (2_000, 256), (32_768, 32))
README_METHODS = {
    "tree_generate, compiled": "`tree_generate`, compiled",
    "stock generate, TreeCache": "stock `generate`",
    "stock generate, DynamicCache": "DynamicCache",
}


def readme_lines(result: dict[str, Any] | None) -> list[str]:
    """A few rows of the 8B shape, milliseconds a step."""
    if result is None:
        return []
    found = {
        (row["method"], row["prompt"], row["rows"]): row
        for row in result["rows"]
        if row["shape"] == "8B" and not row["churn"]
    }
    gpu = result["environment"]["gpu"]
    lines = [
        f"| a decode step of an 8B model, ms, {gpu} | only reading | "
        f"{' | '.join(README_METHODS.values())} |",
        f"| :-- | --: | {' | '.join('--:' for _ in README_METHODS)} |",
    ]
    for prompt, rows in README_WORKLOADS:
        first = found[next(iter(README_METHODS)), prompt, rows]
        cells = [_ms(found.get((method, prompt, rows))) for method in README_METHODS]
        lines.append(
            f"| {rows} branches of {prompt:,} tokens | {first['floor_ms']:.1f} "
            f"| {' | '.join(cells)} |"
        )
    return lines


def docs_text(result: dict[str, Any] | None) -> str:
    """Everything that was measured."""
    if result is None:
        return "Not measured yet: `python benchmarks/generate.py`."
    where = result["environment"]
    lines = [
        f"{where['gpu']}, driver {where['gpu_driver']}, torch {where['torch']}, "
        f"triton {where['triton']}, transformers {where['transformers']}, commit "
        f"{where['commit']}.",
        f"Ceiling of that run: linear read {result['linear_read_tb_s']:.2f} TB/s.",
        "",
        "| shape | branches × prompt | new tokens | how | ms a step | × floor | first tokens, s "
        "| all, s | tokens a second | GB above weights |",
        "| :-- | :-- | --: | :-- | --: | --: | --: | --: | --: | --: |",
    ]
    order = {row["method"]: i for i, row in enumerate(result["rows"][::-1])}
    rows = sorted(
        result["rows"],
        key=lambda row: (
            [r["shape"] for r in result["rows"]].index(row["shape"]),
            row["churn"],
            row["prompt"],
            row["rows"],
            -order[row["method"]],
        ),
    )
    for row in rows:
        work = f"{row['rows']} × {row['prompt']:,}" + (", forking" if row["churn"] else "")
        head = f"| {row['shape']} | {work} | {row['tokens']} | {row['method']} |"
        if "left_out" in row:
            reason = "no time left" if row["left_out"] == "time" else row["left_out"]
            lines.append(f"{head} not run: {reason} | | | | | |")
            continue
        lines.append(
            f"{head} **{row['ms_per_step']:.2f}** | {row['ms_per_step'] / row['floor_ms']:.2f} "
            f"| {row['first_tokens_s']:.2f} | {row['total_s']:.2f} | {row['tokens_per_s']:,.0f} "
            f"| {row['peak_above_weights_gb']:.2f} |"
        )
    return "\n".join(lines)


def _ms(row: dict[str, Any] | None) -> str:
    return "not run" if row is None or "left_out" in row else f"{row['ms_per_step']:.1f}"
