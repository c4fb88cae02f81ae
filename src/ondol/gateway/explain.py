"""Reasons as sentences that a person understands, in English and in Korean."""

from __future__ import annotations

from datetime import UTC, datetime

from ondol.core.usage import Decision, Dropped, UsageRecord
from ondol.gateway.budget import Exhausted
from ondol.gateway.semantic import SENTENCES
from ondol.gateway.semantic_eligible import WHY
from ondol.gateway.semantic_guards import REASONS
from ondol.units import NS_PER_S

_FACTORS = {
    "latency": ("expected time", "예상 시간", "{:.0f} ms"),
    "price": ("expected cost", "예상 비용", "{:.8f}"),
    "carbon": ("expected carbon", "예상 탄소", "{:.6f} g"),
    "quality": ("quality", "품질", "{:.2f}"),
    "queue": ("requests already there", "대기 중인 요청", "{:.0f}"),
}
_REASONS = {
    "fastest": ("it was expected to be the fastest", "가장 빠를 것으로 예상되었습니다"),
    "cheapest": ("it was expected to be the cheapest", "가장 저렴할 것으로 예상되었습니다"),
    "greenest": ("it was expected to emit the least carbon", "탄소 배출이 가장 적을 것으로 예상되었습니다"),
    "best_quality": ("its answers have the highest quality", "답변 품질이 가장 높습니다"),
    "private": ("the request asked to stay here", "이 사이트에 머물도록 요청되었습니다"),
    "private_stays": ("the request asked to stay here", "이 사이트에 머물도록 요청되었습니다"),
    "class_stays": (
        "data of class {data_class} may not leave this site",
        "{data_class} 등급의 데이터는 이 사이트를 벗어날 수 없습니다",
    ),
    "only_choice": ("it was the only endpoint that could", "답할 수 있는 유일한 엔드포인트였습니다"),
    "balance": (
        "it was the best balance for objective {objective}",
        "{objective} 목표에 가장 균형이 좋았습니다",
    ),
    "in_time": (
        "it was the best of those expected to answer within the deadline",
        "마감 안에 답할 것으로 예상되는 것 중 가장 좋았습니다",
    ),
    "fallback": (
        "the first choice failed before its first byte",
        "첫 번째 선택이 첫 바이트 전에 실패했습니다",
    ),
    "cache_exact": (
        "the same question was answered before, so the stored answer was used",
        "같은 질문에 이미 답한 적이 있어 저장된 답변을 사용했습니다",
    ),
    "cache_semantic": (
        "a similar question was answered before (similarity {similarity}), and the evidence of this route allows its "
        "answer to be given again",
        "비슷한 질문(유사도 {similarity})에 이미 답한 적이 있고, 이 경로의 근거가 그 답변의 재사용을 허용합니다",
    ),
}
_DROPPED_KO = {
    "task": "다른 작업용입니다({})",
    "capability": "지원하지 않는 기능: {}",
    "context": "프롬프트가 너무 깁니다({} 토큰)",
    "class_stays": "{} 등급의 데이터는 이 사이트를 벗어날 수 없습니다",
    "private_stays": "이 사이트에 머물도록 요청되었습니다",
    "unhealthy": "사용할 수 없습니다: {}",
    "full": "가득 찼습니다({})",
    "budget": "예산 또는 비용 상한이 최대 비용을 감당할 수 없습니다 {}",
    "too_slow": "제시간에 답할 수 없습니다({})",
}


def sentence(record: UsageRecord) -> tuple[str, str]:
    """Why the answer came from where it came: English, Korean."""
    decision = record.decision
    if decision is None:
        return (record.error or "no decision was made", record.error or "결정이 내려지지 않았습니다")
    english, korean = _REASONS.get(decision.code, (decision.code, decision.code))
    words = {
        "data_class": record.data_class, "objective": decision.objective,
        "similarity": "?" if decision.similarity is None else f"{decision.similarity:.2f}",
    }  # fmt: skip
    english, korean = english.format_map(words), korean.format_map(words)
    if decision.code in ("cache_exact", "cache_semantic"):
        return f"{english[:1].upper()}{english[1:]}.", f"{korean}."
    place = record.answered_by or record.site
    who = decision.chosen or record.deployment
    parts_en = [f"{who} on {place} answered: {english}"]
    parts_ko = [f"{place}의 {who} 응답: {korean}"]
    dropped = decision.dropped
    if decision.code == "fallback" and dropped:
        failed, dropped = dropped[-1], dropped[:-1]  # `schedule.fell_back` puts it last
        parts_en[0] += f" ({failed.deployment}: {failed.detail})"
        parts_ko[0] += f" ({failed.deployment}: {failed.detail})"
    lost = _lost(decision)
    if lost is not None:
        parts_en.append(lost[0])
        parts_ko.append(lost[1])
    if decision.hedge is not None:
        asked = any(one.deployment == decision.hedge for one in record.attempts)
        parts_en.append(
            f"{decision.hedge} {'was' if asked else 'would have been'} asked as well, because the deadline was near"
        )
        parts_ko.append(
            f"마감이 가까워 {decision.hedge}에도 {'함께 요청했습니다' if asked else '요청할 참이었습니다'}"
        )
    if decision.recall:
        why = _recall(decision.recall)
        parts_en.append(f"no cached answer was used, because {why[0]}")
        parts_ko.append(f"캐시된 답변을 쓰지 않은 이유: {why[1]}")
    for one in dropped:
        parts_en.append(f"{one.deployment} was dropped ({_english(one)})")
        parts_ko.append(
            f"{one.deployment} 제외({_DROPPED_KO.get(one.code, one.code).format(one.detail).strip()})"
        )
    return "; ".join(parts_en) + ".", "; ".join(parts_ko) + "."


def _recall(code: str) -> tuple[str, str]:
    """Why the semantic cache did not answer."""
    guard = code.removeprefix("semantic_guard_")
    if guard != code:
        return REASONS[guard].en, REASONS[guard].ko
    more = {
        "semantic_off": ("similar questions cannot be found now", "지금은 비슷한 질문을 찾을 수 없습니다"),
        "semantic_check": (
            "this one was asked of the model too, to check the cached answer",
            "캐시된 답변을 확인하려고 모델에도 물었습니다",
        ),
    }
    return (SENTENCES | WHY | more).get(code, (code, code))


def _english(one: Dropped) -> str:
    return {
        "task": f"serves another task, {one.detail}",
        "capability": f"cannot do {one.detail}",
        "context": f"prompt too long: {one.detail} tokens",
        "class_stays": f"data of class {one.detail} stays here",
        "private_stays": "the request stays here",
        "full": f"full, {one.detail}",
        "budget": f"its worst case is more than what is left {one.detail}".strip(),
        "too_slow": f"too slow, {one.detail}",
    }.get(one.code, one.detail or one.code)


def _lost(decision: Decision) -> tuple[str, str] | None:
    """What the runner-up lost on, with both figures."""
    if decision.runner_up is None or decision.lost_on is None:
        return None
    english, korean, form = _FACTORS[decision.lost_on]
    ours = "?" if decision.chosen_value is None else form.format(decision.chosen_value)
    theirs = "?" if decision.runner_up_value is None else form.format(decision.runner_up_value)
    return (
        f"runner-up {decision.runner_up} lost on {english} ({theirs} against {ours})",
        f"차점 {decision.runner_up}: {korean}에서 뒤졌습니다({theirs}, 선택된 쪽 {ours})",
    )


def exhausted_sentence(spent: Exhausted) -> str:
    """What is left of a hard budget, and when it renews (UTC, to the minute)."""
    if spent.why == "unpriced":
        return f"budget '{spent.budget}' is hard, and no endpoint has a known price; add a Price document"
    if spent.why == "no_rate":
        return f"budget '{spent.budget}' has no exchange rate for the price; add one as a Price document"
    if spent.why == "lease":
        return (
            f"budget '{spent.budget}' is shared by the fleet: this site has used up its part of it ({spent.left} "
            "left), and the hub, which could give more, cannot be reached now; try again when it can, or ask for "
            "fewer output tokens"
        )
    renews = datetime.fromtimestamp(spent.renews_ns // NS_PER_S, UTC).strftime("%Y-%m-%dT%H:%MZ")
    return (
        f"budget '{spent.budget}' cannot pay the worst case of this request: {spent.left} left, "
        f"renews {renews}; ask for fewer output tokens, or have the budget raised"
    )
