"""Tokenizers of the kinds there are, small enough that each token's bytes are known."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

EOS = 256
PIECES = ("▁the", "▁cat", "s", "▁", "a", ".", "▁été", "é")
WORDS = ("▁hello", "▁", "!", "▁été", "n", "▁n", "'t", ",", "😀", "\ufffd")
SPECIAL = ("<s>", "</s>", "<|im_end|>")


def byte_level(clean: bool = False) -> PreTrainedTokenizerFast:
    """GPT-2's alphabet: token id = byte; 256 ends a sequence."""
    tokenizer = Tokenizer(models.BPE({char: byte for byte, char in bytes_to_unicode().items()}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", clean_up_tokenization_spaces=clean)


def pieces(clean: bool = False) -> PreTrainedTokenizerFast:
    """SentencePiece: ids 0 to 255 are bytes, then PIECES and SPECIAL. <s> begins a text; its first space is dropped."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {piece: 256 + i for i, piece in enumerate(PIECES)}
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    return _with_special(tokenizer, clean)


def unigram(clean: bool = False) -> PreTrainedTokenizerFast:
    """Unigram: <unk>, then WORDS and SPECIAL."""
    scores = [("<unk>", 0.0), *((word, -1.0 - i) for i, word in enumerate(WORDS))]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=0))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return _with_special(tokenizer, clean)


def word_piece(clean: bool = False) -> PreTrainedTokenizerFast:
    """WordPiece: <unk>, WORDS as pieces of words, words that follow a space, then SPECIAL."""
    names = ["<unk>", *("##" + word for word in WORDS if "▁" not in word), "hello", "été", "n", ".", "!", "'"]
    tokenizer = Tokenizer(models.WordPiece({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.decoder = decoders.WordPiece(cleanup=clean)
    return _with_special(tokenizer, clean)


def _with_special(tokenizer: Tokenizer, clean: bool) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    begin = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", clean_up_tokenization_spaces=clean)


def save_byte_level(directory: Path) -> None:
    byte_level().save_pretrained(directory)
