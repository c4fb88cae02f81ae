"""Blocks of prompts that an engine still holds: an LRU over block ids, as prefix (KV) caches have it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class BlockCache:
    """The blocks of one engine, the least recently touched given up first.  `capacity` None is without bound.

    `hits` of `looked` blocks were held when they were looked up.  Memory: one entry a block held.
    """

    __slots__ = ("_blocks", "_capacity", "hits", "looked")

    def __init__(self, capacity: int | None) -> None:
        """Hold at most `capacity` blocks; 0 holds nothing."""
        self._capacity = capacity
        self._blocks: OrderedDict[int, None] = OrderedDict()
        self.hits = self.looked = 0

    def __len__(self) -> int:
        """How many blocks are held."""
        return len(self._blocks)

    def touch(self, blocks: Sequence[int]) -> int:
        """Look up the blocks of a prompt in order, hold them all, and say how many leading ones were held.

        Only what is held from the beginning on saves work: a block's values depend on all before it.
        """
        held, capacity = self._blocks, self._capacity
        leading, unbroken = 0, True
        self.looked += len(blocks)
        if capacity == 0:
            return 0
        for block in blocks:
            if block in held:
                held.move_to_end(block)
                self.hits += 1
                leading += unbroken
            else:
                unbroken = False
                held[block] = None
                if capacity is not None and len(held) > capacity:
                    held.popitem(last=False)
        return leading
