from __future__ import annotations

import os
from typing import Any

# Read when huggingface_hub is imported, so it comes first: no test waits for a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

# What helpers assert is shown as what tests do.
pytest.register_assert_rewrite("forward_errors", "work_lists")

# Workers side by side share the cores; tiny models are faster on one thread anyway.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def smollm2() -> tuple[Any, Any]:
    """Real weights as `(model, tokenizer)`, shared by the session: leave them as you found them."""
    from weights import load_smollm2

    return load_smollm2()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    no_gpu = pytest.mark.skip(reason="needs a CUDA device; run make test-gpu on a machine with one")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(no_gpu)
