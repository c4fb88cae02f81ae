"""What operators see: Prometheus metrics and JSON logs.  Neither holds prompts, answers or secrets.

Counting happens on the hot path with plain dicts; prometheus-client only renders, when it is asked.
Names follow OpenTelemetry's semantic conventions for generative AI (1.41, `gen_ai.*`) where they have one,
in Prometheus' spelling; ours begin with `ondol_`.
"""

from __future__ import annotations

import json
import logging
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import Any, Final

import msgspec
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from ondol.core.money import Money
from ondol.core.usage import UsageRecord
from ondol.units import NG_PER_G, NS_PER_S, UJ_PER_J

LOG: Final = logging.getLogger("ondol")
_SECONDS: Final = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_FAST: Final = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5)
_TOKENS: Final = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576, 4194304)
_OPERATION: Final = {"chat": "chat", "completion": "text_completion", "embedding": "embeddings"}


class _Histogram:
    __slots__ = ("bounds", "series")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.series: dict[tuple[str, ...], list[float]] = {}

    def observe(self, labels: tuple[str, ...], value: float) -> None:
        series = self.series.get(labels)
        if series is None:
            series = self.series[labels] = [0.0] * (len(self.bounds) + 2)
        series[bisect_left(self.bounds, value)] += 1
        series[-1] += value

    def metric(self, name: str, text: str, labels: tuple[str, ...]) -> HistogramMetricFamily:
        family = HistogramMetricFamily(name, text, labels=labels)
        for key, series in self.series.items():
            seen, buckets = 0.0, []
            for bound, count in zip((*map(str, map(float, self.bounds)), "+Inf"), series[:-1], strict=True):
                seen += count
                buckets.append((bound, seen))
            family.add_metric(key, buckets, sum_value=series[-1])
        return family


class Metrics(Collector):
    """Counts what happened; `gauges` is asked at each scrape for what is now."""

    def __init__(
        self, gauges: Callable[[], dict[str, list[tuple[dict[str, str], float]]]], *, log_requests: bool
    ) -> None:
        """Start at zero."""
        self._gauges = gauges
        self.log_requests = log_requests
        self._requests: dict[tuple[str, ...], int] = {}
        self._refused: dict[str, int] = {}
        self._cost: dict[tuple[str, ...], int] = {}
        self._energy: dict[str, int] = {}
        self._carbon: dict[str, int] = {}
        self._duration = _Histogram(_SECONDS)
        self._first = _Histogram(_SECONDS)
        self._tokens = _Histogram(_TOKENS)
        self._overhead = _Histogram(_FAST)
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def finished(self, record: UsageRecord, shown: object) -> None:  # noqa: ARG002 - part of the port
        """Count a metered request.  About 5 us."""
        operation = _OPERATION[record.task]
        key = (record.route, record.team, record.outcome, record.cache, record.deployment)
        self._requests[key] = self._requests.get(key, 0) + 1
        labels = (operation, record.route, record.model)
        error = (record.error or "",)
        self._duration.observe(labels + error, record.total_ns / NS_PER_S)
        if record.ttft_ns is not None:
            self._first.observe(labels, record.ttft_ns / NS_PER_S)
        usage = record.usage
        self._tokens.observe((*labels, "input"), usage.input_tokens)
        if usage.output_tokens:
            self._tokens.observe((*labels, "output"), usage.output_tokens)
        self._overhead.observe((operation,), record.overhead_ns / NS_PER_S)
        if record.cost:
            paid = (record.team, record.route, record.currency)
            self._cost[paid] = self._cost.get(paid, 0) + record.cost
        if record.energy_uj:
            self._energy[record.route] = self._energy.get(record.route, 0) + record.energy_uj
        if record.carbon_ng:
            self._carbon[record.route] = self._carbon.get(record.route, 0) + record.carbon_ng
        if self.log_requests:
            self._log(record)

    def refused(self, code: str) -> None:
        """Count a request that got an error, by its code."""
        self._refused[code] = self._refused.get(code, 0) + 1

    def crashed(self, error: Exception) -> None:
        """Log what should not happen, with its traceback."""
        LOG.error("request_crashed", exc_info=error)

    def noted(self, event: str, **fields: str) -> None:
        """Log something that an operator should see."""
        LOG.warning(event, extra={"fields": fields})

    def _log(self, record: UsageRecord) -> None:
        fields = {
            "request_id": record.request_id, "team": record.team, "route": record.route,
            "deployment": record.deployment, "outcome": record.outcome, "cache": record.cache,
            "input_tokens": record.usage.input_tokens, "output_tokens": record.usage.output_tokens,
            "total_ms": record.total_ns // 1_000_000, "error": record.error,
        }  # fmt: skip
        LOG.info("request", extra={"fields": fields})

    def render(self) -> bytes:
        """The metrics as Prometheus text (0.0.4)."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Every metric, for prometheus-client."""
        labels = ("gen_ai_operation_name", "gen_ai_request_model", "gen_ai_response_model")
        yield self._duration.metric(
            "gen_ai_server_request_duration_seconds", "Time from arrival to the end of the answer.",
            (*labels, "error_type"),
        )  # fmt: skip
        yield self._first.metric(
            "gen_ai_server_time_to_first_token_seconds",
            "Time from arrival to the first streamed chunk.",
            labels,
        )
        yield self._tokens.metric(
            "gen_ai_client_token_usage_tokens", "Tokens of an answer.", (*labels, "gen_ai_token_type")
        )
        yield self._overhead.metric(
            "ondol_overhead_seconds", "Time that the gateway itself added.", ("gen_ai_operation_name",)
        )
        yield from self._counters()
        for name, values in self._gauges().items():
            names = tuple(values[0][0]) if values else ()
            gauge = GaugeMetricFamily(name, name.replace("_", " "), labels=names)
            for pairs, value in values:
                gauge.add_metric(tuple(pairs.values()), value)
            yield gauge

    def _counters(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "ondol_requests", "Metered requests.", labels=("route", "team", "outcome", "cache", "deployment")
        )
        for key, count in self._requests.items():
            requests.add_metric(key, count)
        yield requests
        refused = CounterMetricFamily("ondol_errors", "Replies with an error, by code.", labels=("code",))
        for code, count in self._refused.items():
            refused.add_metric((code,), count)
        yield refused
        cost = CounterMetricFamily("ondol_cost", "What this site paid.", labels=("team", "route", "currency"))
        for paid, amount in self._cost.items():
            cost.add_metric(paid, float(Money(amount, paid[2]).decimal()))
        yield cost
        energy = CounterMetricFamily(
            "ondol_energy_joules", "Energy of this site's answers.", labels=("route",)
        )
        for route, spent in self._energy.items():
            energy.add_metric((route,), spent / UJ_PER_J)
        yield energy
        carbon = CounterMetricFamily("ondol_carbon_grams", "CO2-equivalent of them.", labels=("route",))
        for route, spent in self._carbon.items():
            carbon.add_metric((route,), spent / NG_PER_G)
        yield carbon


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, event and its fields."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record; a traceback goes into `error`."""
        line: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}",
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        try:
            return msgspec.json.encode(line, enc_hook=str).decode()
        except UnicodeEncodeError:
            # A lone surrogate, as in the name of a file that is not UTF-8: it has an escape in JSON only.
            return json.dumps(line, default=str)


def log_as_json() -> None:
    """Send every log line to standard error as JSON, from `info` on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
