"""Tunable parameters of the CUDA kernels, and the heuristics that pick them when nothing was measured. Imports no cupy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from adasplash_core.backend import KernelConfig
from adasplash_core.device import DeviceInfo
from adasplash_core.spec import AttentionSpec
from adasplash_cupy.instances import ALIBI, ALPHA_GRAD, DROPOUT, GRAD, ITEMSIZES, Instance, MarkInstance, padded

_ALPHA_CODES = {"1.5": 15, "2": 20}


@dataclass(frozen=True)
class ForwardConfig(KernelConfig):
    """Keys a tile and tiles in flight of each pass, and when a list of keys is worth having."""

    select_keys: int = 128  # 64 or 128
    select_stages: int = 2
    select_programs: int = 3  # per multiprocessor
    mark_groups: int = 0  # of 128 queries, where warpgroups mark keys (Hopper): forward_mark; 0: forward_select
    mark_stages: int = 6  # of 128 keys
    mark_programs: int = 1  # per multiprocessor
    mark_ahead: int = 1  # 1: two products under way instead of one; 2: and groups take turns
    mark_follow: int = 1  # whether thresholds follow the running max
    mark_split: int = 1  # warpgroups a group; 2: each takes half of a stage, wants mark_subtract, and ignores mark_ahead
    mark_subtract: int = 0  # whether the tensor cores subtract thresholds
    mark_sample: int = 16  # the sample of forward_mark's first bound: every so many tiles of 64 keys
    mark_worth: float = 2.5  # in place of sample_worth there
    keys: int = 64
    stages: int = 2  # with warpgroups, and more than 3: forward_lists holds lists of so many tiles in shared memory
    dense_stages: int = 2  # of forward_dense, which holds lists of so many tiles in shared memory
    sample: int = 8  # the sampled pass reads every so many tiles
    sample_steps: int = 12  # most Newton steps over the whole sample
    sample_worth: float = 1.5  # another step is taken while the rows' mean of sum p over the sample exceeds this
    list_percent: int = 85  # longer lists, in per cent of the range, are not made ...
    dense_percent: int = 50  # ... and not used once they have shrunk
    least_list: int = 1024  # lists up to this length always are
    lists_warpgroups: int = 0  # whether forward_lists multiplies by whole warpgroups (Hopper)
    dense_warpgroups: int = 0  # likewise forward_dense
    bound_warpgroups: int = 0  # likewise forward_bound
    dense_pairs: int = 1  # whether forward_dense's warpgroups look at two tiles at once, but for lists that they hold
    turn_mib: int = 32  # of K and V whose heads' blocks of rows forward_lists and forward_dense take in turn; 0: head by head


@dataclass(frozen=True)
class BackwardConfig(KernelConfig):
    """The backward's tiles, and which passes multiply by whole warpgroups (Hopper).

    ``..._programs`` are programs a multiprocessor that registers must allow; 0: by the kernel's own rule, which spills nothing. Three
    ``stages`` and ``row_stages`` let warpgroups of heads up to 64 columns multiply a tile's gradients beside the next tile's scores.
    """

    keys: int = 32  # of backward_rows, which walks all keys; a multiple of 16
    stages: int = 2
    rows_warpgroups: int = 0
    rows_programs: int = 0
    list_keys: int = 32  # of backward_lists; with warpgroups a multiple of 64
    list_stages: int = 2
    lists_warpgroups: int = 0
    lists_programs: int = 0
    rows: int = 64  # query rows at a time in backward_keys
    keys_warpgroups: int = 0
    row_stages: int = 2  # of backward_keys with warpgroups
    keys_programs: int = 0
    turn_mib: int = 32  # of what is read of heads whose blocks backward_rows and backward_keys take in turn; 0: head by head


def uses_lists(spec: AttentionSpec, kv_len: int) -> bool:
    """Whether keys are listed at all: over short sequences a list saves nothing. Forward and backward must agree."""
    return kv_len > short_length(spec.head_dim, spec.head_dim_v)


def short_length(head_dim: int, head_dim_v: int) -> int:
    """Key lengths up to this are computed over all keys in one launch."""
    return 512 if max(head_dim, head_dim_v) <= 64 else 256


def short_tile(spec: AttentionSpec, kv_len: int) -> int:
    """Keys a warp of the pass for short sequences, two of which share a row; 0 where that pass does not take the call."""
    if uses_lists(spec, kv_len) or _width(spec) > 64:
        return 0
    # Long rows of scores leave registers only for the plainest of transforms.
    most = 256 if spec.dtype != "float32" and spec.alpha_class in _ALPHA_CODES else 128
    return next((tile for tile in (64, 128, 256) if kv_len <= 2 * tile <= 2 * most), 0)


def short_instance(spec: AttentionSpec, config: ForwardConfig, tile: int) -> Instance:
    """The one kernel of a short sequence's forward."""
    e, ev, alpha = padded(spec.head_dim), padded(spec.head_dim_v), _ALPHA_CODES.get(spec.alpha_class, 0)
    flags = ALIBI * spec.alibi | GRAD * spec.needs_grad | DROPOUT * spec.dropout
    return Instance("forward_short", spec.dtype, e, ev, alpha, tile, min(config.stages, 2), flags)


def forward_instances(spec: AttentionSpec, config: ForwardConfig) -> dict[str, Instance]:
    """The forward's kernels as this call compiles them."""
    e, ev, alpha = padded(spec.head_dim), padded(spec.head_dim_v), _ALPHA_CODES.get(spec.alpha_class, 0)
    alibi, together = ALIBI * spec.alibi, takes_warpgroups(spec)
    lists, dense = together and bool(config.lists_warpgroups), together and bool(config.dense_warpgroups)
    flags = alibi | GRAD * spec.needs_grad | DROPOUT * spec.dropout
    pairs = int(dense and config.dense_pairs and config.dense_stages > 1 and e == ev)
    found = {
        "key_max": Instance("key_max", spec.dtype),
        "forward_select": Instance("forward_select", spec.dtype, e, 16, alpha, config.select_keys, config.select_stages, alibi),
        "forward_lists": Instance("forward_lists", spec.dtype, e, ev, alpha, config.keys, config.stages, flags, lists),
        "forward_dense": Instance(
            "forward_dense", spec.dtype, e, ev, alpha, config.keys, config.dense_stages, flags, dense, pairs=pairs
        ),
    }
    if config.mark_groups and takes_marking(spec):
        bound = replace(found["forward_select"], kernel="forward_bound", tile=64, stages=3 if e <= 64 else 2)
        found["forward_bound"] = replace(bound, head_dim_v=64, warpgroup=True) if config.bound_warpgroups else bound
        found["forward_mark"] = MarkInstance(
            dtype=spec.dtype,
            head_dim=e,
            stages=config.mark_stages,
            groups=config.mark_groups,
            programs=config.mark_programs,
            ahead=config.mark_ahead,
            follow=config.mark_follow,
            split=config.mark_split,
            subtract=config.mark_subtract,
        )
    return found


def takes_marking(spec: AttentionSpec) -> bool:
    """Whether forward_mark can take the place of forward_select, given a GPU that it runs on."""
    return ITEMSIZES[spec.dtype] == 2 and padded(spec.head_dim) in (64, 128) and not spec.alibi


def takes_warpgroups(spec: AttentionSpec) -> bool:
    """Whether the passes after the lists have a form for warpgroups: tiles of panels of 64 columns of 16 bits."""
    return ITEMSIZES[spec.dtype] == 2 and min(padded(spec.head_dim), padded(spec.head_dim_v)) >= 64


def takes_warpgroups_backward(spec: AttentionSpec) -> bool:
    """As :func:`takes_warpgroups`, of the backward's passes, which know panels that are half empty."""
    return ITEMSIZES[spec.dtype] == 2 and min(padded(spec.head_dim), padded(spec.head_dim_v)) >= 32


def backward_instances(spec: AttentionSpec, config: BackwardConfig) -> dict[str, Instance]:
    """The backward's kernels as this call compiles them."""
    e, ev, alpha = padded(spec.head_dim), padded(spec.head_dim_v), _ALPHA_CODES.get(spec.alpha_class, 0)
    flags, able = ALIBI * spec.alibi | DROPOUT * spec.dropout, takes_warpgroups_backward(spec)
    rows_flags = flags | ALPHA_GRAD * spec.alpha_requires_grad
    rows, lists, keys = (
        able and bool(wanted) for wanted in (config.rows_warpgroups, config.lists_warpgroups, config.keys_warpgroups)
    )

    def instance(kernel: str, tile: int, stages: int, of_kernel: int, together: bool, programs: int) -> Instance:
        return Instance(kernel, spec.dtype, e, ev, alpha, tile, stages, of_kernel, together, programs)

    return {
        "backward_lists": instance(
            "backward_lists", config.list_keys, config.list_stages, rows_flags, lists, config.lists_programs
        ),
        "backward_rows": instance("backward_rows", config.keys, config.stages, rows_flags, rows, config.rows_programs),
        "backward_keys": instance(
            "backward_keys", config.rows, config.row_stages if keys else 1, flags, keys, config.keys_programs
        ),
    }


def fits(spec: AttentionSpec, device: DeviceInfo) -> bool:
    """Whether some config runs: the widest heads do not fit GPUs with little shared memory."""
    forward, backward = default_forward(spec, device), default_backward(spec, device)
    instances = [*forward_instances(spec, forward).values(), *backward_instances(spec, backward).values()]
    return all(instance.shared_bytes <= _limit(device) for instance in instances)


def _limit(device: DeviceInfo) -> int:
    return device.shared_memory or 1 << 30


def default_forward(spec: AttentionSpec, device: DeviceInfo) -> ForwardConfig:
    """Large tiles where registers allow, then what fits the device's shared memory."""
    width, wide = _width(spec), spec.dtype == "float32"
    config = ForwardConfig(
        keys=32 if wide or width > 64 or _crowded(spec, device) else 64, select_keys=128 if width <= 64 else 64
    )
    if width > 128 or (wide and width > 64):
        config = replace(config, keys=16)
    if device.capability == (9, 0) and takes_marking(spec):
        stages = 6 if padded(spec.head_dim) <= 64 else 4
        config = replace(
            config, mark_groups=2, mark_stages=stages, mark_split=2, mark_subtract=1, mark_ahead=0, bound_warpgroups=1
        )
    if not wide and width <= 128 and device.shared_memory >= 200 * 1024:
        # Room for three programs of forward_lists a multiprocessor, and two of forward_dense.
        config = replace(config, stages=3, dense_stages=5 if width <= 64 else 4)
    if device.capability == (9, 0) and takes_warpgroups(spec):
        plain = width <= 128 and padded(spec.head_dim) == padded(spec.head_dim_v) and not (spec.alibi or spec.dropout)
        # Beside what else registers hold.
        config = replace(config, lists_warpgroups=1, dense_warpgroups=1, keys=64 if plain else 32)
        # Two programs a multiprocessor. From four stages on forward_lists solves lists that its tiles hold.
        config = replace(config, stages=6) if width <= 64 else replace(config, stages=2, dense_stages=2)
        config = replace(config, dense_pairs=int(width <= 64))  # of wider heads some compilers spill registers
    while _forward_bytes(spec, config) > _limit(device) and config.stages > 1:
        config = replace(config, stages=1, dense_stages=1, select_stages=1)
    while _forward_bytes(spec, config) > _limit(device) and config.keys > 16:
        config = replace(config, keys=config.keys // 2, select_keys=64)
    return config


def default_backward(spec: AttentionSpec, device: DeviceInfo) -> BackwardConfig:
    """As :func:`default_forward`."""
    width = _width(spec)
    plain = spec.alpha_class in _ALPHA_CODES and not (spec.alibi or spec.dropout)
    keys = 32 if width <= 128 else 16
    config = BackwardConfig(keys=keys, list_keys=keys, rows=64 if width <= 64 and plain else 32)
    if spec.dtype == "float32":
        config = replace(config, rows=32 if width <= 64 else 16)
    if device.capability == (9, 0) and takes_warpgroups_backward(spec) and (plain or width <= 64):
        stages = 1 if width > 64 else 2 if spec.alpha_requires_grad else 3
        config = replace(config, rows_warpgroups=1, keys=64, stages=stages, keys_warpgroups=1, rows=64)
        config = replace(config, row_stages=3 if width <= 64 else 2)
        if plain:  # dK and dV over lists take 64 keys at a time
            config = replace(config, lists_warpgroups=1, list_keys=64, list_stages=1)
        if plain and width <= 64:
            config = replace(config, list_stages=2, lists_programs=3)
    while _rows_bytes(spec, config) > _limit(device) and config.stages > 1:
        config = replace(config, stages=1, list_stages=1)
    while _rows_bytes(spec, config) > _limit(device) and config.keys > 16:
        config = replace(config, keys=config.keys // 2, list_keys=config.list_keys // 2)
    while _keys_bytes(spec, config) > _limit(device) and config.rows > 16:
        config = replace(config, rows=config.rows // 2)
    return config


def _width(spec: AttentionSpec) -> int:
    return padded(max(spec.head_dim, spec.head_dim_v))


def _forward_bytes(spec: AttentionSpec, config: ForwardConfig) -> int:
    short = short_instance(spec, config, 256).shared_bytes if _width(spec) <= 64 else 0
    return max(short, *(instance.shared_bytes for instance in forward_instances(spec, config).values()))


def _rows_bytes(spec: AttentionSpec, config: BackwardConfig) -> int:
    instances = backward_instances(spec, config)
    return max(instances["backward_lists"].shared_bytes, instances["backward_rows"].shared_bytes)


def _keys_bytes(spec: AttentionSpec, config: BackwardConfig) -> int:
    return backward_instances(spec, config)["backward_keys"].shared_bytes


def forward_space(spec: AttentionSpec, device: DeviceInfo) -> Iterator[ForwardConfig]:
    """Candidates around the default, one or two fields away, that fit the device."""
    base, seen, width = default_forward(spec, device), set(), _width(spec)
    for config in (
        *(
            replace(base, keys=keys, stages=stages, dense_stages=dense)
            for keys in (base.keys, base.keys // 2)
            for stages, dense in ((1, 1), (2, 2), (3, 3), (2, 4), (3, 5), (4, 5), (6, 5))
            if keys >= 16
        ),
        *(replace(base, select_keys=keys, select_stages=stages) for keys in (64, 128) for stages in (1, 2, 3)),
        *(replace(base, select_programs=programs) for programs in (1, 2, 4)),
        *(replace(base, sample=sample, sample_worth=worth) for sample in (8, 16) for worth in (1.5, 1.2, 4.0)),
        *(replace(base, list_percent=percent) for percent in (50, 70, 95)),
        replace(base, turn_mib=0),
        *(_markings(base) if base.mark_groups else ()),
        *_without_warpgroups(base, width),
    ):
        if config not in seen and _forward_bytes(spec, config) <= _limit(device) and not _spills(spec, config.select_keys, 64):
            seen.add(config)
            yield config


def _markings(base: ForwardConfig) -> Iterator[ForwardConfig]:
    yield replace(base, mark_groups=0)
    for sample, worth in ((8, 2.5), (32, 2.5), (16, 1.5), (16, 4.0)):
        yield replace(base, mark_sample=sample, mark_worth=worth)
    yield replace(base, mark_follow=0, mark_sample=8)
    for subtract, ahead in ((1, 1), (0, 1), (0, 2)):
        yield replace(base, mark_split=1, mark_subtract=subtract, mark_ahead=ahead)


def _without_warpgroups(base: ForwardConfig, width: int) -> Iterator[ForwardConfig]:
    if base.mark_groups:
        yield replace(base, bound_warpgroups=1 - base.bound_warpgroups)
    if base.dense_warpgroups:
        yield replace(base, dense_pairs=1 - base.dense_pairs)
    if base.lists_warpgroups:
        keys = 64 if width <= 64 else 32
        yield replace(base, lists_warpgroups=0, keys=keys, stages=3)
        for stages, dense in ((3, 5), (2, 4)):
            yield replace(base, lists_warpgroups=0, dense_warpgroups=0, keys=keys, stages=stages, dense_stages=dense)


def backward_space(spec: AttentionSpec, device: DeviceInfo) -> Iterator[BackwardConfig]:
    """As :func:`forward_space`: a pass at a time."""
    base, seen = default_backward(spec, device), set()
    for config in (base, *_rows_choices(base), *_list_choices(spec, device, base), *_keys_choices(base)):
        fit = max(_rows_bytes(spec, config), _keys_bytes(spec, config)) <= _limit(device)
        if min(config.keys, config.list_keys, config.rows) >= 16 and fit and config not in seen:
            seen.add(config)
            yield config


def _rows_choices(base: BackwardConfig) -> Iterator[BackwardConfig]:
    tiles = [(0, keys) for keys in (base.keys, base.keys * 2, base.keys // 2)]
    if base.rows_warpgroups:
        tiles = [(1, 64), (1, 32), (0, 32), (0, 64)]
        yield replace(base, keys=32, rows_programs=3)
    for together, keys in tiles:
        for stages in (1, 2, 3):
            yield replace(base, rows_warpgroups=together, keys=keys, stages=stages)


def _list_choices(spec: AttentionSpec, device: DeviceInfo, base: BackwardConfig) -> Iterator[BackwardConfig]:
    if device.capability == (9, 0) and takes_warpgroups_backward(spec):
        for together, keys in ((0, 32), (1, 64)):
            for stages in (1, 2, 3):
                yield replace(base, lists_warpgroups=together, list_keys=keys, list_stages=stages)
        yield replace(base, lists_warpgroups=1, list_keys=64, list_stages=2, lists_programs=3)
    else:
        for keys in (base.list_keys, base.list_keys * 2, base.list_keys // 2):
            for stages in (1, 2, 3):
                yield replace(base, list_keys=keys, list_stages=stages)


def _keys_choices(base: BackwardConfig) -> Iterator[BackwardConfig]:
    for rows in (base.rows, base.rows // 2):
        for together in (base.keys_warpgroups, 0):
            yield replace(base, keys_warpgroups=together, rows=rows)
    if base.keys_warpgroups:
        yield replace(base, rows=32, keys_programs=3)
        yield replace(base, row_stages=2)
    yield replace(base, turn_mib=0)


def _crowded(spec: AttentionSpec, device: DeviceInfo) -> bool:
    """Whether forward_dense spills registers with 64 keys a tile: so compilers do with these at an alpha that the device decides."""
    if device.capability is None or spec.alpha_class in _ALPHA_CODES:
        return False
    return device.capability < (8, 0) or (device.capability >= (10, 0) and spec.alibi and spec.dropout)


def _spills(spec: AttentionSpec, keys: int, most: int) -> bool:
    """fp32 tiles of more keys do not fit the registers."""
    return ITEMSIZES[spec.dtype] == 4 and keys > most
