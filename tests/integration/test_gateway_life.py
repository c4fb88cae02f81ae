"""The life of a site: reload without dropping, a stop in order, kill -9 at random, one process a folder."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.error
from pathlib import Path

import pytest
from tests.sites import FAKE, HEAD, Site, free_port, running_site, start

from ondol.adapters.ledger_reader import records, verify

SLOW = FAKE.replace(
    "engine: fake\nprice: list\n", "engine: fake\nprice: list\nfake: {token_ms: 20, output_tokens: 40}\n", 1
)


def _config(site: Site, text: str) -> None:
    """Replace the site's file at once, as an editor does."""
    fresh = site.folder / "site.yaml.new"
    fresh.write_text(
        (HEAD + text).replace("{site}", "store-1").replace("{port}", str(site.port)).replace("{gateway}", "")
    )
    fresh.rename(site.folder / "site.yaml")


def _wait_for(site: Site, event: str, count: int = 1) -> None:
    deadline = time.monotonic() + 15
    while len(site.events(event)) < count:
        assert time.monotonic() < deadline, site.log
        time.sleep(0.02)


def test_a_changed_file_is_taken_without_dropping_a_request(tmp_path: Path) -> None:
    with running_site(tmp_path, SLOW) as site:
        answers: list[int] = []
        stop = threading.Event()

        def ask() -> None:
            while not stop.is_set():
                answers.append(site.chat(stream=True).status)

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for number in range(3):
            _config(
                site,
                SLOW.replace("name: assistant", "name: assistant").replace(
                    "output_tokens: 40", f"output_tokens: {30 + number}"
                ),
            )
            site.process.send_signal(signal.SIGHUP)
            _wait_for(site, "reloaded", number + 1)
        stop.set()
        for thread in threads:
            thread.join()
        assert len(answers) >= 4 and set(answers) == {200}
        assert site.chat().json()["usage"]["completion_tokens"] == 32


def test_a_change_is_seen_without_a_signal(tmp_path: Path) -> None:
    with running_site(tmp_path) as site:
        assert site.chat(model="second").status == 404
        _config(site, FAKE + "\n---\nkind: Route\nname: second\ndeployments: [helper-fake]\n")
        _wait_for(site, "reloaded")
        assert site.chat(model="second").status == 200


def test_a_bad_file_keeps_the_old_one_and_says_so(tmp_path: Path) -> None:
    with running_site(tmp_path) as site:
        _config(site, FAKE.replace("deployments: [helper-fake]", "deployments: [helper-fak]"))
        _wait_for(site, "kept_old_configuration")
        why = site.events("kept_old_configuration")[0]["why"]
        assert "site.yaml:" in why and "helper-fak" in why and "helper-fake" in why
        assert site.chat().status == 200
        refused = site.call("POST", "/v1/ondol/reload", {})
        assert refused.status >= 400 and "helper-fak" in refused.json()["error"]["message"]


def test_a_stop_lets_requests_end_and_flushes_the_ledger(tmp_path: Path) -> None:
    with running_site(tmp_path, SLOW) as site:
        answers = []
        threads = [threading.Thread(target=lambda: answers.append(site.chat(stream=True))) for _ in range(8)]
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        assert site.stop() == 0
        for thread in threads:
            thread.join()
        assert [a.status for a in answers] == [200] * 8 and all(
            a.body.endswith(b"[DONE]\n\n") for a in answers
        )
        assert len(site.events("stopped")) == 1
    assert len(list(records(tmp_path / "data" / "ledger.db"))) == 8


def test_a_stream_that_outlasts_the_drain_ends_with_an_error_event(tmp_path: Path) -> None:
    endless = FAKE.replace(
        "engine: fake\nprice: list\n",
        "engine: fake\nprice: list\nfake: {token_ms: 100, output_tokens: 1000}\n",
        1,
    )
    with running_site(tmp_path, endless, gateway="drain_s: 1") as site:
        answers = []
        thread = threading.Thread(
            target=lambda: answers.append(site.chat(stream=True, max_completion_tokens=1000))
        )
        thread.start()
        time.sleep(0.5)
        assert site.stop(10) == 0
        thread.join()
        assert b'"error"' in answers[0].body and not answers[0].body.endswith(b"[DONE]\n\n")
    assert [one.outcome for one in records(tmp_path / "data" / "ledger.db")] == ["failed"]


def test_two_sites_cannot_share_a_folder(tmp_path: Path) -> None:
    with running_site(tmp_path) as site:
        other = tmp_path / "other.yaml"
        other.write_text((tmp_path / "site.yaml").read_text().replace(str(site.port), str(free_port())))
        second = subprocess.run(
            [sys.executable, "-m", "ondol", "run", "site", "--config", str(other)],
            capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
        assert second.returncode == 1 and str(site.process.pid) in second.stderr
        assert site.chat().status == 200


def test_a_port_in_use_is_said_in_one_line(tmp_path: Path) -> None:
    with running_site(tmp_path / "one") as site:
        (tmp_path / "two").mkdir()
        config = tmp_path / "two" / "site.yaml"
        config.write_text((tmp_path / "one" / "site.yaml").read_text())
        second = subprocess.run(
            [sys.executable, "-m", "ondol", "run", "site", "--config", str(config)],
            capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
        assert (
            second.returncode == 1
            and f"127.0.0.1:{site.port}" in second.stderr
            and "Traceback" not in second.stderr
        )


def _crash_once(folder: Path, rng: random.Random) -> None:
    """Load a site, kill it at a random moment, and compare what clients saw with the ledger."""
    site = start(folder, SLOW.replace("token_ms: 20, output_tokens: 40", "token_ms: 1, output_tokens: 5"))
    completed: list[str] = []
    lock = threading.Lock()

    def ask(number: int) -> None:
        while True:
            try:
                answer = site.chat(f"q{number}", stream=number % 2 == 0)
            except (OSError, urllib.error.URLError, ValueError):
                return
            except Exception as error:
                assert "Incomplete" in type(error).__name__ or "Disconnected" in type(error).__name__, error
                return
            if number % 2:
                json.loads(answer.body)
            elif not answer.body.endswith(b"[DONE]\n\n"):
                continue
            with lock:
                completed.append(answer.headers["x-ondol-request-id"])

    key = site.admin_key
    assert key
    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(rng.uniform(0.05, 0.6))
    os.kill(site.process.pid, signal.SIGKILL)
    site.process.wait()
    for thread in threads:
        thread.join()
    ledger = folder / "data" / "ledger.db"
    assert verify(ledger).broken_seq is None
    kept = [record.request_id for record in records(ledger)]
    assert len(kept) == len(set(kept))
    assert set(completed) <= set(kept), set(completed) - set(kept)


def test_kill_9_loses_and_doubles_nothing(tmp_path: Path) -> None:
    rng = random.Random(20)
    for _ in range(20):
        _crash_once(tmp_path, rng)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_kill_9_two_hundred_times(tmp_path: Path) -> None:
    rng = random.Random(200)
    for _ in range(200):
        _crash_once(tmp_path, rng)
