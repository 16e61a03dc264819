"""Step beam search twice: text re-sent to stock generate at every step, and over a tree of K/V.

    python examples/text_level.py [--prompt-tokens 500] [--width 4] [--expand 4] [--steps 6]
    python examples/text_level.py --shape 8b       random weights, on a GPU

The text-level way is what a search on top of an inference API does: it keeps strings, and after
every step it sends those that stay, question and all, again. Both ways carry out the same policy,
`StepBeam` by mean log-prob, and both are greedy: the i-th continuation of a beam begins with its
i-th likeliest token. So they propose the same candidates, and differ in what they compute.

On a CPU each way runs in a process of its own, so that its peak memory is its own. On a GPU both
run in this one: first to count tokens, then again to be timed, when everything is warm. The random
weights are made so that each word has clear successors (`clear_successors`): with ties, two ways to
compute the same part by rounding, and propose different candidates. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

# Threads that spin while they wait make a busy machine many times slower; read when torch loads.
os.environ["GOMP_SPINCOUNT"] = os.environ.get("GOMP_SPINCOUNT", "1000")

import torch
from torch import nn
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from hf_tree_cache.env import environment
from hf_tree_cache.generation.options import Sampling
from hf_tree_cache.search.policy import Action, Expand, Finish, Prune, Score, SearchTree
from hf_tree_cache.search.step_beam import StepBeam
from hf_tree_cache.search.strategy import run_search

SHOTS = """\
Question: Tom has 4 boxes of 6 pens and gives 5 pens away. How many pens are left?
4 boxes of 6 pens are 4 * 6 = 24 pens.
He gives 5 away, so 24 - 5 = 19 pens are left.
The answer is 19.
Question: Ann buys 3 books for 7 dollars each and pays with 50 dollars. How much does she get back?
3 books cost 3 * 7 = 21 dollars.
She gets 50 - 21 = 29 dollars back.
The answer is 29.
"""
QUESTION = """\
Question: Sam picks 12 apples and 15 pears, and eats 4 of them. How many pieces of fruit are left?
"""
DEFAULTS: dict[str, dict[str, Any]] = {
    "smollm2": {"prompt_tokens": 500, "steps": 6, "step_tokens": 32},
    "8b": {"prompt_tokens": 4000, "steps": 4, "step_tokens": 16, "dtype": "bfloat16"},
}
STOP = "Question:"
"""Behind its answer the model asks the next question; the solution is complete then."""


@dataclass(frozen=True)
class Work:
    """What is searched: a prompt, a beam of ``width``, ``expand`` continuations of each beam."""

    shape: str
    prompt_tokens: int
    width: int
    expand: int
    steps: int
    step_tokens: int
    dtype: str = "float32"

    def policy(self) -> RankedBeam:
        return RankedBeam(self.width, self.expand, self.steps)


@dataclass(frozen=True)
class Found:
    """What one way of searching did.

    Attributes:
        candidates: text of every proposed step, behind those before it.
        scores: their mean log-probs.
        tokens: positions that went through the model, padding included.
        memory_mb: peak above what the weights take.
    """

    candidates: list[str]
    scores: list[float]
    tokens: int
    seconds: float
    memory_mb: float


class RankedBeam(StepBeam):
    """Continuations of a node begin with its likeliest, second likeliest ... token."""

    def decide(self, search: SearchTree) -> Sequence[Action]:
        actions = super().decide(search)
        return [replace(a, distinct=True) if isinstance(a, Expand) else a for a in actions]


class RankedFirst(LogitsProcessor):
    """Row i begins with the token of rank ``ranks[i]``, and is greedy from then on.

    Attributes:
        logprobs: of the chosen tokens, a ``[R]`` float32 tensor a step.
    """

    def __init__(self, ranks: list[int]) -> None:
        self.ranks = ranks
        self.logprobs: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chosen = scores.argmax(-1, keepdim=True)
        if not self.logprobs:
            ranks = torch.tensor(self.ranks, device=scores.device)[:, None]
            chosen = scores.topk(max(self.ranks) + 1).indices.gather(1, ranks)
        self.logprobs.append(scores.float().log_softmax(-1).gather(1, chosen)[:, 0])
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)


class StepEnd(StoppingCriteria):
    """A row is done behind an end-of-sequence token, `STOP`, or a line that is not empty.

    Attributes:
        lengths: ``[R]`` int64, tokens until a row was done; 0 where it is not.
    """

    def __init__(self, tokenizer: Any, start: int, eos: set[int]) -> None:
        self.tokenizer, self.start, self.eos = tokenizer, start, eos
        self.lengths: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        rows = input_ids[:, self.start :].tolist()
        texts = self.tokenizer.batch_decode(rows)
        ended = [
            "\n" in text.lstrip() or STOP in text or row[-1] in self.eos
            for row, text in zip(rows, texts, strict=True)
        ]
        done = torch.tensor(ended, device=input_ids.device)
        if self.lengths is None:
            self.lengths = torch.zeros(len(rows), dtype=torch.int64, device=input_ids.device)
        self.lengths = torch.where(done & (self.lengths == 0), len(rows[0]), self.lengths)
        return self.lengths > 0


class TextLevel:
    """Carries out a policy on strings, with one call of stock generate for every round of steps."""

    def __init__(self, model: Any, tokenizer: Any, step_tokens: int) -> None:
        self.model, self.tokenizer, self.step_tokens = model, tokenizer, step_tokens
        eos = model.generation_config.eos_token_id
        self.eos = set() if eos is None else {eos} if isinstance(eos, int) else set(eos)

    def run(self, policy: StepBeam, question: str) -> SearchTree:
        search = SearchTree(question)
        while True:
            expansions: list[Expand] = []
            scored = False
            for action in policy.decide(search):
                if isinstance(action, Finish):
                    return search
                if isinstance(action, Prune):
                    search.nodes[action.node].state = "pruned"
                elif isinstance(action, Score):
                    scored = True
                    for node in action.nodes:
                        search.nodes[node].score = search.mean_logprob(node)
                elif isinstance(action, Expand):
                    expansions.append(action)
            if expansions:
                self._expand(search, expansions)
            elif not scored:
                return search

    @torch.inference_mode()
    def _expand(self, search: SearchTree, expansions: list[Expand]) -> None:
        ranks = [rank for action in expansions for rank in range(action.count)]
        parents = [search.nodes[action.node] for action in expansions for _ in range(action.count)]
        texts = [search.question + parent.text for parent in parents]
        inputs = self.tokenizer(texts, return_tensors="pt", padding=True).to(self.model.device)
        start = inputs["input_ids"].shape[1]
        first, end = RankedFirst(ranks), StepEnd(self.tokenizer, start, self.eos)
        ids = self.model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=False,
            max_new_tokens=self.step_tokens,
            logits_processor=LogitsProcessorList([first]),
            stopping_criteria=StoppingCriteriaList([end]),
        )[:, start:]
        assert end.lengths is not None
        lengths = torch.where(end.lengths == 0, ids.shape[1], end.lengths).tolist()
        logprobs = torch.stack(first.logprobs, 1).tolist()
        for parent, row, length, logprob in zip(
            parents, ids.tolist(), lengths, logprobs, strict=True
        ):
            parent.state = "closed"
            node = search.add(parent.id)
            node.step = self.tokenizer.decode(row[:length], skip_special_tokens=True)
            node.text = parent.text + node.step
            node.num_tokens, node.logprob = length, sum(logprob[:length])
            complete = row[length - 1] in self.eos or STOP in node.step
            node.state = "done" if complete else "open"


def question_of(work: Work, tokenizer: Any) -> str:
    """A prompt of about ``work.prompt_tokens`` tokens: worked examples, or words of no meaning."""
    if work.shape == "8b":
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(1, len(tokenizer), (work.prompt_tokens,), generator=generator)
        return tokenizer.decode(ids.tolist())
    times = work.prompt_tokens // len(tokenizer(SHOTS).input_ids)
    return SHOTS * max(times, 1) + QUESTION


def load(shape: str, dtype: str) -> tuple[Any, Any]:
    if shape == "smollm2":
        from weights import load_smollm2

        return load_smollm2()
    if not torch.cuda.is_available():
        sys.exit("--shape 8b needs a CUDA GPU with 50 GB; torch sees none.")
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
    from shapes import build

    model = build("8B").to(getattr(torch, dtype))
    clear_successors(model)
    model.lm_head = FullHead(model.lm_head)
    return model, words(model.config.vocab_size)


class FullHead(nn.Module):
    """A head in float32: logits in bfloat16 have steps of 1/16, in which candidates tie."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(head.weight.detach().float(), requires_grad=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden.float(), self.weight)


@torch.no_grad()
def clear_successors(model: Any, ranks: int = 8) -> None:
    """Make random weights prefer ``ranks`` words behind each word, one clearly over the next.

    The head looks for the embeddings of the words some places before. How sure the model is differs
    from word to word, so that the scores of candidates lie apart, too.
    """
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    generator = torch.Generator().manual_seed(1)
    # Larger than what all layers add, but not so large that they do not matter.
    embedding.normal_(0, 16)
    head.zero_()
    for rank in range(ranks):
        shift = int(torch.randint(1, len(embedding), (), generator=generator))
        head.add_(embedding.roll(shift, 0), alpha=12 * 0.75**rank / (16 * embedding.shape[1]))
    # A part that all words share and the head does not look for: the more of it, the less sure.
    doubt = 32 * torch.rand(len(embedding), 1, generator=generator)
    embedding.add_(doubt.to(embedding.device, embedding.dtype))


def words(size: int) -> Any:
    """A tokenizer of ``size`` words, w0 w1 w2 ..., for models that mean nothing."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # Each word with the space behind it, so that texts can be put together.
    backend = Tokenizer(models.WordLevel({f"w{i} ": i for i in range(size)}, unk_token="w0 "))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="w0 ",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def search(way: str, work: Work) -> Found:
    """Search one way, in this process, and measure it."""
    model, tokenizer = load(work.shape, work.dtype)
    question = question_of(work, tokenizer)
    run_once(way, replace(work, steps=1, step_tokens=2), model, tokenizer, question[:200])
    weights = memory_mb(reset=True)
    with counted_tokens(model) as seen:
        found = measure(way, work, model, tokenizer, question, weights)
    return replace(found, tokens=sum(seen))


def search_warm(work: Work, model: Any, tokenizer: Any) -> tuple[Found, Found]:
    """Both ways one after the other in this process, each counted first and then timed."""
    question = question_of(work, tokenizer)
    weights = memory_mb(reset=True)
    both = []
    # The count needs a hook, with which no decode step becomes a CUDA graph: one more to warm up.
    for way, warm_up in (("text", 0), ("tree", 1)):
        with counted_tokens(model) as seen:
            runs = [measure(way, work, model, tokenizer, question, weights)]
        runs += [
            measure(way, work, model, tokenizer, question, weights) for _ in range(warm_up + 1)
        ]
        said = ", ".join(f"{run.seconds:.2f}" for run in runs)
        print(f"{way}: {said} s; the last counts", flush=True)
        both.append(replace(runs[-1], tokens=sum(seen)))
    return both[0], both[1]


@contextmanager
def counted_tokens(model: Any) -> Iterator[list[int]]:
    """Positions that go through ``model``, padding included, a number for each forward."""
    seen: list[int] = []
    handle = model.get_input_embeddings().register_forward_pre_hook(
        lambda module, args: seen.append(args[0].numel())
    )
    try:
        yield seen
    finally:
        handle.remove()


def measure(
    way: str, work: Work, model: Any, tokenizer: Any, question: str, weights_mb: float
) -> Found:
    """One run, timed; its memory is above ``weights_mb``, its tokens are not counted."""
    gc.collect()
    memory_mb(reset=True)
    start = time.perf_counter()
    steps = run_once(way, work, model, tokenizer, question).nodes[1:]
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return Found(
        candidates=[node.text for node in steps],
        scores=[node.score or 0.0 for node in steps],
        tokens=0,
        seconds=time.perf_counter() - start,
        memory_mb=memory_mb() - weights_mb,
    )


def run_once(way: str, work: Work, model: Any, tokenizer: Any, question: str) -> SearchTree:
    if way == "text":
        return TextLevel(model, tokenizer, work.step_tokens).run(work.policy(), question)
    (result,) = run_search(
        model,
        tokenizer,
        [question],
        work.policy(),
        score="mean_logprob",
        sampling=Sampling.greedy(),
        delimiters=("\n",),
        stop=(STOP,),
        max_step_tokens=work.step_tokens,
        max_new_tokens=work.steps * work.step_tokens,
    )
    return result.search


def memory_mb(reset: bool = False) -> float:
    """Peak memory of this process so far: of the GPU if there is one, else of the process."""
    if torch.cuda.is_available():
        if reset:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def in_its_own_process(way: str, work: Work) -> Found:
    command = [sys.executable, __file__, "--way", way]
    for name, value in asdict(work).items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return Found(**json.loads(done.stdout.splitlines()[-1]))


def num_same(text: Found, tree: Found) -> int:
    """Candidates that both ways proposed, one by one."""
    return sum(a == b for a, b in zip(text.candidates, tree.candidates, strict=False))


def report(text: Found, tree: Found) -> str:
    """Both ways side by side."""
    lines = [f"{'':34}{'text level':>14}{'tree':>14}{'':>10}"]
    for name, field, form in (
        ("tokens through the model", "tokens", ",.0f"),
        ("seconds", "seconds", ",.1f"),
        ("memory above the weights, MB", "memory_mb", ",.0f"),
    ):
        a, b = getattr(text, field), getattr(tree, field)
        ratio = f"{a / b:.1f} ×" if b > 0 else ""
        lines.append(f"{name:34}{a:>14{form}}{b:>14{form}}{ratio:>10}")
    total = max(len(text.candidates), len(tree.candidates))
    lines.append(f"{num_same(text, tree)} of {total} candidates are the same, one by one")
    return "\n".join(lines)


def as_json(work: Work, text: Found, tree: Found) -> str:
    """Both ways in one line, without the texts."""
    said: dict[str, Any] = {"environment": environment(), "work": asdict(work)}
    for way, found in (("text", text), ("tree", tree)):
        figures = asdict(found)
        del figures["candidates"], figures["scores"]
        said[way] = {name: round(value, 3) for name, value in figures.items()}
    said["candidates"] = {
        "text": len(text.candidates),
        "tree": len(tree.candidates),
        "same": num_same(text, tree),
    }
    return json.dumps(said)


def main(argv: Sequence[str] | None = None) -> tuple[Found, Found]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(DEFAULTS), default="smollm2")
    parser.add_argument("--prompt-tokens", type=int)
    parser.add_argument("--width", type=int, default=4)
    parser.add_argument("--expand", type=int, default=4)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--step-tokens", type=int, help="at most, of one step")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of the 8b shape, as a rule bfloat16"
    )
    parser.add_argument("--way", choices=("text", "tree"), help=argparse.SUPPRESS)
    arguments = vars(parser.parse_args(argv))
    way = arguments.pop("way")
    if arguments["shape"] != "8b" and arguments["dtype"] is not None:
        parser.error("--dtype is for --shape 8b")
    given = {name: value for name, value in arguments.items() if value is not None}
    work = Work(**{**DEFAULTS[arguments["shape"]], **given})
    if way is not None:
        print(json.dumps(asdict(search(way, work))))
        sys.exit()
    print(f"{work}", flush=True)
    if work.shape == "8b":
        text, tree = search_warm(work, *load(work.shape, work.dtype))
    else:
        text, tree = (in_its_own_process(way, work) for way in ("text", "tree"))
    print(report(text, tree))
    print(as_json(work, text, tree))
    return text, tree


if __name__ == "__main__":
    main()
