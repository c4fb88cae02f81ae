"""TLS in front of a site, and what happens without it on an address that others can reach."""

from __future__ import annotations

import ssl
import subprocess
import sys
import urllib.request
from pathlib import Path

import trustme
from tests.sites import FAKE, HEAD, free_port, start


def test_a_site_speaks_tls_1_3_with_its_own_certificate(tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1", "localhost")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    for pem in certificate.cert_chain_pems:
        pem.write_to_path(tmp_path / "cert.pem", append=True)
    trusted = ssl.create_default_context()
    authority.configure_trust(trusted)
    site = start(
        tmp_path, FAKE, gateway="tls: {cert: cert.pem, key: key.pem}", scheme="https", trusted=trusted
    )
    try:
        assert site.chat().status == 200
        with urllib.request.urlopen(f"{site.url}/healthz", context=trusted, timeout=10) as reply:
            assert reply.status == 200
    finally:
        site.stop()


def _run(config: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ondol", "run", "site", "--config", str(config), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


def test_an_open_address_without_tls_takes_an_explicit_word(tmp_path: Path) -> None:
    text = (HEAD + FAKE).replace("{site}", "store-1").replace("{gateway}", "hosts: [site.example]")
    config = tmp_path / "site.yaml"
    config.write_text(text.replace("127.0.0.1:{port}", f"0.0.0.0:{free_port()}"))
    refused = _run(config)
    assert refused.returncode == 1 and "listen" in refused.stderr and "tls" in refused.stderr
    assert "insecure" in refused.stderr and "Traceback" not in refused.stderr
    taken = subprocess.Popen(
        [sys.executable, "-m", "ondol", "run", "site", "--config", str(config), "--insecure"],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert taken.stderr is not None
        assert any('"event":"serving"' in line for line in taken.stderr)
    finally:
        taken.terminate()
        taken.wait(20)
        taken.stderr.close() if taken.stderr is not None else None
