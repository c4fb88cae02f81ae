"""Real hubs and real sites: joined, steered, cut off, restored, revoked."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

from tests.hubs import FLEET, fleet_of, join, member, running_hub, start_site, until, write_site
from tests.sites import Site


def _runs(site: Site, generation: int) -> bool:
    return bool(fleet_of(site)["generation"] == generation)


def _usage(hub: Any, site: str) -> tuple[int, int, str]:
    found = hub.client.get("usage")
    rows = [one for one in found["rows"] if one["key"] == site]
    records = sum(one["records"] for one in found["received"] if one["site"] == site)
    return (
        records,
        sum(one["input_tokens"] + one["output_tokens"] for one in rows),
        rows[0]["cost"] if rows else "0",
    )


def test_a_fleet_from_nothing_to_an_answer_and_back(tmp_path: Path) -> None:
    with running_hub(tmp_path / "hub") as hub, member(hub, tmp_path / "shop-1", "shop-1") as shop:
        assert shop.chat().status == 404  # nothing was applied: the site has no route
        first = hub.apply(tmp_path / "fleet", FLEET)
        assert first["generation"] == 1
        until(lambda: _runs(shop, 1), "the site runs generation 1")
        assert shop.chat("hello").status == 200
        second = hub.apply(tmp_path / "fleet", FLEET.replace("assistant", "helper-route"))
        assert [(one["kind"], one["change"]) for one in second["changes"]] == [
            ("Route", "added"),
            ("Route", "removed"),
        ] or second["changes"]
        until(lambda: _runs(shop, 2), "the site runs generation 2")
        assert shop.chat("hello").status == 404
        done = hub.ondol("rollback")
        assert "generation 3 has the documents of 1" in done.stdout
        until(lambda: _runs(shop, 3), "the site runs generation 3")
        assert shop.chat("hello").status == 200
        until(lambda: hub.site("shop-1")["state"] == "current", "the hub sees that it is current")
        assert "current" in hub.ondol("get").stdout


def test_a_wrong_fleet_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    with running_hub(tmp_path / "hub") as hub, member(hub, tmp_path / "shop-1", "shop-1") as shop:
        hub.apply(tmp_path / "fleet", FLEET)
        until(lambda: _runs(shop, 1), "the site runs generation 1")
        (tmp_path / "fleet" / "more.yaml").write_text("kind: Route\nname: other\ndeployments: [helper-fak]\n")
        done = hub.ondol("apply", "-f", str(tmp_path / "fleet"), "--yes", ok=False)
        assert done.returncode == 1
        assert "more.yaml:1: Route/other.deployments" in done.stderr
        assert "did you mean helper-fake?" in done.stderr
        (tmp_path / "fleet" / "more.yaml").write_text("kind: Route\nname: other\ndeployment: [helper-fake]\n")
        done = hub.ondol("diff", "-f", str(tmp_path / "fleet"), ok=False)
        assert "more.yaml:3" in done.stderr
        assert hub.client.get("status")["generation"] == 1
        assert shop.chat("hello").status == 200


def test_a_cut_off_site_serves_restarts_and_loses_nothing(tmp_path: Path) -> None:
    with running_hub(tmp_path / "hub") as hub, member(hub, tmp_path / "shop-1", "shop-1") as shop:
        hub.apply(tmp_path / "fleet", FLEET)
        until(lambda: _runs(shop, 1), "the site runs generation 1")
        hub.kill()
        seen = [shop.chat(f"question {number}") for number in range(20)]
        shop.process.send_signal(signal.SIGKILL)
        shop.process.wait()
        again = start_site(shop.folder, shop.port)
        try:
            seen += [again.chat(f"more {number}") for number in range(20)]
            assert {one.status for one in seen} == {200}
            status = fleet_of(again)
            assert status["state"] == "away"
            assert status["state_age_s"] > 0
            hub.restart()
            until(lambda: _usage(hub, "shop-1")[0] == 40, "the hub has all records")
            tokens = sum(one.json()["usage"]["total_tokens"] for one in seen)
            cost = sum(float(one.headers["x-ondol-cost"].partition(" ")[0]) for one in seen)
            records, counted, booked = _usage(hub, "shop-1")
            assert (records, counted) == (40, tokens)
            assert abs(float(booked) - cost) < 1e-12
        finally:
            again.stop()


def test_a_hub_restored_from_an_older_backup_is_filled_again(tmp_path: Path) -> None:
    with running_hub(tmp_path / "hub") as hub, member(hub, tmp_path / "shop-1", "shop-1") as shop:
        hub.apply(tmp_path / "fleet", FLEET)
        until(lambda: _runs(shop, 1), "the site runs generation 1")
        shop.chat("one")
        until(lambda: _usage(hub, "shop-1")[0] == 1, "the first record is there")
        hub.stop()
        shutil.copytree(tmp_path / "hub" / "data", tmp_path / "backup")
        hub.restart()
        for number in range(5):
            shop.chat(f"later {number}")
        hub.apply(tmp_path / "fleet", FLEET.replace("2.00", "3.00"))
        until(lambda: _usage(hub, "shop-1")[0] == 6 and _runs(shop, 2), "six records, generation 2")
        hub.stop()
        shutil.rmtree(tmp_path / "hub" / "data")
        shutil.copytree(tmp_path / "backup", tmp_path / "hub" / "data")
        hub.restart()
        until(lambda: _usage(hub, "shop-1")[0] == 6, "the restored hub has six records again")
        assert _runs(shop, 2)  # it keeps what it has
        assert shop.events("hub_went_back")
        until(lambda: hub.site("shop-1")["actual"] == 2, "the hub hears of generation 2")
        assert hub.apply(tmp_path / "fleet", FLEET.replace("2.00", "4.00"))["generation"] == 3
        until(lambda: _runs(shop, 3), "the site runs generation 3")


def test_a_revoked_site_is_out(tmp_path: Path) -> None:
    with running_hub(tmp_path / "hub") as hub, member(hub, tmp_path / "shop-1", "shop-1") as shop:
        until(lambda: fleet_of(shop)["state"] == "joined", "it joins")
        assert "is out" in hub.ondol("sites", "revoke", "shop-1").stdout
        until(lambda: fleet_of(shop)["state"] == "refused", "the hub refuses it")
        assert "revoked" in fleet_of(shop)["why"]
        assert hub.site("shop-1")["state"] == "revoked"


def test_the_second_machine_of_one_disk_image_is_fenced(tmp_path: Path) -> None:
    with running_hub(tmp_path / "hub") as hub, member(hub, tmp_path / "shop-1", "shop-1") as shop:
        hub.apply(tmp_path / "fleet", FLEET)
        until(lambda: _runs(shop, 1), "the site runs generation 1")
        shop.chat("before")
        until(lambda: _usage(hub, "shop-1")[0] == 1, "its record is there")
        twin_folder = tmp_path / "twin"
        shutil.copytree(shop.folder, twin_folder, ignore=shutil.ignore_patterns("lock"))
        port = write_site(twin_folder, "shop-1")
        twin = start_site(twin_folder, port)
        try:
            twin.chat("of the twin")
            until(lambda: fleet_of(twin)["state"] == "fenced", "the second machine is fenced", limit_s=60)
            assert "came second" in fleet_of(twin)["why"]
            shop.chat("after")
            until(lambda: _usage(hub, "shop-1")[0] == 2, "the first machine goes on")
            assert fleet_of(shop)["state"] == "joined"
        finally:
            twin.stop()


def test_joining_says_what_is_wrong(tmp_path: Path) -> None:
    with running_hub(tmp_path / "hub") as hub:
        folder = tmp_path / "shop-1"
        write_site(folder, "shop-1")
        token = hub.invite("shop-1")
        broken = join(folder, token[:40] + "x" + token[41:], ok=False)
        assert broken.returncode == 1
        assert "copy the whole line again" in broken.stderr
        assert "this is site shop-1 of fleet test-fleet" in join(folder, token).stdout
        assert "already" in join(folder, token, ok=False).stderr
        again = join(folder, token, "--again", ok=False)
        assert "was used" in again.stderr
        other = write_site(tmp_path / "other", "shop-1")
        assert other
        assert "was used" in join(tmp_path / "other", token, ok=False).stderr


def test_a_hub_that_is_another_is_told_no_secret(tmp_path: Path) -> None:
    with running_hub(tmp_path / "one") as one, running_hub(tmp_path / "two") as two:
        folder = tmp_path / "shop-1"
        write_site(folder, "shop-1")
        token = one.invite("shop-1")
        one.stop()
        two.stop()
        with running_hub(tmp_path / "two", port=one.port):
            done = join(folder, token, ok=False)
        assert "is not the hub that this invitation is from" in done.stderr
        assert "join" not in two.log.replace("joined", "")


def test_many_sites_are_invited_at_once(tmp_path: Path) -> None:
    with running_hub(tmp_path / "hub") as hub:
        csv = tmp_path / "shops.csv"
        csv.write_text(
            "name,region,country,label:kind\n" + "".join(f"shop-{n},kr-seoul,KR,shop\n" for n in range(250))
        )
        done = hub.ondol("sites", "invite", "--csv", str(csv))
        assert len(done.stdout.splitlines()) == 250
        assert len(hub.client.get("sites")["data"]) == 250
        csv.write_text("name,region\nBad Name,kr\nshop-1,kr\nshop-1,kr\n")
        wrong = hub.ondol("sites", "invite", "--csv", str(csv), ok=False)
        assert "shops.csv:2" in wrong.stderr
        assert "shops.csv:4: the name shop-1 stands in line 3 already" in wrong.stderr
        folder = tmp_path / "new-1"
        write_site(folder, "new-1")
        key = hub.ondol(
            "sites", "invite", "new-shops", "--factory", "3", "--label", "kind=shop"
        ).stdout.strip()
        assert "site new-1" in join(folder, key, "--site", "new-1").stdout
        assert hub.site("new-1")["labels"] == {"kind": "shop"}
