"""What a power cut leaves of SQLite files: a VFS that writes down what the disk was asked, and the files rebuilt."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Literal, NamedTuple

import apsw


class Change(NamedTuple):
    """One thing that was asked of the disk."""

    file: str
    what: Literal["write", "truncate", "sync"]
    at: int = 0
    data: bytes = b""


class Disk(apsw.VFS):
    """The real disk, with a list of what it was asked."""

    def __init__(self, name: str) -> None:
        self.changes: list[Change] = []
        self.lock = threading.Lock()
        self.name = name
        super().__init__(name, "")

    def note(self, change: Change) -> None:
        with self.lock:
            self.changes.append(change)

    def xOpen(self, name: apsw.URIFilename | str | None, flags: list[int]) -> apsw.VFSFile:  # noqa: N802
        return _File(self, name, flags)


class _File(apsw.VFSFile):
    def __init__(self, disk: Disk, name: apsw.URIFilename | str | None, flags: list[int]) -> None:
        super().__init__("", name, flags)
        self.disk = disk
        self.file = name.filename() if isinstance(name, apsw.URIFilename) else str(name)

    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802
        self.disk.note(Change(self.file, "write", offset, bytes(data)))
        super().xWrite(data, offset)

    def xTruncate(self, newsize: int) -> None:  # noqa: N802
        self.disk.note(Change(self.file, "truncate", newsize))
        super().xTruncate(newsize)

    def xSync(self, flags: int) -> None:  # noqa: N802
        super().xSync(flags)
        self.disk.note(Change(self.file, "sync"))


def after_cut(changes: list[Change], target: Path, luck: random.Random | None) -> None:
    """Write to the folder what a cut after these changes leaves; `luck` keeps some unsynced ones."""
    synced = {change.file: index for index, change in enumerate(changes) if change.what == "sync"}
    files: dict[str, bytearray] = {}
    for index, change in enumerate(changes):
        if index > synced.get(change.file, -1) and (luck is None or luck.random() < 0.5):
            continue
        content = files.setdefault(change.file, bytearray())
        if change.what == "write":
            content.extend(bytes(max(0, change.at + len(change.data) - len(content))))
            content[change.at : change.at + len(change.data)] = change.data
        elif change.what == "truncate":
            del content[change.at :]
    for file, content in files.items():
        if not file.endswith("-journal"):
            (target / Path(file).name).write_bytes(content)
