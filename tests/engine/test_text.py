"""Text as it comes: never half a character, never part of a stop text, and in the end what decoding at once gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers_by_hand
from hypothesis import given, settings
from hypothesis import strategies as st

from hal.engine.text import TextStream, load_tokenizer
from hal.errors import ModelLoadError

BYTES, PIECES = tokenizers_by_hand.byte_level(), tokenizers_by_hand.pieces()
WORDS = st.text("ab é€😀\n", max_size=12)


def shown(stream: TextStream, token_ids: list[int]) -> list[str]:
    """The texts that a user sees, one token at a time, the last one complete."""
    texts = []
    for i, token in enumerate(token_ids):
        stream.append([token], last=i == len(token_ids) - 1)
        texts.append(stream.safe)
    return [*texts, stream.text]


@settings(max_examples=200, deadline=None)
@given(WORDS.filter(bool), st.lists(st.integers(0, 255), max_size=24) | WORDS.map(lambda t: list(t.encode())))
def test_bytes(prompt: str, token_ids: list[int]) -> None:
    texts = shown(TextStream(BYTES, list(prompt.encode()), ()), token_ids)
    assert texts[-1] == BYTES.decode(token_ids)
    assert all(texts[-1].startswith(text) for text in texts)


PARTS = st.integers(256, 263).map(lambda i: [i]) | st.sampled_from("é€😀").map(lambda c: list(c.encode()))


@settings(max_examples=200, deadline=None)
@given(st.lists(PARTS, min_size=1, max_size=9), st.lists(PARTS, max_size=9))
def test_pieces(before: list[list[int]], after: list[list[int]]) -> None:
    prompt, token_ids = ([token for part in parts for token in part] for parts in (before, after))
    texts = shown(TextStream(PIECES, prompt, ()), token_ids)
    assert PIECES.decode(prompt) + texts[-1] == PIECES.decode(prompt + token_ids) and "\ufffd" not in "".join(texts)
    assert all(texts[-1].startswith(text) for text in texts)


@pytest.mark.parametrize("tokenizer", [BYTES, PIECES], ids=["bytes", "pieces"])
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_the_output_completes_a_character_of_the_prompt(tokenizer: object, cut: int) -> None:
    token_ids = list("😀".encode())
    texts = shown(TextStream(tokenizer, [97 if tokenizer is BYTES else 260, *token_ids[:cut]], ()),
                  [*token_ids[cut:], *b"bc"])
    assert texts[-1] == "😀bc" and not any("\ufffd" in text for text in texts)


def test_half_a_character_is_shown_only_at_the_end() -> None:
    stream = TextStream(BYTES, [97], ())
    stream.append(list("x€".encode()[:-1]))
    assert stream.text == ""
    stream.append([], last=True)
    assert stream.text == "x\ufffd"


@settings(max_examples=300, deadline=None)
@given(st.text("ab€", max_size=20), st.lists(st.text("ab€", min_size=1, max_size=4), min_size=1, max_size=3))
def test_stop_texts(text: str, stops: list[str]) -> None:
    stream = TextStream(BYTES, [120], stops)
    ends = [(at + len(stop.encode()), at) for stop in stops if (at := text.encode().find(stop.encode())) >= 0]
    texts, count = [], 0
    for token in text.encode():
        stream.append([token])
        count += 1
        texts.append(stream.safe)
        if stream.stopped:
            break
    if not ends:
        assert not stream.stopped and stream.text == text
    else:
        assert stream.stopped and count == min(ends)[0]  # at the token that completes the first of them
        longest = min(at for end, at in ends if end == count)
        assert len(stream.text.encode()) == longest
        stream.append([97])
        assert len(stream.text.encode()) == longest  # it stays as it is
    final = stream.text
    assert all(final.startswith(t) for t in texts) and not any(stop in t for stop in stops for t in [final, *texts])


def test_a_stop_text_comes_in_pieces() -> None:
    stream = TextStream(BYTES, [120], ["END", "\n\n"])
    assert shown(stream, list(b"aE\nENx")) == ["a", "a", "aE", "aE\n", "aE\n", "aE\nENx", "aE\nENx"]
    stream = TextStream(BYTES, [120], ["END"])
    assert shown(stream, list(b"aENDx"))[-1] == "a" and stream.stopped


def test_a_directory_without_tokenizer(tmp_path: Path) -> None:
    assert load_tokenizer(str(tmp_path)) is None


def test_a_damaged_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelLoadError, match="tokenizer cannot be read"):
        load_tokenizer(str(tmp_path))
