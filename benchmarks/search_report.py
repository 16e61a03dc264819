"""Writes docs/search/comparison.md and docs/figures/search.svg from benchmarks/results/search.json.

python benchmarks/search_report.py            needs matplotlib (extra "viz")
python benchmarks/search_report.py --check    exits with 1 when the page is out of date
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from io import StringIO
from pathlib import Path
from statistics import fmean
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
    "entropy branching, checker": "#5d7a1f",
}
MARKERS = "osD^vP*XhH<"
BESIDE = "best of n, checker"
"""What the others are compared with, on the same puzzles."""


def group(points: list[dict[str, Any]]) -> dict[tuple[int, str], list[dict[str, Any]]]:
    """The points of all seeds, by level and strategy; levels first, then as they were measured."""
    grouped: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for point in sorted(points, key=lambda point: (point["level"], point["seed"])):
        grouped.setdefault((point["level"], point["strategy"]), []).append(point)
    return grouped


def outcomes(points: list[dict[str, Any]]) -> list[list[int]]:
    """1 or 0 for each puzzle of each seed."""
    return [[int(digit) for digit in point["solved"]] for point in points]


def mean(values: list[list[int]]) -> float:
    return fmean(value for seed in values for value in seed)


def interval(values: list[list[int]], rounds: int = 2_000) -> tuple[float, float]:
    """95 % interval of the mean: seeds are resampled, and the puzzles of each.

    Wilson's of all puzzles where every value is 0, or every one is 1.
    """
    flat = [value for seed in values for value in seed]
    if set(flat) in ({0}, {1}):
        return wilson(sum(flat), len(flat))
    rng = random.Random(0)
    means = sorted(
        mean([rng.choices(seed, k=len(seed)) for seed in rng.choices(values, k=len(values))])
        for _ in range(rounds)
    )
    return means[round(0.025 * rounds)], means[round(0.975 * rounds) - 1]


def table(report: dict[str, Any]) -> str:
    """A row for every strategy at every level, all seeds together."""
    lines = [
        "| strategy | size | tokens, model + verifier | cost | solved, 95 % | by seed "
        f"| more than {BESIDE}, 95 % | reached |",
        "| :-- | --: | --: | --: | --: | --: | --: | --: |",
    ]
    grouped = group(report["points"])
    level = None
    for (at, name), points in grouped.items():
        if at != level:
            level = at
            lines.append(
                f"| **about {at} tokens** | | | | | | | |"
                if at
                else "| **one sample** | | | | | | | |"
            )
        values = outcomes(points)
        low, high = interval(values)
        by_seed = ", ".join(f"{100 * fmean(seed):.0f}" for seed in values)
        beside = ""
        if at and name != BESIDE:
            base = outcomes(grouped[at, BESIDE])
            gains = [
                [a - b for a, b in zip(*pair, strict=True)]
                for pair in zip(values, base, strict=True)
            ]
            worst, best = interval(gains)
            beside = f"{100 * mean(gains):+.0f} ({100 * worst:+.0f} to {100 * best:+.0f})"
        tokens, judged, cost = (
            fmean(point[key] for point in points) for key in ("tokens", "verifier_tokens", "cost")
        )
        reached = fmean(int(digit) for point in points for digit in point["reached"])
        lines.append(
            f"| {name} | {points[0]['size']} | {tokens:,.0f} + {judged:,.0f} | {cost:,.0f} "
            f"| {mean(values):.0%} ({low:.0%} to {high:.0%}) | {by_seed} | {beside} "
            f"| {reached:.0%} |"
        )
    where = report["environment"]
    first = next(iter(grouped.values()))
    seeds, count = len(first), len(first[0]["solved"])
    seconds = sum({(p["seed"], p["level"], p["size"], p["cost"]): p["seconds"]
                   for p in report["points"]}.values())  # fmt: skip
    lines += [
        "",
        f"{seeds} seeds of {count} held-out puzzles of four numbers, temperature "
        f"{report['temperature']:g}, float32, {where['cpu_count']} CPU cores that other work "
        f"shared, {seconds / 60:.0f} minutes in all, torch {where['torch']}, transformers "
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
        grouped = group(report["points"])
        for marker, (name, color) in zip(MARKERS, COLORS.items(), strict=True):
            found = [points for (_, strategy), points in grouped.items() if strategy == name]
            costs = [fmean(point["cost"] for point in points) for points in found]
            values = [outcomes(points) for points in found]
            shares = [100 * mean(each) for each in values]
            ends = [interval(each) for each in values]
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
        axes.set_xticks([50, 100, 200, 400, 800])
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
