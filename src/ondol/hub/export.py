"""A generation of one site for a stick: everything but the models' bytes, which the command fetches and appends."""

from __future__ import annotations

import base64
from typing import Any

import msgspec

from ondol.core import archive, chunks
from ondol.core.archive import Entry, Index
from ondol.core.dsse import Envelope
from ondol.core.ports import Tx
from ondol.errors import Conflict, InvalidRequest, NotFound
from ondol.hub import artifacts, enrol, keys, publish
from ondol.hub.service import Hub


class Exported(msgspec.Struct, frozen=True, kw_only=True):
    """The signed index, and the parts that are no models in base64; `models` are the digests to append, in order."""

    index: Envelope
    generation: int
    parts: dict[str, str]
    models: tuple[str, ...]


async def export(hub: Hub, site: str, generation: int | None) -> Exported:
    """What one site shall be at a generation, by default the one that it shall have now.

    Raises:
        NotFound: there is no such site or generation.
        Conflict: a model that it needs is not offered by the hub.
        ConfigError: a value does not fit this site.
    """
    now_ns = hub.clock.wall_ns()

    def work(tx: Tx) -> Any:
        newest = publish.fleet_generation(tx)
        number = generation if generation is not None else publish.wanted(tx, site)
        if not 1 <= number <= newest:
            raise NotFound(
                f"there is no generation {number}; the newest is {newest} (0: nothing was applied yet)"
            )
        offered = {row.digest: artifacts.manifest_of(tx, row.digest) for row in artifacts.offered(tx)}
        epoch = enrol.current_epoch(tx, hub.authority, now_ns=now_ns)
        return number, publish.fleet_at(tx, number), keys.good(tx, now_ns), epoch, offered

    number, fleet, good, epoch, offered = await hub.database.write(work)
    if site not in fleet.sites:
        raise NotFound(f"there is no site {site[:64]!r}; `ondol sites list` shows which there are")
    manifest, bodies = publish.desired_for(
        fleet, site, hub.authority, generation=number, keys=good, now_ns=now_ns
    )
    models = _models(bodies, offered)
    parts = archive.small_parts(manifest, epoch, bodies, models)
    entries = [archive.entry_of(name, data) for name, data in parts.items()]
    for digest, raw in models.items():
        size = chunks.unverified(msgspec.json.decode(raw, type=Envelope)).size
        hexes = digest.partition(":")[2]
        entries.append(Entry(f"models/{hexes}", size, hexes))
    index = Index(
        fleet=hub.authority.fleet, site=site, generation=number, issued_ns=now_ns, entries=tuple(entries)
    )
    return Exported(
        index=archive.sign_index(hub.authority.private, index), generation=number, models=tuple(models),
        parts={name: base64.b64encode(data).decode() for name, data in parts.items()},
    )  # fmt: skip


def generation_of(text: str | None) -> int | None:
    """The number that a query says.

    Raises:
        InvalidRequest: it is none.
    """
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise InvalidRequest(f"generation: found {text[:20]!r}, expected a number")
    return int(text)


def _models(bodies: dict[str, bytes], offered: dict[str, bytes | None]) -> dict[str, bytes]:
    """The signed manifests of the models that this site's documents name by digest."""
    found: dict[str, bytes] = {}
    for body in bodies.values():
        document = msgspec.json.decode(body)
        digest = document.get("digest")
        if document.get("kind") != "Model" or not digest or document.get("file"):
            continue
        raw = offered.get(digest)
        if raw is None:
            raise Conflict(
                f"Model {document['name']!r} has the digest {digest[:23]}…, which the hub does not offer; publish it: "
                f"ondol models publish FILE --name {document['name']}"
            )
        found[digest] = raw
    return found
