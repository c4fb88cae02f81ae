"""`ondol sites`: CSV files of sites, with every mistake at its line, and tokens that are never lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ondol.cli import fleet_sites
from ondol.cli.fleet_sites import BATCH, read_csv
from ondol.cli.hub_client import HubClient
from ondol.cli.installation import CommandFailed

GOOD = """name,region,country,grid_zone,tier,address,label:kind,label:floor
shop-1,kr-seoul,KR,KR,edge,https://shop-1.example,shop,2
"shop-2",kr-busan,KR,,,,,
"""


def written(folder: Path, text: str, encoding: str = "utf-8") -> Path:
    path = folder / "shops.csv"
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_file_is_read_with_its_defaults(tmp_path: Path, encoding: str) -> None:
    one, two = read_csv(written(tmp_path, GOOD, encoding))
    assert (one.name, one.address, one.labels) == (
        "shop-1", "https://shop-1.example", {"kind": "shop", "floor": "2"},
    )  # fmt: skip
    assert (two.name, two.tier, two.grid_zone, two.address, two.labels) == ("shop-2", "edge", "KR", None, {})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", r":1: the column name is missing"),
        ("region,country\nkr,KR\n", r":1: the column name is missing"),
        ("name,colour\nshop-1,red\n", r":1: unknown: 'colour'; allowed columns: name, region"),
        ("name,label:\nshop-1,x\n", r":1: unknown: 'label:'"),
        ("name,name\nshop-1,shop-2\n", r":1: twice: name"),
        ("name;region\nshop-1;kr\n", r":1: unknown: 'name;region'.*separated by commas"),
        ("name\n", "found 0 sites"),
        ("name,region\nshop-1\n", r":2: found fewer cells"),
        ("name\nshop-1,more\n", r":2: found more cells"),
        ("name\nshop-1\nBad Name\n", r":3: .*name"),
        ("name,country\nshop-1,Korea\n", r":2: .*country"),
        ("name,tier\nshop-1,moon\n", r":2: .*tier"),
        ("name\nshop-1\nshop-2\nshop-1\n", r":4: the name shop-1 stands in line 2 already"),
        ('name,label:note\nshop-1,"two\nlines"\nBad Name,x\n', r":4: .*name"),
        ('name\n"shop-1\n', "cannot be read as CSV"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(CommandFailed, match=said):
        read_csv(written(tmp_path, text))


def test_all_mistakes_are_said_at_once_up_to_twenty(tmp_path: Path) -> None:
    text = "name\n" + "".join(f"Bad {number}\n" for number in range(25))
    with pytest.raises(CommandFailed) as caught:
        read_csv(written(tmp_path, text))
    lines = caught.value.message.splitlines()
    assert len(lines) == 21 and lines[-1] == "… and 5 more"


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CommandFailed, match="cannot be read"):
        read_csv(written(tmp_path, "name\nläden\n", "latin-1"))
    with pytest.raises(CommandFailed, match="cannot be read"):
        read_csv(tmp_path / "nowhere.csv")


class HalfHub:
    """Answers so many batches, then says no."""

    def __init__(self, batches: int) -> None:
        self.left = batches

    def post(self, path: str, body: Any) -> Any:
        assert path == "invites"
        if not self.left:
            raise CommandFailed("the hub went away")
        self.left -= 1
        return {
            "data": [
                {"site": one["doc"]["name"], "token": "t-" + one["doc"]["name"]}
                for one in body["invitations"]
            ]
        }


def test_tokens_that_were_made_are_shown_also_when_a_later_batch_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(HubClient, "find", classmethod(lambda *_: HalfHub(1)))
    csv = written(tmp_path, "name\n" + "".join(f"shop-{number}\n" for number in range(BATCH + 5)))
    with pytest.raises(CommandFailed, match=f"first {BATCH} of {BATCH + 5} sites are invited.*went away"):
        fleet_sites.invite(csv_file=csv)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == BATCH and printed[0] == "shop-0\tt-shop-0"


def test_nothing_is_said_to_be_invited_when_the_first_batch_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(HubClient, "find", classmethod(lambda *_: HalfHub(0)))
    with pytest.raises(CommandFailed, match="^the hub went away"):
        fleet_sites.invite("shop-1")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({}, "whom"),
        ({"name": "shop-1", "csv_file": Path("x.csv")}, "names the sites itself"),
        ({"name": "", "csv_file": Path("x.csv"), "factory": 5}, "names the sites itself"),
        ({"name": "shops", "factory": 1}, "from 2 on"),
        ({"name": "shops", "factory": -1}, "from 2 on"),
        ({"name": "shop-1", "label": ("kind",)}, "NAME=VALUE"),
        ({"name": "No Name"}, "name"),
    ],
)
def test_wrong_words_are_refused_before_the_hub_is_asked(words: dict[str, Any], said: str) -> None:
    name = words.pop("name", "")
    with pytest.raises(CommandFailed, match=said):
        fleet_sites.invite(name, **words)
