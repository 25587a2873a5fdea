"""What to tune for: shapes as a person writes them, and the profiles that stand for common models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

from adasplash_core.errors import ArgumentError
from adasplash_core.spec import AlphaClass, AttentionSpec

DTYPES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "f16": "float16",
    "fp32": "float32",
    "f32": "float32",
    "fp64": "float64",
    "f64": "float64",
}
_SIZES = {
    "B": "batch",
    "H": "heads",
    "Hkv": "kv_heads",
    "L": "length",
    "Lq": "q_len",
    "Lk": "kv_len",
    "D": "head_dim",
    "Dv": "head_dim_v",
}
_EXAMPLE = "B=1,H=32,Hkv=8,L=8192,D=128,bf16,causal"


@dataclass(frozen=True, slots=True)
class Shape:
    """One problem to tune for. ``str()`` gives the text that :meth:`parse` reads."""

    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    head_dim_v: int
    dtype: str
    causal: bool = False
    alpha_class: AlphaClass = "1.5"
    deterministic: bool = False
    tf32: bool = False  # float32 whose products may be rounded

    @classmethod
    def parse(cls, text: str, default_dtype: str = "float32") -> Shape:
        """From ``B=1,H=32,Hkv=8,L=8192,D=128,bf16,causal``.

        B and Hkv may be left out (1, and H); Lq and Lk stand for L where they differ, Dv where it differs from D; ``tf32`` in place of
        a dtype is float32 while PyTorch lets products be rounded to TF32;
        ``alpha=1|1.5|2|other|any`` and ``deterministic`` may be added.

        Raises
        ------
        ArgumentError: for anything else.
        """
        sizes: dict[str, int] = {}
        dtype, tf32, causal, deterministic, alpha = default_dtype, False, False, False, "1.5"
        for word in filter(None, (w.strip() for w in text.split(","))):
            name, equals, value = word.partition("=")
            if equals and name in _SIZES:
                sizes[_SIZES[name]] = _positive(text, word, value)
            elif equals and name == "alpha":
                alpha = value
            elif word == "causal":
                causal = True
            elif word == "deterministic":
                deterministic = True
            elif (known := DTYPES.get(word, word)) in DTYPES.values():
                dtype, tf32 = known, False
            elif word == "tf32":
                dtype, tf32 = "float32", True
            else:
                raise _wrong(text, f"{word!r} is not known")
        if alpha not in get_args(AlphaClass):
            raise _wrong(text, f"alpha={alpha}, which is none of {', '.join(get_args(AlphaClass))}")
        length = sizes.get("length")
        try:
            heads, head_dim = sizes["heads"], sizes["head_dim"]
            q_len, kv_len = sizes.get("q_len", length), sizes.get("kv_len", length)
            if q_len is None or kv_len is None:
                raise KeyError("L")
        except KeyError as error:
            raise _wrong(text, f"it lacks {dict(zip(_SIZES.values(), _SIZES, strict=True)).get(error.args[0], 'L')}") from error
        kv_heads = sizes.get("kv_heads", heads)
        if heads % kv_heads:
            raise _wrong(text, f"{heads} query heads are no multiple of {kv_heads} key heads")
        return cls(
            batch=sizes.get("batch", 1),
            heads=heads,
            kv_heads=kv_heads,
            q_len=q_len,
            kv_len=kv_len,
            head_dim=head_dim,
            head_dim_v=sizes.get("head_dim_v", head_dim),
            dtype=dtype,
            causal=causal,
            alpha_class=alpha,  # type: ignore[arg-type]  # checked above
            deterministic=deterministic,
            tf32=tf32,
        )

    def __str__(self) -> str:
        words = [f"B={self.batch}", f"H={self.heads}"]
        words += [f"Hkv={self.kv_heads}"] * (self.kv_heads != self.heads)
        words += [f"L={self.q_len}"] if self.q_len == self.kv_len else [f"Lq={self.q_len}", f"Lk={self.kv_len}"]
        words += [f"D={self.head_dim}"] + [f"Dv={self.head_dim_v}"] * (self.head_dim_v != self.head_dim)
        words += (
            ["tf32" if self.tf32 else self.dtype]
            + ["causal"] * self.causal
            + [f"alpha={self.alpha_class}"] * (self.alpha_class != "1.5")
        )
        return ",".join(words + ["deterministic"] * self.deterministic)

    def spec(self, device_type: str, needs_grad: bool) -> AttentionSpec:
        """The spec of a plain call of this shape. Causal with Lq != Lk is aligned at the bottom right, as in decoding."""
        return AttentionSpec(
            device_type=device_type,
            dtype=self.dtype,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            head_dim_v=self.head_dim_v,
            batch=self.batch,
            q_len=self.q_len,
            kv_len=self.kv_len,
            causal=self.causal,
            causal_alignment="bottom_right" if self.causal and self.q_len != self.kv_len else "top_left",
            alpha_class=self.alpha_class,
            deterministic=self.deterministic,
            needs_grad=needs_grad,
            tf32=self.tf32,
        )


def describe(spec: AttentionSpec) -> str:
    """A spec's shape in the words of :meth:`Shape.parse`, its other features added."""
    assert spec.batch is not None
    assert spec.q_len is not None
    assert spec.kv_len is not None
    shape = Shape(
        spec.batch, spec.heads, spec.kv_heads, spec.q_len, spec.kv_len, spec.head_dim, spec.head_dim_v, spec.dtype, spec.causal,
        spec.alpha_class, spec.deterministic, spec.tf32,
    )  # fmt: skip
    shown = {"causal", "gqa", "deterministic", "backward", "unequal_head_dims", "softmax", "alpha_other"}
    return ",".join([str(shape), *(f for f in spec.features() if f not in shown)])


@dataclass(frozen=True, slots=True)
class Profile:
    """How much effort: shapes, classes of input sparsity, and the default budget in seconds."""

    shapes: tuple[str, ...]
    budget_s: float
    sparsities: tuple[str, ...] = ("dense", "moderate", "sparse")
    """Each problem is measured on all: a config must be good over the classes, because what a model's heads do is not known."""


PROFILES: Mapping[tuple[str, str], Profile] = {
    ("cpu", "quick"): Profile(
        (
            "B=1,H=9,Hkv=3,L=4096,D=64,float32,causal",
            "B=1,H=9,Hkv=3,L=1024,D=64,float32,causal",
            "B=1,H=12,L=512,D=64,float32",
        ),
        120,
    ),
    ("cpu", "full"): Profile(
        (
            "B=1,H=9,Hkv=3,L=4096,D=64,float32,causal",
            "B=1,H=9,Hkv=3,L=2048,D=64,float32,causal",
            "B=1,H=9,Hkv=3,L=1024,D=64,float32,causal",
            "B=1,H=12,L=512,D=64,float32",
            "B=8,H=12,L=512,D=64,float32",
            "B=1,H=12,L=2048,D=64,float32",
            "B=1,H=16,Hkv=8,L=2048,D=128,float32,causal",
            "B=1,H=16,Hkv=8,L=2048,D=128,bfloat16,causal",
            "B=1,H=9,Hkv=3,L=4096,D=64,float32,causal,alpha=any",
            "B=1,H=9,Hkv=3,Lq=1,Lk=4096,D=64,float32,causal",
        ),
        900,
    ),
    ("cuda", "quick"): Profile(
        (
            "B=1,H=32,Hkv=8,L=8192,D=128,bfloat16,causal",
            "B=1,H=32,Hkv=8,L=2048,D=128,bfloat16,causal",
            "B=1,H=16,L=8192,D=64,bfloat16,causal",
            "B=8,H=16,L=1024,D=64,bfloat16",
        ),
        240,
    ),
    ("cuda", "full"): Profile(
        (
            "B=1,H=32,Hkv=8,L=8192,D=128,bfloat16,causal",
            "B=1,H=32,Hkv=8,L=2048,D=128,bfloat16,causal",
            "B=1,H=16,L=8192,D=64,bfloat16,causal",
            "B=8,H=16,L=1024,D=64,bfloat16",
            "B=1,H=32,Hkv=8,L=4096,D=128,bfloat16,causal",
            "B=1,H=32,Hkv=8,L=16384,D=128,bfloat16,causal",
            "B=1,H=16,L=32768,D=64,bfloat16,causal",
            "B=1,H=16,L=4096,D=64,bfloat16,causal",
            "B=16,H=12,L=512,D=64,bfloat16",
            "B=1,H=16,L=4096,D=64,bfloat16",
            "B=4,H=32,Hkv=8,L=2048,D=128,bfloat16,causal",
            "B=1,H=32,Hkv=8,L=8192,D=128,bfloat16,causal,alpha=any",
            "B=1,H=16,L=8192,D=64,float16,causal",
            "B=1,H=9,Hkv=3,L=4096,D=64,float32,causal",
        ),
        900,
    ),
}


def profile(device_type: str, name: str) -> Profile:
    return PROFILES["cpu" if device_type == "cpu" else "cuda", name]


def _positive(text: str, word: str, value: str) -> int:
    if not (value.isascii() and value.isdecimal()) or not 0 < int(value) < 2**31:
        raise _wrong(text, f"{word!r} has no positive integer")
    return int(value)


def _wrong(text: str, problem: str) -> ArgumentError:
    return ArgumentError(f"A shape to tune is written like {_EXAMPLE}.", seen=f"{text!r}: {problem}")
