"""The tour of `ondol up`: where answers come from and why, and a cut line to the hub that loses nothing."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final, Literal

import msgspec
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ondol.cli.asking import Answer, Asker
from ondol.cli.installation import DEFAULT_DIR, Target
from ondol.cli.output import Paragraph, significant, table
from ondol.cli.tour_hub import HubSwitch, cut_off
from ondol.cli.tour_similar import similar

MODEL: Final = "assistant"
SIMULATED_SITE: Final = "cloud-oregon"
_MAX_TOKENS: Final = 128
_WIDE: Final = 100

# At temperature 0 the starter model answers these well; it gets much else wrong.
_SEOUL: Final = "What is the capital of South Korea?"
_PATIENT: Final = (
    "Summarize in one sentence: The patient slept well, has no fever, and may go home on Friday."
)
_SKY: Final = "Explain in two sentences why the sky is blue."
_PLANTS: Final = "Explain what photosynthesis is in one sentence."
_BOILING: Final = "What is the boiling point of water in Celsius?"


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """What the tour plays with: where it prints, whom it asks, the switches of cloud and hub."""

    screen: Console
    target: Target
    lang: Literal["en", "ko"]
    stop_cloud: Callable[[], Awaitable[None]]
    start_cloud: Callable[[], Awaitable[None]]
    hub: HubSwitch
    admin: Target


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One question of the tour.  `cloud` says what happens to the cloud site before it is asked."""

    name: str
    says: str
    question: str
    headers: dict[str, str] = {}
    cloud: Literal["stop", "start"] | None = None


STEPS: Final = (
    Step(name="plain", says="A plain question. The nearest site answers.", question=_SEOUL),
    Step(
        name="again",
        says="The same question again. The stored answer is used, and costs nothing.",
        question=_SEOUL,
    ),
    Step(
        name="confidential",
        says="A confidential one. It may not leave this site, whatever else is faster or better.",
        question=_PATIENT,
        headers={"x-ondol-data-class": "confidential"},
    ),
    Step(
        name="best",
        says="One that asks for the best answer. It goes to the (simulated) cloud.",
        question=_SKY,
        headers={"x-ondol-objective": "best"},
    ),
    Step(
        name="cloud off",
        says="The cloud site is stopped, and the best answer is asked for again. The edge answers.",
        question=_PLANTS,
        headers={"x-ondol-objective": "best"},
        cloud="stop",
    ),
    Step(
        name="cloud back",
        says="The cloud site is started again, and takes what it is best at.",
        question=_BOILING,
        headers={"x-ondol-objective": "best"},
        cloud="start",
    ),
)


async def take(stage: Stage) -> list[tuple[Step, Answer]]:
    """Ask everything, and print answers as they stream, then the table; what was answered.

    Raises:
        CommandFailed: a question was not answered, which says that something is broken.
    """
    screen = stage.screen
    screen.print()
    screen.print(
        "A tour in six questions, a cache and a cut line, on an edge site, a stand-in cloud and a hub.",
        style="bold",
    )
    screen.print(
        "The starter model (SmolLM2, 135M) is small and speaks no useful Korean; the cloud is simulated: "
        "the same weights, an assumed quality, 80 ms away.",
        style="dim",
    )
    answers = []
    async with Asker(stage.target) as asker:
        for number, step in enumerate(STEPS, 1):
            answers.append((step, await _ask(stage, asker, number, step)))
    screen.print()
    screen.print(results(answers, gap=2 if screen.width >= _WIDE else 1))
    screen.print()
    screen.print(Text("Why there", style="bold"))
    for number, (_, answer) in enumerate(answers, 1):
        screen.print(_indented(str(number), answer.reason(stage.lang)))
    screen.print()
    screen.print(
        f"{SIMULATED_SITE} is simulated: it runs here, on the same weights; its quality and its price are "
        "assumed, its distance is a delay.",
        style="dim",
    )
    screen.print()
    screen.print(
        _indented(
            str(len(STEPS) + 1),
            "Similar questions, on a route that promises at most 5 wrong answers in 100 from its cache.",
            style="bold",
        )
    )
    async with Asker(stage.target) as asker, Asker(stage.admin) as admin:
        await similar(screen, asker, admin, stage.lang)
    screen.print()
    screen.print(
        _indented(
            str(len(STEPS) + 2),
            "The edge is cut off its hub and answers ten more questions; then the line is joined again.",
            style="bold",
        )
    )
    async with Asker(stage.admin) as admin:
        await cut_off(screen, admin, stage.hub, MODEL)
    return answers


async def _ask(stage: Stage, asker: Asker, number: int, step: Step) -> Answer:
    screen = stage.screen
    screen.print()
    screen.print(_indented(str(number), step.says, style="bold"))
    if step.cloud == "stop":
        await stage.stop_cloud()
    elif step.cloud == "start":
        await stage.start_cloud()
    screen.print(_indented("›", step.question, style="cyan"))
    shown = Paragraph(screen, indent=3)
    answer = await asker.ask(
        step.question,
        model=MODEL,
        headers=step.headers,
        options={"temperature": 0, "max_completion_tokens": _MAX_TOKENS},
        stream=True,
        on_text=shown.write,
    )
    shown.end()
    return answer


def results(answers: list[tuple[Step, Answer]], *, gap: int) -> Table:
    """The figures of all steps; with a gap of 1 they fit into 80 columns."""
    made = table(
        [
            ("", True),
            ("question", False),
            ("answered by", False),
            ("first\nms", True),
            ("total\nms", True),
            ("tokens", True),
            ("cost", True),
            ("joules", True),
            ("g CO2e", True),
            ("cache", False),
        ],
        gap=gap,
    )
    for number, (step, answer) in enumerate(answers, 1):
        first = "–" if answer.ttft_s is None else f"{answer.ttft_s * 1000:.0f}"
        cost = str(answer.ondol.get("cost", "unpriced"))
        made.add_row(
            str(number),
            step.name,
            f"{answer.site}\nsimulated" if answer.site == SIMULATED_SITE else answer.site,
            first,
            f"{answer.total_s * 1000:.0f}",
            f"{_count(answer.input_tokens)}→{_count(answer.output_tokens)}",
            _short_cost(cost),
            significant(answer.ondol.get("energy_j"), 2),
            significant(answer.ondol.get("carbon_g"), 2),
            str(answer.ondol.get("cache", "off")),
        )
    return made


def _count(tokens: int | None) -> str:
    return "?" if tokens is None else str(tokens)


def _short_cost(cost: str) -> str:
    """`0.0000124 USD` as `$0.000012`, two digits of it: it must fit."""
    amount, _, currency = cost.partition(" ")
    return f"${significant(float(amount), 2)}" if currency == "USD" else cost


def _indented(mark: str, sentence: str, *, style: str = "") -> Table:
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(width=2)
    grid.add_column(overflow="fold")
    grid.add_row(Text(mark, style=style), Text(sentence, style=style))
    return grid


def ending(screen: Console, target: Target, root: Path) -> None:
    """What to do next: a better model, the address, the key, and two snippets that work when pasted.

    The snippets are printed without wrapping or borders, since they are copied with the mouse.
    """
    where = "" if root == DEFAULT_DIR else f" --dir {shlex.quote(str(root))}"
    screen.print()
    screen.print(Panel.fit(Text(f"address  {target.url}/v1\nAPI key  {target.key}"), title="Ondol is up"))
    blocks = (
        ("A better model, from a GGUF file:", better_model_line(where)),
        ("Ask from here:", f'{command()} chat{where} "How many days are in a week?"'),
        ("Ask with curl:", curl_snippet(target)),
        ("Ask with Python (pip install openai):", python_snippet(target)),
    )
    for heading, block in blocks:
        screen.print(Text(heading, style="bold"))
        screen.print(Text(block), soft_wrap=True)
        screen.print()
    screen.print("Ctrl-C stops everything.", style="bold")


def better_model_line(where: str) -> str:
    """The one line that adds a better model."""
    return f"{command()} models add FILE.gguf --route {MODEL}{where}"


def command() -> str:
    """How to call this program from the present folder."""
    if shutil.which("ondol") is not None:
        return "ondol"
    program = Path(sys.prefix) / "bin" / "ondol"
    if not program.exists():
        return f"{shlex.quote(sys.executable)} -m ondol"
    here = Path.cwd()
    return shlex.quote(str(program.relative_to(here) if program.is_relative_to(here) else program))


def curl_snippet(target: Target) -> str:
    """A shell command that asks a question."""
    return f"""curl {target.url}/v1/chat/completions \\
  -H "Authorization: Bearer {target.key}" \\
  -H "Content-Type: application/json" \\
  -d '{{"model": "{MODEL}", "temperature": 0, "messages": [{{"role": "user", "content": "{_SEOUL}"}}]}}'"""


def python_snippet(target: Target) -> str:
    """A Python program that asks a question with the official client."""
    return f"""from openai import OpenAI

client = OpenAI(base_url="{target.url}/v1", api_key="{target.key}")
reply = client.chat.completions.create(
    model="{MODEL}",
    temperature=0,
    messages=[{{"role": "user", "content": "{_SEOUL}"}}],
)
print(reply.choices[0].message.content)"""
