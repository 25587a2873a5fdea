"""docs/modules.md: its examples run, and it names what there is."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import adasplash_core.nn
from adasplash_core.nn import EntmaxAttention

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "modules.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.M | re.S)


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_examples_run(example: str) -> None:
    names: dict[str, Any] = {}
    exec(example, names)


def test_every_public_name_and_option_is_there() -> None:
    names = {*adasplash_core.nn.__all__} - {"KVCache", "LengthScaling"}  # a protocol, and a part that an option makes
    for method in (EntmaxAttention.__init__, EntmaxAttention.forward):
        names |= set(inspect.signature(method).parameters) - {"self", "x", "device", "dtype", "embed_dim", "num_heads"}
    assert not [name for name in sorted(names) if not re.search(rf"\b{name}\b", PAGE)]
