"""Figures and paragraphs as people read them."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from ondol.cli.output import Paragraph, duration, significant


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"),
        (0.0, "0"),
        (0.0000611, "0.000061"),
        (4.345, "4.3"),
        (77.0, "77"),
        (1234567.0, "1200000"),
        (0.1, "0.1"),
    ],
)
def test_significant_never_uses_powers_of_ten(value: float | None, shown: str) -> None:
    assert significant(value, 2) == shown


def test_durations_change_unit_at_a_second() -> None:
    assert (duration(0.0123), duration(1.5), duration(None)) == ("12 ms", "1.50 s", "–")


def paragraph(pieces: list[str], width: int) -> str:
    out = io.StringIO()
    shown = Paragraph(Console(file=out, width=width, force_terminal=False), indent=3)
    for piece in pieces:
        shown.write(piece)
    shown.end()
    return out.getvalue()


def test_a_streamed_paragraph_breaks_between_words_whatever_the_pieces() -> None:
    text = "The quick brown fox jumps over the lazy dog."

    whole = paragraph([text], 20)

    assert whole == "   The quick brown\n   fox jumps over\n   the lazy dog.\n"
    assert paragraph(list(text), 20) == whole


def test_lines_of_the_answer_stay_lines_and_wide_letters_count_twice() -> None:
    assert paragraph(["1. one\n2. ", "two"], 40) == "   1. one\n   2. two\n"
    assert paragraph(["온돌 온돌 온돌"], 15) == "   온돌 온돌\n   온돌\n"


def test_markup_in_an_answer_is_text() -> None:
    assert paragraph(["[bold]x[/bold] [link]"], 60) == "   [bold]x[/bold] [link]\n"
