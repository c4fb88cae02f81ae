"""`ondol export` and `ondol import`: a generation of one site with its models as one signed file."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

import msgspec
from cyclopts import Parameter

from ondol.adapters.fleet_archive import Opened, open_archive, take_models, write_archive
from ondol.adapters.fleet_models import FleetModels
from ondol.adapters.lock import lock_directory
from ondol.adapters.site_identity import is_member, read_membership
from ondol.adapters.site_memory import SqliteSiteMemory, open_memory
from ondol.cli.hub_client import HubClient, HubUrl
from ondol.cli.installation import DEFAULT_DIR, AsJson, CommandFailed, Dir
from ondol.cli.output import print_json
from ondol.config.fleet import gateway_of, load_joined
from ondol.core import dsse
from ondol.core.archive import Index
from ondol.core.dsse import Envelope
from ondol.core.trust import Trust, read_epoch


def export(
    out: Path,
    /,
    *,
    site: str,
    generation: int | None = None,
    hub: HubUrl = None,
    directory: Dir = DEFAULT_DIR,
    as_json: AsJson = False,
) -> int:
    """Write what a site shall be, with its models, into one signed file that can be carried there.

    Args:
        out: The file, such as `store-1.ondol`.
        site: The site that it is for; no other takes it.
        generation: Its number; default the one that the site shall have now.
    """
    client = HubClient.find(directory, hub)
    query = "" if generation is None else f"?generation={generation}"
    said = client.get(f"export/{quote(site, safe='')}{query}")
    envelope = msgspec.convert(said["index"], Envelope)
    index = msgspec.json.decode(dsse.payload_of(envelope), type=Index)
    parts = {name: base64.b64decode(text, validate=True) for name, text in said["parts"].items()}
    size = write_archive(
        out, envelope, index.entries, parts, lambda digest: client.stream(f"models/{digest}/data")
    )
    models = len(said["models"])
    if as_json:
        print_json(
            {"file": str(out), "bytes": size, "site": site, "generation": index.generation, "models": models}
        )
        return 0
    documents = sum(name.startswith("bodies/") for name in parts)
    print(
        f"{out}: generation {index.generation} of {site}, {documents} documents and {models} models, "
        f"{size / 1e6:.3g} MB"
    )
    print(f"at the site, while it does not run:  ondol import {out.name} --config site.yaml")
    return 0


def take_in(
    file: Path,
    /,
    *,
    config: Annotated[Path, Parameter(help="The site's file.")],
    as_json: AsJson = False,
) -> int:
    """Bring a file of `ondol export` into a site that has no link, or a thin one.  The site must not be running.

    Everything is verified first: the hub's signature, every byte, that it is for this site and no older than what
    the site has, and that the documents fit together.

    Args:
        file: What `ondol export` wrote.
    """
    gateway = gateway_of(config)
    data = config.parent / gateway.data
    if not is_member(data):
        raise CommandFailed(
            f"{data} is no member of a fleet yet, so nothing tells whose signature counts; join first: ondol join"
        )
    membership = read_membership(data)
    with lock_directory(data), open_memory(data) as memory:
        trust = Trust(fleet=membership.fleet, keys=membership.hub_keys)
        before = memory.epoch()
        if before is not None:
            trust = msgspec.structs.replace(trust, epoch=read_epoch(before, trust))
        opened = open_archive(file, trust, site=membership.site, known=memory.desired())
        catalog = load_joined(config, membership.site, opened.desired.documents())
        models = FleetModels(config.parent / gateway.models, most_bytes=catalog.site.transfer.disk_bytes)
        came = take_models(opened, models)
        asyncio.run(_keep(memory, opened))
    generation = opened.index.generation
    if as_json:
        print_json({"site": membership.site, "generation": generation, "models": came})
        return 0
    print(
        f"{membership.site} is at generation {generation} from its next start on; {came} models came with it"
    )
    return 0


async def _keep(memory: SqliteSiteMemory, opened: Opened) -> None:
    """Who is out first: a site that stops between the two is stricter, not laxer."""
    await memory.keep_epoch(opened.epoch_envelope)
    await memory.keep_desired(opened.desired)
