"""Caches on disk: the same rows, branches, sharing and answers; damaged files are refused."""

from __future__ import annotations

import json

import pytest
import torch
from models import build, model, prompts
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_tree_cache import (
    InvalidArgument,
    TreeCache,
    UnsupportedModel,
    enable_tree_attention,
    load_cache,
    save_cache,
)


@pytest.fixture
def saved(tmp_path):
    llama, inputs = model("llama"), prompts(num_rows=2)
    cache = TreeCache(block_size=4, poison=True)
    with enable_tree_attention(llama), torch.no_grad():
        llama(**inputs, past_key_values=cache)
        cache.select([0, 0, 1])
        step = torch.tensor([[5], [6], [7]])
        mask = torch.cat([inputs["attention_mask"][[0, 0, 1]], torch.ones(3, 1).long()], 1)
        llama(step, attention_mask=mask, past_key_values=cache)
        cache.fork(cache.rows[1], at=-7)
    path = tmp_path / "cache.safetensors"
    save_cache(cache, path)
    return llama, cache, mask, path


def test_a_loaded_cache_goes_on_as_the_saved_one(saved):
    llama, cache, mask, path = saved
    again = load_cache(path, llama.config, poison=True)
    again.check_integrity()
    assert again.rows == cache.rows and again.tree.held == cache.tree.held
    assert again.stats().blocks == cache.stats().blocks
    for ours, theirs in zip(again.layers, cache.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)
    mask = torch.cat([mask, torch.ones(3, 1).long()], 1)
    with enable_tree_attention(llama), torch.no_grad():
        both = [
            llama(torch.tensor([[8], [9], [10]]), attention_mask=mask, past_key_values=c).logits
            for c in (cache, again)
        ]
    assert (both[0] - both[1]).abs().max() < 1e-6
    again.set_rows(again.tree.held)
    assert again.get_seq_length() == cache.tree.length(cache.tree.held[0])


def test_a_shared_block_is_written_once_and_free_slots_are_blank(saved):
    _, cache, _, path = saved
    tensors = load_file(path)
    assert tensors["layers.0.keys"].shape[0] == cache.stats().blocks
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_files_that_do_not_fit_are_refused(saved, tmp_path):
    llama, _, _, path = saved
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()

    def refused(match, tensors=tensors, config=llama.config, **changes):
        other = tmp_path / "other.safetensors"
        save_file(tensors, other, metadata | changes)
        with pytest.raises(InvalidArgument, match=match):
            load_cache(other, config)

    refused("version 2", version="9")
    refused("version 2", format="pickle")
    refused("3 layers", config=build("llama", num_hidden_layers=4).config, num_layers="3")
    refused("damaged", tensors={k: v for k, v in tensors.items() if k != "layers.1.keys"})
    refused("blocks", tensors=tensors | {"layers.1.keys": tensors["layers.1.keys"][:2].clone()})
    tree = json.loads(metadata["tree"])
    tree["nodes"][0][2] += 9
    refused("no tree", tree=json.dumps(tree))
    refused("damaged", tree="{")
    refused("damaged", columns="3")
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(InvalidArgument, match="damaged"):
        load_cache(path, llama.config)


def test_what_cannot_be_saved_says_so(tmp_path):
    with pytest.raises(InvalidArgument, match="nothing yet"):
        save_cache(TreeCache(), tmp_path / "x")
    hybrid = model("qwen3_next")
    cache = TreeCache(hybrid.config)
    with enable_tree_attention(hybrid), torch.no_grad():
        hybrid(**prompts(), past_key_values=cache)
    with pytest.raises(UnsupportedModel, match="nothing but K/V"):
        save_cache(cache, tmp_path / "x")
