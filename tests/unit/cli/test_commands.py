"""Exit codes and messages of the commands, and the pure parts of them."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
import yaml

from ondol import config
from ondol.adapters.artifacts import StoredModel
from ondol.cli import main
from ondol.cli.costs import since_time
from ondol.cli.first_run import Ports, find_starter_wheel, site_file
from ondol.cli.installation import CommandFailed
from ondol.cli.keys import state
from ondol.cli.models import default_name, edited, guess_quality
from ondol.wire.gguf import GgufHeader

PORTS = Ports(edge=8080, cloud=8081, line=8082, hub=8083, hub_line=8084)
DIGEST = "sha256:" + "0" * 64


@pytest.fixture
def edge(tmp_path: Path) -> Path:
    """The edge's file as the first run writes it."""
    (tmp_path / "edge").mkdir()
    path = tmp_path / "edge" / "site.yaml"
    path.write_text(site_file("edge", PORTS, model="../models/x.gguf", digest=DIGEST))
    return path


def code_of(*words: str) -> int:
    try:
        return main(words)
    except SystemExit as stopped:
        assert isinstance(stopped.code, int)
        return stopped.code


@pytest.mark.parametrize(
    "words",
    [("nope",), ("chat",), ("up", "--port", "70000"), ("chat", "hi", "--objective", "x"), ("costs", "--by", "foo"),
     ("costs", "--since", "yesterday"), ("keys", "create"), ("run", "site")],
)  # fmt: skip
def test_wrong_words_exit_with_2_and_say_so_on_stderr(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert code_of(*words) == 2

    shown = capsys.readouterr()
    assert shown.out == ""
    assert "Error" in shown.err


@pytest.mark.parametrize(
    "words",
    [("chat", "hi"), ("keys", "list"), ("keys", "create", "x"), ("costs",), ("ledger", "verify"), ("models", "add", "x.gguf")],
)  # fmt: skip
def test_without_an_installation_a_command_exits_with_1_and_one_line(
    words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code_of(*words, "--dir", str(tmp_path)) == 1

    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("ondol: ")
    assert "ondol up" in shown.err
    assert shown.err.count("\n") == 1


def test_a_good_file_is_good_and_a_bad_one_names_its_line(
    edge: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code_of("config", "check", str(edge)) == 0
    assert "serves assistant, embedding" in capsys.readouterr().out

    edge.write_text(edge.read_text().replace("engine: llamacpp", "engine: lamacpp"))

    assert code_of("config", "check", str(edge)) == 1
    assert f"{edge}:" in capsys.readouterr().err


def test_help_loads_no_engine_and_no_client() -> None:
    program = (
        "import sys, ondol.cli\n"
        "heavy = {'pyreqwest', 'xllamacpp', 'granian', 'apsw', 'openai', 'numpy'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", ["edge", "cloud"])
def test_the_files_of_the_first_run_are_good(name: str, tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(site_file(name, PORTS, model="../models/x.gguf", digest=DIGEST))

    catalog = config.load(path)

    assert "assistant" in catalog.routes
    assert catalog.sites["cloud-oregon"].simulated is not None
    assert all(price.source and price.date for price in catalog.prices.values())
    assert all(one.price is not None for one in catalog.deployments.values())
    assert set(catalog.grids) == {site.grid_zone for site in catalog.sites.values()}


def test_a_missing_starter_wheel_says_make_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONDOL_STARTER_WHEEL", str(tmp_path / "none.whl"))

    with pytest.raises(CommandFailed, match="there is no file"):
        find_starter_wheel()


def header(parameters: int) -> GgufHeader:
    return GgufHeader(
        version=3, architecture="qwen2", name=None, context_tokens=32768, embedding_length=896, parameters=parameters,
        tensors=1, quantisation="Q4_K", chat_template=None, licence="apache-2.0", languages=("ko", "en"), parts=1,
        data_offset=0,
    )  # fmt: skip


def test_an_added_model_makes_a_good_file_and_keeps_the_comments(edge: Path) -> None:
    before = edge.read_text()
    stored = StoredModel(name="better", digest=DIGEST, path=edge, size_bytes=1)

    text, routes = edited(
        before, name="better", route="assistant", site="edge-seoul", stored=stored, header=header(1_500_000_000),
        quality=None, file="../models/better.gguf", today="2026-11-24",
    )  # fmt: skip

    catalog = config.parse(text, base=edge.parent, name="site.yaml")
    assert routes == ("assistant", "better")
    assert catalog.routes["assistant"].deployments == ("helper-edge", "helper-cloud", "better")
    assert catalog.deployments["better"].price == "better-own"
    assert catalog.models["better"].context_tokens == 4096
    assert catalog.models["better"].quality is not None
    # A model of this size is taken for better than what the tour assumes of its cloud.
    assert catalog.models["better"].quality > (catalog.deployments["helper-cloud"].quality or 0)
    assert text.startswith(before.partition("  - helper-cloud\n")[0])
    assert [line for line in before.splitlines() if "#" in line] == [
        line for line in text.splitlines() if "#" in line
    ]


def test_a_second_model_of_the_same_size_is_refused_by_name_only(edge: Path) -> None:
    stored = StoredModel(name="helper", digest=DIGEST, path=edge, size_bytes=1)

    text, routes = edited(
        edge.read_text(), name="embedding", route="assistant", site="edge-seoul", stored=stored, header=header(10**9),
        quality=0.7, file="x.gguf", today="2026-11-24",
    )  # fmt: skip

    # `embedding` is a route already, so no second one of that name is written.
    assert routes == ("assistant",)
    assert [one["name"] for one in yaml.safe_load_all(text) if one["kind"] == "Route"] == [
        "assistant",
        "faq",
        "embedding",
    ]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("/models/Qwen2.5-1.5B Instruct (Q4_K_M).gguf", "qwen2.5-1.5b-instruct--q4_k_m"),
        ("https://host/path/Model.GGUF?download=true", "model"),
        ("plain", "plain"),
    ],
)
def test_a_name_is_made_from_the_file(source: str, name: str) -> None:
    assert default_name(source) == name


def test_a_file_without_a_usable_name_asks_for_one() -> None:
    with pytest.raises(CommandFailed, match="--name"):
        default_name("/models/모델.gguf")


def test_more_parameters_are_taken_for_more_quality_within_bounds() -> None:
    guesses = [guess_quality(count) for count in (0, 10**6, 135 * 10**6, 10**9, 10**11, 10**15)]

    assert guesses == sorted(guesses)
    assert guesses[2] == 0.3
    assert min(guesses) >= 0.05
    assert max(guesses) <= 0.95


def test_since_takes_days_in_the_zone_and_times_ago() -> None:
    now = datetime(2026, 11, 24, 12, 0, tzinfo=ZoneInfo("Asia/Seoul"))

    assert since_time("2026-11-24", now) == int(datetime(2026, 11, 23, 15, tzinfo=UTC).timestamp()) * 10**9
    assert since_time("12h", now) == int(datetime(2026, 11, 23, 15, tzinfo=UTC).timestamp()) * 10**9
    assert since_time("1w", now) == int(datetime(2026, 11, 17, 3, tzinfo=UTC).timestamp()) * 10**9


def test_a_key_works_until_it_is_revoked_or_expires() -> None:
    assert state({"revoked_ns": None, "expires_ns": None}, 10) == "works"
    assert state({"revoked_ns": 5, "expires_ns": 20}, 10) == "revoked"
    assert state({"revoked_ns": None, "expires_ns": 10}, 10) == "expired"


def test_the_first_admin_key_can_be_made_while_no_gateway_runs(
    edge: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code_of("keys", "create", "ops", "--kind", "admin", "--config", str(edge)) == 0
    made = capsys.readouterr()
    key_id = made.out.split("_")[1]

    assert code_of("keys", "list", "--config", str(edge), "--json") == 0
    listed = capsys.readouterr().out
    assert key_id in listed
    assert made.out.strip() not in listed

    assert code_of("keys", "revoke", key_id, "--config", str(edge)) == 0
    assert code_of("keys", "revoke", "nobody", "--config", str(edge)) == 1
