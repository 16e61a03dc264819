"""Policies are pure: searches made by hand in, fixed actions out. No model, no weights."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest

from hf_tree_cache.errors import InvalidArgument
from hf_tree_cache.search.ask_tell import AskTell
from hf_tree_cache.search.best_of_n import BestOfN
from hf_tree_cache.search.budget import Budget
from hf_tree_cache.search.mcts import MCTS, Visits
from hf_tree_cache.search.policy import (
    Conclusion,
    Expand,
    Finish,
    Policy,
    Prune,
    Score,
    SearchNode,
    SearchTree,
    conclude_best,
    tally,
)
from hf_tree_cache.search.self_consistency import SelfConsistency
from hf_tree_cache.search.step_beam import StepBeam
from hf_tree_cache.search.tree_of_thoughts import TreeOfThoughts


def grow(search: SearchTree, parent: int, state: str = "done", **facts: Any) -> SearchNode:
    """Add a step that has ended, with the facts that the driver would have filled in."""
    node = search.add(parent, facts.pop("kind", "step"), facts.pop("aside", False))
    node.state = state
    node.num_tokens, node.logprob = 4, -1.0
    for name, value in facts.items():
        setattr(node, name, value)
    return node


def voted(*answers: str | None, running: int = 0, **facts: Any) -> SearchTree:
    search = SearchTree("q")
    for answer in answers:
        grow(search, 0, answer=answer, **facts)
    for _ in range(running):
        search.add(0)
    return search


def asked(policy: Policy, search: SearchTree) -> list[Any]:
    """What a policy asks for; that it neither changes the search nor its mind."""
    before = copy.deepcopy(search)
    actions = list(policy.decide(search))
    assert search == before
    assert list(policy.decide(search)) == actions
    return actions


class TestSelfConsistency:
    def test_all_branches_start_at_once_and_take_the_question_over(self) -> None:
        assert asked(SelfConsistency(8), SearchTree()) == [Expand(0, 8, to_end=True)]

    def test_with_fewer_in_parallel_the_question_is_kept_until_the_last(self) -> None:
        policy = SelfConsistency(5, parallel=2)
        assert asked(policy, SearchTree()) == [Expand(0, 2, to_end=True, keep=True)]
        assert asked(policy, voted("a", running=1)) == [Expand(0, 1, to_end=True, keep=True)]
        assert asked(policy, voted("a", "b", "c", running=1)) == [Expand(0, 1, to_end=True)]

    def test_it_waits_until_the_vote_is_settled_then_stops(self) -> None:
        policy = SelfConsistency(16, stop_when=0.95)
        assert asked(policy, voted("a", "a", "a", running=13)) == []
        assert asked(policy, voted("a", None, "a", "a", "a", running=11)) == [
            Finish("settled, p = 0.969")
        ]

    def test_without_a_probability_it_stops_when_the_rest_cannot_change_the_vote(self) -> None:
        policy = SelfConsistency(6, stop_when=None)
        assert asked(policy, voted("a", "a", "b", "a", running=2)) == []
        assert asked(policy, voted("a", "a", "b", "a", "a", running=1)) == [Finish("settled")]
        assert asked(policy, voted("a", "b", "b", "a", "a", "b")) == []

    def test_the_majority_wins_and_its_likeliest_branch_speaks_for_it(self) -> None:
        search = voted("b", "a", "a", None)
        search.nodes[3].logprob = -0.5
        assert SelfConsistency(4).conclude(search) == Conclusion("a", 3, {"a": 2.0, "b": 1.0})

    def test_votes_weigh_by_probability(self) -> None:
        search = voted("a", "a", "b")
        search.nodes[3].logprob = 0.0
        votes = SelfConsistency(3, weight="probability").conclude(search).votes
        assert votes == {"a": 2 * math.exp(-0.25), "b": 1.0}
        search.nodes[3].logprob = -0.1
        assert next(iter(SelfConsistency(3, weight="probability").conclude(search).votes)) == "a"

    def test_votes_weigh_by_score_and_end_only_when_certain(self) -> None:
        policy = SelfConsistency(8, weight="score")
        search = voted("a", "a", "a", "a", "a", running=3)
        assert asked(policy, search) == [Score((1, 2, 3, 4, 5))]
        for node in search.done:
            node.score = 0.5
        assert asked(policy, search) == []
        for node in search.done:
            node.score = 0.7
        assert asked(policy, search) == [Finish("settled")]
        search.nodes[1].score = 1.5
        with pytest.raises(InvalidArgument, match="A vote weighs 0 to 1"):
            policy.decide(search)

    def test_no_answer_is_none(self) -> None:
        assert SelfConsistency(2).conclude(voted(None, None)) == Conclusion(None, 1, {})
        assert SelfConsistency(2).conclude(SearchTree()) == Conclusion(None, None, {})


class TestBestOfN:
    def test_samples_then_scores_all_at_once_then_ends(self) -> None:
        policy = BestOfN(3)
        assert asked(policy, SearchTree()) == [Expand(0, 3, to_end=True)]
        assert asked(policy, voted("a", running=2)) == []
        search = voted("a", "b", None)
        assert asked(policy, search) == [Score((1, 2, 3))]
        for node, score in zip(search.done, (0.1, 0.2, 0.9), strict=True):
            node.score = score
        assert asked(policy, search) == []
        assert policy.conclude(search).answer == "b", "one with an answer goes first"

    def test_good_enough_ends_while_others_run(self) -> None:
        policy = BestOfN(3, good_enough=0.8)
        assert asked(policy, voted("a", running=2)) == [Score((1,))]
        assert asked(policy, voted("a", running=2, score=0.5)) == []
        assert asked(policy, voted("a", running=2, score=0.8)) == [
            Finish("score 0.8 is good enough")
        ]


def beam(*scores: float | None, parent: int = 0, search: SearchTree | None = None) -> SearchTree:
    search = search or SearchTree()
    search.nodes[parent].state = "closed"
    for score in scores:
        grow(search, parent, "open", score=score)
    return search


class TestStepBeam:
    def test_scores_a_level_then_keeps_the_best_and_prunes_the_others(self) -> None:
        policy = StepBeam(width=2, expand=2)
        assert asked(policy, SearchTree()) == [Expand(0, 4)]
        assert asked(policy, beam(None, None, None, None)) == [Score((1, 2, 3, 4))]
        assert asked(policy, beam(0.3, 0.9, 0.1, 0.5)) == [
            Prune(1, "not among the best, score 0.3"),
            Prune(3, "not among the best, score 0.1"),
            Expand(2, 2),
            Expand(4, 2),
        ]

    def test_it_waits_for_the_slowest_of_a_level(self) -> None:
        search = beam(0.3, 0.9)
        search.add(0)
        assert asked(StepBeam(2, 2), search) == []

    def test_complete_solutions_take_a_place_and_all_complete_ends_it(self) -> None:
        search = beam(0.3, 0.9, 0.1)
        search.nodes[1].state = "done"
        assert asked(StepBeam(2, 2), search) == [
            Prune(3, "not among the best, score 0.1"),
            Expand(2, 2),
        ]
        search.nodes[2].state = "done"
        assert asked(StepBeam(2, 2), search) == [
            Prune(3, "not among the best, score 0.1"),
            Finish("no step left to take"),
        ]

    def test_the_last_step_ends_it(self) -> None:
        assert asked(StepBeam(1, 2, max_steps=1), beam(0.3, 0.9)) == [
            Prune(1, "not among the best, score 0.3"),
            Finish("max_steps"),
        ]

    def test_diverse_keeps_the_best_of_each_subtree(self) -> None:
        policy = StepBeam(width=2, expand=2, diverse=True)
        assert asked(policy, beam(0.3, 0.2, 0.9, 0.8)) == [
            Prune(2, "not among the best, score 0.2"),
            Prune(4, "not among the best, score 0.8"),
            Expand(1, 2),
            Expand(3, 2),
        ]
        search = beam(0.3, 0.2, 0.9, 0.8)
        search.nodes[2].state = search.nodes[4].state = "pruned"
        beam(0.1, 0.2, parent=1, search=search)
        beam(0.7, 0.6, parent=3, search=search)
        assert [a for a in asked(policy, search) if isinstance(a, Expand)] == [
            Expand(6, 2),
            Expand(7, 2),
        ]

    @pytest.mark.parametrize(
        ("aggregate", "value"), [("last", 0.5), ("min", 0.25), ("mean", 0.5), ("product", 0.09375)]
    )
    def test_a_solution_is_worth_what_its_steps_are(self, aggregate: Any, value: float) -> None:
        search = SearchTree()
        for parent, score in enumerate((0.25, 0.75, 0.5)):
            grow(search, parent, "open", score=score)
        assert StepBeam(aggregate=aggregate).value(search, search.nodes[3]) == value

    def test_the_result_is_the_best_or_a_vote(self) -> None:
        search = voted("a", "b", "b")
        for node, score in zip(search.done, (0.9, 0.5, 0.3), strict=True):
            node.score = score
        assert StepBeam().conclude(search).answer == "a"
        assert StepBeam(select="vote").conclude(search).votes == {"b": 2.0, "a": 1.0}
        assert StepBeam(select="weighted").conclude(search).votes == {"a": 0.9, "b": 0.8}


class TestMCTS:
    def test_visits_and_values_are_backed_up_to_the_question(self) -> None:
        search = beam(0.0, 1.0)
        beam(0.5, 0.25, parent=2, search=search)
        visits = Visits.of(search)
        assert visits.count == [4, 1, 3, 1, 1]
        assert visits.value == [1.75, 0.0, 1.75, 0.5, 0.25]
        assert visits.mean(2) == pytest.approx(1.75 / 3)

    def test_values_are_scaled_to_the_range_seen(self) -> None:
        assert Visits.of(beam(-10.0, -30.0)).value == [1.0, 1.0, 0.0]
        assert Visits.of(beam(-3.0)).value == [0.5, 0.5]

    def test_expand_score_select(self) -> None:
        policy = MCTS(simulations=3, children=2)
        assert asked(policy, SearchTree()) == [Expand(0, 2)]
        assert asked(policy, beam(None, None)) == [Score((1, 2))]
        assert asked(policy, beam(0.2, 0.9)) == [Expand(2, 2)]

    def test_it_comes_back_to_a_held_leaf_when_the_better_one_disappoints(self) -> None:
        policy = MCTS(simulations=3, children=2)
        search = beam(0.4, 0.9)
        beam(0.1, 0.1, parent=2, search=search)
        # Q of node 2 is now 1/3 over three visits, of node 1 still 0.375 over one:
        # 0.333 + 1.25 * 0.5 * 2 / 4 = 0.646 against 0.375 + 1.25 * 0.5 * 2 / 2 = 1.0.
        assert asked(policy, search) == [Expand(1, 2)]

    def test_without_exploration_it_stays_with_the_best_mean(self) -> None:
        policy = MCTS(simulations=3, children=2, c_puct=0)
        search = beam(0.4, 0.9)
        beam(0.6, 0.1, parent=2, search=search)
        assert asked(policy, search) == [Expand(3, 2)]

    def test_leaves_chosen_together_differ(self) -> None:
        policy = MCTS(simulations=9, children=3, parallel=2)
        assert asked(policy, beam(0.5, 0.9, 0.8)) == [Expand(2, 3), Expand(3, 3)]
        assert asked(policy, SearchTree()) == [Expand(0, 3)]

    def test_priors_are_uniform_or_of_the_log_probs(self) -> None:
        search = beam(0.5, 0.5)
        search.nodes[2].logprob = -0.2
        assert asked(MCTS(prior="uniform", children=2), search) == [Expand(1, 2)]
        assert asked(MCTS(prior="logprob", children=2), search) == [Expand(2, 2)]

    def test_rollouts_start_from_kept_steps_and_their_ends_are_scored(self) -> None:
        policy = MCTS(simulations=3, children=2, value="rollout")
        search = beam(None, None)
        rollouts = [Expand(i, kind="rollout", to_end=True, keep=True) for i in (1, 2)]
        assert asked(policy, search) == rollouts
        for parent in (1, 2):
            grow(search, parent, kind="rollout", answer=str(parent))
        assert asked(policy, search) == [Score((3, 4))]
        search.nodes[3].score, search.nodes[4].score = 0.0, 1.0
        assert asked(policy, search) == [Expand(2, 2)]
        grow(beam(None, parent=2, search=search), 2)
        again = Expand(5, kind="rollout", to_end=True, keep=True)
        assert asked(policy, search) == [again, Score((6,))]
        assert policy.conclude(search).answer == "2"

    def test_it_ends_by_simulations_by_exhaustion_or_by_a_good_solution(self) -> None:
        search = beam(0.2, 0.9)
        assert asked(MCTS(simulations=1), search) == [Finish("all simulations done")]
        assert asked(MCTS(max_steps=1), search) == [Finish("nothing left to expand")]
        search.nodes[1].state = search.nodes[2].state = "done"
        assert asked(MCTS(), search) == [Finish("nothing left to expand")]
        assert asked(MCTS(good_enough=0.9), search) == [Finish("score 0.9 is good enough")]


class TestTreeOfThoughts:
    def test_by_scorer_it_proposes_values_and_keeps_b(self) -> None:
        policy = TreeOfThoughts(propose=3, keep=1)
        assert asked(policy, SearchTree()) == [Expand(0, 3)]
        assert asked(policy, beam(None, None, None)) == [Score((1, 2, 3))]
        assert asked(policy, beam(0.1, 0.9, 0.3)) == [
            Prune(1, "not among the best 1, worth 0.1"),
            Prune(3, "not among the best 1, worth 0.3"),
            Expand(2, 3),
        ]
        last = TreeOfThoughts(propose=3, keep=3, max_steps=1)
        assert asked(last, beam(0.1, 0.9, 0.3)) == [Finish("max_steps")]

    def test_by_asking_it_values_states_with_verdicts_of_the_model(self) -> None:
        policy = TreeOfThoughts(2, 1, value_prompt="Sure?", value_samples=2, value_tokens=5)
        assert asked(policy, SearchTree()) == [Expand(0, 2, hold=True)]
        search = beam(None, None)
        search.nodes[2].state = "done"
        ask = {"kind": "value", "prefix": "Sure?", "max_new_tokens": 5, "keep": True}
        assert asked(policy, search) == [Expand(1, 2, **ask), Expand(2, 2, **ask)]
        for parent, said in ((1, "likely"), (1, " Sure!"), (2, "not sure: impossible"), (2, "hm")):
            grow(search, parent, kind="value", aside=True, step=said)
        assert policy.worth(search, search.nodes[1]) == 21.0
        assert policy.worth(search, search.nodes[2]) == 0.001
        assert asked(policy, search) == [Expand(1, 2, hold=True)]
        assert [node.id for node in search.done] == [2], "verdicts are no solutions"


class Scripted:
    """An ask/tell algorithm that expands what it is told to, and remembers what it heard."""

    def __init__(self, plan: list[int | None]) -> None:
        self.plan = plan

    def init_tree(self) -> tuple[Any, ...]:
        return ()

    def ask_batch(self, state: Any, batch_size: int, actions: list[str]) -> Any:
        class Trial:
            def __init__(self, i: int, parent: int | None) -> None:
                self.trial_id, self.parent_state = f"t{i}", parent

        asked = sum(kind == "ask" for kind, *_ in state)
        trials = [Trial(asked + i, self.plan[asked + i]) for i in range(batch_size)]
        return (*state, *(("ask", t.trial_id) for t in trials)), trials

    def tell(self, state: Any, trial_id: str, result: Any) -> Any:
        return (*state, ("tell", trial_id, *result))


class TestAskTell:
    def test_trials_become_steps_and_scores_are_told_back(self) -> None:
        policy = AskTell(Scripted([None, None, 1]), trials=3, parallel=2)
        search = SearchTree()
        assert policy.decide(search) == [Expand(0, keep=True), Expand(0, keep=True)]
        grow(search, 0, "open")
        grow(search, 0, "open")
        assert policy.decide(search) == [Score((1, 2))]
        search.nodes[1].score, search.nodes[2].score = 0.25, 0.5
        assert policy.decide(search) == [Expand(1, keep=True)]
        assert search.notes["state"] == (
            ("ask", "t0"),
            ("ask", "t1"),
            ("tell", "t0", 1, 0.25),
            ("tell", "t1", 2, 0.5),
            ("ask", "t2"),
        )
        grow(search, 1, "open", score=0.5)
        assert policy.decide(search) == [Finish("all trials done")]

    def test_a_complete_solution_continues_as_itself(self) -> None:
        policy = AskTell(Scripted([None, 1, 1]), trials=3)
        search = SearchTree()
        policy.decide(search)
        grow(search, 0, score=0.75)
        assert policy.decide(search) == [Finish("all trials done")]

    def test_scores_beyond_0_to_1_and_what_is_no_algorithm_are_refused(self) -> None:
        policy = AskTell(Scripted([None, None]), trials=2)
        search = SearchTree()
        policy.decide(search)
        grow(search, 0, "open", score=-2.0)
        with pytest.raises(InvalidArgument, match="wants 0 to 1"):
            policy.decide(search)
        with pytest.raises(InvalidArgument, match="missing here: init_tree, ask_batch, tell"):
            AskTell(object())


BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no branches to vote": (SelfConsistency, {"num_branches": 0}, "at least 1"),
    "more in parallel than there are": (
        SelfConsistency,
        {"num_branches": 4, "parallel": 5},
        "at most all of them",
    ),
    "none in parallel": (SelfConsistency, {"parallel": 0}, "at least 1"),
    "certainty below one half": (SelfConsistency, {"stop_when": 0.5}, "above 0.5"),
    "unknown weight": (SelfConsistency, {"weight": "length"}, "'probability' or 'score'"),
    "best of none": (BestOfN, {"num_branches": 0}, "at least 1"),
    "beam without width": (StepBeam, {"width": 0}, "at least 1"),
    "beam without a choice": (StepBeam, {"width": 1, "expand": 1}, "2 candidates"),
    "unknown aggregate": (StepBeam, {"aggregate": "sum"}, "'product'"),
    "unknown selection": (StepBeam, {"select": "first"}, "'weighted'"),
    "no simulations": (MCTS, {"simulations": 0}, "at least 1"),
    "negative exploration": (MCTS, {"c_puct": -1}, "0 or more"),
    "unknown value": (MCTS, {"value": "guess"}, "score, rollout"),
    "unknown prior": (MCTS, {"prior": "flat"}, "uniform, logprob"),
    "no thoughts": (TreeOfThoughts, {"propose": 0}, "at least 1"),
    "empty value prompt": (TreeOfThoughts, {"value_prompt": ""}, "must hold something"),
    "negative budget": (Budget, {"tokens": -5}, "positive number"),
    "empty budget": (Budget, {"blocks": 0}, "positive number"),
    "no seconds": (Budget, {"seconds": float("nan")}, "positive number"),
}


@pytest.mark.parametrize(("kind", "arguments", "complaint"), BAD.values(), ids=BAD)
def test_what_makes_no_sense_is_refused_at_once(
    kind: Any, arguments: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(InvalidArgument, match=complaint):
        kind(**arguments)


def test_the_tree_answers_what_policies_ask() -> None:
    search = beam(0.1, 0.2)
    beam(0.3, parent=1, search=search)
    search.nodes[3].num_tokens, search.nodes[3].logprob = 2, -5.0
    assert [node.id for node in search.path(3)] == [1, 3]
    assert [node.id for node in search.below(0)] == [0, 1, 3, 2]
    assert (search.num_tokens(3), search.logprob(3), search.mean_logprob(3)) == (6, -6.0, -1.0)
    assert search.mean_logprob(0) == 0.0
    assert [node.id for node in search.open] == [2, 3]
    assert search.root.state == "closed"


def test_of_equal_votes_the_first_seen_leads_and_of_equal_scores_the_first_node() -> None:
    search = voted("b", "a", "a", "b")
    assert list(tally(search.done)) == ["b", "a"]
    for node in search.done:
        node.score = 1.0
    assert conclude_best(search).node == 1
