"""Importing the package and finding plugins costs nothing heavy."""

from __future__ import annotations

import json
import subprocess
import sys

HEAVY = ["torch", "numpy", "sqlalchemy", "triton", "cupy", "transformers", "rich", "safetensors"]


def loaded_after(code: str) -> list[str]:
    probe = f"{code}\nimport json, sys; print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    return list(json.loads(result.stdout.splitlines()[-1]))


def test_import_loads_nothing_heavy() -> None:
    assert loaded_after("import adasplash_core; adasplash_core.__version__; dir(adasplash_core)") == []


def test_loading_plugins_imports_neither_torch_nor_a_compiler_nor_sqlalchemy() -> None:
    assert loaded_after("from adasplash_core import plugins; assert 'torch' in plugins.registry().backends") == []


def test_attention_loads_torch_and_no_other_backends_libraries() -> None:
    code = "import torch, adasplash_core as a; x = torch.randn(1, 1, 4, 8); a.attention(x, x, x, backend='torch')"
    assert not {"triton", "cupy", "transformers", "rich"} & set(loaded_after(code))


def test_every_public_name_resolves() -> None:
    import adasplash_core

    for name in adasplash_core.__all__:
        assert getattr(adasplash_core, name) is not None
