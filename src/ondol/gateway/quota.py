"""Requests and tokens a minute, a key and a team: token buckets in exact integers.

`Quotas` owns the buckets; nobody else writes them.  A request takes from all its buckets or from none.
A bucket holds one minute's worth and fills continuously.  Its level is kept in tokens times nanoseconds
of a minute, so that a refill of `limit` tokens a minute is `limit` a nanosecond: nothing is ever rounded,
and nothing drifts.
"""

from __future__ import annotations

from typing import Final

import msgspec

from ondol.core.catalog import TeamDoc
from ondol.core.identity import Principal
from ondol.units import NS_PER_MS, NS_PER_S

_MINUTE_NS: Final = 60 * NS_PER_S
_SWEEP_FROM: Final = 1024
"""Below this many owners nobody looks for idle ones: they weigh less than the search."""


class Tightest(msgspec.Struct, frozen=True):
    """The bucket of one kind that has the least left: limit a minute, what is left, time until full."""

    limit: int
    remaining: int
    reset_ns: int


class Granted(msgspec.Struct, frozen=True):
    """A request may go on.  `tokens` were taken from the buckets of `owners`; None where unlimited."""

    owners: tuple[str, ...] = ()
    tokens: int = 0
    requests_left: Tightest | None = None
    tokens_left: Tightest | None = None


class Limited(msgspec.Struct, frozen=True):
    """A request may not go on, and nothing was taken.

    `owner` is `key` or `team`, `kind` is `requests` or `tokens`.  `retry_after_ns` is the time until the
    same request passes if nobody else asks; None where it can never pass, because it wants more than
    the whole bucket holds.
    """

    owner: str
    kind: str
    limit: int
    wanted: int
    retry_after_ns: int | None
    requests_left: Tightest | None = None
    tokens_left: Tightest | None = None

    @property
    def retry_after_s(self) -> float | None:
        """Seconds, rounded up to a millisecond, so that a caller who waits that long does pass."""
        return None if self.retry_after_ns is None else -(-self.retry_after_ns // NS_PER_MS) / 1000

    @property
    def message(self) -> str:
        """The sentence for the caller."""
        limit = f"The limit of this {self.owner} is {self.limit} {self.kind} a minute"
        if self.retry_after_ns is None:
            return (
                f"{limit}, and this request alone needs up to {self.wanted}, so it can never pass. "
                "Send a shorter prompt, ask for fewer output tokens, or have the limit raised."
            )
        return f"{limit}, and it is used up. Try again in {self.retry_after_s} s."


UNLIMITED: Final = Granted()
"""What every request gets whose key and team have no limits."""


class Quotas:
    """The buckets of all keys and teams.  Bounded: an owner whose buckets are full again is forgotten."""

    def __init__(self) -> None:
        """Start with every bucket full."""
        self._owners: dict[str, _Buckets] = {}
        self._sweep_at = _SWEEP_FROM

    def admit(
        self, *, principal: Principal, team: TeamDoc | None, tokens: int, now_ns: int
    ) -> Granted | Limited:
        """Take one request and `tokens` tokens from the key's and the team's buckets, or nothing at all.

        `tokens` is what the request may need; `correct` settles the difference.  About 0.1 us where
        there are no limits.
        """
        team_limited = team is not None and (team.requests_per_min or team.tokens_per_min) is not None
        if not team_limited and principal.requests_per_min is None and principal.tokens_per_min is None:
            return UNLIMITED
        owners = []
        if principal.requests_per_min is not None or principal.tokens_per_min is not None:
            name = "key:" + principal.key_id
            owners.append(self._buckets(name, principal.requests_per_min, principal.tokens_per_min, now_ns))
        if team_limited and team is not None:
            name = f"team:{team.tenant}/{team.name}"
            owners.append(self._buckets(name, team.requests_per_min, team.tokens_per_min, now_ns))
        refusal = _refusal(owners, tokens)
        if refusal is not None:
            return refusal
        for owner in owners:
            if owner.requests is not None:
                owner.requests.level -= _MINUTE_NS
            if owner.tokens is not None:
                owner.tokens.level -= tokens * _MINUTE_NS
        return Granted(
            tuple([owner.name for owner in owners if owner.tokens is not None]),
            tokens,
            _tightest([owner.requests for owner in owners]),
            _tightest([owner.tokens for owner in owners]),
        )

    def correct(self, granted: Granted, actual_tokens: int, now_ns: int) -> None:
        """Give back what was taken too much, or take what was taken too little.

        A bucket may go below empty, and then fills from there: on average the limit holds.
        """
        difference = (granted.tokens - actual_tokens) * _MINUTE_NS
        if difference == 0:
            return
        for name in granted.owners:
            owner = self._owners.get(name)
            # A forgotten owner was full, and so would be a bucket that got something back.
            if owner is not None and owner.tokens is not None:
                owner.tokens.refill(now_ns)
                owner.tokens.level = min(owner.tokens.level + difference, owner.tokens.full)

    def __len__(self) -> int:
        """How many owners are remembered."""
        return len(self._owners)

    def _buckets(self, name: str, requests: int | None, tokens: int | None, now_ns: int) -> _Buckets:
        owner = self._owners.get(name)
        if owner is None:
            if len(self._owners) >= self._sweep_at:
                self._forget_full(now_ns)
            owner = self._owners[name] = _Buckets(name)
        owner.requests = _at_limit(owner.requests, requests, now_ns)
        owner.tokens = _at_limit(owner.tokens, tokens, now_ns)
        return owner

    def _forget_full(self, now_ns: int) -> None:
        # Amortised: the next sweep comes after as many new owners as are left now.
        for name, owner in list(self._owners.items()):
            if owner.is_full(now_ns):
                del self._owners[name]
        self._sweep_at = max(_SWEEP_FROM, 2 * len(self._owners))


class _Bucket:
    __slots__ = ("at_ns", "full", "level", "limit")

    def __init__(self, limit: int, now_ns: int) -> None:
        self.limit = limit
        self.full = limit * _MINUTE_NS
        self.level = self.full
        self.at_ns = now_ns

    def refill(self, now_ns: int) -> None:
        if now_ns > self.at_ns:
            level = self.level + (now_ns - self.at_ns) * self.limit
            self.level = min(level, self.full)
            self.at_ns = now_ns


class _Buckets:
    __slots__ = ("name", "requests", "tokens")

    def __init__(self, name: str) -> None:
        self.name = name
        self.requests: _Bucket | None = None
        self.tokens: _Bucket | None = None

    def is_full(self, now_ns: int) -> bool:
        for bucket in (self.requests, self.tokens):
            if bucket is not None:
                bucket.refill(now_ns)
                if bucket.level < bucket.full:
                    return False
        return True


def _at_limit(bucket: _Bucket | None, limit: int | None, now_ns: int) -> _Bucket | None:
    """The bucket, filled up to now; where the limit was changed it keeps what was used."""
    if limit is None:
        return None
    if bucket is None:
        return _Bucket(limit, now_ns)
    bucket.refill(now_ns)
    if bucket.limit != limit:
        used = bucket.full - bucket.level
        bucket.limit, bucket.full = limit, limit * _MINUTE_NS
        bucket.level = bucket.full - used
    return bucket


def _refusal(owners: list[_Buckets], tokens: int) -> Limited | None:
    """The bucket that makes this request wait longest, or that it can never pass; None when all agree."""
    worst: tuple[str, str, _Bucket, int] | None = None
    worst_wait = 0
    for owner in owners:
        for kind, bucket, wanted in (("requests", owner.requests, 1), ("tokens", owner.tokens, tokens)):
            if bucket is None:
                continue
            wait = -((bucket.level - wanted * _MINUTE_NS) // bucket.limit)
            if wanted > bucket.limit:
                return _limited(owners, owner.name, kind, bucket, wanted=wanted, wait_ns=None)
            if wait > worst_wait:
                worst, worst_wait = (owner.name, kind, bucket, wanted), wait
    if worst is None:
        return None
    name, kind, bucket, wanted = worst
    return _limited(owners, name, kind, bucket, wanted=wanted, wait_ns=worst_wait)


def _limited(
    owners: list[_Buckets], name: str, kind: str, bucket: _Bucket, *, wanted: int, wait_ns: int | None
) -> Limited:
    return Limited(
        owner=name.partition(":")[0],
        kind=kind,
        limit=bucket.limit,
        wanted=wanted,
        retry_after_ns=wait_ns,
        requests_left=_tightest([owner.requests for owner in owners]),
        tokens_left=_tightest([owner.tokens for owner in owners]),
    )


def _tightest(buckets: list[_Bucket | None]) -> Tightest | None:
    found: Tightest | None = None
    for bucket in buckets:
        if bucket is None:
            continue
        remaining = max(bucket.level, 0) // _MINUTE_NS
        if found is None or remaining < found.remaining:
            found = Tightest(bucket.limit, remaining, -((bucket.level - bucket.full) // bucket.limit))
    return found


def rate_headers(state: Granted | Limited) -> tuple[tuple[str, str], ...]:
    """The `x-ratelimit-*` reply headers in OpenAI's form; empty where there is no limit."""
    headers: tuple[tuple[str, str], ...] = ()
    for kind, tightest in (("requests", state.requests_left), ("tokens", state.tokens_left)):
        if tightest is not None:
            headers += (
                ("x-ratelimit-limit-" + kind, str(tightest.limit)),
                ("x-ratelimit-remaining-" + kind, str(tightest.remaining)),
                ("x-ratelimit-reset-" + kind, _duration(tightest.reset_ns)),
            )
    return headers


def _duration(ns: int) -> str:
    """`120ms`, `6.5s` or `1m2s`, as OpenAI writes it; rounded up to a millisecond."""
    ms = -(-ns // NS_PER_MS)
    if ms < 1000:
        return f"{ms}ms"
    minutes, ms = divmod(ms, 60_000)
    seconds = f"{ms / 1000:g}s"
    return f"{minutes}m{seconds}" if minutes else seconds
