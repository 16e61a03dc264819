"""Tiny random models of many architectures: odd sizes, no weights, no network."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import PreTrainedModel

VOCAB = 97
PAD = 0
IMAGE = VOCAB - 1
"""The id that LLaVA replaces by a patch of its picture."""

TEXT = {"vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {  # four query heads to each K/V head
    **TEXT,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 12,
    "max_position_embeddings": 256,
}
THREES = {**GROUPED, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8}
SINGLES = {**GROUPED, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 16}


def _without(options: dict[str, Any], *names: str, **others: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in names} | others


@dataclass(frozen=True)
class Tiny:
    """How to build one architecture.

    Attributes:
        config: name of the config class in transformers.
        model: name of the model class.
        options: keywords of the config.
        dense: why layers of this architecture gather dense K/V under tree attention; empty where
            all of them read the blocks in place.
        states: has layers whose state is not K/V, and so needs a config or tree attention.
        double: can compute in float64; where transformers runs eagerly, padded rows would be NaN.
    """

    config: str
    model: str
    options: dict[str, Any] = field(hash=False)
    dense: frozenset[str] = frozenset()
    states: bool = False
    double: bool = True


NEW = Version(transformers.__version__) >= Version("5.23")

TINY: dict[str, Tiny] = {
    "llama": Tiny("LlamaConfig", "LlamaForCausalLM", GROUPED),
    "qwen2": Tiny("Qwen2Config", "Qwen2ForCausalLM", _without(THREES, "head_dim", hidden_size=48)),
    "qwen3": Tiny("Qwen3Config", "Qwen3ForCausalLM", SINGLES),
    "mistral": Tiny("MistralConfig", "MistralForCausalLM", {**THREES, "sliding_window": 11}),
    "gemma2": Tiny(
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {
            **GROUPED,
            "sliding_window": 19,
            "query_pre_attn_scalar": 7,
            "attn_implementation": "eager",  # sdpa leaves out the softcap
            # Low enough to bend the scores of a random model.
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 10.0,
        },
        double=False,
    ),
    "gemma3": Tiny(
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {
            **SINGLES,
            "hidden_size": 48,
            "sliding_window": 5,
            "query_pre_attn_scalar": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    # The last two layers read the K/V of those before; global heads are longer than others.
    "gemma4": Tiny(
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        {
            **SINGLES,
            "hidden_size": 48,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 5,
            "global_head_dim": 32,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB,
        },
    ),
    "phi3": Tiny(
        "Phi3Config",
        "Phi3ForCausalLM",
        _without(THREES, "head_dim", hidden_size=48, sliding_window=9),
    ),
    "glm": Tiny("GlmConfig", "GlmForCausalLM", {**GROUPED, "partial_rotary_factor": 0.5}),
    "gpt_oss": Tiny(
        "GptOssConfig",
        "GptOssForCausalLM",
        {
            **GROUPED,
            "num_hidden_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 6,
            "num_local_experts": 3,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        double=False,
    ),
    "gpt2": Tiny(
        "GPT2Config",
        "GPT2LMHeadModel",
        {**TEXT, "n_positions": 128, "n_embd": 36, "n_layer": 3, "n_head": 3},
    ),
    "gpt_neox": Tiny(
        "GPTNeoXConfig",
        "GPTNeoXForCausalLM",
        _without(SINGLES, "head_dim", "num_key_value_heads", hidden_size=48),
    ),
    "olmo2": Tiny("Olmo2Config", "Olmo2ForCausalLM", _without(GROUPED, "head_dim", hidden_size=48)),
    "cohere2": Tiny(
        "Cohere2Config",
        "Cohere2ForCausalLM",
        {
            **THREES,
            "sliding_window": 7,
            "logit_scale": 1.0,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "llama4": Tiny(
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        {
            **GROUPED,
            "intermediate_size_mlp": 56,
            "attention_chunk_size": 5,
            "no_rope_layers": [1, 0, 1],
            "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
            "num_local_experts": 3,
            "interleave_moe_layer_step": 2,
            "floor_scale": 4,
        },
    ),
    "mixtral": Tiny(
        "MixtralConfig",
        "MixtralForCausalLM",
        {**THREES, "num_hidden_layers": 2, "num_local_experts": 3, "num_experts_per_tok": 2},
    ),
    "qwen3_moe": Tiny(
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {
            **GROUPED,
            "num_hidden_layers": 2,
            "num_experts": 3,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
        },
    ),
    # Its cache holds latents, which each layer expands itself.
    "deepseek_v3": Tiny(
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {
            **_without(SINGLES, "head_dim"),
            "num_hidden_layers": 2,
            "kv_lora_rank": 20,
            "q_lora_rank": 24,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 12,
            "v_head_dim": 12,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
        },
    ),
    "qwen3_next": Tiny(
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        {
            **GROUPED,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 12,
            "num_experts": 3,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 24,
        },
        states=True,
    ),
    "falcon_h1": Tiny(
        "FalconH1Config",
        "FalconH1ForCausalLM",
        {
            **_without(THREES, "head_dim", hidden_size=48),
            "num_hidden_layers": 2,
            "mamba_d_ssm": 48,
            "mamba_n_heads": 4,
            "mamba_d_head": 12,
            "mamba_d_state": 10,
            "mamba_chunk_size": 8,
        },
        states=True,
    ),
    "jamba": Tiny(
        "JambaConfig",
        "JambaForCausalLM",
        {
            **_without(GROUPED, "head_dim", hidden_size=48),
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 3,
            "mamba_d_state": 7,
            "mamba_dt_rank": 5,
        },
        states=True,
    ),
    "falcon": Tiny(
        "FalconConfig",
        "FalconForCausalLM",
        {
            **TEXT,
            "hidden_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "new_decoder_architecture": True,
            "num_kv_heads": 2,
        },
    ),
    "bloom": Tiny(
        "BloomConfig",
        "BloomForCausalLM",
        {**TEXT, "hidden_size": 36, "n_layer": 2, "n_head": 3},
        double=False,
    ),
    "gptj": Tiny(
        "GPTJConfig",
        "GPTJForCausalLM",
        {**TEXT, "n_positions": 128, "n_embd": 48, "n_layer": 2, "n_head": 4, "rotary_dim": 8},
    ),
    "bart": Tiny(
        "BartConfig",
        "BartForConditionalGeneration",
        {
            **TEXT,
            "d_model": 36,
            "encoder_layers": 2,
            "decoder_layers": 3,
            "encoder_attention_heads": 3,
            "decoder_attention_heads": 3,
            "encoder_ffn_dim": 40,
            "decoder_ffn_dim": 40,
            "max_position_embeddings": 128,
            "decoder_start_token_id": 3,
            "forced_eos_token_id": None,
        },
    ),
    "t5": Tiny(
        "T5Config",
        "T5ForConditionalGeneration",
        {
            **TEXT,
            "d_model": 36,
            "d_kv": 12,
            "d_ff": 40,
            "num_layers": 2,
            "num_heads": 3,
            "decoder_start_token_id": 3,
        },
        # Before 5.23 its decoder stays with torch's attention, which reads in place.
        dense=frozenset({"unknown keyword position_bias"} if NEW else ()),
    ),
    "llava": Tiny(
        "LlavaConfig",
        "LlavaForConditionalGeneration",
        {
            "text_config": {"model_type": "llama", **GROUPED},
            "vision_config": {
                "model_type": "clip_vision_model",
                "hidden_size": 24,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 3,
                "image_size": 12,
                "patch_size": 6,
                "projection_dim": 24,
            },
            "image_token_index": IMAGE,
            "pad_token_id": PAD,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
}

COLUMNS = 45
"""Of a prompt: longer than every window, and long enough that three rows read it as one run."""

ENCODER_DECODERS = ("bart", "t5")
DECODERS = tuple(name for name in TINY if name not in (*ENCODER_DECODERS, "llava"))


def build(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    """A fresh model in eval mode, always with the same weights; skips where it does not exist.

    Weights are larger than trained models begin with, and nothing is left constant: otherwise
    logits would hardly depend on the past, and a cache could lose half of it unnoticed.
    """
    tiny = TINY[name]
    for needed in (tiny.config, tiny.model):
        if not hasattr(transformers, needed):
            pytest.skip(f"transformers {transformers.__version__} has no {needed}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = getattr(transformers, tiny.config)(**{**tiny.options, **options})
        model = getattr(transformers, tiny.model)(config)
        torch.manual_seed(1)
        for module in model.modules():
            for key, weight in module.named_parameters(recurse=False):
                _spread(module, key, weight.data)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None
    if dtype == torch.float64 and model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # the others have no float64 kernel
    return model.to(dtype).eval()


def _spread(module: nn.Module, key: str, weight: torch.Tensor) -> None:
    if key in ("A_log", "D", "dt_bias"):
        return  # a state space model's own clockwork
    if weight.ndim == 1:
        weight.add_(torch.randn_like(weight), alpha=0.3)
    else:
        weight.normal_(0, 1.5 * weight.shape[-1] ** -0.5)


@functools.cache
def model(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """As :func:`build`, shared by the session: leave it as you found it."""
    return build(name, dtype)


def prompts(
    name: str = "llama", dtype: torch.dtype = torch.float32, num_rows: int = 2
) -> dict[str, torch.Tensor]:
    """Up to three of 45, 38 and 29 tokens, padded on the left (an encoder's on the right)."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, 90, (num_rows, COLUMNS), generator=generator)
    mask = torch.ones_like(ids)
    for row, pads in enumerate((0, 7, 16)[:num_rows]):
        hidden = slice(COLUMNS - pads, None) if name in ENCODER_DECODERS else slice(pads)
        ids[row, hidden], mask[row, hidden] = PAD, 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if name == "llava":
        ids[:, 20:24] = IMAGE
        inputs["pixel_values"] = torch.randn(num_rows, 3, 12, 12, generator=generator).to(dtype)
    return inputs


def generate(model: PreTrainedModel, inputs: dict[str, Any], **options: Any) -> Any:
    """Nine tokens with logits and scores, from a fixed seed; no eos unless given."""
    torch.manual_seed(5)
    options = {"max_new_tokens": 9, "output_logits": True, "output_scores": True, **options}
    return model.generate(**inputs, return_dict_in_generate=True, **options)


def assert_same(ours: Any, theirs: Any, tolerance: float = 1e-4) -> None:
    """Outputs of two :func:`generate` have equal tokens and beams, and logits within tolerance."""
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    ours_logits, theirs_logits = torch.stack(ours.logits), torch.stack(theirs.logits)
    torch.testing.assert_close(ours_logits, theirs_logits, rtol=0, atol=tolerance)
    scores = getattr(theirs, "sequences_scores", None)
    if scores is not None:
        torch.testing.assert_close(ours.sequences_scores, scores, rtol=0, atol=tolerance)
        assert ours.beam_indices.tolist() == theirs.beam_indices.tolist()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models as small as these run five times faster on one thread when the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
