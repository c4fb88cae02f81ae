"""Take or refuse what the hub says, fetch or not, and how much to send at once."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ondol.core import dsse
from ondol.core.desired import Desired, DocumentRef, Manifest, digest_of, sign_manifest
from ondol.core.trust import Epoch, Trust, issue_epoch
from ondol.errors import BadSignature
from ondol.gateway.reconcile import (
    BUSY_BYTES,
    ROWS_MIN,
    WAIT_S,
    Have,
    RangePace,
    judge,
    newer_epoch,
    shall_fetch,
)
from ondol.wire.sync import RANGE_ROWS_MAX, Announcement

PRIVATE = dsse.new_private_key()
OTHER = dsse.new_private_key()
TRUST = Trust(fleet="shops", keys={dsse.key_id(dsse.public_key(PRIVATE)): dsse.public_key(PRIVATE)})


def _manifest(generation: int, *texts: str, pepper: bytes = b"", site: str = "s") -> Manifest:
    return Manifest(
        fleet="shops", site=site, generation=generation, issued_ns=1, pepper=pepper,
        documents=tuple(
            [DocumentRef("Model", f"m{at}", digest_of(text.encode())) for at, text in enumerate(texts)]
        ),
    )  # fmt: skip


def _kept(manifest: Manifest, *texts: str) -> Desired:
    bodies = {digest_of(text.encode()): text.encode() for text in texts}
    return Desired(envelope=sign_manifest(PRIVATE, manifest), manifest=manifest, bodies=bodies)


def _judge(
    manifest: Manifest, *sent: str, kept: Desired | None = None, key: bytes = PRIVATE
) -> tuple[str, int, str]:
    found = judge(
        sign_manifest(key, manifest), [text.encode() for text in sent], kept=kept, trust=TRUST, site="s"
    )
    return found.what, found.generation, found.why


# ---- manifests


def test_a_first_and_a_higher_generation_are_taken_with_what_is_here_already() -> None:
    assert _judge(_manifest(1, "a"), "a")[:2] == ("take", 1)
    kept = _kept(_manifest(1, "a"), "a")
    found = judge(sign_manifest(PRIVATE, _manifest(2, "a", "b")), [b"b"], kept=kept, trust=TRUST, site="s")
    assert found.desired is not None and found.desired.documents() == [b"a", b"b"]


def test_the_same_manifest_changes_nothing_and_one_with_other_keys_is_kept_without_a_restart() -> None:
    kept = _kept(_manifest(3, "a"), "a")
    assert _judge(_manifest(3, "a"), kept=kept)[:2] == ("same", 3)
    assert _judge(_manifest(3, "a", pepper=b"new"), kept=kept)[:2] == ("renewed", 3)
    assert _judge(_manifest(3, "b"), "b", kept=kept)[:2] == ("take", 3)


@pytest.mark.parametrize(
    ("manifest", "sent", "key", "generation", "why"),
    [
        (_manifest(2, "a"), (), PRIVATE, 2, "runs 3 already"),
        (_manifest(4, "new"), (), PRIVATE, 4, "are missing"),
        (_manifest(4, "new"), ("nEw",), PRIVATE, 4, "not the ones"),
        (_manifest(4, "a"), (), OTHER, 0, "no good signature"),
        (_manifest(4, "a", site="t"), (), PRIVATE, 0, "for site 't'"),
    ],
    ids=["lower", "missing body", "changed body", "other signer", "other site"],
)
def test_what_is_lower_incomplete_tampered_or_for_another_is_refused(
    manifest: Manifest, sent: tuple[str, ...], key: bytes, generation: int, why: str
) -> None:
    found = _judge(manifest, *sent, kept=_kept(_manifest(3, "a"), "a"), key=key)
    assert found[:2] == ("refuse", generation)
    assert why in found[2]


@given(st.integers(0, 400))
def test_a_flipped_bit_of_a_signed_manifest_is_never_taken(at: int) -> None:
    signed = sign_manifest(PRIVATE, _manifest(9, "a"))
    raw = bytearray(signed.payload.encode())
    raw[at % len(raw)] ^= 1
    payload = raw.decode("latin-1")
    tampered = msgspec.structs.replace(signed, payload=payload)
    found = judge(tampered, [b"a"], kept=None, trust=TRUST, site="s")
    # The last character of base64 may have bits that mean nothing.
    assert found.what == "refuse" or dsse.payload_of(tampered) == dsse.payload_of(signed)


# ---- announcements


def _said(generation: int, epoch: int, changes: int = 0) -> Announcement:
    return Announcement(generation=generation, epoch=epoch, hub_ns=1, changes=changes)


def test_news_are_fetched_once_and_heartbeats_are_not() -> None:
    have = Have(generation=3, epoch=5)
    assert not shall_fetch(_said(3, 5), None, have)
    assert shall_fetch(_said(4, 5), None, have)
    assert shall_fetch(_said(3, 6), _said(3, 5), have)
    assert not shall_fetch(_said(2, 4), _said(3, 5), have)  # a hub that went back has nothing for us
    assert not shall_fetch(_said(4, 5), _said(4, 5), Have(generation=3, epoch=5, refused=4))
    assert shall_fetch(_said(5, 5), _said(4, 5), Have(generation=3, epoch=5, refused=4))
    assert shall_fetch(_said(3, 5, 8), _said(3, 5, 7), have)


# ---- who is out


def _epoch(number: int, issued_ns: int = 10, key: bytes = PRIVATE) -> dsse.Envelope:
    return issue_epoch(key, Epoch(fleet="shops", number=number, issued_ns=issued_ns, stale_s=60))


def test_a_list_of_who_is_out_never_goes_back() -> None:
    assert newer_epoch(_epoch(1), TRUST) is not None
    trust = msgspec.structs.replace(TRUST, epoch=Epoch(fleet="shops", number=4, issued_ns=10, stale_s=60))
    assert newer_epoch(_epoch(4), trust) is None
    again = newer_epoch(_epoch(4, issued_ns=11), trust)
    assert again is not None and again.issued_ns == 11
    for envelope in (_epoch(3, issued_ns=99), _epoch(5, key=OTHER)):
        with pytest.raises(BadSignature):
            newer_epoch(envelope, trust)


# ---- the size of ranges


@given(st.lists(st.tuples(st.floats(0, 60), st.booleans(), st.booleans())))
def test_ranges_stay_within_their_bounds(seen: list[tuple[float, bool, bool]]) -> None:
    pace = RangePace()
    for took_s, full, answered in seen:
        if answered:
            pace.took(took_s, full=full)
        else:
            pace.failed()
        assert ROWS_MIN <= pace.rows <= RANGE_ROWS_MAX
        assert WAIT_S[0] <= pace.wait_s <= WAIT_S[1]


@given(st.floats(1e-6, 5e-3))
def test_ranges_settle_where_they_take_a_short_while(s_per_row: float) -> None:
    pace = RangePace()
    for _ in range(12):
        pace.took(0.005 + pace.rows * s_per_row, full=True)
    took_s = 0.005 + pace.rows * s_per_row
    assert pace.rows in (ROWS_MIN, RANGE_ROWS_MAX) or 0.1 <= took_s <= 0.2


def test_few_rows_teach_nothing_about_many_and_requests_make_ranges_smaller() -> None:
    pace = RangePace()
    before = pace.rows
    pace.took(0.001, full=False)
    assert pace.rows == before
    assert pace.size(True) == BUSY_BYTES < pace.size(False)
