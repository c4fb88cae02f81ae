"""A disk that can lose power, fill up or die, as a VFS of SQLite under our real code.

The files are real (shared memory of a WAL needs that), and each has a second, durable image: what was synced.
A cut writes the durable images into another folder, with a random part of what was written since, because
disks reorder.  Used by the simulation; `test_disk.py` shows that it loses what was never synced.
"""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import NamedTuple

import apsw


class _Write(NamedTuple):
    at: int
    data: bytes | None
    """None is a truncation to `at`."""


class _Image:
    """One file: what would be there after a cut, and what was written since the last sync."""

    def __init__(self, content: bytes) -> None:
        self.durable = bytearray(content)
        self.pending: list[_Write] = []

    def sync(self) -> None:
        for change in self.pending:
            _apply(self.durable, change)
        self.pending.clear()

    def after_cut(self, luck: random.Random | None) -> bytes:
        content = bytearray(self.durable)
        for change in self.pending:
            if luck is not None and luck.random() < 0.5:
                _apply(content, change)
        return bytes(content)


def _apply(content: bytearray, change: _Write) -> None:
    if change.data is None:
        del content[change.at :]
        return
    content.extend(bytes(max(0, change.at + len(change.data) - len(content))))
    content[change.at : change.at + len(change.data)] = change.data


class FaultyDisk(apsw.VFS):
    """One machine's disk.  `name` is what `vfs=` takes; call `unregister()` when done.

    `room`: bytes that may still be written before SQLITE_FULL, None for no bound.  `dead`: every call fails, as
    for a process whose machine is gone.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.room: int | None = None
        self.dead = False
        self.syncs = 0
        self._images: dict[str, _Image] = {}
        self._lock = threading.Lock()
        super().__init__(name, "")

    def xOpen(self, name: apsw.URIFilename | str | None, flags: list[int]) -> apsw.VFSFile:  # noqa: N802
        self.check()
        path = name.filename() if isinstance(name, apsw.URIFilename) else str(name)
        with self._lock:
            if path not in self._images:
                found = Path(path)
                self._images[path] = _Image(found.read_bytes() if found.exists() else b"")
        return _File(self, name, flags, path)

    def xDelete(self, filename: str, syncdir: bool) -> None:  # noqa: N802
        self.check()
        super().xDelete(filename, syncdir)
        with self._lock:
            self._images.pop(filename, None)

    def check(self) -> None:
        """Fail as a disk that is gone does."""
        if self.dead:
            raise apsw.IOError("the simulated machine has no power")

    def take(self, size: int) -> None:
        """Fail as a disk that is full does."""
        if self.room is None:
            return
        if size > self.room:
            raise apsw.FullError("the simulated disk is full")
        self.room -= size

    def wrote(self, path: str, change: _Write) -> None:
        with self._lock:
            self._images[path].pending.append(change)

    def synced(self, path: str) -> None:
        self.syncs += 1
        with self._lock:
            self._images[path].sync()

    def bury(self) -> None:
        """After a cut: let connections close.  What they still write goes nowhere that counts."""
        self.dead = False
        self.room = None

    def cut(self, target: Path, luck: random.Random | None) -> None:
        """Take the power: write what is left of each file to `target`; from now on every call fails."""
        self.dead = True
        self.snapshot(target, luck)

    def snapshot(self, target: Path, luck: random.Random | None = None) -> None:
        """Write what a cut would leave now, without one."""
        target.mkdir(parents=True, exist_ok=True)
        with self._lock:
            for path, image in sorted(self._images.items()):
                if not path.endswith(("-shm", "-journal")):
                    (target / Path(path).name).write_bytes(image.after_cut(luck))


class _File(apsw.VFSFile):
    def __init__(
        self, disk: FaultyDisk, name: apsw.URIFilename | str | None, flags: list[int], path: str
    ) -> None:
        super().__init__("", name, flags)
        self._disk = disk
        self._path = path

    def xRead(self, amount: int, offset: int) -> bytes:  # noqa: N802
        self._disk.check()
        return super().xRead(amount, offset)

    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802
        self._disk.check()
        if offset + len(data) > self.xFileSize():
            self._disk.take(offset + len(data) - self.xFileSize())
        super().xWrite(data, offset)
        self._disk.wrote(self._path, _Write(offset, bytes(data)))

    def xTruncate(self, newsize: int) -> None:  # noqa: N802
        self._disk.check()
        super().xTruncate(newsize)
        self._disk.wrote(self._path, _Write(newsize, None))

    def xSync(self, flags: int) -> None:  # noqa: N802
        self._disk.check()
        # The real file needs no sync: its image is what a cut leaves.
        self._disk.synced(self._path)
