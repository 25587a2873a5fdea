"""The order in which a space of configs is explored."""

from __future__ import annotations

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from adasplash_tuner.search.space import MAX_SPACE, Neighbourhood, candidates, covering
from tests.tuner.fakes import H100, SPEC, BlockConfig, FakeBackend

GRID = [{"keys": keys, "warps": warps, "stages": stages} for keys, warps, stages in product((32, 64, 128), (4, 8), (1, 2, 3))]
SPACES = st.lists(st.fixed_dictionaries({"a": st.integers(0, 4), "b": st.integers(0, 4), "c": st.booleans()}), max_size=20)


@given(SPACES, SPACES)
def test_covering_shows_every_value_once_and_no_config_in_vain(space: list[dict[str, int]], seen: list[dict[str, int]]) -> None:
    order = covering(space, seen)
    shown = {item for config in seen for item in config.items()}
    for index in order:
        assert set(space[index].items()) - shown
        shown |= set(space[index].items())
    assert shown >= {item for config in space for item in config.items()}
    assert len(set(order)) == len(order)


def test_covering_a_grid_takes_as_many_configs_as_its_longest_field() -> None:
    assert len(covering(GRID)) == 3
    assert covering(GRID)[0] == 0  # of several the most promising


def test_the_nearest_config_differs_in_the_fewest_fields_by_the_fewest_steps() -> None:
    space = {str(n): config for n, config in enumerate(GRID)}
    near = Neighbourhood(space)
    best = {"keys": 32, "warps": 8, "stages": 1}
    left = list(space)
    order = []
    while (name := near.nearest(left, best)) is not None:
        order.append(near.distance(space[name], best))
        left.remove(name)
    assert order[:6] == [(0, 0), (1, 1), (1, 1), (1, 1), (1, 2), (1, 2)]
    assert order == sorted(order)
    assert len(order) == len(GRID)


def test_of_equally_near_configs_the_more_promising_comes_first() -> None:
    space = {"first": {"a": 1, "b": "x"}, "second": {"a": 2, "b": "y"}}
    assert Neighbourhood({**space, "best": {"a": 2, "b": "x"}}).nearest(space, {"a": 2, "b": "x"}) == "first"


def test_candidates_are_the_default_and_the_space_once_each_and_never_too_many() -> None:
    class Endless(FakeBackend):
        def tuning_space(self, spec: object, device: object, pass_: object) -> object:  # type: ignore[override]
            yield BlockConfig(64, 8)  # the default
            yield BlockConfig(128, 8)
            yield BlockConfig(128, 8)
            number = 0
            while True:
                number += 1
                yield BlockConfig(1000 + number, 8)

    found = candidates(Endless(), SPEC, H100, "forward")
    assert found[:2] == [BlockConfig(64, 8), BlockConfig(128, 8)]
    assert len(found) == len(set(found)) == MAX_SPACE - 1
