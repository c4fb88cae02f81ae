"""Which hub a database belongs to: replicas of one hub share its keys, and another's must not write here.

A hub that signed with a key of its own would send its sites what they refuse, every other time at random.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from ondol.core.ports import Tx
from ondol.errors import StateError

SCHEMA: Final[tuple[str, ...]] = (
    "CREATE TABLE hub_identity(name TEXT NOT NULL PRIMARY KEY, value TEXT NOT NULL)",
)


def claim(tx: Tx, identity: Mapping[str, str]) -> None:
    """Write down whose database this is, or check that it is the same hub's.

    `identity` names what every replica has in common: file or field to a fingerprint, never a secret.

    Raises:
        StateError: another hub's; the message says which file differs.
    """
    known = dict(tx.run("SELECT name, value FROM hub_identity"))
    if not known:
        tx.many("INSERT INTO hub_identity(name, value) VALUES(?,?)", sorted(identity.items()))
        return
    wrong = [
        f"{name} is {value}, expected {known[name]}"
        for name, value in sorted(identity.items())
        if known.get(name, value) != value
    ]
    if wrong:
        raise StateError(
            f"this database belongs to another hub: {'; '.join(wrong)}. Put hub.key, pepper.key, ca.key and ca.pem of "
            "the hub that made it into the data directory of this one (from its backup, or from another replica)."
        )
