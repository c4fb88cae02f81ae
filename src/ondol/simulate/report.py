"""The report of a comparison: one page of HTML with plots, Korean and English, that needs nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from typing import Final

from ondol.simulate.compare import Compared
from ondol.simulate.fleet import FleetModel
from ondol.simulate.lagrangian import LATE_SHARE
from ondol.simulate.outcome import Outcome
from ondol.simulate.plots import bars, curves
from ondol.simulate.trace import Trace

_STYLE: Final = """
:root{--ink:#1d2430;--paper:#fff;--soft:#687083;--line:#dde1e8}
@media (prefers-color-scheme:dark){:root{--ink:#e6e9ef;--paper:#14171d;--soft:#98a1b3;--line:#2c323d}}
body{font:16px/1.5 system-ui,"Apple SD Gothic Neo","Malgun Gothic","Noto Sans KR",sans-serif;color:var(--ink);
background:var(--paper);max-width:960px;margin:0 auto;padding:24px}
h1{font-size:1.6em;margin:0}h2{font-size:1.15em;margin:2em 0 .2em}p.soft,.ko,dt{color:var(--soft)}.ko{font-weight:400}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}td,th{padding:4px 8px;text-align:right;
border-bottom:1px solid var(--line)}td:first-child,th:first-child{text-align:left}.scroll{overflow-x:auto}
svg{width:100%;height:auto;max-width:720px}svg text{font-size:12px;fill:var(--ink)}.grid{stroke:var(--line)}
.limit{stroke:#c0392b;stroke-dasharray:5 4}.legend span{margin-right:18px;white-space:nowrap}
.legend .key{width:28px;height:8px;margin-right:6px;vertical-align:middle}li{margin:.2em 0}
"""
_Value = Callable[[Outcome], float | None]
_Shown = Callable[[float | None], str]


def page(compared: Compared, trace: Trace, fleet: FleetModel, *, fleet_name: str, seed: int) -> str:
    """The whole page."""
    title = f"{trace.name} · {fleet_name}"
    body = [
        f"<h1>{escape(title)}</h1>", _lead(compared, trace, fleet, seed), _table(compared),
        *_distributions(compared), *_amounts(compared), _notes(compared, trace, fleet),
    ]  # fmt: skip
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def _lead(compared: Compared, trace: Trace, fleet: FleetModel, seed: int) -> str:
    span = trace.times[-1] - trace.times[0]
    limits = compared.limits
    return (
        f'<p class="soft">{len(trace):,} requests in {span:,.0f} s, {sum(trace.prompts):,} prompt and '
        f"{sum(trace.outputs):,} output tokens; {len(fleet.places)} places; seed {seed}.<br>요청 {len(trace):,}건, "
        f"{span:,.0f}초, 입력 {sum(trace.prompts):,} · 출력 {sum(trace.outputs):,} 토큰; 서빙 지점 "
        f"{len(fleet.places)}곳.</p><p>Limits: first token {limits.first_token_ms / 1000:g} s, whole answer "
        f"{limits.total_ms / 1000:g} s, for 99 % of the requests. "
        f'<span class="ko">한도: 첫 토큰 {limits.first_token_ms / 1000:g}초, 전체 응답 {limits.total_ms / 1000:g}초, '
        "요청의 99 %.</span></p>"
    )


_COLUMNS: Final[tuple[tuple[str, str, _Value, str], ...]] = (
    ("first token p50", "첫 토큰 p50", lambda one: one.ttft_ms_p50, "time"),
    ("first token p95", "첫 토큰 p95", lambda one: one.ttft_ms_p95, "time"),
    ("whole, mean", "전체 평균", lambda one: one.total_ms_mean, "time"),
    ("whole p95", "전체 p95", lambda one: one.total_ms_p95, "time"),
    ("network p50", "네트워크 p50", lambda one: one.network_ms_p50, "time"),
    ("USD", "비용", lambda one: one.cost_usd, "figure"),
    ("g CO2e", "탄소", lambda one: one.carbon_g, "figure"),
    ("cache hits", "캐시 적중", lambda one: one.hit_rate, "share"),
    ("prefix hits", "접두부 적중", lambda one: one.prefix_hit_rate, "share"),
    ("missed limits", "한도 초과", lambda one: _missed(one), "share"),
    ("gap", "최적과의 차이", lambda one: one.gap_to_optimum, "share"),
)


def _table(compared: Compared) -> str:
    head = "".join(f'<th>{name}<br><span class="ko">{korean}</span></th>' for name, korean, _, _ in _COLUMNS)
    rows = []
    for one in compared.outcomes:
        cells = "".join(f"<td>{_SHOWN[form](value(one))}</td>" for _, _, value, form in _COLUMNS)
        rows.append(f"<tr><td>{escape(one.policy)}</td>{cells}</tr>")
    return (
        f'<div class="scroll"><table><tr><th>policy<br><span class="ko">정책</span></th>{head}</tr>'
        f"{''.join(rows)}</table></div>"
    )


def _distributions(compared: Compared) -> list[str]:
    found = []
    for name, korean, quantiles, limit in (
        ("Time to the first token", "첫 토큰까지의 시간", compared.first_ms, compared.limits.first_token_ms),
        ("Time of the whole answer", "전체 응답 시간", compared.total_ms, compared.limits.total_ms),
    ):
        found.append(_heading(name, korean))
        found.append(
            '<p class="soft">Share of the answers that came within a time; red: the limit. '
            "해당 시간 안에 온 응답의 비율, 빨간 선은 한도.</p>"
        )
        found.append(curves(quantiles, limit=limit, label=f"{name} / {korean}"))
    return found


def _amounts(compared: Compared) -> list[str]:
    charts: tuple[tuple[str, str, _Value, str, float | None], ...] = (
        ("Cost, USD", "비용 (USD)", lambda one: one.cost_usd, "figure", None),
        ("Carbon, g CO2e", "탄소 배출 (g CO2e)", lambda one: one.carbon_g, "figure", None),
        ("Answers from the exact cache", "캐시에서 나간 응답", lambda one: one.hit_rate, "share", None),
        ("Refused or later than the limits", "거절 또는 한도 초과", _missed, "share", LATE_SHARE),
        ("Cost over the optimum", "최적 대비 비용 차이", lambda one: one.gap_to_optimum, "share", None),
    )
    found = []
    for name, korean, value, form, mark in charts:
        values = [(one.policy, value(one), _SHOWN[form](value(one))) for one in compared.outcomes]
        found += [_heading(name, korean), bars(values, label=f"{name} / {korean}", mark=mark)]
    return found


def _notes(compared: Compared, trace: Trace, fleet: FleetModel) -> str:
    notes = [f"repaired: {one}" for one in trace.repairs] + list(fleet.notes)
    if compared.method is not None:
        notes.append(
            f"the optimum is the {compared.method}; a policy that misses limits can cost less than it"
        )
    notes += [f"{place.name}: {place.service.source}" for place in fleet.places]
    notes += [f"{link.a} – {link.b}: {link.rtt_ms:g} ms, {link.source}" for link in fleet.setting.links]
    items = "".join(f"<li>{escape(note)}</li>" for note in dict.fromkeys(notes))
    absent = "– : the trace or the fleet does not say. 트레이스나 플릿에 없는 값."
    return f"{_heading('Notes and sources', '참고와 출처')}<ul><li>{absent}</li>{items}</ul>"


def _heading(name: str, korean: str) -> str:
    return f'<h2>{name} <span class="ko">{korean}</span></h2>'


def _missed(one: Outcome) -> float | None:
    return None if one.violations is None else one.violations / one.requests


def _time(ms: float | None) -> str:
    return "–" if ms is None else f"{ms:.0f} ms" if ms < 1000 else f"{ms / 1000:.2f} s"


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value * 100:.1f} %"


_SHOWN: Final[dict[str, _Shown]] = {"time": _time, "figure": _figure, "share": _share}
