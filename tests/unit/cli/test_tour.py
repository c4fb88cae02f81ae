"""What the tour prints: a table that fits, and snippets that are what they say."""

from __future__ import annotations

import ast
import io
import json
import shlex
from pathlib import Path

import pytest
from rich.console import Console

from ondol.cli.asking import Answer
from ondol.cli.chat import summary
from ondol.cli.installation import Target
from ondol.cli.tour import STEPS, curl_snippet, ending, python_snippet, results

TARGET = Target(url="http://127.0.0.1:8080", key="ondol_abc_def")


def answer(site: str, cache: str = "miss") -> Answer:
    return Answer(
        text="Seoul.",
        ttft_s=0.2345,
        total_s=2.3456,
        input_tokens=53,
        output_tokens=128,
        ondol={
            "site": site, "model": "helper", "cache": cache, "cost": "0.0000005471234 USD",
            "energy_j": 0.8712, "carbon_g": 0.00006149, "reason": "fastest",
        },
        record={"answered_by": site, "reason": {"code": "fastest", "en": "Because.", "ko": "왜냐하면."}},
    )  # fmt: skip


def printed(width: int, gap: int) -> list[str]:
    out = io.StringIO()
    sites = ["edge-seoul", "edge-seoul", "edge-seoul", "cloud-oregon", "edge-seoul", "cloud-oregon"]
    rows = [
        (step, answer(site, "exact" if step.name == "again" else "miss"))
        for step, site in zip(STEPS, sites, strict=True)
    ]
    Console(file=out, width=width, force_terminal=False).print(results(rows, gap=gap))
    return out.getvalue().splitlines()


@pytest.mark.parametrize(("width", "gap"), [(80, 1), (120, 2)])
def test_the_table_has_one_row_a_step_and_labels_what_is_simulated(width: int, gap: int) -> None:
    lines = printed(width, gap)

    assert max(map(len, lines)) <= width
    # A heading of two lines, six steps, and a second line under each answer of the simulated site.
    assert len(lines) == 2 + 6 + 2
    assert [line.strip() for line in lines if "simulated" in line] == ["simulated", "simulated"]
    assert "cloud-oregon" in lines[5]
    assert "$0.00000055" in lines[2]
    assert "53→128" in lines[2]
    assert lines[3].rstrip().endswith("exact")


def test_the_python_snippet_is_python_and_the_curl_body_is_json() -> None:
    ast.parse(python_snippet(TARGET))
    words = shlex.split(curl_snippet(TARGET).replace("\\\n", " "))

    assert words[:2] == ["curl", "http://127.0.0.1:8080/v1/chat/completions"]
    assert json.loads(words[words.index("-d") + 1])["model"] == "assistant"


def test_the_ending_names_the_address_the_key_and_the_one_line_for_a_better_model() -> None:
    out = io.StringIO()

    ending(Console(file=out, width=80, force_terminal=False), TARGET, Path("/srv/my site"))

    shown = out.getvalue()
    assert "http://127.0.0.1:8080/v1" in shown
    assert "ondol_abc_def" in shown
    assert "models add FILE.gguf --route assistant --dir '/srv/my site'" in shown
    assert curl_snippet(TARGET) in shown
    assert python_snippet(TARGET) in shown
    assert "Ctrl-C stops everything." in shown


def test_the_line_under_a_chat_answer_says_all_of_it() -> None:
    line = summary(answer("edge-seoul"), "ko")

    assert line == (
        "edge-seoul · helper · 왜냐하면. · first token 234 ms · total 2.35 s · 53 → 128 tokens · "
        "0.0000005471234 USD · 0.871 J · 0.0000615 g CO2e · cache miss"
    )
