"""The search on a simulated device, whose clock is what its runs take."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from adasplash_core.backend import KernelConfig
from adasplash_core.errors import ConfigRejectedError
from adasplash_tuner.key import TuningKey
from adasplash_tuner.measure.compiling import Preparation, Unprepared
from adasplash_tuner.measure.statistics import Samples, compare, is_faster, is_no_faster
from adasplash_tuner.search.search import Outcome, Progress, Search
from adasplash_tuner.storage.records import BestConfig, Measurement, config_text
from adasplash_tuner.storage.store import TuningStore
from tests.tuner.fakes import BlockConfig

DEFAULT = BlockConfig(64, 8)


class Device:
    """Runs configs in ``times`` seconds with relative noise, and counts how often each ran."""

    first_run_counts = True
    labels = ("the only input",)

    def __init__(
        self, times: Callable[[BlockConfig], float], noise: float = 0.0, error: Callable[[BlockConfig], float] = lambda _c: 1e-4
    ) -> None:
        self.default = DEFAULT
        self.times, self.noise, self.error = times, noise, error
        self.now = 0.0
        self.checked: list[BlockConfig] = []
        self.timed: list[BlockConfig] = []
        self.random = random.Random(0)

    def _run(self, config: BlockConfig) -> float:
        seconds = self.times(config) * (1 + self.noise * self.random.gauss(0, 1))
        self.now += seconds
        return seconds * 1e3

    def check(self, config: BlockConfig) -> tuple[float, float]:
        self.checked.append(config)
        return self.error(config), self._run(config)

    def time(self, config: BlockConfig) -> list[float]:
        self.timed.append(config)
        return [self._run(config)]

    def error_bound(self) -> float:
        return 1e-3

    def is_fatal(self, failure: Exception) -> bool:
        return isinstance(failure, FloatingPointError)


def candidates(count: int = 12) -> list[BlockConfig]:
    return [BlockConfig(16 * (n + 1), 8) for n in range(count)]


def search(
    device: Device,
    store: TuningStore,
    key: TuningKey,
    space: list[BlockConfig] | None = None,
    budget_s: float = 1e6,
    incumbent: BestConfig | None = None,
    fresh: bool = False,
    observe: Callable[[Progress], None] = lambda _p: None,
    announce: Callable[[KernelConfig], None] = lambda _c: None,
    preparation: Preparation | None = None,
) -> Outcome:
    device.now = 0.0
    made = Search(
        key=key,
        bench=device,  # type: ignore[arg-type]
        candidates=candidates() if space is None else space,
        shape="s",
        inputs="i",
        memory=store,
        version="test",
        deadline=budget_s,
        incumbent=incumbent,
        fresh=fresh,
        observe=observe,
        announce=announce,
        preparation=preparation or Unprepared(),
        clock=lambda: device.now,
    )
    return made.run()


def winner(store: TuningStore) -> BestConfig:
    (row,) = store.rows()
    assert row.usable is not None
    return row.usable


def slope(config: BlockConfig) -> float:
    """Fastest at block_n = 160, 1.6 times as fast as the default."""
    return 1.0 + abs(config.block_n - 160) / 160


def test_the_fastest_config_is_found_stored_and_compared_to_the_default(store: TuningStore, key: TuningKey) -> None:
    outcome = search(Device(slope, noise=0.01), store, key)
    assert outcome.verdict == "tuned"
    assert outcome.best.config == {"block_n": 160, "iterations": 8}
    assert outcome.best.gain == pytest.approx(1.6, rel=0.03)
    assert winner(store) == outcome.best
    assert (outcome.candidates, outcome.left) == (12, 0)


def test_the_default_wins_ties(store: TuningStore, key: TuningKey) -> None:
    outcome = search(Device(lambda config: 1.0 if config == DEFAULT else 0.985), store, key)  # faster, by less than two percent
    assert outcome.verdict == "default"
    assert winner(store).config == DEFAULT.to_dict()
    assert winner(store).gain == 1.0


def test_the_default_wins_against_what_may_be_noise(store: TuningStore, key: TuningKey) -> None:
    outcome = search(Device(lambda _config: 1.0, noise=0.3), store, key)
    assert outcome.verdict == "default"


def test_the_default_competes_though_it_is_not_among_the_candidates(store: TuningStore, key: TuningKey) -> None:
    outcome = search(Device(lambda c: 0.5 if c == DEFAULT else 1.0), store, key, space=[BlockConfig(999, 8)])
    assert (outcome.verdict, outcome.candidates) == ("default", 2)


def test_a_backend_without_candidates_gets_its_default_measured(store: TuningStore, key: TuningKey) -> None:
    outcome = search(Device(slope), store, key, space=[])
    assert (outcome.verdict, outcome.candidates) == ("default", 1)
    assert winner(store).median_ms == pytest.approx(1600)


def test_a_fast_config_that_is_inaccurate_is_not_admitted(store: TuningStore, key: TuningKey) -> None:
    device = Device(slope, error=lambda c: 0.1 if c.block_n == 160 else 1e-4)
    outcome = search(device, store, key)
    assert outcome.best.config["block_n"] in (144, 176)
    assert outcome.best.error == 1e-4
    (why,) = outcome.refused.values()
    assert why == "relative error 0.1 exceeds 0.001"
    assert BlockConfig(160, 8) not in device.timed


def test_a_config_that_gives_nan_is_not_admitted(store: TuningStore, key: TuningKey) -> None:
    outcome = search(Device(slope, error=lambda c: float("nan") if c.block_n == 160 else 1e-4), store, key)
    assert outcome.best.config["block_n"] != 160


def test_where_the_default_misses_the_bound_twice_its_error_is_the_bound(store: TuningStore, key: TuningKey) -> None:
    errors = {64: 0.01, 160: 0.03, 144: 0.015}
    outcome = search(Device(slope, error=lambda c: errors.get(c.block_n, 1e-4)), store, key)
    assert list(outcome.refused.values()) == ["relative error 0.03 exceeds 0.02"]


def test_a_config_that_raises_is_recorded_and_the_search_goes_on(store: TuningStore, key: TuningKey) -> None:
    def times(config: BlockConfig) -> float:
        if config.block_n == 160:
            raise ConfigRejectedError("fake", config, "out of shared memory")
        return slope(config)

    outcome = search(Device(times), store, key)
    assert outcome.verdict == "tuned"
    assert "out of shared memory" in outcome.refused[config_text({"block_n": 160, "iterations": 8})]
    failed = [m for m in store.measurements(key) if m.status == "failed"]
    assert [m.config["block_n"] for m in failed] == [160]


def test_a_default_that_raises_ends_the_search(store: TuningStore, key: TuningKey) -> None:
    def times(config: BlockConfig) -> float:
        raise MemoryError("no room")

    with pytest.raises(MemoryError):
        search(Device(times), store, key)
    assert store.rows() == []


def test_a_config_that_takes_the_device_with_it_is_remembered_before_the_process_gives_up(
    store: TuningStore, key: TuningKey
) -> None:
    def times(config: BlockConfig) -> float:
        if config.block_n == 48:
            raise FloatingPointError("the device is lost")
        return slope(config)

    with pytest.raises(FloatingPointError):
        search(Device(times), store, key)
    resumed = search(Device(times), store, key)  # a new process, which leaves that config alone
    assert resumed.verdict == "tuned"


def test_hopeless_configs_run_once(store: TuningStore, key: TuningKey) -> None:
    device = Device(lambda c: 50.0 if c.block_n > 100 else slope(c))
    search(device, store, key)
    assert not any(c.block_n > 100 for c in device.timed)


def test_the_budget_is_kept_and_the_rest_is_left_to_the_next_run(store: TuningStore, key: TuningKey) -> None:
    device = Device(slope)
    first = search(device, store, key, budget_s=30.0)
    assert first.left > 0
    assert device.now < 40.0
    second_device = Device(slope)
    second = search(second_device, store, key, budget_s=60.0, incumbent=winner(store))
    assert second.left < first.left
    measured_first = set(device.checked)
    screened_again = [c for c in second_device.checked if c in measured_first and second_device.checked.count(c) > 1]
    assert screened_again == []


def test_a_search_that_was_interrupted_goes_on_where_it_stopped(store: TuningStore, key: TuningKey) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.stage == "screening" and progress.done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(Device(slope), store, key, observe=interrupt)
    assert store.rows() == []
    seen = {config_text(m.config) for m in store.measurements(key)}
    assert len(seen) == 7
    device = Device(slope)
    outcome = search(device, store, key)
    assert outcome.best.config["block_n"] == 160
    screened = [m for m in store.measurements(key) if m.stage == "screening"]
    others = [config_text(m.config) for m in screened if m.config != DEFAULT.to_dict()]
    assert len(others) == len(set(others))  # none but the default was screened twice


def test_an_interrupted_final_keeps_its_rounds(store: TuningStore, key: TuningKey) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.stage == "final" and progress.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(Device(slope), store, key, observe=interrupt)
    assert {m.samples for m in store.measurements(key) if m.stage == "final"} == {2}


def test_what_is_tuned_is_not_measured_again_unless_asked(store: TuningStore, key: TuningKey) -> None:
    search(Device(slope), store, key)
    idle = Device(slope)
    again = search(idle, store, key, incumbent=winner(store))
    assert again.verdict == "kept"
    assert idle.checked == []
    asked = Device(slope)
    assert search(asked, store, key, incumbent=winner(store), fresh=True).verdict == "tuned"
    assert len(set(asked.checked)) == 12


def test_new_candidates_are_measured_without_the_old_ones(store: TuningStore, key: TuningKey) -> None:
    search(Device(slope), store, key, space=candidates(6))
    device = Device(slope)
    outcome = search(device, store, key, incumbent=winner(store))
    assert outcome.best.config["block_n"] == 160
    assert {c.block_n for c in device.checked} >= {16 * n for n in range(7, 13)}
    assert 16 not in {c.block_n for c in device.checked}


def test_the_stored_winner_competes_again_and_yields_to_a_better_one(store: TuningStore, key: TuningKey) -> None:
    search(Device(slope), store, key)
    old = winner(store)

    def now_slower(config: BlockConfig) -> float:
        return 3.0 if config.block_n == 160 else 1.5 * slope(config)

    outcome = search(Device(now_slower), store, key, incumbent=old, fresh=True)
    assert outcome.best.config["block_n"] in (144, 176)
    assert winner(store) == outcome.best  # although its time is longer than the old one's was


def test_a_stored_winner_that_there_was_no_time_to_run_again_stays(store: TuningStore, key: TuningKey) -> None:
    search(Device(slope), store, key)
    old = winner(store)
    lucky = Measurement({"block_n": 112, "iterations": 8}, "s", "i", "screening", "ok", 1, "test", median_ms=1.0, error=1e-4)
    store.add_measurement(key, lucky)  # so that it comes before the winner
    new = BlockConfig(500, 8)  # so that there is something left to do
    late = search(Device(slope), store, key, space=[*candidates(), new], incumbent=old, budget_s=1.0)
    assert late.best.config["block_n"] == 112
    assert winner(store) == old


def test_a_stored_winner_that_fails_by_now_is_replaced(store: TuningStore, key: TuningKey) -> None:
    search(Device(slope), store, key)

    def times(config: BlockConfig) -> float:
        if config.block_n == 160:
            raise ConfigRejectedError("fake", config, "the driver has changed")
        return 2 * slope(config)

    outcome = search(Device(times), store, key, incumbent=winner(store), fresh=True)
    assert winner(store) == outcome.best
    assert outcome.best.config["block_n"] in (144, 176)


def test_measuring_stops_when_the_verdict_is_clear_either_way(store: TuningStore, key: TuningKey) -> None:
    faster = search(Device(slope, noise=0.01), store, key)
    no_faster = search(Device(lambda c: 1.0 if c == DEFAULT else 1.3, noise=0.01), store, key, fresh=True)
    assert faster.best.samples < 12
    assert (no_faster.verdict, no_faster.best.samples < 12) == ("default", True)


def test_progress_tells_stage_default_and_best(store: TuningStore, key: TuningKey) -> None:
    seen: list[Progress] = []
    search(Device(slope), store, key, observe=seen.append)
    assert next(p.stage for p in seen if p.done == 1) == "screening"
    assert {p.stage for p in seen} == {"screening", "halving", "final"}
    assert all(p.done <= p.total for p in seen)
    assert seen[-1].best_ms == pytest.approx(1000)
    assert seen[-1].default_ms == pytest.approx(1600)


# -- compiling ahead, and what comes next --------------------------------------------------------------------------------------------


class Compiler:
    """Has configs ready in an order of its own, and refuses some."""

    width = 3

    def __init__(self, device: Device, refuses: Callable[[BlockConfig], str] = lambda _c: "") -> None:
        self.device, self.refuses = device, refuses
        self.waiting: list[BlockConfig] = []
        self.submitted: list[BlockConfig] = []

    def submit(self, config: KernelConfig) -> None:
        assert isinstance(config, BlockConfig)
        self.waiting.append(config)
        self.submitted.append(config)
        assert len(self.waiting) <= self.width

    def next(self, timeout_s: float) -> tuple[KernelConfig, str] | None:
        if timeout_s < 0:
            return None
        config = self.waiting.pop()  # the last first
        return config, self.refuses(config)

    def close(self) -> None:
        self.waiting.clear()


def test_a_config_that_does_not_compile_never_runs_and_is_remembered(store: TuningStore, key: TuningKey) -> None:
    device = Device(slope)
    compiler = Compiler(device, lambda c: "spills 400 bytes" if c.block_n == 160 else "")
    outcome = search(device, store, key, preparation=compiler)
    assert outcome.best.config["block_n"] in (144, 176)
    assert list(outcome.refused.values()) == ["spills 400 bytes"]
    assert BlockConfig(160, 8) not in device.checked
    assert DEFAULT not in compiler.submitted  # it runs whatever it spills
    again = Compiler(device)
    search(device, store, key, preparation=again, incumbent=winner(store))
    assert again.submitted == []


def test_every_config_is_announced_before_it_first_runs(store: TuningStore, key: TuningKey) -> None:
    device = Device(slope)
    announced: list[BlockConfig] = []

    def announce(config: KernelConfig) -> None:
        assert config not in device.checked
        announced.append(config)  # type: ignore[arg-type]

    search(device, store, key, announce=announce)
    assert announced == device.checked


def test_with_little_time_the_neighbours_of_the_best_come_before_the_rest(store: TuningStore, key: TuningKey) -> None:
    """A space of 400, of which a tenth can be measured: the best of it is found all the same."""

    def bowl(config: BlockConfig) -> float:
        return 1.0 + abs(config.block_n - 256) / 128 + abs(config.iterations - 15) / 8

    space = [BlockConfig(16 * (n + 1), iterations) for n in range(20) for iterations in range(1, 21)]
    random.Random(1).shuffle(space)
    device = Device(bowl, noise=0.002)
    outcome = search(device, store, key, space=space, budget_s=300.0)
    assert outcome.left > 320
    assert (outcome.best.config["block_n"], outcome.best.config["iterations"]) == (256, 15)


def test_an_outcome_says_how_sure_it_is_and_what_each_input_gained(store: TuningStore, key: TuningKey) -> None:
    outcome = search(Device(slope, noise=0.01), store, key)
    assert outcome.gain_interval is not None
    low, high = outcome.gain_interval
    assert low < 1.6 < high
    assert high / low < 1.1
    (times,) = outcome.by_input
    assert times.label == "the only input"
    assert times.best_ms == pytest.approx(outcome.best.median_ms)
    assert outcome.error_bound == 1e-3
    assert {m.config["block_n"] for m in outcome.measurements} == {c.block_n for c in candidates()}
    assert outcome.costs.candidate_s == pytest.approx(2 * sum(map(slope, candidates())) / 12, rel=0.3)


# -- statistics -------------------------------------------------------------------------------------------------------------------


def rounds(*values: float) -> Samples:
    return Samples([[v] for v in values])


def test_a_machine_that_slows_down_does_not_change_a_paired_comparison() -> None:
    default, candidate = rounds(10, 20, 40, 80), rounds(9, 18, 36, 72)
    found = compare(candidate, default)
    assert found.ratio == pytest.approx(0.9)
    assert found.noise == pytest.approx(0, abs=1e-12)
    assert found.interval == pytest.approx((0.9, 0.9))
    assert is_faster(candidate, default)


def test_a_short_input_weighs_as_much_as_a_long_one() -> None:
    default = Samples([[1.0, 1000.0]] * 5)
    candidate = Samples([[0.5, 2000.0]] * 5)
    assert compare(candidate, default).ratio == pytest.approx(1.0)
    assert default.median_ms / candidate.median_ms == pytest.approx(1.0)


def test_a_config_that_is_slower_on_one_input_is_not_taken_however_fast_it_is_on_the_others() -> None:
    default = Samples([[1.0, 1.0, 1.0]] * 9)
    assert is_faster(Samples([[0.5, 0.5, 1.005]] * 9), default)
    slower_on_one = Samples([[0.5, 0.5, 1.03]] * 9)
    assert not is_faster(slower_on_one, default)
    assert is_no_faster(slower_on_one, default)


def test_what_may_be_noise_on_one_input_does_not_refuse_a_gain_on_all() -> None:
    noisy = [1.0, 1.4, 0.8, 1.3, 1.1, 1.35, 0.9, 1.2, 1.05]
    default = Samples([[1.0, 1.0]] * 9)
    candidate = Samples([[0.3, value] for value in noisy])
    assert is_faster(candidate, default)
    assert not is_no_faster(candidate, default)


def test_the_interval_is_wider_the_noisier_and_the_fewer_the_rounds() -> None:
    def width(*values: float) -> float:
        low, high = compare(rounds(*values), rounds(*[1.0] * len(values))).interval
        return high / low

    calm, few, noisy = width(*[0.9, 0.91, 0.89] * 3), width(0.9, 0.91, 0.89), width(*[0.9, 1.0, 0.8] * 3)
    assert 1 < calm < few < noisy


def test_there_is_no_verdict_from_two_rounds() -> None:
    assert not is_faster(rounds(1, 1), rounds(2, 2))
    assert is_faster(rounds(1, 1, 1), rounds(2, 2, 2))


def test_an_outlier_does_not_move_the_median_or_the_spread() -> None:
    samples = rounds(1.0, 1.01, 0.99, 1.0, 50.0)
    assert samples.median_ms == 1.0
    assert samples.spread_ms < 0.03
