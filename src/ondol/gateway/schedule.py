"""Where to answer: filter, score, pick.  Pure: a request and a snapshot in, an order with reasons out."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from ondol.core.inference import Capability, DataClass, Objective, Task
from ondol.core.usage import Decision, Dropped
from ondol.errors import BudgetExhausted, NoEndpoint, OndolError, Overloaded, Unsupported
from ondol.gateway.scorers import FACTORS, WEIGHTS, best_of, scores_of


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """One endpoint as of now, with what is expected of it for this request.

    `cost` and `carbon_g` are expectations in one unit for all candidates (cost in the site's currency);
    None means unknown.  `affordable` is false where a hard budget, or the caller's own ceiling, cannot
    pay its worst case.  `problem` says why it cannot take a request now (engine, breaker).
    """

    name: str
    site: str
    local: bool
    task: Task
    capabilities: frozenset[Capability]
    context_tokens: int | None
    parallel: int
    queue: int
    in_flight: int
    ttft_ms: float
    total_ms: float
    cost: float | None
    carbon_g: float | None
    quality: float | None
    affordable: bool = True
    problem: str | None = None


class Wish(msgspec.Struct, frozen=True, kw_only=True):
    """What the request demands of its place.  `flex`: it can wait, so it takes no place in a queue."""

    task: Task
    needs: frozenset[Capability]
    tokens_max: int
    prompt_tokens: int
    objective: Objective
    data_class: DataClass
    remaining_ms: float
    flex: bool = False


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """The endpoints to try, best first, and why the first is first."""

    order: tuple[str, ...]
    decision: Decision


REASONS = {
    Objective.FAST: "fastest",
    Objective.CHEAP: "cheapest",
    Objective.GREEN: "greenest",
    Objective.BEST: "best_quality",
    Objective.PRIVATE: "private",
}
_FACTOR_OF = {"fastest": 0, "cheapest": 1, "greenest": 2, "best_quality": 3}


def _must_stay(wish: Wish) -> str | None:
    """Why the request may not leave this site, as a code; None when it may."""
    if wish.data_class in (DataClass.CONFIDENTIAL, DataClass.RESTRICTED):
        return "class_stays"
    return "private_stays" if wish.objective is Objective.PRIVATE else None


def _dropped(wish: Wish, one: Candidate, stays: str | None) -> Dropped | None:
    """Why a candidate cannot serve; the checks that no waiting can mend come first."""
    if one.task is not wish.task:
        return Dropped(one.name, "task", one.task.value)
    if not wish.needs <= one.capabilities:
        return Dropped(one.name, "capability", ", ".join(sorted(wish.needs - one.capabilities)))
    if one.context_tokens is not None and wish.prompt_tokens > one.context_tokens:
        return Dropped(one.name, "context", f"{wish.prompt_tokens} > {one.context_tokens}")
    if stays is not None and not one.local:
        return Dropped(one.name, stays, wish.data_class.value)
    if one.problem is not None:
        return Dropped(one.name, "unhealthy", one.problem)
    if one.in_flight >= one.parallel + (0 if wish.flex else one.queue):
        return Dropped(one.name, "full", f"{one.in_flight} at once")
    if not one.affordable:
        return Dropped(one.name, "budget", "unpriced" if one.cost is None else "")
    if one.ttft_ms > wish.remaining_ms:
        return Dropped(one.name, "too_slow", f"{one.ttft_ms:.0f} ms > {wish.remaining_ms:.0f} ms")
    return None


def schedule(wish: Wish, candidates: Sequence[Candidate]) -> Choice:
    """The endpoints to try, best first; equal input gives equal output, ties fall to the name.

    Those that are expected to answer within the deadline come before those that are not, whatever their scores.
    O(e) for e candidates, times five factors.

    Raises:
        Unsupported: no candidate can ever serve such a request.
        BudgetExhausted: what is left pays for none of those that could.
        Overloaded: those that could are full.
        NoEndpoint: all were dropped; the message says why, one by one.
    """
    stays = _must_stay(wish)
    dropped: list[Dropped] = []
    able: list[Candidate] = []
    for one in candidates:
        reason = _dropped(wish, one, stays)
        if reason is None:
            able.append(one)
        else:
            dropped.append(reason)
    if not able:
        raise _nothing_left(dropped, _free_in_s(candidates, dropped))
    if len(able) == 1:
        return Choice(order=(able[0].name,), decision=_only(wish, able[0], stays, tuple(dropped)))
    return _pick(wish, able, stays, tuple(dropped))


def _only(wish: Wish, one: Candidate, stays: str | None, dropped: tuple[Dropped, ...]) -> Decision:
    code = stays if stays is not None and any(d.code == stays for d in dropped) else "only_choice"
    return Decision(code=code, objective=wish.objective.value, chosen=one.name, dropped=dropped)


def _pick(wish: Wish, able: list[Candidate], stays: str | None, dropped: tuple[Dropped, ...]) -> Choice:
    weights = WEIGHTS[wish.objective]
    best = best_of(able)
    ranked = []
    for one in able:
        scores = scores_of(one, best)
        w, s = weights, scores
        total = w[0] * s[0] + w[1] * s[1] + w[2] * s[2] + w[3] * s[3] + w[4] * s[4]
        ranked.append((one.total_ms > wish.remaining_ms, -total, one.name, scores, one))
    ranked.sort()
    late, key, _, ours, first = ranked[0]
    _, _, _, theirs, second = ranked[1]
    gaps = [w * (a - b) for w, a, b in zip(weights, ours, theirs, strict=True)]
    lost = gaps.index(max(gaps))
    code = REASONS[wish.objective]
    named = _FACTOR_OF.get(code)
    if named is not None and any(one[3][named] > ours[named] for one in ranked):
        code = "balance"
    if not late and any(one[0] and one[1] < key for one in ranked):
        code = "in_time"
    if stays is not None and any(d.code == stays for d in dropped):
        code = stays
    decision = Decision(
        code=code,
        objective=wish.objective.value,
        chosen=first.name,
        runner_up=second.name,
        lost_on=FACTORS[lost],
        chosen_value=_value(first, lost),
        runner_up_value=_value(second, lost),
        dropped=dropped,
    )
    return Choice(order=tuple([one[2] for one in ranked]), decision=decision)


def _value(one: Candidate, factor: int) -> float | None:
    """The figure behind a factor's score."""
    return (one.total_ms, one.cost, one.carbon_g, one.quality, float(one.in_flight))[factor]


_WHY = {
    "task": "serves another task ({})",
    "capability": "cannot do: {}",
    "context": "prompt is too long for it ({} tokens)",
    "class_stays": "data of class {} may not leave this site",
    "private_stays": "the request asks to stay on this site",
    "unhealthy": "{}",
    "full": "is full ({})",
    "budget": "the budget or the cost ceiling cannot pay its worst case {}",
    "too_slow": "would not answer in time ({})",
}


def why_dropped(one: Dropped) -> str:
    """One dropped endpoint as a clause."""
    return f"{one.deployment}: {_WHY.get(one.code, one.code).format(one.detail).strip()}"


def _free_in_s(candidates: Sequence[Candidate], dropped: list[Dropped]) -> float:
    """When a place is expected to be free at the first of those that are full: 1 s to a minute."""
    full = {one.deployment for one in dropped if one.code == "full"}
    waits_s = [one.ttft_ms / 1000 for one in candidates if one.name in full]
    return min(max(min(waits_s, default=1.0), 1.0), 60.0)


def _nothing_left(dropped: list[Dropped], free_in_s: float) -> OndolError:
    message = "no endpoint is left: " + "; ".join(map(why_dropped, dropped))
    codes = {one.code for one in dropped}
    if codes <= {"task", "capability", "context"}:
        return Unsupported(message)
    if "budget" in codes and not codes & {"unhealthy", "full", "too_slow"}:
        return BudgetExhausted(message)
    if "full" in codes:
        return Overloaded(message, retry_after_s=free_in_s)
    return NoEndpoint(message, retry_after_s=1.0 if "unhealthy" in codes else None)


def fell_back(decision: Decision, name: str, error: OndolError) -> Decision:
    """The decision after its first choice failed before a byte and `name` took over."""
    lost = Dropped(decision.chosen or "", "unhealthy", error.message)
    return msgspec.structs.replace(
        decision, code="fallback", chosen=name, runner_up=None, lost_on=None,
        chosen_value=None, runner_up_value=None, dropped=(*decision.dropped, lost),
    )  # fmt: skip


def hedged(decision: Decision | None, rival: str) -> Decision | None:
    """The decision where a second endpoint is asked as well if the first is not in time."""
    return None if decision is None else msgspec.structs.replace(decision, hedge=rival)
