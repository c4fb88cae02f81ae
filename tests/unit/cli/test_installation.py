"""How a command finds its installation, and how files are replaced."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from ondol.cli.installation import (
    CommandFailed,
    Layout,
    Running,
    RunningSite,
    target,
    write_file,
)

RUNNING = Running(
    edge=RunningSite(url="http://127.0.0.1:8080", pid=2),
    cloud=RunningSite(url="http://127.0.0.1:8081", pid=3),
    hub=RunningSite(url="https://127.0.0.1:8083", pid=4),
    api_key="ondol_user",
    admin_key="ondol_admin",
)


def test_up_json_has_the_promised_form(tmp_path: Path) -> None:
    write_file(Layout(tmp_path).up_json, msgspec.json.encode(RUNNING), mode=0o600)

    read = msgspec.json.decode(Layout(tmp_path).up_json.read_bytes())

    assert set(read) == {"edge", "cloud", "hub", "api_key", "admin_key"}
    assert set(read["edge"]) == set(read["cloud"]) == set(read["hub"]) == {"url", "pid"}
    assert Layout(tmp_path).running() == RUNNING


def test_the_target_is_the_edge_with_the_key_that_the_command_needs(tmp_path: Path) -> None:
    write_file(Layout(tmp_path).up_json, msgspec.json.encode(RUNNING), mode=0o600)

    assert target(tmp_path, None, admin=False).key == "ondol_user"
    assert target(tmp_path, None, admin=True).key == "ondol_admin"
    assert target(tmp_path, None, admin=True).url == RUNNING.edge.url


def test_an_address_takes_its_key_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONDOL_API_KEY", "from outside")

    found = target(tmp_path, "https://shop.example/v1", admin=False)

    assert (found.url, found.key) == ("https://shop.example", "from outside")


def test_an_address_without_a_key_or_scheme_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ONDOL_ADMIN_KEY", raising=False)
    with pytest.raises(CommandFailed, match="ONDOL_ADMIN_KEY, which is not set"):
        target(tmp_path, "https://shop.example", admin=True)

    monkeypatch.setenv("ONDOL_ADMIN_KEY", "x")
    with pytest.raises(CommandFailed, match="expected an address such as"):
        target(tmp_path, "shop.example", admin=True)


def test_nothing_running_says_how_to_start_it(tmp_path: Path) -> None:
    with pytest.raises(CommandFailed, match="Start it with `ondol up`"):
        Layout(tmp_path).running()


def test_a_foreign_up_json_is_no_traceback(tmp_path: Path) -> None:
    Layout(tmp_path).up_json.write_text('{"edge": 1}')

    with pytest.raises(CommandFailed, match="not as `ondol up` writes it"):
        Layout(tmp_path).running()


def test_ledgers_are_those_that_exist(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    with pytest.raises(CommandFailed, match="no ledger found"):
        layout.ledgers()

    layout.data("cloud").mkdir(parents=True)
    (layout.data("cloud") / "ledger.db").touch()

    assert [name for name, _ in layout.ledgers()] == ["cloud"]


def test_a_replaced_file_keeps_its_mode_and_its_link(tmp_path: Path) -> None:
    real = tmp_path / "real.yaml"
    real.write_text("old")
    real.chmod(0o640)
    link = tmp_path / "link.yaml"
    link.symlink_to(real)

    write_file(link, b"new")

    assert link.is_symlink()
    assert real.read_text() == "new"
    assert real.stat().st_mode & 0o777 == 0o640
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.yaml", "real.yaml"]


def test_a_secret_file_is_private_from_its_first_byte(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"

    write_file(path, b"{}", mode=0o600)

    assert path.stat().st_mode & 0o777 == 0o600
