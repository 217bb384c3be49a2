"""Declared types under hypothesis: identity of the codec, validity, near misses named, padding, and what goes wrong."""

from __future__ import annotations

import struct
import tracemalloc
import zlib
from typing import Annotated

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hal.contracts.inputs import PagedModelInput, WorkerInput
from hal.errors import InputError, SchemaError, WireError
from hal.schema import Array, Declared, Doc
from hal.testing.strategies import NearMiss, instances, near_misses

SLOW = [HealthCheck.too_slow]


class Step(Declared):
    """Everything a torch declaration can hold."""

    input_ids: Annotated[torch.Tensor, Array("int32", "num_tokens", low=0, high=99, doc="token ids")]
    query_start_loc: Annotated[torch.Tensor, Array("int32", "num_seqs + 1", pad="edge")]
    block_tables: Annotated[torch.Tensor, Array("int32", "num_seqs", "max_blocks")]
    pairs: Annotated[torch.Tensor, Array("int64", "2 * num_seqs", 3, pad=-1)]
    hidden: Annotated[torch.Tensor | None, Array("bfloat16", "num_tokens", 8, pad=1.5)] = None
    scale: Annotated[torch.Tensor | None, Array("float16", "num_seqs")] = None
    weight: Annotated[torch.Tensor | None, Array("bfloat16", "num_seqs", low=0, high=1)] = None
    mask: Annotated[torch.Tensor | None, Array("bool", "num_tokens", pad=True)] = None
    local: Annotated[torch.Tensor | None, Array("float32", "num_seqs", scope="driver")] = None
    max_query_len: Annotated[int, Doc("longest query")] = 0
    threshold: float | None = None
    is_prompt: bool = False
    phase: str = ""
    request_ids: tuple[str, ...] | None = None


class Host(Declared):
    """The numpy side."""

    rows: Annotated[np.ndarray, Array("int32", "num_rows")]
    params: Annotated[np.ndarray, Array("float32", "num_rows", 4)]
    copies: Annotated[np.ndarray | None, Array("int32", "num_copies", 2)] = None
    short: Annotated[np.ndarray | None, Array("int16", "num_rows")] = None
    step: int = 0


Runtime = Declared.declare("Runtime", hidden_states=Array("bfloat16", "num_tokens", 16),
                           residual=Array("float32", "num_tokens", 16))
TYPES: list[type[Declared]] = [Step, Host, Runtime]
every_type = pytest.mark.parametrize("cls", TYPES, ids=lambda c: c.__name__)


def same(a: Declared, b: Declared) -> None:
    for f in type(a).schema.fields:
        x, y = a[f.name], b[f.name]
        if f.scope != "replicated":
            assert y is None
        elif f.array is None or x is None:
            assert x == y and type(x) is type(y), f.name
        else:
            # Bytes, so that NaN equals itself.
            x, y = (v.view(torch.int16) if f.array.dtype == "bfloat16" else v for v in (x, y))
            assert x.shape == y.shape and x.dtype == y.dtype, f.name
            assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), f.name


@every_type
@given(data=st.data())
@settings(max_examples=200, deadline=None, suppress_health_check=SLOW)
def test_decode_of_encode_is_the_identity(cls: type[Declared], data: st.DataObject) -> None:
    instance = data.draw(instances(cls))
    same(instance, cls.from_buffer(instance.to_buffer()))


@every_type
@given(data=st.data())
@settings(max_examples=200, deadline=None, suppress_health_check=SLOW)
def test_valid_instances_validate(cls: type[Declared], data: st.DataObject) -> None:
    instance = data.draw(instances(cls))
    instance.validate("cpu" if cls.schema.kind == "tensor" else None)
    instance.check()
    cls.from_buffer(instance.to_buffer()).validate()


@pytest.mark.slow
@every_type
@given(data=st.data())
@settings(max_examples=200, deadline=None, suppress_health_check=SLOW)
def test_near_misses_are_refused_naming_the_field(cls: type[Declared], data: st.DataObject) -> None:
    miss: NearMiss = data.draw(near_misses(cls))
    with pytest.raises(InputError) as caught:
        miss.instance.validate("cpu" if cls.schema.kind == "tensor" else None)
        miss.instance.check()
    assert miss.field in caught.value.fields, f"{miss.why}: blamed {caught.value.fields}"
    assert miss.field in str(caught.value)


@pytest.mark.slow
@every_type
@given(data=st.data(), extra=st.integers(0, 5))
@settings(max_examples=200, deadline=None, suppress_health_check=SLOW)
def test_padding_keeps_real_rows_and_fills_the_rest(cls: type[Declared], data: st.DataObject, extra: int) -> None:
    instance = data.draw(instances(cls, min_size=1))
    packed = cls.schema.pack(instance)
    wide = packed.padded(**{s: n + extra for s, n in packed.dims.items()})
    wide.to().validate()
    assert wide.values == packed.values
    for name, array in packed.arrays.items():
        spec, grown = cls.schema.by_name[name].array, wide.arrays[name]
        assert spec is not None
        assert grown[tuple(map(slice, array.shape))].tobytes() == array.tobytes()
        rest = grown[array.shape[0]:]
        if spec.pad == "edge":
            assert all(row.tobytes() == array[-1].tobytes() for row in rest)
        elif spec.dtype == "bfloat16":
            assert (rest == torch.tensor(spec.pad, dtype=torch.bfloat16).view(torch.uint16).item()).all()
        else:
            assert (rest == spec.pad).all()


@pytest.mark.slow
@given(data=st.data(), cut=st.integers(0, 10_000), flip=st.integers(0, 10_000))
@settings(max_examples=300, deadline=None, suppress_health_check=SLOW)
def test_truncated_or_damaged_heads_are_refused(data: st.DataObject, cut: int, flip: int) -> None:
    wire = data.draw(instances(Step)).to_buffer()
    with pytest.raises(WireError):
        Step.from_buffer(bytearray(wire[: cut % wire.nbytes].tobytes()))
    damaged = wire.copy()
    damaged[flip % 40] ^= 1 + flip % 255
    with pytest.raises(WireError):
        Step.from_buffer(damaged)
    with pytest.raises(WireError, match="another schema"):
        Host.from_buffer(wire)


class Sparse(Declared):
    """An optional array whose symbols no other field has; one without elements may claim any width."""

    rows: Annotated[np.ndarray, Array("int32", "n", "width")]
    pairs: Annotated[np.ndarray | None, Array("int32", "num_pairs", 2)] = None
    wide: Annotated[np.ndarray | None, Array("int64", "n", "width", "depth")] = None
    own: Annotated[np.ndarray | None, Array("int32", "num_own", scope="driver")] = None
    score: float | None = None
    flag: bool = False
    name: str = "hello"
    names: tuple[str, ...] = ()


def rewritten(message: np.ndarray, form: str, at: int, value: int) -> np.ndarray:
    """The message with one number of its head replaced, or of its texts, and the CRC that belongs to it."""
    head = 40 + Sparse.schema.head.size
    out = bytearray(message)
    struct.pack_into("<" + form, out, at, value)
    texts = min(struct.unpack_from("<Q", out, 32)[0], len(out) - head)
    struct.pack_into("<I", out, 4, zlib.crc32(out[len(out) - texts:], zlib.crc32(out[8:head])))
    return np.frombuffer(bytes(out), np.uint8)


NO_ROWS = Sparse(rows=np.zeros((0, 3), np.int32), wide=np.zeros((0, 3, 2), np.int64), name="some")
# Presence bits: pairs 1, wide 2, score 4, own 8. Symbols: n, width, num_pairs, depth, num_own.
FORGED = [
    ("size of a text", "I", -12, 3, "corrupt"), ("size of a text", "I", -12, 100, "corrupt|of another size"),
    ("count of a text", "I", -16, 0, "corrupt"), ("count of no texts", "I", -8, 2, "corrupt|of another size"),
    ("size of no texts", "I", -4, 2**32 - 1, "corrupt|of another size"),
    ("texts' size", "Q", 32, 0, "contradicts"), ("texts' size", "Q", 32, 2**64 - 1, "contradicts|corrupt"),
    ("dimension", "Q", 48, 2**61, "out of range"), ("dimension", "Q", 48, 2**64 - 1, "out of range"),
    ("product", "Q", 64, 2**62, "out of range"), ("absent array's dimension", "Q", 56, 1, "does not have"),
    ("absent array's dimension", "Q", 56, 2**63, "does not have"), ("local array's", "Q", 72, 4, "does not have"),
    ("bit of a local array", "Q", 24, 2 | 8, "does not have"), ("bit of no field", "Q", 24, 2 | 2**63, "does not have"),
    ("absent scalar", "d", 80, 1, "has a value"), ("bool", "B", 88, 2, "0 or 1")]


@pytest.mark.parametrize(("what", "form", "at", "value", "words"), FORGED)
def test_forged_messages_are_refused_without_allocating_what_they_claim(what: str, form: str, at: int, value: int,
                                                                        words: str) -> None:
    """With the right CRC, so that only the meaning of the numbers can be at fault."""
    message = NO_ROWS.to_buffer()
    assert Sparse.from_buffer(rewritten(message, "Q", 16, len(message)))  # nothing changed
    forged = rewritten(message, form, at if at > 0 else len(message) + at, value)
    tracemalloc.start()
    with pytest.raises(WireError, match=words):
        Sparse.from_buffer(forged)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000


def test_a_message_has_its_stated_size_and_its_checksum_covers_texts() -> None:
    message = Sparse(rows=np.ones((2, 3), np.int32), names=("ä", "b")).to_buffer()
    for spoilt in (bytes(message) + b"\0", bytes(message)[:-1], bytes(message).replace(b"hello", b"jello")):
        with pytest.raises(WireError):
            Sparse.from_buffer(spoilt)
    with pytest.raises(InputError, match="surrogate"):
        Sparse(rows=np.zeros((0, 0), np.int32), name="\ud800").to_buffer()


def test_fields_of_the_sender_alone_do_not_travel() -> None:
    """Neither the sizes of symbols that no array of the message has, nor the presence of local arrays."""
    packed = Sparse.schema.allocate({"n": 1, "width": 2, "num_pairs": 7, "num_own": 5}, ["own"])
    assert packed.dims == {"n": 1, "width": 2, "num_pairs": 0, "depth": 0, "num_own": 5}
    arrived = Sparse.schema.unpack(packed.message.copy())
    assert arrived.dims == {**packed.dims, "num_own": 0} and "own" not in arrived.arrays


def test_checks_do_not_allocate_by_a_claimed_dimension_and_refuse_nan() -> None:
    ints = torch.zeros(0, dtype=torch.int32)
    empty = PagedModelInput(input_ids=ints, positions=ints, slot_mapping=ints, seq_lens=ints, logits_indices=ints,
                            query_start_loc=torch.zeros(1, dtype=torch.int32), block_size=4,
                            block_tables=torch.zeros(0, 2**31 - 1, dtype=torch.int32))
    arrived = PagedModelInput.from_buffer(empty.to_buffer())
    tracemalloc.start()
    arrived.validate("cpu")
    arrived.check()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000
    arrived.block_size = 2**40
    with pytest.raises(InputError, match="block_size"):
        arrived.check()
    nan = Step(input_ids=ints, query_start_loc=torch.zeros(2, dtype=torch.int32), pairs=torch.zeros(2, 3).long(),
               block_tables=torch.zeros(1, 0, dtype=torch.int32), weight=torch.tensor([torch.nan]).bfloat16())
    with pytest.raises(InputError, match="weight"):
        nan.check()


@given(instance=instances(Step))
@settings(max_examples=200, deadline=None, suppress_health_check=SLOW)
def test_alignment_and_views(instance: Step) -> None:
    packed = Step.schema.pack(instance)
    base = packed.buffer.__array_interface__["data"][0]
    end = base + packed.buffer.nbytes
    assert base % 64 == 0
    arrived = packed.message.copy()
    decoded = Step.from_buffer(arrived)
    at = arrived.__array_interface__["data"][0]
    for name, array in packed.arrays.items():
        here = array.__array_interface__["data"][0]
        assert here % 64 == 0 and base <= here and here + array.nbytes <= end
        if decoded[name] is not None and array.size:
            assert at <= decoded[name].data_ptr() < at + arrived.nbytes  # a view of the message, not a copy


def test_the_packed_buffer_is_the_only_allocation_on_the_wire_path() -> None:
    big = Step(input_ids=torch.zeros(1 << 20, dtype=torch.int32), query_start_loc=torch.zeros(2, dtype=torch.int32),
               block_tables=torch.zeros(1, 4, dtype=torch.int32), pairs=torch.zeros(2, 3, dtype=torch.int64))
    wire = big.to_buffer()
    tracemalloc.start()
    kept = big.to_buffer()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    decoded = Step.from_buffer(wire)
    _, decode_peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept.nbytes <= peak < kept.nbytes + 20_000
    assert decode_peak - before < 20_000
    assert decoded.input_ids.numel() == 1 << 20


def test_only_replicated_fields_enter_the_fingerprint() -> None:
    def make(**changes: object) -> type[Declared]:
        base = {"dtype": "int32", "pad": 0, **changes}
        dtype = str(base.pop("dtype"))
        return Declared.declare("Same", x=Array(dtype, "n", **base))  # type: ignore[arg-type]

    assert make().schema.fingerprint == make(doc="other words").schema.fingerprint
    assert len({make(**c).schema.fingerprint for c in ({}, {"dtype": "int64"}, {"pad": 1})}) == 3


@pytest.mark.parametrize("bad, what", [
    (lambda: Array("int33", "n"), "unknown dtype"),
    (lambda: Array("int32", "n - 1"), "cannot read a dimension"),
    (lambda: Array("int32", -1), "negative"),
    (lambda: Declared.declare("X"), "declares no field"),
    (lambda: type("X", (Declared,), {"__annotations__": {"a": dict}}), "cannot be declared"),
    (lambda: type("X", (Declared,), {"__annotations__": {"a": int | str}}), "union"),
    (lambda: Declared.declare("X", a=Array("int32", "n", scope="driver")), "never travels"),
])
def test_wrong_declarations(bad: object, what: str) -> None:
    with pytest.raises(SchemaError, match=what):
        bad()  # type: ignore[operator]


def test_text_with_nul_and_bucket_too_small() -> None:
    with pytest.raises(InputError, match="NUL"):
        Host2(name="a\0b", rows=np.zeros(1, np.int32)).to_buffer()
    with pytest.raises(InputError, match="bucket") as caught:
        Host2(name="a", rows=np.zeros(4, np.int32)).padded(n=3)
    assert caught.value.field == "n"


class Host2(Declared):
    rows: Annotated[np.ndarray, Array("int32", "n")]
    name: str = ""


def test_markdown_lists_every_field() -> None:
    table = Step.schema.markdown()
    assert all(f"`{f.name}`" in table for f in Step.schema.fields) and "token ids" in table


def raw(array: torch.Tensor | np.ndarray) -> bytes:
    if isinstance(array, torch.Tensor):
        array = (array.view(torch.int16) if array.dtype == torch.bfloat16 else array).numpy()
    return array.tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("cls", [Step, Host], ids=lambda c: c.__name__)
@settings(max_examples=200, deadline=None, suppress_health_check=SLOW)
@given(data=st.data())
def test_ranks_with_equal_replicated_fields_have_one_checksum(cls: type[Declared], data: st.DataObject) -> None:
    """Sent, received and put together anew, whatever lies in the gaps, and whatever a rank has for itself."""
    instance = data.draw(instances(cls))
    expected = instance.checksum()
    assert cls.from_buffer(instance.to_buffer()).checksum() == expected
    fields = {f.name: instance[f.name] for f in cls.schema.fields}
    alone = {f.name: None for f in cls.schema.fields if f.scope != "replicated"}
    assert cls(**fields).checksum() == cls(**{**fields, **alone}).checksum() == expected
    changed = data.draw(st.sampled_from([f for f in cls.schema.fields if f.scope == "replicated"]))
    value = fields[changed.name]
    if changed.array is not None and value is not None and 0 not in value.shape:
        other = value.clone() if isinstance(value, torch.Tensor) else value.copy()
        flat = other.reshape(-1)
        flat[-1] = not flat[-1] if changed.array.dtype == "bool" else flat[-1] + 1
        # In few bits, a number and one may be the number; and NaN is no other NaN.
        different = raw(other) != raw(value)
    else:
        other = {"int": 7, "bool": True, "str": "else", "texts": ("else",)}.get(changed.kind)
        different = changed.array is None and other != value and (other is not None or changed.optional)
    if different:
        assert cls(**{**fields, changed.name: other}).checksum() != expected


def test_encode_reuses_the_buffer_an_instance_was_made_from() -> None:
    packed = WorkerInput.schema.allocate({"num_copies": 2}, ["blocks_to_copy"])
    packed.arrays["blocks_to_copy"][...] = 7
    step = packed.to()
    assert np.shares_memory(step.to_buffer(), packed.buffer) and step.dims["num_copies"] == 2
    step.blocks_to_copy = np.zeros((1, 2), np.int32)  # replaced: the old buffer no longer says what the instance does
    again = WorkerInput.from_buffer(step.to_buffer())
    assert again.blocks_to_copy is not None and again.blocks_to_copy.tolist() == [[0, 0]]
    assert step.dims["num_copies"] == 1
