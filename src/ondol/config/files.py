"""Reading configuration files from the disk, bounded."""

from __future__ import annotations

import stat
from pathlib import Path

from ondol.config.text import FILE_BYTES_MAX
from ondol.errors import ConfigError


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        ConfigError: it cannot be read, is no file, is too large, or is not UTF-8.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(f"{path}: not a file; allowed: a YAML file with the documents of a site")
        with path.open("rb") as file:
            raw = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    if len(raw) > FILE_BYTES_MAX:
        raise ConfigError(f"{path}: {status.st_size} bytes; allowed: at most {FILE_BYTES_MAX}")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: bytes that are not UTF-8; allowed: UTF-8 text") from error
