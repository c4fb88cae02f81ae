"""What the judge says, as values with all numbers, and as sentences in English and Korean.  Pure."""

from __future__ import annotations

from typing import Final, Literal

import msgspec

Outcome = Literal["continue", "abort", "inconclusive"]
Measure = Literal["errors", "latency", "quality"]
Against = Literal["old", "earlier", "before"]
Reason = Literal["fine", "worse", "too_few", "looks_worse", "all_changed", "not_ready"]


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """One test: how many values on each side, what is typical of each, p, and the effect.

    Latency: `new` and `old` are medians in ms as measured, `ratio_new` and `ratio_old` the medians after each value was
    divided by its own site's usual; these are what is tested.  Errors: the rates.  Quality: mean scores.
    `effect` is the probability of being worse (0.5 is no difference), for errors the rise of the rate.  `p_before` is
    the second test of the errors, against the same sites before.  `worse`: proved; `looks_worse`: as large, unproved.
    """

    measure: Measure
    n_new: int
    n_old: int
    new: float
    old: float
    effect: float
    p: float
    u: float | None = None
    ratio_new: float | None = None
    ratio_old: float | None = None
    p_before: float | None = None
    worse: bool = False
    looks_worse: bool = False


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """One look of the judge, with every number that it rests on.

    `alpha` is the significance of each test at this look; `look` counts from 1.  `against` says with whom the new
    generation was compared at the same time: sites on the old one, sites that got the new one in earlier steps, or
    (nobody else is left) the same sites before.
    """

    outcome: Outcome
    reason: Reason
    look: int
    alpha: float
    min_requests: int
    against: Against
    sites_new: int
    sites_old: int
    requests_new: int
    requests_old: int
    comparisons: tuple[Comparison, ...]
    not_ready: tuple[str, ...] = ()

    def sentence(self) -> tuple[str, str]:
        """The verdict in English, Korean."""
        en, ko = _REASONS[self.reason]
        numbers = _numbers(self)
        words = {
            "min": self.min_requests,
            "ready": ", ".join(self.not_ready[:3]),
            "new": self.requests_new,
            "old": self.requests_old,
            "who": _AGAINST[self.against][0],
            "who_ko": _AGAINST[self.against][1],
        }
        said, said_ko = en.format_map(words), ko.format_map(words)
        if not numbers:
            return f"{said}.", f"{said_ko}."
        return (
            f"{said}: {'; '.join(one for one, _ in numbers)}.",
            f"{said_ko}: {'; '.join(one for _, one in numbers)}.",
        )


_AGAINST: Final[dict[Against, tuple[str, str]]] = {
    "old": ("on the old generation at the same time", "같은 시간대의 이전 세대"),
    "earlier": ("at the same time on sites that changed before", "같은 시간대의 먼저 바뀐 사이트"),
    "before": ("on the same sites before", "같은 사이트의 변경 전"),
}
_REASONS: Final[dict[Reason, tuple[str, str]]] = {
    "fine": (
        "not worse, {new} requests against {old} {who}",
        "나빠지지 않았습니다. 새 세대 요청 {new}건, {who_ko} {old}건",
    ),
    "worse": (
        "worse, {new} requests against {old} {who}",
        "나빠졌습니다. 새 세대 요청 {new}건, {who_ko} {old}건",
    ),
    "too_few": (
        "too few to tell, {new} requests against {old} {who}; {min} with a time are needed on each side",
        "판단하기에 부족합니다. 새 세대 요청 {new}건, {who_ko} {old}건. 양쪽에 시간이 측정된 {min}건이 필요합니다",
    ),
    "looks_worse": (
        "it looks worse, and may be chance, {new} requests against {old} {who}",
        "나빠 보이지만 우연일 수 있습니다. 새 세대 요청 {new}건, {who_ko} {old}건",
    ),
    "all_changed": (
        "worse than before, but every site changed, so it may be the time of day, {new} requests against {old} {who}",
        "변경 전보다 나빠졌지만 모든 사이트가 바뀌어 시간대 때문일 수 있습니다. 새 세대 요청 {new}건, {who_ko} {old}건",
    ),
    "not_ready": (
        "deployments that were ready before are not ready now ({ready})",
        "전에는 준비되어 있던 배포가 준비되지 않았습니다({ready})",
    ),
}
_MEASURES: Final[dict[Measure, str]] = {"errors": "오류율", "latency": "지연 시간", "quality": "품질"}


def _numbers(verdict: Verdict) -> list[tuple[str, str]]:
    return [_of(one) for one in verdict.comparisons]


def _of(one: Comparison) -> tuple[str, str]:
    korean = _MEASURES[one.measure]
    if one.measure == "errors":
        second = "" if one.p_before is None else f", p {one.p_before:.2g} against the same sites before"
        second_ko = "" if one.p_before is None else f", 같은 사이트의 변경 전 대비 p {one.p_before:.2g}"
        rates = f"{one.new:.2%}", f"{one.old:.2%}"
        return (
            f"errors {rates[0]} against {rates[1]} (p {one.p:.2g}{second})",
            f"{korean} {rates[0]}, 비교 대상 {rates[1]}(p {one.p:.2g}{second_ko})",
        )
    if one.u is None:
        return (
            f"{one.measure} has {one.n_new} values against {one.n_old}",
            f"{korean} 값 {one.n_new}개, 비교 대상 {one.n_old}개",
        )
    typical = f"{one.new:.3g}", f"{one.old:.3g}"
    if one.measure == "latency":
        typical = f"{one.ratio_new:.3g}", f"{one.ratio_old:.3g}"
        en = f"latency {typical[0]} × against {typical[1]} × what is usual at each site"
        ko = f"{korean} 사이트별 평소의 {typical[0]}배, 비교 대상 {typical[1]}배"
    else:
        en, ko = (
            f"quality {typical[0]} against {typical[1]}",
            f"{korean} {typical[0]}, 비교 대상 {typical[1]}",
        )
    return (
        f"{en} (U {one.u:.0f}, p {one.p:.2g}, {one.effect:.0%} likely to be worse)",
        f"{ko}(U {one.u:.0f}, p {one.p:.2g}, 나쁠 확률 {one.effect:.0%})",
    )
