"""Where the public data sets are, and how their files are read.  They are never in this repository."""

from __future__ import annotations

import csv
import gzip
import io
import os
import sys
from pathlib import Path
from typing import Final

VARIABLE: Final = "ONDOL_DATA"


def folder(given: Path | None, *needed: str) -> Path | None:
    """The data folder: what was given, else the environment's; None, with a note, where a set is not there."""
    named = given or (Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None)
    if named is None:
        skip(f"found no data folder; give --data DIR or set {VARIABLE}")
        return None
    missing = [name for name in needed if not (named / name).exists()]
    if missing:
        skip(f"{named} has no {', '.join(missing)}")
        return None
    return named


def skip(why: str) -> None:
    """Say that nothing was measured, and why."""
    print(f"SKIPPED: {why}", file=sys.stderr)


def rows(path: Path) -> list[dict[str, str]]:
    """The rows of a gzipped CSV file with a header."""
    csv.field_size_limit(10**9)
    with gzip.open(path) as file:
        return list(csv.DictReader(io.TextIOWrapper(file, encoding="utf-8", newline="")))
