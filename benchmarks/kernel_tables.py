"""What benchmarks/results/kernel.json says, as tables and as a roofline; for report.py."""

from __future__ import annotations

import hashlib
import json
import textwrap
from collections.abc import Iterable, Sequence
from io import StringIO
from typing import Any

Row = dict[str, Any]

TREES = {
    "W1_16": "2,000 shared, 16 × 256",
    "W1_64": "2,000 shared, 64 × 256",
    "W1_256": "2,000 shared, 256 × 256",
    "W2": "32,768 shared, 32 × 512",
    "W3": "4,096, 4 × 1,024, 16 × 512, 64 × 256",
    "W4": "1,024, a chain of 32 × 256, a leaf of 64 at each",
    "W5": "nothing shared, 64 × 4,096",
}
README_TREES = ("W1_64", "W2", "W5")
README_HEADS = 32


def readme_table(kernel: Row) -> list[str]:
    """A few rows of the main table."""
    gpu = kernel["environment"].get("gpu", "?")
    lines = [
        f"| attention of a decode step, µs a layer, {gpu} ([more](docs/benchmarks.md)) "
        "| only reading | ours | best of the others |",
        "| :-- | --: | --: | --: |",
    ]
    for row in main_rows(kernel):
        if row["workload"] in README_TREES and row["num_q_heads"] == README_HEADS and row["ok"]:
            lines.append(
                f"| {TREES[row['workload']]} tokens | {row['gather_us']:.1f} "
                f"| {row['us']['median']:.1f} | {_best_text(row)} |"
            )
    return lines


def docs_text(kernel: Row | None) -> str:
    """Everything between the markers of docs/benchmarks.md."""
    if kernel is None:
        return "No results yet: run `make bench-gpu` on a machine with a GPU."
    rows = kernel["rows"]
    main = main_rows(kernel)
    others = [row for row in rows if row not in main and not row.get("allocated")]
    failed = [f"**Failed:** {row['name']}: {row['reason']}." for row in rows if not row["ok"]]
    parts = [
        _wrapped(_where(kernel)),
        "![Roofline: ours and the best peer for every tree](figures/roofline.svg)",
        *map(_wrapped, failed),
        "### One new token a branch, bf16, head dim 128, 8 K/V heads: µs a layer",
        _main_table(main, rows),
        "### Other kernels in the same run: µs a layer",
        _peer_table(main),
        *map(_wrapped, _peer_notes(main)),
        "### Other shapes: µs a layer",
        _shape_table(others, kernel["environment"].get("commit", "?")),
        "### Work lists, and host time to make them: µs",
        _planning_table(main),
    ]
    return "\n\n".join(parts)


def main_rows(kernel: Row) -> list[Row]:
    return [row for row in kernel["rows"] if row.get("is_main")]


def best_peer(row: Row) -> tuple[str, float] | None:
    """Name and median of the fastest peer, if any ran."""
    times = {
        name: peer["us"]["median"] for name, peer in row.get("peers", {}).items() if "us" in peer
    }
    return min(times.items(), key=lambda item: item[1], default=None)


def _where(kernel: Row) -> str:
    where, limits = kernel["environment"], kernel["ceilings"]
    versions = ", ".join(
        f"{name} {where[name]}" for name in ("torch", "triton", "flashinfer") if name in where
    )
    float32 = limits.get("matmul_float32_tflops")
    return (
        f"{where.get('gpu', '?')}, driver {where.get('gpu_driver', '?')}, {versions}, commit "
        f"{where.get('commit', '?')}. Ceilings of that run: linear read "
        f"{limits['read_tb_per_s']:.2f} TB/s, copy {limits['copy_tb_per_s']:.2f} TB/s, bf16 "
        f"matrix product {limits['matmul_tflops']:.0f} TFLOP/s"
        + ("." if float32 is None else f", float32 {float32:.0f} TFLOP/s.")
    )


def _main_table(main: list[Row], rows: list[Row]) -> str:
    placed = {
        (row["workload"], row["num_q_heads"]): row["us"]["median"]
        for row in rows
        if row.get("allocated") and row["ok"]
    }
    header = (
        "tree", "heads", "unique / logical MB", "GFLOP", "floor", "gather", "ours (p20 to p80)",
        "× gather", "must", "aim", "as allocated", "best of the others",
    )  # fmt: skip
    lines = []
    for row in main:
        key = (row["workload"], row["num_q_heads"])
        head = (
            row["workload"],
            str(row["num_q_heads"]),
            f"{row['unique_bytes'] / 1e6:,.0f} / {row['logical_bytes'] / 1e6:,.0f}",
            f"{row['flop'] / 1e9:.2f}",
            f"{row['floor_us']:.1f}",
        )
        if not row["ok"]:
            lines.append((*head, *_failure(header, head)))
            continue
        us = row["us"]
        targets = (
            f"{row[target]}" if us["median"] <= row[target] else f"**{row[target]} missed**"
            for target in ("must_us", "aim_us")
        )
        allocated = f"{placed[key]:.1f}" if key in placed else ""
        lines.append(
            (
                *head,
                f"{row['gather_us']:.1f}",
                f"**{us['median']:.1f}** ({us['p20']:.1f} to {us['p80']:.1f})",
                f"{row['over_gather']:.2f}",
                *targets,
                allocated,
                _best_text(row),
            )
        )
    return _table(header, lines)


def _best_text(row: Row) -> str:
    best = best_peer(row)
    if best is None:
        return "–"
    name, time = best
    ratio = time / row["us"]["median"]
    said = f"{ratio:.2f} ×" if ratio >= 1 else f"**we lose: {1 / ratio:.2f} × longer**"
    return f"{time:.1f} ({said}), {name}"


def _peer_names(main: list[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in main for name in row.get("peers", {})))


def _peer_table(main: list[Row]) -> str:
    names = _peer_names(main)
    if not names:
        return "No peers were run."
    lines = []
    for row in main:
        peers = [row.get("peers", {}).get(name, {}) for name in names]
        times = [f"{peer['us']['median']:.1f}" if "us" in peer else "–" for peer in peers]
        ours = f"**{row['us']['median']:.1f}**" if row["ok"] else "failed"
        lines.append((row["workload"], str(row["num_q_heads"]), ours, *times))
    return _table(("tree", "heads", "ours", *names), lines)


def _peer_notes(main: list[Row]) -> list[str]:
    """Versions, and why a cell is empty, each reason once."""
    notes = []
    for name in _peer_names(main):
        reasons: dict[str, list[str]] = {}
        versions = set()
        for row in main:
            peer = row.get("peers", {}).get(name, {})
            versions.add(peer.get("version", ""))
            if "reason" in peer:
                where = f"{row['workload']} with {row['num_q_heads']} heads"
                reasons.setdefault(peer["reason"], []).append(where)
        said = [f"{', '.join(where)}: {_plain(reason)}" for reason, where in reasons.items()]
        version = ", ".join(sorted(versions - {""}))
        notes.append(f"{name} ({version})" + (f". Not run: {'; '.join(said)}." if said else "."))
    return notes


def _plain(reason: str) -> str:
    """One short line that Markdown does not read anything into."""
    line = " ".join(reason.split()).replace("|", "/").replace("<", "(").replace(">", ")")
    return textwrap.shorten(line, 200, placeholder=" …").rstrip(".")


def _shape_table(rows: list[Row], newest: str) -> str:
    """Rows of other runs than that of the main table are marked with their commits."""
    if not rows:
        return "None were run."
    header = ("case", "unique MB", "GFLOP", "floor", "gather", "ours (p20 to p80)", "× gather",
              "error")  # fmt: skip
    lines = []
    for row in rows:
        if not row["ok"]:
            lines.append((row["name"], *_failure(header, (row["name"],))))
            continue
        us, commit = row["us"], row.get("commit", newest)
        lines.append(
            (
                row["name"] + (f" ({commit})" if commit != newest else ""),
                f"{row['unique_bytes'] / 1e6:,.0f}",
                f"{row['flop'] / 1e9:.2f}",
                f"{row['floor_us']:.1f}",
                f"{row['gather_us']:.1f}",
                f"**{us['median']:.1f}** ({us['p20']:.1f} to {us['p80']:.1f})",
                f"{row['over_gather']:.2f}",
                f"{row['error']:.1e}",
            )
        )
    return _table(header, lines)


def _planning_table(main: list[Row]) -> str:
    header = ("tree", "heads", "items", "of them merges", "parts, MB", "plan and cut",
              "new plan after a fork", "one token more")  # fmt: skip
    lines = [
        (
            row["workload"],
            str(row["num_q_heads"]),
            str(row["items"]),
            str(row["items"] - row["work_items"]),
            f"{row['part_bytes'] / 1e6:.1f}",
            *(f"{row[key]['median']:,.0f}" for key in ("plan_us", "fork_us", "token_us")),
        )
        for row in main
        if row["ok"]
    ]
    return _table(header, lines)


def _failure(header: Sequence[str], head: Sequence[str]) -> list[str]:
    return ["**failed**", *[""] * (len(header) - len(head) - 1)]


def _table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    cells = [header, [":--", *["--:"] * (len(header) - 1)], *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 100, break_on_hyphens=False, break_long_words=False)


def roofline_points(kernel: Row) -> list[Row]:
    """For each tree and head count: FLOP a byte, and TFLOP/s of ours and of the best peer."""
    points = []
    for row in main_rows(kernel):
        if not row["ok"]:
            continue
        best = best_peer(row)
        points.append(
            {
                "tree": row["workload"],
                "heads": row["num_q_heads"],
                "intensity": row["flop"] / row["unique_bytes"],
                "ours": row["flop"] / row["us"]["median"] / 1e6,
                "peer": None if best is None else row["flop"] / best[1] / 1e6,
            }
        )
    return points


def roofline_digest(kernel: Row) -> str:
    """Of all that the picture shows: a picture with another one is out of date."""
    limits = [kernel["ceilings"][name] for name in ("read_tb_per_s", "matmul_tflops")]
    shown = [limits, kernel["environment"].get("gpu"), roofline_points(kernel)]
    return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()[:16]


def draw_roofline(kernel: Row) -> str:
    """The picture as SVG, the same for the same results. Needs matplotlib."""
    try:
        import matplotlib

        matplotlib.use("svg")
        from matplotlib import pyplot
    except ImportError as error:
        raise SystemExit(f"{error}: the roofline needs it. Run pip install matplotlib.") from error

    bandwidth, rate = (kernel["ceilings"][name] for name in ("read_tb_per_s", "matmul_tflops"))
    points = sorted(roofline_points(kernel), key=lambda point: point["intensity"])
    low, ridge, high = 3.0, rate / bandwidth, 600.0
    gray, ours, theirs = "#667085", "#6d4bc0", "#12805c"
    settings = {"svg.hashsalt": "roofline", "svg.fonttype": "none", "font.size": 9}
    with matplotlib.rc_context(settings):
        heads = sorted({point["heads"] for point in points})
        figure, grid = pyplot.subplots(
            1, len(heads), figsize=(9, 4), sharey=True, squeeze=False, layout="constrained"
        )
        for axes, count in zip(grid[0], heads, strict=True):
            shown = [point for point in points if point["heads"] == count]
            axes.plot([low, ridge, high], [low * bandwidth, rate, rate], color=gray, zorder=1)
            axes.text(high / 1.1, rate * 1.15, f"matrix product\n{rate:.0f} TFLOP/s", color=gray,
                      ha="right", va="bottom", fontsize=8)  # fmt: skip
            axes.text(low * 3.5, low * 2.2 * bandwidth, f"linear read\n{bandwidth:.2f} TB/s",
                      color=gray, va="top", fontsize=8)  # fmt: skip
            for color, face, whose, label in (
                (ours, ours, "ours", "ours"),
                (theirs, "none", "peer", "best of the others"),
            ):
                known = [point for point in shown if point[whose] is not None]
                axes.scatter(
                    [point["intensity"] for point in known], [point[whose] for point in known],
                    facecolors=face, edgecolors=color, label=label, zorder=3,
                )  # fmt: skip
            place = 0.0
            for point in shown:
                x = point["intensity"]
                if point["peer"] is not None:
                    ends = (point["ours"], point["peer"])
                    axes.plot([x, x], ends, color=theirs, linewidth=0.7, zorder=1)
                # Above the roof; neighbours that lie close are moved apart.
                place = max(x, 1.16 * place)
                axes.text(place, 1.3 * min(place * bandwidth, rate), point["tree"], rotation=90,
                          ha="center", va="bottom", fontsize=8)  # fmt: skip
            axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(3, 5 * rate),
                     xlabel="FLOP for each unique byte of K/V")  # fmt: skip
            axes.set_title(f"{count} query heads, {kernel['environment'].get('gpu', '?')}")
            axes.grid(True, which="major", linewidth=0.4)
            axes.legend(loc="lower right", fontsize=8)
        grid[0][0].set_ylabel("TFLOP/s")
        drawn = StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
        pyplot.close(figure)
    text = "\n".join(line.rstrip() for line in drawn.getvalue().splitlines())
    return f"{text}\n<!-- {roofline_digest(kernel)} -->\n"
