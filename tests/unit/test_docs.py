"""What the documents say is so: links lead somewhere, YAML loads, and marked commands work.

A fenced block of commands is run when the line before it is `<!-- run -->`; every line that begins with
`$ ` is a command, and the lines after it are output that must appear, in this order (… stands for any
text).  All marked blocks of a page share one empty folder, with `.venv/bin` first in PATH.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from ondol.config import KINDS, parse
from ondol.config.text import documents
from ondol.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^( *)```([a-z]*)\n(.*?)^\1```", re.M | re.S)
LINK = re.compile(r"(?<!!)\[[^\]\n]+\]\(([^)\s]+)\)")
MARK = "<!-- run -->"


class Command(NamedTuple):
    """A command of a page, the line where it stands, and output that must appear."""

    line: int
    words: str
    output: list[str]


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


def marked(text: str) -> list[Command]:
    """The commands of all marked blocks of a page."""
    found: list[Command] = []
    for block in FENCE.finditer(text):
        if not text[: block.start()].rstrip("\n").endswith(MARK):
            continue
        first = text.count("\n", 0, block.start()) + 2
        for number, line in enumerate(block[3].splitlines(), first):
            if line.startswith("$ "):
                found.append(Command(number, line[2:], []))
            elif found and line.strip() not in ("", "…"):
                found[-1].output.append(line.rstrip())
    return found


def appears(output: list[str], said: str) -> bool:
    """Whether the lines appear in the text, in their order."""
    pattern = ".*".join("[^\n]*".join(map(re.escape, line.split("…"))) for line in output)
    return re.search(pattern, said, re.S) is not None


def run_page(text: str, folder: Path) -> list[str]:
    """Run the marked commands of a page; one line for each that did not do what the page says."""
    wrong = []
    here = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(folder),
        "LANG": "C.UTF-8",
    }
    for command in marked(text):
        shell = ["bash", "-c", command.words]
        done = subprocess.run(
            shell, check=False, cwd=folder, env=here, capture_output=True, text=True, timeout=100
        )
        said = done.stdout + done.stderr
        if done.returncode != 0 and "exit code" not in "".join(command.output):
            wrong.append(f"line {command.line}: exit code {done.returncode}: {said[-500:]}")
        elif not appears([line for line in command.output if "exit code" not in line], said):
            wrong.append(f"line {command.line}: said {said[-500:]!r}, which lacks {command.output}")
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_marked_commands_do_what_the_page_says(page: Path, tmp_path: Path) -> None:
    assert run_page(page.read_text(encoding="utf-8"), tmp_path) == []


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_lead_to_files_that_exist(page: Path) -> None:
    targets = LINK.findall(page.read_text(encoding="utf-8"))
    local = [target.split("#")[0] for target in targets if "://" not in target and not target.startswith("#")]
    assert [target for target in local if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_documents_of_a_site_have_no_wrong_field(page: Path) -> None:
    """Blocks that show a part of a file may lack what they refer to, but no field may be wrong."""
    for _, language, body in FENCE.findall(page.read_text(encoding="utf-8")):
        kinds = [f"kind: {kind}" for kind in KINDS]
        if language != "yaml" or not body.startswith(tuple(kinds)) or not documents(body):
            continue
        try:
            parse(body, base=ROOT, name=page.name)
        except ConfigError as error:
            wrong = [line for line in error.message.splitlines() if "none is defined" not in line]
            assert [line for line in wrong if "Site: missing" not in line] == []


def test_a_command_that_fails_or_says_something_else_is_found(tmp_path: Path) -> None:
    page = f"text\n\n{MARK}\n```console\n$ echo one two\none …\n$ false\n$ echo a\nb\n```\n```console\n$ exit 9\n```\n"
    assert [line.split(":")[0] for line in run_page(page, tmp_path)] == ["line 7", "line 8"]
    assert [command.words for command in marked(page)] == ["echo one two", "false", "echo a"]


def test_output_appears_in_its_order() -> None:
    assert appears(["a…c", "d"], "x\nabc\ny\nd\n")
    assert not appears(["d", "abc"], "abc\nd\n")
