"""A checkpoint's tokenizer: what loading it runs, what it puts before a prompt, stop texts that are special tokens."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import pytest
import tokenizers_by_hand as by_hand
from tokenizers import Tokenizer, decoders, models, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hal.checkpoints.tokenizer import known_class, settings_of
from hal.cli import main
from hal.config import EngineConfig
from hal.engine.llm import LLM
from hal.engine.text import TokenBytes, encode, hidden_stops, load_tokenizer
from hal.errors import ConfigError, ModelLoadError, RequestError
from hal.sampling.params import SamplingParams

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 267, "hidden_size": 8,
          "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 8,
          "max_position_embeddings": 128, "eos_token_id": None, "bos_token_id": None}
ROOT = Path(__file__).parents[2]


def test_a_directory_without_tokenizer(tmp_path: Path) -> None:
    assert load_tokenizer(str(tmp_path)) is None


def test_a_damaged_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelLoadError, match="tokenizer cannot be read"):
        load_tokenizer(str(tmp_path))


def test_a_text_without_tokens_is_refused(tmp_path: Path) -> None:
    """The vocabulary has neither the words of the text nor an entry for unknown ones."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    made = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(tmp_path)
    options = {"device": "cpu", "random_weights": True, "num_blocks": 16}
    with LLM(str(tmp_path), **options) as llm, LLM(str(tmp_path), **options, pooling="last") as embedder:
        assert len(llm.generate("a", SamplingParams(max_tokens=1))) == 1 and embedder.embed("a").shape == (1, 8)
        for call in (llm.generate, embedder.embed, TokenBytes.of(llm.tokenizer).plain):
            with pytest.raises(RequestError, match="the tokenizer cannot encode the text") as caught:
                call("c")
            assert "give token ids" in str(caught.value)


def test_a_decoder_that_looks_at_neighbours(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE({"a</w>": 0, "b</w>": 1, "c": 2}, []))
    tokenizer.decoder = decoders.BPEDecoder()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match="BPEDecoder"):
        load_tokenizer(str(tmp_path))


# Code of a checkpoint.

def in_tokenizer_config(settings: dict[str, Any], config: dict[str, Any]) -> None:
    settings |= {"auto_map": {"AutoTokenizer": ["mine.T", None]}, "tokenizer_class": "T"}


def in_tokenizer_config_as_a_list(settings: dict[str, Any], config: dict[str, Any]) -> None:
    settings |= {"auto_map": [None, "mine.T"], "tokenizer_class": "T"}


def in_tokenizer_config_without_a_class(settings: dict[str, Any], config: dict[str, Any]) -> None:
    settings |= {"auto_map": {"AutoTokenizer": ["mine.T", None]}}
    settings.pop("tokenizer_class")


def in_config(settings: dict[str, Any], config: dict[str, Any]) -> None:
    config |= {"auto_map": {"AutoTokenizer": ["mine.T", None], "AutoConfig": "mine.C"}}
    settings.pop("tokenizer_class")


NEEDED = [in_tokenizer_config, in_tokenizer_config_as_a_list, in_tokenizer_config_without_a_class, in_config]


def config_class(settings: dict[str, Any], config: dict[str, Any]) -> None:
    config |= {"auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M",
                            "AutoTokenizer": ["mine.T", None]}}


def unneeded(settings: dict[str, Any], config: dict[str, Any]) -> None:
    settings |= {"auto_map": {"AutoTokenizer": ["mine.T", None]}, "tokenizer_class": "PreTrainedTokenizerFast"}


def checkpoint(directory: Path, change: Callable[[dict[str, Any], dict[str, Any]], None] | None = None) -> str:
    """A model without weights, whose tokenizer may be code of its own; a file RAN says that the code ran."""
    by_hand.pieces().save_pretrained(directory)
    settings, config = json.loads((directory / "tokenizer_config.json").read_text()), dict(CONFIG)
    if change is not None:
        change(settings, config)
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "mine.py").write_text(
        f"open({str(directory / 'RAN')!r}, 'w').close()\n"
        "from transformers import LlamaConfig, PreTrainedTokenizerFast\n"
        "class T(PreTrainedTokenizerFast): pass\nclass C(LlamaConfig): pass\n")
    return str(directory)


class NoInput:
    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"standard input was touched: {name}")


@pytest.mark.parametrize("change", NEEDED)
def test_code_that_is_not_trusted_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                               change: Callable[..., None]) -> None:
    monkeypatch.setattr(sys, "stdin", NoInput())
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("a question was asked"))
    with pytest.raises(ModelLoadError, match=r"not trusted[\s\S]*mine\.T[\s\S]*--trust-remote-code"):
        LLM(checkpoint(tmp_path, change), device="null", num_blocks=16)
    assert not (tmp_path / "RAN").exists()


@pytest.mark.parametrize("change", [unneeded, config_class])
def test_code_that_is_not_needed_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                               change: Callable[..., None]) -> None:
    monkeypatch.setattr(sys, "stdin", NoInput())
    with LLM(checkpoint(tmp_path, change), device="null", num_blocks=16) as llm:
        assert llm.generate("a", SamplingParams(max_tokens=2))[0].finish_reason == "length"
    assert not (tmp_path / "RAN").exists()


@pytest.mark.slow
def test_code_that_is_trusted_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "stdin", NoInput())
    code = f"from hal.engine.text import load_tokenizer; load_tokenizer({checkpoint(tmp_path, NEEDED[0])!r}, " \
           "trust_remote_code=True)"
    assert forked.run([sys.executable, "-c", code], check=False, stdin=subprocess.DEVNULL).returncode == 0
    assert (tmp_path / "RAN").exists()


@pytest.mark.slow
def test_the_command_line_trusts_nobody_unless_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = checkpoint(tmp_path, NEEDED[0])
    done = forked.run([sys.executable, "-m", "hal", "generate", "--device", "cpu", "--model", directory, "a",
                       "--max-model-len", "64"], input="y\n" * 5, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and not (tmp_path / "RAN").exists()
    assert "--trust-remote-code" in done.stderr and "Traceback" not in done.stderr
    main(["generate", "--help"])
    assert "--trust-remote-code" in capsys.readouterr().out


@pytest.mark.parametrize("value", ["no", 1, None])
def test_only_true_means_trust(value: Any) -> None:
    with pytest.raises(ConfigError, match="trust_remote_code"):
        EngineConfig(trust_remote_code=value)


@pytest.mark.parametrize(("kind", "name"), [
    ("llama", "PreTrainedTokenizerFast"), ("llama", "LlamaTokenizerFast"), ("qwen2", "Qwen2Tokenizer"),
    ("qwen3", "Qwen2TokenizerFast"), ("gemma3_text", "GemmaTokenizerFast"), ("mistral", "LlamaTokenizer"),
    ("phi3", "LlamaTokenizerFast"), ("deepseek_v3", "LlamaTokenizerFast"), ("gpt_oss", "PreTrainedTokenizerFast"),
    ("olmo2", "GPT2Tokenizer"), ("bert", "BertTokenizer"), ("llama", "NobodysTokenizer"), ("nobodys", "GPT2Tokenizer")])
def test_a_named_class_is_what_transformers_takes(tmp_path: Path, kind: str, name: str) -> None:
    """Without its reading of the model's configuration."""
    def change(settings: dict[str, Any], config: dict[str, Any]) -> None:
        settings["tokenizer_class"], config["model_type"] = name, kind

    def loaded(**options: Any) -> tuple[Any, ...]:
        try:
            tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False,
                                                      **options)
            return type(tokenizer), tokenizer("12+30=42").input_ids, tokenizer.bos_token, tokenizer.eos_token
        except Exception as error:
            return type(error), str(error)

    directory = checkpoint(tmp_path, change)
    options = known_class(tmp_path, *settings_of(tmp_path))
    assert options and loaded(**options) == loaded()


@pytest.mark.slow
def test_every_loading_by_transformers_says_whom_it_trusts() -> None:
    """Without the argument transformers asks on standard input."""
    silent = []
    for path in (p for folder in ("hal", "workers", "runners", "benchmarks", "training", "examples", "tests")
                 for p in (ROOT / folder).rglob("*.py")):
        for call in (n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)):
            name = call.func.attr if isinstance(call.func, ast.Attribute) else ""
            if name == "from_pretrained" and not any(k.arg == "trust_remote_code" for k in call.keywords):
                silent.append(f"{path.relative_to(ROOT)}:{call.lineno}")
    assert silent == []


# What a tokenizer puts before a prompt.

def two_before() -> PreTrainedTokenizerFast:
    """Two special tokens before a text and one after it."""
    tokenizer = by_hand.pieces()
    begin, end = tokenizer.convert_tokens_to_ids(["<s>", "</s>"])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> <s> $A </s>", special_tokens=[("<s>", begin), ("</s>", end)])
    return tokenizer


def test_a_text_that_begins_with_bos_gets_one() -> None:
    tokenizer = by_hand.pieces()
    bos, a = tokenizer.convert_tokens_to_ids(["<s>", "a"])
    assert tokenizer("<s>a").input_ids == [bos, bos, a]  # transformers' own: two
    assert encode(tokenizer, "<s>a") == encode(tokenizer, "a") == [bos, a]
    assert encode(tokenizer, "<s>") == encode(tokenizer, "") == [bos]
    assert encode(tokenizer, "a<s>a") == [bos, a, bos, a] and encode(tokenizer, "<s><s>a") == [bos, bos, a]
    assert encode(by_hand.byte_level(), "<eos>a") == [256, 97]  # one that puts nothing before a text


def test_a_text_that_begins_with_several_special_tokens() -> None:
    tokenizer = two_before()
    bos, end, a = tokenizer.convert_tokens_to_ids(["<s>", "</s>", "a"])
    assert encode(tokenizer, "</s><s>a") == encode(tokenizer, "a") == [end, bos, a, end]
    assert encode(tokenizer, "<s>a") == [end, bos, bos, a, end]  # half of them is a text of its own


# Stop texts.

def special_engine(directory: Path) -> LLM:
    return LLM(checkpoint(directory), device="null", num_blocks=64)


def test_a_prompt_of_an_engine_has_one_bos(tmp_path: Path) -> None:
    with special_engine(tmp_path) as llm:
        first, second = llm.generate(["<s>a", "a"], SamplingParams(max_tokens=3))
        assert first.prompt_token_ids == second.prompt_token_ids and len(first.prompt_token_ids) == 2


def test_a_stop_text_that_is_a_special_token_ends_the_output_as_its_id_does(tmp_path: Path) -> None:
    with special_engine(tmp_path) as llm:
        end = llm.tokenizer.convert_tokens_to_ids("<|im_end|>")
        plain = llm.generate([[i, i + 1] for i in range(100)], SamplingParams(max_tokens=60))
        long = next(o for o in plain if end in o.token_ids[1:])
        at = long.token_ids.index(end)
        by_id = llm.generate(long.prompt_token_ids, SamplingParams(max_tokens=60, stop_token_ids=(end,)))[0]
        by_text = SamplingParams(max_tokens=60, stop=("<|im_end|>",))
        for output in (llm.generate(long.prompt_token_ids, by_text)[0],
                       list(llm.stream(long.prompt_token_ids, by_text))[-1]):
            assert (output.finish_reason, output.token_ids, output.text) == ("stop", by_id.token_ids, by_id.text)
            assert len(output.token_ids) == at + 1 and "<|im_end|>" not in output.text


def test_a_stop_text_that_holds_a_special_token_is_refused(tmp_path: Path) -> None:
    with special_engine(tmp_path) as llm:
        for stop in ("<|im_end|>\n", "a</s>"):
            for call in (llm.check, llm.add_request, llm.stream):
                with pytest.raises(RequestError, match=r"special token <(/s|\|im_end\|)>"):
                    call("a", SamplingParams(stop=stop))
        assert not llm.unfinished and llm.stats().steps == 0


def test_stop_texts_that_a_text_can_show() -> None:
    tokenizer = by_hand.pieces()
    tokenizer.add_tokens(["<tool>"])  # added, and shown
    assert hidden_stops(tokenizer, ("<tool>", "<|im_end", "the")) == ()
    assert hidden_stops(tokenizer, ("</s>", "the")) == tuple(tokenizer.convert_tokens_to_ids(["</s>"]))


@pytest.mark.parametrize(("stop", "message"), [(["a"] * 65, "too many entries"), (["a", "b" * 1025], "too long")])
def test_the_limits_of_stop_texts(stop: list[str], message: str) -> None:
    SamplingParams(stop=tuple(text[:1024] for text in stop[:64]))
    with pytest.raises(RequestError, match=message):
        SamplingParams(stop=tuple(stop))
