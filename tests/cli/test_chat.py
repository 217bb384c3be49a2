"""Conversations: LLM.chat and `hal chat`, with a template in which the bundled model adds."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import adapters_by_hand
import checkpoints
import pytest
from forks import Forks
from safetensors.torch import load_file, save_file

from hal import LLM, SamplingParams
from hal.config import BUNDLED_MODEL
from hal.errors import RequestError

# The number of messages is added to the last one, so that an answer shows what the conversation holds.
TEMPLATE = ("{% if messages[-1].role == 'nobody' %}{{ raise_exception('nobody speaks') }}{% endif %}"
            "{{ messages|length }}+"
            "{% if tools %}{{ tools[0].function.name }}{% else %}{{ messages[-1].content }}{% endif %}"
            "{% if add_generation_prompt %}{{ sign or '=' }}{% endif %}")


@pytest.fixture(scope="module")
def adder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = shutil.copytree(BUNDLED_MODEL, tmp_path_factory.mktemp("chat") / "adder")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_conversations_are_rendered_by_the_checkpoints_template(adder: Path) -> None:
    tools = [{"type": "function", "function": {"name": "500", "description": "", "parameters": {}}}]
    with LLM(adder, device="cpu", num_blocks=64) as llm:
        one, = llm.chat([user("37")])
        first, second = llm.chat([[user("37")], [user("1"), {"role": "assistant", "content": "2"}, user("40")]])
        with_tools, = llm.chat([user("37")], SamplingParams(max_tokens=8), tools=tools)
        assert [o.text for o in (one, first, second, with_tools)] == ["38", "38", "43", "501"]
        conversation = [user("37"), user("85")]
        for options in ({}, {"add_generation_prompt": False}, {"sign": "+9="}):
            expected = llm.tokenizer.apply_chat_template(conversation, tokenize=True, return_dict=False,
                                                         **{"add_generation_prompt": True, **options})
            assert llm.chat_ids(conversation, options=options) == expected
        for wrong in ([], "hello", [{"content": "1"}], [{"role": "nobody", "content": "1"}], [["user", "1"]]):
            with pytest.raises(RequestError, match=r"no conversation|nobody speaks|refuses") as caught:
                llm.chat_ids(wrong)  # type: ignore[arg-type]
            assert caught.value.got is not None


def test_a_template_that_begins_with_bos_begins_with_one(adder: Path, tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("{{ bos_token }}" + TEMPLATE)
    with LLM(adder, device="cpu", num_blocks=64, chat_template=tmp_path / "own.jinja") as llm:
        ids = llm.chat_ids([user("37")])
    assert ids[0] == llm.tokenizer.bos_token_id and ids.count(ids[0]) == 1


def test_a_checkpoint_without_template_or_tokenizer_says_what_to_do(
        forks: Forks, tmp_path: Path, checkpoint: Callable[[str], Path]) -> None:
    with LLM(device="cpu", num_blocks=64) as llm, pytest.raises(RequestError, match="no chat template") as caught:
        llm.tokenizer.chat_template = None
        llm.chat([user("37")])
    assert "--chat-template FILE" in str(caught.value)
    (tmp_path / "own.jinja").write_text(TEMPLATE)
    stdin = tmp_path / "in"
    stdin.write_text("37\n")
    given = forks.run("chat", "--device", "cpu", "--chat-template", str(tmp_path / "own.jinja"), stdin=str(stdin))
    assert (given.status, given.out, given.err) == (0, b"38\n", "")
    plain = shutil.copytree(BUNDLED_MODEL, tmp_path / "plain")
    settings = json.loads((plain / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (plain / "tokenizer_config.json").write_text(json.dumps(settings))
    without = forks.run("chat", "--device", "cpu", "--model", str(plain), stdin=str(stdin))
    assert without.status == 1 and "--chat-template FILE" in without.err and without.out == b""
    model = checkpoint("qwen3")
    assert not any(model.glob("tokenizer*")) and checkpoints.VOCAB
    nothing = forks.run("chat", "--device", "cpu", "--model", str(model), stdin=str(stdin))
    assert nothing.status == 1 and "has no tokenizer, so it cannot chat" in nothing.err
    missing = forks.run("chat", "--device", "cpu", "--chat-template", "missing", stdin=str(stdin))
    assert missing.status == 1 and "the chat template cannot be read" in missing.err


@pytest.mark.parametrize("messages", [None, 5, user("37"), "37", [5], [[]], [{"content": "37"}]])
def test_what_is_no_conversation_is_refused(messages: Any) -> None:
    with LLM(device="cpu", num_blocks=64) as llm, pytest.raises(RequestError, match="the messages are no conversation"):
        llm.chat(messages)


def test_a_template_that_cannot_be_used_can_be_replaced() -> None:
    with LLM(device="cpu", num_blocks=64) as llm:
        for template in ("{{ 1", 5, {"tool": "x"}):
            llm.tokenizer.chat_template = template
            with pytest.raises(RequestError, match="the chat template refuses the messages") as caught:
                llm.chat([user("37")])
            assert "--chat-template FILE" in str(caught.value)


def run(forks: Forks, adder: Path, tmp_path: Path, lines: list[str], *args: str, **how: Any) -> Any:
    (tmp_path / "in").write_text("\n".join(lines))
    return forks.run("chat", "--device", "cpu", "--num-blocks", "64", "--model", str(adder), *args,
                     stdin=str(tmp_path / "in"), **how)


def test_a_conversation_goes_on_until_it_is_reset(forks: Forks, adder: Path, tmp_path: Path) -> None:
    ended = run(forks, adder, tmp_path, ["37", "", "37", "/what", "/reset", "37", "37" * 600, "38", "/exit", "9"],
                "--system", "you add")
    assert (ended.status, ended.out.split()) == (1, [b"39", b"41", b"39", b"42"])  # the long one leaves nothing
    assert "no command /what" in ended.err and "longer than the context" in ended.err
    tools = tmp_path / "tools.json"
    tools.write_text(json.dumps([{"type": "function", "function": {"name": "700", "parameters": {}}}]))
    given = run(forks, adder, tmp_path, ["1", "/what"], "--tools", str(tools))
    assert (given.status, given.out) == (0, b"701\n")
    tools.write_text("{}")
    assert "holds no list" in run(forks, adder, tmp_path, ["1"], "--tools", str(tools)).err


def test_a_message_whose_reply_fails_leaves_the_conversation(forks: Forks, adder: Path, tmp_path: Path) -> None:
    damaged, nine = shutil.copytree(adder, tmp_path / "damaged"), 13
    config = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    weights = load_file(damaged / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.embed_tokens.weight"][nine] = math.nan
    save_file(weights, damaged / "model.safetensors", {"format": "pt"})
    ended = run(forks, damaged, tmp_path, ["9", "37"])
    assert (ended.status, ended.out) == (1, b"\n38\n") and "ended before output token 0" in ended.err


@pytest.mark.slow
def test_a_conversation_with_an_adapter(forks: Forks, adder: Path, tmp_path: Path) -> None:
    law = adapters_by_hand.write(tmp_path / "law", adder, 0, strength=2.0)
    with LLM(adder, device="cpu", num_blocks=64, max_adapters=1) as llm:
        llm.load_adapter("law", law)
        expected, = llm.chat([user("37")], SamplingParams(max_tokens=12, adapter="law"))
    assert expected.text != "38"
    options = ("--max-tokens", "12", "--adapter", f"law={law}")
    given = run(forks, adder, tmp_path, ["37"], *options, "--use-adapter", "law")
    assert (given.status, given.out.decode(), given.err) == (0, expected.text + "\n", "")
    assert run(forks, adder, tmp_path, ["37"], *options).out == b"38\n"  # none is used that nobody names
    assert "no adapter of this name" in run(forks, adder, tmp_path, ["37"], *options, "--use-adapter", "other").err


def test_ctrl_c_ends_a_reply_and_not_the_program(forks: Forks, adder: Path, tmp_path: Path) -> None:
    ended = run(forks, adder, tmp_path, ["37", "38"], "--ignore-eos", "--no-skip-special-tokens", "--device",
                "interrupting:backend", cwd=Path(__file__).parent)
    first, second = ended.out.decode().splitlines()
    assert ended.status == 0 and ended.err == ""
    assert first.endswith(" [stopped]") and len(first) < 400 < len(second) and "stopped" not in second
