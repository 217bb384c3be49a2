"""The KV block pool: reference counts, prefix caching, and the host pool that preempted sequences are swapped to."""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from hashlib import blake2b

_EMPTY = blake2b(digest_size=16)  # a copy of it is made in less time than a new one


def extend_hashes(hashes: list[bytes], tokens: Callable[[int, int], list[int]], block_size: int, count: int,
                  root: bytes = b"") -> None:
    """Grow `hashes` to the first `count` full blocks; `tokens(start, end)` gives the token ids there. A block's
    address is BLAKE2b-128 over its parent's address and its tokens. So equal addresses mean equal prefixes: nobody can
    construct a collision. `root` stands for the address of the first block's parent: prefixes with other roots are
    never equal."""
    pack = _packer(block_size)
    for i in range(len(hashes), count):
        address = _EMPTY.copy()
        address.update((hashes[i - 1] if i else root) + pack(*tokens(i * block_size, (i + 1) * block_size)))
        hashes.append(address.digest())


@cache
def _packer(block_size: int) -> Callable[..., bytes]:
    return struct.Struct(f"<{block_size}i").pack


class BlockManager:
    """The owner of all KV block ids of an engine; the memory of the blocks belongs to the ranks. Blocks are numbered
    from 1 to num_blocks - 1; block 0 is the null block. A full block may be registered under the hash of its prefix. A
    registered block that has no holder can still be found, until it is evicted: blocks are evicted when one is needed,
    the least recently released one first.

    Args:
        num_blocks: device blocks, the null block included. num_cpu_blocks: host blocks, from 0.
        prefix_caching: False finds and registers nothing.
    """

    def __init__(self, num_blocks: int, num_cpu_blocks: int = 0, *, prefix_caching: bool = True) -> None:
        self.num_blocks, self.num_cpu_blocks, self.prefix_caching = num_blocks, num_cpu_blocks, prefix_caching
        self.refs = [0] * num_blocks
        self._unused = list(range(num_blocks - 1, 0, -1))
        self._evictable: OrderedDict[int, None] = OrderedDict()  # registered blocks without a holder, oldest first
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._root_of: list[bytes] = [b""] * num_blocks  # of registered blocks: the hash of their prefix's first block
        self._cached: dict[bytes, int] = {}
        self._unused_host = list(range(num_cpu_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can give, cached ones included."""
        return len(self._unused) + len(self._evictable)

    @property
    def num_free_host(self) -> int:
        return len(self._unused_host)

    def allocate(self) -> int:
        """A block whose only holder is the caller; `num_free` must be above 0."""
        if self._unused:
            block = self._unused.pop()
        else:
            block, _ = self._evictable.popitem(last=False)
            self._forget(block)
        self.refs[block] = 1
        return block

    def take(self, count: int) -> list[int]:
        """`count` times `allocate`."""
        if count > len(self._unused):
            return [self.allocate() for _ in range(count)]
        ids = self._unused[:-count - 1:-1]
        del self._unused[len(self._unused) - count:]
        for block in ids:
            self.refs[block] = 1
        return ids

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """The blocks of the longest cached prefix. They get no holder: `share` them before anything is allocated."""
        found: list[int] = []
        if self.prefix_caching:
            for key in hashes:
                block = self._cached.get(key)
                if block is None:
                    break
                found.append(block)
        return found

    def num_idle(self, blocks: Iterable[int]) -> int:
        """How many of these cached blocks have no holder: sharing them takes that many from `num_free`."""
        return sum(self.refs[b] == 0 for b in blocks)

    def share(self, blocks: Iterable[int]) -> None:
        """Add a holder to each block."""
        for block in blocks:
            if self.refs[block] == 0:
                del self._evictable[block]
            self.refs[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Remove a holder of each block. The end of a prefix becomes evictable before its beginning."""
        for block in reversed(blocks):
            self.refs[block] -= 1
            if self.refs[block] == 0:
                if self._hash_of[block] is None:
                    self._unused.append(block)
                else:
                    self._evictable[block] = None

    def register(self, block: int, key: bytes, root: bytes) -> None:
        """Make a block findable. The caller holds it, it is full, and the steps issued so far decide its content.
        If two blocks have the same address, the first one stays registered.

        Args:
            key: the address of the block. root: the address of the first block of its prefix.
        """
        if self.prefix_caching and self._hash_of[block] is None and self._cached.setdefault(key, block) == block:
            self._hash_of[block], self._root_of[block] = key, root

    def distrust(self, root: bytes) -> None:
        """Remove from the prefix cache every block whose prefix begins with this first block."""
        for block, key in enumerate(self._hash_of):
            if key is not None and self._root_of[block] == root:
                self._forget(block)
                if self.refs[block] == 0:
                    del self._evictable[block]
                    self._unused.append(block)

    def allocate_host(self, count: int) -> list[int]:
        """`num_free_host` must be at least count."""
        return [self._unused_host.pop() for _ in range(count)]

    def release_host(self, blocks: Iterable[int]) -> None:
        self._unused_host.extend(blocks)

    def _forget(self, block: int) -> None:
        key = self._hash_of[block]
        assert key is not None
        del self._cached[key]
        self._hash_of[block] = None
