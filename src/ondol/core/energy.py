"""Energy and carbon of an answer: formulas only.  Every figure names its method; unknown is None.

In order of trust: measured (RAPL), stated by the operator, modelled from processor time, estimated from
the size of a remote model.  Energy is integer microjoules, carbon integer nanograms of CO2-equivalent.
"""

from __future__ import annotations

from math import exp
from typing import Final

import msgspec

from ondol.units import NG_PER_G, NS_PER_S, UJ_PER_J, UJ_PER_KWH

MEASURED: Final = "measured:rapl"
ECOLOGITS: Final = "estimate:ecologits-0.11"

# EcoLogits 0.11.3, text generation: the constants of its fit, quoted as facts (https://ecologits.ai).
_BATCH: Final = 64
_GPU_WH_PER_TOKEN_PER_B: Final = 1.1665273e-6 * exp(-0.011205921 * _BATCH)
_GPU_WH_PER_TOKEN: Final = 4.0529281e-5
_S_PER_TOKEN_PER_B: Final = 6.785088e-4
_S_PER_TOKEN: Final = 3.119310e-4 * _BATCH + 0.0194737176
_SERVER_WATTS: Final = 1_200.0
_SERVER_GPUS: Final = 8
_GPU_GB: Final = 80.0
_WEIGHT_BITS: Final = 16
_MEMORY_OVERHEAD: Final = 1.2
_UJ_PER_WH: Final = 3_600 * UJ_PER_J

_BUSY_SHARE_MIN: Final = 0.05
"""Below this share of busy processor time a measured window says more about idling than about answers."""


class CpuPower(msgspec.Struct, frozen=True, kw_only=True):
    """What one virtual CPU draws, idle and busy, and where that is from."""

    watts_min: float
    watts_max: float
    method: str
    source: str

    def microwatts(self, utilisation: float) -> int:
        """Power of one virtual CPU at a utilisation in [0, 1]: `min + u * (max - min)`.

        Source: Cloud Carbon Footprint, methodology, "Compute".
        """
        return round((self.watts_min + utilisation * (self.watts_max - self.watts_min)) * UJ_PER_J)


class EnergyModel(msgspec.Struct, frozen=True, kw_only=True):
    """How the energy of one deployment's answers is known.

    `local` says that the engine runs on this machine's processors, so time and threads count.  `pue` is
    that of the site (energy of the building over energy of the machines).  A stated figure per token
    counts output tokens (of an embedding: input tokens) and is taken as it is, without `pue`: its source
    says what is in it.
    """

    local: bool
    pue: float = 1.0
    cpu: CpuPower | None = None
    uj_per_token: int | None = None
    stated_source: str = ""
    parameters_b: float | None = None

    def answer_energy(
        self,
        *,
        busy_ns: int,
        threads: int,
        concurrency: float,
        output_tokens: int,
        input_tokens: int,
        measured_uw_per_thread: int | None = None,
    ) -> tuple[int, str] | None:
        """Microjoules of one answer and the method, or None where nothing says.

        `busy_ns` is how long the engine worked on it, with `threads` processors, on `concurrency`
        requests at once on average (their time is shared).  `measured_uw_per_thread` is what
        `MeasuredPower` found, where the machine has a meter.
        """
        if self.local and measured_uw_per_thread is not None:
            return _time_share(busy_ns, threads, concurrency, measured_uw_per_thread, self.pue), MEASURED
        if self.uj_per_token is not None:
            tokens = output_tokens or input_tokens  # an embedding reads and writes nothing
            return self.uj_per_token * tokens, f"stated:{self.stated_source or 'deployment'}"
        if self.local and self.cpu is not None:
            power = self.cpu.microwatts(1.0)
            return _time_share(busy_ns, threads, concurrency, power, self.pue), self.cpu.method
        if not self.local and self.parameters_b is not None and output_tokens > 0:
            return ecologits(self.parameters_b, output_tokens, self.pue), ECOLOGITS
        return None


class MeasuredPower(msgspec.Struct, frozen=True, kw_only=True):
    """The power that a thread's busy time stands for, from a meter's windows.  Change is a new value."""

    uw_per_thread: int | None = None

    def after(self, *, package_uj: int, window_ns: int, busy_thread_ns: int, cpus: int) -> MeasuredPower:
        """Fold a window: the package's energy shared by the engines' busy time.

        So idle power is borne by the answers of the window.  A window that was mostly idle is skipped,
        and the last figure stands.
        """
        if window_ns <= 0 or busy_thread_ns < _BUSY_SHARE_MIN * window_ns * cpus:
            return self
        return MeasuredPower(uw_per_thread=package_uj * NS_PER_S // busy_thread_ns)


def ecologits(parameters_b: float, output_tokens: int, pue: float) -> int:
    """Microjoules that a hosted model of that many billion parameters takes for `output_tokens`.

    All parameters count as active (an upper bound for mixtures of experts); reading the prompt is not
    in the formula, so long prompts are underestimated.

    Source: EcoLogits 0.11.3: GPU energy and latency per token fitted on the ML.ENERGY leaderboard at
    batch 64, 80 GB GPUs in servers of eight at 1.2 kW, weights of 16 bits with 20 % overhead.
    """
    memory_gb = _MEMORY_OVERHEAD * parameters_b * _WEIGHT_BITS / 8
    gpus = 1
    while gpus * _GPU_GB < memory_gb:
        gpus *= 2
    gpu_wh = output_tokens * (_GPU_WH_PER_TOKEN_PER_B * parameters_b + _GPU_WH_PER_TOKEN)
    seconds = output_tokens * (_S_PER_TOKEN_PER_B * parameters_b + _S_PER_TOKEN)
    server_wh = seconds / 3_600 * _SERVER_WATTS * gpus / _SERVER_GPUS / _BATCH
    return round(pue * (server_wh + gpus * gpu_wh) * _UJ_PER_WH)


def carbon(energy_uj: int, grams_per_kwh: float) -> int:
    """Nanograms of CO2-equivalent of an energy at a grid's intensity, rounded to the nearest."""
    nanograms_per_kwh = round(grams_per_kwh * NG_PER_G)
    return (energy_uj * nanograms_per_kwh + UJ_PER_KWH // 2) // UJ_PER_KWH


def _time_share(busy_ns: int, threads: int, concurrency: float, microwatts: int, pue: float) -> int:
    shared_ns = busy_ns * threads / max(concurrency, 1.0)
    return round(shared_ns * microwatts * pue / NS_PER_S)
