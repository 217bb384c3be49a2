"""The block pool against a model of it: who holds what, what is findable, what is evicted first."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from hal.engine.blocks import BlockManager, extend_hashes

NAMES = "allocate", "take", "register", "share", "release", "distrust"
OPERATIONS = st.lists(st.tuples(st.sampled_from(NAMES), st.integers(0, 50)), max_size=60)


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 9), OPERATIONS)
def test_no_block_has_two_owners_or_none(num_blocks: int, operations: list[tuple[str, int]]) -> None:
    pool = BlockManager(num_blocks)
    held: list[int] = []  # one entry for each hold
    cached: dict[bytes, int] = {}  # by our own book-keeping
    released: list[int] = []  # cached and held by nobody, oldest first
    for name, n in operations:
        if name == "allocate" and pool.num_free:
            unused = set(range(1, num_blocks)) - set(held) - set(released)
            block = pool.allocate()
            assert block in unused if unused else block == released.pop(0)
            cached = {key: b for key, b in cached.items() if b != block}
            held.append(block)
        elif name == "take":
            count = n % (pool.num_free + 1)
            unused = set(range(1, num_blocks)) - set(held) - set(released)
            blocks = pool.take(count)
            evicted, released = released[:max(count - len(unused), 0)], released[max(count - len(unused), 0):]
            assert set(blocks) - unused == set(evicted) and len(set(blocks)) == count
            cached = {key: b for key, b in cached.items() if b not in blocks}
            held += blocks
        elif name == "register" and held:
            block, key = held[n % len(held)], bytes([n % 7])
            pool.register(block, key, bytes([n % 7 % 2]))
            if key not in cached and block not in cached.values():
                cached[key] = block
        elif name == "share":
            found = pool.match([bytes([n % 7])])
            assert found == [cached[bytes([n % 7])]] if bytes([n % 7]) in cached else not found
            assert pool.num_idle(found) == sum(b not in held for b in found)
            pool.share(found)
            held += found
            released = [b for b in released if b not in found]
        elif name == "release" and held:
            block = held.pop(n % len(held))
            pool.release([block])
            if block not in held and block in cached.values():
                released.append(block)
        elif name == "distrust":
            pool.distrust(bytes([n % 2]))
            cached = {key: b for key, b in cached.items() if key[0] % 2 != n % 2}
            released = [b for b in released if b in cached.values()]
        assert pool.refs == [held.count(b) for b in range(num_blocks)]
        assert pool.num_free == num_blocks - 1 - len(set(held))


def test_the_end_of_a_prefix_is_evicted_before_its_beginning() -> None:
    pool = BlockManager(4)
    blocks = [pool.allocate() for _ in range(3)]
    for block in blocks:
        pool.register(block, bytes([block]), b"root")
    pool.release(blocks)
    assert [pool.allocate() for _ in range(3)] == blocks[::-1]


def test_hashes_address_prefixes() -> None:
    def hashes(tokens: list[int]) -> list[bytes]:
        found: list[bytes] = []
        extend_hashes(found, lambda start, end: tokens[start:end], 2, len(tokens) // 2)
        return found

    a, b, c = hashes([1, 2, 3, 4, 5]), hashes([1, 2, 3, 5]), hashes([9, 2, 3, 4])
    assert len(a) == 2 and a[0] == b[0] and a[1] != b[1]
    assert not set(a) & set(c)  # the same second block after another first one is another prefix
    grown = a[:1]
    extend_hashes(grown, lambda start, end: [1, 2, 3, 4][start:end], 2, 2)
    assert grown == a


def test_without_prefix_caching_nothing_is_found() -> None:
    pool = BlockManager(3, prefix_caching=False)
    pool.register(pool.allocate(), b"x", b"x")
    assert pool.match([b"x"]) == []
