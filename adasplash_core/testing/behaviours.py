"""What a backend must do besides computing the right numbers: determinism, purity, containment of NaN, configs, threads.

Each function takes a :class:`~adasplash_core.testing.target.Target` and raises ConformanceError where the contract is broken.
"""

from __future__ import annotations

import json
import math
import pickle
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from adasplash_core.backend import AttentionCall, KernelConfig
from adasplash_core.spec import FEATURES, PASSES, AttentionSpec
from adasplash_core.testing import inputs, oracle
from adasplash_core.testing.compare import (
    ConformanceError,
    Measured,
    compare_backward,
    compare_forward,
    require,
    worst,
)
from adasplash_core.testing.target import Target

_CANDIDATES = 12  # of a tuning space that are tried


@dataclass(frozen=True)
class Behaviour:
    name: str
    run: Callable[[Target], Measured | None]
    needs: frozenset[str] = frozenset()  # features
    quick: bool = True
    reasons_against: Callable[[Target], list[str]] = lambda _target: []

    def undeclared(self, target: Target) -> str:
        """Why this backend is not asked for it; empty if it is."""
        missing = sorted(self.needs - target.backend.features)
        return f"not declared: {', '.join(missing)}" if missing else "; ".join(self.reasons_against(target))


BEHAVIOURS: list[Behaviour] = []


_Function = Callable[[Target], Measured | None]


def _behaviour(
    *needs: str, quick: bool = True, unless: Callable[[Target], list[str]] = lambda _target: []
) -> Callable[[_Function], _Function]:
    def add(function: _Function) -> _Function:
        BEHAVIOURS.append(Behaviour(function.__name__, function, frozenset(needs), quick, unless))
        return function

    return add


def _no_candidates(target: Target) -> list[str]:
    spec = target.base_spec()
    return [] if any(_candidates(target, spec, pass_) for pass_ in _passes(target)) else ["the tuning space is empty"]


def _no_cuda(target: Target) -> list[str]:
    return [] if torch.device(target.device).type == "cuda" else ["the host cannot be seen waiting but for a CUDA device"]


def _no_transform(target: Target) -> list[str]:
    return target.backend.transform_not_supported_reasons(torch.device(target.device).type, target.dtype, target.info)


def _call(target: Target, *, seed: int = 0, sizes: Mapping[str, Any] | None = None, **arguments: Any) -> AttentionCall:
    spec = target.base_spec(**(sizes or {}))
    call = target.call(*inputs.make_qkv(spec, "moderate", target.device, seed), **arguments)
    target.require_supported(call)
    return call


@_behaviour()
def plain_calls_are_supported(target: Target) -> None:
    """A backend that declares a dtype and a device must take the plainest call there, or it could pass by refusing everything."""
    spec = target.base_spec(return_stats=False)
    reasons = target.backend.not_supported_reasons(spec, target.info)
    require(not reasons, f"declares {target.dtype} on {spec.device_type} and refuses a plain call: {'; '.join(reasons)}")


@_behaviour()
def support_is_decided_without_tensors(target: Target) -> None:
    """``not_supported_reasons`` and ``saved_spec`` run no tensor operation, and the former does not depend on lengths."""
    spec = target.base_spec()
    with _NoOperations():  # type: ignore[no-untyped-call]
        told = target.backend.not_supported_reasons(spec, target.info)
        again = target.backend.not_supported_reasons(spec, target.info)
        without = target.backend.not_supported_reasons(spec.without_lengths(), target.info)
        long = target.backend.not_supported_reasons(replace(spec, batch=3, q_len=10**6 + 1, kv_len=10**7 + 3), target.info)
        saved = target.backend.saved_spec(replace(spec, needs_grad=True)) if target.takes("backward") else ()
    require(
        isinstance(told, list) and all(isinstance(r, str) for r in told),
        f"not_supported_reasons must give a list of sentences, got {told!r}",
    )
    require(told == again, f"not_supported_reasons changes its answer: {told}, then {again}")
    require(
        told == without == long, f"not_supported_reasons depends on lengths: {told}, {without} without, {long} with other ones"
    )
    for i, tensor in enumerate(saved):
        right = hasattr(torch, tensor.dtype) and len(tensor.shape) <= 64
        require(right, f"saved_spec's tensor {i} is no (shape, dtype name): {tensor!r}")


@_behaviour()
def undeclared_is_refused(target: Target) -> None:
    """What is not declared has a reason; what is declared is spelt as in FEATURES."""
    unknown = sorted(set(target.backend.features) - set(FEATURES))
    require(not unknown, f"features names {unknown}, which are none of adasplash_core.spec.FEATURES")
    spec = target.base_spec(needs_grad=False, return_stats=False)
    for feature, changes in _SPEC_WITH.items():
        if not target.takes(feature):
            reasons = target.backend.not_supported_reasons(replace(spec, **changes), target.info)
            require(
                bool(reasons),
                f"{FEATURES[feature]} ({feature}) are not among its features, and it gives no reason against them",
            )


_SPEC_WITH: Mapping[str, Mapping[str, Any]] = {
    "causal": {"causal": True},
    "bottom_right": {"causal": True, "causal_alignment": "bottom_right"},
    "query_offset": {"query_offset": True},
    "window": {"window": True},
    "kv_lengths": {"kv_lengths": True},
    "kv_starts": {"kv_starts": True},
    "packed": {"packed": True},
    "alibi": {"alibi": True},
    "key_mask": {"mask": "key"},
    "bool_mask": {"mask": "bool"},
    "additive_mask": {"mask": "additive"},
    "dropout": {"dropout": True},
    "gqa": {"heads": 6, "kv_heads": 3},
    "softmax": {"alpha_class": "1"},
    "alpha_other": {"alpha_class": "other"},
    "alpha_tensor": {"alpha_class": "any"},
    "backward": {"needs_grad": True},
    "stats": {"return_stats": True},
}


@_behaviour()
def inputs_are_left_alone(target: Target) -> None:
    """Neither pass writes to its inputs, to grad_out or to what was saved (backward may run twice, ``retain_graph=True``)."""
    call = _call(target)
    tensors = {name: getattr(call, name) for name in ("query", "key", "value", "alpha")}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    found = target.forward(call)
    if call.spec.needs_grad:
        grad_out = torch.ones_like(found.out)
        tensors |= {"grad_out": grad_out, "out": found.out} | {f"saved[{i}]": t for i, t in enumerate(found.saved)}
        before |= {name: tensor.clone() for name, tensor in tensors.items()}
        target.backward(call, grad_out, found)
    for name, tensor in tensors.items():
        require(_bits(tensor) == _bits(before[name]), f"{name} was changed")


@_behaviour()
def without_gradients(target: Target) -> Measured:
    """A call that needs no gradient gives the same output."""
    call = _call(target, needs_grad=False)
    return target.check(call)


@_behaviour("backward")
def backward_runs_twice(target: Target) -> Measured:
    """``retain_graph=True``: a second backward from what was saved is right too."""
    call = _call(target)
    expected = target.expect(call)
    found = target.forward(call)
    grad_out = target.draw_grad_out(expected)
    target.backward(call, grad_out * 2, found)
    return compare_backward(expected, grad_out, target.backward(call, grad_out, found))


@_behaviour()
def nan_stays_in_its_row(target: Target) -> None:
    """NaN or infinity in a query poisons that row and no other."""
    for poison in (math.nan, math.inf):
        call = _call(target, needs_grad=False, return_stats=False)
        clean = target.forward(call).out
        query = call.query.clone()
        query[0, 1, 7], query[1, 0, 36] = poison, poison
        dirty = target.forward(replace(call, query=query)).out
        rows = torch.zeros(clean.shape[:-1], dtype=torch.bool, device=clean.device)
        rows[0, 1, 7] = rows[1, 0, 36] = True
        require(bool(dirty[rows].isnan().all()), f"a row whose query is {poison} must be NaN throughout")
        error = oracle.relative_error(dirty[~rows], clean[~rows])
        require(error <= target.error_bound, f"{poison} in two rows changed the others by {error:.1e} (relative)")


def _hidden_keys_do_not_exist(target: Target, hide: Callable[[torch.Tensor], None], **arguments: Any) -> Measured:
    call = _call(target, **arguments)
    expected = target.expect(call)
    key, value = call.key.clone(), call.value.clone()
    hide(key)
    hide(value)
    dirty = replace(call, key=key, value=value)
    found = target.forward(dirty)
    measured = [compare_forward(expected, found)]
    if call.spec.needs_grad:
        grad_out = target.draw_grad_out(expected)
        grads = target.backward(dirty, grad_out, found)
        measured.append(compare_backward(expected, grad_out, grads))
    return worst(measured)


@_behaviour("kv_lengths")
def keys_beyond_the_length_do_not_exist(target: Target) -> Measured:
    """A cache's unused end may hold anything, NaN included."""

    def hide(x: torch.Tensor) -> None:
        x[0, :, 30:], x[1, :, 11:] = torch.nan, torch.inf

    return _hidden_keys_do_not_exist(target, hide, kv_lengths=torch.tensor([30, 11], device=target.device))


@_behaviour("kv_starts")
def keys_before_the_start_do_not_exist(target: Target) -> Measured:
    def hide(x: torch.Tensor) -> None:
        x[0, :, :13], x[1, :, :40] = torch.nan, torch.inf

    return _hidden_keys_do_not_exist(target, hide, kv_starts=torch.tensor([13, 40], device=target.device))


@_behaviour("packed")
def keys_after_the_last_sequence_do_not_exist(target: Target) -> Measured:
    def hide(x: torch.Tensor) -> None:
        x[:, :, 40:] = torch.nan

    return _hidden_keys_do_not_exist(
        target,
        hide,
        sizes={"batch": 1},
        cu_seqlens_q=torch.tensor([0, 12, 37], device=target.device),
        cu_seqlens_k=torch.tensor([0, 12, 40], device=target.device),
        max_seqlen_q=25,
        max_seqlen_k=28,
    )


@_behaviour("backward", "deterministic")
def deterministic_gradients_repeat(target: Target) -> None:
    """Asked for determinism, two runs agree to the last bit."""
    call = _call(target, deterministic=True, sizes={"q_len": 150, "kv_len": 170})
    runs = []
    for _ in range(3):
        found = target.forward(call)
        grads = target.backward(call, torch.ones_like(found.out), found)
        runs.append((found.out, grads.query, grads.key, grads.value))
    for run in runs[1:]:
        for name, first, second in zip(("out", "grad_query", "grad_key", "grad_value"), runs[0], run, strict=True):
            require(torch.equal(first, second), f"{name} differs between two runs of the same deterministic call")


@_behaviour("backward", "dropout")
def dropout_follows_the_seed(target: Target) -> None:
    """The same seed drops the same entries; another seed drops others."""
    call = _call(target, dropout_p=0.5)
    assert call.dropout_seed is not None
    first, second = target.forward(call).out, target.forward(call).out
    other = target.forward(replace(call, dropout_seed=call.dropout_seed + 1)).out
    require(oracle.relative_error(first, second.double()) <= target.error_bound, "the same dropout seed gave another mask")
    require(oracle.relative_error(first, other.double()) > 0.1, "another dropout seed gave the same mask")


@_behaviour()
def threads_do_not_disturb_each_other(target: Target) -> None:
    """One instance serves all threads: calls of different shapes at the same time give what they give alone."""
    calls = [_call(target, seed=i, sizes={"q_len": 20 + 9 * i, "kv_len": 60 - 7 * i}) for i in range(4)]
    expected = [target.expect(call) for call in calls]
    problems: list[str] = []

    def work(index: int) -> None:
        try:
            for _ in range(3):
                found = target.forward(calls[index])
                compare_forward(expected[index], found)
                if calls[index].spec.needs_grad:
                    grad_out = target.draw_grad_out(expected[index])
                    compare_backward(expected[index], grad_out, target.backward(calls[index], grad_out, found))
        except Exception as error:  # a thread's error must reach the test
            problems.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    require(not problems, f"in {len(problems)} of {len(calls)} threads: {problems[0] if problems else ''}")


@_behaviour(unless=_no_cuda)
def the_host_never_waits(target: Target) -> None:
    """Neither pass synchronises with a CUDA device, once warm: torch raises where one of its own operations would."""
    arguments: dict[str, Any] = {"is_causal": target.takes("causal")}
    if target.takes("kv_lengths"):
        arguments["kv_lengths"] = torch.tensor([53, 20], device=target.device)
    if target.takes("alpha_tensor", "alpha_other"):
        arguments["alpha"] = torch.tensor(1.3, device=target.device)
    call = _call(target, **arguments)
    grad_out = torch.ones((*call.query.shape[:3], call.value.shape[3]), dtype=call.query.dtype, device=target.device)
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            found = target.forward(call)
            if call.spec.needs_grad:
                target.backward(call, grad_out, found)
        except RuntimeError as error:
            if "synchroniz" in str(error):
                raise ConformanceError(f"waits for the device: {error}") from error
            raise
        finally:
            torch.cuda.set_sync_debug_mode("default")


@_behaviour()
def configs_are_plain_data(target: Target) -> None:
    """Configs are frozen dataclasses that survive JSON, and reject unknown fields."""
    spec = target.base_spec()
    for pass_ in _passes(target):
        cls = target.backend.config_class(pass_)
        right = isinstance(cls, type) and issubclass(cls, KernelConfig) and is_dataclass(cls)
        require(right, f"config_class({pass_!r}) must be a dataclass derived from KernelConfig, got {cls!r}")
        require(cls.__dataclass_params__.frozen, f"{cls.__name__} must be a frozen dataclass")  # type: ignore[attr-defined]
        for config in [target.backend.default_config(spec, target.info, pass_), *_candidates(target, spec, pass_)]:
            require(isinstance(config, cls), f"{pass_}: {config!r} is no {cls.__name__}")
            restored = cls.from_mapping(json.loads(json.dumps(config.to_dict())))
            require(restored == config and hash(restored) == hash(config), f"{config!r} comes back from JSON as {restored!r}")
            require(pickle.loads(pickle.dumps(config)) == config, f"{config!r} does not survive a worker process")
        require(
            bool(fields(cls)) or not _candidates(target, spec, pass_), f"{cls.__name__} has no fields, yet there are candidates"
        )


@_behaviour(quick=False, unless=_no_candidates)
def every_config_gives_the_same_answer(target: Target) -> Measured:
    """A config changes speed, never the result: the default and a sample of the tuning space are held to the same bound."""
    call = _call(target, sizes={"q_len": 100, "kv_len": 130, "batch": 1, "heads": 2, "kv_heads": 2})
    expected = target.expect(call)
    measured = []
    for config in _candidates(target, call.spec, "forward"):
        with _naming(config):
            measured.append(compare_forward(expected, target.forward(call, config)))
    if call.spec.needs_grad:
        found = target.forward(call)
        grad_out = target.draw_grad_out(expected)
        for config in _candidates(target, call.spec, "backward"):
            with _naming(config):
                measured.append(compare_backward(expected, grad_out, target.backward(call, grad_out, found, config)))
        # The passes are tuned one by one: what one config saves, another must read.
        for config in _candidates(target, call.spec, "forward"):
            with _naming(config):
                found = target.forward(call, config)
                measured.append(compare_backward(expected, grad_out, target.backward(call, grad_out, found)))
    return worst(measured)


@_behaviour()
def identity_is_stable(target: Target) -> None:
    """Name, code hash and toolchain are strings that do not change within a process: tuned configs are stored under them."""
    backend = target.backend
    require(isinstance(backend.name, str) and backend.name.isidentifier(), f"the name {backend.name!r} must be an identifier")
    for method in (backend.code_hash, backend.toolchain):
        first, second = method(), method()
        require(isinstance(first, str) and first == second, f"{method.__name__}() gave {first!r}, then {second!r}")
    require(target.error_bound > 0, f"error_bound({target.dtype!r}) must be positive")


@_behaviour(unless=_no_transform)
def transform_agrees(target: Target) -> Measured:
    """``transform_forward``, where the backend has one, against the oracle."""
    generator = torch.Generator().manual_seed(5)
    measured = []
    x = (3 * torch.randn(4, 5, 67, generator=generator)).to(target.device, target.torch_dtype)
    x[0, 0, 3:9] = -torch.inf
    x[1, 2] = 1.0
    for alpha, alpha_class in (
        (1.0, "1"),
        (1.25, "other"),
        (1.5, "1.5"),
        (1.8, "other"),
        (2.0, "2"),
        (1.3, "any"),
        (1.5, "any"),
    ):
        p = target.backend.transform_forward(x, torch.tensor(alpha, dtype=torch.float64, device=x.device), alpha_class)
        require(
            p.shape == x.shape and p.dtype == x.dtype,
            f"the transform of {x.dtype} {tuple(x.shape)} is {p.dtype} {tuple(p.shape)}",
        )
        exact = oracle.transform(x, alpha)
        measured.append(Measured(oracle.relative_error(p, exact), target.error_bound, f"transform, alpha={alpha}"))
    top = worst(measured)
    require(top.ratio <= 1, f"{top.what}: relative error {top.error:.2e}, admitted {top.bound:.2e}")
    return top


def _bits(x: torch.Tensor) -> bytes:
    return x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _passes(target: Target) -> tuple[Any, ...]:
    return PASSES if target.takes("backward") else PASSES[:1]


def _candidates(target: Target, spec: AttentionSpec, pass_: Any) -> list[KernelConfig]:
    """First and last and some between, so that the extremes of a space are tried."""
    space = list(islice(target.backend.tuning_space(spec, target.info, pass_), 10_000))
    step = max(len(space) // _CANDIDATES, 1)
    return space if len(space) <= _CANDIDATES else [*space[::step][: _CANDIDATES - 1], space[-1]]


class _NoOperations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise ConformanceError(f"ran the tensor operation {func} where only declarations may be read")


class _naming:  # noqa: N801
    """Say which config failed."""

    def __init__(self, config: KernelConfig) -> None:
        self.config = config

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ConformanceError):
            raise ConformanceError(f"with {self.config}: {error}") from error
