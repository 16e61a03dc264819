"""The attention and mask functions registered with transformers as "tree_attention"."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..attention.dispatch import run_tree_attention, takes_kernel
from ..attention.latents import tree_attention_latents
from ..attention.plan import Window
from ..errors import UnsupportedModel
from .handles import CompiledKV, PagedKV, TreeMask
from .latent import LatentKV

NAME = "tree_attention"
"""``attn_implementation`` of a model that reads a TreeCache in place."""

KNOWN_KWARGS = frozenset(
    {
        "sliding_window",  # says again what the mask says
        "position_ids",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "logits_to_keep",
        "is_causal",
        "cu_seq_lens_q",
        "cu_seq_lens_k",
        "max_length_q",
        "max_length_k",
    }
)
"""Keywords that do not change the result of a forward over a cache. Any other one that is not None
means something we do not know, and sends the call to the dense path."""


SDPA_KWARGS = frozenset(inspect.signature(sdpa_attention_forward).parameters)
"""Keywords that transformers' sdpa heeds."""


def tree_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor | PagedKV | CompiledKV,
    value: torch.Tensor | PagedKV | CompiledKV,
    attention_mask: torch.Tensor | TreeMask | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of a transformers model, over a TreeCache's blocks where they can be read in place.

    Args:
        module: the attention layer.
        query: ``[B, Hq, T, Dk]``.
        key, value: handles of a TreeCache, or dense ``[B, Hkv, L, D]`` tensors.
        attention_mask: what :func:`tree_attention_mask` made, or a mask of the caller's.
        scaling: factor on the scores, default ``Dk ** -0.5``.
        dropout: probability; only the dense path knows it.
        softcap: see :func:`~hf_tree_cache.attention.reference.tree_attention_reference`.
        s_aux: ``[Hq]`` sink logits.

    Returns:
        ``[B, T, Hq, Dv]``, and None for the weights, which are never made.
    """
    if isinstance(key, CompiledKV):
        _refuse_unknown(kwargs, frozenset())
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        out = torch.ops.hf_tree_cache.decode_attention(
            query, key.keys, key.values, key.place, scale, softcap, s_aux
        )
        return out, None
    assert not isinstance(value, CompiledKV)
    if isinstance(key, PagedKV) and isinstance(value, PagedKV) and key.source is value.source:
        if key.source.storage.forgets:
            key.source.note_read(_reach(attention_mask))
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        causal_alone = _hides_later_tokens_only(key, attention_mask) and _has_fused_sdpa(query, key)
        plain = causal_alone and softcap is None and s_aux is None
        found: tuple[Window | None, str | None] = (None, "no past")
        if not key.source.step.fresh or (not plain and _may_begin_in_place(query, key, scale)):
            found = _find_obstacle(module, query, key, attention_mask, dropout, kwargs)
        window, obstacle = found
        if obstacle is None:
            out = _attend(query, key, scale, window, softcap, s_aux)
            return out.transpose(1, 2), None
        if causal_alone and _is_causal(module, kwargs):
            attention_mask = None
        key, value = key.both(obstacle)
    return _dense_attention(
        module, query, key, value, attention_mask, scaling, dropout, softcap, s_aux, kwargs
    )


def tree_attention_mask(**arguments: Any) -> TreeMask | None:
    """A mask that becomes a tensor only if somebody needs one.

    None where transformers' own sdpa mask would be: plain causal without padding, one query or no
    past.
    """
    ready = arguments.get("attention_mask")
    if isinstance(ready, TreeMask):  # generate makes it ahead for caches of fixed size
        return ready
    mask = TreeMask(arguments)
    recognised, window = mask.pattern
    plain = recognised and window is None and mask.padding is None
    plain = plain and arguments.get("allow_is_causal_skip", True)
    q_length, kv_length = arguments["q_length"], arguments["kv_length"]
    if plain and (q_length == 1 or q_length == kv_length):
        return None
    return mask


def register() -> None:
    """Make ``attn_implementation="tree_attention"`` known to transformers. Done at import."""
    AttentionInterface.register(NAME, tree_attention_forward)
    AttentionMaskInterface.register(NAME, tree_attention_mask)


def _attend(
    query: torch.Tensor,
    key: PagedKV,
    scale: float,
    window: Window | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """``[B, Hq, T, Dv]``, from the blocks in place."""
    kv, q = key.source, query.detach()
    where = q, kv.storage, kv.layer, kv.step.plan
    if isinstance(key, LatentKV):
        out, _ = tree_attention_latents(
            *where,
            key.expanded.expansion(q.shape[1]),
            scale=scale,
            window=window,
            softcap=softcap,
            sinks=sinks,
            backend=kv.backend,
        )
        return kv.guard(out, query, *key.expanded.weights)
    if kv.attend is not None:
        return kv.attend(kv, q, scale=scale, window=window, softcap=softcap, sinks=sinks)
    out, _ = run_tree_attention(
        *where, backend=kv.backend, scale=scale, window=window, softcap=softcap, sinks=sinks
    )
    return kv.guard(out, query)


def _find_obstacle(
    module: nn.Module,
    query: torch.Tensor,
    key: PagedKV,
    mask: torch.Tensor | TreeMask | None,
    dropout: float,
    kwargs: dict[str, Any],
) -> tuple[Window | None, str | None]:
    """(window, why the blocks cannot be read in place; None when they can)."""
    kv, step = key.source, key.source.step
    if not step.alive:
        return None, "stale"
    unknown = [k for k, v in kwargs.items() if v is not None and k not in KNOWN_KWARGS]
    if unknown:
        return None, f"unknown keyword {unknown[0]}"
    if dropout and module.training:
        return None, "dropout"
    num_rows, num_q_heads, num_new, head_dim = query.shape
    spec = kv.storage.spec
    if isinstance(key, LatentKV):
        if kv.attend is not None:
            return None, "latents"
        if step.plan.deterministic:
            return None, "latents and deterministic"
        if query.dtype != spec.dtype or torch.is_autocast_enabled(query.device.type):
            return None, "query of another kind"
    elif (
        query.dtype != spec.dtype or head_dim != spec.k_head_dim or num_q_heads % spec.num_kv_heads
    ):
        return None, "query of another kind"
    if (num_rows, num_new) != (len(step.counts), step.num_new):
        return None, "query of another shape"
    if num_new > 1 and not _is_causal(module, kwargs):
        return None, "not causal"
    if mask is None:
        return None, None
    if not isinstance(mask, TreeMask):
        return None, "a mask of the caller's"
    recognised, window = mask.pattern
    if not recognised:
        return None, "unrecognised mask"
    if not step.padding_known and not mask.all_tokens:
        return None, "padding"
    return window, None


def _hides_later_tokens_only(key: PagedKV, mask: torch.Tensor | TreeMask | None) -> bool:
    """Whether, in a first forward, ``mask`` does nothing that ``is_causal`` does not: no padding,
    no window that ends within the prompt."""
    step = key.source.step
    if not step.fresh or min(step.counts, default=0) < step.num_new:
        return False
    if not isinstance(mask, TreeMask):
        return mask is None
    recognised, window = mask.pattern
    if not recognised or (window is not None and window.size < step.num_new):
        return False
    return step.padding_known or mask.padding is None


def _has_fused_sdpa(query: torch.Tensor, key: PagedKV) -> bool:
    """Whether torch attends to grouped heads without a mask in one kernel; else it would write all
    scores, which with a mask it need not."""
    if not query.is_cuda:
        return True
    head_dim = query.shape[-1]
    fits = head_dim % 8 == 0 and head_dim <= 256 and key.source.new[1].shape[-1] == head_dim
    is_half = query.dtype in (torch.bfloat16, torch.float16)
    return fits and is_half and torch.cuda.get_device_capability(query.device)[0] >= 8


def _may_begin_in_place(query: torch.Tensor, key: PagedKV, scale: float) -> bool:
    """Whether a first forward may read blocks, too, where sdpa would need a mask or a formula.

    Stored K/V have no gradient; those that the model has just made have.
    """
    kv = key.source
    if isinstance(key, LatentKV) or not takes_kernel(kv.backend, query, kv.storage, scale):
        return False
    made = (query, *kv.new)
    return not (torch.is_grad_enabled() and any(x.requires_grad for x in made))


def _reach(mask: torch.Tensor | TreeMask | None) -> int | None:
    """Tokens that ``mask`` lets a query look back to at most; None where that is not known.

    A tensor is read, which waits for a GPU: models that cut masks have one in a prompt.
    """
    if isinstance(mask, TreeMask):
        recognised, window = mask.pattern
        return window.size if recognised and window is not None else None
    if mask is None or mask.ndim != 4:
        return None
    lowest = torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else 0
    seen = mask > lowest
    num_new, columns = mask.shape[2:]
    own = torch.arange(columns - num_new, columns, device=mask.device)
    reach = (own + 1 - seen.int().argmax(-1)).masked_fill(~seen.any(-1), 0)
    return int(reach.max())


def _is_causal(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    causal = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if causal is None else causal)


def _refuse_unknown(kwargs: dict[str, Any], known: frozenset[str]) -> None:
    """Never swallow a keyword that may change the result.

    Raises:
        UnsupportedModel: nobody below would heed it.
    """
    unknown = [k for k, v in kwargs.items() if v is not None and k not in KNOWN_KWARGS | known]
    if unknown:
        raise UnsupportedModel(
            f"The model's attention passes {unknown[0]!r}, which neither tree attention nor sdpa "
            "knows; going on without it would be wrong. Do not enable tree attention for it "
            "(call disable() on what enable_tree_attention returned): it keeps its own then."
        )


def _dense_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor | PagedKV,
    value: torch.Tensor | PagedKV,
    mask: torch.Tensor | TreeMask | None,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, None]:
    """transformers' sdpa, or its eager formula where softcap or sinks rule sdpa out."""
    plain = softcap is None and sinks is None
    _refuse_unknown(kwargs, SDPA_KWARGS if plain else frozenset())
    key = key.dense() if isinstance(key, PagedKV) else key
    value = value.dense() if isinstance(value, PagedKV) else value
    mask = mask.dense() if isinstance(mask, TreeMask) else mask
    num_new, length = query.shape[2], key.shape[2]
    if mask is None and 1 < num_new < length and _is_causal(module, kwargs):
        # No mask was needed for all queries; these are the last ones.
        ones = torch.ones(num_new, length, dtype=torch.bool, device=query.device)
        mask = ones.tril(length - num_new)[None, None]
    if plain:
        return sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs
        )
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query @ key.transpose(2, 3) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None and num_new > 1:
        mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        # The lowest finite number, not -inf: a row of padding must not become NaN.
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    if sinks is not None:
        column = sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column.to(scores.dtype)], -1)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)[..., : key.shape[2]]
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), None


register()
