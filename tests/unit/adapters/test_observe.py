"""What operators see: metrics that Prometheus can read and that count right, and logs a line each."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from ondol.adapters.observe import LOG, JsonLines, Metrics, log_as_json
from ondol.core.inference import Usage
from ondol.core.usage import UsageRecord

Gauges = dict[str, list[tuple[dict[str, str], float]]]


def record(**changes: Any) -> UsageRecord:
    given: dict[str, Any] = {
        "request_id": "req-1", "time_ns": 0, "site": "here", "gateway": "g", "tenant": "default",
        "team": "shop", "key_id": "k", "route": "r", "task": "chat", "outcome": "completed", "status": 200,
        "model": "m", "deployment": "d", "usage": Usage(10, 5), "total_ns": 50_000_000,
        "overhead_ns": 150_000,
    }  # fmt: skip
    return UsageRecord(**(given | changes))


def metrics(gauges: Gauges | None = None, *, log_requests: bool = False) -> Metrics:
    return Metrics(lambda: gauges or {}, log_requests=log_requests)


def samples(of: Metrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Every sample of the rendered text by name and labels, as Prometheus' own parser reads it."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(of.render().decode())
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def value(of: Metrics, name: str, **labels: str) -> float:
    """The sum of the samples of a name that have these labels."""
    wanted = set(labels.items())
    return sum(number for (found, pairs), number in samples(of).items() if found == name and wanted <= pairs)


def test_at_first_there_is_nothing_to_count() -> None:
    assert samples(metrics()) == {}
    names = {family.name for family in text_string_to_metric_families(metrics().render().decode())}
    assert {"ondol_requests", "ondol_errors", "ondol_cost", "gen_ai_server_request_duration_seconds"} <= names


def test_a_request_is_counted_by_what_it_was() -> None:
    one = metrics()
    one.finished(record(cost=12_400, energy_uj=2_500_000, carbon_ng=3_000_000_000, ttft_ns=15_000_000), None)
    one.finished(record(outcome="failed", error="engine_failed", cache="miss"), None)
    one.finished(record(task="embedding", usage=Usage(7, 0), route="e"), None)
    assert value(one, "ondol_requests_total") == 3
    assert (
        value(
            one,
            "ondol_requests_total",
            route="r",
            team="shop",
            outcome="failed",
            cache="miss",
            deployment="d",
        )
        == 1
    )
    assert value(one, "ondol_cost_total", team="shop", route="r", currency="USD") == pytest.approx(0.0000124)
    assert value(one, "ondol_energy_joules_total", route="r") == 2.5
    assert value(one, "ondol_carbon_grams_total", route="r") == 3
    assert value(one, "gen_ai_server_time_to_first_token_seconds_count") == 1
    assert value(one, "gen_ai_server_request_duration_seconds_count", error_type="engine_failed") == 1
    assert value(one, "gen_ai_client_token_usage_tokens_sum", gen_ai_token_type="input") == 27
    assert value(one, "gen_ai_client_token_usage_tokens_sum", gen_ai_token_type="output") == 10
    assert value(one, "ondol_overhead_seconds_count", gen_ai_operation_name="embeddings") == 1


@pytest.mark.parametrize(
    ("task", "operation"), [("chat", "chat"), ("completion", "text_completion"), ("embedding", "embeddings")]
)
def test_operations_have_opentelemetrys_names(task: str, operation: str) -> None:
    one = metrics()
    one.finished(record(task=task), None)
    assert value(one, "gen_ai_server_request_duration_seconds_count", gen_ai_operation_name=operation) == 1


def test_errors_are_counted_by_code() -> None:
    one = metrics()
    for code in ("overloaded", "overloaded", "not_found"):
        one.refused(code)
    assert value(one, "ondol_errors_total", code="overloaded") == 2
    assert value(one, "ondol_errors_total", code="not_found") == 1


def test_what_costs_nothing_makes_no_series() -> None:
    one = metrics()
    one.finished(record(), None)
    names = {name for name, _ in samples(one)}
    assert not {"ondol_cost_total", "ondol_energy_joules_total", "ondol_carbon_grams_total"} & names


def test_currencies_are_never_added() -> None:
    one = metrics()
    one.finished(record(cost=1_000_000_000), None)
    one.finished(record(cost=1_000_000, currency="KRW"), None)
    assert value(one, "ondol_cost_total", currency="USD") == 1
    assert value(one, "ondol_cost_total", currency="KRW") == 1


@given(
    st.lists(
        st.integers(0, 200 * 10**9) | st.sampled_from([10_000_000, 20_000_000, 81_920_000_000]), max_size=20
    )
)
def test_histograms_are_cumulative_and_a_bound_belongs_to_its_bucket(durations: list[int]) -> None:
    one = metrics()
    for total in durations:
        one.finished(record(total_ns=total), None)
    name = "gen_ai_server_request_duration_seconds"
    seconds = [total / 10**9 for total in durations]
    buckets = {
        dict(pairs)["le"]: number
        for (found, pairs), number in samples(one).items()
        if found == name + "_bucket"
    }
    assert all(number == sum(s <= float(bound) for s in seconds) for bound, number in buckets.items())
    assert value(one, name + "_count") == len(durations)
    assert value(one, name + "_sum") == pytest.approx(sum(seconds))


def test_gauges_are_asked_at_each_scrape() -> None:
    now: Gauges = {
        "ondol_in_flight": [({"deployment": "a"}, 1.0), ({"deployment": "b"}, 2.0)],
        "ondol_ready": [({}, 1.0)],
        "ondol_none": [],
    }
    one = metrics(now)
    assert value(one, "ondol_in_flight", deployment="b") == 2
    assert value(one, "ondol_ready") == 1
    now["ondol_in_flight"] = [({"deployment": "b"}, 7.0)]
    assert value(one, "ondol_in_flight") == 7


@given(st.text(max_size=30), st.text(max_size=30))
def test_names_of_any_characters_are_escaped(model: str, route: str) -> None:
    one = metrics()
    # The parser itself splits at what Python calls line ends, which Prometheus does not.
    model, route = ("".join(text.split()) for text in (model, route))
    one.finished(record(model=model, route=route), None)
    lines = one.render().decode().split("\n")
    assert sum(line.startswith("ondol_requests_total{") for line in lines) == 1
    if (model + route).isprintable():
        assert value(one, "ondol_requests_total", route=route) == 1


class Lines(logging.Handler):
    """Formats every record as JSON lines, and keeps the lines."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(JsonLines())
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))

    def last(self) -> dict[str, Any]:
        assert "\n" not in self.lines[-1]
        found: dict[str, Any] = json.loads(self.lines[-1])
        return found


@pytest.fixture
def lines() -> Any:
    handler, level = Lines(), LOG.level
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    yield handler
    LOG.removeHandler(handler)
    LOG.setLevel(level)


def test_requests_are_logged_only_where_that_is_asked(lines: Lines) -> None:
    metrics().finished(record(), None)
    assert lines.lines == []
    metrics(log_requests=True).finished(record(error="engine_failed", user="u"), None)
    line = lines.last()
    assert line.pop("time").startswith("20")
    assert line == {
        "level": "info", "logger": "ondol", "event": "request", "request_id": "req-1", "team": "shop",
        "route": "r", "deployment": "d", "outcome": "completed", "cache": "off", "input_tokens": 10,
        "output_tokens": 5, "total_ms": 50, "error": "engine_failed",
    }  # fmt: skip


def test_what_an_operator_should_see_is_a_warning_with_its_fields(lines: Lines) -> None:
    metrics().noted("budget over", budget="shop\nmonth", left="0 ₩")
    line = lines.last()
    assert (line["level"], line["event"], line["budget"], line["left"]) == (
        "warning",
        "budget over",
        "shop\nmonth",
        "0 ₩",
    )


def test_a_traceback_is_one_line_too(lines: Lines) -> None:
    try:
        raise ValueError('odd\n"value" \x00')
    except ValueError:
        LOG.exception("it %s", "broke")
    line = lines.last()
    assert (line["event"], line["level"]) == ("it broke", "error")
    assert line["error"].startswith("Traceback")
    assert 'ValueError: odd\n"value"' in line["error"]


class Odd:
    def __str__(self) -> str:
        return "odd one"


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        (Odd(), "odd one"),
        (OSError("disk"), "disk"),
        (float("nan"), None),
        ("a\ud800b", "a\ud800b"),
        (2**80, 2**80),
    ],
)
def test_no_field_can_lose_a_line(lines: Lines, field: Any, expected: Any) -> None:
    LOG.info("event", extra={"fields": {"field": field}})
    assert lines.last()["field"] == expected


def test_all_logs_go_to_standard_error_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        root.handlers.clear()  # pytest's own would be closed by `force`
        log_as_json()
        logging.getLogger("other.library").warning("from %s", sys.platform)
        logging.getLogger("other.library").debug("not shown")
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    out, err = capsys.readouterr()
    assert out == ""
    [line] = err.splitlines()
    assert json.loads(line)["event"] == f"from {sys.platform}"
