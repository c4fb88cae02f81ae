"""`ondol up` as a newcomer meets it: real processes, real engines, the official client."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from ondol.cli.first_run import find_starter_wheel
from ondol.cli.installation import CommandFailed

LIMIT_S = 60.0
"""Nothing here takes a tenth of it; a machine that does is broken."""


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


class Up:
    """One run of `ondol up`, and every process below it that was seen."""

    def __init__(self, directory: Path, port: int, *words: str) -> None:
        self.directory = directory
        self.output = directory.parent / f"up-{time.monotonic_ns()}.out"
        with self.output.open("xb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "ondol", "up", "--dir", str(directory), "--port", str(port), *words],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=os.environ | {"COLUMNS": "100"},
            )
        self.seen: set[int] = set()

    @property
    def said(self) -> str:
        return self.output.read_text("utf-8")

    def ready(self) -> dict[str, Any]:
        """The content of up.json, once it is there."""
        path = self.directory / "up.json"
        wait_until(lambda: path.exists() or self.process.poll() is not None, "up.json")
        assert path.exists(), self.said
        self.seen |= below(self.process.pid)
        found: dict[str, Any] = json.loads(path.read_bytes())
        return found

    def end(self, number: int) -> int:
        """Send a signal to `ondol up` alone; its exit code."""
        self.seen |= below(self.process.pid)
        self.process.send_signal(number)
        return self.process.wait(LIMIT_S)

    def left(self) -> set[int]:
        """Which of the processes seen are still alive."""
        return {pid for pid in self.seen if is_alive(pid)}


def below(pid: int) -> set[int]:
    """All descendants of a process."""
    found: set[int] = set()
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, path.read_text().split()):
                found |= {child} | below(child)
    return found


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_until(is_so: Any, what: str, limit_s: float = LIMIT_S) -> None:
    limit = time.monotonic() + limit_s
    while not is_so():
        assert time.monotonic() < limit, f"waited {limit_s:.0f} s for {what}"
        time.sleep(0.02)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "installation"


@contextlib.contextmanager
def started(directory: Path, port: int, *words: str) -> Iterator[Up]:
    up = Up(directory, port, *words)
    try:
        yield up
    finally:
        if up.process.poll() is None:
            up.seen |= below(up.process.pid)
            up.process.kill()
            up.process.wait()
        for pid in up.left():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def ask(found: dict[str, Any], question: str, **headers: str) -> Any:
    """The raw response of the official client, with what it parsed in `.parse()`."""
    with openai.OpenAI(
        base_url=f"{found['edge']['url']}/v1", api_key=found["api_key"], max_retries=0
    ) as client:
        return client.chat.completions.with_raw_response.create(
            model="assistant",
            messages=[{"role": "user", "content": question}],
            temperature=0,
            max_tokens=32,
            extra_headers={f"x-ondol-{name.replace('_', '-')}": value for name, value in headers.items()},
        )


def snippets(said: str) -> dict[str, list[str]]:
    """What the ending shows to paste, as commands."""
    python = said.partition("(pip install openai):\n")[2].partition("\n\nCtrl-C")[0]
    curl = said.partition("Ask with curl:\n")[2].partition("\n\n")[0]
    found = {"python": [sys.executable, "-c", python]}
    if shutil.which("curl") is not None:
        found["curl"] = ["sh", "-c", curl]
    return found


def change_record(ledger: Path, *, seq: int) -> None:
    """What somebody would do who wants a cost to be another: change a record behind our back."""
    with contextlib.closing(sqlite3.connect(ledger)) as database:
        for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            database.execute(f"DROP TRIGGER {name}")
        database.execute(
            "UPDATE usage SET payload = CAST(replace(CAST(payload AS TEXT), '\"cost\":', '\"cost\":1') AS BLOB) "
            "WHERE seq = ?",
            (seq,),
        )
        database.commit()


def run(directory: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ondol", *words, "--dir", str(directory)],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


def test_up_answers_and_sigterm_ends_everything(directory: Path, free_port: int, root: Path) -> None:
    with started(directory, free_port, "--no-tour") as up:
        found = up.ready()

        assert set(found) == {"edge", "cloud", "hub", "api_key", "admin_key"}
        assert found["edge"]["url"] == f"http://127.0.0.1:{free_port}"
        assert {found["edge"]["pid"], found["cloud"]["pid"]} <= up.seen
        assert (directory / "up.json").stat().st_mode & 0o777 == 0o600

        near = ask(found, "What is the capital of South Korea?")
        assert "Seoul" in near.parse().choices[0].message.content
        assert near.headers["x-ondol-site"] == "edge-seoul"

        far = ask(found, "How many days are in a week?", objective="best")
        assert far.headers["x-ondol-site"] == "cloud-oregon"

        with openai.OpenAI(base_url=f"{found['edge']['url']}/v1", api_key=found["api_key"]) as client:
            vectors = client.embeddings.create(
                model="embedding", input=["온돌은 따뜻하다"], encoding_format="float"
            )
        assert len(vectors.data[0].embedding) > 100

        example = subprocess.run(
            [sys.executable, str(root / "examples" / "ask.py")],
            env=os.environ | {"ONDOL_URL": f"{found['edge']['url']}/v1", "ONDOL_API_KEY": found["api_key"]},
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
        assert example.returncode == 0, example.stderr
        assert "confidential: edge-seoul" in example.stdout
        assert "best: cloud-oregon" in example.stdout

        start = time.monotonic()
        assert up.end(signal.SIGTERM) == 0
        # The promise is 10 s, and nothing is in flight.
        assert time.monotonic() - start < 10
        assert up.left() == set()
        assert not (directory / "up.json").exists()
        assert "stopped" in up.said


def test_kill_9_leaves_no_process_and_the_next_run_takes_over(directory: Path, free_port: int) -> None:
    with started(directory, free_port, "--no-tour") as up:
        first = up.ready()
        up.end(signal.SIGKILL)
        wait_until(lambda: not up.left(), "the sites and their engines to end by themselves")

    # The up.json of the killed run is still there, so wait for the new one.
    with started(directory, free_port, "--no-tour") as again:
        wait_until(lambda: "ready after" in again.said, "the second run")
        second = again.ready()

        assert (second["api_key"], second["admin_key"]) == (first["api_key"], first["admin_key"])
        assert second["edge"]["pid"] != first["edge"]["pid"]
        ask(second, "What is water made of?")
        assert again.end(signal.SIGINT) == 0
        assert again.left() == set()


def test_a_second_up_is_refused_politely(directory: Path, free_port: int, tmp_path: Path) -> None:
    with started(directory, free_port, "--no-tour") as up:
        up.ready()

        same = run(directory, "up", "--no-tour")
        other = run(tmp_path / "other", "up", "--no-tour", "--port", str(free_port))

        assert same.returncode == other.returncode == 1
        assert f"runs in {directory} already: the edge is at http://127.0.0.1:{free_port}" in same.stderr
        assert f"port {free_port} of 127.0.0.1 is taken" in other.stderr
        assert up.process.poll() is None


def test_a_site_that_dies_is_started_again(directory: Path, free_port: int) -> None:
    with started(directory, free_port, "--no-tour") as up:
        found = up.ready()
        os.kill(found["edge"]["pid"], signal.SIGKILL)

        path = directory / "up.json"
        wait_until(lambda: json.loads(path.read_bytes())["edge"]["pid"] != found["edge"]["pid"], "a new edge")

        def answers() -> bool:
            with contextlib.suppress(openai.APIError):
                return bool(ask(found, "What is water made of?").status_code == 200)
            return False

        wait_until(answers, "an answer of the new edge")
        assert up.said.count("ended by itself") == 1
        assert up.end(signal.SIGTERM) == 0
        assert up.left() == set()


@pytest.mark.timeout(300)
def test_the_tour_shows_its_steps_and_loses_nothing_when_it_cuts_the_hub_off(
    directory: Path, free_port: int
) -> None:
    with started(directory, free_port) as up:
        up.ready()
        wait_until(lambda: "Ctrl-C stops everything." in up.said, "the end of the tour", 200)
        said = up.said

        assert "The tour could not go on" not in said
        rows = re.findall(
            r"^([1-6])\s+(plain|again|confidential|best|cloud off|cloud back)\s+(\S+)\s.*\s(\w+)\s*$",
            said,
            re.MULTILINE,
        )
        assert rows == [
            ("1", "plain", "edge-seoul", "miss"),
            ("2", "again", "edge-seoul", "exact"),
            ("3", "confidential", "edge-seoul", "miss"),
            ("4", "best", "cloud-oregon", "miss"),
            ("5", "cloud off", "edge-seoul", "miss"),
            ("6", "cloud back", "cloud-oregon", "miss"),
        ]
        assert "Exactly the same: nothing was lost, and nothing was counted twice." in said
        counts = re.findall(
            r"^(answered by the edge|at the hub, while|at the hub, \d).*?\s(\d+)\s+\d+\s+\S+\s*$", said, re.M
        )
        assert [count for _, count in counts] == ["10", "0", "10"]
        plain = " ".join(said.split())
        assert re.search(r"semantic, \d+ ms\. A similar question was answered before", plain)
        assert "because the similar question that is cached has another negation" in plain
        assert "data of class confidential may not leave this site" in said
        assert "speaks no useful Korean" in said
        assert "models add FILE.gguf --route assistant" in said

        verified = run(directory, "ledger", "verify", "--json")
        assert verified.returncode == 0
        assert json.loads(verified.stdout)["ok"] is True
        costs = json.loads(run(directory, "costs", "--by", "site", "--json").stdout)
        counted = {row["key"]: row["requests"] for row in costs}
        # Of a hundred semantic hits one is a check, and then another wording is asked.
        assert counted["edge-seoul"] in (17, 18)
        assert counted["cloud-oregon"] == 2

        for name, program in snippets(said).items():
            pasted = subprocess.run(program, capture_output=True, text=True, timeout=LIMIT_S, check=False)
            assert (pasted.returncode, "Seoul" in pasted.stdout) == (0, True), (name, pasted.stderr)

        chat = run(directory, "chat", "--temperature", "0", "What is the capital of South Korea?")
        assert (chat.returncode, "Seoul" in chat.stdout) == (0, True), chat.stderr
        assert up.end(signal.SIGINT) == 0
        assert up.left() == set()

    change_record(directory / "edge" / "data" / "ledger.db", seq=3)
    broken = run(directory, "ledger", "verify")
    assert broken.returncode == 1
    assert "edge: record 3 of" in broken.stderr
    assert re.search(r"cloud: \d+ records hold", broken.stdout)


def test_a_model_is_added_while_it_runs(directory: Path, free_port: int) -> None:
    with started(directory, free_port, "--no-tour") as up:
        up.ready()
        file = next((directory / "models").glob("sha256-*.gguf"))

        added = run(directory, "models", "add", str(file), "--name", "second", "--json")

        assert added.returncode == 0, added.stderr
        assert json.loads(added.stdout)["state"] == "ready"
        chat = run(directory, "chat", "--model", "second", "--json", "What is the capital of South Korea?")
        assert chat.returncode == 0, chat.stderr
        assert json.loads(chat.stdout)["ondol"]["deployment"] == "second"
        assert (
            "kind: Route                  # what clients send"
            in (directory / "edge" / "site.yaml").read_text()
        )
        assert up.end(signal.SIGTERM) == 0
