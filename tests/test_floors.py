"""The package is built in floors: a module imports only from floors below its own."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "hf_tree_cache"

FLOORS = {
    "errors": 0,
    "env": 0,
    "overlap": 0,
    "naming": 0,
    "integration.stats": 0,
    "integration.pictures": 0,
    "integration.materialising": 0,
    "integration.experts": 0,
    "sending": 0,
    "generation.view_parts": 2,
    "generation.view_text": 3,
    "integration.adapters": 1,
    "memory.allocator": 1,
    "memory.growth": 1,
    "memory.places": 1,
    "memory.scatter": 1,
    "generation.uncertainty_kernel": 1,
    "generation.draw_kernel": 1,
    "generation.draw_launch": 2,
    "generation.node": 1,
    "generation.options": 1,
    "generation.stopping": 1,
    "generation.text": 1,
    "generation.prefixes": 1,
    "generation.interrupt": 1,
    "notebook.live": 1,
    "memory.tree": 2,
    "memory.storage": 2,
    "generation.uncertainty": 2,
    "memory.pool": 3,
    "memory.history": 3,
    "memory.tree_memory": 4,
    "generation.processors": 3,
    "generation.sampling": 3,
    "attention.plan": 3,
    "attention.parts": 3,
    "attention.tiles": 3,
    "attention.latent_kernel": 3,
    "attention.softmax_kernel": 3,
    "attention.latent_launch": 4,
    "attention.reference": 4,
    "attention.torch_backend": 4,
    "attention.buffers": 4,
    "attention.products": 4,
    "attention.merge_kernel": 4,
    "attention.outline": 4,
    "generation.view_html": 4,
    "generation.formats": 4,
    "generation.decide": 4,
    "generation.grammar": 4,
    "forward.kernels": 4,
    "forward.experts_kernel": 4,
    "attention.braids": 5,
    "attention.cut": 5,
    "attention.schedule": 6,
    "attention.kernel": 5,
    "attention.latents": 5,
    "integration.step": 5,
    "integration.op_record": 5,
    "integration.fingerprint": 5,
    "forward.linear": 5,
    "forward.small": 5,
    "forward.rotary": 6,
    "integration.layers": 5,
    "generation.record": 5,
    "attention.launch": 7,
    "integration.trial": 5,
    "integration.linears": 6,
    "integration.pending": 7,
    "integration.units": 6,
    "integration.small_steps": 8,
    "integration.substitutes": 9,
    "integration.gated": 7,
    "forward.experts": 6,
    "integration.expert_units": 7,
    "integration.routers": 7,
    "generation.output": 6,
    "integration.operands": 6,
    "integration.handles": 7,
    "attention.dispatch": 8,
    "attention.tune": 8,
    "integration.static": 8,
    "integration.cache": 9,
    "integration.latent": 9,
    "integration.attention": 10,
    "integration.disk": 10,
    "integration.late_ends": 10,
    "integration.stop_strings": 0,
    "integration.prepare": 10,
    "integration.decode_call": 10,
    "integration.compiled": 10,
    "generation.step_inputs": 10,
    "generation.batch": 11,
    "generation.frontier": 11,
    "notebook.panels": 10,
    "integration.decode_graph": 11,
    "generation.ledger": 12,
    "integration.enable": 12,
    "generation.loop": 13,
    "generation.extension": 14,
    "generation.runner": 15,
    "search.policy": 16,
    "search.statistics": 16,
    "search.answers": 16,
    "search.scoring": 16,
    "search.budget": 16,
    "notebook.session": 16,
    "search.result": 17,
    "search.task": 18,
    "search.driver": 19,
    "search.strategy": 20,
    "search.self_consistency": 21,
    "search.best_of_n": 21,
    "search.step_beam": 21,
    "search.mcts": 21,
    "search.tree_of_thoughts": 21,
    "search.entropy_branching": 21,
    "search.ask_tell": 21,
}

# What `import hf_tree_cache` brings: nothing below may ask for it.
TOP = max(FLOORS.values()) + 1

# Bookkeeping is plain ints, so that it can be tested and reasoned about without tensors.
NO_TORCH = {
    "memory.allocator",
    "memory.growth",
    "memory.places",
    "memory.history",
    "memory.tree",
    *(name for name in FLOORS if name.startswith("search.")),
} - {"search.scoring", "search.entropy_branching"}

# Imports inside functions hide dependencies; Triton is optional, so its callers may wait.
LAZY_ALLOWED = {
    ("attention.dispatch", "attention.launch"),
    ("attention.latents", "attention.latent_launch"),
    ("integration.enable", "integration.decode_graph"),
    ("generation.sampling", "generation.draw_launch"),
    ("generation.uncertainty", "generation.uncertainty_kernel"),
}


@dataclass(frozen=True)
class Import:
    line: int
    target: str
    lazy: bool


def modules_of(root: Path) -> dict[str, Path]:
    """Maps dotted names below the package to files; the `__init__` files are left out."""
    return {
        ".".join(path.relative_to(root).with_suffix("").parts): path
        for path in sorted(root.rglob("*.py"))
        if path.name != "__init__.py"
    }


def imports_of(name: str, source: str, package: str) -> Iterator[Import]:
    """Yields what a module imports, relative imports made absolute, each name of a `from` apart."""
    parents = [package, *name.split(".")][:-1]

    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for child in node.orelse:
                yield from visit(child, lazy)
            return
        if isinstance(node, ast.Import):
            yield from (Import(node.lineno, alias.name, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) - node.level + 1] if node.level else []
            base = ".".join([*base, *filter(None, [node.module])])
            yield from (Import(node.lineno, f"{base}.{alias.name}", lazy) for alias in node.names)
        elif isinstance(node, ast.Call) and (target := imported_by_name(node)):
            yield Import(node.lineno, package + target if target[0] == "." else target, True)
        lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, lazy)

    yield from visit(ast.parse(source), lazy=False)


def imported_by_name(call: ast.Call) -> str | None:
    """Returns the "x.y" of `importlib.import_module("x.y")` and `__import__("x.y")`."""
    if ast.unparse(call.func).rpartition(".")[2] not in ("import_module", "__import__"):
        return None
    match call.args:
        case [ast.Constant(value=str(target)), *_]:
            return target
    return None


def violations(root: Path) -> list[str]:
    """Returns one sentence for each import that breaks a rule."""
    package = root.name
    modules = modules_of(root)
    found = []
    for name, path in modules.items():
        if name not in FLOORS:
            found.append(f"{package}/{path.relative_to(root)} has no floor: give it one in FLOORS")
            continue
        for item in imports_of(name, path.read_text(encoding="utf-8"), package):
            where = f"{package}/{path.relative_to(root)}:{item.line}"
            top, _, inner = item.target.partition(".")
            if top == "torch" and name in NO_TORCH:
                found.append(f"{where} imports {item.target}: this module works without torch")
            if top != package:
                continue
            target = resolve(inner)
            if target == name:
                continue
            if item.lazy and (name, target) not in LAZY_ALLOWED:
                found.append(f"{where} imports {item.target} inside a function or by name")
            if floor_of(target) >= FLOORS[name]:
                found.append(
                    f"{where} (floor {FLOORS[name]}) imports {item.target} "
                    f"(floor {floor_of(target)}): imports go to a lower floor only"
                )
    return found


def resolve(inner: str) -> str:
    """Cuts `memory.tree.BranchTree` to the module `memory.tree`, or to the package `memory`."""
    parts = inner.split(".")
    candidates = (".".join(parts[:n]) for n in (2, 1))
    return next((name for name in candidates if name in FLOORS), parts[0])


def floor_of(target: str) -> int:
    """A package counts as its highest module, because importing it imports them all."""
    inside = [FLOORS[name] for name in FLOORS if f"{name}.".startswith(f"{target}.")]
    return max(inside, default=TOP)


def test_every_import_goes_to_a_lower_floor() -> None:
    found = violations(ROOT)
    assert not found, "see the floors in docs/architecture.md\n  " + "\n  ".join(found)


CASES = {
    "downward relative import": ("memory.tree", "from .allocator import X", None),
    "downward relative import across packages": ("memory.tree", "from ..errors import X", None),
    "downward absolute import": ("attention.plan", "import hf_tree_cache.memory.tree", None),
    "submodule from its package": ("attention.plan", "from hf_tree_cache.memory import tree", None),
    "name from a lower package": ("attention.schedule", "from ..memory import BranchTree", None),
    "type checking only": ("errors", "if TYPE_CHECKING:\n    from .memory.tree import X", None),
    "optional kernel": ("attention.dispatch", "def f():\n    from . import launch", None),
    "upward import": ("memory.allocator", "from .tree import X", "lower floor only"),
    "sibling import": ("memory.places", "from . import allocator", "lower floor only"),
    "name from its own package": ("memory.tree", "from . import X", "lower floor only"),
    "name from the top": ("generation.loop", "from .. import TreeCache", "lower floor only"),
    "upward import in a try": (
        "errors",
        "try:\n    from . import env\nexcept ImportError:\n    env = None",
        "lower floor only",
    ),
    "upward import beside type checking": (
        "errors",
        "if TYPE_CHECKING:\n    pass\nelse:\n    from . import env",
        "lower floor only",
    ),
    "lazy import": (
        "generation.loop",
        "class A:\n    def f(self):\n        from ..errors import X",
        "inside a function",
    ),
    "import by name": (
        "generation.loop",
        "import importlib\nimportlib.import_module('hf_tree_cache.errors')",
        "by name",
    ),
    "relative import by name": (
        "generation.loop",
        "import_module('.errors', __package__)",
        "by name",
    ),
    "whole package": ("generation.loop", "import hf_tree_cache", "lower floor only"),
    "torch in the allocator": ("memory.allocator", "import torch.nn", "without torch"),
    "torch in a function of the tree": (
        "memory.tree",
        "def f():\n    from torch import Tensor",
        "without torch",
    ),
    "torch elsewhere": ("memory.storage", "import torch", None),
    "module without a floor": ("memory.arena", "x = 1", "has no floor"),
}


@pytest.mark.parametrize(("module", "source", "complaint"), CASES.values(), ids=CASES)
def test_the_rules_on_a_made_up_package(
    tmp_path: Path, module: str, source: str, complaint: str | None
) -> None:
    path = tmp_path / "hf_tree_cache" / f"{module.replace('.', '/')}.py"
    path.parent.mkdir(parents=True)
    path.write_text(source, encoding="utf-8")
    found = violations(tmp_path / "hf_tree_cache")
    if complaint is None:
        assert found == []
    else:
        assert len(found) == 1
        assert complaint in found[0]
