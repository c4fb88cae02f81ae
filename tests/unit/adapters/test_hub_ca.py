"""The hub's small CA: what it signs, what it refuses, and what a power cut leaves."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ondol.adapters import hub_ca
from ondol.adapters.hub_ca import HubAuthority, fingerprint_of, new_csr, only_certificate
from ondol.errors import Conflict, InvalidRequest, StateError

NAMES = ("hub.example", "10.0.0.1", "127.0.0.1")


def opened(folder: Path, *names: str) -> HubAuthority:
    return HubAuthority.open(folder, "shops", names or NAMES)


def own(folder: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate((folder / "tls.pem").read_bytes())


def test_keys_are_for_their_owner_alone_and_certificates_for_all(tmp_path: Path) -> None:
    opened(tmp_path)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {"ca.key": 0o600, "ca.pem": 0o644, "tls.key": 0o600, "tls.pem": 0o644}


def test_the_ca_signs_certificates_of_servers_and_nothing_below(tmp_path: Path) -> None:
    ca = x509.load_pem_x509_certificate(opened(tmp_path).ca_pem)
    basic = ca.extensions.get_extension_for_class(x509.BasicConstraints)
    assert basic.critical and (basic.value.ca, basic.value.path_length) == (True, 0)
    mine = own(tmp_path)
    mine.verify_directly_issued_by(ca)
    names = mine.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["hub.example"]
    assert [str(one) for one in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.1", "127.0.0.1"]
    assert not mine.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_the_ca_stays_and_the_fingerprint_is_what_openssl_says(tmp_path: Path) -> None:
    first = opened(tmp_path)
    assert opened(tmp_path).ca_pem == first.ca_pem
    cert = x509.load_pem_x509_certificate(first.ca_pem)
    assert first.fingerprint == cert.fingerprint(hashes.SHA256()).hex()


def test_the_certificate_stays_until_its_names_or_its_time_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(tmp_path)
    first = own(tmp_path)
    opened(tmp_path)
    assert own(tmp_path) == first
    opened(tmp_path, "other.example")
    second = own(tmp_path)
    assert second != first
    monkeypatch.setattr(hub_ca, "RENEW_DAYS", 91)
    opened(tmp_path, "other.example")
    assert own(tmp_path).serial_number != second.serial_number


@pytest.mark.parametrize("file", ["tls.key", "tls.pem"])
@pytest.mark.parametrize("content", [b"", b"-----BEGIN NONSENSE-----\n", None])
def test_a_damaged_certificate_is_made_anew(tmp_path: Path, file: str, content: bytes | None) -> None:
    opened(tmp_path)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes(content)
    opened(tmp_path)
    key = serialization.load_pem_private_key((tmp_path / "tls.key").read_bytes(), password=None)
    assert key.public_key() == own(tmp_path).public_key()


def test_a_power_cut_between_key_and_certificate_is_mended(tmp_path: Path) -> None:
    opened(tmp_path)
    (tmp_path / "tls.key").write_bytes(new_csr()[0])
    opened(tmp_path)
    key = serialization.load_pem_private_key((tmp_path / "tls.key").read_bytes(), password=None)
    assert key.public_key() == own(tmp_path).public_key()


def test_a_ca_that_is_not_whole_is_never_replaced_by_itself(tmp_path: Path) -> None:
    first = opened(tmp_path)
    (tmp_path / "ca.key").unlink()
    with pytest.raises(StateError, match=r"restore ca\.key and ca\.pem"):
        opened(tmp_path)
    (tmp_path / "ca.key").write_bytes(new_csr()[0])
    with pytest.raises(StateError, match="is not the key of"):
        opened(tmp_path)
    (tmp_path / "ca.key").write_bytes(b"nonsense")
    with pytest.raises(StateError, match="cannot be read"):
        opened(tmp_path)
    assert (tmp_path / "ca.pem").read_bytes() == first.ca_pem


def certified(folder: Path, address: str, csr: bytes | None = None) -> x509.Certificate:
    made = opened(folder).certify(csr or new_csr()[1], "shop-7", address)
    return x509.load_pem_x509_certificate(made)


@pytest.mark.parametrize("host", ["shop-7.example", "192.168.7.7", "[fd00::7]"])
def test_a_site_gets_a_certificate_for_the_host_of_its_address(tmp_path: Path, host: str) -> None:
    cert = certified(tmp_path, f"https://{host}:8443")
    names = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    found = [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]
    assert found == [host.strip("[]")]
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["spiffe://shops/site/shop-7"]
    usages = cert.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert set(usages) == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
    left = cert.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    assert 89 <= left.days <= 90
    assert not cert.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_what_a_request_asks_for_beside_its_key_counts_for_nothing(tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    greedy = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "hub.example")]))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("hub.example")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )
    cert = certified(tmp_path, "https://shop-7.example", greedy)
    names = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["shop-7.example"]
    assert not cert.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert cert.subject.rfc4514_string() == "CN=shop-7"


def test_no_site_gets_a_certificate_for_the_hubs_host(tmp_path: Path) -> None:
    for address in ("https://hub.example", "https://HUB.example:9", "https://10.0.0.1:8443"):
        with pytest.raises(Conflict, match="hub's own host"):
            certified(tmp_path, address)
    certified(tmp_path, "https://127.0.0.1:9443")


@pytest.mark.parametrize(
    "address",
    ["", "shop-7.example", "https://", "https://*.example", "https://läden.example", "https://[::1"],
)
def test_an_address_without_a_host_gets_none(tmp_path: Path, address: str) -> None:
    with pytest.raises(InvalidRequest, match="found the address"):
        certified(tmp_path, address)


def test_a_request_must_be_one_and_signed_by_its_own_key(tmp_path: Path) -> None:
    good = x509.load_pem_x509_csr(new_csr()[1]).public_bytes(serialization.Encoding.DER)
    changed = bytearray(good)
    changed[-1] ^= 1
    broken = x509.load_der_x509_csr(bytes(changed)).public_bytes(serialization.Encoding.PEM)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "site")])
    other = x509.CertificateSigningRequestBuilder().subject_name(name)
    ed = other.sign(ed25519.Ed25519PrivateKey.generate(), None).public_bytes(serialization.Encoding.PEM)
    p384 = other.sign(ec.generate_private_key(ec.SECP384R1()), hashes.SHA256()).public_bytes(
        serialization.Encoding.PEM
    )
    for csr in (broken, ed, p384):
        with pytest.raises(InvalidRequest, match="P-256"):
            certified(tmp_path, "https://shop-7.example", csr)
    with pytest.raises(InvalidRequest, match="no PEM CSR"):
        certified(tmp_path, "https://shop-7.example", b"nonsense")
    with pytest.raises(InvalidRequest, match="longer than"):
        certified(tmp_path, "https://shop-7.example", b"x" * 10_000)


def test_only_the_certificate_that_was_looked_at_is_handed_on(tmp_path: Path) -> None:
    """A text with a second certificate has the fingerprint of the first; who loads the text trusts both."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    ours, theirs = opened(tmp_path / "a"), opened(tmp_path / "b")
    both = ours.ca_pem + theirs.ca_pem
    assert fingerprint_of(both) == ours.fingerprint
    assert only_certificate(both) == ours.ca_pem
    for text in (b"", b"nonsense"):
        with pytest.raises(StateError, match="no certificate"):
            fingerprint_of(text)


def test_an_address_in_small_brackets_is_one(tmp_path: Path) -> None:
    opened(tmp_path, "[::1]")
    names = own(tmp_path).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.IPAddress) == [ipaddress.ip_address("::1")]
