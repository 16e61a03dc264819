"""Writes docs/search/comparison.md and docs/figures/search.svg from benchmarks/results/search.json.

python benchmarks/search_report.py            needs matplotlib (extra "viz")
python benchmarks/search_report.py --check    exits with 1 when the page is out of date
"""

from __future__ import annotations

import argparse
import json
import sys
from io import StringIO
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from intervals import wilson

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "search.json"
PAGE = ROOT / "docs" / "search" / "comparison.md"
FIGURE = ROOT / "docs" / "figures" / "search.svg"
BEGIN, END = "<!-- results: made by benchmarks/search_report.py -->", "<!-- end of results -->"
COLORS = {
    "greedy": "#98a2b3",
    "single sample": "#667085",
    "self-consistency": "#b54708",
    "best of n, log-prob": "#e3a008",
    "best of n, checker": "#12805c",
    "step beam": "#1570ef",
    "DVTS": "#53b1fd",
    "MCTS": "#6d4bc0",
    "tree of thoughts": "#c11574",
    "entropy branching": "#475467",
}
MARKERS = "osD^vP*XhH"


def table(report: dict[str, Any]) -> str:
    """All points, in the order in which they were measured, strategies together."""
    lines = [
        "| strategy | size | solved, 95 % | reached | tokens, model + verifier | cost | s |",
        "| :-- | --: | --: | --: | --: | --: | --: |",
    ]
    points = report["points"]
    for name in dict.fromkeys(point["strategy"] for point in points):
        for point in points:
            if point["strategy"] != name:
                continue
            count = point["puzzles"]
            low, high = wilson(point["solved"], count)
            lines.append(
                f"| {name} | {point['size']} | {point['solved'] / count:.1%} "
                f"({low:.0%} to {high:.0%}) | {point['reached'] / count:.1%} "
                f"| {point['tokens']:,.0f} + {point['verifier_tokens']:,.0f} "
                f"| {point['cost']:,.0f} | {point['seconds']:,.0f} |"
            )
    where = report["environment"]
    count = points[0]["puzzles"]
    lines += [
        "",
        f"{count} held-out puzzles of four numbers, temperature {report['temperature']:g}, one "
        f"seed, float32, {where['cpu_count']} CPU cores, torch {where['torch']}, transformers "
        f"{where['transformers']}. A token of the verifier costs {report['verifier_weight']:.2f} "
        "of one of the model.",
    ]
    return "\n".join(lines)


def draw(report: dict[str, Any]) -> str:
    """The picture as SVG, the same for the same results. Needs matplotlib."""
    try:
        import matplotlib

        matplotlib.use("svg")
        from matplotlib import pyplot
    except ImportError as error:
        raise SystemExit(f"{error}: the figure needs it. Run pip install matplotlib.") from error

    settings = {"svg.hashsalt": "search", "svg.fonttype": "none", "font.size": 9}
    with matplotlib.rc_context(settings):
        figure, axes = pyplot.subplots(figsize=(8.5, 4.8), layout="constrained")
        for marker, (name, color) in zip(MARKERS, COLORS.items(), strict=True):
            points = [point for point in report["points"] if point["strategy"] == name]
            costs = [point["cost"] for point in points]
            shares = [100 * point["solved"] / point["puzzles"] for point in points]
            ends = [wilson(point["solved"], point["puzzles"]) for point in points]
            below = [share - 100 * low for share, (low, _) in zip(shares, ends, strict=True)]
            above = [100 * high - share for share, (_, high) in zip(shares, ends, strict=True)]
            axes.errorbar(
                costs, shares, yerr=(below, above), label=name, color=color, marker=marker,
                markersize=5, linewidth=1.2, elinewidth=0.7, capsize=2,
            )  # fmt: skip
        axes.set(xscale="log", xlabel="tokens computed, a puzzle (the verifier's by its size)",
                 ylabel="puzzles solved, %", ylim=(0, 100))  # fmt: skip
        axes.xaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:,.0f}"))
        axes.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        axes.set_xticks([50, 100, 200, 500, 1000, 2000])
        axes.grid(True, which="major", linewidth=0.4)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, frameon=False)
        drawn = StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
        pyplot.close(figure)
    return "\n".join(line.rstrip() for line in drawn.getvalue().splitlines()) + "\n"


def page(text: str, report: dict[str, Any]) -> str:
    """``text`` with the table between its markers made anew."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table(report)}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    report = json.loads(RESULTS.read_text(encoding="utf-8"))
    found = PAGE.read_text(encoding="utf-8")
    made = page(found, report)
    if arguments.check:
        sys.exit(f"{PAGE} is out of date: run benchmarks/search_report.py" if made != found else 0)
    PAGE.write_text(made, encoding="utf-8")
    FIGURE.write_text(draw(report), encoding="utf-8")


if __name__ == "__main__":
    main()
