"""What a :class:`~.record.GenerationTree` is written as: dicts for JSON, networkx, flat lists."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import InvalidArgument
from .node import STATES, GenerationNode
from .view_text import shorten

_FORMAT = "hf_tree_cache.generation_tree"
_VERSION = 1
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def encode(nodes: Sequence[GenerationNode]) -> dict[str, Any]:
    """All nodes as dicts, lists, numbers and strings."""
    return {
        "format": _FORMAT,
        "version": _VERSION,
        "nodes": [
            {
                "id": node.id,
                "parent": node.parent,
                "prompt": node.prompt,
                "tokens": list(node.tokens),
                "logprobs": [x if math.isfinite(x) else str(float(x)) for x in node.logprobs],
                "state": node.state,
                "reason": node.reason,
                "start": node.start,
                "children": list(node.children),
            }
            for node in nodes
        ],
    }


def decode(data: Any) -> list[GenerationNode]:
    """The nodes of untrusted data as :func:`encode` wrote it, which need not form a tree.

    Raises:
        InvalidArgument: another format or version, or what is no node.
    """
    found = data if isinstance(data, Mapping) else {}
    if found.get("format") != _FORMAT or found.get("version") != _VERSION:
        raise InvalidArgument(
            "GenerationTree.from_dict: expected a mapping with "
            f"format={_FORMAT!r} and version={_VERSION}, found {type(data).__name__} with "
            f"format={found.get('format')!r} and version={found.get('version')!r}. Pass what "
            "to_dict or to_json of this version of hf_tree_cache wrote."
        )
    nodes = found.get("nodes")
    if not isinstance(nodes, list):
        raise InvalidArgument(
            f"GenerationTree.from_dict: 'nodes' is {type(nodes).__name__}, expected a list of "
            "nodes as written by to_dict."
        )
    return [_parse_node(i, entry) for i, entry in enumerate(nodes)]


def as_networkx(nodes: Sequence[GenerationNode], order: Sequence[int]) -> Any:
    """See :meth:`~.record.GenerationTree.to_networkx`; ``order`` is depth-first."""
    try:
        import networkx
    except ImportError as error:
        raise ImportError(
            "GenerationTree.to_networkx() builds a networkx.DiGraph, and networkx cannot be "
            "imported. Run `pip install networkx`, or use to_dict() or to_arrays(), which "
            "need no other package."
        ) from error
    graph = networkx.DiGraph()
    for i in order:
        node = nodes[i]
        graph.add_node(
            i,
            prompt=node.prompt,
            tokens=list(node.tokens),
            logprobs=list(node.logprobs),
            state=node.state,
            reason=node.reason,
            start=node.start,
            is_prompt=node.is_prompt,
        )
        if node.parent is not None:
            graph.add_edge(node.parent, i)
    return graph


def as_arrays(
    nodes: Sequence[GenerationNode], order: Sequence[int]
) -> dict[str, list[int] | list[float]]:
    """See :meth:`~.record.GenerationTree.to_arrays`; ``order`` is depth-first."""
    first: dict[int, int] = {}
    total = 0
    for i in order:
        first[i] = total
        total += len(nodes[i].tokens)
    subtree_end: dict[int, int] = {}
    last: dict[int, int] = {}
    token: list[int] = []
    parent: list[int] = []
    exit_: list[int] = []
    position: list[int] = []
    logprob: list[float] = []
    owner: list[int] = []
    is_prompt: list[int] = []
    for i in reversed(order):
        node = nodes[i]
        below = node.children[-1] if node.children else None
        subtree_end[i] = first[i] + len(node.tokens) if below is None else subtree_end[below]
    for i in order:
        node = nodes[i]
        length = len(node.tokens)
        before = -1 if node.parent is None else last[node.parent]
        last[i] = first[i] + length - 1 if length else before
        token.extend(node.tokens)
        parent.extend([before, *range(first[i], first[i] + length - 1)][:length])
        exit_.extend([subtree_end[i]] * length)
        position.extend(range(node.start, node.end))
        logprob.extend([math.nan] * length if node.is_prompt else node.logprobs)
        owner.extend([i] * length)
        is_prompt.extend([node.is_prompt] * length)
    return {
        "token": token,
        "parent": parent,
        "enter": list(range(total)),
        "exit": exit_,
        "position": position,
        "logprob": logprob,
        "node": owner,
        "is_prompt": is_prompt,
    }


def _parse_node(index: int, entry: Any) -> GenerationNode:
    """Build a node from untrusted data, checking types only."""
    found = entry if isinstance(entry, Mapping) else {}
    reason = found.get("reason")
    logprobs = found.get("logprobs")
    checks = {
        "id": _is_int(found.get("id")),
        "parent": found.get("parent", "") is None or _is_int(found.get("parent")),
        "prompt": _is_int(found.get("prompt")),
        "tokens": _is_int_list(found.get("tokens")),
        "logprobs": isinstance(logprobs, list) and all(map(_is_logprob, logprobs)),
        "state": isinstance(found.get("state"), str) and found["state"] in STATES,
        "reason": reason is None or isinstance(reason, str),
        "start": _is_int(found.get("start")),
        "children": _is_int_list(found.get("children")),
    }
    wrong = [name for name, valid in checks.items() if not valid]
    if wrong:
        value = shorten(repr(found.get(wrong[0])), 60)
        raise InvalidArgument(
            f"GenerationTree.from_dict: node {index} has missing or malformed fields "
            f"{', '.join(wrong)} ({wrong[0]} is {value}). Pass data as to_dict wrote it."
        )
    return GenerationNode(
        id=found["id"],
        parent=found["parent"],
        prompt=found["prompt"],
        tokens=list(found["tokens"]),
        logprobs=[_NON_FINITE[x] if isinstance(x, str) else float(x) for x in found["logprobs"]],
        state=found["state"],
        reason=reason,
        start=found["start"],
        children=list(found["children"]),
    )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_int_list(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_int, value))


def _is_logprob(value: Any) -> bool:
    if isinstance(value, str):
        return value in _NON_FINITE
    # An int beyond a float's range would overflow when it is converted.
    return isinstance(value, float) or (_is_int(value) and abs(value) < 1e300)
