"""The pages of the documentation, and the commands on them.

A block of commands says in the line before it whether a test runs it:

- `<!-- run -->` in an empty folder (which has `.venv`, `examples` and nothing else).
- `<!-- run: up -->` in a folder whose `.ondol` is an installation that runs, beside a model `FILE.gguf`.
- `<!-- not run: the reason -->`

A block of language `sh` is one script.  In a `console` block every line that begins with `$ ` is a command
of its own, and the lines after it are output that must appear, in this order (… stands for any text).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "benchmarks/README.md"])
FENCE = re.compile(r"^( *)```([a-z]*)\n(.*?)^\1```", re.M | re.S)
MARK = re.compile(r"<!-- (run|run: up|not run: [^\n]+) -->\n\Z")
COMMAND = re.compile(
    r"(\$ |(\.venv/bin/)?(ondol|python|pip)|make|curl|git|scripts/\w+|sqlite3|docker|export)( .*)?"
)
LIMIT_S = 100


class Command(NamedTuple):
    """A command of a page, the line where it stands, and output that must appear."""

    line: int
    words: str
    output: list[str]


class Block(NamedTuple):
    """A fenced block: the line of its fence, its language, its text, and its mark (empty: none)."""

    line: int
    language: str
    body: str
    mark: str


def ids(path: Path) -> str:
    """A page's name in test ids."""
    return str(path.relative_to(ROOT))


def blocks(text: str) -> list[Block]:
    """All fenced blocks of a page."""
    found = []
    for block in FENCE.finditer(text):
        mark = MARK.search(text[: block.start()])
        line = text.count("\n", 0, block.start()) + 1
        found.append(Block(line, block[2], block[3], mark[1] if mark else ""))
    return found


def marked(text: str, mark: str) -> list[Command]:
    """The commands of all blocks of a page with this mark."""
    found: list[Command] = []
    for block in blocks(text):
        if block.mark != mark:
            continue
        if block.language == "sh":
            found.append(Command(block.line, block.body, []))
            continue
        for number, line in enumerate(block.body.splitlines(), block.line + 1):
            if line.startswith("$ "):
                found.append(Command(number, line[2:], []))
            elif found and line.strip() not in ("", "…"):
                found[-1].output.append(line.rstrip())
    return found


def unmarked(text: str) -> list[str]:
    """Lines of a page that look like commands, where nothing says whether they are run."""
    lines = [
        f"line {block.line + 1 + number}: {line}"
        for block in blocks(text)
        if not block.mark
        for number, line in enumerate(block.body.splitlines())
        if COMMAND.fullmatch(line.strip()) or block.language in ("sh", "console", "bash")
    ]
    rest = FENCE.sub(lambda block: "\n" * block[0].count("\n"), text)
    return lines + [
        f"line {number}: {line}"
        for number, line in enumerate(rest.splitlines(), 1)
        if line.startswith("    ") and COMMAND.fullmatch(line.strip())
    ]


def appears(output: list[str], said: str) -> bool:
    """Whether the lines appear in the text, in their order."""
    pattern = ".*".join("[^\n]*".join(map(re.escape, line.split("…"))) for line in output)
    return re.search(pattern, said, re.S) is not None


def furnish(folder: Path) -> None:
    """Put beside a reader's commands what a clone has."""
    (folder / ".venv").symlink_to(sys.prefix)
    shutil.copytree(ROOT / "examples", folder / "examples", ignore=shutil.ignore_patterns("*-data"))


def run_page(
    text: str, folder: Path, *, mark: str = "run", more: Mapping[str, str] | None = None
) -> list[str]:
    """Run the marked commands of a page; one line for each that did not do what the page says."""
    wrong = []
    here = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(folder),
        "LANG": "C.UTF-8",
        "COLUMNS": "200",
        **(more or {}),
    }
    for command in marked(text, mark):
        shell = ["bash", "-eu", "-o", "pipefail", "-c", command.words]
        done = subprocess.run(
            shell, check=False, cwd=folder, env=here, capture_output=True, text=True, timeout=LIMIT_S
        )
        said = done.stdout + done.stderr
        if done.returncode != 0 and "exit code" not in "".join(command.output):
            wrong.append(f"line {command.line}: exit code {done.returncode}: {said[-1500:]}")
        elif not appears([line for line in command.output if "exit code" not in line], said):
            wrong.append(f"line {command.line}: said {said[-1500:]!r}, which lacks {command.output}")
    return wrong
