"""Text as it comes: never half a character, never part of a stop text, and in the end what decoding at once gives."""

from __future__ import annotations

import functools
import itertools
import tempfile
import time
from typing import Any

import pytest
import tokenizers_by_hand as by_hand
from hypothesis import given, settings
from hypothesis import strategies as st

from hal.engine.text import TextStream, load_tokenizer

KINDS = {"byte-level": by_hand.byte_level, "pieces": by_hand.pieces, "unigram": by_hand.unigram,
         "word-piece": by_hand.word_piece}
ALL = [(kind, clean) for kind in KINDS for clean in (False, True)]
each_kind = pytest.mark.parametrize(("kind", "clean"), ALL, ids=[f"{k}{'-clean' * c}" for k, c in ALL])
BYTES = by_hand.byte_level()


@functools.cache
def loaded(kind: str, clean: bool) -> Any:
    """The tokenizer as an engine loads it, from a checkpoint that asks for spaces to be cleaned up, or does not."""
    with tempfile.TemporaryDirectory() as directory:
        KINDS[kind](clean).save_pretrained(directory)
        return load_tokenizer(directory)


@functools.cache
def bytes_of(kind: str, clean: bool) -> list[bytes]:
    """What each token adds to a text that has begun, from its name."""
    tokenizer = loaded(kind, clean)
    cleaned = {" .": ".", " !": "!"} if clean and kind == "word-piece" else {}  # tokenizers' decoder does these itself

    def one(token: int) -> bytes:
        name = tokenizer.convert_ids_to_tokens(token)
        if name in (*by_hand.SPECIAL, "<eos>"):
            return b""
        if kind in ("byte-level", "pieces") and token < 256:
            return bytes([token])
        if kind != "word-piece":
            return str(name.replace("▁", " ")).encode()
        text = name[2:] if name.startswith("##") else " " + name
        return cleaned.get(text, text).encode()

    return [one(token) for token in range(len(tokenizer))]


def ids(kind: str, clean: bool, **size: int) -> st.SearchStrategy[list[int]]:
    """Tokens of every sort; where tokens are bytes, whole characters, special tokens within these, and bad bytes."""
    count = len(bytes_of(kind, clean))
    parts = st.integers(0, count - 1).map(lambda i: [i])
    if kind in ("byte-level", "pieces"):
        special = st.sampled_from([i for i, each in enumerate(bytes_of(kind, clean)) if not each])
        whole = st.sampled_from("é€😀 a\ufffd").map(lambda c: list(c.encode()))
        broken = st.tuples(whole, special, st.integers(0, 3)).map(lambda t: [*t[0][:t[2]], t[1], *t[0][t[2]:]])
        parts = parts | whole | broken
    return st.lists(parts, **size).map(lambda lists: [token for part in lists for token in part])


def valid(tokenizer: Any, token_ids: list[int]) -> bool:
    return "\ufffd" not in tokenizer.decode(token_ids, skip_special_tokens=True)


def shown(stream: TextStream, token_ids: list[int]) -> list[str]:
    """The texts that a user sees, one token at a time, the last one complete."""
    texts = []
    for i, token in enumerate(token_ids):
        stream.append([token], last=i == len(token_ids) - 1)
        texts.append(stream.safe)
    return [*texts, stream.text]


@pytest.mark.slow
@each_kind
@settings(max_examples=100, deadline=None)
@given(st.data())
def test_the_text_is_that_of_the_bytes_however_the_tokens_come(kind: str, clean: bool, data: st.DataObject) -> None:
    tokenizer, table = loaded(kind, clean), bytes_of(kind, clean)
    prompt = [next(i for i, each in enumerate(table) if each.strip().isalpha()), *data.draw(ids(kind, clean))]
    output = data.draw(ids(kind, clean, min_size=1))
    before, after = (b"".join(table[i] for i in part) for part in (prompt, output))
    expected = added(before, after)

    at_once = TextStream(tokenizer, prompt, ())
    at_once.append(output, last=True)
    texts = shown(TextStream(tokenizer, prompt, ()), output)
    assert texts[-1] == at_once.text == expected
    assert all(b.startswith(a) for a, b in itertools.pairwise(texts))

    stream, at = TextStream(tokenizer, prompt, ()), 0
    while at < len(output):
        size = data.draw(st.integers(1, 5))
        stream.append(output[at:at + size])
        at += size
        held = added(before, b"".join(table[i] for i in output[:at])).removeprefix(stream.text)
        assert held in ("", "\ufffd", "\ufffd\ufffd")  # at most one incomplete character is held back
    stream.append([], last=True)
    assert stream.text == expected


def added(before: bytes, after: bytes) -> str:
    """What `after` adds to a text: all that follows the text of `before`, less its last bytes where `after` changes how
    these read; as few as can be."""
    both = (before + after).decode(errors="replace")
    starts = (before[:len(before) - n].decode(errors="replace") for n in range(4))
    return both[len(next(start for start in starts if both.startswith(start))):]


@pytest.mark.slow
@each_kind
@settings(max_examples=100, deadline=None)
@given(st.data())
def test_prompt_and_output_read_as_the_tokenizer_decodes_both(kind: str, clean: bool, data: st.DataObject) -> None:
    tokenizer = loaded(kind, clean)
    prompt, output = data.draw(ids(kind, clean, min_size=1)), data.draw(ids(kind, clean, min_size=1))
    if kind != "unigram" and not valid(tokenizer, prompt + output):
        return  # with bytes that are no UTF-8, tokenizers differ, and the test above says what ours is
    starts = (prompt[:end] for end in range(len(prompt), -1, -1))
    whole = next(start for start in starts if kind == "unigram" or valid(tokenizer, start))
    both, before = (tokenizer.decode(part, skip_special_tokens=True) for part in (prompt + output, whole))
    assert before + shown(TextStream(tokenizer, prompt, ()), output)[-1] == both


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 256), max_size=24))
def test_invalid_bytes_read_as_the_tokenizer_decodes_them(output: list[int]) -> None:
    assert shown(TextStream(BYTES, [97], ()), output)[-1] == BYTES.decode(output, skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["byte-level", "pieces"])
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_the_output_completes_a_character_of_the_prompt(kind: str, cut: int) -> None:
    token_ids = list("ß😀".encode())
    texts = shown(TextStream(loaded(kind, False), token_ids[:2 + cut], ()), [*token_ids[2 + cut:], *"b好".encode()])
    assert texts[-1] == "😀b好" and not any("\ufffd" in text for text in texts)
    texts = shown(TextStream(loaded(kind, False), token_ids[:2 + cut], ()), list(b"bc"))
    assert texts[-1] == "bc"  # not completed: the prompt's


def test_half_a_character_is_shown_only_at_the_end() -> None:
    stream = TextStream(BYTES, [97], ())
    stream.append(list("x€".encode()[:-1]))
    assert stream.text == "x"
    stream.append([], last=True)
    assert stream.text == "x\ufffd"


def test_tokens_that_are_bytes_objects() -> None:
    """As in tokenizers that checkpoints bring with them, made from tiktoken's."""
    class Tokenizer:
        def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
            return bytes(token_ids).decode(errors="replace")

        def convert_ids_to_tokens(self, token: int) -> bytes:
            return bytes([token])

    tokenizer = Tokenizer()
    assert shown(TextStream(tokenizer, [97], ()), list("a€".encode())) == ["a", "a", "a", "a€", "a€"]


@pytest.mark.parametrize("token", [0xFF, 0xE5], ids=["never valid", "never completed"])
@pytest.mark.parametrize("kind", ["byte-level", "pieces"])
def test_text_that_goes_on_ending_in_replacement_characters_is_shown_and_decoded_once(kind: str, token: int) -> None:
    tokenizer = KINDS[kind](False)
    decode, decoded = tokenizer.decode, []
    tokenizer.decode = lambda token_ids, **options: decoded.append(len(token_ids)) or decode(token_ids, **options)
    stream = TextStream(tokenizer, [97], ())
    decoded.clear()
    for n in range(1, 2001):
        stream.append([token])
        assert len(stream.text) >= n - 1
    assert sum(decoded) < 10 and set(stream.text) == {"\ufffd"}


def test_a_replacement_character_can_be_a_stop_text() -> None:
    stream = TextStream(loaded("unigram", False), [1], ["\ufffd"])
    token = loaded("unigram", False).convert_tokens_to_ids("\ufffd")
    stream.append([1, token, token])
    assert (stream.text, stream.stopped) == (" hello", True)


STOPS = st.lists(st.text("ab€", min_size=1, max_size=5), min_size=1, max_size=4)


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(st.text("ab€", max_size=30), STOPS, st.data())
def test_stop_texts(text: str, stops: list[str], data: st.DataObject) -> None:
    """Against a search in the whole text: the first to be complete, of those the longest, however the bytes come."""
    ends = [(at + len(stop), -len(stop)) for stop in stops for at in range(len(text)) if text.startswith(stop, at)]
    expected = text if not ends else text[:sum(min(ends))]
    stream, output, texts, at = TextStream(BYTES, [120], stops), list(text.encode()), [], 0
    while at < len(output):
        size = data.draw(st.integers(1, 4))
        stream.append(output[at:at + size], last=at + size >= len(output))
        at += size
        texts.append(stream.safe)
        if ends:
            assert stream.stopped == (at >= len(text[:min(ends)[0]].encode()))
        else:
            most = max(n for stop in stops for n in range(len(stop)) if stream.text.endswith(stop[:n]))
            assert stream.safe == stream.text[:len(stream.text) - most]  # no more is held back than must be
    assert (stream.text, stream.stopped) == (expected, bool(ends))
    assert all(expected.startswith(t) for t in texts)
    stream.append([97])
    assert stream.text == expected or not ends  # after a stop text it stays as it is


def test_a_stop_text_comes_in_pieces() -> None:
    stream = TextStream(BYTES, [120], ["END", "\n\n"])
    assert shown(stream, list(b"aE\nENx")) == ["a", "a", "aE", "aE\n", "aE\n", "aE\nENx", "aE\nENx"]
    stream = TextStream(BYTES, [120], ["END"])
    assert shown(stream, list(b"aENDx"))[-1] == "a" and stream.stopped


def test_the_cost_of_a_token_does_not_grow_with_the_length_of_a_stop_text() -> None:
    stream, begin = TextStream(BYTES, [120], ["a" * 100_000 + "b"]), time.perf_counter()
    for _ in range(2000):
        stream.append([97])
        assert stream.safe == ""
    assert time.perf_counter() - begin < 60  # trying each beginning of the stop text takes minutes
