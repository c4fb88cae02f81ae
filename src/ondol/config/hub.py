"""A hub's own file: one document of the kind `Hub`."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from ondol.config import network
from ondol.config.fields import build
from ondol.config.files import read_text
from ondol.config.report import Report, quoted
from ondol.config.text import TextError, documents
from ondol.errors import ConfigError
from ondol.hub.settings import HubDoc

DATABASES: Final = ("postgresql://", "postgres://")


def load_hub(path: Path) -> HubDoc:
    """The document of a hub's file.

    Raises:
        ConfigError: the file cannot be read, or says something wrong.
    """
    try:
        nodes = documents(read_text(path))
    except TextError as error:
        raise ConfigError(f"{path}:{error.line}: {error}") from error
    if len(nodes) != 1 or not isinstance(nodes[0].value, dict):
        raise ConfigError(f"{path}: found {len(nodes)} documents; expected one of the kind Hub")
    node, report = nodes[0], Report(str(path))
    kind = node.at("kind").value
    if kind != "Hub":
        found = quoted(kind) if isinstance(kind, str) else "none"
        raise ConfigError(f"{path}:{node.at('kind').line}: kind: found {found}; allowed: Hub")
    doc = build(node, HubDoc, "Hub", report, ignore="kind")
    if doc is not None:
        if network.split_listen(doc.listen) is None:
            report.wrong(node.at("listen"), "Hub.listen", "HOST:PORT, such as 127.0.0.1:8443")
        if doc.database and not doc.database.startswith(DATABASES):
            report.add(
                node.at("database").line,
                "Hub.database: found another kind of address; allowed: nothing for SQLite, or postgresql://…",
            )
        if not doc.names:
            report.wrong(node.at("names"), "Hub.names", "at least one host name or address")
    report.raise_any()
    assert doc is not None, "what could not be built was reported"
    return doc
