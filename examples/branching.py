"""A branching policy of your own: every line of a poem goes on in two ways.

python examples/branching.py
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from weights import load_smollm2

from hf_tree_cache import BranchingProcessor, GenerationTree, enable_tree_attention, tree_generate


class Poet(BranchingProcessor):
    """Forks behind a line, ``most`` times a branch; prunes whoever begins two lines alike."""

    def __init__(self, tokenizer: Any, most: int) -> None:
        self.tokenizer = tokenizer
        self.most = most
        self.forks: dict[int, int] = {}  # by branch: rows move, branches do not

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for row, branch in enumerate(self.batch.branches):
            prompt = input_ids.shape[1] - self.batch.lengths[row]
            text = self.tokenizer.decode(input_ids[row, prompt:])
            if not text.endswith("\n"):
                continue
            openings = [line.split()[0] for line in text.splitlines() if line.strip()]
            if len(set(openings)) < len(openings):
                self.prune(row, reason=f"{openings[-1]!r} again")
            elif self.forks.get(branch, 0) < self.most:
                self.fork(row, reason=f"line {len(openings)}")
        return scores

    def on_fork(self, parent: int, children: Sequence[int]) -> None:
        self.forks[parent] = self.forks.get(parent, 0) + 1
        self.forks.update(dict.fromkeys(children, self.forks[parent]))


def main(new_tokens: int = 56, most: int = 3) -> GenerationTree:
    model, tokenizer = load_smollm2()
    enable_tree_attention(model)
    chat = [{"role": "user", "content": "Write a short poem about the sea."}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**inputs, custom_generate=tree_generate, branching=[Poet(tokenizer, most)],
                         max_branches=12, tree_tokenizer=tokenizer, max_new_tokens=new_tokens,
                         do_sample=False, pad_token_id=tokenizer.pad_token_id)  # fmt: skip
    print(out.tree)
    return out.tree


if __name__ == "__main__":
    main()
