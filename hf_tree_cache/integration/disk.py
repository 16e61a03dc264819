"""Caches on disk: safetensors for K/V, JSON in its metadata for the tree. Nothing is unpickled."""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PretrainedConfig

from ..errors import IntegrityError, InvalidArgument, UnsupportedModel
from .cache import TreeCache
from .layers import OtherLayers, PagedLayer

FORMAT = "hf_tree_cache"
VERSION = 2
READABLE = ("1", "2")
"""Version 1 knows no layers that keep only some of the blocks."""


def save_cache(cache: TreeCache, path: str | os.PathLike[str]) -> None:
    """Write all branches of ``cache``, rows and held, each shared block once.

    Args:
        path: of a ``.safetensors`` file; replaced if it exists.

    Raises:
        InvalidArgument: nothing is stored.
        UnsupportedModel: the model keeps states beside its K/V.
    """
    layers = {i: x for i, x in enumerate(cache.layers) if isinstance(x, PagedLayer)}
    if not cache.tree.branches or not all(layer.storage for layer in layers.values()):
        raise InvalidArgument("save_cache: this cache holds nothing yet; run a prompt first.")
    if len(layers) < len(cache.layers) or OtherLayers(cache.layers).has_state:
        raise UnsupportedModel("save_cache: only caches that hold nothing but K/V can be saved.")
    state = cache.tree.to_state()
    blocks = sorted({block for *_, owned in state["nodes"] for block in owned})
    number = {block: i for i, block in enumerate(blocks)}
    written = torch.zeros(len(blocks), dtype=torch.int64)
    for node in state["nodes"]:
        _, start, end, owned = node
        node[3] = [number[block] for block in owned]
        for i, block in enumerate(node[3], start // cache.block_size):
            inside = min(end - i * cache.block_size, cache.block_size)
            written[block] = max(int(written[block]), inside)
    # What lies behind the last token of a block is not ours to write to a file.
    blank = (torch.arange(cache.block_size) >= written[:, None])[:, :, None, None]
    tensors = {}
    for i, layer in layers.items():
        assert layer.storage is not None
        device = layer.storage.spec.device
        kept = [i for i, block in enumerate(blocks) if layer.storage.keeps(block)]
        if len(kept) < len(blocks):
            tensors[f"layers.{i}.blocks"] = torch.tensor(kept)
        index = layer.storage.index_blocks([blocks[i] for i in kept])
        pair = layer.storage.gather_blocks(layer.position, index)
        hidden = blank[kept].to(device)
        for name, part in zip(("keys", "values"), pair, strict=True):
            tensors[f"layers.{i}.{name}"] = part.masked_fill(hidden, 0).contiguous()
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "block_size": str(cache.block_size),
        "columns": str(cache.get_seq_length()),
        "num_layers": str(len(cache.layers)),
        "tree": json.dumps(state),
    }
    save_file(tensors, os.fspath(path), metadata)


def load_cache(
    path: str | os.PathLike[str],
    config: PretrainedConfig,
    *,
    device: torch.device | str = "cpu",
    **options: Any,
) -> TreeCache:
    """Read what :func:`save_cache` wrote: same rows, same branch ids, same sharing.

    Args:
        config: of the model that the cache was made with.
        device: where its K/V go.
        options: further arguments of :class:`TreeCache`, such as ``max_memory``.

    Raises:
        InvalidArgument: not such a file, a damaged one, or one of another model.
    """
    try:
        with safe_open(os.fspath(path), framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT or metadata.get("version") not in READABLE:
                raise InvalidArgument(
                    f"load_cache({os.fspath(path)!r}): not a cache of version {VERSION}, but "
                    f"{metadata.get('format', 'something else')!r} "
                    f"version {metadata.get('version')!r}."
                )
            cache = TreeCache(config, block_size=int(metadata["block_size"]), **options)
            if int(metadata["num_layers"]) != len(cache.layers):
                raise InvalidArgument(
                    f"load_cache: the file has {metadata['num_layers']} layers, the config "
                    f"{len(cache.layers)}: give the config of the model that made it."
                )
            names = set(file.keys())
            kv = {}
            for i in range(len(cache.layers)):
                keys, values = (file.get_tensor(f"layers.{i}.{x}") for x in ("keys", "values"))
                partly = f"layers.{i}.blocks" in names
                blocks = file.get_tensor(f"layers.{i}.blocks").tolist() if partly else None
                kv[i] = blocks, keys, values
            cache.restore(json.loads(metadata["tree"]), int(metadata["columns"]), kv)
    except (SafetensorError, KeyError, ValueError, IntegrityError) as error:
        if isinstance(error, InvalidArgument):
            raise
        raise InvalidArgument(f"load_cache({os.fspath(path)!r}): damaged: {error}") from error
    return cache
