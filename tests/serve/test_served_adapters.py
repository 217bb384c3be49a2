"""Adapters of a server: the model field chooses one, and they are loaded and unloaded while requests run."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import adapters_by_hand
import pytest

from hal import LLM, SamplingParams
from hal.config import BUNDLED_MODEL
from hal.engine.request_output import RequestOutput
from hal.errors import CapacityError, ConfigError, ModelLoadError, RequestError, StateError
from hal.serve.async_llm import AsyncLLM

sys.path.insert(0, str(Path(__file__).parent))
openai = pytest.importorskip("openai", reason="needs the extra `serve` and the package openai")
from http_server import Serving, serving  # noqa: E402 (it needs them as well)
from test_async import last, paced, until  # noqa: E402
from test_http import ask, held_back, slow_steps  # noqa: E402

CPU: dict[str, Any] = {"device": "cpu", "num_blocks": 200, "max_adapters": 2, "max_adapter_rank": 4}
PROMPT = "37+85="


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Adapters of the bundled model."""
    folder = tmp_path_factory.mktemp("adapters")
    return [adapters_by_hand.write(folder / str(seed), BUNDLED_MODEL, seed, strength=2.0) for seed in range(3)]


@pytest.fixture(scope="module")
def texts(written: list[Path]) -> list[str]:
    """What LLM.generate gives with each adapter, and at the end without one."""
    with LLM(**{**CPU, "max_adapters": 3}) as llm:
        for i, path in enumerate(written):
            llm.load_adapter(str(i), path)
        found = [llm.generate([PROMPT], of(name))[0].text for name in ("0", "1", "2", None)]
    assert len({*found}) == 4
    return found


@pytest.fixture(scope="module")
def here(written: list[Path]) -> Iterator[Serving]:
    with serving(**CPU, adapter_loading=True) as made:
        made.engine.llm.tokenizer.chat_template = "{{ messages[-1].content }}"
        made.engine.llm.load_adapter("0", written[0])
        yield made


def of(adapter: str | None, tokens: int = 12) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, ignore_eos=True, adapter=adapter)


def complete(made: Serving, model: str, tokens: int = 12, **more: Any) -> Any:
    return made.client.completions.create(model=model, prompt=PROMPT, temperature=0, max_tokens=tokens,
                                          extra_body={"ignore_eos": True, **more})


def load(made: Serving, name: str, path: Path | str) -> tuple[int, Any]:
    status, _, answer = ask(made, "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path)})
    return status, answer


def unload(made: Serving, name: str, **more: Any) -> tuple[int, Any]:
    status, _, answer = ask(made, "/v1/unload_lora_adapter", {"lora_name": name, **more})
    return status, answer


def test_the_model_field_chooses_an_adapter(here: Serving, texts: list[str]) -> None:
    for model, text in (("0", texts[0]), ("the-model", texts[3]), ("", texts[3])):
        made = complete(here, model)
        assert (made.choices[0].text, made.model) == (text, model or "the-model")
    chat = here.client.chat.completions.create(model="0", messages=[{"role": "user", "content": PROMPT}], max_tokens=12,
                                               temperature=0, extra_body={"ignore_eos": True})
    assert chat.choices[0].message.content == texts[0]
    assert complete(here, "the-model", adapter="0").choices[0].text == texts[0]  # hal's own parameter
    with pytest.raises(openai.BadRequestError, match="name two adapters: '0' and 'other'"):
        complete(here, "0", adapter="other")
    with pytest.raises(openai.NotFoundError, match="no model 'other'; it has 'the-model', '0'") as caught:
        complete(here, "other")
    assert caught.value.code == "model_not_found"
    models = here.client.models.list().data
    assert [(model.id, model.parent) for model in models] == [  # type: ignore[attr-defined]
        ("the-model", None), ("0", "the-model")]


@pytest.mark.slow
def test_adapters_come_and_go_while_a_stream_runs(here: Serving, written: list[Path], texts: list[str]) -> None:
    undisturbed = complete(here, "0", 120).choices[0].text
    step = held_back(here)
    stream = here.client.completions.create(model="0", prompt=PROMPT, temperature=0, max_tokens=120, stream=True,
                                            extra_body={"ignore_eos": True})
    found = next(stream).choices[0].text
    assert load(here, "1", written[1])[0] == 200 and complete(here, "1").choices[0].text == texts[1]
    status, answer = unload(here, "0")
    assert status == 400 and "requests use the adapter" in answer["error"]["message"]
    assert unload(here, "1")[0] == 200 and load(here, "2", written[2])[0] == 200
    assert complete(here, "2").choices[0].text == texts[2]
    here.engine.llm.step = step  # type: ignore[method-assign]
    slow_steps(here, 0.01)
    assert unload(here, "0", wait=True)[0] == 200 and [model.id for model in here.client.models.list()][1:] == ["2"]
    here.engine.llm.step = step  # type: ignore[method-assign]
    assert found + "".join(chunk.choices[0].text for chunk in stream) == undisturbed
    with pytest.raises(openai.NotFoundError, match="no model '0'"):
        complete(here, "0")
    assert unload(here, "2")[0] == 200 and load(here, "0", written[0])[0] == 200  # as it was
    assert complete(here, "0").choices[0].text == texts[0] and here.engine.failures == 0


def test_a_refused_load_names_the_field_and_changes_nothing(here: Serving, written: list[Path], tmp_path: Path) -> None:
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "adapter_config.json").write_text("{")
    for name, path, field, text in (
            ("0", written[1], "lora_name", "of this name is loaded"),
            ("the-model", written[1], "lora_name", "base model"),
            ("", written[1], "lora_name", "missing"), ("\ud800", written[1], "lora_name", "cannot be printed"),
            ("x" * 257, written[1], "lora_name", "not usable"), ("x", "", "lora_path", "missing"),
            ("x", tmp_path, "lora_path", "no adapter_config.json"), ("x", "\0", "lora_path", "cannot be printed"),
            ("x", "y" * 5000, "lora_path", "adapter_config.json"),
            ("x", tmp_path / "damaged", "lora_path", "adapter_config.json")):
        status, answer = load(here, name, path)
        assert status == 400 and answer["error"]["param"] == field and text in answer["error"]["message"], answer
    assert load(here, "1", written[1])[0] == 200
    status, answer = load(here, "2", written[2])
    assert status == 400 and "max_adapters=2" in answer["error"]["message"] and unload(here, "1")[0] == 200
    status, answer = unload(here, "other")
    assert status == 404 and answer["error"]["param"] == "lora_name"
    assert unload(here, "0", force=True)[1]["error"]["code"] == "unknown_parameter"
    assert here.engine.adapters == ["0"] and here.engine.failures == 0 and here.engine.health() is None


def test_loading_is_off_by_default_and_behind_the_key(written: list[Path]) -> None:
    with serving(**CPU) as made:
        for status, answer in (load(made, "0", written[0]), unload(made, "0")):
            assert status == 403 and "--allow-adapter-loading" in answer["error"]["message"]
        made.server.adapter_loading, made.server.api_key = True, "secret"
        assert load(made, "0", written[0])[0] == 401 and made.engine.adapters == []
        made.engine.llm.load_adapter("the-model", written[0])
        with pytest.raises(ConfigError, match=r"(?s)name of the base model.*--served-model-name"):
            type(made.server)(made.engine, "the-model")
    with pytest.raises(ConfigError, match=r"(?s)no slots.*--max-adapters N"), serving(
            device="null", num_blocks=64, adapter_loading=True):
        pass


def test_tasks_load_and_unload_adapters(written: list[Path], texts: list[str]) -> None:
    async def main() -> None:
        async with AsyncLLM(**CPU) as engine:
            await asyncio.gather(*[engine.load_adapter(str(i), written[i]) for i in range(2)])
            assert sorted(engine.adapters) == ["0", "1"]
            found = await asyncio.gather(*[last(engine.generate(PROMPT, of(name))) for name in ("0", None, "1")])
            assert [output.text for output in found] == [texts[0], texts[3], texts[1]]
            for kind, call in ((RequestError, engine.load_adapter("0", written[0])),
                               (CapacityError, engine.load_adapter("2", written[2])),
                               (RequestError, engine.unload_adapter("other"))):
                with pytest.raises(kind):
                    await call
            paced(engine)
            running = engine.generate(PROMPT, of("0", 200))
            await anext(running)
            with pytest.raises(RequestError, match="requests use the adapter"):
                await engine.unload_adapter("0")
            await running.aclose()
            await until(lambda: not engine.stats().running)
            await engine.unload_adapter("0")
            with pytest.raises(ModelLoadError):
                await engine.load_adapter("0", written[0] / "absent")
            assert engine.adapters == ["1"] and engine.failures == 0
            await engine.shutdown()
            with pytest.raises(StateError, match="shut down"):
                await engine.unload_adapter("1")

    asyncio.run(main())


def test_new_workers_have_the_adapters(written: list[Path], texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    step, left = LLM.step, [1]

    def fails_once(llm: LLM, *, text: bool = True) -> list[RequestOutput]:
        outputs = step(llm, text=text)
        if left and any(len(output.token_ids) >= 4 for output in outputs):
            left.clear()
            raise ArithmeticError("out of luck")
        return outputs

    monkeypatch.setattr(LLM, "step", fails_once)

    async def main() -> None:
        async with AsyncLLM(**CPU) as engine:
            await engine.load_adapter("0", written[0])
            assert (await last(engine.generate(PROMPT, of("0")))).text == texts[0] and engine.failures == 1
            assert engine.adapters == ["0"] and (await last(engine.generate(PROMPT, of("0")))).text == texts[0]

    asyncio.run(main())


def test_a_request_whose_adapter_goes_before_it_begins_is_refused_alone(
        written: list[Path], texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parameters are checked in another thread, before the engine's thread has it."""
    prepare: Callable[..., Any] = LLM.prepare
    checked, unloaded = threading.Event(), threading.Event()

    def prepare_slowly(llm: LLM, *arguments: Any) -> Any:
        found = prepare(llm, *arguments)
        checked.set()
        assert unloaded.wait(20)
        return found

    monkeypatch.setattr(LLM, "prepare", prepare_slowly)

    async def main() -> None:
        async with AsyncLLM(**CPU) as engine:
            await engine.load_adapter("0", written[0])
            late = asyncio.create_task(last(engine.generate(PROMPT, of("0"))))
            await asyncio.to_thread(checked.wait, 20)
            await engine.unload_adapter("0")
            unloaded.set()
            with pytest.raises(RequestError, match="unloaded before the request began"):
                await late
            assert engine.failures == 0 and (await last(engine.generate(PROMPT, of(None)))).text == texts[3]

    asyncio.run(main())


def test_an_adapter_whose_files_are_gone_ends_its_own_requests_alone(written: list[Path], texts: list[str],
                                                                     tmp_path: Path) -> None:
    """The rank that does not find the files at the next step fails it, and new workers do not look for them."""
    async def load_and_lose(engine: AsyncLLM) -> None:
        gone = shutil.copytree(written[1], tmp_path / "gone")
        await engine.load_adapter("1", gone)
        shutil.rmtree(gone)

    async def main() -> None:
        async with AsyncLLM(**CPU) as engine:
            await engine.load_adapter("0", written[0])
            await load_and_lose(engine)
            with pytest.raises(ModelLoadError, match="gone"):
                await last(engine.generate(PROMPT, of("1")))
            assert engine.adapters == ["0"] and engine.failures == 1
            await load_and_lose(engine)
            assert (await last(engine.generate(PROMPT, of("0")))).text == texts[0]
            assert engine.adapters == ["0"] and engine.failures == 2 and engine.health() is None

    asyncio.run(main())


@pytest.mark.slow
def test_the_command_line_loads_adapters(written: list[Path], texts: list[str]) -> None:
    from test_cli import client, served

    with served("--device", "cpu", "--num-blocks", "64", "--adapter", f"law={written[0]}", "--adapter",
                f"code={written[1]}", "--max-adapters", "3", "--allow-adapter-loading") as (_, address):
        api = client(address)
        assert [model.id for model in api.models.list()][1:] == ["law", "code"]
        for model, text in (("law", texts[0]), ("code", texts[1])):
            made = api.completions.create(model=model, prompt=PROMPT, temperature=0, max_tokens=12,
                                          extra_body={"ignore_eos": True})
            assert made.choices[0].text == text
        api.post("/load_lora_adapter", body={"lora_name": "third", "lora_path": str(written[2])}, cast_to=str)
        assert json.loads(api.models.with_raw_response.list().text)["data"][-1]["id"] == "third"
