"""The tour's step on similar questions: one is answered from the cache, one that says the contrary is not."""

from __future__ import annotations

from typing import Final, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ondol.cli.asking import Answer, Asker

ROUTE: Final = "faq"
_VERBS: Final = (
    "return",
    "order",
    "repair",
    "wrap",
    "insure",
    "weigh",
    "collect",
    "replace",
    "clean",
    "label",
)
_THINGS: Final = (
    "shoes", "a coat", "a lamp", "a chair", "a kettle", "a mirror", "a carpet", "a pillow", "a phone", "a bicycle",
    "a suitcase", "a table",
)  # fmt: skip
_FIRST: Final = "In one sentence, how do I cancel my order?"
_ALIKE: Final = (
    "In one sentence, how can I cancel my order?",
    "In one sentence, how could I cancel my order?",
)
_CONTRARY: Final = "In one sentence, how do I not cancel my order?"


def labelled() -> list[dict[str, str | bool]]:
    """Pairs of questions of a shop, and whether one answer fits both: what the route starts to learn from."""
    pairs: list[dict[str, str | bool]] = []
    for at, verb in enumerate(_VERBS):
        for thing in _THINGS:
            pairs.append(
                {"cached": f"How do I {verb} {thing}?", "asked": f"How can I {verb} {thing}?", "same": True}
            )
        other = _VERBS[at - 1]
        pairs += [
            {"cached": f"How do I {verb} {thing}?", "asked": f"How do I {other} {thing}?", "same": False}
            for thing in _THINGS[::4]
        ]
    return pairs


async def similar(screen: Console, asker: Asker, admin: Asker, lang: Literal["en", "ko"]) -> list[Answer]:
    """Teach the route, then ask; the answers.

    Raises:
        CommandFailed: something was not answered.
    """
    await admin.post(f"/v1/ondol/semantic/{ROUTE}", {"pairs": labelled()})
    answers = [await _ask(asker, _FIRST)]
    # A hundredth of the hits goes to the model as well, as a check; then the next wording shows the hit.
    asked = _ALIKE[0]
    alike = await _ask(asker, asked)
    if alike.ondol.get("cache") != "semantic":
        asked = _ALIKE[1]
        alike = await _ask(asker, asked)
    answers += [alike, await _ask(asker, _CONTRARY)]
    for question, answer in zip((_FIRST, asked, _CONTRARY), answers, strict=True):
        screen.print(_line(question, answer, lang))
    return answers


async def _ask(asker: Asker, question: str) -> Answer:
    return await asker.ask(
        question,
        model=ROUTE,
        headers={},
        options={"temperature": 0, "max_completion_tokens": 128},
        stream=True,
        on_text=lambda _: None,
    )


def _line(question: str, answer: Answer, lang: Literal["en", "ko"]) -> Table:
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(width=2)
    grid.add_column(overflow="fold")
    cache, took_ms = str(answer.ondol.get("cache", "off")), answer.total_s * 1000
    grid.add_row("", Text(f"› {question}", style="cyan"))
    grid.add_row("", Text(f"  {cache}, {took_ms:.0f} ms. {answer.reason(lang)}"))
    return grid
