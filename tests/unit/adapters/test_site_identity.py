"""What a member of a fleet has on disk: its key, the hub's word on it, and what power cuts leave."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from ondol.adapters import site_identity
from ondol.adapters.hub_ca import HubAuthority
from ondol.adapters.site_identity import (
    AUDIENCES_MAX,
    DiskIdentity,
    Membership,
    become_member,
    is_member,
    key_to_join_with,
    read_membership,
)
from ondol.core import dsse
from ondol.core.trust import Credential, Epoch, authenticate_site, issue_credential
from ondol.errors import BadSignature, StateError
from ondol.units import NS_PER_S

HUB = bytes(range(32))
HUB_KEYS = {dsse.key_id(dsse.public_key(HUB)): dsse.public_key(HUB)}
NOW = 1_800_000_000 * NS_PER_S


def word(
    key: bytes, *, site: str = "shop-1", fleet: str = "shops", hub: bytes = HUB, issued: int = 0
) -> dsse.Envelope:
    return issue_credential(
        hub, Credential(fleet=fleet, site=site, key=key, issued_ns=NOW + issued, expires_ns=NOW + 10**15)
    )


def membership(private: bytes, address: str = "") -> Membership:
    return Membership(
        fleet="shops", site="shop-1", hub_urls=("https://hub:8443",), hub_keys=HUB_KEYS, ca_pem="-",
        credential=word(dsse.public_key(private)), address=address,
    )  # fmt: skip


def joined(data: Path, address: str = "") -> bytes:
    private = key_to_join_with(data)
    become_member(data, membership(private, address))
    return private


def test_a_member_has_its_files_for_itself_alone(tmp_path: Path) -> None:
    assert not is_member(tmp_path)
    joined(tmp_path)
    assert is_member(tmp_path)
    DiskIdentity(tmp_path, "g")
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {"site.key": 0o600, "fleet.json": 0o600, "boot": 0o600}


def test_the_private_key_is_in_no_other_file(tmp_path: Path) -> None:
    import base64

    private = joined(tmp_path)
    text = (tmp_path / "fleet.json").read_bytes()
    assert base64.b64encode(private) not in text and private not in text


def test_every_start_counts_and_has_a_name_of_its_own(tmp_path: Path) -> None:
    joined(tmp_path)
    starts = [DiskIdentity(tmp_path, "g") for _ in range(3)]
    assert [one.boot for one in starts] == [1, 2, 3]
    assert len({one.instance for one in starts}) == 3
    (tmp_path / "boot").write_bytes(b"\xff nonsense")
    assert DiskIdentity(tmp_path, "g").boot == 1


def test_its_header_is_good_for_its_audience_and_made_once_a_minute(tmp_path: Path) -> None:
    joined(tmp_path)
    mine = DiskIdentity(tmp_path, "g")
    header = mine.authorization("shop-2", NOW)
    assert authenticate_site(header, mine.trust(), audience="shop-2", now_ns=NOW).site == "shop-1"
    assert mine.authorization("shop-2", NOW + 59 * NS_PER_S) is header
    assert mine.authorization("hub", NOW) != header
    later = mine.authorization("shop-2", NOW + 60 * NS_PER_S)
    assert later != header
    # A clock that was set back: the one from the future would be refused.
    assert mine.authorization("shop-2", NOW) == header


def test_headers_that_are_kept_are_bounded(tmp_path: Path) -> None:
    joined(tmp_path)
    mine = DiskIdentity(tmp_path, "g")
    for number in range(AUDIENCES_MAX + 5):
        mine.authorization(f"shop-{number}", NOW)
    assert len(mine._headers) <= AUDIENCES_MAX


def test_a_new_credential_is_used_from_now_on_and_after_a_restart(tmp_path: Path) -> None:
    private = joined(tmp_path)
    mine = DiskIdentity(tmp_path, "g")
    header = mine.authorization("hub", NOW)
    new_hub = dsse.public_key(b"n" * 32)
    mine.keep_credential(word(dsse.public_key(private), issued=5), hub_keys={dsse.key_id(new_hub): new_hub})
    assert mine.credential_ns[0] == NOW + 5
    assert mine.authorization("hub", NOW) != header
    again = DiskIdentity(tmp_path, "g")
    assert again.credential_ns == mine.credential_ns
    assert set(again.trust().keys) == {*HUB_KEYS, dsse.key_id(new_hub)}


def test_a_credential_of_somebody_else_is_not_kept(tmp_path: Path) -> None:
    private = joined(tmp_path)
    mine = DiskIdentity(tmp_path, "g")
    key = dsse.public_key(private)
    before = (tmp_path / "fleet.json").read_bytes()
    for wrong in (
        word(key, site="shop-2"), word(dsse.public_key(b"x" * 32)), word(key, fleet="other"), word(key, hub=b"y" * 32),
    ):  # fmt: skip
        with pytest.raises(BadSignature):
            mine.keep_credential(wrong, hub_keys={})
    assert (tmp_path / "fleet.json").read_bytes() == before
    assert mine.credential_ns[0] == NOW


def test_it_judges_others_by_the_list_it_was_given(tmp_path: Path) -> None:
    joined(tmp_path)
    mine = DiskIdentity(tmp_path, "g")
    assert mine.trust().epoch is None
    epoch = Epoch(fleet="shops", number=4, issued_ns=NOW, stale_s=60)
    mine.take_epoch(epoch)
    assert mine.trust().epoch == epoch


def test_what_it_signs_is_by_its_key(tmp_path: Path) -> None:
    private = joined(tmp_path)
    signed = DiskIdentity(tmp_path, "g").sign("application/vnd.ondol.test.v1", b"x")
    public = dsse.public_key(private)
    assert dsse.verify(signed, "application/vnd.ondol.test.v1", {dsse.key_id(public): public}) == b"x"


@pytest.mark.parametrize("content", [b"", b"{", b'{"fleet":"x"}', b"\xff\xfe"])
def test_a_damaged_membership_says_what_to_do(tmp_path: Path, content: bytes) -> None:
    joined(tmp_path)
    (tmp_path / "fleet.json").write_bytes(content)
    with pytest.raises(StateError, match="Join again with a new invitation, or restore"):
        DiskIdentity(tmp_path, "g")
    with pytest.raises(StateError):
        read_membership(tmp_path / "nowhere")


@pytest.mark.parametrize("content", [None, b"", b"short", b"k" * 32])
def test_a_key_that_is_lost_or_another_is_not_made_up(tmp_path: Path, content: bytes | None) -> None:
    joined(tmp_path)
    key = tmp_path / "site.key"
    key.unlink()
    if content is not None:
        key.write_bytes(content)
    with pytest.raises(StateError, match=r"missing, or not the key.*--again"):
        DiskIdentity(tmp_path, "g")
    assert (key.read_bytes() if key.exists() else None) == content


def test_a_credential_that_is_not_by_the_hub_says_what_to_do(tmp_path: Path) -> None:
    private = joined(tmp_path)
    forged = msgspec.structs.replace(
        membership(private), credential=word(dsse.public_key(private), hub=b"z" * 32)
    )
    site_identity.write_membership(tmp_path, forged)
    with pytest.raises(StateError, match="join again"):
        DiskIdentity(tmp_path, "g")


def test_a_try_to_join_leaves_a_member_as_it_was(tmp_path: Path) -> None:
    private = joined(tmp_path)
    tried = key_to_join_with(tmp_path)
    assert tried != private, "a key that may have been revoked is not used again"
    assert key_to_join_with(tmp_path) == tried, "the hub may know it already: its answer was lost"
    assert DiskIdentity(tmp_path, "g").site == "shop-1"
    become_member(tmp_path, membership(tried))
    assert (tmp_path / "site.key").read_bytes() == tried
    assert not (tmp_path / "site.key.new").exists()
    DiskIdentity(tmp_path, "g")


def test_a_power_cut_in_the_middle_of_joining_is_mended_by_the_next_start(tmp_path: Path) -> None:
    joined(tmp_path)
    tried = key_to_join_with(tmp_path)
    # fleet.json is new, and the key was not renamed yet.
    site_identity.write_membership(tmp_path, membership(tried))
    mine = DiskIdentity(tmp_path, "g")
    assert (tmp_path / "site.key").read_bytes() == tried
    assert mine.credential_ns[0] == NOW
    DiskIdentity(tmp_path, "g")


def test_half_a_key_of_a_power_cut_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / "site.key.new").write_bytes(b"half")
    assert len(key_to_join_with(tmp_path)) == 32


def test_a_certificate_comes_with_the_key_of_its_request(tmp_path: Path) -> None:
    joined(tmp_path, "https://shop-1.example")
    mine = DiskIdentity(tmp_path, "g")
    (tmp_path / "hub").mkdir()
    ca = HubAuthority.open(tmp_path / "hub", "shops", ("hub.example",))
    certificate = ca.certify(mine.csr(), "shop-1", "https://shop-1.example")
    key = (tmp_path / "tls.key.new").read_bytes()
    private = dsse.public_key((tmp_path / "site.key").read_bytes())
    mine.keep_credential(word(private), hub_keys={}, certificate=certificate)
    assert (tmp_path / "tls.pem").read_bytes() == certificate
    assert (tmp_path / "tls.key").read_bytes() == key
    assert (tmp_path / "tls.key").stat().st_mode & 0o777 == 0o600
    assert not (tmp_path / "tls.key.new").exists()


def test_a_site_without_tls_asks_for_no_certificate(tmp_path: Path) -> None:
    joined(tmp_path, "http://127.0.0.1:8080")
    assert DiskIdentity(tmp_path, "g").csr() == b""
