"""What we rest on in transformers, one assumption a test: a new version breaks one of these first.

Each failure says which module of ours to look at.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from models import COLUMNS, build, model, one_thread, prompts
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Cache,
    DynamicCache,
    EncoderDecoderCache,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
    cache_utils,
    masking_utils,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging

from hf_tree_cache import TreeCache, enable_tree_attention
from hf_tree_cache.integration import pictures
from hf_tree_cache.integration.attention import NAME, tree_attention_forward, tree_attention_mask
from hf_tree_cache.integration.layers import HybridPagedLayer, PagedLayer
from hf_tree_cache.naming import CACHE

__all__ = ["one_thread"]  # a fixture for all of this file
pytestmark = pytest.mark.core


def parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def assert_takes(function: Callable[..., Any], names: str, user: str) -> None:
    """``function`` has the parameters ``names``, in this order where they are positional."""
    have, want = parameters(function), names.split()
    missing = [name for name in want if name not in have]
    assert not missing, (
        f"{function.__qualname__}{inspect.signature(function)} lacks {missing}: see {user}"
    )
    order = [name for name in have if name in want]
    assert order == want, f"{function.__qualname__} changed its order to {order}: see {user}"


# The cache


CACHE_METHODS = {
    "update": "self key_states value_states layer_idx args kwargs",
    "get_seq_length": "self layer_idx",
    "get_mask_sizes": "self query_length layer_idx",
    "get_query_offset": "self layer_idx",
    "crop": "self tokens_to_remove",
    "reorder_cache": "self beam_idx",
    "batch_repeat_interleave": "self repeats",
    "batch_select_indices": "self indices",
    "reset": "self",
    "offload": "self layer_idx",
    "prefetch": "self layer_idx",
    "activate_past_recording": "self",
}


@pytest.mark.parametrize("name", CACHE_METHODS)
def test_cache_has_the_methods_that_we_override(name: str) -> None:
    assert_takes(getattr(Cache, name), CACHE_METHODS[name], "integration/cache.py")


@pytest.mark.parametrize("name", CACHE_METHODS)
def test_our_methods_take_what_those_of_cache_take(name: str) -> None:
    ours, theirs = (inspect.signature(getattr(each, name)) for each in (TreeCache, Cache))
    kinds = {parameter.kind for parameter in ours.parameters.values()}
    if inspect.Parameter.VAR_KEYWORD in kinds:
        return
    for parameter in theirs.parameters.values():
        assert parameter.name in ours.parameters, (
            f"transformers may call TreeCache.{name}({parameter.name}=...), which does not take it"
        )
        ours_default = ours.parameters[parameter.name].default
        assert parameter.default is inspect.Parameter.empty or ours_default == parameter.default


@pytest.mark.parametrize("name", ["batch_size", "is_compileable", "is_initialized", "is_linear"])
def test_cache_has_the_properties_that_we_override(name: str) -> None:
    assert isinstance(inspect.getattr_static(Cache, name, None), property), (
        f"Cache.{name} is no longer a property: see integration/cache.py"
    )


def test_cache_is_a_list_of_layers() -> None:
    cache = TreeCache()
    assert isinstance(cache, Cache) and cache.layers == []
    assert cache.layer_class_to_replicate is None and not cache.offloading


def public_members(cache: Cache) -> list[str]:
    return [name for name in dir(Cache) if not name.startswith("_") and hasattr(type(cache), name)]


@pytest.mark.parametrize("state", ["empty", "configured", "in use", "in use and not configured"])
def test_every_member_of_cache_answers(state: str) -> None:
    """A member that is new in transformers must work on a TreeCache as on a DynamicCache."""
    llama = model("llama")
    caches: list[Cache] = [TreeCache(), DynamicCache()]
    if state in ("configured", "in use"):
        caches = [TreeCache(llama.config), DynamicCache(config=llama.config)]
    if state.startswith("in use"):
        for cache in caches:
            with torch.no_grad():
                llama(prompts(num_rows=2)["input_ids"], past_key_values=cache)
    ours, theirs = caches
    for name in public_members(ours):
        member = inspect.getattr_static(Cache, name)
        if callable(member):
            required = [
                parameter
                for parameter in list(inspect.signature(member).parameters.values())[1:]
                if parameter.default is inspect.Parameter.empty
                and parameter.kind is not inspect.Parameter.VAR_POSITIONAL
                and parameter.kind is not inspect.Parameter.VAR_KEYWORD
            ]
            if required or name in ("reset", "early_initialization", "offload", "prefetch"):
                continue
        try:
            want = getattr(theirs, name)
            want = want() if callable(member) else want
        except Exception:
            continue
        got = getattr(ours, name)
        got = got() if callable(member) else got
        if isinstance(want, (bool, int, list)) and name not in (
            "layers",
            "batch_size",
            "max_batch_size",
        ):
            assert got == want, f"Cache.{name} of an {state} TreeCache: see integration/cache.py"


@pytest.mark.parametrize(
    "name, layers",
    [
        ("llama", [PagedLayer] * 3),
        ("mistral", [PagedLayer] * 3),
        ("gemma3", [PagedLayer] * 3),
        ("llama4", [PagedLayer] * 3),
        (
            "qwen3_next",
            [cache_utils.LinearAttentionLayer, PagedLayer, cache_utils.LinearAttentionLayer],
        ),
        ("jamba", [cache_utils.LinearAttentionLayer, PagedLayer] * 2),
        ("falcon_h1", [HybridPagedLayer] * 2),
    ],
)
def test_dynamic_cache_makes_layers_that_we_know(name: str, layers: list[type]) -> None:
    """We translate the layers of ``DynamicCache(config)`` one by one, by their class."""
    config = model(name).config
    known = (
        cache_utils.DynamicLayer,
        cache_utils.DynamicSlidingWindowLayer,
        cache_utils.LinearAttentionLayer,
        cache_utils.LinearAttentionAndFullAttentionLayer,
    )
    made = DynamicCache(config=config).layers
    strange = {type(layer).__name__ for layer in made if type(layer) not in known}
    assert not strange, f"DynamicCache({name}) has layers {strange}: see integration/layers.py"
    ours = TreeCache(config).layers
    assert [type(layer) for layer in ours] == layers[: len(ours)]
    assert len(ours) == len(made) == config.num_hidden_layers
    assert [layer.is_sliding for layer in ours if isinstance(layer, PagedLayer)] == [
        layer.is_sliding
        for layer, our in zip(made, ours, strict=True)
        if isinstance(our, PagedLayer)
    ]


def test_hybrid_layers_are_both_kinds() -> None:
    both = cache_utils.LinearAttentionAndFullAttentionLayer
    assert issubclass(both, cache_utils.DynamicLayer)
    assert issubclass(both, cache_utils.LinearAttentionLayer)


def test_linear_attention_layers_keep_their_states_in_dicts() -> None:
    layer = cache_utils.LinearAttentionLayer(number_of_states=2)
    assert isinstance(layer, cache_utils.LinearAttentionCacheLayerMixin)
    for name in ("conv_states", "recurrent_states", "has_previous_state"):
        value = getattr(layer, name)
        assert isinstance(value, dict) and set(value) == {0, 1}, (
            f"LinearAttentionLayer.{name} is {value!r}: see OtherLayers in integration/layers.py"
        )
    assert not any(layer.has_previous_state.values())
    assert (layer.number_of_states, layer.record_past) == (2, False)
    assert_takes(cache_utils.LinearAttentionLayer.reorder_cache, "self beam_idx", "OtherLayers")
    assert_takes(cache_utils.LinearAttentionLayer.crop, "self tokens_to_remove", "OtherLayers")
    init = cache_utils.LinearAttentionCacheLayerMixin.__init__
    assert_takes(init, "self number_of_states", "OtherLayers.clear")


def test_linear_attention_layers_reorder_to_another_number_of_rows() -> None:
    hybrid, cache = model("qwen3_next"), DynamicCache(config=model("qwen3_next").config)
    with torch.no_grad():
        hybrid(prompts(num_rows=2)["input_ids"], past_key_values=cache)
    layer = cache.layers[0]
    state = layer.recurrent_states[0]
    layer.reorder_cache(torch.tensor([1, 0, 1]))
    assert torch.equal(layer.recurrent_states[0], state[[1, 0, 1]]), (
        "LinearAttentionLayer.reorder_cache wants as many rows as before: see OtherLayers.select"
    )


def test_layers_are_made_from_their_abstract_class() -> None:
    abstract = cache_utils.CacheLayerMixin.__abstractmethods__
    missing = {
        name
        for name in abstract
        if getattr(PagedLayer, name) is getattr(cache_utils.CacheLayerMixin, name, None)
    }
    assert not missing, f"CacheLayerMixin demands {missing}: see PagedLayer"


def test_encoder_decoder_cache_hands_out_its_halves() -> None:
    halves = TreeCache(), TreeCache()
    cache = EncoderDecoderCache(*halves)
    assert (cache.self_attention_cache, cache.cross_attention_cache) == halves


# Attention


def test_interfaces_can_be_registered_and_hold_ours() -> None:
    for interface in (AttentionInterface, AttentionMaskInterface):
        assert_takes(interface.register, "key value", "register in integration/attention.py")
    assert AttentionInterface()[NAME] is tree_attention_forward
    assert AttentionMaskInterface()[NAME] is tree_attention_mask
    assert NAME in AttentionMaskInterface._global_mapping, (
        "masks of implementations that are not in _global_mapping are silently None: left padding "
        "would be ignored"
    )


def test_sdpa_takes_what_we_pass_on() -> None:
    assert_takes(
        sdpa_attention_forward,
        "module query key value attention_mask dropout scaling kwargs",
        "_dense_attention in integration/attention.py",
    )


SPIED = "tree_attention_contract_spy"


@pytest.fixture
def spied() -> Iterator[dict[str, list[Any]]]:
    """Registers an implementation that notes what it gets and then does as ours."""
    calls: dict[str, list[Any]] = {"mask": [], "attention": []}

    def mask(*args: Any, **kwargs: Any) -> Any:
        calls["mask"].append((args, kwargs))
        return tree_attention_mask(**kwargs)

    def attention(module: Any, *args: Any, **kwargs: Any) -> Any:
        calls["attention"].append((module, args, kwargs))
        return tree_attention_forward(module, *args, **kwargs)

    AttentionInterface.register(SPIED, attention)
    AttentionMaskInterface.register(SPIED, mask)
    yield calls
    for interface in (AttentionInterface, AttentionMaskInterface):
        del interface._global_mapping[SPIED]


MASK_KEYWORDS = {
    "batch_size",
    "q_length",
    "kv_length",
    "q_offset",
    "kv_offset",
    "mask_function",
    "attention_mask",
    "use_vmap",
    "device",
}


@pytest.mark.parametrize(
    "name, windows",
    [
        ("llama", {None}),
        ("mistral", {("sliding", 11)}),
        ("gemma2", {None, ("sliding", 19)}),
        ("gpt_oss", {None, ("sliding", 6)}),
        ("llama4", {None, ("chunked", 5)}),
    ],
)
def test_mask_functions_get_the_keywords_we_read(
    name: str, windows: set[Any], spied: dict[str, list[Any]]
) -> None:
    spy = build(name)
    spy.set_attn_implementation(SPIED)
    inputs = prompts(name)
    cache = TreeCache(spy.config)
    with torch.no_grad():
        spy(**inputs, past_key_values=cache)
        more = torch.ones(2, 1, dtype=torch.int64)
        spy(
            input_ids=more,
            attention_mask=torch.cat([inputs["attention_mask"], more], 1),
            past_key_values=cache,
        )
    assert len(spied["mask"]) == 2 * len(windows), "not one mask a kind and forward any more"
    found = set()
    for args, keywords in spied["mask"]:
        assert not args
        missing = MASK_KEYWORDS - set(keywords)
        assert not missing, f"masks no longer get {missing}: see TreeMask in integration/handles.py"
        assert keywords["attention_mask"].dtype == torch.bool
        recognised, window = tree_attention_mask(**keywords).pattern
        assert recognised, f"mask of {name} is not recognised: see _read_pattern in handles.py"
        found.add(window and (window.kind, window.size))
    assert found == windows
    lengths = [(k["batch_size"], k["q_length"], k["kv_length"]) for _, k in spied["mask"]]
    assert set(lengths) == {(2, COLUMNS, COLUMNS), (2, 1, COLUMNS + 1)}
    assert {(k["q_offset"], k["kv_offset"]) for _, k in spied["mask"]} == {(0, 0), (COLUMNS, 0)}


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gpt_oss", "llama4"])
def test_attention_functions_get_what_ours_takes(name: str, spied: dict[str, list[Any]]) -> None:
    spy = build(name)
    spy.set_attn_implementation(SPIED)
    with torch.no_grad():
        spy(**prompts(name), past_key_values=TreeCache(spy.config))
    assert len(spied["attention"]) == spy.config.num_hidden_layers
    for module, args, keywords in spied["attention"]:
        assert isinstance(module, nn.Module) and len(args) == 4
        assert args[0].shape[0] == 2 and args[0].shape[2] == COLUMNS
        assert "scaling" in keywords and "dropout" in keywords
    last = spied["attention"][-1][2]
    assert ("softcap" in last, "s_aux" in last) == (name == "gemma2", name == "gpt_oss")


def test_overlays_close_over_what_we_read() -> None:
    """``_read_pattern`` recognises masks by the names in their closures."""

    def closure(function: Callable[..., Any]) -> dict[str, Any]:
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        return {name: cell.cell_contents for name, cell in cells}

    sliding = masking_utils.sliding_window_overlay(7)
    chunked = masking_utils.chunked_overlay(5, torch.zeros(2, dtype=torch.int64))
    both = masking_utils.and_masks(sliding, masking_utils.causal_mask_function)
    hint = "see _read_pattern in integration/handles.py"
    assert closure(sliding)["sliding_window"] == 7, hint
    assert sliding.__qualname__.startswith("sliding_window_overlay"), hint
    assert closure(chunked)["chunk_size"] == 5, hint
    assert chunked.__qualname__.startswith("chunked_overlay"), hint
    assert both.__qualname__.startswith("and_masks"), hint
    assert tuple(closure(both)["mask_functions"]) == (
        sliding,
        masking_utils.causal_mask_function,
    ), hint
    either = masking_utils.or_masks(sliding, masking_utils.causal_mask_function)
    assert not either.__qualname__.startswith("and_masks"), hint


def test_windows_count_the_query_itself() -> None:
    """A window of W shows W tokens; chunks are counted from a row's first token."""
    sliding = masking_utils.sliding_window_overlay(3)
    assert [bool(sliding(0, 0, 9, k)) for k in range(6, 10)] == [False, True, True, True]
    chunked = masking_utils.chunked_overlay(4, torch.tensor([0, 2]))
    assert [bool(chunked(0, 0, 9, k)) for k in (7, 8)] == [False, True]
    assert [bool(chunked(1, 0, 9, k)) for k in (5, 6)] == [False, True]


def test_sdpa_mask_takes_what_a_mask_function_gets() -> None:
    names = "batch_size q_length kv_length q_offset kv_offset mask_function attention_mask"
    assert_takes(masking_utils.sdpa_mask, names + " allow_is_causal_skip device", "TreeMask.dense")
    mask = masking_utils.sdpa_mask(
        batch_size=2,
        q_length=2,
        kv_length=5,
        q_offset=3,
        attention_mask=torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]).bool(),
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
    )
    assert mask.shape == (2, 1, 2, 5) and mask.dtype == torch.bool
    assert mask[1, 0].tolist() == [[False, False, True, True, False], [False, False, *[True] * 3]]


# Models


def test_configs_name_their_attention_internally() -> None:
    """We put a model's implementation back without running its checks again."""
    each = build("llama")
    assert each.config._attn_implementation_internal == each.config._attn_implementation == "sdpa"
    each.config._attn_implementation_internal = "eager"
    assert each.config._attn_implementation == "eager"
    assert_takes(PreTrainedModel.set_attn_implementation, "self attn_implementation", "enable.py")
    assert build("llama")._can_set_attn_implementation()
    assert not build("falcon")._can_set_attn_implementation()
    assert_takes(PretrainedConfig.get_text_config, "self decoder encoder", "enable.py")


def test_models_know_their_sub_configs() -> None:
    config = model("llava").config
    assert set(config.sub_configs) == {"text_config", "vision_config"}
    assert config.get_text_config(decoder=True) is config.text_config


def test_hooks_run_after_a_failure() -> None:
    """torch's, not transformers': the hook that undoes a failed forward is an always_call one."""
    assert_takes(
        nn.Module.register_forward_hook, "self hook prepend with_kwargs always_call", "enable.py"
    )
    seen = []

    class Fails(nn.Module):
        def forward(self, value: int) -> None:
            raise ZeroDivisionError

    failing = Fails()
    failing.register_forward_hook(
        lambda *args: seen.append(args[1:]), with_kwargs=True, always_call=True
    )
    with pytest.raises(ZeroDivisionError):
        failing(value=3)
    assert seen == [((), {"value": 3}, None)]


def test_part_of_a_model_takes_another_attention_alone() -> None:
    """Of a model with pictures only the text becomes ours: see _set_implementation in enable.py."""
    each = build("llava")
    before = each.config.vision_config._attn_implementation
    each.set_attn_implementation({"text_config": NAME})
    assert each.config.text_config._attn_implementation == NAME
    assert each.config.vision_config._attn_implementation == before
    assert each.model.language_model.config._attn_implementation == NAME


def test_sparse_attention_asks_for_implementations_in_words_that_we_find() -> None:
    """Sparse layers pass indices where the name is not "eager" or "sdpa": _keeps_its_attention."""
    modeling = importlib.import_module("transformers.models.deepseek_v32.modeling_deepseek_v32")
    assert "_attn_implementation in (" in inspect.getsource(modeling), (
        "deepseek_v32 chooses its mask in other words: see _keeps_its_attention in enable.py"
    )


def test_outputs_can_be_written_by_key() -> None:
    """Rows that were computed once get their outputs back: see expand_output in prepare.py."""
    output = CausalLMOutputWithPast(logits=torch.zeros(1, 2, 3), hidden_states=(torch.ones(1, 2),))
    assert list(output.keys()) == ["logits", "hidden_states"]
    output["logits"] = torch.ones(2, 2, 3)
    assert torch.equal(output.logits, output["logits"]) and len(output[0]) == 2


def test_the_logger_warns_once() -> None:
    assert callable(logging.get_logger("hf_tree_cache").warning_once), "see _note_dense in cache.py"


LATENTS = (
    "axk1",
    "bailing_hybrid",
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe_lite",
    "kimi_linear",
    "longcat_flash",
    "minicpm3",
    "mistral4",
    "youtu",
)


def latent_layer(name: str) -> type:
    path = f"transformers.models.{name}.modeling_{name}"
    try:
        classes = vars(importlib.import_module(path)).values()
    except ModuleNotFoundError:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    found = [each for each in classes if isinstance(each, type) and hasattr(each, "expand_kv")]
    assert len(found) == 1, f"{name} has {len(found)} layers with expand_kv: see latent.py"
    return found[0]


@pytest.mark.parametrize("name", LATENTS)
def test_layers_expand_what_they_cache_in_a_method_of_their_own(name: str) -> None:
    """DeferredExpansion in integration/latent.py takes this method's place."""
    kind = latent_layer(name)
    assert_takes(kind.expand_kv, "self kv_nope k_rot", "integration/latent.py")
    source = inspect.getsource(kind.forward)
    stored, expanded = source.find(f"{CACHE}.update("), source.find("self.expand_kv(")
    assert 0 < stored < expanded, f"{name} no longer expands what update returned"
    attributes = inspect.getsource(kind.__init__)
    for needed in ("kv_b_proj", "qk_nope_head_dim", "v_head_dim"):
        assert f"self.{needed} = " in attributes, f"{name} has no {needed}: see latent.py"


@pytest.mark.parametrize("name", LATENTS)
def test_expanding_is_the_product_that_we_absorb(name: str) -> None:
    """K is its first rows and the rotary part, V its last rows: see attention/latents.py."""
    heads, k_dim, v_dim, rank, rotary = 3, 5, 7, 11, 4
    projection = nn.Linear(rank, heads * (k_dim + v_dim), bias=False)
    layer = SimpleNamespace(
        kv_b_proj=projection, qk_nope_head_dim=k_dim, v_head_dim=v_dim, qk_rope_head_dim=rotary
    )
    latents, turned = torch.randn(2, 1, 6, rank), torch.randn(2, 1, 6, rotary)
    with torch.no_grad():
        k, v = latent_layer(name).expand_kv(layer, latents, turned)
        weight = projection.weight.view(heads, k_dim + v_dim, rank)
        want = torch.einsum("bolr,hdr->bhld", latents, weight)
    torch.testing.assert_close(k[..., :k_dim], want[..., :k_dim])
    torch.testing.assert_close(k[..., k_dim:], turned.expand(-1, heads, -1, -1))
    torch.testing.assert_close(v, want[..., k_dim:])


# Generation


GENERATION = {
    "_prefill": "self input_ids generation_config model_kwargs",
    "_update_model_kwargs_for_generation": "self outputs model_kwargs is_encoder_decoder",
    "prepare_inputs_for_generation": f"self input_ids next_sequence_length {CACHE} kwargs",
    "_prepare_cache_for_generation": (
        "self generation_config model_kwargs generation_mode batch_size max_cache_length"
    ),
}


@pytest.mark.parametrize("name", GENERATION)
def test_generation_has_the_pieces_of_our_loop(name: str) -> None:
    assert_takes(getattr(GenerationMixin, name), GENERATION[name], "generation/loop.py")


def test_custom_generate_gets_its_own_arguments() -> None:
    """Named parameters beyond those of transformers' loops are taken out of generate's keywords."""
    seen: dict[str, Any] = {}

    def loop(
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        branch_policy: Any = None,
        **model_kwargs: Any,
    ) -> torch.Tensor:
        seen.update(model_kwargs, policy=branch_policy, config=generation_config)
        return input_ids

    cache, inputs = TreeCache(), prompts()
    output = model("llama").generate(
        **inputs,
        past_key_values=cache,
        custom_generate=loop,
        branch_policy="mine",
        do_sample=True,
        num_return_sequences=3,
        max_new_tokens=4,
    )
    assert seen["policy"] == "mine"
    assert seen[CACHE] is cache
    assert seen["config"].max_length == COLUMNS + 4
    assert torch.equal(output, inputs["input_ids"].repeat_interleave(3, 0))
    assert seen["attention_mask"].shape == (6, COLUMNS)


def test_prefill_slices_what_is_cached_and_returns_the_last_logits() -> None:
    llama, cache = model("llama"), TreeCache()
    ids = prompts(num_rows=1)["input_ids"]
    with torch.no_grad():
        llama(ids[:, :30], past_key_values=cache)
        mask = torch.ones_like(ids)
        arguments = {CACHE: cache, "attention_mask": mask, "use_cache": True}
        config = llama.generation_config
        outputs = llama._prefill(ids, config, {**arguments, "logits_to_keep": 1})
    assert outputs.logits.shape[:2] == (1, 1)
    assert getattr(outputs, CACHE) is cache and cache.get_seq_length() == COLUMNS
    grown = llama._update_model_kwargs_for_generation(outputs, arguments, is_encoder_decoder=False)
    assert grown["attention_mask"].shape == (1, COLUMNS + 1)
    longer = torch.cat([ids, ids[:, :1]], 1)
    step = llama.prepare_inputs_for_generation(longer, next_sequence_length=1, **grown)
    assert step["input_ids"].shape == (1, 1) and step[CACHE] is cache


def test_generate_puts_the_cache_it_makes_into_the_arguments() -> None:
    """``replace_default_cache`` replaces it there: see _with_tree_cache in enable.py."""
    llama, arguments = model("llama"), {}
    config = llama.generation_config
    assert not config.is_assistant
    llama._prepare_cache_for_generation(config, arguments, "sample", 1, 20)
    assert type(arguments[CACHE]) is DynamicCache
    assert arguments[CACHE].offloading is False


def test_pictures_come_under_names_that_we_know() -> None:
    """As one entry for each row, raw or encoded by generate: see integration/pictures.py."""
    seen = []
    spy = build("llava")
    spy.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(dict(kwargs)), with_kwargs=True
    )
    spy.generate(
        **prompts("llava", num_rows=1), do_sample=True, num_return_sequences=3, max_new_tokens=2
    )
    shown = {key for key, value in seen[0].items() if key in pictures.NAMES and value is not None}
    floats = {
        key
        for key, value in seen[0].items()
        if isinstance(value, dict) or (torch.is_tensor(value) and value.is_floating_point())
    }
    assert len(shown) == 1 and floats == shown, f"{floats}: see NAMES in integration/pictures.py"
    cut = pictures.of_one_row(seen[0], 3)
    assert cut is not None, f"{shown} is not three times the same: see integration/pictures.py"
    (value,) = cut.values()
    features = value["image"].pooler_output if isinstance(value, dict) else value
    assert len(features) == 1


def test_beams_reorder_the_cache_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    orders = []
    original = TreeCache.reorder_cache

    def spy(self: TreeCache, beam_idx: torch.Tensor) -> None:
        orders.append(beam_idx.tolist())
        original(self, beam_idx)

    monkeypatch.setattr(TreeCache, "reorder_cache", spy)
    model("llama").generate(
        **prompts(), past_key_values=TreeCache(), num_beams=3, do_sample=False, max_new_tokens=5
    )
    assert len(orders) >= 4, "beam search no longer calls reorder_cache after each forward"
    for order in orders:
        assert all(parent // 3 == row // 3 for row, parent in enumerate(order)), (
            "beam indices are no longer flat rows of the batch: see TreeCache.reorder_cache"
        )


def test_generate_hands_one_forward_what_our_hooks_read() -> None:
    """Prompts arrive as keywords, expanded, with a 2-D mask (if any) over past and new tokens."""
    seen = []
    spy = build("llama")
    handle = spy.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args, dict(kwargs))), with_kwargs=True
    )
    with enable_tree_attention(spy):
        spy.generate(
            **prompts(),
            past_key_values=TreeCache(),
            do_sample=True,
            num_return_sequences=3,
            max_new_tokens=3,
        )
    handle.remove()
    for step, (args, kwargs) in enumerate(seen):
        assert not args
        assert kwargs["input_ids"].shape == (6, 1 if step else COLUMNS)
        assert kwargs["attention_mask"].shape == (6, COLUMNS + step)
        assert kwargs["position_ids"].shape == kwargs["input_ids"].shape
        assert isinstance(kwargs[CACHE], TreeCache)
