"""Where an installation keeps its parts, and how a command finds the site that runs there.

D/up.json         while `ondol up` runs: addresses, process ids, keys (mode 0600)
D/keys.json       the keys that `ondol up` made, so that the next run has the same (mode 0600)
D/models/         the model store of this machine
D/<site>/         site.yaml, site.log, data/ with ledger.db and keys.db
D/hub/            hub.yaml, hub.log, data/ with hub.db, admin.key and ca.pem
D/fleet/          the documents of the fleet, ready for `ondol apply`
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import Parameter

from ondol.errors import OndolError

SITES = ("edge", "cloud")
HUB = "hub"

Dir = Annotated[Path, Parameter(name="--dir", help="The installation, as `ondol up` makes it.")]
AsJson = Annotated[bool, Parameter(name="--json", negative="", help="Print JSON for programs.")]
Url = Annotated[
    str | None,
    Parameter(name="--url", help="A site's address instead of --dir; keys come from the environment."),
]
DEFAULT_DIR = Path(".ondol")


class CommandFailed(OndolError):
    """A command could not do what it was told; the message says why and what to do."""

    code = "command_failed"


class RunningSite(msgspec.Struct, frozen=True, kw_only=True):
    """One site as it runs now."""

    url: str
    pid: int


class Running(msgspec.Struct, frozen=True, kw_only=True):
    """The content of `up.json`."""

    edge: RunningSite
    cloud: RunningSite
    hub: RunningSite
    api_key: str
    admin_key: str


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """The site that a command talks to, with the key it uses there."""

    url: str
    key: str


class Layout(msgspec.Struct, frozen=True):
    """The paths of one installation."""

    root: Path

    @property
    def up_json(self) -> Path:
        """Exists while `ondol up` runs."""
        return self.root / "up.json"

    @property
    def keys_json(self) -> Path:
        """The keys that every run of `ondol up` uses again."""
        return self.root / "keys.json"

    @property
    def models(self) -> Path:
        """The model store."""
        return self.root / "models"

    def config(self, site: str) -> Path:
        """The file of a site, or of the hub."""
        return self.root / site / ("hub.yaml" if site == HUB else "site.yaml")

    def data(self, site: str) -> Path:
        """The data directory of a site."""
        return self.root / site / "data"

    def log(self, site: str) -> Path:
        """The log of a site, or of the hub."""
        return self.root / site / ("hub.log" if site == HUB else "site.log")

    def ledgers(self) -> list[tuple[str, Path]]:
        """(site, ledger file) of every ledger that exists here, edge first.

        Raises:
            CommandFailed: there is none.
        """
        found = [(name, self.data(name) / "ledger.db") for name in SITES]
        found = [(name, path) for name, path in found if path.exists()]
        if not found:
            raise CommandFailed(
                f"no ledger found in {self.root}/*/data; expected an installation made by `ondol up`. "
                "Start it once, or name another with --dir."
            )
        return found

    def running(self) -> Running:
        """What `up.json` says.

        Raises:
            CommandFailed: nothing runs here, or the file is not ours.
        """
        try:
            payload = self.up_json.read_bytes()
        except FileNotFoundError:
            raise CommandFailed(
                f"nothing runs in {self.root} (no up.json there). "
                "Start it with `ondol up`, or name another installation with --dir."
            ) from None
        try:
            return msgspec.json.decode(payload, type=Running)
        except msgspec.MsgspecError as error:
            raise CommandFailed(
                f"{self.up_json} is not as `ondol up` writes it: {error}. Stop and start `ondol up`."
            ) from error


def target(directory: Path, url: str | None, *, admin: bool) -> Target:
    """The site to talk to: `url` with a key from the environment, else the edge that runs in `directory`.

    Raises:
        CommandFailed: nothing runs there, or the environment has no key.
    """
    if url is None:
        running = Layout(directory).running()
        return Target(url=running.edge.url, key=running.admin_key if admin else running.api_key)
    name = "ONDOL_ADMIN_KEY" if admin else "ONDOL_API_KEY"
    key = os.environ.get(name)
    if not key:
        raise CommandFailed(f"--url needs a key in the environment variable {name}, which is not set.")
    if not url.startswith(("http://", "https://")):
        raise CommandFailed(f"--url is {url!r}; expected an address such as https://site.example:8080.")
    return Target(url=url.rstrip("/").removesuffix("/v1"), key=key)


def write_file(path: Path, content: bytes, *, mode: int | None = None) -> None:
    """Replace a file at once: a reader sees the old content or the new, never a part.

    A link is followed, an existing file keeps its mode unless `mode` is given.
    """
    path = path.resolve()
    if mode is None:
        mode = path.stat().st_mode & 0o777 if path.exists() else 0o644
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(mode)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
