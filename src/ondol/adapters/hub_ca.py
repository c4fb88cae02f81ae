"""The hub's small certificate authority: its own TLS certificate, and those of sites.

ECDSA P-256 throughout, since every TLS library has it.  The CA's key lies in the hub's data directory, readable by
its user alone; a site pins the CA by the fingerprint in its invitation.
"""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
from collections.abc import Sequence
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ondol.adapters.durable import replace_file
from ondol.errors import Conflict, InvalidRequest, StateError

CA_DAYS: Final = 3650
CERT_DAYS: Final = 90
RENEW_DAYS: Final = 30
_CSR_MAX: Final = 8192


class HubAuthority:
    """The CA of one fleet, from the files `ca.key`, `ca.pem`, `tls.key` and `tls.pem` of a folder."""

    def __init__(
        self, folder: Path, fleet: str, key: ec.EllipticCurvePrivateKey, cert: x509.Certificate
    ) -> None:
        """Bind what `open` has read."""
        self._folder = folder
        self._hub_hosts: frozenset[str] = frozenset()
        self._fleet = fleet
        self._key = key
        self._cert = cert

    @classmethod
    def open(cls, folder: Path, fleet: str, names: Sequence[str]) -> HubAuthority:
        """Read the CA, or make it; issue the hub's own certificate anew when its names or its time say so.

        Raises:
            StateError: the files do not belong together, or cannot be read.
        """
        key_file, cert_file = folder / "ca.key", folder / "ca.pem"
        if not key_file.exists() and not cert_file.exists():
            key = ec.generate_private_key(ec.SECP256R1())
            cert = _ca_certificate(fleet, key)
            replace_file(key_file, _key_pem(key))
            replace_file(cert_file, cert.public_bytes(serialization.Encoding.PEM), mode=0o644)
        try:
            loaded = serialization.load_pem_private_key(key_file.read_bytes(), password=None)
            cert = x509.load_pem_x509_certificate(cert_file.read_bytes())
        except (OSError, ValueError) as error:
            raise StateError(
                f"{folder}: the CA cannot be read ({error}); restore ca.key and ca.pem from one copy. If no site has "
                "joined this hub yet, remove both: new ones are made at the next start"
            ) from error
        if not isinstance(loaded, ec.EllipticCurvePrivateKey) or loaded.public_key() != cert.public_key():
            raise StateError(f"{folder}: ca.key is not the key of ca.pem; restore both from one copy")
        made = cls(folder, fleet, loaded, cert)
        made._hub_hosts = frozenset([name.strip("[]").lower() for name in names])
        made._own_certificate(names)
        return made

    @property
    def ca_pem(self) -> bytes:
        """The CA's certificate."""
        return self._cert.public_bytes(serialization.Encoding.PEM)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the CA's certificate (DER), in hex: what invitations carry."""
        return fingerprint_of(self.ca_pem)

    @property
    def cert_path(self) -> Path:
        """The hub's own certificate, PEM."""
        return self._folder / "tls.pem"

    @property
    def key_path(self) -> Path:
        """Its key, PEM (PKCS#8)."""
        return self._folder / "tls.key"

    def certify(self, csr_pem: bytes, site: str, address: str) -> bytes:
        """A site's TLS certificate for the host of its address, good for 90 days, PEM.

        Of the request only the key is used: what a site asks to be called is not its choice.

        Raises:
            InvalidRequest: the request is broken, or the address has no host that a certificate can name.
            Conflict: the host is the hub's own.
        """
        host, names = _site_host(site, address)
        if host in self._hub_hosts and not _loopback(host):
            raise Conflict(
                f"certificate of {site}: {host} is the hub's own host; give the site's with --address"
            )
        if len(csr_pem) > _CSR_MAX:
            raise InvalidRequest(f"certificate of {site}: the request is longer than {_CSR_MAX} bytes")
        try:
            request = x509.load_pem_x509_csr(csr_pem)
        except ValueError as error:
            raise InvalidRequest(f"certificate of {site}: the request is no PEM CSR") from error
        key = request.public_key()
        if (
            not isinstance(key, ec.EllipticCurvePublicKey)
            or not isinstance(key.curve, ec.SECP256R1)
            or not request.is_signature_valid
        ):
            raise InvalidRequest(f"certificate of {site}: expected a request signed by its own P-256 key")
        identity = x509.UniformResourceIdentifier(f"spiffe://{self._fleet}/site/{site}")
        cert = self._issue(site, key, [*names, identity], client=True)
        return cert.public_bytes(serialization.Encoding.PEM)

    def _own_certificate(self, names: Sequence[str]) -> None:
        try:
            current = x509.load_pem_x509_certificate(self.cert_path.read_bytes())
            alternatives = current.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            left = current.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
            current.verify_directly_issued_by(self._cert)
            key = serialization.load_pem_private_key(self.key_path.read_bytes(), password=None)
            # The key and the certificate are two files: a power cut between them leaves a pair that does not match.
            ours = key.public_key() == current.public_key()
            if left.days >= RENEW_DAYS and list(alternatives) == _names(names) and ours:
                return
        except (OSError, ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound):
            # Whatever is wrong with it, a new one is right.
            self.cert_path.unlink(missing_ok=True)
        new = ec.generate_private_key(ec.SECP256R1())
        cert = self._issue("hub", new.public_key(), _names(names), client=False)
        replace_file(self.key_path, _key_pem(new))
        replace_file(self.cert_path, cert.public_bytes(serialization.Encoding.PEM), mode=0o644)

    def _issue(
        self, name: str, key: ec.EllipticCurvePublicKey, names: Sequence[x509.GeneralName], *, client: bool
    ) -> x509.Certificate:
        usages = [ExtendedKeyUsageOID.SERVER_AUTH] + ([ExtendedKeyUsageOID.CLIENT_AUTH] if client else [])
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])]))
            .issuer_name(self._cert.subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            # A site's clock may be behind: an hour of grace.
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=CERT_DAYS))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False
            )
            .sign(self._key, hashes.SHA256())
        )


def fingerprint_of(ca_pem: bytes) -> str:
    """SHA-256 of a certificate in DER, in hex.

    Raises:
        StateError: it is no certificate.
    """
    return hashlib.sha256(_read(ca_pem).public_bytes(serialization.Encoding.DER)).hexdigest()


def only_certificate(ca_pem: bytes) -> bytes:
    """The certificate whose fingerprint `fingerprint_of` gives, and nothing else that stands in the same text.

    Whoever hands on a text that he was sent would trust every certificate in it, and only the first was looked at.

    Raises:
        StateError: it is no certificate.
    """
    return _read(ca_pem).public_bytes(serialization.Encoding.PEM)


def first_second(ca_pem: bytes) -> float:
    """From when on a certificate is valid, in seconds since 1970.

    Raises:
        StateError: it is no certificate.
    """
    return _read(ca_pem).not_valid_before_utc.timestamp()


def _read(ca_pem: bytes) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(ca_pem)
    except ValueError as error:
        raise StateError("found no certificate (PEM)") from error


def new_csr() -> tuple[bytes, bytes]:
    """(key, request) for a site's TLS certificate, both PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "site")]))
        .sign(key, hashes.SHA256())
    )
    return _key_pem(key), request.public_bytes(serialization.Encoding.PEM)


def _ca_certificate(fleet: str, key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Ondol fleet {fleet}"[:64])])
    now = datetime.datetime.now(datetime.UTC)
    usage = x509.KeyUsage(
        digital_signature=False, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=CA_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


def _names(names: Sequence[str]) -> list[x509.GeneralName]:
    found: list[x509.GeneralName] = []
    for name in names:
        try:
            found.append(x509.IPAddress(ipaddress.ip_address(name.strip("[]"))))
        except ValueError:
            found.append(x509.DNSName(name))
    return found


def _site_host(site: str, address: str) -> tuple[str, list[x509.GeneralName]]:
    """The host of a site's address, and the names for its certificate."""
    try:
        host = urlsplit(address).hostname or ""
        names = _names([host])
    except ValueError:
        host = ""
    if not host or "*" in host:
        raise InvalidRequest(
            f"certificate of {site}: found the address {address[:64]!r}, expected one such as "
            "https://shop-7.example:8443"
        )
    return host, names


def _loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
