"""Which causal language models of transformers run with a TreeCache, and how: docs/models.md.

Every architecture of ``AutoModelForCausalLM`` is made tiny, with random weights, and generates
greedily, by sampling and by beams from prompts of different lengths, with transformers' own cache
and with a TreeCache. Tokens and logits must be the same. Each runs in a process of its own.

    python benchmarks/model_coverage.py [--only llama gemma3_text] [--table]
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import multiprocessing
import os
import resource
import sys
import textwrap
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel, cache_utils
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hf_tree_cache import TreeCache, TreeCacheError, enable_tree_attention
from hf_tree_cache.env import environment
from hf_tree_cache.integration import attention, operands
from hf_tree_cache.integration.layers import HybridPagedLayer, PagedLayer
from hf_tree_cache.naming import CACHE

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks/results/models.json", ROOT / "docs/models.md"
KERNELS = ROOT / "benchmarks/results/kernels_of_models.json"
"""Of benchmarks/kernel_coverage.py."""
TIMEOUT, MEMORY = 60, 12 << 30
VOCAB, PAD = 97, 0
LENGTHS = (20, 15, 12)
"""Of the prompts: longer than every window below."""
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 0, "num_return_sequences": 3},
    "beams": {"do_sample": False, "num_beams": 3},
}
TOLERANCE = 1e-4

Sizes = dict[str, Any]


def _sizes(value: Any, names: str) -> Sizes:
    return dict.fromkeys(names.split(), value)


TINY: Sizes = {
    **_sizes(VOCAB, "vocab_size vocab_size_per_layer_input unpadded_vocab_size"),
    **_sizes(64, "hidden_size n_embd d_model emb_dim embedding_size input_embedding_size"),
    **_sizes(64, "output_embedding_size word_embed_proj_dim hidden_size_global embedding_dim"),
    **_sizes(64, "attention_hidden_size lru_width dim_model_base backbone_hidden_size"),
    **_sizes(3, "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers"),
    **_sizes(3, "num_decoder_layers num_encoder_layers num_blocks"),
    **_sizes(4, "num_attention_heads n_head n_heads num_heads attention_heads"),
    **_sizes(4, "decoder_attention_heads encoder_attention_heads swa_num_attention_heads"),
    **_sizes(4, "num_decoder_attention_heads num_encoder_attention_heads"),
    **_sizes(2, "num_key_value_heads num_kv_heads swa_num_key_value_heads"),
    **_sizes(16, "head_dim swa_head_dim global_head_dim kv_channels dim_head attention_head_size"),
    **_sizes(64, "intermediate_size n_inner dff dim_ff ffn_dim decoder_ffn_dim encoder_ffn_dim"),
    **_sizes(64, "ffn_hidden_size intermediate_size_mlp feed_forward_size d_inner"),
    **_sizes(64, "dense_intermediate_size block_multiple_of"),
    **_sizes(32, "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size"),
    **_sizes(32, "shared_experts_intermediate_size shared_intermediate_size router_hidden_size"),
    **_sizes(32, "moe_shared_expert_intermediate_size"),
    **_sizes(128, "max_position_embeddings n_positions n_ctx max_seq_len context_length"),
    **_sizes(128, "max_target_positions max_source_positions"),
    # Experts.
    **_sizes(4, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    **_sizes(2, "num_experts_per_tok moe_topk moe_k top_k_experts n_group"),
    **_sizes(1, "topk_group n_shared_experts num_shared_experts moe_num_shared_experts"),
    **_sizes(1, "first_k_dense_replace num_dense_layers num_kv_shared_layers"),
    "zero_expert_num": 2,
    # Latents and indexers.
    **_sizes(32, "kv_lora_rank q_lora_rank o_lora_rank"),
    **_sizes(16, "qk_nope_head_dim v_head_dim index_head_dim indexer_head_dim"),
    **_sizes(8, "qk_rope_head_dim rotary_dim gated_norm_rank laurel_rank hc_lowrank d_rel"),
    **_sizes(2, "index_n_heads indexer_n_heads index_topk_blocks o_groups"),
    "qk_head_dim": 24,
    "index_topk": 6,
    "index_block_size": 4,
    # Windows.
    **_sizes(8, "sliding_window sliding_window_size local_attention window_size rel_extent"),
    **_sizes(8, "attention_window_size attention_chunk_size keep_window_size floor_scale"),
    "local_attention_window_len": 8,
    # States.
    **_sizes(8, "mamba_n_heads mamba_num_heads n_mamba_heads mamba_d_state state_size"),
    **_sizes(8, "ssm_state_size mamba_chunk_size"),
    **_sizes(16, "mamba_d_head mamba_head_dim linear_key_head_dim linear_value_head_dim"),
    **_sizes(2, "linear_num_key_heads n_groups"),
    **_sizes(4, "linear_num_value_heads linear_num_heads"),
    "linear_head_dim": 16,
    "mamba_d_ssm": 128,
    "mamba_dt_rank": 4,
    "hidden_size_per_layer_input": 16,
    # Pictures and sound, built and not used.
    **_sizes(16, "image_size"),
    **_sizes(8, "patch_size"),
    # Low enough to bend the scores of a random model.
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 10.0,
    "query_pre_attn_scalar": 16,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "is_decoder": True,
}
"""What an attribute of a config is set to where a config has it."""

ONLY_IF_SET = {"attn_logit_softcapping", "final_logit_softcapping", "num_kv_shared_layers"}
ONLY_IF_SET |= {"q_lora_rank", "sliding_window", "hidden_size_per_layer_input", "moe_latent_size"}
ONLY_IF_SET |= {"index_topk", "zero_expert_num", "num_shared_experts", "attention_chunk_size"}
"""Attributes that mean a mechanism: left alone where the architecture does without by default."""

LISTS = ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types")
"""One entry a layer: each kind of entry is kept, once if need be."""

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_QSA = {"indexer_kv_heads": 1, "indexer_budget": 6, "indexer_compress_ratio": 2}
SPECIAL: dict[str, Sizes] = {
    "bamba": {"attn_layer_indices": [1]},
    # Otherwise its first forward replaces modules, which draws random numbers.
    **{key: {"attention_type": "original_full"} for key in ("big_bird", "bigbird_pegasus")},
    "blt": {"encoder_hash_byte_group_vocab": 50, "num_key_value_heads": 4},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": None},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 64, "moe_top_k": 2},
    },
    **{
        key: {
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
        }
        for key in ("gemma4", "gemma4_text")
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "jamba": {
        **_sizes(2, "attn_layer_period expert_layer_period"),
        **_sizes(1, "attn_layer_offset expert_layer_offset"),
    },
    **{key: {"layer_types": ["conv", "full_attention", "conv"]} for key in ("lfm2", "lfm2_moe")},
    "longcat_flash": {"head_dim": 8, "num_key_value_heads": 4},
    "mamba2": {"num_heads": 8},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse", "full_attention"]
    },
    "qwen4_exp": _QSA,
    "qwen4_exp_text": _QSA,
    "reformer": {
        "axial_pos_embds_dim": (32, 32),
        "axial_pos_shape": (8, 16),
        **_sizes(8, "local_attn_chunk_length lsh_attn_chunk_length num_buckets"),
    },
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        **{"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
        **{"attention_hidden_size": 128, "attention_head_dim": 32, "n_mamba_heads": 2},
    },
    "zaya": {"num_experts_per_tok": 1},
}
"""What an architecture needs beyond :data:`TINY`."""

TAKES_NONE = (f"not used by the model: ['{CACHE}']", "uses cache of its own")
"""What is said by models that cannot be given a cache."""

OURS = (
    PagedLayer,
    LinearAttentionCacheLayerMixin,
    getattr(cache_utils, "DummyLayer", PagedLayer),  # since transformers 5.23
)
"""Layers whose rows share K/V, have only a state, or have nothing."""

IN_PLACE = (
    (attention, "run_tree_attention"),
    (attention, "tree_attention_latents"),
    (operands, "times_keys"),
)
"""Whatever reads blocks where they are."""

NOT_ALONE = {
    **dict.fromkeys(("musicgen", "musicgen_melody"), "codes of sound, in a generate of its own"),
    "gemma4_assistant": "drafts for another model, whose K/V it is given",
    "gemma4_unified_assistant": "drafts for another model, whose K/V it is given",
}
"""Architectures that the stock ``generate`` cannot run on tokens alone."""

RETRIES: tuple[Sizes, ...] = (
    {},
    _sizes(4, "num_key_value_heads num_kv_heads"),
    _sizes(8, "head_dim"),
    _sizes(4, "num_hidden_layers n_layer n_layers num_layers"),
)
"""Changes to :data:`TINY`, tried in turn until the model runs with transformers' own cache."""


@dataclass
class Result:
    """What one architecture did.

    Attributes:
        name: as in ``model_type``.
        model: its class.
        verdict: one of :data:`VERDICTS`.
        mechanism: what its attention does beyond plain heads.
        reason: why it is not fast, or why it did not run.
        errors: of each mode, largest difference of a logit, relative to the largest logit; "their
            cache" is a model that is enabled, with transformers' own cache.
        dense_reads: reasons for gathered K/V, of all modes.
        seconds: for everything.
    """

    name: str
    model: str
    verdict: str
    mechanism: list[str] = field(default_factory=list)
    reason: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    dense_reads: list[str] = field(default_factory=list)
    seconds: float = 0.0


VERDICTS = {
    "fast": "attention reads the blocks in place, in every layer and at every decoding step",
    "hybrid": "so do its attention layers; states of its other layers are copied at a fork",
    "dense": "the same tokens and logits, from gathered copies of K/V",
    "refused": "raises an error of this package that says why",
    "no cache": "transformers itself gives the model no K/V cache in this format",
    "contested": "transformers contradicts itself: its answer with its cache is not that without",
    "wrong": "other tokens or logits than with transformers' own cache",
    "not run": "no tiny model could be built that runs with transformers' own cache",
}


def tiny_options(name: str, changes: Sizes = {}) -> Sizes:  # noqa: B006
    """Keywords for the config class of ``name``, nested ones included."""
    sizes = {**TINY, **changes, **SPECIAL.get(name, {})}
    return _shrink(_config_class(name)(), sizes, set(changes) | set(SPECIAL.get(name, {})))


def _config_class(name: str) -> Any:
    """What the model class takes: of many a composite config, only a part."""
    config = CONFIG_MAPPING[name]
    wanted = model_class(name).config_class
    return wanted if wanted in config.sub_configs.values() else config


def _shrink(config: PretrainedConfig, sizes: Sizes, special: set[str]) -> Sizes:
    known = {f.name for f in fields(config)}
    options: Sizes = {}
    for key in sorted(known & set(sizes)):
        if key in ONLY_IF_SET - special and not getattr(config, key):
            continue
        options[key] = sizes[key]
    layers = next((options[k] for k in ("num_hidden_layers", "n_layer") if k in options), None)
    for key in LISTS:
        kinds = list(dict.fromkeys(getattr(config, key, None) or ()))
        if key in special or key not in known or not kinds or layers is None:
            continue
        layers = max(layers, len(kinds))
        options[key] = (kinds * layers)[:layers]
    for key in LISTS:
        if key in options and key not in special:
            options[key] = (options[key] * 4)[:layers]
    if layers is not None:
        key = "num_hidden_layers" if "num_hidden_layers" in options else "n_layer"
        options[key] = layers
    for key in config.sub_configs:
        sub = getattr(config, key, None)
        if isinstance(sub, PretrainedConfig) and key not in options:
            options[key] = {"model_type": sub.model_type, **_shrink(sub, sizes, special)}
    return options


def model_class(name: str) -> Any:
    return getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name])


def build(name: str, changes: Sizes | None = None, spread: bool = True) -> PreTrainedModel:
    """A tiny model in eval mode, always with the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = _config_class(name)(**tiny_options(name, changes or {}))
        text = config.get_text_config(decoder=True)
        if getattr(text, "attn_logit_softcapping", None):
            config._attn_implementation = "eager"  # sdpa leaves out the softcap
        model = model_class(name)(config)
        torch.manual_seed(1)
        for module in model.modules():
            for key, weight in module.named_parameters(recurse=False):
                if spread and weight.is_floating_point():
                    _spread(key, weight.data)
    generation = model.generation_config
    generation.pad_token_id, generation.eos_token_id, generation.bos_token_id = PAD, None, 1
    generation.decoder_start_token_id = PAD
    for key in ("forced_eos_token_id", "forced_bos_token_id", "suppress_tokens"):
        setattr(generation, key, None)
    generation.begin_suppress_tokens = None
    return model.eval()


def _spread(key: str, weight: torch.Tensor) -> None:
    """Weights so large, and so little constant, that logits depend on every token of the past."""
    if key in ("A_log", "D", "dt_bias"):
        return  # a state space model's own clockwork
    if weight.ndim < 2:
        weight.add_(torch.randn_like(weight), alpha=0.3)
    else:
        weight.normal_(0, 1.5 * weight.shape[-1] ** -0.5)


def prompts(changed: bool = False) -> dict[str, torch.Tensor]:
    """Three, padded on the left; ``changed`` in the middle."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, 90, (len(LENGTHS), max(LENGTHS)), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate(LENGTHS):
        ids[row, : max(LENGTHS) - length] = PAD
        mask[row, : max(LENGTHS) - length] = 0
    if changed:
        ids[:, 10:16] = 4
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: PreTrainedModel, **options: Any) -> Any:
    """Eight tokens and their logits."""
    torch.manual_seed(5)
    inputs = {} if "input_ids" in options else prompts()
    return model.generate(
        **inputs,
        max_new_tokens=8,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )


def difference(ours: Any, theirs: Any) -> float:
    """Largest difference of logits relative to the largest logit; infinite for other tokens."""
    if ours.sequences.tolist() != theirs.sequences.tolist():
        return float("inf")
    a, b = torch.stack(ours.logits).double(), torch.stack(theirs.logits).double()
    finite = b.isfinite()
    if not torch.equal(finite, a.isfinite()):
        return float("inf")
    return float((a - b)[finite].abs().max() / b[finite].abs().max().clamp_min(1e-9))


def double(model: PreTrainedModel) -> PreTrainedModel:
    """The model in float64, where no two beams come near each other."""
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # the others have no float64 kernel
    return model.double()


@dataclass
class Seen:
    """What the attention calls of a run had in them."""

    calls: int = 0
    windows: set[str] = field(default_factory=set)
    softcap: bool = False
    sinks: bool = False


@contextmanager
def watch(seen: Seen) -> Iterator[None]:
    """Note what is read from blocks in place."""
    originals = {where: getattr(*where) for where in IN_PLACE}

    def spy(read: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **options: Any) -> Any:
            seen.calls += 1
            if options.get("window") is not None:
                seen.windows.add(options["window"].kind)
            seen.softcap |= options.get("softcap") is not None
            seen.sinks |= options.get("sinks") is not None
            return read(*args, **options)

        return noted

    for (module, name), read in originals.items():
        setattr(module, name, spy(read))
    try:
        yield
    finally:
        for (module, name), read in originals.items():
            setattr(module, name, read)


def evaluate(name: str) -> Result:
    """Run one architecture in every mode, with both caches."""
    started = time.perf_counter()
    if name in NOT_ALONE:
        return _not_run(name, NOT_ALONE[name])
    try:
        found = _first_that_runs(name)
    except Exception as error:
        return _not_run(name, _said(error))
    result = _not_run(name, "")
    _compare(result, *found)
    result.seconds = round(time.perf_counter() - started, 2)
    return result


def _first_that_runs(name: str) -> tuple[Callable[[], PreTrainedModel], Any]:
    """(builds the model, its greedy output with transformers' own cache)."""
    first = None
    for changes in RETRIES:
        for spread in (True, False):
            try:
                model = build(name, changes, spread)
                output = generate(model, **MODES["greedy"])
            except Exception as error:
                first = first or error
                continue
            logits = output.logits[0]
            if not torch.stack(output.logits).isfinite().all():
                first = first or ValueError("logits that are not finite")
                continue
            other = generate(model, **prompts(changed=True), **MODES["greedy"]).logits[0]
            if (logits - other).abs().max() > 100 * TOLERANCE * logits.abs().max():
                return functools.partial(build, name, changes, spread), output
            first = first or ValueError("logits that do not depend on the past")
    assert first is not None
    raise first


def _compare(result: Result, make: Callable[[], PreTrainedModel], output: Any) -> None:
    """Fill in everything that both caches' runs show."""
    seen, layers, reads = Seen(), [], Counter[str]()
    result.verdict = "no cache"
    if not isinstance(getattr(output, CACHE, None), Cache):
        result.reason = "keeps its past in a format of its own, or none"
    for mode, options in MODES.items() if not result.reason else ():
        try:
            run = _same_in(make, mode, options, seen)
        except TreeCacheError as error:
            result.verdict, result.reason = "refused", _said(error)
            break
        except Exception as error:
            foreign = any(text in str(error) for text in TAKES_NONE)
            result.verdict = "no cache" if foreign else "wrong"
            result.reason = "takes no cache but its own" if foreign else f"{mode}: {_said(error)}"
            break
        result.errors[mode] = float(f"{run.error:.2g}")
        layers, reads = run.cache.layers, reads + run.cache.dense_reads
        result.reason = result.reason or run.note
        if run.error > TOLERANCE:
            result.verdict, result.reason = _blame(make, mode, options)
            break
        if not run.cache.tree.rows:
            result.reason = "never writes to the cache it is given"
            break
    else:
        if result.errors and run.cache.tree.rows:
            result.verdict, reason = _how_it_reads(make(), layers, reads, seen)
            result.reason = "; ".join(filter(None, (reason, result.reason)))
    harm = _harm(make, output, result)
    if harm:
        result.verdict, result.reason = "wrong", "; ".join(filter(None, (harm, result.reason)))
    result.dense_reads = sorted(reads)
    result.mechanism = mechanism(make(), layers, seen)


def _harm(make: Callable[[], PreTrainedModel], output: Any, result: Result) -> str:
    """What enabling a model changes where it still uses transformers' own cache; hopefully nothing.

    It is what a caller is left with whom TreeCache refuses.
    """
    model = make()
    try:
        with enable_tree_attention(model):
            error = difference(generate(model, **MODES["greedy"]), output)
    except Exception as failure:
        return f"when enabled, fails with transformers' own cache: {_said(failure)}"
    result.errors["their cache"] = float(f"{error:.2g}")
    return "when enabled, other with transformers' own cache" if error > TOLERANCE else ""


def _how_it_reads(
    model: PreTrainedModel, layers: Sequence[Any], reads: Counter[str], seen: Seen
) -> tuple[str, str]:
    """(verdict, reason) of a model that is right."""
    foreign = {type(layer).__name__ for layer in layers if not isinstance(layer, OURS)}
    kept = f"{', '.join(sorted(foreign))} stay transformers' own" if foreign else ""
    if reads and not model._can_set_attn_implementation():
        why = "its attention is its own, outside of transformers' attention interface"
        return "dense", "; ".join(filter(None, (why, kept)))
    if reads:
        return "dense", "; ".join(filter(None, (", ".join(sorted(reads)), kept)))
    if not seen.calls:
        return "wrong", "nothing was read"
    if foreign:
        return "hybrid", kept
    states = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)
    return "hybrid" if states else "fast", ""


def _blame(
    make: Callable[[], PreTrainedModel], mode: str, options: dict[str, Any]
) -> tuple[str, str]:
    """(verdict, reason) of a model whose results are not those of transformers' own cache."""
    theirs, unpadded = generate(make(), **options), make()
    uncached = generate(make(), use_cache=False, **options)
    if difference(uncached, theirs) <= TOLERANCE:
        return "wrong", f"{mode}: other than transformers, which agrees with itself"
    ours = _with_tree(make(), options, Seen())[0]
    if difference(ours, uncached) <= TOLERANCE:
        return "contested", "transformers without a cache gives our answer, with its own another"
    options = {**options, "input_ids": prompts()["input_ids"][:1]}
    if _run_both(unpadded, options, Seen()).error <= TOLERANCE:
        return "contested", "reads the padding of the prompt; without any, answers are the same"
    return "wrong", f"{mode}: other than transformers, with its cache and without"


@dataclass
class Run:
    error: float
    cache: TreeCache
    note: str = ""


def _same_in(
    make: Callable[[], PreTrainedModel], mode: str, options: dict[str, Any], seen: Seen
) -> Run:
    """Beams in float64 where the model can; the other modes too where float32 is too coarse."""
    wide = None
    if mode == "beams":
        wide = _in_float64(make, options, seen)
    if wide is not None:
        return wide
    run = _run_both(make(), options, seen)
    if run.error > TOLERANCE and mode != "beams":
        wide = _in_float64(make, options, seen)
        if wide is not None and wide.error <= TOLERANCE:
            wide.note = f"{mode} compared in float64: in float32 rounding changes a choice"
            return wide
    return run


def _in_float64(
    make: Callable[[], PreTrainedModel], options: dict[str, Any], seen: Seen
) -> Run | None:
    model = double(make())
    try:
        theirs = generate(model, **options)
    except (RuntimeError, NotImplementedError, ValueError):
        return None
    if torch.stack(theirs.logits).isnan().any():
        return None
    return _run_both(model, options, seen, theirs)


def _run_both(
    model: PreTrainedModel, options: dict[str, Any], seen: Seen, theirs: Any = None
) -> Run:
    theirs = generate(model, **options) if theirs is None else theirs
    ours, cache = _with_tree(model, options, seen)
    return Run(difference(ours, theirs), cache)


def _with_tree(
    model: PreTrainedModel, options: dict[str, Any], seen: Seen
) -> tuple[Any, TreeCache]:
    cache = TreeCache(block_size=4, poison=True, backtrack=0)
    with enable_tree_attention(model), watch(seen):
        ours = generate(model, **{CACHE: cache}, **options)
    cache.check_integrity()
    return ours, cache


def _said(error: Exception) -> str:
    """Type, first line and place of an error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = textwrap.shorten(" ".join(lines[:2]), 160, placeholder=" ...")
    if isinstance(error, TreeCacheError):
        return f"{type(error).__name__}: {text}"
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {text} ({Path(place.filename).name})"


def mechanism(model: PreTrainedModel, layers: Sequence[Any], seen: Seen) -> list[str]:
    """What this attention does beyond plain heads, as far as config, weights and calls show it."""
    config = model.config.get_text_config(decoder=True)
    config.allow_global_per_layer_attribute_access = True
    have = functools.partial(getattr, config)
    kinds = set(have("layer_types", None) or ())
    weights = {key.rpartition(".")[2] for key, _ in model.named_parameters()}
    windowed = any(getattr(layer, "is_sliding", False) for layer in layers)
    states = {type(layer) for layer in layers if isinstance(layer, LinearAttentionCacheLayerMixin)}
    found = {
        "window": windowed or "sliding" in seen.windows or "sliding_attention" in kinds,
        "chunks": "chunked" in seen.windows or "chunked_attention" in kinds,
        "softcap": seen.softcap or bool(have("attn_logit_softcapping", None)),
        "sinks": seen.sinks or bool(weights & {"sinks", "sink", "attention_sink_bias"}),
        "latents": bool(have("kv_lora_rank", None)),
        "indexer": any(hasattr(layer, "update_indexer") for layer in layers)
        or any(have(key, None) for key in ("index_topk", "index_topk_blocks", "indexer_budget")),
        "ALiBi": bool(have("alibi", False)) or config.model_type in ("bloom", "mpt"),
        "shared K/V": bool(have("num_kv_shared_layers", 0)),
        "states": bool(states) or bool(kinds & {"linear_attention", "mamba", "conv", "recurrent"}),
        "states beside K/V": any(isinstance(layer, HybridPagedLayer) for layer in layers),
        "cross-attention": bool(have("cross_attention_layers", None)),
        "grouped": _grouped(config),
        "experts": any("expert" in key for key, _ in model.named_modules()),
    }
    return [key for key, value in found.items() if value]


def _grouped(config: PretrainedConfig) -> bool:
    q_heads = getattr(config, "num_attention_heads", None)
    kv_heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None)
    one = getattr(config, "multi_query", False)
    return bool(one) or (
        isinstance(q_heads, int) and isinstance(kv_heads, int) and kv_heads < q_heads
    )


def _in_child(name: str, end: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    try:
        end.send(evaluate(name))
    except BaseException as error:
        end.send(_not_run(name, _said(error)))


def isolated(name: str) -> Result:
    """:func:`evaluate` in a process of its own, which may crash or hang."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    # Forked, so that each need not import transformers again.
    process = multiprocessing.get_context("fork").Process(target=_in_child, args=(name, theirs))
    process.start()
    theirs.close()
    reason = f"took longer than {TIMEOUT} s"
    try:
        if ours.poll(TIMEOUT):
            return ours.recv()
    except EOFError:
        process.join()
        reason = f"the process ended with {process.exitcode}"
    finally:
        process.kill()
        process.join()
    return _not_run(name, reason)


def _not_run(name: str, reason: str) -> Result:
    return Result(name, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name], "not run", reason=reason)


def page(report: dict[str, Any], kernels: dict[str, Any]) -> str:
    """docs/models.md.

    Args:
        kernels: results of benchmarks/kernel_coverage.py.
    """
    where, results = report["environment"], report["results"]
    counts = Counter(result["verdict"] for result in results)
    served = {result["name"]: ", ".join(result["kernels"]) for result in kernels["results"]}
    lines = [
        "# Models",
        "",
        f"The {len(results)} architectures of `AutoModelForCausalLM` in transformers "
        f"{where['transformers']}, torch {where['torch']},",
        "each as a tiny random model in float32: 8 tokens after three prompts padded on the left,",
        "greedy, sampled (3 sequences a prompt) and with 3 beams (in float64 where it can), with",
        "`enable_tree_attention` and a `TreeCache`, and with transformers' own cache. Tokens must",
        f"be equal, and logits to {TOLERANCE:g} of the largest; so must those of a model that is",
        "enabled and uses transformers' own cache. Only text: no pictures, no sound. `make models`",
        "writes this page (`benchmarks/model_coverage.py`). On a GPU the fused kernel reads; torch",
        "reads for models with an attention of their own; latents have a kernel for decode steps.",
        "Kernels: what else decode steps in half precision compute by kernels of ours, where they",
        f"run from CUDA graphs ([how](decoding.md)). With them {len(served)} models, in Triton's",
        "interpreter, are as near to float32 as without (`benchmarks/kernel_coverage.py`).",
        "",
        "| verdict | architectures | meaning |",
        "| :-- | --: | :-- |",
        *(f"| {key} | {counts[key]} | {text} |" for key, text in VERDICTS.items()),
        "",
        "| architecture | class | verdict | mechanism | kernels | reason |",
        "| :-- | :-- | :-- | :-- | :-- | :-- |",
    ]
    for result in results:
        reason = result["reason"].replace("|", "\\|")
        lines.append(
            f"| {result['name']} | {result['model']} | {result['verdict']} "
            f"| {', '.join(result['mechanism'])} | {served.get(result['name'], '')} | {reason} |"
        )
    return "\n".join(lines) + "\n"


def quiet() -> None:
    """transformers warns about much that is of no interest in a tiny random model."""
    transformers.logging.set_verbosity_error()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], help="architectures; others keep results")
    parser.add_argument("--table", action="store_true", help="write the page from the results")
    parser.add_argument("--in-process", action="store_true", help="show what goes wrong")
    options = parser.parse_args()
    if options.table:
        PAGE.write_text(page(json.loads(RESULTS.read_text()), json.loads(KERNELS.read_text())))
        return
    quiet()
    torch.set_num_threads(1)
    names = options.only or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    done = {}
    if options.only and RESULTS.exists():
        done = {each["name"]: each for each in json.loads(RESULTS.read_text())["results"]}
    started = time.perf_counter()
    for name in names:
        result = evaluate(name) if options.in_process else isolated(name)
        done[name] = asdict(result)
        print(f"{name:24} {result.verdict:8} {result.seconds:5.1f} s  {result.errors} ", end="")
        print(f"{', '.join(result.mechanism)}. {result.reason}", flush=True)
    print(f"{time.perf_counter() - started:.0f} s")
    report = {
        "environment": environment(),
        "results": [done[name] for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name in done],
    }
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")
    PAGE.write_text(page(report, json.loads(KERNELS.read_text())))


if __name__ == "__main__":
    main()
