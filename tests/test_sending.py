"""Numbers go to the device without waiting for what it is at."""

from __future__ import annotations

import ast
import warnings
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch

import hf_tree_cache
from hf_tree_cache import TreeCache
from hf_tree_cache.sending import send, to_device

PACKAGE = Path(hf_tree_cache.__file__).parent


def waiting_calls(source: str) -> list[int]:
    """Lines that make a tensor on a device from numbers of the host."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "torch.tensor"
        and any(keyword.arg == "device" for keyword in node.keywords)
    ]


def test_no_module_sends_numbers_in_a_way_that_waits():
    assert waiting_calls("x = 1\ny = torch.tensor([x], device=device)") == [2]
    found = {
        str(path.relative_to(PACKAGE)): lines
        for path in sorted(PACKAGE.rglob("*.py"))
        if (lines := waiting_calls(path.read_text(encoding="utf-8")))
    }
    assert not found, f"use hf_tree_cache.sending.to_device: {found}"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_what_is_sent_arrives(device):
    where = torch.device(device)
    assert to_device([], where).dtype == torch.int64
    assert to_device([(1, 2), (3, 4)], where).tolist() == [[1, 2], [3, 4]]
    assert to_device([True, False], where, torch.bool).tolist() == [True, False]
    rows = torch.arange(3)[:, None].expand(3, 2)
    assert send(rows, where).tolist() == rows.tolist()
    assert send(rows.T[1:], where).device.type == device


@contextmanager
def no_waiting():
    """Every wait for the GPU raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls this mode a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_fork_does_not_wait_for_the_device(device):
    prompt = torch.randn(1, 2, 7, 8, device=device)
    cache = TreeCache(block_size=4)
    cache.update(prompt, -prompt, 0)
    new = torch.randn(3, 2, 1, 8, device=device)
    with no_waiting() if device == "cuda" else nullcontext():
        cache.select([0, 0, 0])
        keys, values = cache.update(new, -new, 0)  # the last block is copied, new tokens stored
    cache.check_integrity()
    assert cache.tree.num_copies == 2
    expected = torch.cat([prompt.expand(3, -1, -1, -1), new], 2)
    assert torch.equal(keys + 0, expected) and torch.equal(values + 0, -expected)
