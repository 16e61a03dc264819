"""enable_tree_attention: a model reads TreeCaches in place and computes repeated prompts once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.utils import logging

from ..errors import InvalidArgument, UnsupportedModel
from .attention import NAME
from .cache import TreeCache

logger = logging.get_logger(__name__)


def enable_tree_attention(
    model: nn.Module, *, replace_default_cache: bool = False
) -> EnabledTreeAttention:
    """Switch ``model`` to tree attention, in place.

    - Its attention reads the blocks of a :class:`TreeCache` where they are; with any other cache,
      in training and in encoders it runs transformers' sdpa as before.
    - Equal rows of a prompt (``num_return_sequences``, ``num_beams``, repeated prompts of a batch,
      each chunk of a chunked prefill) are computed once and forked.
    - A bare ``TreeCache()`` is configured from the model at its first forward.
    - A forward that fails leaves the cache as it was.

    Models that do not use transformers' attention interface (bloom, falcon, gptj, ...) keep their
    own attention and read dense copies; the rest of the above holds for them too.

    Args:
        model: a transformers model, or a PEFT model around one.
        replace_default_cache: put a TreeCache in the place of the empty DynamicCache that
            ``generate`` makes for callers who pass no cache.

    Returns:
        A handle to undo it: ``handle.disable()``, or use it as a context manager.

    Raises:
        InvalidArgument: not a transformers model, or one that is enabled already.
    """
    unwrap: Any = getattr(model, "get_base_model", lambda: model)
    base = unwrap()
    if not isinstance(base, PreTrainedModel):
        raise InvalidArgument(
            f"enable_tree_attention({type(model).__name__}): expected a transformers model."
        )
    if any(isinstance(hook, _Hooks) for hook in base._forward_pre_hooks.values()):
        raise InvalidArgument(
            f"enable_tree_attention: this {type(base).__name__} is enabled already. Keep the "
            "handle of the first call and disable() it, or write `with enable_tree_attention(...)`."
        )
    return EnabledTreeAttention(base, replace_default_cache)


class EnabledTreeAttention:
    """Undoes :func:`enable_tree_attention`; a context manager that does so at its end."""

    def __init__(self, model: PreTrainedModel, replace_default_cache: bool) -> None:
        self._model = model
        self._previous = [(c, c._attn_implementation_internal) for c in _configs(model)]
        _set_implementation(model)
        if replace_default_cache:
            model._prepare_cache_for_generation = _with_tree_cache(model)
        hooks = _Hooks()
        self._handles = [
            model.register_forward_pre_hook(hooks, with_kwargs=True),
            model.register_forward_hook(hooks.after, with_kwargs=True, always_call=True),
        ]

    def disable(self) -> None:
        """Give the model back as it was; caches stay usable, read densely. Harmless twice."""
        for handle in self._handles:
            handle.remove()
        for config, implementation in self._previous:
            config._attn_implementation_internal = implementation
        self._handles, self._previous = [], []
        self._model.__dict__.pop("_prepare_cache_for_generation", None)

    def __enter__(self) -> EnabledTreeAttention:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.disable()


def _with_tree_cache(model: PreTrainedModel) -> Callable[..., Any]:
    """``generate``'s choice of a cache, but a TreeCache where it makes a plain default one."""
    prepare = model._prepare_cache_for_generation

    def choose(generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any):
        given = model_kwargs.get("past_key_values")
        result = prepare(generation_config, model_kwargs, *args, **kwargs)
        made: Any = model_kwargs.get("past_key_values")
        plain = type(made) is DynamicCache and not made.offloading
        if given is None and plain and not generation_config.is_assistant:
            model_kwargs["past_key_values"] = TreeCache()
        return result

    return choose


def _configs(model: PreTrainedModel) -> list[Any]:
    """Every config of the model and of the models within it, each once."""
    configs = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    for config in configs:
        subs = (getattr(config, key, None) for key in config.sub_configs)
        configs.extend(
            sub for sub in subs if sub is not None and all(sub is not c for c in configs)
        )
    return list({id(config): config for config in configs}.values())


def _set_implementation(model: PreTrainedModel) -> None:
    text = model.config.get_text_config(decoder=True)
    if not model._can_set_attn_implementation():
        logger.info("%s has its own attention: TreeCache is read densely.", type(model).__name__)
        return
    if text is model.config or model.config.is_encoder_decoder:
        model.set_attn_implementation(NAME)
        return
    key = next(
        (key for key in model.config.sub_configs if getattr(model.config, key) is text), None
    )
    model.set_attn_implementation(NAME if key is None else {key: NAME})


@dataclass
class _Collapsed:
    """What the hook after a forward has to expand again.

    Attributes:
        inverse: computed row of each row of the caller.
        num_computed: U, rows that went through the model.
    """

    inverse: list[int]
    num_computed: int


class _Hooks:
    """The pair of hooks around a model's forward. Holds only what one forward hands to its end."""

    def __init__(self) -> None:
        self._open: list[tuple[TreeCache | None, _Collapsed | None]] = []

    def __call__(
        self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        cache: Any = kwargs.get("past_key_values")
        self._open.append((None, None))
        if isinstance(cache, EncoderDecoderCache):
            inner = cache.self_attention_cache
            if isinstance(inner, TreeCache):
                inner.advise = False
                inner.configure(model.config)
                self._open[-1] = (inner, None)
            return args, kwargs
        if not isinstance(cache, TreeCache):
            return args, kwargs
        if model.config.is_encoder_decoder:
            raise UnsupportedModel(
                f"{type(model).__name__} is an encoder-decoder: pass past_key_values="
                "EncoderDecoderCache(TreeCache(), TreeCache()) instead of a bare TreeCache."
            )
        cache.advise = False
        cache.configure(model.config)
        forward = _Forward(cache, args, kwargs)
        self._open[-1] = (cache, forward.prepare())
        return forward.args, forward.kwargs

    def after(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        # A pre-hook before ours may have failed; torch then calls this one all the same.
        cache, collapsed = self._open.pop() if self._open else (None, None)
        if cache is None:
            return output
        if output is None:
            cache.rollback()
        else:
            cache.finish()
        if collapsed is None:
            return output
        if cache.rows:
            cache.select(collapsed.inverse)
        return None if output is None else _expand_output(output, collapsed)


class _Forward:
    """The arguments of one forward over a TreeCache, made ready for it."""

    def __init__(self, cache: TreeCache, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.cache = cache
        self.args = args
        self.kwargs = kwargs

    @property
    def ids(self) -> torch.Tensor | None:
        return self.args[0] if self.args else self.kwargs.get("input_ids")

    @property
    def mask(self) -> torch.Tensor | None:
        """The 2-D attention mask, if there is one."""
        mask = self.kwargs.get("attention_mask")
        return mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None

    def prepare(self) -> _Collapsed | None:
        """Collapse equal rows, read the padding, and decide the step. Decoding reads nothing."""
        cache = self.cache
        inputs = self.ids if self.ids is not None else self.kwargs.get("inputs_embeds")
        if inputs is None:
            return None
        asked, num_new = inputs.shape[:2]
        if num_new == 0:
            raise InvalidArgument(
                "The forward has no tokens: an empty prompt, or a prompt that is cached already."
            )
        before = cache.get_seq_length()
        if num_new == 1 and before:
            odd = self._hides_more_than_padding(before)
            cache.begin(asked, 1, padding_known=not odd, odd_mask=odd)
            return None
        if before:
            self._reject_repeated_prompt(before, num_new)
        collapsed = self._collapse(asked) if num_new > 1 else None
        mask = None if self.mask is None else self.mask.bool().cpu()
        num_rows = asked if collapsed is None else collapsed.num_computed
        counts, odd = _read_padding(cache, mask, num_rows, num_new, before)
        try:
            cache.begin(
                num_rows,
                num_new,
                counts=counts,
                asked_rows=asked,
                padding_known=not odd,
                odd_mask=odd,
            )
        except BaseException:
            if collapsed is not None and before:
                cache.select(collapsed.inverse)
            raise
        return collapsed

    def _hides_more_than_padding(self, before: int) -> bool:
        """Whether the mask of a decoding step hides stored tokens.

        On a GPU reading it would wait for the device at every token: there masks may only grow.
        """
        if self.mask is None:
            return False
        if self.mask.shape[1] != before + 1:
            return True
        if self.mask.device.type != "cpu":
            return False
        lengths = self.cache.tree.row_lengths()
        return int(self.mask.sum()) * len(lengths) != len(self.mask) * (sum(lengths) + len(lengths))

    def _reject_repeated_prompt(self, before: int, num_new: int) -> None:
        """A prompt that begins again would be appended to itself, and nobody would notice."""
        positions = self.kwargs.get("position_ids")
        if self.mask is not None:
            again = self.mask.shape[1] < before + num_new
        elif isinstance(positions, torch.Tensor) and positions.ndim == 2:
            again = int(positions[:, 0].min()) < min(self.cache.tree.row_lengths(), default=0)
        else:
            return
        if again:
            raise InvalidArgument(
                f"The forward brings {num_new} tokens that begin before the {before} columns that are "
                "cached already, so a prompt would be appended to itself. To compute its last token "
                "again call cache.crop(-1), to start over call cache.reset(), to go on pass the "
                "whole conversation, longer than what is cached."
            )

    def _collapse(self, num_rows: int) -> _Collapsed | None:
        """Keep the first of each set of equal rows, in the arguments and in the cache."""
        tree = self.cache.tree
        batched = self._batched_arguments(num_rows)
        have = len(tree.rows)
        if batched is None or (have and num_rows % have):
            return None
        # A cache with fewer rows would be forked, each row into neighbours.
        fan_out = num_rows // have if have else 1
        contents = [
            value.movedim(dim, 0).reshape(num_rows, -1).cpu().numpy()
            for value, dim in batched.values()
        ]
        pasts = [id(tip) for tip in tree.tips() for _ in range(fan_out)] or [0] * num_rows
        computed: dict[tuple[Any, ...], int] = {}
        first: list[int] = []
        inverse: list[int] = []
        for row, past in enumerate(pasts):
            content = (past, *(rows[row].tobytes() for rows in contents))
            if content not in computed:
                computed[content] = len(first)
                first.append(row)
            inverse.append(computed[content])
        if len(first) == num_rows:
            return None
        for name, (value, dim) in batched.items():
            index = torch.tensor(first, device=value.device)
            self._replace(name, value.index_select(dim, index))
        if have:
            self.cache.select([row // fan_out for row in first])
        return _Collapsed(inverse, len(first))

    def _batched_arguments(self, num_rows: int) -> dict[str, tuple[torch.Tensor, int]] | None:
        """Arguments with a batch, and where they have it; None when rows must not be collapsed."""
        if num_rows < 2 or self.ids is None or len(self.args) > 1 or torch.is_grad_enabled():
            return None
        if self.kwargs.get("labels") is not None or self.kwargs.get("output_router_logits"):
            return None
        batched = {"input_ids": (self.ids, 0)}
        for name, value in self.kwargs.items():
            if isinstance(value, (Mapping, list, tuple)) and value:
                return None
            if not isinstance(value, torch.Tensor):
                continue
            # Pictures and the like: which row they belong to, only the model knows.
            if value.is_floating_point():
                return None
            dim = _batch_dim(name, value, num_rows)
            if dim is not None:
                batched[name] = value, dim
        return batched

    def _replace(self, name: str, value: torch.Tensor) -> None:
        if name == "input_ids" and self.args:
            self.args = (value,)
        else:
            self.kwargs[name] = value


def _batch_dim(name: str, value: torch.Tensor, num_rows: int) -> int | None:
    """Where a forward argument has its batch; None when it has none."""
    if name == "position_ids" and value.ndim == 3:
        return 1 if value.shape[1] == num_rows else None
    return 0 if value.ndim and value.shape[0] == num_rows else None


def _read_padding(
    cache: TreeCache, mask: torch.Tensor | None, num_rows: int, num_new: int, before: int
) -> tuple[list[int] | None, bool]:
    """(new tokens of each row or None for T each, whether more is hidden than left padding)."""
    if mask is None or mask.shape[0] != num_rows:
        return None, mask is not None
    lengths = cache.tree.row_lengths() or [0] * num_rows
    if mask.shape[1] != before + num_new or len(lengths) != num_rows:
        return None, not bool(mask.all())
    hidden = (~mask).sum(1)
    leading = (mask.cumsum(1) == 0).sum(1)
    odd = bool((hidden != leading).any())
    past = torch.tensor(lengths)
    # Padding behind a stored token cannot be left out any more: it is stored, and masked.
    new = torch.where(past == 0, (before + num_new - leading).clamp_max(num_new), num_new)
    expected = before - past
    odd |= bool(((past > 0) & (leading != expected)).any())
    return new.tolist(), odd


def _expand_output(output: Any, collapsed: _Collapsed) -> Any:
    """Give every row of the caller its outputs back: repeat along the batch whatever has one."""

    def expand(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if value.ndim < 2 or value.shape[0] != collapsed.num_computed:
                return value
            return value.index_select(0, torch.tensor(collapsed.inverse, device=value.device))
        if type(value) in (tuple, list):
            return type(value)(expand(item) for item in value)
        return value

    if isinstance(output, tuple):
        return expand(output)
    for key in list(output.keys()):
        output[key] = expand(output[key])
    return output
