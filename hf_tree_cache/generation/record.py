"""What happened during a branching generation, as plain data.

A node is a run of tokens that the same branches share; a branch is the path from a root
to a leaf. With one prompt of three tokens, a fork at position 5 and a backtrack
(`fork_at`) to position 7, the record reads:

    id  parent  start  tokens       state
    0   None    0      [11 12 13]   forked     the prompt
    1   0       3      [21 22]      forked
    2   4       7      [33 34]      finished   the tail of a split node keeps its id
    3   1       5      [41]         pruned
    4   1       5      [31 32]      forked     the head of the split node is new
    5   4       7      [51]         alive      the alternative, opened at position 7

Node 2 is the branch 11 12 13 21 22 31 32 33 34, found through 4, 1 and 0.
Log-probs stand beside generated tokens only; a prompt's tokens have none.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import InvalidArgument
from . import formats, view_html, view_text
from .node import STATES, GenerationNode, NodeState
from .view_parts import Decoder


class GenerationTree:
    """Every branch of one generation: tokens, log-probs, how each branch ended and why.

    Attributes:
        nodes: All nodes; a node's id is its index. Read them, change them through the methods.
        tokenizer: Anything with `decode(list of ids)`, used by the views when they are
            given none. Never serialised.
    """

    def __init__(self, tokenizer: Decoder | None = None) -> None:
        self.nodes: list[GenerationNode] = []
        self.tokenizer = tokenizer
        self._roots: list[int] = []

    def add_prompt(self, tokens: Sequence[int]) -> int:
        """Add a root that holds a prompt, closed as "forked"; `open_branch` starts from it.

        Args:
            tokens: Token ids; may be empty (a generation from embeddings).

        Returns:
            The id of the new node.
        """
        node = self._new_node(None, len(self._roots), 0)
        node.tokens = list(tokens)
        node.state = "forked"
        self._roots.append(node.id)
        return node.id

    def open_branch(self, parent: int) -> int:
        """Open a branch at the end of a forked node (a prompt is one).

        Before: `parent` is "forked". After: it has one more child, alive and without tokens.

        Returns:
            The id of the new child.

        Raises:
            InvalidArgument: No such node, or it is not forked.
        """
        node = self._get(parent, "open_branch")
        if node.state != "forked":
            remedy = (
                f"Call fork({parent}, count) to branch it where it stands."
                if node.state == "alive"
                else f"Call fork_at({parent}, {node.end}) to continue behind its last token."
            )
            raise InvalidArgument(
                f"GenerationTree.open_branch(parent={parent}): node {parent} is {node.state}, and "
                f"only a forked node (a prompt is one) takes another child. {remedy}"
            )
        return self._new_child(node).id

    def append(self, node: int, token: int, logprob: float) -> None:
        """Add a token to an alive node, in O(1).

        Raises:
            InvalidArgument: No such node, or it is not alive.
        """
        if 0 <= node < len(self.nodes):
            grown = self.nodes[node]
            if grown.state == "alive":
                grown.tokens.append(token)
                grown.logprobs.append(logprob)
                return
        raise self._not_alive(node, "append")

    def fork(self, node: int, count: int, reason: str | None = None) -> list[int]:
        """Continue an alive node in `count` branches.

        After: the node is "forked" and has `count` new alive children. A node that has no
        tokens yet stays alive instead and gets `count - 1` siblings, so that branches that
        part at one position are children of one node, however many forks it took.

        Args:
            node: An alive node.
            count: How many branches continue it, at least 1.
            reason: Why; kept on the node that was forked.

        Returns:
            Ids of `count` alive nodes; the first is the continuing branch.

        Raises:
            InvalidArgument: No such node, it is not alive, or `count` is below 1.
        """
        forked = self._get_alive(node, "fork")
        if count < 1:
            raise InvalidArgument(
                f"GenerationTree.fork(node={node}, count={count}): a fork leaves at least one "
                "branch. Pass count >= 1, or call prune(node, reason) to end the branch."
            )
        if forked.tokens:
            forked.state = "forked"
            forked.reason = reason
            return [self._new_child(forked).id for _ in range(count)]
        assert forked.parent is not None, "only prompts are roots, and a prompt is never alive"
        parent = self.nodes[forked.parent]
        if parent.reason is None:
            parent.reason = reason
        place = parent.children.index(node) + 1
        siblings = [
            self._new_node(parent.id, parent.prompt, parent.end).id for _ in range(count - 1)
        ]
        parent.children[place:place] = siblings
        return [node, *siblings]

    def fork_at(self, node: int, position: int, reason: str | None = None) -> int:
        """Open an alternative to a branch from an earlier position (backtrack).

        The node that holds `position` is split there: the tail keeps the id, the state and the
        children, the head gets a new id. So every leaf's id and tokens stay as they were. At
        the boundary of two nodes nothing is split.

        Args:
            node: Any node of the branch, open or closed.
            position: Where the alternative's first token will stand; the tokens before it are
                shared. From 1 to the node's end.
            reason: Why; kept on the node that ends at `position`.

        Returns:
            The id of the new alive leaf.

        Raises:
            InvalidArgument: No such node, or the position is not on its path.
        """
        last = self._get(node, "fork_at")
        above = last
        while position <= above.start and above.parent is not None:
            above = self.nodes[above.parent]
        first = 1 if self.nodes[self._roots[last.prompt]].tokens else 0
        if not first <= position <= last.end:
            raise InvalidArgument(
                f"GenerationTree.fork_at(node={node}, position={position}): the sequence that ends "
                f"with node {node} has {last.end} tokens, prompt included, so an alternative can "
                f"start at {first} to {last.end}. Count from the front; for another prompt call "
                "add_prompt."
            )
        if position < above.end or above.state != "forked":
            above = self._split(above, position)
        if above.reason is None:
            above.reason = reason
        return self._new_child(above).id

    def finish(self, node: int, reason: str | None = None) -> None:
        """Close an alive node as "finished".

        Raises:
            InvalidArgument: No such node, or it is not alive.
        """
        finished = self._get_alive(node, "finish")
        finished.state = "finished"
        finished.reason = reason

    def reopen(self, node: int) -> None:
        """Let a finished node go on: it is alive again, as if it had not finished.

        Raises:
            InvalidArgument: No such node, or it is not finished.
        """
        found = self._get(node, "reopen")
        if found.state != "finished":
            raise InvalidArgument(
                f"GenerationTree.reopen(node={node}): node {node} is {found.state}; only a "
                "finished one can go on."
            )
        found.state, found.reason = "alive", None

    def prune(self, node: int, reason: str | None = None) -> None:
        """Close a leaf as "pruned": one that is alive, or one that finished and was then dropped.

        Raises:
            InvalidArgument: No such node, or it is forked or pruned already.
        """
        pruned = self._get(node, "prune")
        if pruned.state not in ("alive", "finished"):
            raise self._not_alive(node, "prune")
        pruned.state = "pruned"
        pruned.reason = reason

    @property
    def roots(self) -> list[int]:
        """Ids of the root nodes, one a prompt, in the order of the prompts."""
        return list(self._roots)

    @property
    def num_branches(self) -> int:
        """How many leaves there are, whatever their state."""
        return sum(node.state != "forked" for node in self.nodes)

    @property
    def num_tokens(self) -> int:
        """Generated tokens, each shared one counted once."""
        return sum(len(node.logprobs) for node in self.nodes)

    @property
    def num_tokens_flat(self) -> int:
        """Generated tokens that the branches would hold as independent sequences."""
        generated = [0] * len(self.nodes)
        total = 0
        for i in self.walk():
            node = self.nodes[i]
            before = 0 if node.parent is None else generated[node.parent]
            generated[i] = before + len(node.logprobs)
            if node.state != "forked":
                total += generated[i]
        return total

    def leaves(self, state: NodeState | None = None) -> list[int]:
        """Ids of the branch ends in depth-first order, all of them or those in one state."""
        if state == "forked" or (state is not None and state not in STATES):
            raise InvalidArgument(
                f"GenerationTree.leaves(state={state!r}): a leaf is 'alive', 'finished' or "
                "'pruned'. Pass one of these, or None for all leaves."
            )
        wanted = ("alive", "finished", "pruned") if state is None else (state,)
        return [i for i in self.walk() if self.nodes[i].state in wanted]

    def children(self, node: int) -> list[int]:
        """Ids of the nodes that continue a node."""
        return list(self._get(node, "children").children)

    def path(self, node: int) -> list[int]:
        """Ids of the nodes from the root to a node, both included."""
        above: int | None = self._get(node, "path").id
        ids = []
        while above is not None:
            ids.append(above)
            above = self.nodes[above].parent
        ids.reverse()
        return ids

    def tokens(self, node: int, include_prompt: bool = True) -> list[int]:
        """Token ids of the sequence that ends with a node."""
        path = (self.nodes[i] for i in self.path(node))
        return [token for n in path if include_prompt or not n.is_prompt for token in n.tokens]

    def logprobs(self, node: int) -> list[float]:
        """Log-prob of each generated token of the sequence that ends with a node."""
        return [logprob for i in self.path(node) for logprob in self.nodes[i].logprobs]

    def logprob(self, node: int) -> float:
        """Log-prob of the generated sequence that ends with a node; 0.0 when nothing is."""
        return sum(self.logprobs(node))

    def mean_logprob(self, node: int) -> float:
        """Mean log-prob of a generated token up to a node; nan when nothing is generated."""
        logprobs = self.logprobs(node)
        return sum(logprobs) / len(logprobs) if logprobs else math.nan

    def walk(self) -> Iterator[int]:
        """Yield all node ids depth first, a node before its children."""
        pending = self._roots[::-1]
        while pending:
            node = pending.pop()
            yield node
            pending.extend(reversed(self.nodes[node].children))

    def of_prompt(self, prompt: int) -> tuple[GenerationTree, dict[int, int]]:
        """Copy what descends from one prompt; the time depends on that part alone.

        Returns:
            The copy, and its node ids by the ids here.

        Raises:
            InvalidArgument: No such prompt.
        """
        if not 0 <= prompt < len(self._roots):
            raise InvalidArgument(
                f"GenerationTree.of_prompt(prompt={prompt}): the tree has "
                f"{len(self._roots)} prompt(s). Give the index of one of them, from 0 on."
            )
        found = [self._roots[prompt]]
        for i in found:
            found.extend(self.nodes[i].children)
        place = {old: new for new, old in enumerate(sorted(found))}
        part = GenerationTree(self.tokenizer)
        part._roots.append(place[self._roots[prompt]])
        for node in map(self.nodes.__getitem__, place):
            part.nodes.append(
                replace(
                    node,
                    id=place[node.id],
                    parent=None if node.parent is None else place[node.parent],
                    prompt=0,
                    tokens=list(node.tokens),
                    logprobs=list(node.logprobs),
                    children=[place[child] for child in node.children],
                )
            )
        return part, place

    def check_integrity(self) -> None:
        """Assert that the nodes form one consistent tree per prompt."""
        fault = self._find_fault()
        assert fault is None, fault

    def to_dict(self) -> dict[str, Any]:
        """The whole record as dicts, lists, numbers and strings.

        Log-probs that are not finite, which JSON lacks, become "nan", "inf" or "-inf".
        """
        return formats.encode(self.nodes)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], tokenizer: Decoder | None = None) -> GenerationTree:
        """Rebuild a tree from `to_dict`.

        Raises:
            InvalidArgument: Another format or version, or nodes that are no tree.
        """
        tree = cls(tokenizer)
        tree.nodes = formats.decode(data)
        tree._roots = sorted(
            (node.id for node in tree.nodes if node.parent is None),
            key=lambda i: tree.nodes[i].prompt,
        )
        fault = tree._find_fault()
        if fault is not None:
            raise InvalidArgument(
                f"GenerationTree.from_dict: the nodes do not form a tree: {fault}. The data was "
                "changed or cut after to_dict wrote it; write it again."
            )
        return tree

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The whole record as JSON text, also written to a file when `path` is given."""
        text = json.dumps(self.to_dict(), allow_nan=False)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    @classmethod
    def from_json(
        cls, source: str | os.PathLike[str], tokenizer: Decoder | None = None
    ) -> GenerationTree:
        """Rebuild a tree from `to_json`.

        Args:
            source: JSON text (a string that starts with "{"), or the path of a file.
            tokenizer: Becomes the tree's tokenizer.

        Raises:
            InvalidArgument: No such file, no JSON, or not a record of this version.
        """
        try:
            if isinstance(source, str) and source.lstrip().startswith("{"):
                text = source
            else:
                text = Path(source).read_text(encoding="utf-8")
            data = json.loads(text)
        except (OSError, ValueError, RecursionError) as error:
            shown = view_text.shorten(repr(source), 60)
            raise InvalidArgument(
                f"GenerationTree.from_json({shown}): neither JSON text nor a readable JSON file "
                f"({type(error).__name__}: {view_text.shorten(str(error), 80)}). Pass what to_json "
                "returned, or the path that it wrote."
            ) from error
        return cls.from_dict(data, tokenizer)

    def to_networkx(self) -> Any:
        """The tree as a `networkx.DiGraph` from parent to child.

        Each graph node carries `prompt`, `tokens`, `logprobs`, `state`, `reason`, `start` and
        `is_prompt`.

        Raises:
            ImportError: networkx is not installed.
        """
        return formats.as_networkx(self.nodes, list(self.walk()))

    def to_arrays(self) -> dict[str, list[int] | list[float]]:
        """Every token once, in depth-first order, for trainers that compute on trees.

        Returns:
            Lists of one length, an entry a token: `token` (id), `parent` (index of the token
            before it, -1 for a first token), `enter` and `exit` (token i is j or stands before
            j in its sequence iff enter[i] <= enter[j] < exit[i]), `position` (in the sequence,
            prompt included), `logprob` (nan in a prompt), `node` (id) and `is_prompt` (bool).
        """
        return formats.as_arrays(self.nodes, list(self.walk()))

    def to_text(
        self, tokenizer: Decoder | None = None, max_width: int = 100, max_nodes: int = 200
    ) -> str:
        """Draw the tree for a terminal; see `view_text.render_text`."""
        chosen = self.tokenizer if tokenizer is None else tokenizer
        return view_text.render_text(self, chosen, max_width, max_nodes)

    def to_html(self, tokenizer: Decoder | None = None, max_nodes: int = 1000) -> str:
        """Draw the tree as self-contained HTML; see `view_html.render_html`."""
        chosen = self.tokenizer if tokenizer is None else tokenizer
        return view_html.render_html(self, chosen, max_nodes)

    def __str__(self) -> str:
        return self.to_text()

    def __repr__(self) -> str:
        return (
            f"GenerationTree(prompts={len(self._roots)}, branches={self.num_branches}, "
            f"tokens={self.num_tokens})"
        )

    def _repr_html_(self) -> str:
        return self.to_html()

    def _new_node(self, parent: int | None, prompt: int, start: int) -> GenerationNode:
        node = GenerationNode(len(self.nodes), parent, prompt, [], [], "alive", None, start)
        self.nodes.append(node)
        return node

    def _new_child(self, parent: GenerationNode) -> GenerationNode:
        child = self._new_node(parent.id, parent.prompt, parent.end)
        parent.children.append(child.id)
        return child

    def _split(self, tail: GenerationNode, position: int) -> GenerationNode:
        """Move the tokens before `position` into a new forked node above `tail`.

        Before: tail.start < position <= tail.end. After: the new head stands where the tail
        stood among its siblings, the tail is its only child; nobody's path reads differently.
        """
        cut = position - tail.start
        head = self._new_node(tail.parent, tail.prompt, tail.start)
        head.state = "forked"
        head.children = [tail.id]
        head.tokens, tail.tokens = tail.tokens[:cut], tail.tokens[cut:]
        head.logprobs, tail.logprobs = tail.logprobs[:cut], tail.logprobs[cut:]
        siblings = self._roots if tail.parent is None else self.nodes[tail.parent].children
        siblings[siblings.index(tail.id)] = head.id
        tail.parent = head.id
        tail.start = position
        return head

    def _get(self, node: int, call: str) -> GenerationNode:
        if not 0 <= node < len(self.nodes):
            raise InvalidArgument(
                f"GenerationTree.{call}: there is no node {node}; this tree has "
                f"{len(self.nodes)} nodes, numbered from 0. Pass an id that add_prompt, "
                "open_branch, fork or fork_at returned."
            )
        return self.nodes[node]

    def _get_alive(self, node: int, call: str) -> GenerationNode:
        found = self._get(node, call)
        if found.state != "alive":
            raise self._not_alive(node, call)
        return found

    def _not_alive(self, node: int, call: str) -> InvalidArgument:
        found = self._get(node, call)
        why = "" if found.reason is None else f" ({found.reason})"
        if found.state == "forked":
            below = view_text.shorten(", ".join(map(str, found.children)) or "none", 60)
            remedy = f"Its children carry on (ids: {below}); open_branch({node}) adds one."
        else:
            remedy = f"fork_at({node}, position) branches off from any of its tokens."
        return InvalidArgument(
            f"GenerationTree.{call}(node={node}): node {node} is {found.state}{why}, and a closed "
            f"node does not change any more. {remedy}"
        )

    def _find_fault(self) -> str | None:
        """Describe the first broken invariant, None when all hold."""
        if [self.nodes[i].prompt for i in self._roots] != list(range(len(self._roots))):
            return "the prompts are not numbered from 0, one root each"
        for i, node in enumerate(self.nodes):
            if node.id != i:
                return f"the node at index {i} has id {node.id}"
            fault = self._find_node_fault(node)
            if fault is not None:
                return f"node {i} {fault}"
        # Only its own parent lists a node, and once, so the walk ends.
        reached = sum(1 for _ in self.walk())
        if reached != len(self.nodes):
            return f"{len(self.nodes) - reached} nodes cannot be reached from a root"
        return None

    def _find_node_fault(self, node: GenerationNode) -> str | None:
        if len(set(node.children)) != len(node.children):
            return "lists a child twice"
        for child in node.children:
            if not 0 <= child < len(self.nodes) or self.nodes[child].parent != node.id:
                return f"lists the child {child}, which is not its child"
        if node.state != "forked" and node.children:
            return f"is {node.state} but has children"
        if node.state != "forked" and node.is_prompt:
            return f"is a prompt but {node.state}"
        if len(node.logprobs) not in (0, len(node.tokens)):
            return f"has {len(node.tokens)} tokens but {len(node.logprobs)} log-probs"
        if node.parent is None:
            if node.logprobs or node.start != 0:
                return "is a root, yet has log-probs or does not start at 0"
            return None
        if not 0 <= node.parent < len(self.nodes):
            return f"has the parent {node.parent}, which does not exist"
        parent = self.nodes[node.parent]
        if node.start != parent.end or node.prompt != parent.prompt:
            return f"does not start where its parent {parent.id} ends"
        if node.is_prompt and not parent.is_prompt:
            return "has tokens without log-probs below a generated node"
        if node.state == "forked" and not (node.is_prompt or (node.tokens and node.children)):
            return "is forked but has no tokens or no children"
        return None
