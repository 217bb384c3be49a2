"""Two tokenizers of the kinds there are: bytes (GPT-2's alphabet), and SentencePiece pieces that fall back to bytes."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

EOS = 256
PIECES = ("▁the", "▁cat", "s", "▁", "a", ".", "▁été", "é")


def byte_level() -> PreTrainedTokenizerFast:
    """Token id = byte; 256 ends a sequence."""
    tokenizer = Tokenizer(models.BPE({char: byte for byte, char in bytes_to_unicode().items()}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", clean_up_tokenization_spaces=False)


def pieces() -> PreTrainedTokenizerFast:
    """Ids 0 to 255 are bytes, then PIECES; a text's first space is no space."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {piece: 256 + i for i, piece in enumerate(PIECES)}
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def save_byte_level(directory: Path) -> None:
    byte_level().save_pretrained(directory)
