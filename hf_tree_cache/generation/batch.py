"""LiveBatch: the rows of a decoding loop, kept in step with their cache."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig

from ..errors import UnsupportedModel
from ..integration.cache import TreeCache
from ..naming import CACHE
from ..sending import to_device
from .processors import BranchBatch
from .record import GenerationTree
from .step_inputs import StepInputs


@dataclass
class LiveBatch:
    """One row for each live branch: tokens, model arguments, and what is known of the branch.

    Attributes:
        input_ids: ``[R, L]`` int64, left-padded prompt and generated tokens.
        inputs: what the model gets besides the tokens.
        nodes: leaf of each row in the record.
        prompts: prompt of each row.
        branches: branch of each row in the cache; known after the prefill.
        lengths: generated tokens of each row.
        logprobs: sum of their log-probs.
        last_tokens: each row's last token.
    """

    input_ids: torch.Tensor
    inputs: StepInputs
    nodes: list[int]
    prompts: list[int]
    lengths: list[int]
    logprobs: list[float]
    branches: list[int] = field(default_factory=list)
    last_tokens: list[int] = field(default_factory=list)
    _cache: TreeCache | None = None

    @classmethod
    def of(
        cls, input_ids: torch.Tensor, model_kwargs: dict[str, Any], tree: GenerationTree
    ) -> LiveBatch:
        """Rows as ``generate`` passes them; equal rows are branches of one prompt of the record."""
        given = model_kwargs.get("attention_mask")
        mask = given if isinstance(given, torch.Tensor) else torch.ones_like(input_ids)
        hides = not bool(mask.all())
        if mask.shape != input_ids.shape:
            mask = torch.ones_like(input_ids)
        rows, kept = input_ids.cpu().numpy(), mask.bool().cpu().numpy()
        contents = (
            [row[keep] for row, keep in zip(rows, kept, strict=True)] if hides else list(rows)
        )
        embeddings = model_kwargs.get("inputs_embeds")
        keys: Sequence[Hashable] = [content.tobytes() for content in contents]
        if embeddings is not None:  # a prompt without tokens
            keys = _first_equals(embeddings)
        prompts: dict[Hashable, int] = {}
        roots: list[int] = []
        nodes, of_row = [], []
        for content, key in zip(contents, keys, strict=True):
            if key not in prompts:
                prompts[key] = len(roots)
                roots.append(tree.add_prompt(content.tolist()))
            of_row.append(prompts[key])
            nodes.append(tree.open_branch(roots[of_row[-1]]))
        count = len(nodes)
        inputs = StepInputs(model_kwargs, hides=hides)
        made = cls(input_ids, inputs, nodes, of_row, [0] * count, [0.0] * count)
        made.last_tokens = rows[:, -1:].flatten().tolist()
        return made

    def __len__(self) -> int:
        return len(self.nodes)

    def prefill(self, model: Any, config: GenerationConfig, cache: TreeCache) -> torch.Tensor:
        """Run the prompts; ``[R, V]`` logits of their last tokens, as the model has them.

        Raises:
            UnsupportedModel: it keeps its past elsewhere than in the cache.
        """
        outputs = model._prefill(self.input_ids, config, self.inputs.kwargs)
        if len(cache.rows) != len(self):
            raise UnsupportedModel(
                f"tree_generate: {type(model).__name__} ran {len(self)} rows and left "
                f"{len(cache.rows)} in the TreeCache: it keeps its past in a format of its own, "
                "which cannot fork. Use generate without custom_generate."
            )
        self._cache = cache
        self.branches = [int(branch) for branch in cache.rows]
        return self._take(model, outputs)

    def forward(self, model: Any) -> torch.Tensor:
        """Run the last token of every row; ``[R, V]`` logits, as the model has them."""
        inputs = self.inputs.of_step(model, self.input_ids)
        return self._take(model, model(**inputs, return_dict=True))

    def select(self, rows: Sequence[int], *, hold: bool = False) -> None:
        """Row i becomes old row ``rows[i]``, here and in the cache.

        Args:
            hold: keep rows that are not named in the cache as held branches; then none may be named
                twice.
        """
        if list(rows) == list(range(len(self))):
            return
        assert self._cache is not None
        cache = self.inputs.kwargs[CACHE]
        if hold:
            cache.set_rows([self._cache.rows[row] for row in rows])
        else:
            cache.reorder_cache(torch.tensor(rows, dtype=torch.int64))
        index = to_device(rows, self.input_ids.device)
        self.inputs.select(index, len(self))
        self.input_ids = self.input_ids.index_select(0, index)
        self.nodes = [self.nodes[row] for row in rows]
        self.prompts = [self.prompts[row] for row in rows]
        self.lengths = [self.lengths[row] for row in rows]
        self.logprobs = [self.logprobs[row] for row in rows]
        self.last_tokens = [self.last_tokens[row] for row in rows]
        self.branches = [int(branch) for branch in self._cache.rows]

    def view(self) -> BranchBatch:
        """What processors may know of the rows."""
        return BranchBatch(
            tuple(self.branches),
            tuple(self.prompts),
            tuple(self.lengths),
            tuple(self.logprobs),
            tuple(self.last_tokens),
        )

    def note(self, tokens: list[int], logprobs: list[float], tree: GenerationTree) -> None:
        """Book the tokens that each row got last."""
        self.last_tokens = tokens
        for row, (token, logprob) in enumerate(zip(tokens, logprobs, strict=True)):
            tree.append(self.nodes[row], token, logprob)
            self.lengths[row] += 1
            self.logprobs[row] += logprob

    def _take(self, model: Any, outputs: Any) -> torch.Tensor:
        self.inputs.advance(model, outputs)
        logits = outputs.logits[:, -1].to(self.input_ids.device)
        # Else the logits of a whole prompt would stay.
        return logits.clone() if outputs.logits.shape[1] > 1 else logits


def _first_equals(rows: torch.Tensor) -> list[int]:
    """For each of ``rows`` the first that equals it. Compared where they are: they may be large."""
    found, distinct = [], list[int]()
    for i, row in enumerate(rows):
        first = next((j for j in distinct if torch.equal(rows[j], row)), i)
        if first == i:
            distinct.append(i)
        found.append(first)
    return found
