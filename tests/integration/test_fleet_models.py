"""Models of a real hub: published, fetched by a site that joined, carried as a file; each wrong thing refused."""

from __future__ import annotations

import hashlib
import json
import ssl
import struct
from collections.abc import Iterator
from pathlib import Path
from zoneinfo import ZoneInfo

import msgspec
import pytest
from tests.hubs import Hub, join, running_hub, start_site, until, write_site
from tests.model_files import gguf, model, noise

from ondol.adapters.clock import SystemClock
from ondol.adapters.fleet_models import FleetModels
from ondol.adapters.model_sources import FetchFailed
from ondol.adapters.model_transfer import Fetched, ModelTransfer, Terms
from ondol.adapters.site_identity import DiskIdentity
from ondol.adapters.site_memory import open_memory
from ondol.adapters.starter import starter
from ondol.adapters.transfer_sources import DirectorySource, HttpSource, Source
from ondol.cli import archive, publish
from ondol.cli.installation import CommandFailed
from ondol.core import dsse
from ondol.core.archive import MAGIC, Entry, Index, sign_index
from ondol.errors import BadSignature, ConfigError, DirectoryLocked, GenerationRefused, NotFound, OndolError

ROOT = Path(__file__).resolve().parent.parent.parent
FLEET = """
kind: Model
name: helper
task: chat
format: gguf
digest: {digest}
context_tokens: 512
---
kind: Deployment
name: helper-here
sites: {{names: [shop-*]}}
model: helper
engine: llamacpp
---
kind: Route
name: assistant
deployments: [helper-here]
"""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running_hub(tmp_path / "hub") as hub:
        for name, value in hub.environ.items():
            monkeypatch.setenv(name, value)
        yield hub


def written(folder: Path, data: bytes, name: str = "given.gguf") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def said(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


def publish_it(
    hub: Hub, path: Path, capsys: pytest.CaptureFixture[str], name: str = "helper", **options: object
) -> dict[str, object]:
    capsys.readouterr()
    assert publish.publish(path, name=name, hub=hub.url, as_json=True, **options) == 0  # type: ignore[arg-type]
    return said(capsys)


def joined(hub: Hub, folder: Path, name: str = "shop-1") -> Path:
    """The folder of a site that is a member and does not run."""
    write_site(folder, name)
    join(folder, hub.invite(name))
    return folder


async def fetch(hub: Hub, site: Path, digest: str, source: Source | None = None) -> Fetched:
    """As the site would fetch: with its own credential, against the fleet's CA."""
    clock = SystemClock()
    identity = DiskIdentity(site / "data", "g")
    tls = ssl.create_default_context(cadata=identity.membership.ca_pem)
    hub_source = HttpSource(
        hub.url, name="hub", tls=tls, authorization=lambda: identity.authorization("hub", clock.wall_ns())
    )
    transfer = ModelTransfer(
        FleetModels(site / "models"), keys=lambda: identity.trust().keys, clock=clock,
        terms=lambda: Terms(zone=ZoneInfo("UTC")),
    )  # fmt: skip
    try:
        return await transfer.fetch(digest, [hub_source if source is None else source])
    finally:
        await hub_source.close()


@pytest.mark.anyio
async def test_a_model_goes_to_the_hub_and_from_there_to_a_site_that_belongs_to_it(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, model(3))
    digest = f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
    first = publish_it(hub, path, capsys)
    assert (first["digest"], first["sent"], first["format"]) == (digest, path.stat().st_size, "gguf")
    again = publish_it(hub, path, capsys)
    assert again["sent"] == 0
    site = joined(hub, tmp_path / "shop-1")
    fetched = await fetch(hub, site, digest)
    assert fetched.held.path.read_bytes() == path.read_bytes()
    # A new version: only what changed goes over the line, both ways.
    newer = written(
        tmp_path, gguf({f"t{n}": noise(640 * 1024, 77 if n == 1 else n) for n in range(5)}, "v2"), "new"
    )
    second = publish_it(hub, newer, capsys, replace=True)
    assert isinstance(second["sent"], int)
    assert second["sent"] < 700 * 1024
    fetched = await fetch(hub, site, str(second["digest"]))
    assert fetched.received == second["sent"]
    assert fetched.held.path.read_bytes() == newer.read_bytes()
    assert [one["digest"] for one in hub.client.get("models")["data"]] == [second["digest"]]


@pytest.mark.anyio
async def test_nobody_else_gets_a_model(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, model(1))
    digest = str(publish_it(hub, path, capsys)["digest"])
    site = joined(hub, tmp_path / "shop-1")
    tls = ssl.create_default_context(cafile=str(hub.folder / "data" / "ca.pem"))
    for header in ("Bearer x", "Ondol-Site a~b"):
        source = HttpSource(hub.url, name="hub", tls=tls, authorization=lambda text=header: text)  # type: ignore[misc]
        with pytest.raises(FetchFailed, match="does not accept who we are"):
            await fetch(hub, site, digest, source)
        await source.close()
    with pytest.raises(FetchFailed, match="no such model"):
        await fetch(hub, site, "sha256:" + "0" * 64)


@pytest.mark.anyio
async def test_a_folder_that_publish_wrote_serves_a_site_without_the_hub(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, model(1))
    digest = str(publish_it(hub, path, capsys, to=tmp_path / "share")["digest"])
    site = joined(hub, tmp_path / "shop-1")
    hub.kill()
    fetched = await fetch(hub, site, digest, DirectorySource(tmp_path / "share"))
    assert fetched.held.path.read_bytes() == path.read_bytes()


def test_what_is_no_model_is_refused_before_it_is_sent(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(OndolError, match="pickle"):
        publish_it(hub, written(tmp_path, b"\x80\x04" + bytes(1000)), capsys)
    with pytest.raises(OndolError, match="cannot be read"):
        publish_it(hub, tmp_path / "nowhere", capsys)
    good = written(tmp_path, model(1))
    publish_it(hub, good, capsys)
    other = written(tmp_path, model(1, seed=5), "other.gguf")
    with pytest.raises(CommandFailed, match="--replace"):
        publish_it(hub, other, capsys)
    with pytest.raises(CommandFailed, match="found the name"):
        publish_it(hub, other, capsys, name="../x")


def test_the_hub_believes_no_upload_either(hub: Hub, tmp_path: Path) -> None:
    # A client of another make: the manifest says GGUF, the bytes are a pickle.
    data = b"\x80\x04" + bytes(1000)
    digest = hashlib.sha256(data)
    said = {
        "digest": f"sha256:{digest.hexdigest()}", "size": len(data), "format": "gguf", "sizes": [len(data)],
        "digests": __import__("base64").b64encode(digest.digest()).decode(), "name": "evil",
    }  # fmt: skip
    client = hub.client
    assert client.post_bytes("models/begin", json.dumps(said).encode()) == {"missing": [[0, 0]]}
    where = f"models/{said['digest']}"
    with pytest.raises(CommandFailed, match="not the one that"):
        client.post_bytes(f"{where}/chunks/0", bytes(len(data)))
    with pytest.raises(CommandFailed, match="expected 1002"):
        client.post_bytes(f"{where}/chunks/0", data[:-1])
    with pytest.raises(CommandFailed, match="at most"):
        client.post_bytes(f"{where}/chunks/0", data + b"x")
    with pytest.raises(CommandFailed, match="chunk 7"):
        client.post_bytes(f"{where}/chunks/7", data)
    with pytest.raises(CommandFailed, match="not sent yet"):
        client.post(f"{where}/publish", {"name": "evil"})
    client.post_bytes(f"{where}/chunks/0", data)
    with pytest.raises(CommandFailed, match="pickle"):
        client.post(f"{where}/publish", {"name": "evil"})
    with pytest.raises(CommandFailed, match="was begun"):
        client.post(f"{where}/publish", {"name": "evil"})
    with pytest.raises(CommandFailed, match="expected 1 to"):
        client.post_bytes("models/begin", json.dumps({**said, "size": 0}).encode())
    assert client.get("models")["data"] == []


def test_a_signature_of_the_maker_is_checked_before_publishing(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.unit.wire.test_model_signing import P256, bundle, pem, statement

    folder = tmp_path / "made"
    folder.mkdir()
    path = written(folder, model(1))
    (tmp_path / "key.pub").write_bytes(pem(P256))
    (folder / "model.sig").write_bytes(bundle(statement({"given.gguf": path.read_bytes()})))
    options: dict[str, object] = {"signature": folder / "model.sig", "key": tmp_path / "key.pub"}
    assert publish_it(hub, path, capsys, "helper", **options)["signed_by"] == "key.pub"
    (folder / "extra.py").write_text("import os")
    with pytest.raises(OndolError, match="nobody signed"):
        publish_it(hub, path, capsys, "other", **options)
    with pytest.raises(CommandFailed, match="belong together"):
        publish.publish(path, name="x", key=tmp_path / "key.pub", hub=hub.url)


def test_a_model_is_withdrawn(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    publish_it(hub, written(tmp_path, model(1)), capsys, name="team/helper")
    assert publish.withdraw("team/helper", hub=hub.url) == 0
    assert hub.client.get("models")["data"] == []
    with pytest.raises(CommandFailed, match="no model"):
        publish.withdraw("team/helper", hub=hub.url)


# ---- a generation on a stick


@pytest.fixture
def stick(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A file with generation 1 of `shop-1`, which has joined and never fetched anything."""
    digest = publish_it(hub, written(tmp_path, model(2)), capsys)["digest"]
    joined(hub, tmp_path / "shop-1")
    hub.apply(tmp_path / "fleet", FLEET.format(digest=digest))
    out = tmp_path / "shop-1.ondol"
    assert archive.export(out, site="shop-1", hub=hub.url) == 0
    return out


def state(site: Path) -> tuple[int, list[str]]:
    """The generation that a site has on disk, and the models in its store."""
    with open_memory(site / "data") as memory:
        desired = memory.desired()
    held = [one.digest for one in FleetModels(site / "models").held()]
    return (0 if desired is None else desired.manifest.generation), held


def take_in(file: Path, site: Path) -> int:
    return archive.take_in(file, config=site / "site.yaml")


def test_a_generation_with_its_model_comes_to_a_site_without_a_link(
    hub: Hub, tmp_path: Path, stick: Path
) -> None:
    hub.kill()
    site = tmp_path / "shop-1"
    assert take_in(stick, site) == 0
    generation, held = state(site)
    assert (generation, held) == (
        1,
        [f"sha256:{hashlib.sha256((tmp_path / 'given.gguf').read_bytes()).hexdigest()}"],
    )
    # The same file again changes nothing.
    assert take_in(stick, site) == 0
    assert state(site) == (1, held)


@pytest.mark.parametrize("part", ["magic", "length", "index", "manifest", "model", "cut", "longer", "empty"])
def test_a_file_that_was_touched_is_refused_and_the_site_stays_as_it_was(
    tmp_path: Path, stick: Path, part: str
) -> None:
    raw = bytearray(stick.read_bytes())
    begin = len(MAGIC) + 4
    length = struct.unpack(">I", raw[len(MAGIC) : begin])[0]
    match part:
        case "magic":
            raw[3] ^= 1
        case "length":
            raw[len(MAGIC)] = 0xFF
        case "index":
            at = raw.index(b'"payload":"') + 40
            raw[at] = ord("A") if raw[at] != ord("A") else ord("B")
        case "manifest":
            raw[begin + length + 50] ^= 1
        case "model":
            raw[-1] ^= 1
        case "cut":
            raw = raw[: len(raw) // 2]
        case "longer":
            raw += b"x"
        case "empty":
            raw = bytearray()
    touched = written(tmp_path, bytes(raw), "touched.ondol")
    with pytest.raises(BadSignature):
        take_in(touched, tmp_path / "shop-1")
    assert state(tmp_path / "shop-1") == (0, [])


def test_a_file_of_another_site_or_fleet_is_refused(hub: Hub, tmp_path: Path, stick: Path) -> None:
    other = joined(hub, tmp_path / "shop-2", "shop-2")
    with pytest.raises(BadSignature, match="it is for site 'shop-1'"):
        take_in(stick, other)
    with running_hub(tmp_path / "hub-2") as second:
        stranger = joined(second, tmp_path / "stranger", "shop-1")
        with pytest.raises(BadSignature, match="no good signature"):
            take_in(stick, stranger)
    lonely = tmp_path / "lonely"
    write_site(lonely, "shop-1")
    with pytest.raises(CommandFailed, match="join first"):
        take_in(stick, lonely)


def test_an_older_generation_is_refused(hub: Hub, tmp_path: Path, stick: Path) -> None:
    text = (tmp_path / "fleet" / "fleet.yaml").read_text()
    hub.apply(tmp_path / "fleet", text.replace("name: assistant", "name: other"))
    newer = tmp_path / "newer.ondol"
    archive.export(newer, site="shop-1", hub=hub.url)
    take_in(newer, tmp_path / "shop-1")
    with pytest.raises(GenerationRefused, match="runs 2 already"):
        take_in(stick, tmp_path / "shop-1")
    assert state(tmp_path / "shop-1")[0] == 2
    again = tmp_path / "again.ondol"
    archive.export(again, site="shop-1", generation=1, hub=hub.url)
    with pytest.raises(GenerationRefused):
        take_in(again, tmp_path / "shop-1")


def test_names_that_lead_out_are_refused_although_they_are_signed(
    hub: Hub, tmp_path: Path, stick: Path
) -> None:
    private = (hub.folder / "data" / "hub.key").read_bytes()
    key = private if len(private) == 32 else bytes.fromhex(private.decode().strip())
    raw = stick.read_bytes()
    begin = len(MAGIC) + 4
    length = struct.unpack(">I", raw[len(MAGIC) : begin])[0]
    envelope = msgspec.json.decode(raw[begin : begin + length], type=dsse.Envelope)
    index = msgspec.json.decode(dsse.payload_of(envelope), type=Index)
    for name in ("../../data/site.key", "/etc/x", "bodies/../x", "models/x", "bodies/" + "0" * 64 + "/x"):
        entries = (*index.entries, Entry(name, 1, hashlib.sha256(b"x").hexdigest()))
        changed = msgspec.structs.replace(index, entries=entries)
        with pytest.raises(OndolError, match="none of ours"):
            sign_index(key, changed)
        signed = msgspec.json.encode(
            dsse.sign(key, "application/vnd.ondol.archive.v1", msgspec.json.encode(changed))
        )
        file = written(
            tmp_path,
            MAGIC + len(signed).to_bytes(4, "big") + signed + raw[begin + length :] + b"x",
            "evil.ondol",
        )
        with pytest.raises(BadSignature, match="none of ours"):
            take_in(file, tmp_path / "shop-1")
    assert state(tmp_path / "shop-1") == (0, [])


def test_what_is_missing_is_said(
    hub: Hub, tmp_path: Path, stick: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(NotFound):
        take_in(tmp_path / "nowhere", tmp_path / "shop-1")
    for words, site, generation in (("no site", "shop-9", None), ("no generation 9", "shop-1", 9)):
        with pytest.raises(CommandFailed, match=words):
            archive.export(tmp_path / "out.ondol", site=site, generation=generation, hub=hub.url)
    publish.withdraw("helper", hub=hub.url)
    with pytest.raises(CommandFailed, match="does not offer"):
        archive.export(tmp_path / "out.ondol", site="shop-1", hub=hub.url)
    assert not (tmp_path / "out.ondol").exists()
    assert list(tmp_path.glob(".*.part")) == []


def test_a_site_that_runs_is_not_touched(tmp_path: Path, stick: Path) -> None:
    from ondol.adapters.lock import lock_directory

    with lock_directory(tmp_path / "shop-1" / "data"), pytest.raises(DirectoryLocked):
        take_in(stick, tmp_path / "shop-1")
    config = tmp_path / "shop-1" / "site.yaml"
    config.write_text(config.read_text().replace("listen:", "listne:"))
    with pytest.raises(ConfigError):
        take_in(stick, tmp_path / "shop-1")


@pytest.mark.timeout(240)
def test_a_site_fetches_what_its_deployment_wants_says_how_far_and_then_answers(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = starter(tmp_path / "starter", ROOT / ".cache" / "starter")
    digest = str(publish_it(hub, path, capsys)["digest"])
    text = FLEET.format(digest=digest)
    capped = {"transfer": {"bytes_per_s": 20_000_000}}
    site = tmp_path / "shop-1"
    port = write_site(site, "shop-1")
    join(site, hub.invite("shop-1", **capped))
    running = start_site(site, port)
    try:
        hub.apply(tmp_path / "fleet", text)
        problems: list[str] = []

        def ready() -> bool:
            status = running.call("GET", "/v1/ondol/status").json()
            found = [one["problem"] for one in status["endpoints"] if one["deployment"] == "helper-here"]
            if found and found[0]:
                problems.append(found[0])
            return bool(found) and found[0] is None

        until(ready, "the model is here and loaded", limit_s=120, process=running.process)
        assert any("% of 98.4 MB fetched" in one and "from hub" in one for one in problems), problems
        assert running.chat("Say hello.").status == 200
    finally:
        running.stop()
    held = FleetModels(site / "models").held()
    assert [(one.digest, one.path.read_bytes() == path.read_bytes()) for one in held] == [(digest, True)]
