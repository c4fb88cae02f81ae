from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

import pytest

from ondol.config import fingerprint, load, parse
from ondol.config.describe import BEGIN, renew
from ondol.config.text import NODES_MAX
from ondol.core.catalog import Catalog, Grid, PriceDoc
from ondol.core.money import Price
from ondol.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent.parent

# Section 5 of the architecture gives this as the least that answers.
LEAST = """\
kind: Site
name: store-1
tier: edge                 # device | edge | pop | cloud
region: kr-seoul
country: KR
grid_zone: KR
---
kind: Model
name: helper
task: chat
---
kind: Deployment
name: helper-on-vllm
site: store-1
model: helper
engine: upstream           # llamacpp | onnx | upstream | peer | fake
url: http://127.0.0.1:8000/v1
---
kind: Route
name: assistant            # what clients send as "model"
deployments: [helper-on-vllm]
objective: fast
"""
CLOUD = """
---
kind: Site
name: cloud
tier: cloud
region: us-west
country: US
grid_zone: US
"""
GATEWAY = """
---
kind: Gateway
name: gateway
"""


def no_grids(zones: Collection[str]) -> dict[str, Grid]:
    return {}


def read(text: str, *, insecure: bool = False, base: Path = Path()) -> Catalog:
    return parse(text, base=base, name="site.yaml", insecure=insecure, grids=no_grids)


def problems(text: str, *, base: Path = Path()) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read(text, base=base)
    return caught.value.message.splitlines()


def test_the_least_example_loads() -> None:
    catalog = parse(LEAST, base=Path(), name="site.yaml")
    assert catalog.site.name == "store-1"
    assert catalog.gateway.listen == "127.0.0.1:8080"
    assert catalog.routes["assistant"].deployments == ("helper-on-vllm",)
    assert catalog.deployments["helper-on-vllm"].url == "http://127.0.0.1:8000/v1"
    assert list(catalog.tenants) == ["default"]
    assert catalog.grids["KR"].grams_per_kwh > 0
    assert len(catalog.digest) == 64


def test_the_digest_is_that_of_the_text() -> None:
    assert read(LEAST).digest == read(LEAST).digest != read(LEAST + "\n").digest


def test_all_problems_are_said_at_once_in_the_order_of_lines() -> None:
    text = LEAST.replace("tier: edge", "tier: egde").replace("task: chat", "task: 7").replace("fast", "fats")
    said = problems(text)
    assert [line.split(": ")[0] for line in said] == ["site.yaml:3", "site.yaml:10", "site.yaml:22"]
    assert said[0] == 'site.yaml:3: Site/store-1.tier: found "egde"; allowed: cloud | device | edge | pop'
    assert said[2].startswith('site.yaml:22: Route/assistant.objective: found "fats"; allowed: fast | cheap')


def test_more_than_twenty_problems_are_counted() -> None:
    said = problems(LEAST + "".join(f"---\nkind: Team\nname: T{n}\n" for n in range(25)))
    assert len(said) == 21
    assert said[-1] == "site.yaml: and 5 more; mend these first"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("region: kr-seoul", "regoin: kr-seoul", 'found the field "regoin"'),
        ("region: kr-seoul", "regoin: kr-seoul", "did you mean region?"),
        ("region: kr-seoul", "regoin: kr-seoul", "site.yaml:1: Site/store-1.region: missing"),
        ("kind: Model", "kind: Modell", "did you mean Model?"),
        ("kind: Model", "kind: Policy", "found Policy, which comes in a later version; allowed: Gateway, Site"),
        ("kind: Model\n", "", "site.yaml:8: kind: missing; allowed: Gateway, Site"),
        ("name: store-1", "name: Store 1", 'found "Store 1"; allowed: a name of small letters'),
        ("[helper-on-vllm]", "helper-on-vllm", 'found "helper-on-vllm"; allowed: a list (1 or more)'),
        ("[helper-on-vllm]", "[]", "found a list; allowed: a list (1 or more)"),
        ("[helper-on-vllm]", "[helper-on-vlm]", "did you mean helper-on-vllm?"),
        ("[helper-on-vllm]", "[helper-on-vllm, helper-on-vllm]", "deployments[1]"),
        ("model: helper", "model: halper", "did you mean helper?"),
        ("site: store-1", "site: store-2", "did you mean store-1?"),
        ("country: KR", "country: Korea", "a country of two capital letters"),
        ("grid_zone: KR", "grid_zone: {a: b}", "found a mapping; allowed: a text"),
        ("grid_zone: KR", "pue: .nan", 'found ".nan"; allowed: a number from 1 to 5'),
        ("grid_zone: KR", "labels: {floor: [1]}", "Site/store-1.labels.floor: found a list; allowed: a text"),
        ("objective: fast", "teams: [hq]", 'found "hq"; allowed: default'),
        ("objective: fast", "cache: {ttl_s: 0}", "Route/assistant.cache.ttl_s: found 0; allowed: a number above 0"),
        ("objective: fast", "cache: yes", 'found "yes"; allowed: a mapping with ttl_s'),
        ("engine: upstream", "engine: llamacpp", "found it with engine llamacpp"),
        ("engine: upstream", "engine: peer", "a peer is never this one"),
        ("url: http", "url: ftp", "an address with http:// or https://"),
        ("url: http://127.0.0.1:8000/v1", "threads: 2", "Deployment/helper-on-vllm.url: missing"),
        ("127.0.0.1:8000/v1", "127.0.0.1:99999/v1", "allowed: an address such as"),
        ("127.0.0.1:8000/v1", "127.0.0.1:8000/v1?key=1", "an address with a secret (not shown)"),
        ("127.0.0.1:8000/v1", "me:pass@127.0.0.1:8000/v1", "without user or password"),
        ("127.0.0.1:8000", "api.example.com", "https:// to an address outside this machine"),
        ("http://127.0.0.1:8000", "https://api.example.com", "found the host api.example.com"),
        ("http://127.0.0.1:8000", "https://2130706433", "found the host 2130706433"),
        ("url: http", "fake: {}\nurl: http", "only with engine fake"),
        ("url: http", "keys: [{}]\nurl: http", "exactly one of env and file"),
        ("url: http", "keys: [{env: A, file: b}]\nurl: http", "exactly one of env and file"),
        ("url: http", "price: cheap\nurl: http", 'found "cheap"; allowed: none is defined'),
        ("url: http", "capabilities: [tols]\nurl: http", 'capabilities[0]: found "tols"; allowed: tools |'),
    ],
)  # fmt: skip
def test_a_mistake_is_named(old: str, new: str, said: str) -> None:
    assert old in LEAST
    assert said in "\n".join(problems(LEAST.replace(old, new, 1)))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("kind: Team\nname: a\ntenant: b", "allowed: default"),
        ("kind: Team\nname: a\n---\nkind: Team\nname: a", "Team/a: the name is taken in line 24"),
        ("kind: Budget\nname: b\nscope: {}\namount: 1", "found none; allowed: one of tenant, team, key, tag"),
        ("kind: Budget\nname: b\nscope: {team: a, tag: x=y}\namount: 1", "found team and tag"),
        ("kind: Budget\nname: b\nscope: {tenant: x}\namount: 1", 'scope.tenant: found "x"; allowed: default'),
        ("kind: Budget\nname: b\nscope: {tag: x}\namount: 1", "name=value"),
        ("kind: Budget\nname: b\nscope: {tenant: default}\namount: -1", "found -1; allowed: a decimal number"),
        ("kind: Budget\nname: b\nscope: {tenant: default}\namount: 1e3", "found 1e3; allowed: a decimal number"),
        ("kind: Budget\nname: b\nscope: {tenant: default}\namount: 1\ncurrency: WON", "EUR, JPY, KRW, USD"),
        ("kind: Budget\nname: b\nscope: {tenant: default}\namount: 1\ntimezone: Asia/Soul", "mean Asia/Seoul?"),
        ("kind: Budget\nname: b\nscope: {tenant: default}\namount: 1\ntimezone: ../etc", 'found "../etc"'),
        ("kind: Gateway\nname: g\nsite: store", "did you mean store-1?"),
        ("kind: Gateway\nname: g\n---\nkind: Gateway\nname: h", "Gateway/h: a second Gateway document"),
        ("kind: Gateway\nname: g\nlisten: 8080", "HOST:PORT"),
        ("kind: Gateway\nname: g\nlisten: 127.0.0.1:70000", "HOST:PORT"),
        ("kind: Gateway\nname: g\nlisten: 192.168.0.7:80", "or insecure: true (or --insecure)"),
        ("kind: Gateway\nname: g\nlisten: 0.0.0.0:80\ninsecure: true", "Gateway/g.hosts: missing"),
        ("kind: Gateway\nname: g\nhosts: [http://a.b]", "HOST or HOST:PORT"),
        ("kind: Gateway\nname: g\ncors: {origins: [a.b]}", "an origin such as https://app.example.com"),
        ("kind: Gateway\nname: g\ntls: {cert: no.pem, key: no.key}", 'found "no.pem"; allowed: a PEM file'),
        ("kind: Gateway\nname: g\nlimits: {body_bytes: 1.5}", "Gateway/g.limits.body_bytes: found 1.5"),
        ("kind: Site\nname: c\ntier: cloud\nregion: r\ncountry: US\ngrid_zone: US", "whichever this file is for"),
    ],
)  # fmt: skip
def test_a_mistake_in_another_document_is_named(more: str, said: str) -> None:
    assert said in "\n".join(problems(LEAST + "---\n" + more))


@pytest.mark.parametrize(
    ("price", "said"),
    [
        ("", "exactly one of rates"),
        ("input_per_mtok: 1\nbook: openai/gpt-4o-mini", "exactly one of rates"),
        ("input_per_mtok: 1", "source: missing"),
        ("input_per_mtok: 1\nsource: list", "date: missing"),
        ("input_per_mtok: 1\nsource: list\ndate: 20260131", "date: not a date"),
        ("input_per_mtok: 1\nsource: list\ndate: 2026-02-31", "date: not a date"),
        ("input_per_mtok: 1\nsource: list\ndate: 2026-01-31\ncurrency: GBP", "EUR, JPY, KRW, USD"),
        ("cached_per_mtok: 1\nsource: list\ndate: 2026-01-31", "found only cached_per_mtok"),
        ("exchange_from: USD\nsource: list\ndate: 2026-01-31", "exchange_from and rate together"),
        ("exchange_from: USD\nrate: 1\nsource: list\ndate: 2026-01-31", "not USD itself"),
    ],
)
def test_a_price_says_one_thing_completely(price: str, said: str) -> None:
    assert said in "\n".join(problems(f"{LEAST}---\nkind: Price\nname: p\n{price}\n"))


def test_numbers_where_text_is_wanted_keep_their_own_text() -> None:
    text = """
---
kind: Budget
name: b
scope: {tenant: default}
amount: 0.10
---
kind: Budget
name: c
scope: {tenant: default}
amount: 10
"""
    catalog = read(LEAST.replace("grid_zone: KR", "grid_zone: KR\nlabels: {rack: 012, row: 1.50}") + text)
    assert catalog.budgets["b"].amount == "0.10"
    assert catalog.budgets["c"].amount == "10"
    assert catalog.site.labels == {"rack": "012", "row": "1.50"}


def test_norway_is_a_country() -> None:
    assert read(LEAST.replace("country: KR", "country: NO")).site.country == "NO"


def test_prices_and_rates_are_resolved() -> None:
    catalog = read(
        LEAST
        + """
---
kind: Price
name: list
input_per_mtok: 0.15
output_per_mtok: 0.60
source: the vendor's list
date: 2026-01-31
---
kind: Price
name: won
exchange_from: USD
currency: KRW
rate: 1391.50
source: the central bank
date: 2026-01-31
---
kind: Budget
name: b
scope: {tenant: default}
amount: 10000
currency: KRW
"""
    )
    assert list(catalog.prices) == ["list"]
    assert catalog.prices["list"].input == 150_000_000
    assert catalog.exchange == {("USD", "KRW"): "1391.50"}


def test_a_budget_that_no_price_can_be_counted_in_is_refused() -> None:
    price = (
        "\n---\nkind: Price\nname: p\ninput_per_mtok: 1\noutput_per_mtok: 1\nsource: list\ndate: 2026-01-31\n"
    )
    budget = "---\nkind: Budget\nname: b\nscope: {tenant: default}\namount: 1\ncurrency: KRW\n"
    assert "found KRW, and prices in USD" in "\n".join(problems(LEAST + price + budget))


def test_only_the_price_that_is_wrong_is_named() -> None:
    def prices_of(docs: Iterable[PriceDoc]) -> dict[str, Price]:
        names = [doc.name for doc in docs]
        if "bad" in names:
            raise ConfigError("the package knows no such model")
        return {name: Price(id=name, currency="USD", input=1, output=1) for name in names}

    text = LEAST + "".join(f"---\nkind: Price\nname: {name}\nbook: a/b\n" for name in ("good", "bad"))
    with pytest.raises(ConfigError) as caught:
        parse(text, base=Path(), name="site.yaml", prices_of=prices_of, grids=no_grids)
    assert caught.value.message == "site.yaml:30: Price/bad: the package knows no such model"


def test_an_exchange_rate_is_no_price_of_tokens() -> None:
    price = "\n---\nkind: Price\nname: p\nexchange_from: KRW\nrate: 1\nsource: bank\ndate: 2026-01-31\n"
    said = problems(LEAST.replace("url:", "price: p\nurl:") + price)
    assert "a price of tokens, no exchange" in said[0]


def test_the_address_counts_and_not_the_label() -> None:
    public = (
        LEAST.replace("http://127.0.0.1:8000/v1", "https://api.example.com/v1") + GATEWAY + "site: store-1"
    )
    assert "trusted: true" in "\n".join(problems(public))
    assert read(public.replace("url:", "trusted: true\nurl:")).deployments["helper-on-vllm"].trusted
    honest = public.replace("site: store-1\nmodel", "site: cloud\nmodel") + CLOUD
    assert read(honest).deployments["helper-on-vllm"].site == "cloud"
    edge = honest.replace("tier: cloud", "tier: edge")
    assert "trusted: true" in "\n".join(problems(edge))


@pytest.mark.parametrize(
    "host",
    ["localhost", "127.8.9.1", "[::1]", "10.1.2.3", "172.31.0.1", "192.168.1.1", "[fd00::1]", "169.254.7.7"],
)
def test_addresses_of_the_machine_and_its_networks_need_no_trust(host: str) -> None:
    assert read(LEAST.replace("127.0.0.1:8000", f"{host}:8000")).deployments


@pytest.mark.parametrize("host", ["172.32.0.1", "8.8.8.8", "[2001:db8::1]", "[::ffff:8.8.8.8]", "100.64.0.1"])
def test_other_addresses_need_https_and_trust(host: str) -> None:
    assert "https://" in "\n".join(problems(LEAST.replace("127.0.0.1:8000", f"{host}:8000")))
    assert "trusted" in "\n".join(problems(LEAST.replace("http://127.0.0.1:8000", f"https://{host}:8000")))


def test_engines_need_what_they_run() -> None:
    text = LEAST.replace("engine: upstream ", "engine: llamacpp ").replace(
        "url: http://127.0.0.1:8000/v1", ""
    )
    said = "\n".join(problems(text))
    assert "Model/helper.format" in said
    assert "found neither file nor digest" in said
    good = text.replace("task: chat", "task: chat\nformat: gguf\nfile: models/a.gguf")
    assert read(good).models["helper"].file == "models/a.gguf"
    assert "embedding, which encoder computes" in "\n".join(problems(text.replace("llamacpp ", "encoder ")))
    elsewhere = good.replace("site: store-1\nmodel", "site: cloud\nmodel") + CLOUD + GATEWAY + "site: store-1"
    assert 'found "cloud"; allowed: store-1, because a llamacpp engine is a child' in "\n".join(
        problems(elsewhere)
    )


def test_a_route_is_of_one_task() -> None:
    more = """
---
kind: Model
name: vectors
task: embedding
---
kind: Deployment
name: vectors
site: store-1
model: vectors
engine: encoder
"""
    said = problems(LEAST.replace("[helper-on-vllm]", "[helper-on-vllm, vectors]") + more)
    assert said == [
        "site.yaml:21: Route/assistant.deployments: found the tasks chat (helper-on-vllm), embedding (vectors); "
        "allowed: models of one task"
    ]


SECRET = "sk-live-0123456789abcdefghij"


@pytest.mark.parametrize(
    "place",
    [
        f"keys: [{{env: {SECRET}}}]",
        f"keys: [{{file: {SECRET}}}]",
        f"keys: [{SECRET}]",
        f"api_key: {SECRET}",
        f"upstream_model: {SECRET}",
        f"url: http://x:{SECRET}@127.0.0.1/v1",
        f"name: {SECRET}",
        f"price: {SECRET}",
    ],
)
def test_a_secret_is_refused_and_never_shown(place: str) -> None:
    name = place.split(":")[0]
    text = "\n".join(line for line in LEAST.splitlines() if not (name == "url" and line.startswith("url")))
    said = "\n".join(problems(text.replace("engine: upstream ", f"{place}\nengine: upstream ")
                              if name != "name" else text.replace("name: helper-on-vllm", place)))  # fmt: skip
    assert SECRET not in said
    assert "site.yaml:" in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\na: 2", "site.yaml:2: the key a is written twice, first in line 1"),
        ("a:\n\tb: 1", "site.yaml:2: a tab in the indentation"),
        ("a: [1\nb: 2", "site.yaml:2: not YAML"),
        ("a: b: c", "site.yaml:1: not YAML"),
        ("a: !!python/object/apply:os.system [ls]", "site.yaml:1: a YAML tag (!)"),
        ("a: *b", "the alias *b names no anchor before it"),
        ("a: &b {c: *b}", "the alias *b names no anchor before it"),
        ("x: \x01", "a character that YAML does not allow"),
        ("[" * 100_000, "nested more than 32 deep"),
        ("- " * 100_000, "nested more than 32 deep"),
        ("? [a]\n: b", "a key that is not a word"),
        ("", "an empty file"),
        ("---\n---\n", "an empty file"),
        ("[a, b]", "found no mapping"),
        ("just words", "found no mapping"),
    ],
    ids=lambda value: str(value)[:20].encode("unicode_escape").decode(),
)
def test_text_that_is_no_yaml_of_ours(text: str, said: str) -> None:
    assert said in "\n".join(problems(text))


def test_aliases_work_but_do_not_explode() -> None:
    anchored = LEAST.replace("grid_zone: KR", "grid_zone: &zone KR\nlabels: {zone: *zone}")
    assert read(anchored).site.labels == {"zone": "KR"}
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    for level in range(1, 10):
        bomb += f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]\n"
    assert f"more than {NODES_MAX} values" in problems(bomb)[0]


def test_insecure_may_come_from_the_command_line(tmp_path: Path) -> None:
    text = LEAST + GATEWAY + "listen: 192.168.0.7:8080\n"
    assert "insecure" in problems(text)[0]
    assert read(text, insecure=True).gateway.listen == "192.168.0.7:8080"
    (tmp_path / "c.pem").write_text("x")
    with_tls = text + "tls: {cert: c.pem, key: c.pem}\n"
    assert read(with_tls, base=tmp_path).gateway.tls is not None


def test_load_reads_a_file_and_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text("\ufeff" + LEAST, encoding="utf-8")
    assert load(path).site.name == "store-1"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: None, "cannot be read: No such file"),
        (lambda path: path.mkdir(), "not a file"),
        (lambda path: path.write_bytes(b"a: 1\nb: \xff"), "site.yaml:2: bytes that are not UTF-8"),
        (
            lambda path: path.write_bytes(b"#" * (4 * 1024 * 1024 + 1)),
            "4194305 bytes; allowed: at most 4194304",
        ),
    ],
    ids=["missing", "folder", "latin-1", "large"],
)
def test_files_that_cannot_be_read(tmp_path: Path, make: Callable[[Path], object], said: str) -> None:
    path = tmp_path / "site.yaml"
    make(path)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert said in caught.value.message


def test_a_fingerprint_changes_when_the_file_is_written_or_replaced(tmp_path: Path) -> None:
    path, other = tmp_path / "a", tmp_path / "b"
    path.write_text("one")
    other.write_text("two")
    first = fingerprint(path.stat())
    assert fingerprint(path.stat()) == first
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    other.replace(path)
    assert fingerprint(path.stat()) != first


def test_the_guide_has_the_fields_as_they_are() -> None:
    page = (ROOT / "docs/guide/configuration.md").read_text(encoding="utf-8")
    assert BEGIN in page
    assert renew(page) == page, "the tables are old: run scripts/docs"


def test_a_page_without_marks_is_not_renewed() -> None:
    with pytest.raises(ValueError, match="lacks"):
        renew("# Nothing here")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("neighbours: [store-9]", 'Site/store-1.neighbours[0]: found "store-9"'),
        ("neighbours: [store-1]", 'Site/store-1.neighbours[0]: found "store-1"; allowed: another site'),
        ("parent: depot", 'Site/store-1.parent: found "depot"'),
        ("address: store-1:8080", "allowed: an address of a host alone"),
        ("address: https://store-1/ondol", "allowed: an address of a host alone"),
        ("address: https://store-1:99999", "allowed: an address of a host alone"),
    ],
)
def test_a_site_names_others_that_are_there_and_addresses_that_are_some(line: str, said: str) -> None:
    found = problems(LEAST.replace("region: kr-seoul", f"region: kr-seoul\n{line}"))
    assert len(found) == 1
    assert said in found[0]


def test_a_site_may_be_at_an_address_and_have_a_neighbour() -> None:
    text = LEAST.replace(
        "region: kr-seoul", "region: kr-seoul\naddress: https://[::1]:8443/\nneighbours: [cloud]"
    )
    assert read(text + CLOUD + GATEWAY + "site: store-1\n").site.neighbours == ("cloud",)
