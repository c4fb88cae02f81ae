"""Plots as inline SVG: curves of distributions and bars, without a script.  Text in, text out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from math import ceil, floor, log10
from typing import Final

COLOURS: Final = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9")
"""Told apart also by the colour-blind (Okabe, Ito, "Color Universal Design", 2008)."""
_DASHES: Final = ("", "7 4", "2 3", "9 3 2 3", "", "4 4")
_WIDTH, _HEIGHT = 640, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 16, 12, 40
_BAR, _NAMES, _VALUES = 26, 110, 120


def curves(quantiles: Mapping[str, Sequence[float]], *, limit: float, label: str) -> str:
    """The share of answers (vertical) within a time (horizontal, logarithmic); a line a policy, dashed at the limit."""
    seen = [value for values in quantiles.values() for value in values if value > 0]
    if not seen:
        return "<p>–</p>"
    low, high = floor(log10(max(min(*seen, limit), 0.1))), ceil(log10(max(*seen, limit) * 1.01))
    high = max(high, low + 1)

    def x(value: float) -> float:
        share = (log10(max(value, 10.0**low)) - low) / (high - low)
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y(share: float) -> float:
        return _TOP + (1 - share) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">']
    for power in range(low, high + 1):
        at = x(10.0**power)
        parts.append(f'<line class="grid" x1="{at:.1f}" y1="{_TOP}" x2="{at:.1f}" y2="{_HEIGHT - _BOTTOM}"/>')
        parts.append(
            f'<text x="{at:.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{_time(10.0**power)}</text>'
        )
    for percent in (0, 25, 50, 75, 100):
        at = y(percent / 100)
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{at:.1f}" x2="{_WIDTH - _RIGHT}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{percent} %</text>')
    at = x(limit)
    parts.append(f'<line class="limit" x1="{at:.1f}" y1="{_TOP}" x2="{at:.1f}" y2="{_HEIGHT - _BOTTOM}"/>')
    for number, values in enumerate(quantiles.values()):
        if not values:
            continue
        last = len(values) - 1
        points = " ".join(f"{x(value):.1f},{y(place / last):.1f}" for place, value in enumerate(values))
        parts.append(f'<polyline fill="none" {_stroke(number)} points="{points}"/>')
    parts.append("</svg>")
    return "".join(parts) + _legend(list(quantiles))


def bars(values: Sequence[tuple[str, float | None, str]], *, label: str, mark: float | None = None) -> str:
    """A bar a policy: name, value (None draws none), and how the value reads; `mark` draws a line at a value."""
    known = [abs(value) for _, value, _ in values if value is not None]
    most = max([*known, mark or 0.0], default=0.0) or 1.0
    height = _BAR * len(values) + 8
    room = _WIDTH - _NAMES - _VALUES
    parts = [f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(label)}">']
    for number, (name, value, text) in enumerate(values):
        top = 4 + number * _BAR
        parts.append(f'<text x="{_NAMES - 8}" y="{top + 16}" text-anchor="end">{escape(name)}</text>')
        width = 0.0 if value is None else max(value, 0.0) / most * room
        colour = COLOURS[number % len(COLOURS)]
        parts.append(
            f'<rect x="{_NAMES}" y="{top + 3}" width="{width:.1f}" height="{_BAR - 8}" fill="{colour}"/>'
        )
        parts.append(f'<text x="{_NAMES + width + 6:.1f}" y="{top + 16}">{escape(text)}</text>')
    if mark is not None:
        at = _NAMES + mark / most * room
        parts.append(f'<line class="limit" x1="{at:.1f}" y1="0" x2="{at:.1f}" y2="{height}"/>')
    return "".join(parts) + "</svg>"


def _legend(names: Sequence[str]) -> str:
    items = [
        f'<span><svg viewBox="0 0 28 8" class="key"><line x1="0" y1="4" x2="28" y2="4" {_stroke(number)}/></svg>'
        f"{escape(name)}</span>"
        for number, name in enumerate(names)
    ]
    return f'<p class="legend">{"".join(items)}</p>'


def _stroke(number: int) -> str:
    dash = _DASHES[number % len(_DASHES)]
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return f'stroke="{COLOURS[number % len(COLOURS)]}" stroke-width="2"{dashes}'


def _time(ms: float) -> str:
    return f"{ms:g} ms" if ms < 1000 else f"{ms / 1000:g} s"
