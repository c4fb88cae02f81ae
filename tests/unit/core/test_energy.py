"""Energy and carbon against figures worked out elsewhere."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ondol.core.energy import ECOLOGITS, MEASURED, CpuPower, EnergyModel, MeasuredPower, carbon, ecologits
from ondol.units import NS_PER_S, UJ_PER_J, UJ_PER_KWH

CPU = CpuPower(watts_min=0.4454, watts_max=2.0193, method="model:ccf-cpu(EPYC 3rd Gen)", source="ccf")


def _energy(model: EnergyModel, **changes: object) -> tuple[int, str] | None:
    values = {
        "busy_ns": NS_PER_S,
        "threads": 2,
        "concurrency": 1.0,
        "output_tokens": 100,
        "input_tokens": 10,
    }
    return model.answer_energy(**{**values, **changes})  # type: ignore[arg-type]  # values of one call


def test_a_local_answer_takes_the_time_of_its_threads() -> None:
    model = EnergyModel(local=True, cpu=CPU, pue=1.5)

    assert _energy(model) == (round(2 * 2.0193 * 1.5 * UJ_PER_J), "model:ccf-cpu(EPYC 3rd Gen)")


def test_requests_at_once_share_the_time() -> None:
    alone = _energy(EnergyModel(local=True, cpu=CPU))
    shared = _energy(EnergyModel(local=True, cpu=CPU), concurrency=4.0)

    assert alone is not None
    assert shared is not None
    assert shared[0] == pytest.approx(alone[0] / 4, abs=1)


def test_a_meter_is_believed_more_than_a_model() -> None:
    model = EnergyModel(local=True, cpu=CPU, uj_per_token=5, pue=2.0)

    assert _energy(model, measured_uw_per_thread=3_000_000) == (2 * 3 * 2 * UJ_PER_J, MEASURED)


def test_a_stated_figure_counts_output_tokens_or_an_embeddings_input() -> None:
    model = EnergyModel(local=False, uj_per_token=300_000, stated_source="bench")

    assert _energy(model) == (30_000_000, "stated:bench")
    assert _energy(model, output_tokens=0) == (3_000_000, "stated:bench")


def test_unknown_is_none_and_never_zero() -> None:
    assert _energy(EnergyModel(local=False)) is None
    assert _energy(EnergyModel(local=True)) is None
    assert _energy(EnergyModel(local=False, parameters_b=8.0), output_tokens=0) is None


@pytest.mark.parametrize(("parameters_b", "watt_hours"), [(8.0, 0.033), (70.0, 0.245)])
def test_ecologits_gives_its_published_examples(parameters_b: float, watt_hours: float) -> None:
    found = _energy(EnergyModel(local=False, parameters_b=parameters_b, pue=1.12), output_tokens=400)

    assert found is not None
    assert found[1] == ECOLOGITS
    assert found[0] / UJ_PER_KWH * 1_000 == pytest.approx(watt_hours, rel=0.02)


@given(small=st.floats(0.1, 500), factor=st.floats(1, 10), tokens=st.integers(1, 10**5))
def test_ecologits_never_falls_with_size(small: float, factor: float, tokens: int) -> None:
    assert ecologits(small, tokens, 1.0) <= ecologits(small * factor, tokens, 1.0)


def test_a_window_is_shared_by_busy_time_and_an_idle_one_is_skipped() -> None:
    power = MeasuredPower()

    busy = power.after(package_uj=30_000_000, window_ns=NS_PER_S, busy_thread_ns=2 * NS_PER_S, cpus=2)
    idle = busy.after(package_uj=9_000_000, window_ns=NS_PER_S, busy_thread_ns=NS_PER_S // 100, cpus=2)

    assert busy.uw_per_thread == 15_000_000
    assert idle == busy


def test_carbon_is_exact_at_a_kilowatt_hour() -> None:
    assert carbon(UJ_PER_KWH, 356.57) == 356_570_000_000
    assert carbon(0, 356.57) == 0
    assert carbon(1, 356.57) == 0  # 0.099 ng
    assert carbon(10, 356.57) == 1


@given(energy=st.integers(0, 10**15), grams=st.floats(0, 2_000))
def test_carbon_is_within_half_a_nanogram(energy: int, grams: float) -> None:
    exact = energy * round(grams * 1_000_000_000) / UJ_PER_KWH
    assert abs(carbon(energy, grams) - exact) <= 0.5 + exact * 1e-12
