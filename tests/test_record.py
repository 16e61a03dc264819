from __future__ import annotations

import copy
import json
import math
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from hf_tree_cache.errors import InvalidArgument
from hf_tree_cache.generation.record import GenerationTree


def write(tree: GenerationTree, node: int, *tokens: int) -> None:
    """Append tokens; a token's log-prob is minus a hundredth of it."""
    for token in tokens:
        tree.append(node, token, -token / 100)


def documented_tree() -> GenerationTree:
    """The example at the top of record.py."""
    tree = GenerationTree()
    first = tree.open_branch(tree.add_prompt([11, 12, 13]))
    write(tree, first, 21, 22)
    left, right = tree.fork(first, 2, "entropy")
    write(tree, left, 31, 32, 33, 34)
    write(tree, right, 41)
    tree.finish(left, "eos")
    tree.prune(right, "rank")
    write(tree, tree.fork_at(left, 7, "backtrack"), 51)
    return tree


def random_tree(seed: int, steps: int = 120) -> GenerationTree:
    """A tree whose generated tokens are all different, on two prompts."""
    rng = random.Random(seed)
    tree = GenerationTree()
    alive = [tree.open_branch(tree.add_prompt([1, 2, 3])), tree.open_branch(tree.add_prompt([4]))]
    for token in range(1000, 1000 + steps):
        node = rng.choice(alive)
        if rng.random() < 0.7:
            tree.append(node, token, -rng.random())
        elif rng.random() < 0.6:
            alive.remove(node)
            alive += tree.fork(node, rng.randint(1, 3))
        else:
            leaf = rng.choice(tree.leaves())
            alive.append(tree.fork_at(leaf, rng.randint(1, tree.nodes[leaf].end)))
        if len(alive) > 4:
            closed = alive.pop(rng.randrange(len(alive)))
            rng.choice([tree.finish, tree.prune])(closed, "enough")
    tree.check_integrity()
    return tree


def test_the_documented_example_is_what_the_calls_make() -> None:
    tree = documented_tree()
    rows = [(n.id, n.parent, n.start, n.tokens, n.state) for n in tree.nodes]
    assert rows == [
        (0, None, 0, [11, 12, 13], "forked"),
        (1, 0, 3, [21, 22], "forked"),
        (2, 4, 7, [33, 34], "finished"),
        (3, 1, 5, [41], "pruned"),
        (4, 1, 5, [31, 32], "forked"),
        (5, 4, 7, [51], "alive"),
    ]
    assert tree.path(2) == [0, 1, 4, 2]
    assert tree.children(1) == [4, 3]
    assert tree.tokens(2) == [11, 12, 13, 21, 22, 31, 32, 33, 34]
    assert [n.reason for n in tree.nodes] == [None, "entropy", "eos", "rank", "backtrack", None]
    tree.check_integrity()


def test_queries_of_the_documented_example() -> None:
    tree = documented_tree()
    assert tree.leaves() == [2, 5, 3]
    assert (tree.leaves("alive"), tree.leaves("finished"), tree.leaves("pruned")) == ([5], [2], [3])
    assert tree.tokens(5, include_prompt=False) == [21, 22, 31, 32, 51]
    assert tree.logprobs(5) == [-0.21, -0.22, -0.31, -0.32, -0.51]
    assert tree.logprob(5) == pytest.approx(-1.57)
    assert tree.mean_logprob(5) == pytest.approx(-1.57 / 5)
    assert tree.num_branches == 3
    assert tree.num_tokens == 8
    assert tree.num_tokens_flat == 6 + 5 + 3
    assert repr(tree) == "GenerationTree(prompts=1, branches=3, tokens=8)"


def test_a_branch_without_tokens_has_log_prob_zero_and_no_mean() -> None:
    tree = GenerationTree()
    leaf = tree.open_branch(tree.add_prompt([1]))
    assert tree.logprob(leaf) == 0.0
    assert math.isnan(tree.mean_logprob(leaf))


def test_queries_and_exports_change_nothing() -> None:
    tree = random_tree(0)
    before = copy.deepcopy(tree.nodes)
    for node in range(len(tree.nodes)):
        tree.path(node).append(-1)
        tree.tokens(node).append(-1)
        tree.logprobs(node).append(-1.0)
        tree.children(node).append(-1)
    tree.leaves().append(-1)
    tree.roots.append(-1)
    tree.to_dict()["nodes"][0]["tokens"].append(-1)
    tree.to_arrays()["token"].append(-1)
    str(tree), tree.to_html()
    assert tree.nodes == before
    tree.check_integrity()


def test_forking_twice_at_one_position_makes_siblings_not_a_chain() -> None:
    tree = GenerationTree()
    prompt = tree.add_prompt([1, 2])
    first = tree.open_branch(prompt)
    assert tree.fork(first, 3, "start") == [first, 2, 3]
    assert tree.fork(2, 2, "again") == [2, 4]
    assert tree.children(prompt) == [first, 2, 4, 3]
    assert {tree.nodes[i].state for i in (first, 2, 3, 4)} == {"alive"}
    assert tree.nodes[prompt].reason == "start"
    tree.check_integrity()


def test_the_continuing_branch_of_a_fork_comes_first() -> None:
    tree = GenerationTree()
    node = tree.open_branch(tree.add_prompt([1]))
    write(tree, node, 2)
    branches = tree.fork(node, 3)
    assert branches == tree.children(node) == [2, 3, 4]
    assert tree.nodes[node].state == "forked"


@pytest.mark.parametrize("state", ["alive", "finished", "pruned"])
def test_backtracking_to_the_end_of_a_leaf_keeps_that_leaf(state: str) -> None:
    tree = GenerationTree()
    leaf = tree.open_branch(tree.add_prompt([1, 2]))
    write(tree, leaf, 3, 4)
    if state != "alive":
        {"finished": tree.finish, "pruned": tree.prune}[state](leaf, "why")
    other = tree.fork_at(leaf, 4)
    write(tree, other, 5)
    assert tree.nodes[leaf].state == state
    assert tree.tokens(leaf) == [1, 2, 3, 4]
    assert tree.tokens(other) == [1, 2, 3, 4, 5]
    tree.check_integrity()


def test_backtracking_to_a_fork_adds_a_child_and_splits_nothing() -> None:
    tree = documented_tree()
    num_nodes = len(tree.nodes)
    assert tree.fork_at(5, 5, "later reason") == num_nodes
    assert tree.children(1) == [4, 3, num_nodes]
    assert tree.nodes[1].reason == "entropy"


def test_backtracking_into_the_prompt_splits_the_prompt() -> None:
    tree = GenerationTree()
    prompt = tree.add_prompt([1, 2, 3])
    leaf = tree.open_branch(prompt)
    write(tree, leaf, 4)
    other = tree.fork_at(leaf, 1)
    write(tree, other, 5, 6)
    tree.check_integrity()
    assert tree.tokens(leaf) == [1, 2, 3, 4]
    assert tree.tokens(other) == [1, 5, 6]
    assert tree.tokens(other, include_prompt=False) == [5, 6]
    assert tree.tokens(tree.open_branch(prompt)) == [1, 2, 3]
    assert (tree.num_tokens, tree.num_tokens_flat) == (3, 3)
    assert tree.roots == [other - 1]


def test_an_empty_prompt_is_the_start_of_a_generation_from_embeddings() -> None:
    tree = GenerationTree()
    leaf = tree.open_branch(tree.add_prompt([]))
    write(tree, leaf, 7, 8)
    other = tree.fork_at(leaf, 0)
    assert tree.tokens(leaf) == [7, 8]
    assert tree.path(other) == [0, other]
    tree.check_integrity()


def test_a_finished_branch_can_still_be_pruned() -> None:
    tree = documented_tree()
    tree.prune(2, "worse than another")
    assert (tree.nodes[2].state, tree.nodes[2].reason) == ("pruned", "worse than another")


MISUSES = {
    "append to a forked node": (lambda t: t.append(1, 9, -1.0), r"append\(node=1\).*is forked"),
    "append to a finished node": (lambda t: t.append(2, 9, -1.0), r"finished \(eos\).*fork_at\(2"),
    "append to a pruned node": (lambda t: t.append(3, 9, -1.0), r"pruned \(rank\)"),
    "append to a prompt": (lambda t: t.append(0, 9, -1.0), r"open_branch\(0\)"),
    "append to an unknown node": (lambda t: t.append(6, 9, -1.0), "no node 6; .* has 6 nodes"),
    "append to a negative node": (lambda t: t.append(-1, 9, -1.0), "no node -1"),
    "fork a closed node": (lambda t: t.fork(2, 2), r"fork\(node=2\).*is finished"),
    "fork into no branches": (lambda t: t.fork(5, 0), r"count=0.*prune"),
    "fork into minus one": (lambda t: t.fork(5, -1), "count=-1"),
    "fork an unknown node": (lambda t: t.fork(60, 2), "no node 60"),
    "finish twice": (lambda t: t.finish(2), r"finish\(node=2\)"),
    "prune twice": (lambda t: t.prune(3), r"prune\(node=3\)"),
    "prune a forked node": (lambda t: t.prune(4), r"carry on \(ids: 2, 5\)"),
    "open a branch on an alive node": (lambda t: t.open_branch(5), r"is alive.*fork\(5, count\)"),
    "open a branch on a finished node": (lambda t: t.open_branch(2), r"fork_at\(2, 9\)"),
    "backtrack before the first token": (lambda t: t.fork_at(2, 0), "9 tokens.* at 1 to 9"),
    "backtrack to a negative position": (lambda t: t.fork_at(2, -2), "position=-2"),
    "backtrack beyond the end": (lambda t: t.fork_at(2, 10), "at 1 to 9"),
    "backtrack from an unknown node": (lambda t: t.fork_at(9, 3), "no node 9"),
    "part of an unknown prompt": (lambda t: t.of_prompt(1), r"of_prompt\(prompt=1\).*has 1 prompt"),
    "path of an unknown node": (lambda t: t.path(9), "no node 9"),
    "leaves that are forked": (lambda t: t.leaves("forked"), "'alive', 'finished' or 'pruned'"),
    "leaves in a state that is none": (lambda t: t.leaves("dead"), "state='dead'"),
}


@pytest.mark.parametrize(("call", "message"), MISUSES.values(), ids=MISUSES)
def test_misuse_is_refused_with_advice_and_changes_nothing(call: Any, message: str) -> None:
    tree = documented_tree()
    before = copy.deepcopy(tree.nodes)
    with pytest.raises(InvalidArgument, match=message):
        call(tree)
    assert tree.nodes == before


def test_backtracking_beyond_an_empty_leaf_names_the_right_range() -> None:
    tree = GenerationTree()
    leaf = tree.open_branch(tree.add_prompt([1, 2]))
    with pytest.raises(InvalidArgument, match="at 1 to 2"):
        tree.fork_at(leaf, 3)


@pytest.mark.parametrize("seed", range(5))
def test_json_brings_back_every_node(seed: int, tmp_path: Path) -> None:
    tree = random_tree(seed)
    text = tree.to_json(tmp_path / "tree.json")
    for source in (text, tmp_path / "tree.json", str(tmp_path / "tree.json")):
        back = GenerationTree.from_json(source)
        assert back.nodes == tree.nodes
        assert back.roots == tree.roots
    assert GenerationTree.from_dict(tree.to_dict()).nodes == tree.nodes


@pytest.mark.parametrize("seed", range(5))
def test_the_part_of_a_prompt_is_a_tree_of_its_own(seed: int) -> None:
    tree = random_tree(seed)
    before = copy.deepcopy(tree.nodes)
    for prompt, root in enumerate(tree.roots):
        part, place = tree.of_prompt(prompt)
        part.check_integrity()
        assert part.roots == [place[root]]
        leaves = [leaf for leaf in tree.leaves() if tree.nodes[leaf].prompt == prompt]
        assert [place[leaf] for leaf in leaves] == part.leaves()
        for leaf in leaves:
            assert part.tokens(place[leaf]) == tree.tokens(leaf)
            assert part.logprobs(place[leaf]) == tree.logprobs(leaf)
            assert part.nodes[place[leaf]].state == tree.nodes[leaf].state
        # It is a copy: growing it leaves the whole as it was.
        part.fork_at(part.leaves()[0], 1)
    assert tree.nodes == before


def test_a_tree_read_back_can_grow_on() -> None:
    tree = GenerationTree.from_json(documented_tree().to_json())
    write(tree, 5, 52)
    tree.fork_at(5, 8)
    tree.check_integrity()
    assert tree.tokens(5, include_prompt=False) == [21, 22, 31, 32, 51, 52]


def test_json_is_strict_json_even_for_log_probs_that_are_not_finite() -> None:
    tree = GenerationTree()
    leaf = tree.open_branch(tree.add_prompt([1]))
    for logprob in (-math.inf, math.nan, math.inf, -0.5):
        tree.append(leaf, 2, logprob)

    def refuse(constant: str) -> float:
        raise AssertionError(constant)

    json.loads(tree.to_json(), parse_constant=refuse)
    low, unknown, high, finite = GenerationTree.from_json(tree.to_json()).logprobs(leaf)
    assert (low, high, finite) == (-math.inf, math.inf, -0.5)
    assert math.isnan(unknown)


def test_the_tokenizer_is_not_serialised() -> None:
    tree = documented_tree()
    tree.tokenizer = object()  # type: ignore[assignment]
    assert GenerationTree.from_json(tree.to_json()).tokenizer is None
    assert GenerationTree.from_dict(tree.to_dict(), tree.tokenizer).tokenizer is tree.tokenizer


def damage(node: int, **fields: Any) -> dict[str, Any]:
    data = documented_tree().to_dict()
    data["nodes"][node].update(fields)
    return data


DAMAGED = {
    "not a mapping": [1, 2],
    "another format": {**damage(0), "format": "tree"},
    "another version": {**damage(0), "version": 2},
    "nodes that are no list": {**damage(0), "nodes": {}},
    "a node that is no mapping": {**damage(0), "nodes": [3]},
    "a node without fields": {**damage(0), "nodes": [{}]},
    "a node cut off": {**damage(0), "nodes": damage(0)["nodes"][:-1]},
    "a token that is a float": damage(5, tokens=[1.5]),
    "a token that is a bool": damage(5, tokens=[True]),
    "a log-prob that is text": damage(5, logprobs=["low"]),
    "a log-prob beyond a float": damage(5, logprobs=[10**400]),
    "a log-prob too many": damage(5, logprobs=[-1.0, -1.0]),
    "a generated token without log-prob": damage(5, logprobs=[]),
    "an unknown state": damage(5, state="dead"),
    "a state that is a list": damage(5, state=["alive"]),
    "a reason that is a number": damage(5, reason=3),
    "an id that is not the index": damage(5, id=4),
    "a start that does not follow the parent": damage(5, start=6),
    "a parent that does not exist": damage(5, parent=99),
    "a negative parent": damage(5, parent=-1),
    "a parent of another child list": damage(5, parent=1),
    "a second root of one prompt": damage(5, parent=None, start=0, logprobs=[], state="forked"),
    "another prompt than the parent's": damage(5, prompt=1),
    "an alive node with children": damage(4, state="alive"),
    "a forked node without children": damage(5, state="forked"),
    "a child listed twice": damage(4, children=[2, 5, 5]),
    "a child left out": damage(4, children=[2]),
    "a child that does not exist": damage(4, children=[2, 77]),
    "a finished prompt": damage(0, state="finished"),
}


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED)
def test_damaged_data_is_refused(data: Any) -> None:
    with pytest.raises(InvalidArgument, match="from_dict"):
        GenerationTree.from_dict(data)


def test_a_cycle_is_refused() -> None:
    data = documented_tree().to_dict()
    loop = {"prompt": 0, "tokens": [], "logprobs": [], "state": "forked", "reason": None}
    data["nodes"] += [
        {**loop, "id": 6, "parent": 7, "start": 0, "children": [7]},
        {**loop, "id": 7, "parent": 6, "start": 0, "children": [6]},
    ]
    with pytest.raises(InvalidArgument, match="node 6 is forked but has no tokens"):
        GenerationTree.from_dict(data)


@pytest.mark.parametrize(
    "source",
    ["", "{", '{"format": ', "no such file.json", "[1, 2]", "\0", '{"a":' * 100_000],
    ids=["empty", "brace", "cut JSON", "missing file", "JSON list", "null byte", "deep nesting"],
)
def test_text_that_is_no_record_is_refused(source: str) -> None:
    with pytest.raises(InvalidArgument, match=r"from_json\(|from_dict"):
        GenerationTree.from_json(source)


def test_check_integrity_notices_a_broken_tree() -> None:
    tree = documented_tree()
    tree.nodes[5].start += 1
    with pytest.raises(AssertionError, match="node 5 does not start where its parent 4 ends"):
        tree.check_integrity()


def test_networkx_has_the_same_edges_and_data() -> None:
    networkx = pytest.importorskip("networkx")
    tree = documented_tree()
    graph = tree.to_networkx()
    assert sorted(graph.edges) == [(0, 1), (1, 3), (1, 4), (4, 2), (4, 5)]
    assert graph.nodes[2]["tokens"] == [33, 34]
    assert graph.nodes[2]["state"] == "finished"
    assert [i for i in graph if graph.nodes[i]["is_prompt"]] == [0]
    assert networkx.is_arborescence(graph)


def test_without_networkx_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "networkx", None)
    with pytest.raises(ImportError, match="pip install networkx"):
        documented_tree().to_networkx()


def test_arrays_of_the_documented_example() -> None:
    arrays = documented_tree().to_arrays()
    assert arrays["token"] == [11, 12, 13, 21, 22, 31, 32, 33, 34, 51, 41]
    assert arrays["parent"] == [-1, 0, 1, 2, 3, 4, 5, 6, 7, 6, 4]
    assert arrays["exit"] == [11, 11, 11, 11, 11, 10, 10, 9, 9, 10, 11]
    assert arrays["position"] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 7, 5]
    assert arrays["node"] == [0, 0, 0, 1, 1, 4, 4, 2, 2, 5, 3]
    assert arrays["is_prompt"] == [True] * 3 + [False] * 8
    assert arrays["logprob"][3:] == [-t / 100 for t in arrays["token"][3:]]
    assert all(math.isnan(x) for x in arrays["logprob"][:3])


@pytest.mark.parametrize("seed", range(8))
def test_arrays_give_each_sequence_and_all_ancestors(seed: int) -> None:
    tree = random_tree(seed)
    arrays = tree.to_arrays()
    size = len(arrays["token"])
    assert {len(column) for column in arrays.values()} == {size}
    assert size == tree.num_tokens + 4

    last_of = {node: i for i, node in enumerate(arrays["node"])}
    for leaf in tree.leaves():
        owners = [i for i in tree.path(leaf) if i in last_of]
        chain, i = [], last_of[owners[-1]]
        while i != -1:
            chain.append(i)
            i = int(arrays["parent"][i])
        chain.reverse()
        assert [arrays["token"][i] for i in chain] == tree.tokens(leaf)
        assert [arrays["position"][i] for i in chain] == list(range(len(chain)))
        above = [i for i in range(size) if arrays["enter"][i] <= chain[-1] < arrays["exit"][i]]
        assert above == chain


def test_a_first_token_has_no_parent_even_behind_an_empty_prompt() -> None:
    tree = GenerationTree()
    write(tree, tree.open_branch(tree.add_prompt([1])), 2)
    write(tree, tree.open_branch(tree.add_prompt([])), 3, 4)
    assert tree.to_arrays()["parent"] == [-1, 0, -1, 2]


def test_deep_chains_need_no_recursion() -> None:
    tree = GenerationTree()
    node = tree.open_branch(tree.add_prompt([0]))
    for token in range(1, 5001):
        write(tree, node, token)
        (node,) = tree.fork(node, 1)
    assert tree.tokens(node) == list(range(5001))
    assert tree.to_arrays()["parent"] == list(range(-1, 5000))
    assert GenerationTree.from_json(tree.to_json()).nodes == tree.nodes
    tree.check_integrity()


@dataclass
class NaiveBranch:
    """A branch as an independent sequence."""

    tokens: list[int]
    logprobs: list[float]
    state: str = "alive"
    reason: str | None = None


class TreeAgainstLists(RuleBasedStateMachine):
    """Random operations, compared with one plain list of tokens per branch.

    Generated tokens are all different, so that sharing can be counted by value.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tree = GenerationTree()
        self.branches: dict[int, NaiveBranch] = {}
        self.prompts: list[int] = []
        self.token = 1000

    def pick(self, data: st.DataObject, *states: str) -> int:
        found = sorted(i for i, branch in self.branches.items() if branch.state in states)
        return data.draw(st.sampled_from(found))

    def has(self, *states: str) -> bool:
        return any(branch.state in states for branch in self.branches.values())

    def copy(self, branch: NaiveBranch, length: int | None = None) -> NaiveBranch:
        length = len(branch.tokens) if length is None else length
        num_prompt = len(branch.tokens) - len(branch.logprobs)
        kept = branch.logprobs[: max(0, length - num_prompt)]
        return NaiveBranch(branch.tokens[:length], kept)

    @initialize(lengths=st.lists(st.integers(1, 4), min_size=1, max_size=2))
    def add_prompts(self, lengths: list[int]) -> None:
        for length in lengths:
            prompt = list(range(self.token, self.token + length))
            self.token += length
            node = self.tree.add_prompt(prompt)
            self.prompts.append(node)
            self.branches[self.tree.open_branch(node)] = NaiveBranch(prompt, [])

    @precondition(lambda self: self.has("alive"))
    @rule(data=st.data(), count=st.integers(1, 4))
    def append(self, data: st.DataObject, count: int) -> None:
        leaf = self.pick(data, "alive")
        for _ in range(count):
            self.token += 1
            logprob = -(self.token % 7) / 4
            self.tree.append(leaf, self.token, logprob)
            self.branches[leaf].tokens.append(self.token)
            self.branches[leaf].logprobs.append(logprob)

    @precondition(lambda self: self.has("alive") and len(self.branches) < 24)
    @rule(data=st.data(), count=st.integers(1, 3))
    def fork(self, data: st.DataObject, count: int) -> None:
        leaf = self.pick(data, "alive")
        new = self.tree.fork(leaf, count, "fork")
        source = self.branches.pop(leaf)
        assert len(new) == count
        assert len({tuple(self.tree.path(node)[:-1]) for node in new}) == 1
        for node in new:
            assert node not in self.branches
            self.branches[node] = self.copy(source)

    @precondition(lambda self: self.branches and len(self.branches) < 24)
    @rule(data=st.data())
    def fork_at(self, data: st.DataObject) -> None:
        leaf = self.pick(data, "alive", "finished", "pruned")
        branch = self.branches[leaf]
        node = data.draw(st.sampled_from(self.tree.path(leaf)))
        position = data.draw(st.integers(1, self.tree.nodes[node].end))
        new = self.tree.fork_at(node, position, "backtrack")
        assert new not in self.branches
        self.branches[new] = self.copy(branch, position)

    @rule(data=st.data())
    def open_branch(self, data: st.DataObject) -> None:
        prompt = data.draw(st.sampled_from(self.prompts))
        if len(self.tree.children(prompt)) < 4:
            new = self.tree.open_branch(prompt)
            self.branches[new] = NaiveBranch(self.tree.tokens(prompt), [])

    @precondition(lambda self: self.has("alive"))
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        leaf = self.pick(data, "alive")
        self.tree.finish(leaf, "eos")
        self.branches[leaf].state, self.branches[leaf].reason = "finished", "eos"

    @precondition(lambda self: self.has("alive", "finished"))
    @rule(data=st.data())
    def prune(self, data: st.DataObject) -> None:
        leaf = self.pick(data, "alive", "finished")
        self.tree.prune(leaf, None)
        self.branches[leaf].state, self.branches[leaf].reason = "pruned", None

    @invariant()
    def every_branch_reads_like_its_list(self) -> None:
        self.tree.check_integrity()
        assert sorted(self.tree.leaves()) == sorted(self.branches)
        for leaf, branch in self.branches.items():
            node = self.tree.nodes[leaf]
            assert self.tree.tokens(leaf) == branch.tokens
            assert self.tree.logprobs(leaf) == branch.logprobs
            assert (node.state, node.reason) == (branch.state, branch.reason)
            assert node.end == len(branch.tokens)

    @invariant()
    def counts_are_those_of_the_lists(self) -> None:
        generated = [
            branch.tokens[len(branch.tokens) - len(branch.logprobs) :]
            for branch in self.branches.values()
        ]
        assert self.tree.num_tokens == len({token for tokens in generated for token in tokens})
        assert self.tree.num_tokens_flat == sum(map(len, generated))

    def teardown(self) -> None:
        assert GenerationTree.from_json(self.tree.to_json()).nodes == self.tree.nodes
        arrays = self.tree.to_arrays()
        assert len(set(arrays["token"])) == len(arrays["token"])


TreeAgainstLists.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None
)
TestTreeAgainstLists = TreeAgainstLists.TestCase


def test_a_finished_branch_can_go_on() -> None:
    tree = GenerationTree()
    leaf = tree.open_branch(tree.add_prompt([1]))
    tree.append(leaf, 2, -0.5)
    with pytest.raises(InvalidArgument, match="only a finished one"):
        tree.reopen(leaf)
    tree.finish(leaf, "eos")
    tree.reopen(leaf)
    tree.append(leaf, 3, -0.25)
    assert (tree.nodes[leaf].state, tree.nodes[leaf].reason) == ("alive", None)
    assert tree.tokens(leaf) == [1, 2, 3]
    tree.check_integrity()
