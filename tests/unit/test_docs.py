"""What the documents say is so: links lead somewhere, YAML loads, commands work, tables are the code's.

`tests/pages.py` says how a page marks commands; those that need an installation are run by
`tests/integration/test_docs_run.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
from tests.pages import FENCE, PAGES, ROOT, appears, furnish, ids, marked, run_page, unmarked

from ondol.adapters.observe import Metrics
from ondol.cli import main
from ondol.config import KINDS, parse
from ondol.config.text import documents
from ondol.core.catalog import Limits
from ondol.errors import ConfigError, EngineRejected, OndolError, StateError
from ondol.gateway.hints import parse_hints
from ondol.gateway.reply import Closing
from ondol.gateway.scorers import WEIGHTS
from ondol.wire.openai_replies import NOT_SERVED
from ondol.wire.statuses import status_of

LINK = re.compile(r"(?<!!)\[[^\]\n]+\]\(([^)\s]+)\)")


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_marked_commands_do_what_the_page_says(page: Path, tmp_path: Path) -> None:
    furnish(tmp_path)
    assert run_page(page.read_text(encoding="utf-8"), tmp_path) == []


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_every_command_is_run_or_says_why_not(page: Path) -> None:
    assert unmarked(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_lead_to_files_that_exist(page: Path) -> None:
    targets = LINK.findall(page.read_text(encoding="utf-8"))
    local = [target.split("#")[0] for target in targets if "://" not in target and not target.startswith("#")]
    assert [target for target in local if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_documents_of_a_site_have_no_wrong_field(page: Path) -> None:
    """Blocks that show a part of a file may lack what they refer to, but no field may be wrong."""
    for _, language, body in FENCE.findall(page.read_text(encoding="utf-8")):
        kinds = [f"kind: {kind}" for kind in KINDS]
        if language != "yaml" or not body.startswith(tuple(kinds)) or not documents(body):
            continue
        try:
            parse(body, base=ROOT, name=page.name)
        except ConfigError as error:
            wrong = [line for line in error.message.splitlines() if "none is defined" not in line]
            # A part of a fleet's file names sites that are elsewhere.
            wrong = [line for line in wrong if ".parent: found" not in line and ".neighbours[" not in line]
            assert [line for line in wrong if "Site: missing" not in line] == []


def test_a_command_that_fails_or_says_something_else_is_found(tmp_path: Path) -> None:
    page = (
        "text\n\n<!-- run -->\n```console\n$ echo one two\none …\n$ false\n$ echo a\nb\n```\n"
        "<!-- run: up -->\n```console\n$ exit 9\n```\n"
        "<!-- run -->\n```sh\nx=1   # kept\nfalse\ntest $x = 1\n```\n"
    )
    assert [line.split(":")[0] for line in run_page(page, tmp_path)] == ["line 7", "line 8", "line 16"]
    assert [command.words for command in marked(page, "run: up")] == ["exit 9"]


def test_a_command_without_a_mark_is_found() -> None:
    page = "    ondol chat hello\n\n```\nmake up\n```\n```sh\necho a\n```\n<!-- not run: long -->\n```sh\nmake\n```\n"
    assert [line.split(":")[0] for line in unmarked(page)] == ["line 4", "line 7", "line 1"]


def test_output_appears_in_its_order() -> None:
    assert appears(["a…c", "d"], "x\nabc\ny\nd\n")
    assert not appears(["d", "abc"], "abc\nd\n")


# ---- tables against the code


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def rows(text: str, heading: str) -> list[list[str]]:
    """The rows of all tables below a heading, up to the next heading of its level, as cells."""
    part = text.split(f"\n{heading}\n", 1)[1]
    part = re.split(rf"^{'#' * heading.count('#')} ", part, maxsplit=1, flags=re.M)[0]
    lines = [line for line in part.splitlines() if line.startswith("|") and not line.startswith("|---")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def codes(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def documented_errors() -> dict[str, set[str]]:
    """Each code of the API page's tables, with the statuses beside it."""
    found: dict[str, set[str]] = {}
    for row in rows(page("docs/guide/api.md"), "## Errors"):
        for code in codes(row[1]):
            found.setdefault(code, set()).add(row[0])
    return found


def error_classes(top: type[OndolError]) -> Iterator[type[OndolError]]:
    yield top
    for kind in top.__subclasses__():
        if kind.__module__ == "ondol.errors":  # the command line has one of its own, which no reply carries
            yield from error_classes(kind)


def test_every_error_is_in_the_table_with_its_status() -> None:
    table = documented_errors()
    wrong = []
    for kind in error_classes(OndolError):
        is_family = "code" not in vars(kind)  # such as RequestError: never raised itself
        if is_family or issubclass(kind, (StateError, ConfigError)):
            continue
        status = "the engine's" if kind is EngineRejected else str(status_of(kind("")))
        if status not in table.get(kind.code, ()):
            wrong.append(f"{kind.code}: {status}, the page says {table.get(kind.code)}")
    assert wrong == []


def test_every_refusal_of_the_guard_is_in_the_table_and_no_code_is_made_up() -> None:
    text = (ROOT / "src/ondol/wire/guard.py").read_text(encoding="utf-8")
    refusals = set(re.findall(r'Refusal\(\s*(\d+),\s*"([a-z_]+)"', text))
    table = documented_errors()
    assert [pair for pair in sorted(refusals) if pair[0] not in table.get(pair[1], ())] == []
    real = {code for _, code in refusals} | {kind.code for kind in error_classes(OndolError)} | {"not_ready"}
    assert set(table) - real == set()


def test_codes_that_no_reply_carries_are_named() -> None:
    import_module("ondol.adapters.model_sources")  # has an error of its own
    text = page("docs/guide/api.md")
    hidden = {
        kind.code
        for kind in error_classes(OndolError)
        if issubclass(kind, (StateError, ConfigError)) and kind is not StateError
    }
    assert [code for code in sorted(hidden) if f"`{code}`" not in text] == []


def test_every_path_of_openai_that_is_not_served_is_named() -> None:
    part = page("docs/guide/api.md").split("## What is not served")[1]
    assert set(codes(part)) - {"/v1/", "not_served"} == set(NOT_SERVED)


def test_the_reply_headers_and_the_closing_field_are_those_of_the_code() -> None:
    source = (ROOT / "src/ondol/gateway/reply.py").read_text(encoding="utf-8")
    real = set(re.findall(r'"(x-ondol-[a-z-]+)"', source))
    table = {
        name for row in rows(page("docs/guide/api.md"), "## What a reply says") for name in codes(row[0])
    }
    assert {name for name in table if name.startswith("x-ondol-")} == real
    shown = re.search(r'\{"ondol": (\{.*?\})\}', page("docs/guide/api.md"), re.S)
    assert shown is not None
    assert list(json.loads(shown[1])) == list(Closing.__struct_fields__)


def test_the_hints_are_those_that_are_read() -> None:
    read: list[str] = []
    parse_hints(lambda name: read.append(name))
    real = set(read) - {"x-ondol-remaining-ms"}  # peers only
    table = {name for row in rows(page("docs/guide/api.md"), "## Hints") for name in codes(row[0])}
    assert table == real | {"idempotency-key"}


def test_the_metrics_are_those_of_the_code() -> None:
    source = (ROOT / "src/ondol/adapters/observe.py").read_text(encoding="utf-8")
    metrics = Metrics(dict, log_requests=False)
    real = {
        family.name + ("_total" if family.type == "counter" else ""): family.type
        for family in metrics.collect()
    }
    gauges = (ROOT / "src/ondol/gateway/upkeep.py").read_text(encoding="utf-8")
    real |= dict.fromkeys(re.findall(r'"(ondol_[a-z_]+)": \[', gauges), "gauge")
    table = {
        name: row[1] for row in rows(page("docs/guide/operating.md"), "## Metrics") for name in codes(row[0])
    }
    assert table == real
    labels = {
        label
        for row in rows(page("docs/guide/operating.md"), "## Metrics")
        for label in codes(row[2])
        if "_" in label
    }
    assert [label for label in sorted(labels) if f'"{label}"' not in source] == []


def test_the_weights_and_reasons_of_routing_are_those_of_the_code() -> None:
    text = page("docs/guide/routing.md")
    table = {codes(row[0])[0]: tuple(map(float, row[1:])) for row in rows(text, "## Score")[1:]}
    assert table == {str(objective): weights for objective, weights in WEIGHTS.items()}
    reasons = {code for row in rows(text, "## Reason") for code in codes(row[0])}
    explained = (ROOT / "src/ondol/gateway/explain.py").read_text(encoding="utf-8").split("_DROPPED_KO")[0]
    assert reasons == set(re.findall(r'^    "([a-z_]+)": \(', explained.split("_REASONS")[1], re.M))
    source = (ROOT / "src/ondol/gateway/schedule.py").read_text(encoding="utf-8")
    dropped = {code for row in rows(text, "## Drop") for code in codes(row[0])}
    assert dropped == set(re.findall(r'^    "([a-z_]+)": "', source.split("_WHY = {")[1], re.M))


def test_the_events_of_the_log_are_in_the_code() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    events = [name for row in rows(page("docs/guide/operating.md"), "## Logs")[1:] for name in codes(row[0])]
    real = set(re.findall(r'(?:LOG\.\w+|noted)\(\s*"([a-z_]+)"', source)) - {"request"}
    assert set(events) == real


COMMANDS = (
    "up", "run site", "chat", "keys create", "keys list", "keys revoke", "models list", "models add", "costs",
    "ledger verify", "config check", "run hub", "client-proxy", "join", "sites invite", "apply", "rollouts show", "models publish",
)  # fmt: skip


def test_the_options_of_the_command_line_are_those_of_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    real: set[str] = set()
    for command in COMMANDS:
        assert main([*command.split(), "--help"]) == 0
        said = capsys.readouterr().out
        assert "Usage" in said
        real |= set(re.findall(r"--[a-z]+(?:-[a-z]+)*", said))
    table = set(re.findall(r"--[a-z]+(?:-[a-z]+)*", page("docs/guide/command-line.md")))
    opposites = {"--tour", "--stream", "--no-insecure", "--empty-route"}
    assert table - {"--help"} == real - opposites


def test_the_bounds_of_the_guard_have_the_limits_names() -> None:
    table = rows(page("docs/guide/security.md"), "## The guard")[1:]
    names = [name for row in table for name in codes(row[1])]
    assert names
    assert [name for name in names if name not in Limits.__struct_fields__] == []


def test_every_module_is_on_the_map_and_nothing_else() -> None:
    listed = re.findall(r"^\| `([a-z0-9_/]+\.py)` \|", page("ARCHITECTURE.md"), re.M)
    source = ROOT / "src/ondol"
    real = {str(path.relative_to(source)) for path in source.rglob("*.py")}
    empty = {name for name in real if name.count("/") and name.endswith("__init__.py")}
    assert len(listed) == len(set(listed))
    assert set(listed) - real == set()
    assert real - empty - set(listed) == set()


@pytest.mark.parametrize("path", PAGES, ids=ids)
def test_files_named_in_a_page_exist(path: Path) -> None:
    whole = path.read_text(encoding="utf-8")
    text = FENCE.sub("", whole)
    named = [
        name
        for mark in re.findall("<!-- not run:.*", whole)
        for name in re.findall(r"[.\w]+/[\w./-]+\w", mark)
    ]
    named += re.findall(r"`((?:src|tests|docs|examples|scripts|benchmarks)/[\w./-]+)`", text)
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_page_of_the_guide_and_every_decision_is_in_the_index() -> None:
    index = page("docs/README.md")
    pages = [path for folder in ("guide", "adr") for path in (ROOT / "docs" / folder).glob("*.md")]
    assert [ids(path) for path in pages if f"({path.relative_to(ROOT / 'docs')})" not in index] == []
