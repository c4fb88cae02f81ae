"""What the examples say is so."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from ondol import config
from ondol.core.inference import DataClass


def test_the_example_site_is_good_and_says_what_its_comments_say(root: Path) -> None:
    catalog = config.load(root / "examples" / "shop.yaml")

    assert catalog.routes["receipts"].data_class is DataClass.CONFIDENTIAL
    assert catalog.routes["receipts"].deployments == ("small-here",)
    assert catalog.budgets["checkout-a-day"].hard
    assert catalog.prices["vendor"].input > 0


def test_every_example_is_named_where_a_reader_looks(root: Path) -> None:
    pages = (root / "README.md", *(root / "docs" / "guide").glob("*.md"))
    read = "\n".join(page.read_text("utf-8") for page in pages)

    for path in (root / "examples").iterdir():
        if path.suffix in {".py", ".yaml"}:
            assert f"examples/{path.name}" in read


@pytest.mark.parametrize("name", ["ask.py"])
def test_the_example_programs_are_python(root: Path, name: str) -> None:
    ast.parse((root / "examples" / name).read_text("utf-8"))
