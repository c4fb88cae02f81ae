"""A hub serves sites of older releases: what they said, recorded, is understood as it was meant.

`tests/data/sync-v1.json` holds each message of version 1 as it was first released, as hex of its bytes, with the
values that it must decode to.  A recorded message is never changed; a new release adds a file of its own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ondol.core.dsse import Envelope, Signature
from ondol.errors import InvalidRequest
from ondol.wire import sync

FILE = Path(__file__).parents[2] / "data" / "sync-v1.json"
ENVELOPE = Envelope(payload_type="t", payload="eA==", signatures=(Signature(sig="cw==", keyid="k"),))
SAMPLES: dict[str, sync.Message] = {
    "Error": sync.Error(code="fenced", message="m", retry_after_s=1.5, hub_ns=7),
    "Join": sync.Join(token="t", key=b"k" * 32, site="shop-1", address="https://a:1", software="ondol 0"),
    "JoinReply": sync.JoinReply(
        fleet="f", site="shop-1", credential=ENVELOPE, epoch=ENVELOPE, hub_keys={"a": b"b"}, hub_ns=7
    ),
    "Renew": sync.Renew(),
    "RenewReply": sync.RenewReply(credential=ENVELOPE, hub_keys={"a": b"b"}),
    "Hello": sync.Hello(
        boot=1, instance="i" * 32, gateway="g", generation=2, epoch=3, acknowledged=4, wall_ns=5, software="ondol 0"
    ),
    "HelloReply": sync.HelloReply(hub_ns=1, generation=2, epoch=3, mark=4, mark_hash=b"h", wait_s=5.0),
    "Watch": sync.Watch(instance="i", generation=2),
    "Fetch": sync.Fetch(instance="i", have=("d",)),
    "FetchReply": sync.FetchReply(manifest=ENVELOPE, bodies=(b"{}",), epoch=ENVELOPE),
    "Range": sync.Range(instance="i", gateway="g", first=1, previous=b"p", rows=(b"r",), head=ENVELOPE),
    "Head": sync.Head(site="shop-1", gateway="g", seq=1, hash=b"h"),
    "RangeReply": sync.RangeReply(mark=1, mark_hash=b"h"),
    "Events": sync.Events(
        instance="i", audit=(sync.Event(id=1, time_ns=2, kind="k", fields={"a": "b", "n": 1}),), thinned=3
    ),
    "EventsReply": sync.EventsReply(audit=1, telemetry=2),
    "Report": sync.Report(
        instance="i", generation=1, epoch=2, last_seq=3, acknowledged=2, wall_ns=5, offset_ns=-6,
        deployments=(sync.DeploymentState(name="d", ready=False, why="w"),),
        figures=(sync.Figures(generation=1, requests=2, errors=1, latency_ms=(1.5,)),), notes=("n",),
    ),
    "ReportReply": sync.ReportReply(hub_ns=1, notes=("n",)),
    "Lease": sync.Lease(instance="i", budget="b", period="2026-11", number=1, spent="2", want="3"),
    "LeaseReply": sync.LeaseReply(budget="b", period="2026-11", number=1, granted="2", term_s=3.0, left="4"),
}  # fmt: skip
RECORDED: dict[str, str] = json.loads(FILE.read_text()) if FILE.exists() else {}


def kind(name: str) -> Any:
    return getattr(sync, name)


@pytest.mark.parametrize("name", SAMPLES)
def test_a_recorded_message_means_what_it_meant(name: str) -> None:
    assert sync.decode(bytes.fromhex(RECORDED[name]), kind(name)) == SAMPLES[name]


def test_every_message_is_recorded() -> None:
    """Those that travel by themselves; parts of others are in them."""
    parts = {"Message", "Announcement", "Event", "DeploymentState", "Figures"}
    messages = {
        name
        for name, value in vars(sync).items()
        if isinstance(value, type) and issubclass(value, sync.Message) and name not in parts
    }
    assert messages == SAMPLES.keys() == RECORDED.keys()


@pytest.mark.parametrize("name", SAMPLES)
def test_a_field_of_a_later_release_is_ignored(name: str) -> None:
    fields = msgspec.msgpack.decode(sync.encode(SAMPLES[name]))
    later = msgspec.msgpack.encode({**fields, "of_a_later_release": {"deep": [1, 2]}})
    assert sync.decode(later, kind(name)) == SAMPLES[name]


@pytest.mark.parametrize("raw", [b"", b"\xc1", b"\x80", b"[]", b"\x81\xa1\xff\x01"])
def test_what_is_no_message_is_refused_with_its_name(raw: bytes) -> None:
    with pytest.raises(InvalidRequest, match="expected a range of version 1"):
        sync.decode(raw, sync.Range)
