"""A puzzle with checkable steps, and small models trained on it: one that solves, one that judges.

They are weak enough that a single sample often fails, and strong enough that a search succeeds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent


def load_model() -> tuple[Any, Any]:
    """Returns `(model, tokenizer)`: writes the steps behind `Puzzle.prompt`; float32, eval mode."""
    from transformers import AutoModelForCausalLM

    return _load(AutoModelForCausalLM, FOLDER)


def load_verifier() -> tuple[Any, Any]:
    """Returns `(model, tokenizer)`: one logit, behind the end of a step, for whether the target can
    still be reached.
    """
    from transformers import AutoModelForSequenceClassification

    return _load(AutoModelForSequenceClassification, FOLDER / "verifier")


def _load(kind: Any, folder: Path) -> tuple[Any, Any]:
    import torch
    from transformers import AutoTokenizer

    model = kind.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(FOLDER)
