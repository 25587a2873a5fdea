"""What ``adasplash bench`` measures: problems (shapes or captured layers) and contenders (backends, softmax, dense entmax).

Times are interleaved: every contender runs once a round, so that a machine that slows down slows all of them. On a CPU, peak
memory is measured in a new process per contender (``python -m adasplash_cli.contest``), where nothing else allocates.
"""

from __future__ import annotations

import ctypes
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import torch

SOFTMAX = "softmax (SDPA)"
DENSE = "entmax package (dense)"
DEFAULT_CONFIG = ", default config"
"""Suffix of a backend's name: the same backend, with the config it would use if nothing were tuned."""


@dataclass(frozen=True)
class Problem:
    """One attention input, described so that another process can build the same one.

    Either a captured layer (``workload`` and ``layer``) or normal random q, k, v with q times ``sharpness``; sharper scores
    are sparser under entmax. Sizes and flags are only read for random inputs; causal with two lengths is aligned bottom right.
    """

    dtype: str = "float32"
    device: str = "cpu"
    causal: bool = True
    deterministic: bool = False
    tf32: bool = False  # float32 on NVIDIA's GPUs while PyTorch lets products be rounded
    batch: int = 1
    heads: int = 8
    kv_heads: int = 8
    q_len: int = 1024
    kv_len: int = 1024
    head_dim: int = 64
    head_dim_v: int = 64
    sharpness: float = 1.0
    workload: str | None = None
    layer: int = 0

    @property
    def label(self) -> str:
        if self.workload is not None:
            return f"{Path(self.workload).name}, layer {self.layer}, {self.dtype}"
        from adasplash_tuner.shapes.shape import Shape

        names = ("batch", "heads", "kv_heads", "q_len", "kv_len", "head_dim", "head_dim_v", "dtype", "causal")
        return str(Shape(**{name: getattr(self, name) for name in names}, deterministic=self.deterministic, tf32=self.tf32))

    def build(self) -> dict[str, Any]:
        """Keyword arguments of :func:`adasplash_core.attention`; query, key and value require grad."""
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype)
        if self.workload is not None:
            from adasplash_core.workload import Workload

            arguments = Workload.load(self.workload).layer(self.layer).to(self.device, dtype).kwargs()
        else:
            generator = torch.Generator(self.device).manual_seed(0)

            def normal(*shape: int) -> torch.Tensor:
                return torch.randn(*shape, generator=generator, device=self.device).to(dtype)

            arguments = {
                "query": normal(self.batch, self.heads, self.q_len, self.head_dim).mul_(self.sharpness),
                "key": normal(self.batch, self.kv_heads, self.kv_len, self.head_dim),
                "value": normal(self.batch, self.kv_heads, self.kv_len, self.head_dim_v),
                "is_causal": self.causal,
                "causal_alignment": "bottom_right" if self.causal and self.q_len != self.kv_len else "top_left",
                "deterministic": self.deterministic,
                "enable_gqa": self.heads != self.kv_heads,
            }
        for name in ("query", "key", "value"):
            arguments[name].requires_grad_()
        return arguments


@dataclass
class Measurement:
    """One contender on one problem. Medians in ms, memory in bytes; ``reason`` says why there is no measurement."""

    contender: str
    forward_ms: float | None = None
    backward_ms: float | None = None
    spread: float | None = None  # interquartile range of the sum over its median
    peak_bytes: int | None = None  # beyond the inputs; outputs and gradients included
    difference: float | None = None  # of the output from the first measured entmax contender, relative Frobenius norm
    reason: str = ""
    samples_ms: list[tuple[float, float]] = field(default_factory=list)

    @property
    def total_ms(self) -> float | None:
        return None if self.forward_ms is None else self.forward_ms + (self.backward_ms or 0.0)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "total_ms": self.total_ms}


def forward_function(contender: str, arguments: Mapping[str, Any], alpha: float) -> Callable[[], torch.Tensor]:
    """The contender's forward on these inputs, everything that is no part of the call prepared.

    Raises
    ------
    BackendUnsupportedError, UnknownBackendError: as :func:`adasplash_core.attention`.
    ImportError: if the entmax package is not installed.
    """
    if contender == SOFTMAX:
        return _softmax(arguments)
    if contender == DENSE:
        return _dense_entmax(arguments, alpha)
    from adasplash_core import attention

    backend = contender.removesuffix(DEFAULT_CONFIG)
    config = default_configs(backend, arguments, alpha) if contender.endswith(DEFAULT_CONFIG) else None

    def run() -> torch.Tensor:
        return cast("torch.Tensor", attention(**arguments, alpha=alpha, backend=backend, config=config))

    return run


def default_configs(backend: str, arguments: Mapping[str, Any], alpha: float) -> dict[str, Any]:
    """What ``backend`` would use for this call if nothing were tuned: a ``config`` argument."""
    from adasplash_core.call import make_call
    from adasplash_core.device import device_info
    from adasplash_core.plugins import registry
    from adasplash_core.spec import PASSES

    spec = make_call(**arguments, alpha=alpha).spec
    device = device_info(arguments["query"].device)
    chosen = registry().backend(backend)
    return {pass_: chosen.default_config(spec, device, pass_) for pass_ in PASSES}


def dense_mask(arguments: Mapping[str, Any]) -> torch.Tensor | None:
    """The call's windows, padding and masks as one mask for SDPA, or None where ``is_causal`` says it all."""
    import torch

    from adasplash_core.call import make_call
    from adasplash_core.masking import row_intervals

    given: torch.Tensor | None = arguments.get("attn_mask")
    if given is not None:  # then there is nothing else, in a captured layer
        return given
    structured = any(arguments.get(name) is not None for name in ("window", "kv_lengths", "kv_starts"))
    if not structured and arguments.get("causal_alignment", "top_left") == "top_left":
        return None
    lo, hi, _ = row_intervals(make_call(**arguments))
    keys = torch.arange(arguments["key"].shape[-2], device=lo.device)
    return ((keys >= lo[..., None]) & (keys < hi[..., None]))[:, None]


def _softmax(arguments: Mapping[str, Any]) -> Callable[[], torch.Tensor]:
    from torch.nn.functional import scaled_dot_product_attention

    mask = dense_mask(arguments)
    q, k, v = (arguments[name] for name in ("query", "key", "value"))
    causal = bool(arguments["is_causal"]) and mask is None
    scale, gqa = arguments.get("scale"), arguments["enable_gqa"]

    def run() -> torch.Tensor:
        out: torch.Tensor = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=gqa)
        return out

    return run


def _dense_entmax(arguments: Mapping[str, Any], alpha: float) -> Callable[[], torch.Tensor]:
    """The obvious way: the whole score matrix, and bisection over its rows."""
    import torch
    from entmax import entmax_bisect

    q, k, v = (arguments[name] for name in ("query", "key", "value"))
    scale = arguments.get("scale") or q.shape[-1] ** -0.5
    groups = q.shape[1] // k.shape[1]
    mask = dense_mask(arguments)
    if mask is None and arguments["is_causal"]:
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()

    def run() -> torch.Tensor:
        scores = q @ k.repeat_interleave(groups, dim=1).mT * scale
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        weights = entmax_bisect(scores, alpha=alpha, dim=-1).to(v.dtype)
        out: torch.Tensor = weights @ v.repeat_interleave(groups, dim=1)
        return out

    return run


def time_contenders(
    problem: Problem,
    contenders: Sequence[str],
    *,
    alpha: float,
    backward: bool,
    rounds: int,
    patience_s: float = float("inf"),
    on_round: Callable[[], None] = lambda: None,
) -> list[Measurement]:
    """Median times of all contenders on one problem. A contender that cannot run gets its reason instead.

    A contender whose runs add up to ``patience_s`` seconds sits out the remaining rounds; if the first run alone, which otherwise
    does not count, takes that long, it is the only one. ``on_round`` is called after every
    contender's run or turn, the unmeasured first run included.
    """
    import torch

    from adasplash_core.errors import AdasplashError

    arguments = problem.build()
    inputs = [arguments[name] for name in ("query", "key", "value")]
    results = {name: Measurement(name) for name in contenders}
    functions: dict[str, Callable[[], torch.Tensor]] = {}
    reference: torch.Tensor | None = None
    grad = None
    for name in contenders:
        try:
            functions[name] = forward_function(name, arguments, alpha)
            start = _now(inputs)
            out = functions[name]()  # compiles, allocates, looks configs up
            middle = _now(inputs)
            if grad is None:
                grad = torch.randn(out.shape, generator=torch.Generator(out.device).manual_seed(1), device=out.device).to(
                    out.dtype
                )
            gradients_start = _now(inputs)
            if backward:
                torch.autograd.grad(out, inputs, grad)
            first = ((middle - start) * 1e3, (_now(inputs) - gradients_start) * 1e3 if backward else 0.0)
            if sum(first) >= patience_s * 1e3:  # so slow that starting up does not show: this run is the measurement
                results[name].samples_ms.append(first)
        except (AdasplashError, ImportError, torch.OutOfMemoryError, MemoryError) as error:
            functions.pop(name, None)
            results[name].reason = _in_a_line(error)
            on_round()
            continue
        if name != SOFTMAX:
            out = out.detach().double()
            reference = out if reference is None else reference
            results[name].difference = float((out - reference).norm() / reference.norm())
        del out
        on_round()
    for _ in range(rounds):
        for name, function in functions.items():
            samples = results[name].samples_ms
            if sum(map(sum, samples)) < patience_s * 1e3:
                samples.append(_time_once(function, inputs, grad, backward))
            on_round()
    for result in results.values():
        if result.samples_ms:
            _summarise(result, backward)
    return list(results.values())


def _in_a_line(error: BaseException) -> str:
    """A message without its bullets, and without the hint that makes no sense here."""
    from adasplash_core.errors import BackendUnsupportedError

    if isinstance(error, BackendUnsupportedError):
        return f"Backend {error.name!r} cannot do this call: {'; '.join(error.reasons)}"
    return str(error).splitlines()[0]


def _time_once(
    function: Callable[[], torch.Tensor], inputs: Sequence[torch.Tensor], grad: torch.Tensor | None, backward: bool
) -> tuple[float, float]:
    """Milliseconds of one forward and one backward, each with the device idle before and after."""
    import torch

    start = _now(inputs)
    out = function()
    middle = _now(inputs)
    if backward:
        torch.autograd.grad(out, inputs, grad)
    return (middle - start) * 1e3, (_now(inputs) - middle) * 1e3 if backward else 0.0


def _now(inputs: Sequence[torch.Tensor]) -> float:
    """Seconds, once the inputs' device is idle."""
    if inputs[0].device.type == "cuda":
        import torch

        torch.cuda.synchronize(inputs[0].device)
    return time.perf_counter()


def _summarise(result: Measurement, backward: bool) -> None:
    forwards, backwards = zip(*result.samples_ms, strict=True)
    result.forward_ms = statistics.median(forwards)
    result.backward_ms = statistics.median(backwards) if backward else None
    totals = [f + b for f, b in result.samples_ms]
    if len(totals) > 1:
        low, _, high = statistics.quantiles(totals, n=4, method="inclusive")
        result.spread = (high - low) / statistics.median(totals)


def peak_memory(problem: Problem, contender: str, *, alpha: float, backward: bool) -> int | None:
    """Peak bytes beyond the inputs of one forward and backward; None where this system does not tell.

    Raises
    ------
    RuntimeError: if the measuring process failed, with its last line.
    """
    import torch

    if torch.device(problem.device).type == "cuda":
        return _peak_here(problem, contender, alpha, backward)
    task = {
        "problem": asdict(problem),
        "contender": contender,
        "alpha": alpha,
        "backward": backward,
        "threads": torch.get_num_threads(),
    }
    done = subprocess.run([sys.executable, "-m", __name__], input=json.dumps(task), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise RuntimeError(f"measuring memory ended with exit code {done.returncode}" + (f": {lines[-1]}" if lines else ""))
    answer: int | None = json.loads(done.stdout)["peak_bytes"]
    return answer


def _peak_here(problem: Problem, contender: str, alpha: float, backward: bool) -> int | None:
    import torch

    cuda = torch.device(problem.device).type == "cuda"
    arguments = problem.build()
    inputs = [arguments[name] for name in ("query", "key", "value")]
    function = forward_function(contender, arguments, alpha)
    if not cuda:
        _warm_up(problem, contender, alpha, backward)
    before = _cuda_baseline(problem.device) if cuda else _resident_baseline()
    out = function()
    if backward:
        torch.autograd.grad(out, inputs, torch.ones_like(out))
    if cuda:
        torch.cuda.synchronize(problem.device)
        return torch.cuda.max_memory_allocated(problem.device) - before if before is not None else None
    peak = _status_bytes("VmHWM")
    return None if before is None or peak is None else max(peak - before, 0)


def _warm_up(problem: Problem, contender: str, alpha: float, backward: bool) -> None:
    """Load libraries and start threads on a small input, so that they do not count."""
    import torch

    small = Problem(dtype=problem.dtype, device=problem.device, heads=2, kv_heads=2, q_len=64, kv_len=64)
    arguments = small.build()
    out = forward_function(contender, arguments, alpha)()
    if backward:
        torch.autograd.grad(out, [arguments[name] for name in ("query", "key", "value")], torch.ones_like(out))


def _cuda_baseline(device: str) -> int:
    import torch

    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _resident_baseline() -> int | None:
    """Resident bytes now, with freed memory returned and the peak counter set back; None on systems without /proc."""
    clear = Path("/proc/self/clear_refs")
    if not clear.exists():
        return None
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:  # glibc's
        trim(0)
    clear.write_text("5")  # resets VmHWM, see proc(5)
    return _status_bytes("VmRSS")


def _status_bytes(name: str) -> int | None:
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None


def _measure_memory_of_stdin() -> None:
    import torch

    task = json.load(sys.stdin)
    torch.set_num_threads(task["threads"])
    peak = _peak_here(Problem(**task["problem"]), task["contender"], task["alpha"], task["backward"])
    print(json.dumps({"peak_bytes": peak}))


if __name__ == "__main__":
    _measure_memory_of_stdin()
