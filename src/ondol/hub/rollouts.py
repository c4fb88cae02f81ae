"""Rollouts as they go: which step, who has the generation, and every verdict with its numbers.

Pure over a transaction.  One rollout goes on at a time; a generation that is applied meanwhile supersedes it.
Sites that the rollout does not select get the generation when it is done.

Going back is a new generation with the documents of the last one that all sites had (`hub/publish.py`), for the whole
fleet: so a site that still ran what a superseded rollout had left, unjudged, comes back too.  Where nothing differs
only a manifest is fetched.

What every site had seen is kept when a step begins (`hub/decide/evidence.py`), beside the rollout: it is read only
when the judge looks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec

from ondol.core.catalog import RolloutDoc
from ondol.core.fleet import Fleet, selected
from ondol.core.ports import Tx
from ondol.errors import Conflict, NotFound
from ondol.hub import audit, ingest, publish, sites
from ondol.hub.decide.evidence import Before, before_of, facts_of
from ondol.hub.decide.rollout import OVER, Action, Facts, Look, State, decide, looks, order, sizes
from ondol.hub.sites import SiteRow
from ondol.units import NS_PER_S
from ondol.wire.sync import Report

SCHEMA: Final[tuple[str, ...]] = (
    "CREATE TABLE rollouts(id BIGINT NOT NULL PRIMARY KEY, active BIGINT NOT NULL, body BLOB NOT NULL,"
    " before BLOB NOT NULL)",
    "CREATE INDEX rollouts_active ON rollouts(active)",
    "CREATE TABLE rollout_events(rollout BIGINT NOT NULL, n BIGINT NOT NULL, body BLOB NOT NULL,"
    " PRIMARY KEY(rollout, n))",
)
LISTED_MAX: Final = 100
_WHY: Final = 300


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened in a rollout; `step` counts from 1, `action` has the verdict with its numbers."""

    time_ns: int
    step: int
    what: str
    what_ko: str
    action: Action | None = None


class Rollout(msgspec.Struct, frozen=True, kw_only=True):
    """One rollout; `id` is its generation.  `sites` is its order, `sizes` how many have it after each step.

    `step` counts from 0, `looked` the looks of the step that are over; `step_ns` is when the step began, later by the
    time that it was paused.  `back` is the generation that brought the old documents back.
    """

    id: int
    previous: int
    name: str
    doc: RolloutDoc
    sites: tuple[str, ...]
    sizes: tuple[int, ...]
    state: State
    step: int
    looked: int
    began_ns: int
    step_ns: int
    paused_ns: int = 0
    ended_ns: int | None = None
    ended: str = ""
    back: int | None = None


class RolloutView(msgspec.Struct, frozen=True, kw_only=True):
    """One rollout as it is shown; `step` counts from 1, `next_look_ns` is None unless it runs.

    `looks` are the times of a step when it is judged, each with the share of alpha that it may take.
    """

    id: int
    name: str
    previous: int
    state: State
    step: int
    sizes: tuple[int, ...]
    steps: tuple[str, ...]
    total: int
    sites: tuple[str, ...]
    began_ns: int
    step_ns: int
    next_look_ns: int | None
    ended_ns: int | None
    min_requests: int
    max_wait_s: float
    bake_s: float
    alpha: float
    min_effect: float
    error_rate_rise: float
    inconclusive: str
    looks: tuple[Look, ...]
    ended: str
    back: int | None
    events: tuple[Event, ...]


def begin(
    tx: Tx, generation: int, previous: int, doc: RolloutDoc, fleet: Fleet, *, now_ns: int
) -> int | None:
    """Begin to roll a generation out; its id, or None where it has no sites and all get it at once.

    A rollout that goes on is superseded: its sites keep what they have until their turn in this one.
    """
    supersede(tx, now_ns=now_ns, why=f"generation {generation} was applied")
    joined = [row.name for row in sites.everyone(tx) if row.key is not None and row.revoked_ns is None]
    chosen = {
        name: fleet.sites[name]
        for name in joined
        if name in fleet.sites and selected(doc.sites, fleet.sites[name])
    }
    if not chosen:
        publish.want_everywhere(tx, generation)
        return None
    one = Rollout(
        id=generation, previous=previous, name=doc.name, doc=doc, sites=tuple(order(generation, chosen)),
        sizes=tuple(sizes(doc, len(chosen))), state="running", step=0, looked=0, began_ns=now_ns, step_ns=now_ns,
    )  # fmt: skip
    reports = _reports(tx)
    _put(tx, one, {name: before_of(reports[name], None) for name in one.sites if name in reports})
    _want(tx, one, since=0, now_ns=now_ns)
    return one.id


def advance(tx: Tx, *, now_ns: int, stale: Callable[[SiteRow], bool]) -> list[str]:
    """Move the rollout that goes on, if there is one and it is time to look; a sentence on what happened.

    `stale` says whether a site was not heard for too long.  Between two looks this costs one small query.
    """
    one = _active(tx)
    if one is None or one.state != "running":
        return []
    action = decide(
        one.doc,
        lambda: _facts(tx, one, stale),
        is_last=one.step == len(one.sizes) - 1,
        looked=one.looked,
        began_ns=one.step_ns,
        now_ns=now_ns,
    )
    if action is None:
        return []
    place = f"step {one.step + 1} of {len(one.sizes)}"
    _note(tx, one, now_ns, (action.why, action.why_ko), action)
    match action.do:
        case "wait":
            _put(tx, msgspec.structs.replace(one, looked=action.looks))
            said = f"{place} waits: {action.why}"
        case "widen":
            _widen(tx, one, now_ns)
            said = f"{place} is over: {action.why}"
        case "finish":
            _finish(tx, one, now_ns, action.why)
            said = f"is done: {action.why}"
        case "hold":
            held = msgspec.structs.replace(one, state="held", looked=action.looks, paused_ns=now_ns)
            _put(tx, held)
            said = (
                f"{place} is held: {action.why} Decide: `ondol rollouts resume` goes on, `abort` goes back."
            )
        case "abort":
            back = _go_back(tx, one, action.why, now_ns=now_ns)
            said = f"was aborted, generation {back.back} brings back {one.previous}: {action.why}"
    return [f"rollout {one.id} {said}"]


def steer(tx: Tx, name: str, action: str, *, now_ns: int) -> RolloutView:
    """Pause, resume or abort by hand.

    A paused rollout is not judged, and resumes where it was.  One that is held has no verdict and will get none: to
    resume it is the decision to go on with the next step.

    Raises:
        NotFound: no rollout of this number goes on.
        Conflict: it is not in a state for that.
    """
    one = _active(tx)
    if one is None or str(one.id) != name:
        now = "none does" if one is None else f"{one.id} does"
        raise NotFound(f"no rollout {name[:20]!r} goes on, {now}; `ondol rollouts list` shows them all")
    if action == "abort":
        _note(tx, one, now_ns, ("an operator aborted it", "운영자가 중단했습니다"))
        one = _go_back(tx, one, "an operator aborted it", now_ns=now_ns)
    elif action == "pause" and one.state == "running":
        one = msgspec.structs.replace(one, state="paused", paused_ns=now_ns)
        _put(tx, one)
        _note(tx, one, now_ns, ("an operator paused it", "운영자가 일시 중지했습니다"))
    elif action == "resume" and one.state == "paused":
        one = msgspec.structs.replace(
            one, state="running", step_ns=one.step_ns + max(0, now_ns - one.paused_ns)
        )
        _put(tx, one)
        _note(tx, one, now_ns, ("an operator resumed it", "운영자가 다시 시작했습니다"))
    elif action == "resume" and one.state == "held":
        _note(tx, one, now_ns, ("an operator decided to go on", "운영자가 계속하기로 결정했습니다"))
        if one.step == len(one.sizes) - 1:
            one = _finish(tx, one, now_ns, "an operator decided to go on")
        else:
            one = _widen(tx, one, now_ns)
    else:
        raise Conflict(f"rollout {one.id} is {one.state}, so it cannot {action[:20]}")
    return _view(tx, one)


def supersede(tx: Tx, *, now_ns: int, why: str) -> None:
    """End the rollout that goes on, if there is one, without going back."""
    one = _active(tx)
    if one is not None:
        one = msgspec.structs.replace(one, state="superseded", ended=why, ended_ns=now_ns)
        _put(tx, one)
        _note(tx, one, now_ns, (f"superseded: {why}", f"다른 세대로 대체되었습니다({why})"))


def everything(tx: Tx) -> list[RolloutView]:
    """The newest hundred, newest first."""
    rows = tx.run("SELECT body FROM rollouts ORDER BY id DESC LIMIT ?", (LISTED_MAX,))
    return [_view(tx, msgspec.json.decode(bytes(row[0]), type=Rollout)) for row in rows]


# ---- what happens


def _widen(tx: Tx, one: Rollout, now_ns: int) -> Rollout:
    """The next step begins: its sites shall run the generation, and everybody's counts are kept."""
    known, reports = _all_before(tx, one.id), _reports(tx)
    since = one.sizes[one.step]
    one = msgspec.structs.replace(one, state="running", step=one.step + 1, looked=0, step_ns=now_ns)
    anew = one.sizes[-1] == one.sizes[one.step]
    for name in one.sites:
        if name in reports:
            known[name] = before_of(reports[name], None if anew else known.get(name))
    _put(tx, one, known)
    _want(tx, one, since=since, now_ns=now_ns)
    return one


def _want(tx: Tx, one: Rollout, *, since: int, now_ns: int) -> None:
    """The first sites up to this step's size shall run it; those after `since` are new in it."""
    fresh = one.sites[since : one.sizes[one.step]]
    publish.set_wanted(tx, one.sites[: one.sizes[one.step]], one.id)
    names = ", ".join(fresh[:5]) + (f" and {len(fresh) - 5} more" if len(fresh) > 5 else "")
    place, count = f"{one.step + 1}/{len(one.sizes)}", f"{one.sizes[one.step]}/{len(one.sites)}"
    _note(
        tx,
        one,
        now_ns,
        (
            f"step {place} begins, {count} sites; new: {names}",
            f"{place} 단계 시작, 사이트 {count}; 추가: {names}",
        ),
    )


def _finish(tx: Tx, one: Rollout, now_ns: int, why: str) -> Rollout:
    one = msgspec.structs.replace(one, state="done", ended=why, ended_ns=now_ns)
    publish.want_everywhere(tx, one.id)
    _put(tx, one)
    _note(
        tx,
        one,
        now_ns,
        ("done: every site shall run it now", "완료: 이제 모든 사이트가 이 세대를 실행합니다"),
    )
    return one


def _go_back(tx: Tx, one: Rollout, why: str, *, now_ns: int) -> Rollout:
    back, _ = publish.rollback(tx, one.previous, author="the hub", now_ns=now_ns)
    audit.note(tx, now_ns, "rollout aborted", str(one.id), why[:_WHY])
    one = msgspec.structs.replace(one, state="aborted", ended=why, ended_ns=now_ns, back=back)
    _put(tx, one)
    said = f"aborted: generation {back} brings back the documents of {one.previous}"
    said_ko = f"중단: {one.previous} 세대의 문서를 {back} 세대로 되돌립니다"
    _note(tx, one, now_ns, (said, said_ko))
    return one


# ---- what is known and stored


def _facts(tx: Tx, one: Rollout, stale: Callable[[SiteRow], bool]) -> Facts:
    here = [row.name for row in sites.everyone(tx) if row.revoked_ns is None and not stale(row)]
    return facts_of(one, frozenset(here), _reports(tx), _all_before(tx, one.id))


def _reports(tx: Tx) -> dict[str, Report]:
    return {name: report for name, (_, report) in ingest.reports(tx).items()}


def _active(tx: Tx) -> Rollout | None:
    rows = tx.run("SELECT body FROM rollouts WHERE active = 1 ORDER BY id DESC LIMIT 1")
    return msgspec.json.decode(bytes(rows[0][0]), type=Rollout) if rows else None


def _all_before(tx: Tx, number: int) -> dict[str, Before]:
    rows = tx.run("SELECT before FROM rollouts WHERE id = ?", (number,))
    return msgspec.json.decode(bytes(rows[0][0]), type=dict[str, Before])


def _put(tx: Tx, one: Rollout, before: Mapping[str, Before] | None = None) -> None:
    active, body = 0 if one.state in OVER else 1, msgspec.json.encode(one)
    if before is None:
        tx.run("UPDATE rollouts SET active = ?, body = ? WHERE id = ?", (active, body, one.id))
        return
    tx.run(
        "INSERT INTO rollouts(id, active, body, before) VALUES(?,?,?,?) ON CONFLICT(id) DO UPDATE SET"
        " active = excluded.active, body = excluded.body, before = excluded.before",
        (one.id, active, body, msgspec.json.encode(before)),
    )


def _note(tx: Tx, one: Rollout, now_ns: int, what: tuple[str, str], action: Action | None = None) -> None:
    number = tx.run("SELECT COALESCE(MAX(n), 0) + 1 FROM rollout_events WHERE rollout = ?", (one.id,))[0][0]
    event = Event(time_ns=now_ns, step=one.step + 1, what=what[0], what_ko=what[1], action=action)
    tx.run(
        "INSERT INTO rollout_events(rollout, n, body) VALUES(?,?,?)",
        (one.id, int(number), msgspec.json.encode(event)),
    )


def _view(tx: Tx, one: Rollout) -> RolloutView:
    rows = tx.run("SELECT body FROM rollout_events WHERE rollout = ? ORDER BY n", (one.id,))
    fields: dict[str, Any] = {
        name: getattr(one, name)
        for name in RolloutView.__struct_fields__
        if name in Rollout.__struct_fields__
    }
    plan, judge = looks(one.doc), one.doc.judge
    ahead = [look.after_s for look in plan[one.looked :]] if one.state == "running" else []
    return RolloutView(
        **fields | {"step": one.step + 1}, steps=one.doc.steps, total=len(one.sites),
        next_look_ns=one.step_ns + int(ahead[0] * NS_PER_S) if ahead else None,
        min_requests=judge.min_requests, max_wait_s=judge.max_wait_s, bake_s=one.doc.bake_s, alpha=judge.alpha,
        min_effect=judge.min_effect, error_rate_rise=judge.error_rate_rise, inconclusive=judge.inconclusive,
        looks=plan, events=tuple([msgspec.json.decode(bytes(row[0]), type=Event) for row in rows]),
    )  # fmt: skip
