"""Public request traces as the simulator takes them: Azure 2023, Mooncake, ServeGen."""

from __future__ import annotations

import csv
import gzip
import json
from bisect import bisect_right
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from random import Random
from typing import Any

from ondol.simulate.generate import ClientRate, from_rates
from ondol.simulate.trace import Trace, build

SERVEGEN = "m-large"
SERVEGEN_HOUR_S = (9 * 3600.0, 10 * 3600.0)
_WINDOW_S = 600.0
_TICK_S = 3.0
_QUANTILES = (0.0, 0.5, 0.9, 0.95, 0.99, 1.0)


def traces(data: Path, seed: int) -> Iterator[tuple[str, Trace | str]]:
    """Each trace by name, or a sentence on what is absent."""
    for name, folder, reader in (
        ("azure conv", "llm_trace_azure_2023/conv.csv.gz", azure),
        ("azure code", "llm_trace_azure_2023/code.csv.gz", azure),
        ("mooncake", "llm_trace_mooncake", mooncake),
        ("servegen", "llm_workload_servegen", servegen),
    ):
        path = data / folder
        yield name, reader(path, seed) if path.exists() else f"{path} is not there"


def azure(path: Path, _seed: int) -> Trace:
    """Azure's times have seven decimals: the last is cut."""
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    start = _moment(rows[0]["TIMESTAMP"])
    return build(
        (
            {
                "time_s": (_moment(row["TIMESTAMP"]) - start).total_seconds(),
                "prompt_tokens": row["ContextTokens"],
                "output_tokens": row["GeneratedTokens"],
            }
            for row in rows
        ),
        name=path.name,
    )


def _moment(text: str) -> datetime:
    return datetime.fromisoformat(text[:26])


def mooncake(folder: Path, _seed: int) -> Trace:
    """Mooncake's times are ticks of 3 s: the requests of one are spread evenly inside it, in their order."""
    path = next(folder.glob("*.jsonl.gz"))
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    counts: dict[int, int] = {}
    for row in rows:
        counts[row["timestamp"]] = counts.get(row["timestamp"], 0) + 1
    seen: dict[int, int] = {}

    def one(row: dict[str, Any]) -> dict[str, Any]:
        tick = row["timestamp"]
        place = seen[tick] = seen.get(tick, 0) + 1
        return {
            "time_s": tick / 1000 + (place - 1) / counts[tick] * _TICK_S, "prompt_tokens": row["input_length"],
            "output_tokens": row["output_length"], "prefix": row["hash_ids"],
        }  # fmt: skip

    return build(map(one, rows), name=path.name)


def servegen(folder: Path, seed: int) -> Trace:
    """An hour of one workload's clients that have token tables; lengths drawn between their quantiles."""
    tables = _tables(folder / "client_tokens.csv.gz")
    rates = []
    with gzip.open(folder / "client_rates.csv.gz", "rt", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            start = float(row["t_s"])
            known = row["workload"] == SERVEGEN and row["client_id"] in tables
            if (
                known
                and SERVEGEN_HOUR_S[0] <= start < SERVEGEN_HOUR_S[1]
                and row["pattern"] in ("Gamma", "Weibull")
            ):
                figures = float(row["rate_rps"]), row["pattern"], float(row["p1"]), float(row["p2"])
                rates.append(ClientRate(row["client_id"], start, *figures))  # type: ignore[arg-type]  # checked above

    def lengths(client: str, time: float, dice: Random) -> tuple[int, int]:
        windows = tables[client]
        starts = [start for start, _ in windows]
        fields = windows[max(bisect_right(starts, time) - 1, 0)][1]
        return max(1, _drawn(fields["input_tokens"], dice)), max(1, _drawn(fields["output_tokens"], dice))

    mean = sum(one.rate for one in rates) / (SERVEGEN_HOUR_S[1] - SERVEGEN_HOUR_S[0]) * _WINDOW_S
    return from_rates(
        rates, lengths, window_s=_WINDOW_S, scale=3.0 / mean, seed=seed, name=f"servegen {SERVEGEN}"
    )


def _tables(path: Path) -> dict[str, list[tuple[float, dict[str, list[float]]]]]:
    found: dict[str, dict[float, dict[str, list[float]]]] = {}
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["workload"] == SERVEGEN and row["field"] in ("input_tokens", "output_tokens"):
                windows = found.setdefault(row["client_id"], {}).setdefault(float(row["t_s"]), {})
                windows[row["field"]] = [
                    1.0,
                    *(float(row[name]) for name in ("p50", "p90", "p95", "p99", "max")),
                ]
    return {
        client: sorted((start, fields) for start, fields in windows.items() if len(fields) == 2)
        for client, windows in found.items()
        if any(len(fields) == 2 for fields in windows.values())
    }


def _drawn(values: list[float], dice: Random) -> int:
    """A length between the stated quantiles, linear within each."""
    share = dice.random()
    place = min(bisect_right(_QUANTILES, share) - 1, len(_QUANTILES) - 2)
    low, high = _QUANTILES[place], _QUANTILES[place + 1]
    return round(values[place] + (values[place + 1] - values[place]) * (share - low) / (high - low))
