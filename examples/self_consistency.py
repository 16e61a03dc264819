"""Self-consistency on real weights: many sampled answers to one question, and a vote.

    python examples/self_consistency.py [--questions 4] [--branches 16]

1. transformers' generate with DynamicCache, then with TreeCache: same seed, same samples
2. one question branched while it is generated, its tree, its vote
3. 64 branches of a 2,000-token prompt: what is stored, beside what dense rows would take

Runs on two CPU cores in a minute or two. Exits with 1 if any sample differs between the caches.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Threads that spin while they wait make a busy machine many times slower; read when torch loads.
os.environ["GOMP_SPINCOUNT"] = os.environ.get("GOMP_SPINCOUNT", "1000")

import torch
import transformers
from tqdm.auto import tqdm
from transformers import Cache, DynamicCache
from weights import load_smollm2

import hf_tree_cache
from hf_tree_cache import (
    ForkAtFirstToken,
    ForkOnEntropy,
    PruneBelow,
    TreeCache,
    TreeCacheStats,
    TreeGenerateOutput,
    enable_tree_attention,
    tree_generate,
)
from hf_tree_cache.naming import CACHE

SHOTS = [
    ("What is 12 + 25?", "12 + 25 = 37. Answer: 37"),
    ("Tom has 4 boxes of 6 pens. How many pens is that?", "4 * 6 = 24 pens. Answer: 24"),
    ("Ann had 15 apples and gave 7 to Ben. How many are left?", "15 - 7 = 8. Answer: 8"),
]
QUESTIONS = [
    ("A book costs 12 dollars. How much do 3 books cost?", 36),
    ("What is 38 + 47?", 85),
    ("Sam had 20 marbles and lost 8. How many are left?", 12),
    ("What is 64 - 29?", 35),
]
STORED_BRANCHES, STORED_PROMPT = 64, 2000


@dataclass
class Run:
    """One call of generate.

    Attributes:
        sequences: ``[N, L]`` int64, prompt included.
        computed: prompt tokens that went through the model.
        kv_bytes: bytes of K/V held at the end.
    """

    sequences: torch.Tensor
    computed: int
    kv_bytes: int
    seconds: float


@dataclass
class Comparison:
    """One question, sampled with both caches."""

    question: str
    prompt_tokens: int
    dynamic: Run
    tree: Run
    votes: Counter[int | None]
    right: int

    @property
    def same(self) -> bool:
        return torch.equal(self.dynamic.sequences, self.tree.sequences)


@dataclass
class Report:
    """What the demo found, for those who call :func:`main`."""

    comparisons: list[Comparison] = field(default_factory=list)
    branched: TreeGenerateOutput | None = None
    html: Path | None = None
    stored: TreeCacheStats | None = None
    seconds: float = 0.0

    @property
    def same(self) -> bool:
        return all(comparison.same for comparison in self.comparisons)


def ask(tokenizer: Any, question: str, shots: Sequence[tuple[str, str]] = SHOTS) -> Any:
    """The question behind worked examples, as ``input_ids`` and ``attention_mask``."""
    chat = []
    for asked, answered in shots:
        chat += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    chat.append({"role": "user", "content": question})
    return tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )


def parse_answer(text: str) -> int | None:
    """The whole number behind "Answer:", None where there is none."""
    found = re.search(r"Answer:\s*\$?(-?\d[\d,]*)(?!\.?\d)", text)
    return int(found[1].replace(",", "")) if found else None


def votes_of(tokenizer: Any, generated: torch.Tensor) -> Counter[int | None]:
    texts = tokenizer.batch_decode(generated, skip_special_tokens=True)
    return Counter(parse_answer(text) for text in texts)


def describe(votes: Counter[int | None], right: int) -> str:
    ranked = [(answer, n) for answer, n in votes.most_common() if answer is not None]
    shown = [f"{answer} ×{n}" for answer, n in ranked[:4]]
    others = sum(votes.values()) - sum(n for _, n in ranked[:4])
    if others:
        shown.append(f"others ×{others}")
    verdict = "no answer"
    if ranked:
        elected = ranked[0][0]
        verdict = f"{elected}, right" if elected == right else f"{elected}, wrong: it is {right}"
    return f"{' '.join(shown)} → {verdict}"


@contextmanager
def prompt_tokens_computed(model: Any) -> Iterator[list[int]]:
    """Counts in the model itself: tokens of every forward with more than one a row."""
    seen: list[int] = []

    def count(module: Any, args: tuple[torch.Tensor, ...]) -> None:
        if args[0].shape[1] > 1:
            seen.append(args[0].numel())

    handle = model.get_input_embeddings().register_forward_pre_hook(count)
    try:
        yield seen
    finally:
        handle.remove()


def sample(model: Any, tokenizer: Any, inputs: Any, cache: Cache, **arguments: Any) -> Run:
    """One call of transformers' generate, measured."""
    torch.manual_seed(0)
    start = time.perf_counter()
    with prompt_tokens_computed(model) as computed:
        sequences = model.generate(
            **inputs,
            **{CACHE: cache},  # cache=..., past_key_values=... before transformers 5.24
            do_sample=True,
            temperature=0.7,
            pad_token_id=tokenizer.pad_token_id,
            **arguments,
        )
    seconds = time.perf_counter() - start
    if isinstance(cache, TreeCache):
        kv_bytes = cache.stats().kv_bytes
    else:
        kv_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return Run(sequences, sum(computed), kv_bytes, seconds)


def compare(
    model: Any, tokenizer: Any, question: str, right: int, branches: int, new_tokens: int
) -> Comparison:
    """The same samples with both caches."""
    inputs = ask(tokenizer, question)
    arguments = {"num_return_sequences": branches, "max_new_tokens": new_tokens}
    dynamic = sample(model, tokenizer, inputs, DynamicCache(config=model.config), **arguments)
    with enable_tree_attention(model):
        tree = sample(model, tokenizer, inputs, TreeCache(), **arguments)
    prompt = inputs["input_ids"].shape[1]
    votes = votes_of(tokenizer, tree.sequences[:, prompt:])
    return Comparison(question, prompt, dynamic, tree, votes, right)


def show_comparison(found: Comparison, say: Any) -> None:
    rows = [("DynamicCache", found.dynamic), ("TreeCache", found.tree)]
    say(f"\n   {found.question}")
    say(f"   {'':14}{'prompt tokens computed':>24}{'K/V held':>14}{'seconds':>10}")
    for name, run in rows:
        size = f"{run.kv_bytes / 1e6:.1f} MB"
        say(f"   {name:14}{run.computed:>24,}{size:>14}{run.seconds:>10.1f}")
    equal = "the same samples, token for token" if found.same else "DIFFERENT samples"
    say(f"   {equal}; {describe(found.votes, found.right)}")


def branch(model: Any, tokenizer: Any, question: str, branches: int, new_tokens: int) -> Any:
    """Fork at the first token and wherever the model hesitates; give up what is unlikely."""
    policy = [
        ForkAtFirstToken(4),
        ForkOnEntropy(threshold=1.5, children=2, min_gap=6),
        PruneBelow(logprob=-0.7, after=8),
    ]
    torch.manual_seed(0)
    with enable_tree_attention(model):
        return model.generate(
            **ask(tokenizer, question),
            custom_generate=tree_generate,
            branching=policy,
            max_branches=max(4, branches),
            tree_tokenizer=tokenizer,
            progress=False,
            do_sample=True,
            temperature=0.7,
            max_new_tokens=new_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )


def write_html(out: TreeGenerateOutput, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    head = '<!doctype html><meta charset="utf-8"><title>The tree of the demo</title>'
    style = "<style>:root { color-scheme: light dark }</style>"
    path.write_text(f"{head}{style}{out.tree.to_html()}", encoding="utf-8")
    return path


def show_branched(out: TreeGenerateOutput, tokenizer: Any, right: int, say: Any) -> None:
    prompt = len(out.tree.nodes[0].tokens)
    say("")
    for line in out.tree.to_text(max_width=97).splitlines():
        say(f"   {line}")
    stats = out.stats
    say(
        f"\n   {stats.tokens_generated} tokens generated ({len(out)} branches finished, "
        f"{stats.prunes} pruned); apart they would be {stats.tokens_flat}"
    )
    say(f"   {describe(votes_of(tokenizer, out.sequences[:, prompt:]), right)}")


def store(model: Any, tokenizer: Any, new_tokens: int) -> tuple[TreeCacheStats, float]:
    """Many branches of a long prompt, from the same stock call."""
    pairs = [(a, b) for a in range(11, 31) for b in range(11, 31)][:100]
    shots = [(f"What is {a} + {b}?", f"{a} + {b} = {a + b}. Answer: {a + b}") for a, b in pairs]
    whole = ask(tokenizer, "What is 38 + 47?", shots)
    inputs = {name: value[:, -STORED_PROMPT:] for name, value in whole.items()}
    cache = TreeCache()
    with enable_tree_attention(model):
        run = sample(
            model,
            tokenizer,
            inputs,
            cache,
            num_return_sequences=STORED_BRANCHES,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
        )
    return cache.stats(), run.seconds


def show_stored(stats: TreeCacheStats, seconds: float, say: Any) -> None:
    asked, computed = stats.prefill_tokens_asked, stats.prefill_tokens_computed
    per_token = stats.dense_bytes // stats.logical_tokens
    rows = [
        ("prompt tokens", f"{computed:,} computed of {asked:,} asked"),
        ("K/V held", f"{stats.kv_bytes / 1e6:,.0f} MB in {stats.blocks} blocks"),
        ("dense rows", f"{stats.dense_bytes / 1e6:,.0f} MB, from shapes: {stats.logical_tokens:,} "
                       f"tokens of {per_token:,} bytes (not run)"),
        ("saving", f"{stats.saving:.1%}"),
        ("seconds", f"{seconds:.1f}"),
    ]  # fmt: skip
    say("")
    for name, value in rows:
        say(f"   {name:15}{value}")


def main(argv: Sequence[str] | None = None) -> Report:
    """Run the demo; prints as it goes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--questions", type=int, default=4, choices=range(1, len(QUESTIONS) + 1))
    parser.add_argument("--branches", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--stored-new-tokens", type=int, default=16)
    parser.add_argument("--html", type=Path, default=Path("build/demo_tree.html"))
    options = parser.parse_args(argv)

    start = time.perf_counter()
    model, tokenizer = load_smollm2()
    name = Path(model.config.name_or_path).name
    versions = (
        f"hf_tree_cache {hf_tree_cache.__version__}, transformers {transformers.__version__}, "
        f"torch {torch.__version__}, {torch.get_num_threads()} CPU threads"
    )
    questions = QUESTIONS[: options.questions]
    report = Report()
    with tqdm(total=len(questions) + 2, disable=None, leave=False, unit="part") as bar:
        say = bar.write
        say(f"{name}, {str(model.dtype).removeprefix('torch.')}, loaded in "
            f"{time.perf_counter() - start:.1f} s")  # fmt: skip
        say(versions)
        ask_once = ask(tokenizer, "Ready?")
        # The first products of a process are slow; neither cache should pay for them.
        model.generate(**ask_once, max_new_tokens=2, pad_token_id=tokenizer.pad_token_id)

        say(f"\n1. transformers' generate, {options.branches} samples a question, one seed")
        for question, right in questions:
            bar.set_description("sampling")
            report.comparisons.append(
                compare(model, tokenizer, question, right, options.branches, options.new_tokens)
            )
            show_comparison(report.comparisons[-1], say)
            bar.update()

        question, right = questions[0]
        say(f"\n2. {question} Forked and pruned on the way:")
        bar.set_description("branching")
        report.branched = branch(model, tokenizer, question, options.branches, options.new_tokens)
        show_branched(report.branched, tokenizer, right, say)
        report.html = write_html(report.branched, options.html)
        say(f"   drawn for a browser: {os.path.relpath(report.html)}")
        bar.update()

        say(f"\n3. {STORED_BRANCHES} samples of a prompt of {STORED_PROMPT:,} tokens")
        bar.set_description("long prompt")
        report.stored, seconds = store(model, tokenizer, options.stored_new_tokens)
        show_stored(report.stored, seconds, say)
        bar.update()
        report.seconds = time.perf_counter() - start
        say(f"\n{report.seconds:.0f} s in all")
    return report


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    sys.exit(0 if main().same else 1)
