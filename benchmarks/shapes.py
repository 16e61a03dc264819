"""Models of well-known shapes with random weights in bfloat16, made on the GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GlmConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3MoeConfig,
)

LONG = 131_072


def llama_8b() -> PretrainedConfig:
    """Llama-3.1-8B."""
    return LlamaConfig(
        vocab_size=128_256,
        hidden_size=4_096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=LONG,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=False,
    )


def qwen_half_b() -> PretrainedConfig:
    """Qwen2.5-0.5B."""
    return Qwen2Config(
        vocab_size=151_936,
        hidden_size=896,
        intermediate_size=4_864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=LONG,
        tie_word_embeddings=True,
    )


def qwen_14b() -> PretrainedConfig:
    """Qwen2.5-14B."""
    return Qwen2Config(
        vocab_size=152_064,
        hidden_size=5_120,
        intermediate_size=13_824,
        num_hidden_layers=48,
        num_attention_heads=40,
        num_key_value_heads=8,
        max_position_embeddings=LONG,
        tie_word_embeddings=False,
    )


def qwen_32b() -> PretrainedConfig:
    """Qwen2.5-32B."""
    return Qwen2Config(
        vocab_size=152_064,
        hidden_size=5_120,
        intermediate_size=27_648,
        num_hidden_layers=64,
        num_attention_heads=40,
        num_key_value_heads=8,
        max_position_embeddings=LONG,
        tie_word_embeddings=False,
    )


def qwen_30b_experts() -> PretrainedConfig:
    """Qwen3-30B-A3B: 128 experts, 8 for each token."""
    return Qwen3MoeConfig(
        vocab_size=151_936,
        hidden_size=2_048,
        intermediate_size=6_144,
        moe_intermediate_size=768,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        max_position_embeddings=LONG,
        tie_word_embeddings=False,
    )


def gemma_4b() -> PretrainedConfig:
    """Gemma-3-4B: norms by 1 + weight, four of them a layer, a gelu; most layers have a window."""
    return Gemma3TextConfig(
        vocab_size=262_208,
        hidden_size=2_560,
        intermediate_size=10_240,
        num_hidden_layers=34,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        sliding_window=1_024,
        max_position_embeddings=LONG,
        tie_word_embeddings=True,
    )


def gemma_e4b() -> PretrainedConfig:
    """Gemma-4-E4B: heads of 256 with a window, of 512 without; 18 layers read others' K and V."""
    return Gemma4TextConfig(
        vocab_size=262_144,
        hidden_size=2_560,
        intermediate_size=10_240,
        num_hidden_layers=42,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=256,
        global_head_dim=512,
        num_kv_shared_layers=18,
        hidden_size_per_layer_input=256,
        sliding_window=512,
        final_logit_softcapping=30.0,
        max_position_embeddings=LONG,
        tie_word_embeddings=True,
    )


def glm_9b() -> PretrainedConfig:
    """GLM-4-9B: gate and up share a weight, neighbours are rotated, and half of a head."""
    return GlmConfig(
        vocab_size=151_552,
        hidden_size=4_096,
        intermediate_size=13_696,
        num_hidden_layers=40,
        num_attention_heads=32,
        num_key_value_heads=2,
        head_dim=128,
        partial_rotary_factor=0.5,
        attention_bias=True,
        max_position_embeddings=LONG,
        tie_word_embeddings=False,
    )


def tiny() -> PretrainedConfig:
    """To try the benchmark itself, anywhere."""
    return LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LONG,
        tie_word_embeddings=False,
    )


SHAPES: dict[str, Callable[[], PretrainedConfig]] = {
    "8B": llama_8b,
    "0.5B": qwen_half_b,
    "14B": qwen_14b,
    "32B": qwen_32b,
    "30B of experts": qwen_30b_experts,
    "4B, Gemma": gemma_4b,
    "E4B, Gemma 4": gemma_e4b,
    "9B, GLM": glm_9b,
    "tiny": tiny,
}


def outline(name: str) -> PreTrainedModel:
    """The model ``name`` of :data:`SHAPES`, without memory for its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(SHAPES[name](), dtype=torch.bfloat16)


def weight_bytes(name: str) -> int:
    return sum(parameter.nbytes for parameter in outline(name).parameters())


def build(name: str, device: str = "cuda") -> PreTrainedModel:
    """The model ``name`` of :data:`SHAPES`, random, without an end-of-sequence token.

    Where there are experts, embeddings outweigh what layers add, so that tokens choose their own.
    """
    model = outline(name).to_empty(device=device)
    model.init_weights()  # for buffers; what are parameters is drawn below, in the same way for all
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02) if parameter.ndim > 1 else parameter.fill_(1)
        if model.config.model_type == "gemma4_text":
            # Scores are not divided by sqrt(D) there: trained weights of these norms see to that.
            for part, module in model.named_modules():
                if part.endswith(("q_norm", "k_norm")):
                    module.weight.fill_(len(module.weight) ** -0.25)
        if hasattr(model.config, "num_experts"):
            model.get_input_embeddings().weight.normal_(0, 1)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def bytes_read(model: PreTrainedModel, share_of_experts: float = 1.0) -> int:
    """Bytes of weights that a decode step must read, if its rows hit so many of the experts."""
    tied = model.get_input_embeddings().weight if model.config.tie_word_embeddings else None
    looked_up = {
        module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)
    }
    total = 0.0
    for name, parameter in model.named_parameters():
        if parameter is tied or parameter not in looked_up:
            total += parameter.nbytes * (share_of_experts if ".experts." in name else 1.0)
    return int(total)


def token_bytes(config: PretrainedConfig) -> int:
    """Bytes of K and V of one token, all layers that keep their own, in bfloat16."""
    kept = config.num_hidden_layers - getattr(config, "num_kv_shared_layers", 0)
    return sum(_layer_token_bytes(config, layer) for layer in range(kept))


def unique_bytes(config: PretrainedConfig, prompt: int, rows: int, own: int) -> int:
    """Bytes of K and V that a step must read: of one prompt, and each row's own tokens."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    total = 0
    for layer, kind in enumerate(kinds):
        most = config.sliding_window if kind == "sliding_attention" else prompt + own
        tokens = min(prompt, max(0, most - own)) + rows * min(own, most)
        total += tokens * _layer_token_bytes(config, layer)
    return total


def _layer_token_bytes(config: PretrainedConfig, layer: int) -> int:
    of_layer = config.per_layer_config[layer]
    head_dim = getattr(of_layer, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    return 2 * 2 * of_layer.num_key_value_heads * head_dim
