"""Writes the results in README and docs, and the figures, from benchmarks/results, or checks them.

python benchmarks/report.py             after a benchmark has left new results
python benchmarks/report.py --figures   draws the roofline, too; needs matplotlib (extra "viz")
python benchmarks/report.py --check     exits with 1 when a page or a figure is out of date
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import (
    generate_tables,
    kernel_tables,
    latent_tables,
    linear_tables,
    sampling_tables,
)
from hf_tree_cache.memory.allocator import PhysicalKVAllocator
from hf_tree_cache.memory.tree import Branch, BranchTree

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- results: made by benchmarks/report.py -->", "<!-- end of results -->"
MEMORY_ROWS = {
    "fork at the tip, 131,072 tokens": "a fork behind 131,072 tokens",
    "256 forks in one call, 131,072 tokens": "256 forks there",
    "select of 5,000 rows, like a beam": "a beam's selection among 5,000 rows",
    "decode step, in all, 64 rows": "the books of a decode step with 64 rows",
}


def load(results: Path, name: str) -> dict[str, Any] | None:
    """The results of one benchmark, None where it has not been run."""
    path = results / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def load_cards(results: Path, name: str = "generate") -> list[dict[str, Any]]:
    """The results of a benchmark that has a file for each card."""
    found = sorted(results.glob(f"{name}_*.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in found]


def results_text(
    cpu: dict[str, Any] | None,
    memory: dict[str, Any] | None,
    kernel: dict[str, Any] | None = None,
    generation: dict[str, Any] | None = None,
) -> str:
    """What stands between the markers in README."""
    parts = []
    if generation is not None:
        parts += [*generate_tables.readme_lines(generation), ""]
    if kernel is not None:
        parts += kernel_tables.readme_table(kernel)
        parts += [""] if cpu is not None else []
    if cpu is not None:
        parts += [*_cpu_table(cpu), "", *_cpu_notes(cpu)]
    if memory is not None:
        parts += ["", _memory_sentence(memory)] if parts else [_memory_sentence(memory)]
    return "\n".join(parts or ["No results yet: run `make bench`."])


def _cpu_table(cpu: dict[str, Any]) -> list[str]:
    lines = [
        "| prompt | branches | prompt tokens computed | K/V held, MB | peak memory, MB | seconds |",
        "| --: | --: | --: | --: | --: | --: |",
    ]
    for row in _extremes(cpu["results"]):
        dynamic, tree = row["dynamic"], row["tree"]
        lines.append(
            f"| {row['prompt']:,} | {row['branches']:,} "
            f"| {dynamic['prefill_tokens']:,} → {tree['prefill_tokens']:,} "
            f"| {dynamic['kv_bytes'] / 1e6:,.0f} → {tree['kv_bytes'] / 1e6:,.0f} "
            f"| {dynamic['peak_rss_mb']:,} → {tree['peak_rss_mb']:,} "
            f"| {dynamic['seconds']:.1f} → {tree['seconds']:.1f} ({_verdict(row)}) |"
        )
    return lines


def _extremes(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each prompt the fewest and the most branches."""
    found: dict[int, list[int]] = {}
    for row in rows:
        found.setdefault(row["prompt"], []).append(row["branches"])
    return [row for row in rows if row["branches"] in {min(b := found[row["prompt"]]), max(b)}]


def _verdict(row: dict[str, Any]) -> str:
    ratio = row["dynamic"]["seconds"] / row["tree"]["seconds"]
    return f"{ratio:.1f} ×" if ratio >= 1 else f"**we lose: {1 / ratio:.2f} × longer**"


def _cpu_notes(cpu: dict[str, Any]) -> list[str]:
    rows, where = cpu["results"], cpu["environment"]
    new = " or ".join(sorted({str(row["new_tokens"]) for row in rows}))
    different = [row for row in rows if not row["same_tokens"]]
    same = "the same in every row" if not different else f"**different in {len(different)} rows**"
    text = (
        f"DynamicCache → TreeCache, stock `generate`, {new} new tokens a branch, sampled tokens "
        f"{same}. SmolLM2-135M in float32 on {where.get('cpu_count', '?')} CPU cores, torch "
        f"{where.get('torch', '?')}, transformers {where.get('transformers', '?')} "
        "(`benchmarks/cpu_generate.py`)."
    )
    return textwrap.wrap(text, 100, break_on_hyphens=False)


def _memory_sentence(memory: dict[str, Any]) -> str:
    measured = {row["name"]: row for row in memory["results"]}
    said = [
        f"{name} {_microseconds(measured[key]['us']['median'])}"
        for key, name in MEMORY_ROWS.items()
        if key in measured
    ]
    missed = [
        f"{name} ({_microseconds(row['us']['median'])}, not {_microseconds(row['target_us'])})"
        for name, row in measured.items()
        if row["met"] is False
    ]
    text = f"Host cost, medians: {'; '.join(said)} (`benchmarks/memory.py`, block size "
    text += f"{memory['block_size']})."
    if missed:
        text += f" **Targets missed:** {'; '.join(missed)}."
    return textwrap.fill(text, 100, break_on_hyphens=False)


def _planning_table(planning: dict[str, Any]) -> str:
    """Least and median host time of every kind of step, by number of rows."""
    measured = {(r["path"], r["name"], r["rows"]): r for r in planning["results"]}
    sizes = sorted({rows for _, _, rows in measured})
    kinds = list(dict.fromkeys((path, name) for path, name, _ in measured))
    lines = [
        "| step | " + " | ".join(f"{rows:,} rows" for rows in sizes) + " | copies |",
        "| --- |" + " --: |" * (len(sizes) + 1),
    ]
    for path, name in kinds:
        found = [measured[path, name, rows] for rows in sizes]
        cells = [f"{r['us']['least']:,.0f} ({r['us']['median']:,.0f})" for r in found]
        lines.append(f"| {name}, {path} | {' | '.join(cells)} | {found[-1]['copies']:.1f} |")
    about = (
        "Processor time of the host for a decode step, the model's left out, in µs: the least, in "
        "brackets the median; and copies to the device (`benchmarks/planning.py`: branches of a "
        f"prompt of {planning['prompt']:,} tokens with {planning['own_tokens']} or a few less of "
        f"their own, buffers on {planning['device']}, load average {planning['load_average']})."
    )
    return "\n".join([about, "", *lines])


def _microseconds(value: float) -> str:
    return f"{value / 1000:.3g} ms" if value >= 1000 else f"{value:.3g} µs"


# The figure: a tree of six nodes over blocks of four tokens, laid out by hand, booked for real.
CELL, BLOCK_TOKENS, HEIGHT = 36, 4, 30
BLOCK = CELL * BLOCK_TOKENS
STYLE = """
.card { fill: #ffffff; stroke: #d9dee7 }
text { font-family: system-ui, -apple-system, "Segoe UI", sans-serif; fill: #1f2430 }
.token { font-size: 11.5px; text-anchor: middle; fill: #1f2430 }
.small { font-size: 11px; fill: #667085 }
.head { font-size: 13px; font-weight: 600 }
.count { font-size: 10.5px; font-weight: 700; text-anchor: middle; fill: #ffffff }
.value { font-size: 12px; font-weight: 600 }
.edge { fill: none; stroke: #aab2c0; stroke-width: 1.5 }
.cut { stroke: #ffffff; stroke-width: 1; opacity: .75 }
.gone { fill: none; stroke: #c4553f; stroke-dasharray: 4 3 }
.gonetext { fill: #c4553f }
.h0 { fill: #ddd2f7 } .b0 { fill: #6d4bc0 }
.h1 { fill: #cfe0fb } .b1 { fill: #2563c9 }
.h2 { fill: #cdeee2 } .b2 { fill: #12805c }
.h3 { fill: #e4edfc } .b3 { fill: #6f97dc }
.h4 { fill: #e2f5ed } .b4 { fill: #5cae92 }
.other { fill: #c3cad6 } .ours { fill: #6d4bc0 }
@media (prefers-color-scheme: dark) {
.card { fill: #151a22; stroke: #313947 }
text, .token { fill: #e6e9ef }
.small { fill: #98a2b3 }
.edge { stroke: #5b6575 }
.cut { stroke: #151a22 }
.gone { stroke: #e08a76 } .gonetext { fill: #e08a76 }
.h0 { fill: #453473 } .h1 { fill: #23447c } .h2 { fill: #1b5a46 }
.h3 { fill: #1d3153 } .h4 { fill: #1a4035 }
.b0, .ours { fill: #8f6fe0 } .b1 { fill: #3b7de8 } .b2 { fill: #1f9d74 }
.other { fill: #4a5464 }
}
"""


def figure(cpu: dict[str, Any] | None) -> str:
    """The SVG: a token tree over its blocks, beside bars of K/V bytes where there are results."""
    bars = _bars(cpu, 698) if cpu is not None and cpu["results"] else ""
    width = 1000 if bars else 680
    label = "A tree of tokens over shared blocks of a KV cache"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} 372" width="{width}" '
        f'height="372" role="img" aria-label="{label}">\n<style>{STYLE}</style>\n'
        f'<rect class="card" x=".5" y=".5" width="{width - 1}" height="371" rx="12"/>\n'
        f"{_tree()}{bars}</svg>\n"
    )


def _tree() -> str:
    tree = BranchTree(BLOCK_TOKENS, PhysicalKVAllocator())
    (a1,) = tree.add_rows(1)
    tree.append([8])
    (b1,) = tree.fork(a1)
    tree.set_rows([a1, b1])
    tree.append([4, 4])
    a2, a3 = tree.fork(a1, 2)
    (b2,) = tree.fork(b1)
    tree.set_rows([a1, a2, a3, b1, b2])
    tree.append([2, 2, 3, 2, 3])
    freed = tree.block_table(a3)[-1]
    tree.prune(a3)
    left, middle, right = 24, 24 + 2 * BLOCK + 26, 24 + 3 * BLOCK + 52
    strips = [
        (left, 132, 0, a1, [0, 1], "What is 6 × 7 ? A :"),
        (middle, 88, 1, a1, [2], "6 × 7 ="),
        (middle, 198, 2, b1, [2], "six times seven is"),
        (right, 50, 3, a1, [3], "42 ."),
        (right, 94, 3, a2, [3], "42 eggs"),
        (right, 176, 4, b1, [3], "42 ."),
        (right, 220, 4, b2, [3], "forty two ."),
    ]
    parts = [_text(24, 30, "One tree of tokens; the number on a block: branches that share it",
                   "head")]  # fmt: skip
    middles = {y: y + HEIGHT / 2 for _, y, *_ in strips}
    joints = [(132, 88), (132, 198), (88, 50), (88, 94), (88, 138), (198, 176), (198, 220)]
    for above, below in joints:
        start = left + 2 * BLOCK if above == 132 else (middle + BLOCK)
        end = middle if above == 132 else right
        y0, y1 = middles[above], below + HEIGHT / 2
        parts.append(
            f'<path class="edge" d="M{start} {y0} C{start + 14} {y0} {end - 14} {y1} {end} {y1}"/>'
        )
    for x, y, hue, branch, places, words in strips:
        parts.append(_strip(x, y, hue, tree, branch, places, words.split()))
    parts.append(f'<rect class="gone" x="{right}" y="138" width="{BLOCK}" height="{HEIGHT}" '
                 'rx="6"/>')  # fmt: skip
    parts.append(_text(right + BLOCK / 2, 157, "pruned: its block is free", "token gonetext"))
    hues = {
        tree.block_table(branch)[place]: hue
        for _, _, hue, branch, places, _ in strips
        for place in places
    }
    parts.append(_pool(tree, hues, freed))
    return "\n".join(parts) + "\n"


def _strip(
    x: float, y: float, hue: int, tree: BranchTree, branch: Branch, places: list[int], words: list
) -> str:
    """The blocks of a node, with their tokens and how many branches share them."""
    parts = []
    for i, place in enumerate(places):
        at = x + i * BLOCK
        block = tree.block_table(branch)[place]
        parts.append(f'<rect class="h{hue}" x="{at}" y="{y}" width="{BLOCK - 2}" '
                     f'height="{HEIGHT}" rx="6"/>')  # fmt: skip
        for j in range(1, BLOCK_TOKENS):
            line = at + j * CELL
            parts.append(f'<path class="cut" d="M{line} {y} v{HEIGHT}"/>')
        for j, word in enumerate(words[i * BLOCK_TOKENS : (i + 1) * BLOCK_TOKENS]):
            parts.append(_text(at + (j + 0.5) * CELL, y + 19.5, word, "token"))
        parts.append(_badge(at + BLOCK - 6, y, hue, tree, block))
    return "\n".join(parts)


def _badge(x: float, y: float, hue: int, tree: BranchTree, block: int) -> str:
    count = sum(block in tree.block_table(branch) for branch in tree.branches)
    circle = f'<circle class="b{hue}" cx="{x}" cy="{y}" r="8.5"/>'
    return circle + _text(x, y + 3.8, str(count), "count")


def _pool(tree: BranchTree, hues: dict[int, int], freed: int) -> str:
    held, dense = len(hues), sum(len(tree.block_table(branch)) for branch in tree.branches)
    y, size, step = 298, 34, 46
    parts = [_text(24, 284, "The same in memory: one pool of blocks, each stored once", "head")]
    for block in sorted([*hues, freed]):
        x = 24 + block * step
        if block == freed:
            parts.append(f'<rect class="gone" x="{x}" y="{y}" width="{size}" height="{size}" '
                         'rx="6"/>')  # fmt: skip
            parts.append(_text(x + size / 2, y + 21.5, "free", "token gonetext"))
            continue
        parts.append(f'<rect class="h{hues[block]}" x="{x}" y="{y}" width="{size}" '
                     f'height="{size}" rx="6"/>')  # fmt: skip
        parts.append(_text(x + size / 2, y + 21.5, str(block), "token"))
        parts.append(_badge(x + size - 2, y, hues[block], tree, block))
    caption = f"{held} blocks held; {len(tree.branches)} separate rows would take {dense}"
    parts.append(_text(24, 354, caption, "small"))
    return "\n".join(parts)


def _bars(cpu: dict[str, Any], x: float) -> str:
    """K/V bytes of both caches at each width, for the longest prompt measured."""
    prompt = max(row["prompt"] for row in cpu["results"])
    rows = sorted((r for r in cpu["results"] if r["prompt"] == prompt), key=lambda r: r["branches"])
    rows = rows[-3:]
    most = max(row[kind]["kv_bytes"] for row in rows for kind in ("dynamic", "tree"))
    full, height = 210, 22
    pitch = min(78, 240 // len(rows))
    parts = [
        f'<path class="edge" d="M{x - 14} 24 v324"/>',
        _text(x + 6, 30, "K/V held, MB", "head"),
        _text(x + 6, 50, f"prompt of {prompt:,} tokens, {rows[0]['new_tokens']} new in each branch",
              "small"),
    ]  # fmt: skip
    for i, row in enumerate(rows):
        top = 68 + i * pitch
        parts.append(_text(x + 6, top + 10, f"{row['branches']} branches", "small"))
        bar = min(height, (pitch - 22) // 2)
        for j, (kind, hue) in enumerate((("dynamic", "other"), ("tree", "ours"))):
            megabytes = row[kind]["kv_bytes"] / 1e6
            y, wide = top + 15 + j * (bar + 1), max(2, full * row[kind]["kv_bytes"] / most)
            parts.append(f'<rect class="{hue}" x="{x + 6}" y="{y}" width="{wide:.1f}" '
                         f'height="{bar}" rx="3"/>')  # fmt: skip
            parts.append(_text(x + 14 + wide, y + bar / 2 + 4.3, f"{megabytes:,.0f}", "value"))
    for i, (name, hue) in enumerate((("DynamicCache", "other"), ("TreeCache", "ours"))):
        at = x + 6 + i * 112
        parts.append(f'<rect class="{hue}" x="{at}" y="322" width="12" height="12" rx="3"/>')
        parts.append(_text(at + 18, 332, name, "small"))
    parts.append(_text(x + 6, 354, "SmolLM2-135M, float32, measured on a CPU", "small"))
    return "\n".join(parts) + "\n"


def _text(x: float, y: float, words: str, kind: str) -> str:
    escaped = words.replace("&", "&amp;").replace("<", "&lt;")
    return f'<text class="{kind}" x="{x:g}" y="{y:g}">{escaped}</text>'


def pages(root: Path) -> dict[Path, str]:
    """Every file that this script writes, with what belongs into it."""
    results = root / "benchmarks" / "results"
    names = ("cpu_generate", "memory", "kernel", "latents", "planning")
    cpu, memory, kernel, latents, planning = (load(results, name) for name in names)
    cards = load_cards(results)
    readme, docs = root / "README.md", root / "docs" / "benchmarks.md"
    sections = [kernel_tables.docs_text(kernel), _generation(cards)]
    sections += [_sampling(load(results, "sampling")), _latents(latents)]
    if linears := load_cards(results, "linear"):
        sections.append(_linears(linears))
    if memory is not None:
        sections.append(f"## Bookkeeping\n\n{_memory_sentence(memory)}")
    if planning is not None:
        sections.append(f"## Planning\n\n{_planning_table(planning)}")
    return {
        readme: _filled(readme, results_text(cpu, None, kernel, generate_tables.newest(cards))),
        docs: _filled(docs, "\n\n".join(sections)),
        root / "docs" / "figures" / "tree.svg": figure(cpu),
    }


def _section(title: str, about: str, tables: str) -> str:
    lines = textwrap.wrap(about, 108, break_on_hyphens=False)
    return "\n".join([f"## {title}", "", *lines, "", tables])


def _generation(cards: list[dict[str, Any]]) -> str:
    about = (
        "`benchmarks/generate.py`: models of well-known shapes with random weights in bf16, "
        "sampling at temperature 1, branches of one prompt. A step is the time from a quarter of "
        "the new tokens to the last of them, divided by their number; × floor compares it with "
        "reading weights and unique K/V at the speed of a linear read in the same run. *Forking*: "
        "every 8 tokens 8 of 64 branches are pruned and 8 forked. Peaks are above the weights and "
        "hold K/V, graphs and logits. Cards are never compared with each other."
    )
    return _section("Generation", about, generate_tables.docs_text(cards))


def _sampling(result: dict[str, Any] | None) -> str:
    about = (
        "`benchmarks/sampling.py`: next tokens from logits of 128,256 tokens in bf16, µs a call. "
        "*Ours* draws the token, its log-prob and whether the row is sound; *transformers* is its "
        "processors, softmax and multinomial as in `generate`, then also with log-probs, against "
        "which ours is compared. Peaked rows have forty tokens that stand out, flat ones none. "
        "Before it is timed, what is kept must be what transformers keeps. *Floor*: logits read "
        "once, noise written once, and read where every token may be drawn, at the speed of a "
        "linear read."
    )
    return _section("Sampling", about, sampling_tables.docs_text(result))


def _latents(result: dict[str, Any] | None) -> str:
    about = (
        "`benchmarks/latent_attention.py`: one decode step over the trees above with the attention "
        "of two DeepSeek models in bf16, µs a layer from queries to the heads' results: in a CUDA "
        "graph, and in brackets the host's time to launch it without one, which is how decode "
        "steps over latents run. Every way agrees with float64 first (4e-3 ours, 1e-2 the others). "
        "*Dense* gathers and expands the latents of every row; *DynamicCache* has them in rows."
    )
    return _section("Latents", about, latent_tables.docs_text(result))


def _linears(cards: list[dict[str, Any]]) -> str:
    about = (
        "`benchmarks/linear.py`: linear layers of a decode step in bf16, µs a product, beside "
        "torch (cuBLAS). Layers with the same input are one product, in torch of their joined "
        "weight; a gated unit is gate, up and what joins them, two kernels more in torch. A CUDA "
        "graph goes through copies that are several times as large as L2. Results "
        "may be no further from float64 than 1.25 × torch's. *Floor*: weights, biases and rows "
        "once, at the speed of a linear read. *A step*: all such layers of the model."
    )
    return _section("Linear layers", about, linear_tables.docs_text(cards))


def _filled(page: Path, results: str) -> str:
    """The page with ``results`` between its markers."""
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{page.name} lacks the markers {BEGIN!r} and {END!r}: put them back.")
    return f"{before}{BEGIN}\n{results}\n{END}{after}"


def _is_stale(roofline: Path, kernel: dict[str, Any] | None) -> bool:
    """Whether the picture shows other results; what drew it is not needed to tell."""
    if kernel is None:
        return roofline.exists()
    shown = roofline.read_text(encoding="utf-8") if roofline.exists() else ""
    return f"<!-- {kernel_tables.roofline_digest(kernel)} -->" not in shown


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, exit with 1 if stale")
    parser.add_argument("--figures", action="store_true", help="draw the roofline, too")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    stale = []
    for path, text in pages(options.root).items():
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(str(path.relative_to(options.root)))
        if not options.check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    roofline = options.root / "docs" / "figures" / "roofline.svg"
    kernel = load(options.root / "benchmarks" / "results", "kernel")
    if options.figures and kernel is not None and not options.check:
        roofline.write_text(kernel_tables.draw_roofline(kernel), encoding="utf-8")
        stale.append(str(roofline.relative_to(options.root)))
    elif _is_stale(roofline, kernel):
        name = roofline.relative_to(options.root)
        print(f"out of date: {name}. Run python benchmarks/report.py --figures (extra 'viz').")
        if options.check:
            return 1
    if stale and options.check:
        print(f"out of date: {', '.join(stale)}. Run python benchmarks/report.py.")
        return 1
    print(f"written: {', '.join(stale)}" if stale else "up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main())
