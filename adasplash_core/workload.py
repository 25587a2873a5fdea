"""Captured workloads: the q, k, v of real models in one safetensors file, with everything needed to call attention on them.

The file holds, for each captured layer N, the tensors ``layer.N.query`` (B, H, Lq, E), ``layer.N.key`` (B, Hkv, Lk, E),
``layer.N.value`` (B, Hkv, Lk, Ev) and, where the layer masks more than a causal or window rule, ``layer.N.kv_starts`` and
``layer.N.kv_lengths`` (B,) int32 or a whole ``layer.N.attn_mask``. The header's metadata carries one JSON document under
:data:`METADATA_KEY`: where the tensors come from, and each layer's scale, causal flag, window and memory order.

Importing this module loads neither torch nor safetensors, and :meth:`Workload.load` reads the header only.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from adasplash_core.errors import ArgumentError

if TYPE_CHECKING:
    import torch

FORMAT_VERSION = 1
"""Raised when files of the new format would be misread by older code."""

METADATA_KEY = "adasplash_workload"

_REQUIRED = ("query", "key", "value")
_OPTIONAL = ("kv_starts", "kv_lengths", "attn_mask")
_FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}  # safetensors' names -> torch's
_INTEGERS = ("I32", "I64")


@dataclass(frozen=True, slots=True)
class WorkloadInfo:
    """Where a workload comes from."""

    model: str
    model_type: str = ""  # "llama", "bert", ...
    text: str = ""
    tokens: int = 0  # a sequence's length, padding included
    padding: str = "none"  # "none", "left" or "right"
    created: str = ""  # ISO 8601, UTC
    libraries: Mapping[str, str] = field(default_factory=dict)  # versions by distribution name


@dataclass(frozen=True, slots=True, eq=False)
class WorkloadLayer:
    """One layer's attention call, as the model made it.

    ``query`` (B, H, Lq, E), ``key`` (B, Hkv, Lk, E) and ``value`` (B, Hkv, Lk, Ev) share a floating dtype and keep the memory
    order that the model handed over (usually (B, L, H, E) seen transposed). ``window`` is (left, right) from the diagonal, -1
    open. ``kv_starts``, ``kv_lengths``: (B,) integers; keys outside [start, length) are padding. ``attn_mask``: boolean or
    additive, broadcastable to (B, H, Lq, Lk), only where no structural rule says the same. ``heads``: which of the model's
    query heads these are, ``None`` for all.
    """

    index: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float
    is_causal: bool = False
    window: tuple[int, int] | None = None
    kv_lengths: torch.Tensor | None = None
    kv_starts: torch.Tensor | None = None
    attn_mask: torch.Tensor | None = None
    module: str = ""  # dotted name in the model
    heads: tuple[int, ...] | None = None

    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments for :func:`adasplash_core.attention`: ``attention(**layer.kwargs(), alpha=1.5)``."""
        arguments: dict[str, Any] = {
            "query": self.query,
            "key": self.key,
            "value": self.value,
            "is_causal": self.is_causal,
            "scale": self.scale,
            "enable_gqa": self.query.shape[1] != self.key.shape[1],
        }
        for name in ("window", "kv_lengths", "kv_starts", "attn_mask"):
            if (given := getattr(self, name)) is not None:
                arguments[name] = given
        return arguments

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> WorkloadLayer:
        """The same layer elsewhere; only query, key, value and an additive mask change dtype. Memory order is kept."""
        moved = {name: getattr(self, name).to(device=device, dtype=dtype) for name in _REQUIRED}
        for name in _OPTIONAL:
            if (tensor := getattr(self, name)) is not None:
                moved[name] = tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
        return replace(self, **moved)

    def head_name(self, head: int) -> int:
        """The model's number of the layer's query head at this position."""
        return head if self.heads is None else self.heads[head]


@dataclass(frozen=True, slots=True)
class LayerSummary:
    """What the header tells of one layer, without its tensors."""

    index: int
    module: str
    dtype: str
    query_shape: tuple[int, int, int, int]  # B, H, Lq, E
    key_shape: tuple[int, int, int, int]  # B, Hkv, Lk, E
    value_shape: tuple[int, int, int, int]  # B, Hkv, Lk, Ev
    scale: float
    is_causal: bool
    window: tuple[int, int] | None
    heads: tuple[int, ...] | None
    padded: bool  # has kv_starts or kv_lengths
    masked: bool  # has attn_mask

    def mask_name(self) -> str:
        """The mask in a few words."""
        words = {"causal": self.is_causal, f"window {self.window}": self.window is not None, "padding": self.padded}
        words["whole mask"] = self.masked
        return ", ".join(word for word, holds in words.items() if holds) or "none"


class Workload:
    """A captured file: iterate over its layers, which are read one at a time.

    >>> for layer in Workload.load("work.safetensors"):
    ...     out = adasplash_core.attention(**layer.kwargs(), alpha=1.5)
    """

    def __init__(self, path: Path, info: WorkloadInfo, summaries: Mapping[int, LayerSummary], orders: Mapping[str, list[int]]):
        self.path, self.info = path, info
        self._summaries = dict(summaries)
        self._orders = dict(orders)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Workload:
        """Read and check the header.

        Raises
        ------
        ArgumentError: if there is no such file, it is not a workload, or its parts contradict each other.
        """
        return _HeaderReader(Path(path)).workload()

    @property
    def indices(self) -> tuple[int, ...]:
        """The captured layers' numbers in the model, ascending."""
        return tuple(self._summaries)

    @property
    def summaries(self) -> tuple[LayerSummary, ...]:
        """Shapes and facts of every layer, without reading tensors."""
        return tuple(self._summaries.values())

    def summary(self, index: int) -> LayerSummary:
        """One layer's shapes and facts.

        Raises
        ------
        ArgumentError: if the file has no such layer.
        """
        if index not in self._summaries:
            listed = ", ".join(map(str, self.indices))
            raise ArgumentError(
                "A layer must be one of those captured.", seen=f"layer {index}", hint=f"{self.path} has {listed}."
            )
        return self._summaries[index]

    def as_dict(self) -> dict[str, Any]:
        """Everything but the tensors, for JSON."""
        return {**asdict(self.info), "libraries": dict(self.info.libraries), "layers": [asdict(s) for s in self.summaries]}

    def __len__(self) -> int:
        return len(self._summaries)

    def __iter__(self) -> Iterator[WorkloadLayer]:
        return (self.layer(index) for index in self.indices)

    def layer(self, index: int) -> WorkloadLayer:
        """Read one layer.

        Raises
        ------
        ArgumentError: if the file has no such layer, or its values are unusable (not finite, lengths beyond the keys).
        """
        facts = self.summary(index)
        with _open(self.path, "pt") as file:
            names = set(file.keys())
            tensors = {
                part: self._in_order(name, file.get_tensor(name))
                for part in _REQUIRED + _OPTIONAL
                if (name := _tensor_name(index, part)) in names
            }
        layer = WorkloadLayer(
            index=index,
            scale=facts.scale,
            is_causal=facts.is_causal,
            window=facts.window,
            module=facts.module,
            heads=facts.heads,
            **tensors,
        )
        _check_values(self.path, layer)
        return layer

    def _in_order(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Give a tensor back the memory order it was captured with."""
        import torch

        order = self._orders.get(name)
        if order is None or list(order) == sorted(order):
            return tensor
        ordered = torch.empty_permuted(tensor.shape, order, dtype=tensor.dtype)
        return ordered.copy_(tensor)


def save_workload(path: str | os.PathLike[str], info: WorkloadInfo, layers: Iterable[WorkloadLayer]) -> Workload:
    """Write a workload file, whole or not at all, and load it.

    Raises
    ------
    ArgumentError: if there is no layer, two share a number, or one's tensors contradict each other.
    OSError: if the file cannot be written.
    """
    from safetensors.torch import save_file

    path = Path(path)
    tensors: dict[str, torch.Tensor] = {}
    described: list[dict[str, Any]] = []
    for layer in sorted(layers, key=lambda layer: layer.index):
        orders: dict[str, list[int]] = {}
        for part in _REQUIRED + _OPTIONAL:
            if (tensor := getattr(layer, part)) is None:
                continue
            if part in _REQUIRED:
                orders[part] = memory_order(tensor)
            tensors[_tensor_name(layer.index, part)] = tensor.detach().cpu().contiguous()
        described.append(
            {
                "index": layer.index,
                "module": layer.module,
                "scale": layer.scale,
                "is_causal": layer.is_causal,
                "window": layer.window,
                "heads": layer.heads,
                "order": orders,
            }
        )
    document = {"format_version": FORMAT_VERSION, **asdict(info), "libraries": dict(info.libraries), "layers": described}
    # In the target's folder, so that the rename replaces it in one step.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        unfinished = Path(folder) / path.name
        unfinished.touch()
        mode = unfinished.stat().st_mode  # as the umask wants it: safetensors leaves files to their owner alone
        save_file(tensors, unfinished, metadata={METADATA_KEY: json.dumps(document)})
        unfinished.chmod(mode)
        Workload.load(unfinished)
        unfinished.replace(path)
    return Workload.load(path)


def memory_order(tensor: torch.Tensor) -> list[int]:
    """A tensor's dimensions from the slowest to the fastest in memory: [0, 2, 1, 3] for a transposed (B, L, H, E)."""
    strides = tensor.stride()
    return sorted(range(tensor.dim()), key=lambda dim: (-strides[dim], dim))


def _tensor_name(index: int, part: str) -> str:
    return f"layer.{index}.{part}"


def _reject(path: Path, seen: str, hint: str = "Capture it again with `adasplash capture`.") -> NoReturn:
    raise ArgumentError(
        "A workload must be a safetensors file as `adasplash capture` writes it.", seen=f"{path}: {seen}", hint=hint
    )


def _open(path: Path, framework: str) -> Any:
    """The file, opened lazily; its own header (offsets, sizes, dtypes) checked by safetensors. ``np`` imports no torch."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        _reject(
            path,
            "it is not a file" if path.exists() else "there is no such file",
            "Pass the file that `adasplash capture` wrote.",
        )
    try:
        return safe_open(path, framework=framework)
    except (OSError, ValueError, SafetensorError) as error:
        _reject(path, f"it cannot be read ({error})")


class _HeaderReader:
    """Turns a file's header into a :class:`Workload`, or into an error that says what is wrong with it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def workload(self) -> Workload:
        with _open(self.path, "np") as file:
            document = self._document(file.metadata() or {})
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            shapes = {name: tuple(s.get_shape()) for name, s in slices.items()}
            dtypes = {name: str(s.get_dtype()) for name, s in slices.items()}
        self.shapes, self.dtypes = shapes, dtypes
        info = self._info(document)
        described = self._take(document, "layers", list)
        if not described:
            _reject(self.path, "it has no layers")
        summaries: dict[int, LayerSummary] = {}
        orders: dict[str, list[int]] = {}
        for entry in described:
            if not isinstance(entry, dict):
                _reject(self.path, f"a layer is described by {entry!r}")
            summary = self._layer(entry, orders)
            if summary.index in summaries:
                _reject(self.path, f"it describes layer {summary.index} twice")
            summaries[summary.index] = summary
        known = {_tensor_name(index, part) for index in summaries for part in _REQUIRED + _OPTIONAL}
        if unknown := sorted(set(shapes) - known):
            _reject(self.path, f"tensor {unknown[0]!r} belongs to no described layer")
        return Workload(self.path, info, dict(sorted(summaries.items())), orders)

    def _document(self, metadata: Mapping[str, str]) -> dict[str, Any]:
        if METADATA_KEY not in metadata:
            _reject(
                self.path,
                "a safetensors file without a workload's metadata",
                "Model weights are no workload: capture one from the model.",
            )
        try:
            document = json.loads(metadata[METADATA_KEY])
        except (ValueError, RecursionError) as error:
            _reject(self.path, f"its metadata is not JSON ({error})")
        if not isinstance(document, dict):
            _reject(self.path, "its metadata is not a JSON object")
        version = document.get("format_version")
        if type(version) is not int or version < 1:
            _reject(self.path, f"its format version is {version!r}")
        if version > FORMAT_VERSION:
            _reject(
                self.path, f"format version {version}; this release reads up to {FORMAT_VERSION}", "Upgrade adasplash-core."
            )
        return document

    def _info(self, document: Mapping[str, Any]) -> WorkloadInfo:
        libraries = self._take(document, "libraries", dict, {})
        return WorkloadInfo(
            model=self._take(document, "model", str),
            model_type=self._take(document, "model_type", str, ""),
            text=self._take(document, "text", str, ""),
            tokens=self._take(document, "tokens", int, 0),
            padding=self._take(document, "padding", str, "none"),
            created=self._take(document, "created", str, ""),
            libraries={str(name): str(version) for name, version in libraries.items()},
        )

    def _take(self, entry: Mapping[str, Any], name: str, kind: type, default: Any = None) -> Any:
        value = entry.get(name, default)
        if type(value) is not kind:
            _reject(self.path, f"its metadata's {name!r} is {value!r}, not a {kind.__name__}")
        return value

    def _layer(self, entry: Mapping[str, Any], orders: dict[str, list[int]]) -> LayerSummary:
        index = self._take(entry, "index", int)
        if index < 0:
            _reject(self.path, f"a layer is numbered {index}")
        where = f"layer {index}"
        batch, heads, q_len, head_dim = query = self._shape(index, "query")
        key, value = self._shape(index, "key"), self._shape(index, "value")
        kv_heads, kv_len = key[1], key[2]
        shapes = f"{where} has query {query}, key {key} and value {value}"
        if key[0] != batch or value[:3] != key[:3] or key[3] != head_dim:
            _reject(self.path, f"{shapes}, which do not fit together")
        if heads % kv_heads:
            _reject(self.path, f"{shapes}: {kv_heads} key heads do not divide {heads} query heads")
        dtypes = {part: self.dtypes[_tensor_name(index, part)] for part in _REQUIRED}
        if len(set(dtypes.values())) > 1 or dtypes["query"] not in _FLOATS:
            _reject(self.path, f"{where} has dtypes {dtypes}; query, key and value share one of {', '.join(_FLOATS)}")
        is_causal = self._take(entry, "is_causal", bool)
        window = entry.get("window")
        if window is not None:
            window = self._window(where, window)
        padded = any(self._lengths(index, part, batch) for part in ("kv_starts", "kv_lengths"))
        masked = self._attn_mask(index, (batch, heads, q_len, kv_len))
        if masked and is_causal:
            _reject(self.path, f"{where} has both a mask and the causal flag")
        chosen = entry.get("heads")
        if chosen is not None and not (self._naturals(chosen) and len(chosen) == heads):
            _reject(self.path, f"{where} names its {heads} query heads {chosen!r}")
        order = self._take(entry, "order", dict, {})
        for part in _REQUIRED:
            dims = order.get(part, [0, 1, 2, 3])
            if not self._naturals(dims) or sorted(dims) != [0, 1, 2, 3]:
                _reject(self.path, f"{where} has memory order {dims!r} for {part}")
            orders[_tensor_name(index, part)] = dims
        return LayerSummary(
            index=index,
            module=self._take(entry, "module", str, ""),
            dtype=_FLOATS[dtypes["query"]],
            query_shape=query,
            key_shape=key,
            value_shape=value,
            scale=self._scale(where, entry.get("scale")),
            is_causal=is_causal,
            window=window,
            heads=None if chosen is None else tuple(chosen),
            padded=padded,
            masked=masked,
        )

    @staticmethod
    def _naturals(values: Any) -> bool:
        return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)

    def _shape(self, index: int, part: str) -> tuple[int, int, int, int]:
        shape = self.shapes.get(_tensor_name(index, part))
        if shape is None:
            _reject(self.path, f"layer {index} has no {part}")
        if len(shape) != 4 or min(shape) < 1:
            _reject(self.path, f"layer {index} has a {part} of shape {shape}, not (batch, heads, length, head dim)")
        return shape

    def _scale(self, where: str, scale: Any) -> float:
        if type(scale) not in (int, float) or not math.isfinite(scale):
            _reject(self.path, f"{where} has scale {scale!r}")
        return float(scale)

    def _window(self, where: str, window: Any) -> tuple[int, int]:
        if not isinstance(window, list) or len(window) != 2 or not all(type(w) is int and w >= -1 for w in window):
            _reject(self.path, f"{where} has window {window!r}, not [left, right] of -1 or more")
        return window[0], window[1]

    def _lengths(self, index: int, part: str, batch: int) -> bool:
        name = _tensor_name(index, part)
        if name not in self.shapes:
            return False
        if self.shapes[name] != (batch,) or self.dtypes[name] not in _INTEGERS:
            _reject(
                self.path,
                f"layer {index} has {part} of shape {self.shapes[name]} and dtype {self.dtypes[name]}, not ({batch},) integers",
            )
        return True

    def _attn_mask(self, index: int, full: tuple[int, int, int, int]) -> bool:
        name = _tensor_name(index, "attn_mask")
        if name not in self.shapes:
            return False
        shape, dtype = self.shapes[name], self.dtypes[name]
        fits = len(shape) == 4 and all(size in (1, whole) for size, whole in zip(shape, full, strict=True))
        if not fits or not (dtype == "BOOL" or dtype in _FLOATS):
            _reject(self.path, f"layer {index} has an attn_mask of shape {shape} and dtype {dtype}, which does not fit {full}")
        return True


def _check_values(path: Path, layer: WorkloadLayer) -> None:
    for part in _REQUIRED:
        if not getattr(layer, part).isfinite().all():
            _reject(path, f"layer {layer.index} has a {part} that is not finite", "Capture in float32 if the model overflows.")
    if layer.attn_mask is not None and layer.attn_mask.isnan().any():
        _reject(path, f"layer {layer.index} has an attn_mask with NaN")
    kv_len = layer.key.shape[2]
    for part in ("kv_starts", "kv_lengths"):
        bounds = getattr(layer, part)
        if bounds is not None and not ((bounds >= 0) & (bounds <= kv_len)).all():
            _reject(path, f"layer {layer.index} has {part} {bounds.tolist()} and {kv_len} keys")
