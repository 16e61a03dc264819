"""The notebooks in examples/ run from top to bottom, and are committed with what they showed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from weights import smollm2_path

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(path.name for path in (ROOT / "examples").glob("*.ipynb"))
SMALLER = {
    "search.ipynb": {
        "puzzles = held_out_puzzles(20, 4)": "puzzles = held_out_puzzles(3, 4)",
        "simulations=32": "simulations=6",
    },
    "self_consistency.ipynb": {
        '"max_new_tokens": 24': '"max_new_tokens": 10',
        "num_branches=12": "num_branches=6",
    },
}
"""What is written otherwise where a notebook runs small, as it does but among the slow tests."""


def read(name: str) -> Any:
    return nbformat.read(ROOT / "examples" / name, as_version=4)


def shown(book: Any) -> list[list[str]]:
    """For each code cell, the kinds of what it shows.

    What installed packages say on stderr is theirs; how often a stream is flushed is chance.
    """
    kinds = []
    for cell in book.cells:
        if cell.cell_type == "code":
            outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
            names = [
                "text/html" if "text/html" in o.get("data", {}) else o.output_type for o in outputs
            ]
            kinds.append(
                [
                    name
                    for i, name in enumerate(names)
                    if name != "stream" or names[:i][-1:] != [name]
                ]
            )
    return kinds


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize(
    ("name", "small"),
    [
        *(pytest.param(name, True, id=f"{name}, smaller") for name in SMALLER),
        *(
            pytest.param(name, False, id=name, marks=[pytest.mark.slow] if name in SMALLER else [])
            for name in NOTEBOOKS
        ),
    ],
)
def test_a_notebook_runs_and_shows_what_is_committed(
    name: str, small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    smollm2_path()
    # The kernel is another process, and imports this checkout.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("PYTHONWARNINGS", "ignore:IProgress not found")
    book = read(name)
    committed = shown(book)
    if small:
        for full, fewer in SMALLER[name].items():
            cells = [cell for cell in book.cells if full in cell.source]
            assert cells, full
            for cell in cells:
                cell.source = cell.source.replace(full, fewer)
    where = {"metadata": {"path": ROOT / "examples"}}
    client = nbclient.NotebookClient(book, timeout=240, kernel_name="python3", resources=where)
    client.execute()
    assert shown(book) == committed


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_committed_outputs_are_fit_to_be_read(name: str) -> None:
    book = read(name)
    assert any("text/html" in kinds for kinds in shown(book))
    for cell in book.cells:
        for output in cell.get("outputs", []):
            assert output.output_type != "error"
            assert output.get("name") != "stderr", output.text
    assert (ROOT / "examples" / name).stat().st_size < 400_000
