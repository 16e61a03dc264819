"""docs/models.md says what its results say, and a sample of its architectures still does so."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from typing import Any

import model_coverage as coverage
import pytest
import torch
import transformers
from models import one_thread
from test_kernel import run_script

__all__ = ["one_thread"]  # a fixture for all of this file

KERNELS: dict[str, Any] = json.loads(coverage.KERNELS.read_text(encoding="utf-8"))
REPORT: dict[str, Any] = json.loads(coverage.RESULTS.read_text(encoding="utf-8"))
RECORDED = {result["name"]: result for result in REPORT["results"]}

CORE = {"llama", "gemma2", "gpt_oss", "qwen3_next", "bloom", "deepseek_v3"}
SAMPLE = (
    *("llama", "gpt2", "gpt_bigcode", "qwen3_moe", "mistral", "gemma2", "gpt_oss", "llama4_text"),
    *("gemma3n_text", "gemma4_text", "mllama", "qwen3_next", "falcon_h1", "lfm2", "zamba2"),
    *("bloom", "deepseek_v3", "diffllama", "gptj", "inkling_text", "kimi_linear", "moshi"),
    *("mamba", "rwkv", "qwen4_exp_text"),
)


@pytest.fixture
def any_warning() -> Iterator[None]:
    """Models warn of sizes that are of no interest here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.core] if n in CORE else []) for n in SAMPLE]
)
def test_the_page_says_what_runs(name: str, any_warning: None) -> None:
    if name not in coverage.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    result = coverage.evaluate(name)
    assert (result.verdict, result.mechanism) == (
        RECORDED[name]["verdict"],
        RECORDED[name]["mechanism"],
    ), result


def test_the_sample_has_every_verdict_and_mechanism_that_works() -> None:
    working = [r for r in REPORT["results"] if r["verdict"] not in ("wrong", "not run")]
    sample = [RECORDED[name] for name in SAMPLE]
    assert {r["verdict"] for r in sample} == {r["verdict"] for r in working}
    assert {m for r in working for m in r["mechanism"]} == {
        m for r in sample for m in r["mechanism"]
    }


@pytest.mark.core
def test_the_page_is_what_the_results_say() -> None:
    assert coverage.PAGE.read_text(encoding="utf-8") == coverage.page(REPORT, KERNELS)


@pytest.mark.timeout(300)
def test_kernels_around_attention_compute_what_each_architecture_does() -> None:
    pytest.importorskip("triton")
    script = "../benchmarks/kernel_coverage.py"
    found = run_script(script, timeout=280, TRITON_INTERPRET="1")["results"]
    assert len(found) > 100 and not [each for each in found if not each["right"]]
    if KERNELS["environment"]["transformers"] != transformers.__version__:
        pytest.skip(f"the results are of transformers {KERNELS['environment']['transformers']}")
    known = {each["name"]: each["kernels"] for each in KERNELS["results"]}
    assert {each["name"]: each["kernels"] for each in found} == known
    kinds = {kind for kernels in known.values() for kind in kernels}
    assert kinds == {"linears", "norms", "rotary", "gated units", "experts", "routers"}


def test_every_architecture_has_a_row() -> None:
    if REPORT["environment"]["transformers"] != transformers.__version__:
        pytest.skip(f"the results are of transformers {REPORT['environment']['transformers']}")
    assert list(RECORDED) == list(coverage.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def test_a_difference_is_found() -> None:
    model = coverage.build("llama")
    theirs = coverage.generate(model)
    assert coverage.difference(theirs, theirs) == 0
    for weight in model.lm_head.parameters():
        weight.data.mul_(1.01)
    assert 0.005 < coverage.difference(coverage.generate(model), theirs) < 0.02
    with torch.no_grad():
        model.lm_head.weight.neg_()
    assert coverage.difference(coverage.generate(model), theirs) == float("inf")


def test_tiny_models_keep_every_kind_of_layer() -> None:
    config = coverage.build("qwen3_5_text").config
    assert set(config.layer_types) == {"linear_attention", "full_attention"}
    assert config.num_hidden_layers == len(config.layer_types) == 3
    assert config.vocab_size == coverage.VOCAB


def test_a_model_that_cuts_its_input_is_refused_at_its_first_forward(any_warning: None) -> None:
    result = coverage.evaluate("cpmant")
    assert result.verdict == "refused"
    assert result.reason.startswith("UnsupportedModel: CpmAntForCausalLM is given all tokens")
    assert "use the cache that transformers makes" in result.reason


def test_what_is_dense_or_refused_says_why() -> None:
    for result in REPORT["results"]:
        if result["verdict"] in ("dense", "refused", "no cache", "not run", "contested"):
            assert result["reason"], result["name"]
        if result["verdict"] == "refused":
            assert "use the cache that transformers makes for it" in result["reason"]


def test_an_architecture_that_cannot_run_has_its_reason() -> None:
    result = coverage.evaluate("gemma4_assistant")
    assert (result.verdict, result.reason) == (
        "not run",
        "drafts for another model, whose K/V it is given",
    )
