"""Which backend takes a call, and what is said about it."""

from __future__ import annotations

import pytest

from adasplash_core.backend import HeadDims
from adasplash_core.configs import ConfigLadder
from adasplash_core.dispatch import Choice, choose
from adasplash_core.errors import AdasplashWarning, BackendUnsupportedError, NoCapableBackendError, UnknownBackendError
from adasplash_core.spec import FEATURES
from tests.core.fakes import CPU, GPU, MeanBackend, Provider, registry_of, spec


def pick(*backends: MeanBackend, backend: str = "auto", fastest: str | None = None, **changes: object) -> Choice:
    device = GPU if changes.get("device_type") == "cuda" else CPU
    registry, ladder = registry_of(*backends), ConfigLadder([Provider(fastest=fastest)])
    return choose(spec(**changes), device, backend, registry=registry, configs=ladder)


def test_auto_takes_the_highest_priority_among_the_capable() -> None:
    low, high, unfit = MeanBackend("low", 1), MeanBackend("high", 5), MeanBackend("unfit", 9, features=frozenset())
    choice = pick(low, high, unfit, causal=True, window=True)
    assert choice.backend is high
    assert choice.against == {"unfit": ("causal masks not supported", "sliding windows not supported")}


def test_auto_takes_the_measured_fastest_over_priority() -> None:
    choice = pick(MeanBackend("low", 1), MeanBackend("high", 5), fastest="low")
    assert choice.backend.name == "low"
    assert "measured fastest" in choice.why


def test_an_explicit_name_is_taken_or_refused_never_replaced() -> None:
    low, high = MeanBackend("low", 1), MeanBackend("high", 5, dtypes=frozenset({"float64"}))
    assert pick(low, high, backend="low", fastest="high").backend is low
    with pytest.raises(BackendUnsupportedError, match=r"(?s)'high' cannot.*dtype float32 is not supported \(only float64\)"):
        pick(low, high, backend="high")


def test_an_unknown_name_lists_near_matches_and_broken_plugins() -> None:
    registry = registry_of(MeanBackend("triton"), problems={"other (dist 1.0)": "its import failed: ImportError: no"})
    with pytest.raises(UnknownBackendError, match=r"(?s)'tritn'.*Did you mean 'triton'.*other \(dist 1.0\): its import failed"):
        choose(spec(), CPU, "tritn", registry=registry, configs=ConfigLadder())


def test_no_capable_backend_lists_every_reason_and_broken_plugins() -> None:
    registry = registry_of(
        MeanBackend("a", dtypes=frozenset({"float64"})),
        MeanBackend("b", head_dims=HeadDims(16, 256, 8)),
        problems={"broken (dist 1.0)": "its import failed: ImportError: libfoo"},
    )
    with pytest.raises(NoCapableBackendError) as caught:
        choose(spec(head_dim=12, head_dim_v=12), CPU, registry=registry, configs=ConfigLadder())
    text = str(caught.value)
    assert "a: dtype float32" in text
    assert "b: head dim 12 is not supported (16 to 256, multiples of 8)" in text
    assert "broken (dist 1.0): its import failed: ImportError: libfoo" in text


def test_compute_capability_is_checked_against_the_device() -> None:
    backend = MeanBackend(device_types=frozenset({"cuda"}), min_capability=(9, 0))
    with pytest.raises(NoCapableBackendError, match=r"a gpu has compute capability 8.0, 9.0 is needed"):
        pick(backend, device_type="cuda")


def test_auto_landing_on_the_reference_on_a_gpu_warns_once_with_the_reasons() -> None:
    reference = MeanBackend("reference", 0, device_types=None)
    other = MeanBackend("fast", 50, device_types=frozenset({"cuda"}), features=frozenset())
    with pytest.warns(AdasplashWarning, match=r"(?s)slow reference backend 'reference'.*fast: ALiBi slopes not supported"):
        pick(reference, other, device_type="cuda", alibi=True)
    assert (
        pick(reference, other, device_type="cuda", alibi=True).backend is reference
    )  # a second warning would be an error here


def test_a_support_check_that_raises_disables_that_backend_only() -> None:
    class Faulty(MeanBackend):
        def not_supported_reasons(self, *_: object) -> list[str]:  # type: ignore[override]
            raise RuntimeError("bug")

    choice = pick(Faulty("faulty", 99), MeanBackend("good"))
    assert choice.backend.name == "good"
    assert "its support check failed: RuntimeError('bug')" in choice.against["faulty"]


def test_every_feature_a_spec_can_need_has_words() -> None:
    everything = spec(
        causal=True, causal_alignment="bottom_right", query_offset=True, window=True, kv_lengths=True, kv_starts=True, packed=True,
        alibi=True, mask="additive", mask_requires_grad=True, alpha_class="any", alpha_per_head=True, alpha_requires_grad=True,
        dropout=True, needs_grad=True, deterministic=True, return_stats=True, kv_heads=2, head_dim_v=4,
    )  # fmt: skip
    needed = {f for s in (everything, spec(mask="key"), spec(mask="bool"), spec(alpha_class="1")) for f in s.features()}
    assert needed == set(FEATURES)
