"""Trains the puzzle model and its verifier from scratch; minutes on a GPU, seconds with --smoke.

    python examples/puzzle/train.py --minutes 4 --out examples/puzzle

The model is a small Llama that learns solutions of random Countdown puzzles. The verifier is a
smaller one with a head: behind each step it says whether the target can still be reached. A fifth
of the time goes to the verifier. Writes `model.safetensors`, `config.json`, the tokenizer,
`verifier/` and `training.json` with the losses and the accuracy on held-out puzzles.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from puzzle.data import COUNTS, Batch, solutions, stream, verdicts
from puzzle.task import Puzzle, check, held_out_puzzles
from puzzle.vocabulary import END, IDS, PAD, SYMBOLS, tokenizer


@dataclass(frozen=True)
class Shape:
    """A Llama: hidden size, layers, width of the MLP, heads of 64."""

    hidden: int
    layers: int
    mlp: int

    def config(self, **more: Any) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=len(SYMBOLS),
            hidden_size=self.hidden,
            intermediate_size=self.mlp,
            num_hidden_layers=self.layers,
            num_attention_heads=self.hidden // 64,
            num_key_value_heads=max(self.hidden // 128, 1),
            head_dim=64,
            max_position_embeddings=256,
            rope_parameters={"rope_type": "default", "rope_theta": 1_000.0},
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=IDS[END],
            pad_token_id=IDS[PAD],
            **more,
        )


MODEL, VERIFIER = Shape(256, 6, 640), Shape(128, 4, 384)
SMOKE = Shape(64, 2, 128)


@dataclass(frozen=True)
class Plan:
    """How to train: at most ``seconds``, not counting evaluations, and at most ``steps``."""

    seconds: float
    steps: int
    batch: int
    rate: float
    every: float
    device: str


def train(
    model: nn.Module,
    loss_of: Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor],
    batches: Iterator[Batch],
    plan: Plan,
    evaluate: Callable[[], dict[str, Any]],
) -> list[dict[str, Any]]:
    """Trains ``model`` in place and returns the log, one row every ``plan.every`` seconds."""
    fused = torch.device(plan.device).type == "cuda"
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.98), weight_decay=0.05, fused=fused
    )
    log: list[dict[str, Any]] = []
    begin = time.perf_counter()
    paused, shown, total, step = 0.0, 0.0, torch.zeros((), device=plan.device), 0
    last = 0
    while True:
        spent = time.perf_counter() - begin - paused
        done = max(spent / plan.seconds, step / plan.steps)
        if spent - shown >= plan.every or done >= 1:
            pause, shown = time.perf_counter(), spent
            row = {"seconds": round(spent, 1), "step": step}
            row |= {"loss": round(total.item() / max(step - last, 1), 4)} | evaluate()
            log.append(row)
            print(json.dumps(row), flush=True)
            total.zero_()
            last, paused = step, paused + time.perf_counter() - pause
        if done >= 1:
            return log
        # Warm up over 200 steps, then down a cosine to nothing.
        scale = min(1, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = plan.rate * scale
        batch = next(batches)
        ids = torch.from_numpy(batch.ids).to(plan.device, torch.int64)
        targets = torch.from_numpy(batch.targets).to(plan.device, torch.int64)
        device_type = torch.device(plan.device).type
        with torch.autocast(device_type, torch.bfloat16, enabled=device_type == "cuda"):
            loss = loss_of(model, ids, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        total += loss.detach()
        step += 1


def next_symbol_loss(model: Any, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids, use_cache=False).logits
    return nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1
    )


def verdict_loss(model: Any, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    scores, wanted = _verdicts(model, ids, targets)
    return nn.functional.binary_cross_entropy_with_logits(scores, wanted)


def _verdicts(
    model: Any, ids: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    asked = targets >= 0
    return model.score(hidden[asked]).squeeze(-1).float(), targets[asked].float()


@torch.inference_mode()
def sample(
    model: Any, puzzles: list[Puzzle], samples: int, temperature: float, rows: int = 8_192
) -> list[list[str]]:
    """What the model writes behind each puzzle, ``samples`` times; greedily at temperature 0."""
    words = tokenizer()
    out: list[list[str]] = []
    for first in range(0, len(puzzles), max(rows // samples, 1)):
        part = puzzles[first : first + max(rows // samples, 1)]
        inputs = words([p.prompt for p in part], return_tensors="pt", padding=True)
        inputs = {k: inputs[k].to(model.device) for k in ("input_ids", "attention_mask")}
        width = inputs["input_ids"].shape[1]
        choice = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
        ids = model.generate(**inputs, num_return_sequences=samples, max_new_tokens=96, **choice)[
            :, width:
        ]
        texts = words.batch_decode(ids, skip_special_tokens=True)
        out += [texts[i * samples : (i + 1) * samples] for i in range(len(part))]
    return out


def accuracy(
    model: Any, puzzles: list[Puzzle], samples: int = 1, temperature: float = 0.0
) -> dict[str, float]:
    """The share of ``puzzles`` solved by one of k samples, for k = 1, 4, 16 ... ``samples``, and
    the share of samples whose every line is a valid step.
    """
    model.eval()
    texts = sample(model, puzzles, samples, temperature)
    model.train()
    checks = [[check(p, text) for text in found] for p, found in zip(puzzles, texts, strict=True)]
    solved = [sum(c.solved for c in found) for found in checks]
    out = {}
    k = 1
    while k <= samples:
        # Unbiased (Chen et al. 2021, https://arxiv.org/abs/2107.03374).
        misses = [math.comb(samples - n, k) / math.comb(samples, k) for n in solved]
        out[f"pass@{k}"] = round(1 - sum(misses) / len(misses), 4)
        k *= 4
    valid = [not c.error and len(c.left) == 1 for found in checks for c in found]
    return out | {"valid": round(sum(valid) / len(valid), 4)}


@torch.inference_mode()
def verdict_quality(model: Any, batches: list[Batch]) -> dict[str, float]:
    """Log loss, accuracy and the area under the ROC curve on batches never trained on."""
    model.eval()
    pairs = []
    for batch in batches:
        ids = torch.from_numpy(batch.ids).to(model.device, torch.int64)
        targets = torch.from_numpy(batch.targets).to(model.device, torch.int64)
        pairs.append(_verdicts(model, ids, targets))
    model.train()
    scores, wanted = (torch.cat(parts).cpu() for parts in zip(*pairs, strict=True))
    ranks = scores.argsort().argsort().double() + 1
    good = wanted > 0.5
    n, m = int(good.sum()), int((~good).sum())
    auc = (ranks[good].sum() - n * (n + 1) / 2) / (n * m)
    loss = nn.functional.binary_cross_entropy_with_logits(scores, wanted)
    right = ((scores > 0) == good).double().mean()
    return {
        "log_loss": round(loss.item(), 4),
        "accuracy": round(right.item(), 4),
        "auc": round(auc.item(), 4),
    }


def save(model: Any, folder: Path) -> None:
    """Writes the model; turns its weights to bfloat16."""
    model.to(torch.bfloat16).save_pretrained(folder)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for everything written")
    parser.add_argument("--minutes", type=float, default=4.0, help="of training, both models")
    parser.add_argument("--batch", type=int, default=2_048)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=14, help="processes that make the data")
    parser.add_argument("--puzzles", type=int, default=512, help="held-out ones of each size")
    parser.add_argument("--samples", type=int, default=64, help="of each puzzle at the end")
    parser.add_argument("--smoke", action="store_true", help="tiny, on the CPU, in seconds")
    arguments = parser.parse_args(argv)
    model_shape, verifier_shape, every, steps = MODEL, VERIFIER, 30.0, sys.maxsize
    if arguments.smoke:
        arguments.batch, arguments.workers, arguments.puzzles, arguments.samples = 32, 0, 4, 4
        model_shape = verifier_shape = SMOKE
        steps, every = 10, 1e9
    seconds = 60 * arguments.minutes
    torch.manual_seed(arguments.seed)

    # Both before CUDA is touched: the workers are forked.
    source = (arguments.batch, arguments.seed, arguments.workers)
    lessons, cases = stream(solutions, *source), stream(verdicts, *source)
    first = [next(lessons), next(cases)]
    device = "cuda" if torch.cuda.is_available() and not arguments.smoke else "cpu"
    torch.set_float32_matmul_precision("high")
    puzzles = {n: held_out_puzzles(arguments.puzzles, n) for n in COUNTS}
    print(f"{device}, {arguments.workers} workers, batches of {first[0].ids.shape}", flush=True)

    model = LlamaForCausalLM(model_shape.config()).to(device)
    plan = Plan(0.8 * seconds, steps, arguments.batch, arguments.rate, every, device)
    size = sum(p.numel() for p in model.parameters())
    print(f"model: {size:,} parameters", flush=True)
    log = train(
        model,
        next_symbol_loss,
        lessons,
        plan,
        lambda: {f"greedy {n}": accuracy(model, p[:256])["pass@1"] for n, p in puzzles.items()},
    )
    lessons.close()
    # What is measured from here on is what is saved.
    save(model, arguments.out)
    tokenizer().save_pretrained(arguments.out)
    figures: dict[str, Any] = {"greedy": {n: accuracy(model, p) for n, p in puzzles.items()}}
    figures["temperature 1"] = {
        n: accuracy(model, p, arguments.samples, 1.0) for n, p in puzzles.items()
    }
    print(json.dumps(figures), flush=True)

    verifier_config = verifier_shape.config(num_labels=1)
    verifier = LlamaForSequenceClassification(verifier_config).to(device)
    plan = Plan(0.2 * seconds, steps, arguments.batch, arguments.rate, every, device)
    # These batches are never trained on, but their numbers may be.
    kept = [first[1], *(next(cases) for _ in range(3))]
    verifier_log = train(
        verifier, verdict_loss, cases, plan, lambda: verdict_quality(verifier, kept)
    )
    cases.close()
    save(verifier, arguments.out / "verifier")
    report = {
        "environment": {
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": sys.version.split()[0],
        },
        "arguments": {k: v for k, v in vars(arguments).items() if k != "out"},
        "model": asdict(model_shape) | {"parameters": size, "log": log},
        "verifier": asdict(verifier_shape)
        | {"parameters": sum(p.numel() for p in verifier.parameters()), "log": verifier_log},
        "held_out": figures,
    }
    (arguments.out / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(figures), flush=True)
    return report


if __name__ == "__main__":
    main()
