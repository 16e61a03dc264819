"""Tables of generation on GPUs, from what benchmarks/generate.py measured on each card."""

from __future__ import annotations

import textwrap
from typing import Any

README_WORKLOADS = ((2_000, 16), (2_000, 64), (2_000, 256), (32_768, 32))
README_METHODS = {
    "tree_generate": "`tree_generate`",
    "tree_generate, compiled": "`tree_generate`, compiled",
    "stock generate, TreeCache": "stock `generate`",
    "stock generate, DynamicCache": "DynamicCache",
}
OTHERS = ("stock generate, static cache", "continuous batching")
"""Beginnings of the names of transformers' other ways."""


def newest(cards: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The results that were measured last."""
    return max(cards, key=lambda result: result.get("measured", ""), default=None)


def readme_lines(result: dict[str, Any] | None) -> list[str]:
    """A few rows of the 8B shape on one card, milliseconds a step."""
    if result is None:
        return []
    found = {
        (row["method"], row["prompt"], row["rows"]): row
        for row in result["rows"]
        if row["shape"] == "8B" and not row.get("churn", True)
    }
    others = _others(result)
    titles = [*README_METHODS.values(), *(["best of transformers' other ways"] if others else [])]
    gpu = result["environment"]["gpu"]
    lines = [
        f"| a decode step of an 8B model, ms, {gpu} | only reading | {' | '.join(titles)} |",
        f"| :-- | --: | {' | '.join('--:' for _ in titles)} |",
    ]
    for prompt, rows in README_WORKLOADS:
        work = [found[key] for key in found if key[1:] == (prompt, rows)]
        if not work:
            continue
        cells = [_ms(found.get((method, prompt, rows))) for method in README_METHODS]
        if others:
            cells.append(_best_other(others, prompt, rows))
        lines.append(
            f"| {rows} branches of {prompt:,} tokens | {work[0]['floor_ms']:.1f} "
            f"| {' | '.join(cells)} |"
        )
    return lines


def docs_text(cards: list[dict[str, Any]]) -> str:
    """Everything that was measured, a section for each card, the newest first."""
    if not cards:
        return "Not measured yet: `python benchmarks/generate.py`."
    order = sorted(cards, key=lambda result: result.get("measured", ""), reverse=True)
    return "\n\n".join(_card_text(result) for result in order)


def _card_text(result: dict[str, Any]) -> str:
    where = result["environment"]
    commits = sorted({row.get("commit", where["commit"]) for row in result["rows"]})
    about = (
        f"Driver {where['gpu_driver']}, torch {where['torch']}, triton {where['triton']}, "
        f"transformers {where['transformers']}, commit {where['commit']}. Ceiling of that run: "
        f"linear read {result['linear_read_tb_s']:.2f} TB/s."
    )
    if older := [commit for commit in commits if commit != where["commit"]]:
        about += f" Rows marked with {', '.join(older)} are of other runs, with their own floors."
    if "measured" not in result:
        about += " Steps here: the time of all new tokens less that of a quarter, in two runs."
    attention = {row["attention"] for row in result["rows"] if "attention" in row}
    if attention:
        about += (
            f" Continuous batching has `{', '.join(sorted(attention))}`, the fastest attention "
            "installed for it there; setting up its cache and graphs is not in its times."
        )
    parts = [
        f"### {where['gpu']}",
        _wrapped(about),
        "\n".join(_steps(result["rows"], where["commit"])),
    ]
    parts += [
        "\n".join(lines)
        for lines in (
            _profiles(result["rows"]),
            _prefill(result.get("prefill"), where["commit"]),
            _different_prompts(result.get("different_prompts"), where["commit"]),
            _largest(result.get("largest")),
        )
        if lines
    ]
    return "\n\n".join(parts)


def _steps(rows: list[dict[str, Any]], newest: str) -> list[str]:
    lines = [
        "| shape | branches × prompt | new tokens | how | ms a step | × floor | first tokens, s "
        "| all, s | tokens a second | GB above weights |",
        "| :-- | :-- | --: | :-- | --: | --: | --: | --: | --: | --: |",
    ]
    for row in _sorted(rows):
        if "method" not in row:
            lines.append(f"| {row['shape']} | not run: {row['left_out']} | | | | | | | | |")
            continue
        mark = f" ({row['commit']})" if row.get("commit", newest) != newest else ""
        head = f"| {row['shape']} | {_work(row)} | {row['tokens']} | {row['method']}{mark} |"
        if "left_out" in row:
            reason = "no time left" if row["left_out"] == "time" else row["left_out"]
            lines.append(f"{head} not run: {_cell(reason)} | | | | | |")
            continue
        lines.append(
            f"{head} **{row['ms_per_step']:.2f}** | {row['ms_per_step'] / row['floor_ms']:.2f} "
            f"| {row['first_tokens_s']:.2f} | {row['total_s']:.2f} | {row['tokens_per_s']:,.0f} "
            f"| {row['peak_above_weights_gb']:.2f} |"
        )
    return lines


def _profiles(rows: list[dict[str, Any]]) -> list[str]:
    shown = [row for row in _sorted(rows) if row.get("profile")]
    if not shown:
        return []
    lines = [
        _wrapped(
            "Where a step goes, ms, in a run that is watched (*graph*: the forward on the device; "
            "*host*: its own work, of it *forward*, to book and launch one; *waiting*: of the host "
            "for the device):"
        ),
        "",
        "| shape | branches × prompt | how | step | graph | host | of it forward | waiting |",
        "| :-- | :-- | :-- | --: | --: | --: | --: | --: |",
    ]
    for row in shown:
        profile = row["profile"]
        cells = [
            f"{profile[name]:.2f}" if name in profile else "–"
            for name in ("step", "graph", "host", "forward", "waiting")
        ]
        lines.append(f"| {row['shape']} | {_work(row)} | {row['method']} | {' | '.join(cells)} |")
    return lines


def _mark(rows: list[dict[str, Any]], newest: str) -> str:
    """ " (commits)" of a section that is not of the run with ``newest``."""
    commits = sorted({row.get("commit", newest) for row in rows})
    return "" if commits == [newest] else f" ({', '.join(commits)})"


def _prefill(rows: list[dict[str, Any]] | None, newest: str) -> list[str]:
    if not rows:
        return []
    alone = {
        (row["prompt"], row["chunk"]): row["seconds"]
        for row in rows
        if row["how"] == "the model alone" and "seconds" in row
    }
    lines = [
        "Prefill of the 8B shape (the model alone: one row, sdpa, DynamicCache, no sampling)"
        f"{_mark(rows, newest)}:",
        "",
        "| prompt | chunks | how | s | × the model alone | GB above weights |",
        "| --: | --: | :-- | --: | --: | --: |",
    ]
    for row in sorted(rows, key=lambda row: (row["prompt"], row["chunk"] or 0)):
        chunk = f"{row['chunk']:,}" if row["chunk"] else "–"
        head = f"| {row['prompt']:,} | {chunk} | {row['how']} |"
        if "left_out" in row:
            lines.append(f"{head} not run: {_cell(row['left_out'])} | | |")
            continue
        whole = alone.get((row["prompt"], row["chunk"]))
        ratio = f"{row['seconds'] / whole:.2f}" if whole else "–"
        lines.append(
            f"{head} {row['seconds']:.3f} | {ratio} | {row['peak_above_weights_gb']:.2f} |"
        )
    return lines


def _different_prompts(rows: list[dict[str, Any]] | None, newest: str) -> list[str]:
    if not rows:
        return []
    lines = [
        "Eight prompts of 200 to 2,000 tokens in one batch, 8 branches each, 33 new tokens"
        f"{_mark(rows, newest)}:",
        "",
        "| cache | ms a step | first tokens, s | all, s | GB above weights | tokens stored |",
        "| :-- | --: | --: | --: | --: | --: |",
    ]
    for row in rows:
        if "left_out" in row:
            lines.append(f"| {row['how']} | not run: {_cell(row['left_out'])} | | | | |")
            continue
        stored = ""
        if "stored" in row:
            padding = row["stored"] - row["expected"]
            stored = f"{row['stored']:,}, {padding:,} of them padding"
            stored += f", **dense reads: {row['dense_reads']}**" if row["dense_reads"] else ""
        lines.append(
            f"| {row['how']} | {row['ms_per_step']:.2f} | {row['first_tokens_s']:.2f} "
            f"| {row['total_s']:.2f} | {row['peak_above_weights_gb']:.2f} | {stored} |"
        )
    return lines


def _largest(found: dict[str, Any] | None) -> list[str]:
    if not found:
        return []
    limit = "the time ended"
    if found["too_many"] is not None:
        limit = f"{found['too_many']:,} do not fit"
    broken = [one for one in found["tries"] if one.get("usable_after", True) is not True]
    state = "**a cache was broken after it**" if broken else "caches were sound after failures"
    text = (
        f"The most branches forked from a prompt of {found['prompt']:,} tokens, {found['tokens']} "
        f"new tokens each, steps without graphs: {found['tree_rows']:,} ({limit}; {state}). Dense "
        f"rows: {found['dense_rows']:,}."
    )
    return [_wrapped(text)]


def _sorted(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By shape, in the order of the file, then by work; ways in the order of their first row."""
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    methods = list(dict.fromkeys(row.get("method", "") for row in rows))
    return sorted(
        rows,
        key=lambda row: (
            shapes.index(row["shape"]),
            row.get("churn", False),
            row.get("prompt", 0),
            row.get("rows", 0),
            methods.index(row.get("method", "")),
        ),
    )


def _others(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the 8B shape in transformers' other ways."""
    return [
        row
        for row in result["rows"]
        if row["shape"] == "8B" and "ms_per_step" in row and row["method"].startswith(OTHERS)
    ]


def _best_other(others: list[dict[str, Any]], prompt: int, rows: int) -> str:
    same = [row for row in others if (row["prompt"], row["rows"]) == (prompt, rows)]
    if not same:
        return "not run"
    best = min(same, key=lambda row: row["ms_per_step"])
    return f"{best['ms_per_step']:.1f}, {best['method'].removeprefix('stock generate, ')}"


def _work(row: dict[str, Any]) -> str:
    return f"{row['rows']} × {row['prompt']:,}" + (", forking" if row["churn"] else "")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "/")


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 100, break_on_hyphens=False)


def _ms(row: dict[str, Any] | None) -> str:
    return "not run" if row is None or "left_out" in row else f"{row['ms_per_step']:.1f}"
