"""The ladder: where a config comes from, and that it is remembered."""

from __future__ import annotations

from typing import Any

import pytest

from adasplash_core.configs import ConfigLadder, FoundConfig, Rung, parse_explicit
from adasplash_core.errors import AdasplashWarning, ConfigError
from tests.core.fakes import CPU, FakeConfig, MeanBackend, Provider, spec

BACKEND = MeanBackend()


def found(rung: Rung, block: int) -> FoundConfig:
    return FoundConfig(FakeConfig(block=block), rung)


def test_the_best_rung_over_all_providers_wins() -> None:
    shipped, user = Provider("a", {"forward": found(Rung.SHIPPED, 1)}), Provider("b", {"forward": found(Rung.USER_DATABASE, 2)})
    assert ConfigLadder([shipped, user]).find(BACKEND, spec(), CPU, "forward").config == FakeConfig(block=2)
    stale = Provider("c", {"forward": found(Rung.STALE, 3)})
    assert ConfigLadder([shipped, stale]).find(BACKEND, spec(), CPU, "forward").rung is Rung.STALE


def test_without_an_answer_the_heuristic_is_used_and_the_miss_explained() -> None:
    miss = Provider(answers={"forward": FoundConfig(FakeConfig(), Rung.HEURISTIC, "nearest row differs in dtype")})
    answer = ConfigLadder([miss]).find(BACKEND, spec(), CPU, "forward")
    assert (answer.rung, answer.config, answer.detail) == (Rung.HEURISTIC, FakeConfig(), "nearest row differs in dtype")


def test_providers_are_asked_once_a_key_until_cleared() -> None:
    provider = Provider(answers={"forward": found(Rung.USER_DATABASE, 2)})
    ladder = ConfigLadder([provider])
    for _ in range(3):
        ladder.find(BACKEND, spec(), CPU, "forward")
    assert provider.asked == 1
    generation = ladder.generation
    ladder.clear()
    ladder.find(BACKEND, spec(), CPU, "forward")
    assert (provider.asked, ladder.generation) == (2, generation + 1)


def test_a_provider_that_raises_is_passed_over_with_one_warning() -> None:
    class Broken(Provider):
        def find(self, *_: Any) -> FoundConfig | None:
            raise OSError("disk full")

    good = Provider("good", {"forward": found(Rung.USER_DATABASE, 2)})
    with pytest.warns(AdasplashWarning, match="'raiser' failed and is passed over.*disk full"):
        assert ConfigLadder([Broken("raiser"), good]).find(BACKEND, spec(), CPU, "forward").config == FakeConfig(block=2)


def test_a_rejected_config_gives_way_to_the_default_and_providers_are_told() -> None:
    provider = Provider(answers={"forward": found(Rung.USER_DATABASE, 5000)})
    ladder = ConfigLadder([provider])
    ladder.find(BACKEND, spec(), CPU, "forward")
    with pytest.warns(AdasplashWarning, match="cannot run the tuned forward config.*too large"):
        ladder.reject(BACKEND, spec(), CPU, "forward", FakeConfig(block=5000), "too large")
    assert ladder.find(BACKEND, spec(), CPU, "forward").config == FakeConfig()
    assert provider.rejected == ["too large"]


@pytest.mark.parametrize("given", [FakeConfig(block=8), {"block": 8}])
def test_explicit_configs_are_parsed_per_pass(given: Any) -> None:
    assert parse_explicit(BACKEND, {"forward": given}, "forward") == FakeConfig(block=8)
    assert parse_explicit(BACKEND, {"forward": given}, "backward") is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"block": 8}, "has the key 'block', which is no pass"),
        ({"forward": {"blok": 8}}, "has no field 'blok' .did you mean 'block'.*Its fields are block, fast"),
        ({"forward": {"block": "8"}}, "wants int for 'block', got '8'"),
        ({"forward": {"block": True}}, "wants int for 'block', got True"),
    ],
)
def test_bad_explicit_configs_say_what_is_wrong(config: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_explicit(BACKEND, config, "forward")
