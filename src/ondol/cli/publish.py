"""`ondol models publish|withdraw`: which models the hub offers to its sites."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import msgspec
from cyclopts import Parameter
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from ondol.adapters.fleet_models import describe
from ondol.adapters.signed_folder import verify_folder, vouched
from ondol.adapters.staging import pieces
from ondol.cli.hub_client import HubClient, HubUrl
from ondol.cli.installation import DEFAULT_DIR, AsJson, CommandFailed, Dir
from ondol.cli.output import console, print_json
from ondol.core.chunks import Artifact
from ondol.wire.model_signing import load_key


def publish(
    file: Path,
    /,
    *,
    name: str,
    replace: Annotated[bool, Parameter(help="Move the name from another model.", negative="")] = False,
    signature: Annotated[Path | None, Parameter(help="A model signature that must cover the file.")] = None,
    key: Annotated[Path | None, Parameter(help="The public key of that signature, PEM.")] = None,
    to: Annotated[Path | None, Parameter(help="Also write the model into this folder, as a source.")] = None,
    hub: HubUrl = None,
    directory: Dir = DEFAULT_DIR,
    as_json: AsJson = False,
) -> int:
    """Check a model file and offer it to the sites of the fleet.

    What the hub has already of it is not sent; a command that was cut off goes on where it stopped.

    Args:
        file: A GGUF, ONNX or safetensors file.
        name: What to call it, as in a Model document.
    """
    if (signature is None) != (key is None):
        raise CommandFailed("--signature and --key belong together: the signature, and who may have made it.")
    signer = None
    with _bar(f"publishing {name}", quiet=as_json) as progress:
        artifact = describe(file, name, progress)
        if signature is not None and key is not None:
            signer = _vouched(file, signature, key, artifact)
        client = HubClient.find(directory, hub)
        sent = _send(client, file, artifact, progress)
        said = client.post(f"models/{artifact.digest}/publish", {"name": name, "replace": replace})
        if to is not None:
            _write(client, artifact, file, to)
    if as_json:
        print_json({**said, "sent": sent, "chunks": len(artifact.sizes), "signed_by": signer})
        return 0
    print(f"{name}: {artifact.format}, {artifact.size / 1e6:.3g} MB, {artifact.digest}")
    if signer is not None:
        print(f"its signature was made with the key {signer}")
    print(f"the hub offers it; {sent / 1e6:.3g} MB were sent. A Model document names it so:")
    print(f"  digest: {artifact.digest}")
    if to is not None:
        print(f"written to {to}")
    return 0


def withdraw(
    name: str, /, *, hub: HubUrl = None, directory: Dir = DEFAULT_DIR, as_json: AsJson = False
) -> int:
    """Offer a model no longer; sites that have it keep it.

    Args:
        name: Its name, or its digest.
    """
    said = HubClient.find(directory, hub).delete(f"models/{quote(name, safe='/:')}")
    if as_json:
        print_json(said)
    else:
        print(f"{name} is offered no longer ({said['digest'][:19]}…)")
    return 0


def offered(directory: Path, hub: str | None) -> list[dict[str, Any]] | None:
    """What the hub offers; None where no hub was named and none runs here."""
    try:
        client = HubClient.find(directory, hub)
    except (CommandFailed, OSError):
        if hub is not None:
            raise
        return None
    found: list[dict[str, Any]] = client.get("models")["data"]
    return found


def _vouched(file: Path, signature: Path, key: Path, artifact: Artifact) -> str:
    """The name of the key that signed the folder which the file is in."""
    folder = file.parent
    try:
        pem = key.read_bytes()
    except OSError as error:
        raise CommandFailed(f"{key} cannot be read: {error.strerror or error}") from error
    signed = verify_folder(folder, signature, {key.name: load_key(pem)})
    if vouched(signed, folder, file) != artifact.digest:
        raise CommandFailed(f"{file} changed while it was read; try again.")
    return signed.key


def _send(
    client: HubClient, file: Path, artifact: Artifact, progress: Callable[[int, int | None], None]
) -> int:
    """Send what the hub has not got; the bytes of it."""
    said = client.post_bytes("models/begin", msgspec.json.encode(artifact))
    missing = {index for first, last in said["missing"] for index in range(first, last + 1)}
    sent = 0
    total = sum(artifact.sizes[index] for index in missing)
    for index, data in enumerate(pieces(file, artifact.sizes)):
        if index in missing:
            client.post_bytes(f"models/{artifact.digest}/chunks/{index}", data)
            sent += len(data)
            progress(sent, total)
    return sent


def _write(client: HubClient, artifact: Artifact, file: Path, folder: Path) -> None:
    """Put the model and its signed manifest into a folder that sites can fetch from."""
    stem = folder / artifact.digest.replace(":", "-")
    folder.mkdir(parents=True, exist_ok=True)
    part = stem.with_name(f".{stem.name}.part")
    shutil.copyfile(file, part)
    part.replace(stem.with_name(f"{stem.name}.model"))
    manifest = b"".join(client.stream(f"models/{artifact.digest}"))
    stem.with_name(f"{stem.name}.manifest.json").write_bytes(manifest)


@contextlib.contextmanager
def _bar(words: str, *, quiet: bool) -> Iterator[Callable[[int, int | None], None]]:
    """A progress bar on a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    screen = console(stderr=True)
    with Progress(*columns, console=screen, disable=quiet or not screen.is_terminal, transient=True) as bar:
        task = bar.add_task(words, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
