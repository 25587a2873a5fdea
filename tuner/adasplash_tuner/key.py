"""The key under which a tuned config is stored: what was asked, on which machine, by which code. Named fields, never a NULL.

Lengths and counts are bucketed, so that no new length ever needs a new tuning. A bucket is named by its centre: the bucket 4096
holds the lengths nearer to 4096 than to 2048 or 8192 on a logarithmic scale (2897 to 5792).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adasplash_core.backend import AttentionBackend
    from adasplash_core.device import DeviceInfo
    from adasplash_core.spec import AttentionSpec, Pass
    from adasplash_tuner.storage.records import Row

UNKNOWN = 0
"""The bucket of a length that is not known (while ``torch.compile`` traces)."""

FULL_ROWS = 2**17
"""Query rows, over batch and heads, from which a device counts as full: 2048 blocks of 64, several times what one runs at once."""

NEAR_STEPS = 2
"""How many powers of two a length may be away for a comparison of backends to hold."""

PROBLEM_FIELDS = (
    "backend",
    "pass_",
    "dtype",
    "head_dim",
    "head_dim_v",
    "q_bucket",
    "kv_bucket",
    "batch_heads_bucket",
    "gqa_bucket",
    "causal",
    "mask_class",
    "alpha_class",
    "deterministic",
)
SIZE_FIELDS = ("q_bucket", "kv_bucket", "batch_heads_bucket", "gqa_bucket")
MACHINE_FIELDS = ("device_type", "device_name", "capability", "multiprocessors")
CODE_FIELDS = ("code_hash", "space_version", "toolchain")


@dataclass(frozen=True, slots=True)
class TuningKey:
    """Three groups of fields: the problem, the machine, and the code whose speed was measured."""

    backend: str
    pass_: str
    dtype: str  # as AttentionSpec.arithmetic: "tf32" is float32 whose products may be rounded
    head_dim: int
    head_dim_v: int
    q_bucket: int
    kv_bucket: int
    batch_heads_bucket: int
    gqa_bucket: int  # query heads per key head
    causal: bool
    mask_class: str
    alpha_class: str
    deterministic: bool

    device_type: str
    device_name: str
    capability: str  # "9.0"; "" where there is none
    multiprocessors: int  # SMs of a GPU, torch's threads on a CPU

    code_hash: str
    space_version: str  # of the config class's fields
    toolchain: str

    def as_dict(self) -> dict[str, str | int | bool]:
        return asdict(self)

    def same(self, other: TuningKey, names: tuple[str, ...]) -> bool:
        return all(getattr(self, n) == getattr(other, n) for n in names)

    def differences(self, other: TuningKey) -> dict[str, tuple[Any, Any]]:
        """Fields that differ: name to (this key's value, the other's)."""
        pairs = ((f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return {name: (mine, theirs) for name, mine, theirs in pairs if mine != theirs}

    def problem(self) -> str:
        """The problem's fields for a person."""
        dims = f"D={self.head_dim}" + (f",Dv={self.head_dim_v}" if self.head_dim_v != self.head_dim else "")
        words = [
            f"{self.backend} {self.pass_}: {self.dtype} {dims}",
            f"Lq~{self.q_bucket} Lk~{self.kv_bucket} B*H~{self.batch_heads_bucket} H/Hkv~{self.gqa_bucket}",
            "causal" if self.causal else "not causal",
            f"mask {self.mask_class}",
            f"alpha {self.alpha_class}",
        ]
        return ", ".join(words + ["deterministic"] * self.deterministic)

    def machine(self) -> str:
        units = f"{self.multiprocessors} threads" if self.device_type == "cpu" else f"{self.multiprocessors} SMs"
        return f"{self.device_type} {self.device_name}" + (f" ({self.capability})" if self.capability else "") + f", {units}"

    def readable(self) -> str:
        """The whole key for a person; stored beside the config."""
        code = f"code {self.code_hash}, space {self.space_version}, toolchain {self.toolchain or 'unnamed'}"
        return f"{self.problem()} | {self.machine()} | {code}"


KEY_FIELDS = tuple(f.name for f in fields(TuningKey))


def bucket(n: int, *, base: int = 2, low: int = 1, high: int | None = None) -> int:
    """The power of ``base`` nearest to n >= 1 on a logarithmic scale, clamped to [low, high]."""
    nearest: int = base ** math.floor(math.log(n, base) + 0.5)
    return max(low, nearest if high is None else min(nearest, high))


def query_bucket(q_len: int | None) -> int:
    """Decoding (one query) is a problem of its own; from 2 to 22 queries are one bucket, 16."""
    if q_len is None:
        return UNKNOWN
    return 1 if q_len <= 1 else bucket(q_len, low=16)


def key_bucket(kv_len: int | None) -> int:
    return UNKNOWN if kv_len is None else bucket(max(kv_len, 1), low=128)


def batch_heads_bucket(batch: int | None, heads: int) -> int:
    """Powers of 4 up to 256: beyond that every device is full whatever the length."""
    return UNKNOWN if batch is None else bucket(max(batch * heads, 1), base=4, high=256)


def visible_kv_len(spec: AttentionSpec) -> int | None:
    """Keys that any row can see: under a top-left causal mask without an offset none lies beyond the last query."""
    if (
        spec.causal
        and spec.causal_alignment == "top_left"
        and not spec.query_offset
        and spec.q_len is not None
        and spec.kv_len is not None
    ):
        return min(spec.kv_len, spec.q_len)
    return spec.kv_len


def mask_class(spec: AttentionSpec) -> str:
    """What decides the work: ``dense`` masks are read tile by tile, ``packed`` and ``window`` change which tiles exist.

    Padding and masks over keys alone cost next to nothing beside the scores and share ``plain`` with no mask at all.
    """
    if spec.mask in ("bool", "additive"):
        return "dense"
    if spec.packed:
        return "packed"
    return "window" if spec.window else "plain"


def alpha_classes(key: TuningKey) -> tuple[str, ...]:
    """The classes of alpha whose results may serve a key, its own first.

    ``any``, an alpha that only the device knows, is what every call has under ``torch.compile``. Few will tune for it, and 1.5 is
    what it mostly is.
    """
    return ("any", "1.5") if key.alpha_class == "any" else (key.alpha_class,)


def problem_fields(key: TuningKey) -> tuple[str, ...]:
    """Fields that a row must share with ``key`` to be about the same problem, but for alpha: unknown sizes match every size."""
    unknown = {n for n in SIZE_FIELDS if getattr(key, n) == UNKNOWN}
    return tuple(n for n in PROBLEM_FIELDS if n != "alpha_class" and n not in unknown)


def of_any_size(key: TuningKey) -> TuningKey:
    """The key that finds the results of every size."""
    return replace(key, q_bucket=UNKNOWN, kv_bucket=UNKNOWN, batch_heads_bucket=UNKNOWN, gqa_bucket=UNKNOWN)


def lends_config(measured: TuningKey, key: TuningKey) -> bool:
    """Whether a config measured at ``measured`` may serve ``key``, if the backend sees no difference: all but the number of batch times
    heads is equal, and either fills the device.

    Kernels work on blocks of rows of one head, so beyond that more heads are more of the same programs. Lengths and groups change
    what a program does.
    """
    rest = tuple(n for n in PROBLEM_FIELDS if n not in ("batch_heads_bucket", "alpha_class"))
    return measured.same(key, rest) and _fills(measured) and _fills(key)


def distance(measured: TuningKey, key: TuningKey) -> tuple[float, float, float] | None:
    """How far a comparison of backends at ``measured`` is from ``key``, in powers of two: of the lengths, of the query heads per key
    head, of batch times heads. None where it says nothing: lengths more than :data:`NEAR_STEPS` away, one query against several,
    or another number of heads where either leaves the device half empty. A size that ``key`` does not know is no distance."""
    q, kv, heads, groups = (0.0 if getattr(key, n) == UNKNOWN else steps(measured, key, n) for n in SIZE_FIELDS)
    decoding = q > 0 and 1 in (measured.q_bucket, key.q_bucket)
    if decoding or max(q, kv) > NEAR_STEPS or (heads > 0 and not (_fills(measured) and _fills(key))):
        return None
    return q + kv, groups, heads


def steps(a: TuningKey, b: TuningKey, size: str) -> float:
    """How many powers of two two keys are apart in one size. Databases may hold a zero."""
    return abs(math.log2(max(getattr(a, size), 1) / max(getattr(b, size), 1)))


def _fills(key: TuningKey) -> bool:
    return key.batch_heads_bucket * key.q_bucket >= FULL_ROWS


def space_version(backend: AttentionBackend, pass_: Pass) -> str:
    """Fingerprint of the config class: its name, its fields and their types. The list of candidates may change freely."""
    cls = backend.config_class(pass_)
    described = [(f.name, type(f.default).__name__ if f.default is not MISSING else str(f.type)) for f in fields(cls)]
    return hashlib.sha256(repr((cls.__name__, described)).encode()).hexdigest()[:8]


def toolchain(backend: AttentionBackend, device: DeviceInfo) -> str:
    return ", ".join(filter(None, (backend.toolchain(), device.runtime, device.driver and f"driver {device.driver}")))


def tuning_key(backend: AttentionBackend, spec: AttentionSpec, device: DeviceInfo, pass_: Pass) -> TuningKey:
    """The key of one pass of a call on a device."""
    return TuningKey(
        backend=backend.name,
        pass_=pass_,
        dtype=spec.arithmetic,
        head_dim=spec.head_dim,
        head_dim_v=spec.head_dim_v,
        q_bucket=query_bucket(spec.q_len),
        kv_bucket=key_bucket(visible_kv_len(spec)),
        batch_heads_bucket=batch_heads_bucket(spec.batch, spec.heads),
        gqa_bucket=bucket(max(spec.heads // max(spec.kv_heads, 1), 1)),
        causal=spec.causal,
        mask_class=mask_class(spec),
        alpha_class=spec.alpha_class,
        deterministic=spec.deterministic,
        device_type=device.type,
        device_name=device.name,
        capability=device.capability_name,
        multiprocessors=device.multiprocessors,
        code_hash=backend.code_hash(),
        space_version=space_version(backend, pass_),
        toolchain=toolchain(backend, device),
    )


def is_of_machine(key: TuningKey, device: DeviceInfo) -> bool:
    """Whether a key's machine fields are those of ``device``."""
    here = (device.type, device.name, device.capability_name, device.multiprocessors)
    return tuple(getattr(key, n) for n in MACHINE_FIELDS) == here


def weight(name: str) -> int:
    """How much a difference in one field counts when the nearest key is looked for."""
    return 3 if name in PROBLEM_FIELDS else 2 if name in MACHINE_FIELDS else 1


def nearest(key: TuningKey, rows: Iterable[Row], limit: int) -> list[Row]:
    """The usable rows whose keys differ from ``key`` in the fewest fields; of equally many, those with the nearest sizes."""

    def distance(row: Row) -> tuple[int, float]:
        assert row.record is not None
        other = row.record.key
        return sum(map(weight, key.differences(other))), sum(steps(key, other, n) for n in SIZE_FIELDS)

    return sorted((row for row in rows if row.usable is not None), key=distance)[:limit]
