"""AttentionBackend: the contract between the core and whoever computes attention.

A backend declares what it supports, says in sentences why it cannot do a call, computes forward and backward on plain tensors
(it never touches autograd, ``torch.library`` or ``torch.compile``: the core does), and describes its tunable configs.
This module imports no torch, so that registering a backend costs nothing.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

from adasplash_core.errors import ConfigError
from adasplash_core.spec import FEATURES, AttentionSpec, Pass

if TYPE_CHECKING:
    import torch

    from adasplash_core.device import DeviceInfo

BACKEND_API_VERSION = 1
"""Raised when this contract changes in a way that breaks backends; a backend built for another version is not used."""


@dataclass(frozen=True)
class KernelConfig:
    """Base of each backend's tunable parameters of one pass: a frozen dataclass of numbers, strings and booleans.

    Subclass it once a pass, with a default for every field.
    """

    def to_dict(self) -> dict[str, int | float | str | bool]:
        return asdict(self)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Build from JSON-like values.

        Raises
        ------
        ConfigError: for an unknown field, a missing one, or a value of another type than the field's default.
        """
        known = {f.name: f for f in fields(cls)}
        for name, value in values.items():
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                raise ConfigError(cls.__name__, f"has no field {name!r}{hint}", fields=known)
            default = known[name].default
            if default is not MISSING and type(value) is not type(default):
                expected, got = type(default).__name__, type(value).__name__
                raise ConfigError(cls.__name__, f"wants {expected} for {name!r}, got {value!r} ({got})", fields=known)
        try:
            return cls(**values)
        except TypeError as error:
            raise ConfigError(cls.__name__, f"cannot be built: {error}", fields=known) from error


class SavedTensor(NamedTuple):
    """Shape and dtype (torch's name) of one tensor kept for the backward. Sizes may be symbolic integers."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(eq=False, slots=True)
class AttentionCall:
    """One call's tensors and numbers, validated by the core. Backends read it and never modify it.

    Shapes use B batch, H query heads, Hkv key heads (H a multiple of Hkv: query head h reads key head h // (H // Hkv)),
    Lq, Lk lengths, E and Ev head dims. Any strides. ``adasplash_core.masking`` turns the mask arguments into per-row key intervals.
    """

    spec: AttentionSpec
    config: KernelConfig
    query: torch.Tensor  # (B, H, Lq, E); packed: (1, H, total_q, E)
    key: torch.Tensor  # (B, Hkv, Lk, E)
    value: torch.Tensor  # (B, Hkv, Lk, Ev)
    alpha: torch.Tensor  # () or (H,), floating point on the query's device; float64 where the caller gave a number
    scale: float
    attn_mask: torch.Tensor | None = (
        None  # spec.mask "key": bool (B or 1, Lk); else bool or float, 4-d, broadcastable to (B, H, Lq, Lk)
    )
    query_offset: int | torch.Tensor = 0  # key position of query 0 under "top_left"; int, () or (B,) tensor
    window: tuple[int, int] = (-1, -1)  # keys kept left and right of the diagonal, -1 open
    kv_lengths: torch.Tensor | None = (
        None  # (B,) int: keys j >= kv_lengths[b] do not exist: whatever is there, NaN too, has no effect
    )
    kv_starts: torch.Tensor | None = None  # (B,) int: keys j < kv_starts[b] do not exist
    cu_seqlens_q: torch.Tensor | None = None  # (S + 1,) int
    cu_seqlens_k: torch.Tensor | None = None  # (S + 1,) int
    alibi_slopes: torch.Tensor | None = None  # (H,) or (B, H) float32
    dropout_p: float = 0.0
    dropout_seed: torch.Tensor | None = None  # () int64 on the device; adasplash_core.dropout defines the mask


@dataclass(eq=False, slots=True)
class ForwardResult:
    """What ``forward`` returns.

    ``out`` (B, H, Lq, Ev) in the query's dtype. ``tau`` float32 (B, H, Lq) in z units, ``support`` int32 (B, H, Lq): only where
    ``spec.return_stats``. ``saved``: as ``saved_spec`` told, in its order; must not alias inputs or ``out``.
    For alpha = 1, which has no threshold, tau is the log-sum-exp of the scores; for rows with no key it is 0 and the support 0.
    """

    out: torch.Tensor
    saved: Sequence[torch.Tensor] = ()
    tau: torch.Tensor | None = None
    support: torch.Tensor | None = None


@dataclass(eq=False, slots=True)
class Gradients:
    """What ``backward`` returns: each in its input's shape and dtype. ``alpha``, ``attn_mask``: only where the spec asks for them."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    alpha: torch.Tensor | None = None
    attn_mask: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class KernelResources:
    """What one compiled kernel takes of a device. Bytes; -1 where nobody can tell."""

    name: str
    registers: int = -1  # a thread
    spilled: int = -1  # local memory a thread, for what found no register
    shared: int = -1  # shared memory a block


@dataclass(frozen=True, slots=True)
class CompileReport:
    """What compiling the kernels of one config showed, before any of them ran. ``refusal``: why the config cannot run, if it cannot."""

    kernels: tuple[KernelResources, ...] = ()
    refusal: str = ""


@dataclass(frozen=True)
class HeadDims:
    """Which head dims a backend takes: from ``low`` to ``high`` in steps of ``multiple_of``."""

    low: int = 1
    high: int | None = None
    multiple_of: int = 1

    def reason_against(self, head_dim: int) -> str | None:
        if head_dim < self.low or (self.high is not None and head_dim > self.high) or head_dim % self.multiple_of:
            return f"head dim {head_dim} is not supported ({self})"
        return None

    def __str__(self) -> str:
        span = f"{self.low} or more" if self.high is None else f"{self.low} to {self.high}"
        return span if self.multiple_of == 1 else f"{span}, multiples of {self.multiple_of}"


class AttentionBackend(ABC):
    """One implementation of entmax attention.

    Class attributes declare limits; the inherited :meth:`not_supported_reasons`, the conformance suite and the README's support
    table all read them. Instances hold no state of a call: one instance serves all threads and devices.
    """

    api_version: ClassVar[int] = BACKEND_API_VERSION
    name: ClassVar[str]
    summary: ClassVar[str] = ""
    priority: ClassVar[int] = 0
    """Among backends with no measurement, ``auto`` takes the highest. The reference has 0; use 10 to 100 for accelerated ones."""
    device_types: ClassVar[frozenset[str] | None] = frozenset({"cpu"})  # None: any
    dtypes: ClassVar[frozenset[str]] = frozenset({"float32"})
    head_dims: ClassVar[HeadDims] = HeadDims()
    min_capability: ClassVar[tuple[int, int] | None] = None  # CUDA compute capability
    features: ClassVar[frozenset[str]] = frozenset({"backward"})  # keys of adasplash_core.spec.FEATURES
    backward_needs_out: ClassVar[bool] = False  # pass the forward's output to backward
    error_bounds: ClassVar[Mapping[str, float]] = {}
    """Relative error (Frobenius norm) against the fp64 oracle admitted by the conformance suite and the tuner, by dtype name or
    "tf32"; those not named take :data:`DEFAULT_ERROR_BOUNDS`."""

    # -- can it? ------------------------------------------------------------------------------------------------------------

    def unavailable_reasons(self) -> list[str]:
        """Why this backend cannot run in this process at all (no driver, a package is missing). Cheap; imports nothing heavy."""
        return []

    def not_supported_reasons(self, spec: AttentionSpec, device: DeviceInfo | None = None) -> list[str]:
        """Why it cannot do this call, one sentence a reason; empty if it can. Pure: no tensor, no launch, no heavy import.

        Must not depend on ``spec.batch``, ``q_len`` and ``kv_len``, which are unknown while compiling.
        """
        reasons = list(self.unavailable_reasons())
        if self.device_types is not None and spec.device_type not in self.device_types:
            reasons.append(f"device {spec.device_type} is not supported (only {', '.join(sorted(self.device_types))})")
        if spec.dtype not in self.dtypes:
            reasons.append(f"dtype {spec.dtype} is not supported (only {', '.join(sorted(self.dtypes))})")
        against = (self.head_dims.reason_against(head_dim) for head_dim in sorted({spec.head_dim, spec.head_dim_v}))
        reasons += [reason for reason in against if reason]
        if self.min_capability and device and device.capability and device.capability < self.min_capability:
            have, want = (".".join(map(str, c)) for c in (device.capability, self.min_capability))
            reasons.append(f"{device.name} has compute capability {have}, {want} is needed")
        reasons += [f"{FEATURES[f]} not supported" for f in spec.features() if f not in self.features]
        return reasons

    # -- compute ------------------------------------------------------------------------------------------------------------

    def saved_spec(self, spec: AttentionSpec) -> Sequence[SavedTensor]:
        """Shapes and dtypes of what ``forward`` keeps for ``backward``, in order, at most 8; asked only if ``spec.needs_grad``.

        For packed input, shapes follow ``spec.batch == 1`` and the total lengths.
        """
        return ()

    @abstractmethod
    def forward(self, call: AttentionCall) -> ForwardResult:
        """Attention output, and what backward needs. Runs on the query's device and current stream without a host sync.

        Raises
        ------
        ConfigRejectedError: if ``call.config`` cannot run on this device.
        """

    @abstractmethod
    def backward(
        self, call: AttentionCall, grad_out: torch.Tensor, saved: Sequence[torch.Tensor], out: torch.Tensor | None
    ) -> Gradients:
        """Gradients given ``grad_out`` (B, H, Lq, Ev), any strides. ``out`` is None unless ``backward_needs_out``."""

    def transform_forward(self, x: torch.Tensor, alpha: torch.Tensor, alpha_class: str) -> torch.Tensor:
        """alpha-entmax of ``x`` over its last dimension. Optional: backends without it leave it to the reference.

        ``alpha`` is () or broadcastable to ``x`` with size 1 in the last dimension.
        """
        raise NotImplementedError

    def transform_backward(
        self, p: torch.Tensor, grad: torch.Tensor, alpha: torch.Tensor, alpha_class: str, alpha_grad: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Gradient to the transform's input, from its output ``p`` and the gradient ``grad`` to that.

        Also, if ``alpha_grad``, each row's part of the gradient to alpha, (..., 1), float32 or float64. Optional: the inherited one
        is plain torch.
        """
        from adasplash_core.transform_grad import gradients

        return gradients(p, grad, alpha, alpha_grad)

    def transform_not_supported_reasons(self, device_type: str, dtype: str, device: DeviceInfo | None = None) -> list[str]:
        """As :meth:`not_supported_reasons`, for :meth:`transform_forward`."""
        return ["the entmax transform is not implemented"]

    # -- configs ------------------------------------------------------------------------------------------------------------

    @abstractmethod
    def config_class(self, pass_: Pass) -> type[KernelConfig]:
        """The dataclass of this pass's tunable parameters."""

    def default_config(self, spec: AttentionSpec, device: DeviceInfo, pass_: Pass) -> KernelConfig:
        """The config used when nothing was tuned: a heuristic from the device's limits."""
        return self.config_class(pass_)()

    def tuning_space(self, spec: AttentionSpec, device: DeviceInfo, pass_: Pass) -> Iterable[KernelConfig]:
        """Candidate configs for the tuner, most promising first. The default need not be among them: it always competes."""
        return ()

    def precompile(self, spec: AttentionSpec, device: DeviceInfo, pass_: Pass, config: KernelConfig) -> CompileReport | None:
        """Compile what one pass of a call with this spec (sizes known) and config would launch on ``device``; None: nothing to compile.

        Optional: it lets the tuner compile candidates in parallel while the device measures others, and drop those that cannot run or
        spill registers before they are timed. It is called in helper processes that see no GPU, so it must not touch ``device``; what
        it compiles should go to a cache on disk that the process with the device loads from. What it raises refuses the config.
        """
        return None

    def error_bound(self, dtype: str) -> float:
        """``dtype``: as :attr:`AttentionSpec.arithmetic`, so "tf32", too."""
        return self.error_bounds.get(dtype, DEFAULT_ERROR_BOUNDS[dtype])

    def toolchain(self) -> str:
        """Versions that decide what the compiled kernels are; tuned configs of another toolchain are used but called stale."""
        return ""

    def code_hash(self) -> str:
        """Hash of this backend's Python sources without comments and blank lines: tuned configs of other code are called stale."""
        return source_hash(type(self).__module__.partition(".")[0])


DEFAULT_ERROR_BOUNDS: Mapping[str, float] = {
    "float64": 1e-11,
    "float32": 5e-6,
    "tf32": 4e-3,  # float32 where products may be rounded to 11 significant bits
    "float16": 2e-3,
    "bfloat16": 1.5e-2,
}


@cache
def source_hash(package: str) -> str:
    """SHA-256 (16 hex digits) over a package's ``.py`` files without comments and blank lines, and its ``.cu``/``.cuh`` files."""
    if package == "__main__":  # a backend in a script: no import spec to ask
        roots = [Path(getattr(sys.modules[package], "__file__", None) or "")]
    elif (spec := importlib.util.find_spec(package)) is not None:
        roots = [Path(p) for p in spec.submodule_search_locations or []] or [Path(spec.origin or "")]
    else:
        roots = []
    digest = hashlib.sha256()
    for root in roots:
        found = root.rglob("*") if root.is_dir() and root != Path() else [root]
        files = sorted(p for p in found if p.suffix in {".py", ".cu", ".cuh"})
        for path in files:
            digest.update(path.name.encode())
            text = path.read_text(encoding="utf-8")
            digest.update((_without_comments(text) if path.suffix == ".py" else text).encode())
    return digest.hexdigest()[:16]


# ``tokenize`` takes 20 times as long, and its tokens differ between Python versions.
_PYTHON_PARTS = re.compile(
    r"""
    \#[^\n]*                                                                          # a comment,
    | "{3}(?:[^"\\]|\\.|"(?!""))*"{3} | '{3}(?:[^'\\]|\\.|'(?!''))*'{3}                  # a string,
    | "(?:[^"\\\n]|\\.)*" | '(?:[^'\\\n]|\\.)*'
    | [^"'\#]+ | .                                                                    # or what is between
    """,
    re.DOTALL | re.VERBOSE,
)


def _without_comments(source: str) -> str:
    kept = "".join(part for part in _PYTHON_PARTS.findall(source) if part[0] != "#")
    return "\n".join(stripped for line in kept.splitlines() if (stripped := line.rstrip()))
