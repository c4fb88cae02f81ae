"""What hub and sites answer for a model: whole, one range, or a reason."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ondol.wire.artifacts import parse_path, parse_range, serve_artifact, serve_manifest

DIGEST = "sha256:" + "ab" * 32
OTHER = "sha256:" + "cd" * 32


class Files:
    """One file with a manifest, one without."""

    def find(self, digest: str) -> tuple[str, int] | None:
        return ("/models/x", 100) if digest in (DIGEST, OTHER) else None

    def manifest(self, digest: str) -> bytes | None:
        return b"{}" if digest == DIGEST else None


def test_the_whole_file_and_a_range_of_it() -> None:
    whole = serve_artifact(Files(), DIGEST, None)
    assert (whole.status, whole.path, whole.offset, whole.length) == (200, "/models/x", 0, 100)
    part = serve_artifact(Files(), DIGEST, "bytes=10-19")
    assert (part.status, part.offset, part.length) == (206, 10, 10)
    assert dict(part.headers)["content-range"] == "bytes 10-19/100"
    assert dict(part.headers)["content-length"] == "10"
    assert serve_manifest(Files(), DIGEST).body == b"{}"


@pytest.mark.parametrize("header", ["bytes=100-", "bytes=5-4", "bytes=0-1,3-4", "bytes=", "bytes=-", "bytes=-0", "bytes=a-b", "bytes=٣-", "bytes=1-" + "9" * 40])  # fmt: skip
def test_a_range_that_cannot_be_served_is_said(header: str) -> None:
    served = serve_artifact(Files(), DIGEST, header)
    assert served.status == 416
    assert dict(served.headers)["content-range"] == "bytes */100"
    assert json.loads(served.body)["error"]["code"] == "range_not_satisfiable"


@pytest.mark.parametrize("digest", [OTHER, "sha256:" + "0" * 64, "../x", "", "sha256:" + "AB" * 32])
def test_what_is_not_a_models_of_the_fleet_is_not_there(digest: str) -> None:
    assert serve_artifact(Files(), digest, None).status == 404
    assert serve_manifest(Files(), digest).status == 404


@pytest.mark.parametrize(
    ("path", "found"),
    [
        (f"/v1/artifacts/{DIGEST}", (DIGEST, False)), (f"/v1/artifacts/{DIGEST}/data", (DIGEST, True)),
        (f"/v1/artifacts/{DIGEST}/", None), (f"/v1/artifacts/{DIGEST}/x", None), ("/v1/artifacts/x", None),
        (f"/v1/artifacts/../{DIGEST}", None), ("/v1/models", None),
    ],
)  # fmt: skip
def test_paths(path: str, found: tuple[str, bool] | None) -> None:
    assert parse_path(path) == found


def test_another_unit_means_the_whole() -> None:
    assert parse_range("items=0-1", 100) is None
    assert parse_range(None, 100) is None
    assert parse_range("bytes=-30", 100) == (70, 30)
    assert parse_range("bytes=-300", 100) == (0, 100)
    assert parse_range("BYTES = 90-", 100) == (90, 10)
    assert parse_range("bytes=90-1000", 100) == (90, 10)


@given(
    st.text(max_size=30) | st.from_regex(r"bytes=[0-9]{0,5}-[0-9]{0,5}", fullmatch=True),
    st.integers(1, 10**6),
)
def test_a_range_lies_within_the_file_whatever_is_asked(header: str, size: int) -> None:
    found = parse_range(header, size)
    if found is not None:
        offset, length = found
        assert offset >= 0
        assert length >= 0
        assert offset + length <= size
