"""Which process speaks for a site: one at a time, and never two that were made from one disk image.

Each start of a site has a random instance.  The hub knows the instance that speaks now, and the one before it:

    hello of …                   the one that spoke last is …   then
    the present instance         –                              welcome back (a new connection)
    a new instance               gone, or silent for 15 s       it takes over
    a new instance               alive                          it waits; still alive 20 s and four hellos later:
                                                                the new one is fenced
    the instance before          –                              asked to prove that it lives (a late message could
                                                                not); if it does, the present one came second: fenced
    the fenced instance          –                              refused, until an operator admits the site again

So a lone site that restarts, however it ended, takes over at once or after 15 s of silence, and is never fenced:
nobody else speaks with its identity.  Of two that live, the one that was there first stays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from ondol.core.ports import Tx
from ondol.errors import Fenced, HelloAgain, InvalidRequest
from ondol.hub import sites
from ondol.hub.sites import SiteRow
from ondol.units import NS_PER_S
from ondol.wire import sync

LIVE_S: Final = 15.0
"""A process that was not heard for so long is taken to be gone; a living one reports every 10 s."""
FENCE_AFTER_S: Final = 20.0
WAIT_S: Final = 5.0
FENCE_AFTER_WAITS: Final = 4
"""So many waits take longer than LIVE_S also where the hub's wall clock jumps, and time alone cannot be believed."""


def hello(
    tx: Tx, site: str, message: sync.Hello, *, now_ns: int, live: bool, new_challenge: Callable[[], str]
) -> tuple[float, str]:
    """(seconds to wait, challenge) for a process that begins to speak; (0, "") lets it in.

    `live`: the process that spoke last was heard less than 15 s ago, and has not hung up since.

    Raises:
        Fenced: another machine lives with this identity, and was there first.
        InvalidRequest: the site speaks no version that this hub does, or its instance is no name.
    """
    if not 8 <= len(message.instance) <= 64 or not message.instance.isalnum():
        raise InvalidRequest("hello: expected an instance of 8 to 64 letters and digits")
    if not set(message.versions) & set(range(sync.OLDEST, sync.VERSION + 1)):
        raise InvalidRequest(
            f"hello: the site speaks versions {message.versions[:8]}, this hub {sync.OLDEST} to {sync.VERSION}; "
            "update whichever is older"
        )
    row = sites.get(tx, site)
    _refuse_fenced(row, message.instance)
    if message.instance == row.instance:
        return 0.0, ""
    if message.instance == row.previous:
        return 0.0, _old_one_back(tx, row, message, new_challenge)
    if live:
        return _second_one(tx, row, message.instance, now_ns), ""
    _set(tx, site, boot=message.boot, instance=message.instance, previous=row.instance)
    return 0.0, ""


def require_instance(tx: Tx, site: str, instance: str) -> None:
    """Only the process that speaks for the site may go on.

    Raises:
        Fenced: it is the one that may not.
        HelloAgain: it is not known (any more); it shall say hello.
    """
    row = sites.get(tx, site)
    _refuse_fenced(row, instance)
    if instance != row.instance:
        raise HelloAgain(f"another process speaks for {site} now, or none did; say hello")


def admit(tx: Tx, site: str) -> None:
    """Let whoever says hello next speak for a site whose second machine was fenced: an operator has looked."""
    sites.get(tx, site)
    tx.run("UPDATE sites SET fenced = NULL, waiting = '', waiting_ns = 0, waits = 0 WHERE name = ?", (site,))


def _refuse_fenced(row: SiteRow, instance: str) -> None:
    if row.fenced == instance:
        raise Fenced(
            f"two machines live with the identity of {row.name}, and this one came second: nothing of it is taken. "
            "If it was made from a copy of the other's disk, delete its data directory and invite it under a name "
            f"of its own. If it replaces the other, stop the other and run: ondol sites admit {row.name}"
        )


def _old_one_back(tx: Tx, row: SiteRow, message: sync.Hello, new_challenge: Callable[[], str]) -> str:
    """The process that was taken over from speaks: a late message cannot know a challenge of today."""
    if row.challenge and message.answer == row.challenge:
        _set(tx, row.name, boot=max(row.boot, message.boot), instance=message.instance, previous="")
        tx.run("UPDATE sites SET fenced = ? WHERE name = ?", (row.instance, row.name))
        return ""
    challenge = new_challenge()
    tx.run("UPDATE sites SET challenge = ? WHERE name = ?", (challenge, row.name))
    return challenge


def _second_one(tx: Tx, row: SiteRow, instance: str, now_ns: int) -> float:
    """A new process while another lives: it may be a quick restart, so it waits for a while before it is fenced."""
    if row.waiting != instance or row.waiting_ns > now_ns:  # the second: the wall clock was set back
        tx.run(
            "UPDATE sites SET waiting = ?, waiting_ns = ?, waits = 1 WHERE name = ?",
            (instance, now_ns, row.name),
        )
    elif row.waits >= FENCE_AFTER_WAITS and now_ns - row.waiting_ns > FENCE_AFTER_S * NS_PER_S:
        tx.run("UPDATE sites SET fenced = ?, waiting = '', waits = 0 WHERE name = ?", (instance, row.name))
    else:
        tx.run("UPDATE sites SET waits = waits + 1 WHERE name = ?", (row.name,))
    return WAIT_S


def _set(tx: Tx, site: str, *, boot: int, instance: str, previous: str) -> None:
    tx.run(
        "UPDATE sites SET boot = ?, instance = ?, previous = ?, waiting = '', waiting_ns = 0, waits = 0,"
        " challenge = '' WHERE name = ?",
        (boot, instance, previous, site),
    )
