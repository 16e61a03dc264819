"""README runs: its python blocks in order, in one namespace, with the output that it shows."""

from __future__ import annotations

import json
import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from test_floors import FLOORS, modules_of

from benchmarks import generate_tables, kernel_tables, report

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
LOGPROB = re.compile(r"-\d+\.\d\d")


def examples() -> list[tuple[str, str]]:
    """Each python block with the text block behind it, empty where none follows."""
    following = [*BLOCKS[1:], ("", "")]
    return [
        (code, text if kind == "text" else "")
        for (language, code), (kind, text) in zip(BLOCKS, following, strict=True)
        if language == "python"
    ]


def split_logprobs(text: str) -> tuple[str, list[float]]:
    return LOGPROB.sub("#", text), [float(found) for found in LOGPROB.findall(text)]


def test_the_python_blocks_print_what_readme_shows() -> None:
    from weights import smollm2_path

    namespace: dict[str, Any] = {}
    assert examples(), "README has no python block"
    for code, shown in examples():
        code = re.sub(r"^name = .*$", f"name = {str(smollm2_path())!r}", code, flags=re.MULTILINE)
        printed = StringIO()
        with redirect_stdout(printed):
            exec(compile(code, "README.md", "exec"), namespace)
        words, logprobs = split_logprobs(printed.getvalue())
        shown_words, shown_logprobs = split_logprobs(shown)
        assert words == shown_words
        # Products round differently from one processor to the next.
        assert logprobs == pytest.approx(shown_logprobs, abs=0.02)


def test_results_and_figure_are_those_of_the_committed_benchmarks() -> None:
    assert report.main(["--check"]) == 0, "run python benchmarks/report.py"


def test_readme_fits_and_its_links_lead_somewhere() -> None:
    assert len(README.splitlines()) <= 130
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert [link for link in links if not (ROOT / link).exists()] == []


RUN = {"seconds": 4.0, "prefill_tokens": 1600, "kv_bytes": 97_000_000, "peak_rss_mb": 900}
CPU = {
    "environment": {"cpu_count": "2", "torch": "2", "transformers": "5"},
    "results": [
        {
            "prompt": 200,
            "branches": 8,
            "new_tokens": 64,
            "dynamic": RUN,
            "tree": RUN | {"seconds": 2.0, "prefill_tokens": 200, "kv_bytes": 30_000_000},
            "same_tokens": True,
        },
        {
            "prompt": 200,
            "branches": 1,
            "new_tokens": 64,
            "dynamic": RUN,
            "tree": RUN | {"seconds": 5.0},
            "same_tokens": False,
        },
    ],
}
MEMORY = {
    "block_size": 16,
    "results": [
        {
            "name": "fork at the tip, 131,072 tokens",
            "us": {"median": 1.25},
            "target_us": 20,
            "met": True,
        },
        {
            "name": "select of 5,000 rows, like a beam",
            "us": {"median": 12345.0},
            "target_us": 10_000,
            "met": False,
        },
    ],
}


def test_the_report_shows_losses_missed_targets_and_different_samples() -> None:
    text = report.results_text(CPU, MEMORY)
    prose = " ".join(text.split())
    assert "| 200 | 8 | 1,600 → 200 | 97 → 30 | 900 → 900 | 4.0 → 2.0 (2.0 ×) |" in text
    assert "we lose: 1.25 × longer" in text
    assert "different in 1 rows" in prose
    assert "a fork behind 131,072 tokens 1.25 µs" in prose
    assert "**Targets missed:** select of 5,000 rows, like a beam (12.3 ms, not 10 ms)." in prose


@pytest.mark.parametrize("cpu", [None, {"environment": {}, "results": []}, CPU],
                         ids=["no file", "no results", "results"])  # fmt: skip
def test_the_figure_is_well_formed_with_and_without_results(cpu: dict[str, Any] | None) -> None:
    from xml.etree import ElementTree

    svg = report.figure(cpu)
    assert ElementTree.fromstring(svg).tag.endswith("svg")
    assert ("TreeCache" in svg) is bool(cpu and cpu["results"])
    assert "8 blocks held; 4 separate rows would take 16" in svg


KERNEL_ROW = {
    "name": "W1_64, 32/8 heads",
    "workload": "W1_64",
    "num_q_heads": 32,
    "is_main": True,
    "allocated": False,
    "ok": True,
    "unique_bytes": 75_000_000,
    "logical_bytes": 591_000_000,
    "flop": 2_370_000_000,
    "floor_us": 16.3,
    "gather_us": 20.8,
    "us": {"median": 28.8, "p20": 28.7, "p80": 29.0},
    "over_gather": 1.38,
    "error": 2e-3,
    "must_us": 30,
    "aim_us": 26,
    "items": 20,
    "work_items": 15,
    "part_bytes": 2_500_000,
    **{f"{part}_us": {"median": 800.0} for part in ("plan", "fork", "token")},
    "peers": {
        "other": {"version": "other 1.0", "us": {"median": 24.0}},
        "absent": {"version": "absent 2.0", "reason": "does not | import"},
    },
}
KERNEL = {
    "environment": {"gpu": "NVIDIA H200", "torch": "2"},
    "ceilings": {"read_tb_per_s": 4.63, "copy_tb_per_s": 4.21, "matmul_tflops": 780.0},
    "rows": [
        KERNEL_ROW,
        KERNEL_ROW | {"allocated": True, "is_main": False, "us": {"median": 27.5}},
        {"name": "W3, odd", "workload": "W3", "ok": False, "reason": "no room"},
    ],
}


GENERATION_ROW = {
    "shape": "8B",
    "method": "tree_generate, compiled",
    "prompt": 2_000,
    "rows": 16,
    "tokens": 64,
    "churn": False,
    "floor_ms": 3.4,
    "ms_per_step": 5.1,
    "first_tokens_s": 0.08,
    "total_s": 0.43,
    "tokens_per_s": 2_400.0,
    "peak_above_weights_gb": 0.5,
}


ENVIRONMENT = {
    "gpu": "NVIDIA H200",
    "gpu_driver": "1",
    "torch": "2",
    "triton": "3",
    "transformers": "5",
    "commit": "abc",
}
GENERATION = {
    "environment": ENVIRONMENT,
    "linear_read_tb_s": 4.6,
    "rows": [
        *(
            GENERATION_ROW | {"prompt": prompt, "rows": rows}
            for prompt, rows in generate_tables.README_WORKLOADS
        ),
        GENERATION_ROW | {"method": "stock generate, DynamicCache", "left_out": "time"},
        {"shape": "32B", "left_out": "66 GB of weights on a card of 40"},
    ],
}


def test_the_generation_tables_show_ratios_and_what_was_not_run() -> None:
    text = generate_tables.docs_text([GENERATION])
    assert "| 8B | 16 × 2,000 | 64 | tree_generate, compiled | **5.10** | 1.50 | 0.08 |" in text
    assert "stock generate, DynamicCache | not run: no time left |" in text
    assert "| 32B | not run: 66 GB of weights on a card of 40 |" in text
    short = report.results_text(None, None, None, GENERATION)
    assert "| 16 branches of 2,000 tokens | 3.4 | not run | 5.1 | not run | not run |" in short
    assert "| 32 branches of 32,768 tokens | 3.4 | not run | 5.1 | not run | not run |" in short


def test_cards_stay_apart_and_the_one_measured_last_is_in_readme(tmp_path: Path) -> None:
    static = {"method": "stock generate, static cache, compiled", "ms_per_step": 18.4}
    batching = {"method": "continuous batching, graphs", "ms_per_step": 30.6}
    other = GENERATION | {
        "environment": ENVIRONMENT | {"gpu": "NVIDIA H100 80GB HBM3"},
        "measured": "2026-11-25T10:00+00:00",
        "linear_read_tb_s": 3.0,
        "rows": [
            GENERATION_ROW | {"floor_ms": 5.5, "ms_per_step": 7.0},
            GENERATION_ROW | static,
            GENERATION_ROW | batching | {"attention": "paged|sdpa"},
        ],
    }
    for name, result in (("h200", GENERATION), ("h100", other)):
        path = tmp_path / f"generate_{name}.json"
        path.write_text(json.dumps(result), encoding="utf-8")
    cards = report.load_cards(tmp_path)
    assert len(cards) == 2
    text = generate_tables.docs_text(cards)
    h100, h200 = text.split("### NVIDIA H200")
    assert h100.startswith("### NVIDIA H100 80GB HBM3")
    assert "**7.00** | 1.27 |" in h100 and "**5.10** | 1.50 |" in h200
    assert "`paged|sdpa`" in h100 and "4.60 TB/s" not in h100
    lines = generate_tables.readme_lines(generate_tables.newest(cards))
    assert lines[0].endswith("DynamicCache | best of transformers' other ways |")
    assert "NVIDIA H100 80GB HBM3" in lines[0]
    first = "| 16 branches of 2,000 tokens | 5.5 | not run | 7.0 | not run | not run "
    assert lines[2:] == [f"{first}| 18.4, static cache, compiled |"]


def test_the_generation_page_shows_profiles_prefill_padding_and_capacity() -> None:
    profile = {"step": 5.2, "graph": 5.0, "host": 1.9, "forward": 0.5, "waiting": 3.3}
    result = GENERATION | {
        "rows": [GENERATION_ROW | {"profile": profile}],
        "prefill": [
            {"prompt": 2000, "chunk": None, "how": "the model alone", "seconds": 0.05,
             "peak_above_weights_gb": 0.6},
            {"prompt": 2000, "chunk": None, "how": "TreeCache, 64 branches", "seconds": 0.06,
             "peak_above_weights_gb": 0.5},
            {"prompt": 2000, "chunk": 512, "how": "TreeCache, 64 branches",
             "left_out": "no | room"},
        ],
        "different_prompts": [
            {"how": "TreeCache", "ms_per_step": 9.5, "first_tokens_s": 0.3, "total_s": 0.6,
             "peak_above_weights_gb": 2.5, "stored": 10_848, "expected": 10_845,
             "dense_reads": {"a mask": 3}},
            {"how": "DynamicCache", "left_out": "OutOfMemoryError: none"},
        ],
        "largest": {"prompt": 32_768, "tokens": 8, "tree_rows": 4_096, "too_many": 6_144,
                    "dense_rows": 13, "tries": [{"rows": 6_144, "usable_after": "it broke"}]},
    }  # fmt: skip
    text = generate_tables.docs_text([result])
    assert "| tree_generate, compiled | 5.20 | 5.00 | 1.90 | 0.50 | 3.30 |" in text
    assert "| 2,000 | – | TreeCache, 64 branches | 0.060 | 1.20 | 0.50 |" in text
    assert "| 2,000 | 512 | TreeCache, 64 branches | not run: no / room |" in text
    assert "10,848, 3 of them padding, **dense reads: {'a mask': 3}** |" in text
    assert "| DynamicCache | not run: OutOfMemoryError: none |" in text
    prose = " ".join(text.split())
    assert "4,096 (6,144 do not fit; **a cache was broken after it**). Dense rows: 13." in prose


def test_the_kernel_tables_show_targets_losses_and_failures() -> None:
    text = kernel_tables.docs_text(KERNEL)
    (main,) = (line for line in text.splitlines() if line.startswith("| W1_64 | 32 | 75 / 591"))
    assert "| **28.8** (28.7 to 29.0) | 1.38 | 30 | **26 missed** | 27.5 |" in main
    assert "24.0 (**we lose: 1.20 × longer**), other" in main
    assert "| W1_64 | 32 | **28.8** | 24.0 | – |" in text
    assert "absent (absent 2.0). Not run: W1_64 with 32 heads: does not / import." in text
    assert "**Failed:** W3, odd: no room." in text
    assert "| W3, odd | **failed** |" in text
    short = report.results_text(None, None, KERNEL)
    assert "| 2,000 shared, 64 × 256 tokens | 20.8 | 28.8 | 24.0 (**we lose" in short


def test_the_roofline_is_told_from_one_of_other_results(tmp_path: Path) -> None:
    picture = tmp_path / "docs" / "figures" / "roofline.svg"
    results = tmp_path / "benchmarks" / "results" / "kernel.json"
    for file in (picture, results):
        file.parent.mkdir(parents=True)
    results.write_text(json.dumps(KERNEL), encoding="utf-8")
    for page in (tmp_path / "README.md", tmp_path / "docs" / "benchmarks.md"):
        page.write_text(f"{report.BEGIN}\n{report.END}\n", encoding="utf-8")
    root = ["--root", str(tmp_path)]
    assert report.main(root) == 0
    assert report.main([*root, "--check"]) == 1
    picture.write_text(f"<!-- {kernel_tables.roofline_digest(KERNEL)} -->", encoding="utf-8")
    assert report.main([*root, "--check"]) == 0
    slower = KERNEL_ROW | {"us": {"median": 29.8, "p20": 28.7, "p80": 29.0}}
    results.write_text(json.dumps(KERNEL | {"rows": [slower]}), encoding="utf-8")
    assert report.main(root) == 0
    assert report.main([*root, "--check"]) == 1


def test_report_writes_then_agrees_and_notices_an_edit(tmp_path: Path) -> None:
    readme, docs = tmp_path / "README.md", tmp_path / "docs" / "benchmarks.md"
    docs.parent.mkdir()
    for page in (readme, docs):
        page.write_text(f"above\n{report.BEGIN}\n{report.END}\nbelow\n", encoding="utf-8")
    root = ["--root", str(tmp_path)]
    assert report.main([*root, "--check"]) == 1
    assert report.main(root) == 0
    assert report.main([*root, "--check"]) == 0
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("above\n") and text.endswith("\nbelow\n")
    assert "No results yet" in text and "No results yet" in docs.read_text(encoding="utf-8")
    readme.write_text(text.replace("yet", "at all"), encoding="utf-8")
    assert report.main([*root, "--check"]) == 1
    readme.write_text("no markers", encoding="utf-8")
    with pytest.raises(SystemExit, match="markers"):
        report.main(root)


def test_architecture_lists_every_module_on_its_floor() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| `([\w/]+)` \|", text, flags=re.MULTILINE)
    drawn = {module.replace("/", "."): int(floor) for floor, module in rows}
    modules = modules_of(ROOT / "hf_tree_cache")
    assert drawn == {module: FLOORS[module] for module in modules}
