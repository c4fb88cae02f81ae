"""Vectors by namespace: exact search while a namespace is small, usearch's graph (HNSW) once it is larger.

It runs in the memory's child process; nothing else imports it, since numpy is loaded with it.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Final

import numpy as np
import numpy.typing as npt

EXACT_MAX: Final = 8192
"""Entries of a namespace that is searched exactly: 16 MB of f32, some 1 ms on one core."""

Vector = npt.NDArray[np.float32]


class Namespace:
    """The vectors of one namespace: rows of a matrix that grows, from some size on a graph."""

    def __init__(self, width: int, exact_max: int) -> None:
        """Hold nothing yet."""
        self._width = width
        self._exact_max = exact_max
        self._keys: npt.NDArray[np.uint64] = np.empty(16, np.uint64)
        self._rows: npt.NDArray[np.float32] = np.empty((16, width), np.float32)
        self._at: dict[int, int] = {}
        self._graph: Any = None

    def __len__(self) -> int:
        return len(self._at) if self._graph is None else len(self._graph)

    def add(self, key: int, vector: Vector) -> None:
        """Keep a vector under a new key."""
        if self._graph is not None:
            self._graph.add(key, vector)
            return
        count = len(self._at)
        if count == len(self._keys):
            self._keys = np.resize(self._keys, count * 2)
            self._rows = np.resize(self._rows, (count * 2, self._width))
        self._keys[count] = key
        self._rows[count] = vector
        self._at[key] = count
        if count + 1 > self._exact_max:
            self._become_graph()

    def remove(self, key: int) -> bool:
        """Forget a key; whether it was there."""
        if self._graph is not None:
            if key not in self._graph:
                return False
            self._graph.remove(key)
            return True
        at = self._at.pop(key, None)
        if at is None:
            return False
        last = len(self._at)
        if at != last:
            # The last row takes the free place.
            self._keys[at] = self._keys[last]
            self._rows[at] = self._rows[last]
            self._at[int(self._keys[at])] = at
        return True

    def search(self, vector: Vector, k: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """The `k` nearest keys and their cosines, nearest first."""
        count = len(self)
        if not count:
            return (), ()
        if self._graph is not None:
            found = self._graph.search(vector, min(k, count))
            order = np.argsort(found.distances, kind="stable")
            return (
                tuple(int(key) for key in found.keys[order]),
                tuple(1.0 - float(distance) for distance in found.distances[order]),
            )
        cosines = self._rows[:count] @ vector
        k = min(k, count)
        best = np.argpartition(-cosines, k - 1)[:k]
        best = best[np.argsort(-cosines[best], kind="stable")]
        return tuple(int(self._keys[at]) for at in best), tuple(float(cosines[at]) for at in best)

    def _become_graph(self) -> None:
        from usearch.index import Index

        graph = Index(
            ndim=self._width,
            metric="cos",
            dtype="f16",
            connectivity=16,
            expansion_add=64,
            expansion_search=96,
        )
        count = len(self._at)
        graph.add(self._keys[:count], self._rows[:count], threads=1)
        self._graph = graph
        self._keys, self._rows, self._at = self._keys[:0], self._rows[:0], {}


class Memory:
    """All namespaces; at most `entries_max` entries in all."""

    def __init__(self, width: int, entries_max: int, exact_max: int = EXACT_MAX) -> None:
        """Hold nothing yet."""
        self._width = width
        self._entries_max = entries_max
        self._exact_max = exact_max
        self._spaces: dict[bytes, Namespace] = {}
        self._order: OrderedDict[int, bytes] = OrderedDict()

    def __len__(self) -> int:
        return len(self._order)

    def add(self, namespace: bytes, key: int, vector: Vector) -> tuple[int, ...]:
        """Keep a vector; the keys that were given up for it."""
        self.remove(key)
        gone = []
        while len(self._order) >= self._entries_max:
            oldest = next(iter(self._order))
            self.remove(oldest)
            gone.append(oldest)
        space = self._spaces.get(namespace)
        if space is None:
            space = self._spaces[namespace] = Namespace(self._width, self._exact_max)
        space.add(key, vector)
        self._order[key] = namespace
        return tuple(gone)

    def remove(self, key: int) -> bool:
        """Forget a key; whether it was there."""
        namespace = self._order.pop(key, None)
        if namespace is None:
            return False
        space = self._spaces[namespace]
        space.remove(key)
        if not len(space):
            del self._spaces[namespace]
        return True

    def search(self, namespace: bytes, vector: Vector, k: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """The `k` nearest of one namespace, of no other."""
        space = self._spaces.get(namespace)
        return ((), ()) if space is None else space.search(vector, k)


class Recall:
    """The vectors of the last searches, so that a miss need not be encoded again when its answer is kept."""

    def __init__(self, most: int = 1024) -> None:
        """Remember at most `most`."""
        self._vectors: OrderedDict[int, Vector] = OrderedDict()
        self._most = most

    def put(self, number: int, vector: Vector) -> None:
        """Remember the vector of a request."""
        self._vectors[number] = vector
        if len(self._vectors) > self._most:
            self._vectors.popitem(last=False)

    def take(self, number: int) -> Vector | None:
        """The vector of a request, once; None where it is no longer remembered."""
        return self._vectors.pop(number, None)
