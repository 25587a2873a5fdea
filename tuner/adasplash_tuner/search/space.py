"""In which order a space of configs is explored when there may be no time for all of it.

Backends list candidates with the most promising first. A space is first walked so that every value of every field is seen early, each
in the most promising config that shows it; from then on the configs nearest to the best one found so far come next.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adasplash_core.backend import AttentionBackend, KernelConfig
    from adasplash_core.device import DeviceInfo
    from adasplash_core.spec import AttentionSpec, Pass

MAX_SPACE = 4096
"""No more candidates than this are considered: whatever a backend's space generates, planning stays cheap."""

ConfigFields = Mapping[str, Any]


def candidates(backend: AttentionBackend, spec: AttentionSpec, device: DeviceInfo, pass_: Pass) -> list[KernelConfig]:
    """The default, then the backend's space without repetitions, in its order."""
    space: Iterable[KernelConfig] = backend.tuning_space(spec, device, pass_)
    return list(dict.fromkeys([backend.default_config(spec, device, pass_), *islice(space, MAX_SPACE)]))


def covering(space: Sequence[ConfigFields], seen: Iterable[ConfigFields] = ()) -> list[int]:
    """Indices of few configs that together show every value of every field that ``seen`` does not show.

    Greedy: each next config shows the most values not shown yet; of several, the first.
    """
    shown = {value for config in seen for value in config.items()}
    left = {index: set(config.items()) - shown for index, config in enumerate(space)}
    order: list[int] = []
    while True:
        left = {index: values for index, values in left.items() if values}
        if not left:
            return order
        chosen = max(left, key=lambda index: (len(left[index]), -index))
        new = left.pop(chosen)
        order.append(chosen)
        for values in left.values():
            values -= new


class Neighbourhood:
    """Which configs of one class are near to each other: those that differ in few fields, and of these those a few values apart."""

    def __init__(self, space: Mapping[str, ConfigFields]) -> None:
        self.space = space
        values: dict[str, set[Any]] = {}
        for config in space.values():
            for name, value in config.items():
                values.setdefault(name, set()).add(value)
        self._ranks = {name: {v: rank for rank, v in enumerate(sorted(found, key=_order))} for name, found in values.items()}

    def distance(self, a: ConfigFields, b: ConfigFields) -> tuple[int, int]:
        """In how many fields two configs differ, and by how many steps of their values in all."""
        differing = [name for name in a if a[name] != b[name]]
        return len(differing), sum(abs(self._ranks[name][a[name]] - self._ranks[name][b[name]]) for name in differing)

    def nearest(self, left: Iterable[str], to: ConfigFields) -> str | None:
        """Of ``left``, names into the space, the config nearest to ``to``; of several, the first."""
        return min(left, key=lambda name: self.distance(self.space[name], to), default=None)


def _order(value: Any) -> tuple[str, Any]:
    """Numbers by size; strings and booleans among themselves."""
    return ("", value) if isinstance(value, (int, float)) else (type(value).__name__, value)
