"""The commands of the documentation that need an installation, run beside a real one, as a reader would.

All pages share one installation, in the order of their names.  Where a page says `127.0.0.1:8080`, the
address of this run stands in for it; nothing else is changed.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.pages import PAGES, furnish, ids, marked, run_page

from ondol.cli.first_run import find_starter_wheel
from ondol.cli.installation import CommandFailed

LIMIT_S = 60.0
MARK = "run: up"
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}


def _missing_wheel() -> str | None:
    try:
        find_starter_wheel()
    except CommandFailed as error:
        return error.message
    return None


_REASON = _missing_wheel()
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(_REASON is not None, reason=_REASON or ""),
    pytest.mark.timeout(300),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A reader's folder, with an installation that runs in `.ondol`."""
    folder = tmp_path_factory.mktemp("reader")
    furnish(folder)
    output = folder / "up.out"
    with output.open("xb") as out:
        up = subprocess.Popen(
            [sys.executable, "-m", "ondol", "up", "--no-tour", "--port", "0"],
            cwd=folder, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
        )  # fmt: skip
    try:
        limit = time.monotonic() + LIMIT_S
        while not (folder / ".ondol/up.json").exists():
            assert up.poll() is None and time.monotonic() < limit, output.read_text("utf-8")
            time.sleep(0.05)
        model = next((folder / ".ondol/models").glob("sha256-*.gguf"))
        (folder / "FILE.gguf").symlink_to(model)
        yield folder
    finally:
        up.terminate()
        up.wait(LIMIT_S)


@pytest.mark.parametrize("page", [page for page in PAGES if marked(TEXTS[page], MARK)], ids=ids)
def test_commands_do_what_the_page_says(page: Path, folder: Path) -> None:
    text = TEXTS[page]
    if "curl " in text and shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    found = json.loads((folder / ".ondol/up.json").read_bytes())
    address = found["edge"]["url"].removeprefix("http://")
    keys = {"ONDOL_URL": f"http://{address}/v1", "ONDOL_API_KEY": found["api_key"]}
    assert run_page(text.replace("127.0.0.1:8080", address), folder, mark=MARK, more=keys) == []
