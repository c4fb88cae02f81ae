"""`ondol chat`: ask, read the answer as it comes, and see where it ran and why."""

from __future__ import annotations

import asyncio
import sys
from typing import Annotated, Literal

from cyclopts import Parameter

from ondol.cli.asking import Answer, Asker
from ondol.cli.installation import DEFAULT_DIR, AsJson, Dir, Target, Url, target
from ondol.cli.output import console, duration, print_json, significant
from ondol.core.inference import DataClass, Objective


def chat(
    text: Annotated[str, Parameter(allow_leading_hyphen=True)],
    /,
    *,
    model: str = "assistant",
    objective: Annotated[Objective | None, Parameter(help="What you want most.")] = None,
    data_class: Annotated[DataClass | None, Parameter(name="--class", help="How sensitive it is.")] = None,
    max_tokens: int | None = None,
    temperature: float = 0.0,
    stream: bool = True,
    lang: Annotated[Literal["en", "ko"], Parameter(help="The language of the reason.")] = "en",
    directory: Dir = DEFAULT_DIR,
    url: Url = None,
    as_json: AsJson = False,
) -> int:
    """Ask a question, and see where it ran and why.

    Args:
        text: The question; `-` reads it from standard input.
        model: The route to ask.
        max_tokens: The longest answer, in tokens.
        temperature: 0 for the same answer every time, higher for more variety.
        stream: Print the answer as it comes.
    """
    headers: dict[str, str] = {}
    if objective is not None:
        headers["x-ondol-objective"] = objective.value
    if data_class is not None:
        headers["x-ondol-data-class"] = data_class.value
    options: dict[str, int | float] = {"temperature": temperature}
    if max_tokens is not None:
        options["max_completion_tokens"] = max_tokens
    question = sys.stdin.read() if text == "-" else text
    where = target(directory, url, admin=False)
    answer = asyncio.run(_ask(where, question, model, headers, options, stream=stream, quiet=as_json))
    if as_json:
        print_json(
            {
                "text": answer.text,
                "site": answer.site,
                "reason": answer.record.get("reason"),
                "ttft_s": answer.ttft_s,
                "total_s": answer.total_s,
                "input_tokens": answer.input_tokens,
                "output_tokens": answer.output_tokens,
                "ondol": answer.ondol,
            }
        )
        return 0
    screen = console()
    screen.print()
    screen.print(summary(answer, lang), style="dim", markup=False)
    return 0


async def _ask(
    where: Target,
    question: str,
    model: str,
    headers: dict[str, str],
    options: dict[str, int | float],
    *,
    stream: bool,
    quiet: bool,
) -> Answer:
    def show(text: str) -> None:
        if not quiet:
            sys.stdout.write(text)
            sys.stdout.flush()

    async with Asker(where) as asker:
        return await asker.ask(
            question, model=model, headers=headers, options=options, stream=stream, on_text=show
        )


def summary(answer: Answer, lang: str) -> str:
    """The line under an answer."""
    parts = [answer.site, str(answer.ondol.get("model", "?")), answer.reason(lang)]
    if answer.ttft_s is not None:
        parts.append(f"first token {duration(answer.ttft_s)}")
    parts.append(f"total {duration(answer.total_s)}")
    if answer.output_tokens is not None:
        parts.append(f"{answer.input_tokens} → {answer.output_tokens} tokens")
    parts.append(str(answer.ondol.get("cost", "unpriced")))
    parts.append(f"{significant(answer.ondol.get('energy_j'))} J")
    parts.append(f"{significant(answer.ondol.get('carbon_g'))} g CO2e")
    parts.append(f"cache {answer.ondol.get('cache', 'off')}")
    return " · ".join(parts)
