"""Which tokens may be drawn, how often they are, and what is known of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from draws import SAMPLINGS, kept_by_kernel, kept_by_sorting, rows
from test_kernel import run_script
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from hf_tree_cache import InvalidArgument, Sampling
from hf_tree_cache.generation.sampling import Drawn, draw_tokens
from hf_tree_cache.generation.uncertainty import Uncertainty, measure

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CHI_SQUARE_AT_1E_6 = 70.0
"""What 19 degrees of freedom exceed once in a million (67.6), rounded up."""


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def draw(scores: torch.Tensor, sampling: Any, **options: Any) -> Drawn:
    return draw_tokens(scores, scores, sampling, **options)


# Which processors the sampler takes over


def test_the_last_of_transformers_own_processors_become_a_sampling() -> None:
    penalty = RepetitionPenaltyLogitsProcessor(1.3)
    rest, sampling = Sampling.behind(
        [penalty, TemperatureLogitsWarper(0.7), TopKLogitsWarper(5), TopPLogitsWarper(0.9)]
    )
    assert rest == [penalty]
    assert sampling == Sampling(temperature=0.7, top_k=5, top_p=0.9)
    assert Sampling.behind([MinPLogitsWarper(0.1)])[1] == Sampling(min_p=0.1)
    assert Sampling.behind([]) == ([], Sampling())


class Mine(TopKLogitsWarper):
    """A processor of a user's, which may do anything."""


@pytest.mark.parametrize(
    "last, taken",
    [
        pytest.param([TypicalLogitsWarper(0.9)], 0, id="unknown ones behind"),
        pytest.param([Mine(5)], 0, id="a subclass"),
        pytest.param([TopPLogitsWarper(0.9), TopKLogitsWarper(5)], 1, id="another order"),
        pytest.param([TopKLogitsWarper(9), TopKLogitsWarper(5)], 1, id="one twice"),
        pytest.param([TopPLogitsWarper(0.9, min_tokens_to_keep=2)], 0, id="two tokens at least"),
        pytest.param([TopKLogitsWarper(5, filter_value=-9.0)], 0, id="another value"),
        pytest.param([TopPLogitsWarper(0.0)], 0, id="top-p of nothing"),
        pytest.param([TopKLogitsWarper(1, min_tokens_to_keep=2)], 1, id="a top-k of two"),
    ],
)
def test_others_run_as_they_are(last: list[LogitsProcessor], taken: int) -> None:
    processors = [RepetitionPenaltyLogitsProcessor(1.3), *last]
    rest, sampling = Sampling.behind(processors)
    assert rest == processors[: len(processors) - taken]
    ids, scores = torch.zeros(4, 1, dtype=torch.int64), torch.randn(4, 30)
    want = LogitsProcessorList(processors)(ids, scores)
    assert torch.equal(sampling.process(LogitsProcessorList(rest)(ids, scores)), want)


@pytest.mark.parametrize("min_p", [-0.1, 1.1])
def test_a_senseless_min_p_is_refused(min_p: float) -> None:
    with pytest.raises(InvalidArgument, match="only the likeliest"):
        Sampling(min_p=min_p)


# What may be drawn, and what is


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("vocab", [7, 1_000, 128_256])
@pytest.mark.parametrize("name", SAMPLINGS)
def test_a_row_draws_what_multinomial_draws_of_what_transformers_keeps(
    name: str, vocab: int, dtype: torch.dtype, device: str
) -> None:
    sampling, logits = SAMPLINGS[name], rows(vocab, dtype, device)
    scores = sampling.process(logits.float())
    torch.manual_seed(3)
    want = torch.multinomial(scores.softmax(-1), 1).squeeze(1)
    torch.manual_seed(3)
    drawn = draw(logits, sampling)
    # A GPU sorts short rows without regard to the order of equals: top-p may keep another of them.
    values = logits.gather(1, torch.stack([drawn.tokens, want], 1))
    tied = (values[:, 0] == values[:, 1]) & (sampling.top_p < 1)
    assert ((drawn.tokens == want) | tied).all()
    assert not drawn.broken.any()
    logprobs = logits.float().log_softmax(-1).gather(1, want[:, None]).squeeze(1)
    torch.testing.assert_close(drawn.logprobs, logprobs, rtol=0, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("vocab", [7, 1_000, 32_003, 128_256])
@pytest.mark.parametrize("name", SAMPLINGS)
def test_the_kernel_keeps_what_transformers_keeps(
    name: str, vocab: int, dtype: torch.dtype
) -> None:
    from hf_tree_cache.generation import draw_launch

    sampling, logits = SAMPLINGS[name], rows(vocab, dtype, "cuda")
    noise = torch.empty(logits.shape, device="cuda").exponential_()
    options = {k: getattr(sampling, k) for k in ("temperature", "top_k", "top_p", "min_p")}
    _, _, numbers, cut = draw_launch.draw(logits, noise, **options)
    kept = kept_by_kernel(logits, sampling, numbers, cut)
    want = kept_by_sorting(logits, sampling)
    # Where the border falls between two tokens of the same sum in float32, either may go.
    assert ((kept != want).sum(1) <= (1 if sampling.top_p < 1 else 0)).all()


def test_the_interpreted_kernels_agree_with_sorting() -> None:
    found = run_script("interpreted_draw.py", timeout=280, TRITON_INTERPRET="1")
    assert not found["failures"], "\n".join(found["failures"])


@pytest.mark.parametrize("name", SAMPLINGS)
def test_tokens_come_as_often_as_they_are_likely(name: str, device: str) -> None:
    sampling = SAMPLINGS[name]
    logits = torch.linspace(-2, 2, 20, device=device)
    probs = sampling.process(logits[None].clone())[0].softmax(-1).double()
    count = 20_000
    tokens = draw(logits.expand(count, 20).contiguous(), sampling).tokens
    seen = tokens.bincount(minlength=20).double()
    possible = probs > 0
    assert not seen[~possible].any()
    expected = count * probs[possible]
    assert ((seen[possible] - expected) ** 2 / expected).sum() < CHI_SQUARE_AT_1E_6


def test_scores_that_were_changed_leave_the_log_probs_alone(device: str) -> None:
    logits = torch.randn(4, 300, device=device)
    scores = logits.clone()
    scores[:, 7] += 100
    uncertainty = Uncertainty()
    drawn = draw_tokens(logits, scores, Sampling(), uncertainty=uncertainty)
    assert drawn.tokens.tolist() == [7] * 4
    torch.testing.assert_close(drawn.logprobs, logits.log_softmax(-1)[:, 7])


def test_every_row_may_have_a_sampling_of_its_own(device: str) -> None:
    logits = torch.randn(6, 50, device=device)
    samplings = [Sampling.greedy(), Sampling(top_k=2), Sampling.greedy(), *[Sampling(top_k=2)] * 3]
    best = logits.topk(2).indices
    for _ in range(20):
        drawn = draw(logits, samplings, distinct=[[1, 2]])
        logprobs = logits.log_softmax(-1).gather(1, drawn.tokens[:, None]).squeeze(1)
        torch.testing.assert_close(drawn.logprobs, logprobs)
        for row in range(6):
            likely = best[row, :1] if row in (0, 2) else best[row]
            assert drawn.tokens[row] in likely


@pytest.mark.parametrize("do_sample", [True, False], ids=["sampled", "greedy"])
def test_rows_that_allow_no_token_are_told_apart(do_sample: bool, device: str) -> None:
    logits = torch.randn(5, 300, device=device)
    logits[0, 7], logits[1, 7], logits[2] = math.nan, math.inf, -math.inf
    logits[3, 1:] = -math.inf
    for sampling in (Sampling(do_sample=do_sample), Sampling(top_k=5, do_sample=do_sample)):
        drawn = draw(logits, sampling)
        assert drawn.broken.tolist() == [True, True, True, False, False]
        assert drawn.tokens[3] == 0
        assert drawn.table.shape == (3, 5) and drawn.table[0].tolist() == drawn.tokens.tolist()


# Different tokens for the children of a fork


def test_a_greedy_group_takes_the_best_tokens_in_turn(device: str) -> None:
    scores = torch.tensor([[0.0, 3.0, 2.0, 1.0]], device=device).repeat(4, 1)
    assert draw(scores, Sampling.greedy(), distinct=[[0, 2, 3]]).tokens.tolist() == [1, 1, 2, 3]


def test_a_sampled_group_has_different_tokens_in_proportion_to_their_probability(
    device: str,
) -> None:
    count = 3_000
    scores = torch.tensor([0.6, 0.3, 0.1], device=device).log().repeat(2 * count, 1)
    pairs = [[2 * i, 2 * i + 1] for i in range(count)]
    tokens = draw(scores, Sampling(), distinct=pairs).tokens.view(-1, 2)
    assert (tokens[:, 0] != tokens[:, 1]).all()
    seen = (tokens[:, 0] * 3 + tokens[:, 1]).bincount(minlength=9).view(3, 3).cpu() / count
    expected = torch.tensor(
        [[0, 0.45, 0.15], [0.3 * 0.6 / 0.7, 0, 0.3 * 0.1 / 0.7], [1 / 15, 1 / 30, 0]]
    )
    assert (seen - expected).abs().max() < 0.04


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_k=3), Sampling.greedy()])
def test_a_group_wider_than_what_is_possible_repeats_the_first(
    sampling: Sampling, device: str
) -> None:
    scores = torch.tensor([[0.0, 1.0, -torch.inf]], device=device).repeat(4, 1)
    tokens = draw(scores, sampling, distinct=[[0, 1, 2, 3]]).tokens.tolist()
    assert set(tokens[:2]) == {0, 1} and tokens[2] == tokens[0]


# Uncertainty


def test_what_is_measured_is_measured_once_until_it_changes(
    monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    calls = []

    def counted(logits: torch.Tensor) -> torch.Tensor:
        calls.append(logits)
        return measure(logits)

    monkeypatch.setattr("hf_tree_cache.generation.uncertainty.measure", counted)
    uncertainty, logits = Uncertainty(), torch.zeros(2, 8, device=device)
    for _ in range(3):
        found = uncertainty.read(logits)
    assert len(calls) == 1
    assert found[0] == pytest.approx([math.log(8), math.log(8), 0.0], abs=1e-5)
    logits[:, 1:] = -torch.inf
    assert uncertainty.read(logits)[1] == pytest.approx([0.0] * 3, abs=1e-5)
    assert len(calls) == 2
    uncertainty.measured(logits.clone())
    assert len(calls) == 3


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_gpu_measures_what_a_cpu_does(dtype: torch.dtype) -> None:
    logits = rows(128_256, dtype)
    torch.testing.assert_close(measure(logits.cuda()).cpu(), measure(logits), atol=2e-4, rtol=1e-4)
