"""What a rollout does next: wait, go one step further, hold, or go back.  Pure.

The sites of a rollout stand in a fixed order, which a hash of generation and name gives: no shop is always the first.
Sites of the same kind (tier, region, labels) are spread over the order, so that a step is a fair part of the fleet.
A step takes the first so many.  Sites that are away block nothing: they get the generation when they come back, if
the rollout still goes on or is done by then.

The judge looks at fixed times of a step, and each look may spend a fixed share of its alpha:

    at 10, 25 and 50 % of the bake time    1/12 each    for what is plainly broken
    when the bake time is over             5/12         the first look that may let the rollout go on
    at thirds of the time up to max_wait   1/9 each     where that look was inconclusive

Looks that were missed (the hub was down) fall together into one, with the share of the last.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Final, Literal

import msgspec

from ondol.core.catalog import RolloutDoc, SiteDoc
from ondol.hub.decide.judge import Sample, compare
from ondol.hub.decide.verdicts import Against, Verdict
from ondol.units import NS_PER_S

State = Literal["running", "paused", "held", "done", "aborted", "superseded"]
OVER: Final = ("done", "aborted", "superseded")
_EARLY: Final = (0.1, 0.25, 0.5)
_EARLY_WEIGHT: Final = 1.0
_BAKED_WEIGHT: Final = 5.0
_LATE: Final = (1 / 3, 2 / 3, 1.0)
_LATE_WEIGHT: Final = 4 / 3


class Look(msgspec.Struct, frozen=True):
    """When the judge looks, in seconds of the step, what it may spend, and whether the rollout may then go on."""

    after_s: float
    share: float
    baked: bool


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What is known at a look.  `reached`: sites of this and earlier steps that run the new generation.

    `away`: those that are stale.  `refused`: sentences of sites that would not take it.  `not_ready`: deployments that
    were ready before.  `new` and `old` are samples of the same window, `against` says whose the old ones are.
    """

    reached: int
    away: int
    refused: tuple[str, ...] = ()
    not_ready: tuple[str, ...] = ()
    new: tuple[Sample, ...] = ()
    old: tuple[Sample, ...] = ()
    against: Against = "old"


class Action(msgspec.Struct, frozen=True, kw_only=True):
    """What to do, and why in English and Korean.  `looks` is how many looks of the step are over with this one."""

    do: Literal["wait", "widen", "hold", "abort", "finish"]
    why: str
    why_ko: str
    looks: int
    reached: int = 0
    away: int = 0
    verdict: Verdict | None = None


def order(generation: int, sites: Mapping[str, SiteDoc]) -> list[str]:
    """The order in which sites get their turn: by chance that a hash gives, kinds spread evenly."""
    kinds: defaultdict[str, list[str]] = defaultdict(list)
    for name, site in sites.items():
        kinds[f"{site.tier}/{site.region}/{sorted(site.labels.items())}"].append(name)
    places = []
    for kind, names in kinds.items():
        names.sort(key=lambda name: _chance(generation, name))
        begin = _chance(generation, f"kind {kind}")
        places += [((rank + begin) / len(names), name) for rank, name in enumerate(names)]
    return [name for _, name in sorted(places)]


def _chance(generation: int, text: str) -> float:
    return int.from_bytes(hashlib.sha256(f"{generation}/{text}".encode()).digest()[:6], "big") / 2**48


def sizes(doc: RolloutDoc, total: int) -> list[int]:
    """How many sites have the generation after each step: rising, and the last is all of them."""
    found: list[int] = []
    for step in doc.steps:
        wanted = math.ceil(total * min(100, int(step[:-1])) / 100) if step.endswith("%") else int(step)
        wanted = min(total, max(1, wanted))
        if not found or wanted > found[-1]:
            found.append(wanted)
    if not found or found[-1] < total:
        found.append(total)
    return found


def looks(doc: RolloutDoc) -> tuple[Look, ...]:
    """The looks of one step; their shares add up to 1."""
    late_s = doc.judge.max_wait_s - doc.bake_s
    times = [(doc.bake_s * part, _EARLY_WEIGHT, False) for part in _EARLY]
    times.append((doc.bake_s, _BAKED_WEIGHT, True))
    if late_s > 0:
        times += [(doc.bake_s + late_s * part, _LATE_WEIGHT, True) for part in _LATE]
    total = sum(weight for _, weight, _ in times)
    return tuple([Look(after_s, weight / total, baked) for after_s, weight, baked in times])


def decide(
    doc: RolloutDoc, facts: Callable[[], Facts], *, is_last: bool, looked: int, began_ns: int, now_ns: int
) -> Action | None:
    """The next action of a running step, or None until the next look.  `facts` is asked only at a look.

    `looked` is how many looks of the step are over, `began_ns` when the step began.
    """
    plan = looks(doc)
    took_s = (now_ns - began_ns) / NS_PER_S
    over = sum(1 for one in plan if one.after_s <= took_s)
    if over <= looked:
        return None
    look, known = plan[over - 1], facts()
    verdict = compare(
        doc.judge, known.new, known.old, look=over, share=look.share, against=known.against, not_ready=known.not_ready
    )  # fmt: skip
    en, ko = verdict.sentence()
    does = _does(doc, verdict, look, is_last=is_last, is_last_look=over == len(plan))
    if known.refused:
        does = "abort"
        en = f"a site refused the generation: {known.refused[0]}"
        ko = f"한 사이트가 이 세대를 거부했습니다: {known.refused[0]}"
    elif verdict.outcome == "inconclusive" and does != "wait":
        en = f"inconclusive after {took_s:.0f} s, and told to {doc.judge.inconclusive} then; {en}"
        ko = (
            f"{took_s:.0f}초가 지나도 결론이 나지 않아 정해진 대로 처리합니다({doc.judge.inconclusive}). {ko}"
        )
    return Action(
        do=does, why=en, why_ko=ko, looks=over, reached=known.reached, away=known.away, verdict=verdict
    )


def _does(
    doc: RolloutDoc, verdict: Verdict, look: Look, *, is_last: bool, is_last_look: bool
) -> Literal["wait", "widen", "hold", "abort", "finish"]:
    if verdict.outcome == "abort":
        return "abort"
    further: Literal["widen", "finish"] = "finish" if is_last else "widen"
    if verdict.outcome == "continue":
        return further if look.baked else "wait"
    if not is_last_look:
        return "wait"
    return further if doc.judge.inconclusive == "continue" else doc.judge.inconclusive
