"""What a run plans: shares of identical devices, the order, what earlier runs have done, and how long it all takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from adasplash_core.device import device_info
from adasplash_core.errors import ArgumentError
from adasplash_tuner.search.events import Event, Finished, Planned, Request
from adasplash_tuner.search.planning import ENOUGH, CostModel, Planning, plan, problems_of, set_run_times, share_of
from adasplash_tuner.search.search import Costs, Outcome
from adasplash_tuner.search.session import tune
from adasplash_tuner.shapes.shape import PROFILES, Shape
from adasplash_tuner.storage.store import TuningStore
from tests.tuner.fakes import H100, record

LENGTHS = (64, 1024, 256)


def shapes(lengths: Sequence[int] = LENGTHS) -> tuple[Shape, ...]:
    return tuple(Shape.parse(f"B=1,H=1,L={n},D=8,float32") for n in lengths)


def planned(request: Request) -> list[Planning]:
    device = device_info("cpu")
    return plan(request, device, problems_of(request, device))[0]


def test_cheap_problems_come_first_and_passes_of_one_problem_follow_each_other() -> None:
    found = [(p.problem.spec.q_len, p.pass_) for p in planned(Request(shapes=shapes()))]
    assert found == [(n, pass_) for n in sorted(LENGTHS) for pass_ in ("forward", "backward")]


def test_shapes_of_one_bucket_are_one_search() -> None:
    assert [p.problem.spec.q_len for p in planned(Request(shapes=shapes((300, 256)), passes=("forward",)))] == [300]


def test_the_default_is_the_first_candidate_and_none_is_there_twice() -> None:
    for planning in planned(Request(shapes=shapes())):
        assert planning.space[0] == planning.backend.default_config(planning.problem.spec, device_info("cpu"), planning.pass_)
        assert len(planning.space) == len(set(planning.space)) > 2


def test_identical_devices_get_everything_once_and_about_the_same_work() -> None:
    request = Request(shapes=tuple(Shape.parse(text) for text in PROFILES["cuda", "full"].shapes), device="cuda:0")
    problems = problems_of(request, H100)
    parts = [share_of(problems, (n, 4)) for n in range(4)]
    assert sorted(p.shape for part in parts for p in part) == sorted(p.shape for p in problems)
    work = [sum(p.work("forward") for p in part) for part in parts]
    heaviest = max(p.work("forward") for p in problems)
    assert max(work) == heaviest  # no device waits for more than the one problem that cannot be split
    assert min(work) > 0


def test_nothing_to_tune_is_an_error_only_where_nobody_else_has_work() -> None:
    with pytest.raises(ArgumentError, match="Something must be left to tune"):
        planned(Request(shapes=(), backends=("triton",), passes=("forward",)))
    assert planned(Request(shapes=(), backends=("triton",), passes=("forward",), part=(1, 2))) == []


def test_tf32_is_planned_for_nvidias_gpus_alone() -> None:
    request = Request(shapes=(Shape.parse("H=1,L=64,D=8,tf32"), Shape.parse("H=1,L=64,D=8,fp32")), device="cuda:0")
    assert [p.spec.arithmetic for p in problems_of(request, H100)] == ["tf32", "float32"]
    with pytest.raises(ArgumentError, match="TF32 is of NVIDIA's GPUs.*Hint: write fp32"):
        problems_of(request, device_info("cpu"))


def test_inputs_of_every_class_are_measured_and_told_apart_from_those_with_a_warm_cache() -> None:
    cold, warm = (problems_of(Request(device="cuda:0", cold_l2=cold), H100)[0] for cold in (True, False))
    assert (cold.inputs, cold.input_count) == ("random, dense+moderate+sparse", 3)
    assert warm.inputs == "random, dense+moderate+sparse, warm L2"


# -- how long -----------------------------------------------------------------------------------------------------------------------


def one(left: int = 10, run_s: float = 0.01) -> Planning:
    planning = planned(Request(shapes=shapes((256,)), passes=("forward",)))[0]
    planning.left, planning.run_s = left, run_s
    return planning


def finished(costs: Costs, verdict: str = "tuned") -> Outcome:
    return Outcome(record(), verdict, {}, 10, 10, costs=costs)  # type: ignore[arg-type]


def test_what_is_done_takes_no_time_and_more_candidates_take_more() -> None:
    costs = CostModel(on_gpu=True, compiling=4)
    assert costs.seconds(one(left=20)) > costs.seconds(one(left=10)) > costs.seconds(one(left=0)) > 0
    assert costs.seconds(one(left=20), most_candidates=10) == costs.seconds(one(left=10))
    done = one(left=0)
    done.tuned = record()
    assert costs.seconds(done) == 0


def test_estimates_follow_what_searches_really_took() -> None:
    costs = CostModel(on_gpu=True, compiling=4)
    guess = costs.seconds(one())
    for _ in range(5):
        costs.learn(one(), finished(Costs(start_s=8.0, candidate_s=9.0, final_s=5.0)))
    assert costs.seconds(one()) > guess
    assert costs.seconds(one()) == pytest.approx(8.0 + 10 * 9.0 + 5.0)
    assert costs.least_seconds(one()) == pytest.approx(8.0 + 0.5 * (5.0 - 2.4))


def test_a_search_that_found_everything_measured_teaches_nothing() -> None:
    costs = CostModel(on_gpu=False, compiling=1)
    before = costs.seconds(one())
    costs.learn(one(), finished(Costs(), "kept"))
    assert costs.seconds(one()) == before
    assert costs.least_seconds(one()) == 0  # nothing like it was made yet


def test_time_is_shared_by_need_but_a_search_gets_enough_to_be_worth_its_start() -> None:
    costs = CostModel(on_gpu=True, compiling=4)
    ahead = [one(left=200), one(left=100), one(left=100)]
    needed = [costs.seconds(p) for p in ahead]
    plenty = sum(needed)
    assert costs.share(ahead, plenty) == pytest.approx(needed[0])
    assert costs.share(ahead, plenty / 2) == pytest.approx(needed[0] / 2)
    assert costs.share(ahead, 12.0) == pytest.approx(
        max(12.0 * needed[0] / plenty, 1.25 * 4.0)
    )  # nothing is known: about its turn
    ahead = [one(left=100) for _ in range(3)]
    costs.learn(ahead[0], finished(Costs(4.0, 2.0, 4.4)))
    for count in ENOUGH:
        enough = costs.seconds(ahead[0], count)
        assert costs.share(ahead, 3 * enough) == pytest.approx(enough)
    assert costs.share(ahead, 2.5 * enough) == pytest.approx(enough)  # the last one will have to wait
    assert costs.share(ahead, enough / 2) == pytest.approx(enough / 2)


def test_running_times_follow_from_one_probe_a_backend_on_what_is_left() -> None:
    plannings = planned(Request(shapes=shapes(), passes=("forward",)))
    plannings[0].tuned, plannings[0].left = record(), 0
    asked: list[int | None] = []

    def probe(planning: Planning) -> float:
        asked.append(planning.problem.spec.q_len)
        return 0.5

    set_run_times(plannings, probe)
    assert asked == [256]
    assert [p.run_s for p in plannings[1:]] == [0.5, pytest.approx(8.0)]


# -- a run after another ------------------------------------------------------------------------------------------------------------


def test_however_short_the_budget_one_problem_is_tuned_in_both_passes(store: TuningStore) -> None:
    report = tune(Request(shapes=shapes((64, 384)), budget_s=0.01))
    assert [(f.label.split()[-1], f.postponed) for f in report.finished] == [
        ("forward", False),
        ("backward", False),
        ("forward", True),
        ("backward", True),
    ]


def test_a_second_run_makes_what_the_first_had_no_time_for(store: TuningStore) -> None:
    request = Request(shapes=shapes((64, 128 * 3)), passes=("forward",), budget_s=0.05)
    told: list[Event] = []
    first = tune(request, told.append)
    assert [f.postponed for f in first.finished] == [False, True]
    assert first.ok
    second = tune(replace(request, budget_s=60.0), told.append)  # it ends when all is measured
    assert all(f.outcome is not None and f.outcome.left == 0 for f in second.finished)
    third_told: list[Event] = []
    third = tune(request, third_told.append)  # however short the budget: there is nothing left to do
    assert [f.outcome.verdict if f.outcome else None for f in third.finished] == ["kept", "kept"]
    (plan_event,) = [event for event in third_told if isinstance(event, Planned)]
    assert plan_event.estimate_s == 0
    assert all(event.left_s == 0 for event in third_told if isinstance(event, Finished))
