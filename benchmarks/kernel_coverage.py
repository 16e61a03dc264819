"""What of transformers' models decode steps compute by kernels of ours, and whether rightly.

Every architecture of docs/models.md whose decode steps can be captured is made tiny, in float16,
and runs one token of three rows in Triton's interpreter: as it is, and with the kernels around
attention. Both are compared with float32. ``make models`` runs it; its results are a column of
docs/models.md. Last line: one JSON object.

    TRITON_INTERPRET=1 python benchmarks/kernel_coverage.py [--only llama gemma3_text] [--save]
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import model_coverage as coverage
import torch
from interpreter import quicken
from transformers import PreTrainedModel

from hf_tree_cache import enable_tree_attention
from hf_tree_cache.env import environment
from hf_tree_cache.integration.attention import NAME
from hf_tree_cache.integration.substitutes import Substitutes

TOKENS, POSITIONS = [7, 11, 23], [5, 9, 2]
FURTHER = 1.3
"""What our error may be of the model's own: both are mostly the rounding of float16."""

LEAST_ERROR = 2e-3


@torch.no_grad()
def evaluate(name: str, verdict: str, mechanism: list[str]) -> dict[str, Any] | None:
    """Kinds of kernels, relative errors of the logits, and whether ours is about theirs.

    None where decode steps are not captured, or where the model itself does not run, as some do
    not in older versions of transformers.
    """
    if verdict != "fast" or "latents" in mechanism:
        return None
    try:
        model, wide = (coverage.build(name) for _ in range(2))
        model.half()
        wide.load_state_dict(model.state_dict())
        exact = _logits(wide)
        theirs = _error(_logits(model), exact)
    except Exception as error:
        print(f"{name} does not run: {type(error).__name__}: {error}", file=sys.stderr)
        return None
    with enable_tree_attention(wide, cuda_graphs=False):
        if wide.config.get_text_config(decoder=True)._attn_implementation != NAME:
            return None  # it has an attention of its own
    substitutes = Substitutes(model)
    substitutes.find()
    with substitutes.switched():
        ours = _error(_logits(model), exact)
    right = ours < FURTHER * theirs + LEAST_ERROR
    return {
        "name": name,
        "kernels": substitutes.names,
        "theirs": theirs,
        "ours": ours,
        "right": right,
    }


def _logits(model: PreTrainedModel) -> torch.Tensor:
    arguments = {"input_ids": torch.tensor(TOKENS)[:, None]}
    if "position_ids" in inspect.signature(model.forward).parameters:
        arguments["position_ids"] = torch.tensor(POSITIONS)[:, None]
    logits: torch.Tensor = model(**arguments, use_cache=False).logits
    return logits.float()


def _error(logits: torch.Tensor, exact: torch.Tensor) -> float:
    return float((logits - exact).norm() / exact.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", help="architectures")
    parser.add_argument(
        "--save", action="store_true", help=f"write {coverage.KERNELS.name} and the page"
    )
    options = parser.parse_args()
    coverage.quiet()
    quicken()
    torch.set_num_threads(1)
    report = json.loads(coverage.RESULTS.read_text(encoding="utf-8"))
    results = []
    for recorded in report["results"]:
        name = recorded["name"]
        if name not in (options.only or coverage.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
            continue
        result = evaluate(name, recorded["verdict"], recorded["mechanism"])
        print(result, file=sys.stderr, flush=True)
        if result is not None:
            results.append(result)
    done = {"environment": environment(), "results": results}
    if options.save:
        coverage.KERNELS.write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")
        coverage.PAGE.write_text(coverage.page(report, done), encoding="utf-8")
    print(json.dumps(done))


if __name__ == "__main__":
    main()
