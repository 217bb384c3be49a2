"""LLM on the null backend, and on the bundled model."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers_by_hand

from hal.config import BUNDLED_MODEL
from hal.contracts import backend as backends
from hal.engine.llm import LLM
from hal.engine.request_output import RequestOutput
from hal.errors import CapacityError, ConfigError, ModelLoadError, RequestError, StateError, WorkerError
from hal.sampling.params import SamplingParams
from hal.testing.null import NullBackend, NullRunner

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 257, "hidden_size": 8,
          "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 8,
          "max_position_embeddings": 128, "eos_token_id": 256, "bos_token_id": None}
TEXTS = ["one", "two and three", "été 😀", "x" * 40]
Make = Callable[..., LLM]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Engines on the null backend, with a tokenizer of bytes unless `text` is False."""
    engines = []

    def llm(text: bool = True, **options: Any) -> LLM:
        (tmp_path / "config.json").write_text(json.dumps(CONFIG))
        if text:
            tokenizers_by_hand.save_byte_level(tmp_path)
        engines.append(LLM(str(tmp_path), **{"device": "null", "block_size": 4, "num_blocks": 200, **options}))
        return engines[-1]

    yield llm
    for engine in engines:
        engine.shutdown()


def is_clean(llm: LLM) -> bool:
    while llm.core.pending:
        llm.step()
    scheduler = llm.scheduler
    return not (llm.unfinished or scheduler.unfinished or any(scheduler.blocks.refs))


def same(a: RequestOutput, b: RequestOutput) -> bool:
    return (a.token_ids, a.text, a.finish_reason, a.logprobs) == (b.token_ids, b.text, b.finish_reason, b.logprobs)


def greedy(tokens: list[int], count: int) -> list[int]:
    """What hal.testing.null documents, in Python."""
    tokens = list(tokens)
    for _ in range(count):
        tokens.append(sum((t + 7) * (place * 31 + layer + 11) % 65521 for layer in range(2)
                          for place, t in enumerate(tokens)) % (1 << 31) % 257)
    return tokens[-count:]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_outputs_are_in_order_and_equal_those_of_each_prompt_alone(make: Make, asynchronous: bool) -> None:
    llm = make(async_scheduling=asynchronous, max_num_seqs=3, max_num_batched_tokens=16, prefix_caching=False)
    params = [SamplingParams(max_tokens=n, temperature=t, seed=n, ignore_eos=True)
              for n, t in ((1, 0.0), (9, 0.8), (20, 0.0), (14, 1.0))]
    outputs = llm.generate(TEXTS, params)
    assert [(o.index, o.prompt) for o in outputs] == list(enumerate(TEXTS))
    assert [len(o.token_ids) for o in outputs] == [1, 9, 20, 14] and {o.finish_reason for o in outputs} == {"length"}
    assert outputs[2].token_ids == greedy(list(TEXTS[2].encode()), 20)
    for text, each, output in zip(TEXTS, params, outputs, strict=True):
        assert output.prompt_token_ids == list(text.encode())
        assert output.text == llm.tokenizer.decode(output.token_ids, skip_special_tokens=True)
        assert same(llm.generate(text, each)[0], output)
        assert same(llm.generate(output.prompt_token_ids, each)[0], output)
    assert is_clean(llm)


def test_seeds(make: Make) -> None:
    def tokens(llm: LLM, **params: Any) -> list[list[int]]:
        chosen = SamplingParams(temperature=1.5, max_tokens=8, ignore_eos=True, **params)
        return [o.token_ids for o in llm.generate(["a", "a"], chosen)]

    own = tokens(make(seed=1), seed=5)
    assert own[0] == own[1] and own == tokens(make(seed=2), seed=5) != tokens(make(), seed=6)
    derived = tokens(make(seed=1))  # without one: of the engine's seed and the request's number
    assert derived[0] != derived[1] and derived == tokens(make(seed=1)) != tokens(make(seed=2))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_stream_ends_in_what_generate_gives(make: Make, asynchronous: bool) -> None:
    llm = make(async_scheduling=asynchronous)
    params = SamplingParams(max_tokens=30, temperature=0.9, seed=3, logprobs=2, ignore_eos=True)
    expected = llm.generate("stream", params)[0]
    seen = []
    for output in llm.stream("stream", params):
        seen.append((len(output.token_ids), output.text, output.finish_reason))
    assert [n for n, _, _ in seen] == list(range(1, 31)) and same(output, expected)
    assert all(expected.text.startswith(text) for _, text, _ in seen)
    assert [reason for _, _, reason in seen] == [None] * 29 + ["length"] and is_clean(llm)


def test_streams_that_take_turns(make: Make) -> None:
    llm = make()
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (3, 12)]
    expected = [llm.generate(text, each)[0] for text, each in zip(TEXTS, params, strict=False)]
    streams = [llm.stream(text, each) for text, each in zip(TEXTS, params, strict=False)]
    first = [next(stream) for stream in streams]
    llm.generate("a third", SamplingParams(max_tokens=20, ignore_eos=True))
    last = [list(stream)[-1] for stream in streams[::-1]][::-1]  # both ended in the steps of generate
    assert all(same(a, b) for a, b in zip(last, expected, strict=True)) and first == last


def test_closing_a_stream_aborts_it(make: Make) -> None:
    llm = make()
    llm.stream("never started")
    assert not llm.unfinished
    stream = llm.stream("abc", SamplingParams(max_tokens=100, ignore_eos=True))
    output = next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert output.finish_reason == "abort" and len(output.token_ids) < 100 and is_clean(llm)


def test_stop_ids_and_the_models_own(make: Make) -> None:
    llm = make()
    tokens = greedy(list(b"count"), 40)
    at = next(i for i, t in enumerate(tokens) if i > 5 and t not in tokens[:i])
    stopped = llm.generate("count", SamplingParams(max_tokens=40, stop_token_ids=(tokens[at],), ignore_eos=True))[0]
    assert stopped.finish_reason == "stop" and stopped.token_ids == tokens[:at + 1]
    assert stopped.text == llm.tokenizer.decode(tokens[:at])  # the token that ends it is kept out of the text
    prompt = next(p for p in range(256) if 256 in greedy([p], 100))
    tokens = greedy([prompt], 100)
    ended = llm.generate([prompt], SamplingParams(max_tokens=100))[0]
    assert ended.token_ids == tokens[:tokens.index(256) + 1] and ended.finish_reason == "stop"
    assert len(llm.generate([prompt], SamplingParams(max_tokens=100, ignore_eos=True))[0].token_ids) == 100


@pytest.mark.parametrize("asynchronous", [False, True])
def test_stop_texts(make: Make, asynchronous: bool) -> None:
    llm = make(async_scheduling=asynchronous)
    prompt, text = next((p, t) for p in range(256) if "\ufffd" not in (t := bytes(
        b if b < 128 else 63 for b in greedy([p], 30)).decode()) and 256 not in greedy([p], 30) and max(
        greedy([p], 12)) < 128)
    stop = text[6:9]
    params = SamplingParams(max_tokens=30, stop=(stop, "never"), ignore_eos=True)
    output = llm.generate([prompt], params)[0]
    at = text.index(stop)
    assert (output.text, output.finish_reason) == (text[:at], "stop")
    assert len(output.token_ids) == at + len(stop) < 30  # tokens are not cut
    seen = [o.text for o in llm.stream([prompt], params)]
    assert seen == [text[:min(n, at)] for n in map(len, seen)] and seen[-1] == text[:at] and is_clean(llm)
    first = llm.generate([prompt], SamplingParams(max_tokens=at + 2, stop=(stop,), ignore_eos=True))[0]
    assert (first.text, first.finish_reason) == (text[:at + 2], "length")  # what was held back comes in the end


def test_logprobs(make: Make) -> None:
    llm = make(max_num_batched_tokens=5, max_num_seqs=2)
    params = [SamplingParams(max_tokens=4, logprobs=3, prompt_logprobs=2, ignore_eos=True),
              SamplingParams(max_tokens=6, logprobs=0, ignore_eos=True), SamplingParams(max_tokens=3)]
    asked, chosen, none = llm.generate(["twelve bytes", "b", "c"], params)
    assert asked.logprobs is not None and asked.prompt_logprobs is not None and chosen.logprobs is not None
    assert [p.token_id for p in asked.logprobs] == asked.token_ids
    assert all(len(p.top) == 3 and p.top[0] == (p.token_id, p.logprob) for p in asked.logprobs)  # greedy
    assert asked.prompt_logprobs[0] is None
    assert [p and p.token_id for p in asked.prompt_logprobs[1:]] == list(b"twelve bytes")[1:]
    assert all(p is not None and len(p.top) == 2 and p.logprob <= p.top[0][1] for p in asked.prompt_logprobs[1:])
    assert len(chosen.logprobs) == 6 and all(not p.top for p in chosen.logprobs)
    assert chosen.prompt_logprobs is none.logprobs is none.prompt_logprobs is None


@pytest.mark.parametrize("host", [0, 100])
def test_preemption_shows_in_statistics_alone(make: Make, host: int) -> None:
    params = SamplingParams(max_tokens=60, temperature=0.7, seed=4, ignore_eos=True, logprobs=1, prompt_logprobs=1)
    free = make(prefix_caching=False).generate(TEXTS, params)
    llm = make(num_blocks=36, num_cpu_blocks=host, max_num_batched_tokens=32, prefix_caching=False)
    tight = llm.generate(TEXTS, params)
    assert all(same(a, b) and a.prompt_logprobs == b.prompt_logprobs for a, b in zip(free, tight, strict=True))
    stats = llm.stats()
    prompts = sum(len(o.prompt_token_ids) for o in tight)
    assert stats.preemptions > 0 == stats.cached_tokens
    assert (stats.prefill_tokens <= prompts + stats.preemptions) == (host > 0)  # swapped ones compute nothing anew
    assert stats.decode_tokens >= 240 and stats.running == stats.waiting == 0 < stats.steps and is_clean(llm)


def test_an_engine_of_ones_own(make: Make) -> None:
    llm = make(max_num_seqs=2, async_scheduling=False)
    params = SamplingParams(max_tokens=10, ignore_eos=True)
    numbers = [llm.add_request(text, params) for text in TEXTS[:3]]
    assert llm.unfinished and llm.stats().waiting == 3
    done: dict[int, RequestOutput] = {}
    turns = 0
    while llm.unfinished:
        for output in llm.step():
            assert output.request_id != numbers[1] or turns < 3
            if output.finish_reason is not None:
                done[output.request_id] = output
        turns += 1
        if turns == 3:
            llm.abort(numbers[1])
    assert sorted(done) == [numbers[0], numbers[2]]
    assert [done[n].text for n in sorted(done)] == [o.text for o in llm.generate([TEXTS[0], TEXTS[2]], params)]
    llm.abort(numbers[0])  # what is finished or unknown stays as it is
    llm.abort(999)
    assert done[numbers[0]].finish_reason == "length" and llm.step() == [] and is_clean(llm)


def test_equal_prompts_are_computed_once(make: Make) -> None:
    llm = make()
    first, = llm.generate("a prompt of 20 bytes", SamplingParams(max_tokens=4))
    again, = llm.generate("a prompt of 20 bytes", SamplingParams(max_tokens=4))
    assert same(first, again) and llm.stats().cached_tokens == 19


BAD: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    ("", {}, RequestError, "prompt is empty"), ([3, 257], {}, RequestError, "out of the vocabulary"),
    ([-1], {}, RequestError, "out of the vocabulary"), ([True], {}, RequestError, "not an integer"),
    (None, {}, RequestError, "neither a text nor token ids"), ("x" * 128, {}, RequestError, "longer than the context"),
    ("x", {"logprobs": 258}, RequestError, "logprobs is larger"),
    ("x", {"prompt_logprobs": 300}, RequestError, "prompt_logprobs is larger")]


@pytest.mark.parametrize(("prompt", "params", "error", "message"), BAD)
def test_a_bad_request_is_refused_and_nothing_runs(make: Make, prompt: Any, params: dict[str, Any],
                                                   error: type[Exception], message: str) -> None:
    llm, chosen = make(), SamplingParams(**params)
    for call in (llm.check, llm.add_request, llm.stream):
        with pytest.raises(error, match=message):
            call(prompt, chosen)
    with pytest.raises(error, match=f"^prompt 1: .*{message}"):
        llm.generate(["good", prompt], [SamplingParams(), chosen])
    assert not llm.unfinished and llm.stats().steps == 0
    assert llm.generate("good", SamplingParams(max_tokens=2))[0].finish_reason is not None


def test_a_request_that_the_cache_can_never_hold(make: Make) -> None:
    llm = make(num_blocks=11, max_model_len=40)
    llm.scheduler.num_blocks = 6  # as if a rank had given less
    with pytest.raises(CapacityError, match="prompt 1: the KV cache is too small for one request"):
        llm.generate(["x", "x" * 30], SamplingParams(max_tokens=4))
    with pytest.raises(CapacityError):
        make(num_blocks=6, max_model_len=40)


def test_invalid_calls_are_refused(make: Make) -> None:
    llm = make()
    with pytest.raises(RequestError, match="not as many params"):
        llm.generate(["a", "b"], [SamplingParams()])
    assert llm.generate([]) == []
    with pytest.raises(ConfigError, match="max_model_len"):
        make(max_model_len=129)
    with pytest.raises(ConfigError, match=r"(?s)no such option.*num_blocks"):
        make(num_block=1)
    with pytest.raises(ModelLoadError):
        LLM("/nowhere/at/all")


def test_without_a_tokenizer(make: Make) -> None:
    llm = make(text=False)
    output, = llm.generate([7, 8, 9], SamplingParams(max_tokens=5, ignore_eos=True))
    assert (output.prompt, output.text, output.token_ids) == (None, "", greedy([7, 8, 9], 5))
    assert [o.text for o in llm.stream([7], SamplingParams(max_tokens=2, ignore_eos=True))] == ["", ""]
    with pytest.raises(RequestError, match="has no tokenizer"):
        llm.generate("text")
    with pytest.raises(RequestError, match="has no tokenizer"):
        llm.generate([7], SamplingParams(stop="x"))


def test_shutdown(make: Make) -> None:
    with make() as llm:
        llm.generate("a", SamplingParams(max_tokens=1))
    llm.shutdown()
    with pytest.raises(StateError, match="shut down"):
        llm.generate("a")
    assert not llm.unfinished


class FailingBackend(NullBackend):
    """Step 3 raises `error`, or interrupts the process where that is None."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error

    def make_runner(self, config: Any, device: Any, communicator: Any) -> NullRunner:
        runner = super().make_runner(config, device, communicator)
        prepare = runner.prepare_model_input

        def fail(request: Any) -> Any:
            if request.step == 3 and self.error is not None:
                raise self.error
            if request.step == 3:
                signal.raise_signal(signal.SIGINT)
            return prepare(request)

        runner.prepare_model_input = fail  # type: ignore[method-assign]
        return runner


@pytest.mark.parametrize(("failure", "raised", "later"), [
    (None, KeyboardInterrupt, StateError), (ValueError("no"), WorkerError, WorkerError)])
def test_a_failure_that_ends_an_engine_ends_its_requests(
        make: Make, monkeypatch: pytest.MonkeyPatch, failure: Exception | None, raised: type[BaseException],
        later: Any) -> None:
    monkeypatch.setattr(backends, "load", lambda name: FailingBackend(failure))
    llm = make()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with pytest.raises(raised):
            llm.generate(TEXTS)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not llm.unfinished
    for call in (llm.step, lambda: llm.generate("a"), lambda: llm.add_request("a"), lambda: next(llm.stream("a"))):
        with pytest.raises(later, match=r"(?s)(KeyboardInterrupt|rank 0 failed in step 4).*restart\(\)"):
            call()
    assert llm.stats().running == 0 and not llm.unfinished


def test_progress_shows_both_rates(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    llm = make()
    llm.generate(TEXTS, SamplingParams(max_tokens=6), progress=True)
    shown = capsys.readouterr().err
    assert "4/4" in shown and "prefill=" in shown and "decode=" in shown and "tok/s" in shown
    llm.generate(TEXTS, SamplingParams(max_tokens=6))
    assert capsys.readouterr().err == ""


def test_the_bundled_model_adds() -> None:
    with LLM(device="cpu") as llm:
        outputs = llm.generate(["37+85=", "999+999=", "0+0="])
        assert [o.text for o in outputs] == ["122", "1998", "0"]
        assert {o.finish_reason for o in outputs} == {"stop"}
        assert [o.text for o in llm.stream("37+85=")] == ["1", "12", "122", "122"]
        assert llm.generate("37+85=", SamplingParams(stop="2"))[0].text == "1"


@pytest.mark.slow
def test_the_bundled_model_is_right_on_what_it_has_not_seen() -> None:
    problems = [json.loads(line) for line in (BUNDLED_MODEL / "heldout.jsonl").read_text().splitlines()]
    with LLM(device="cpu") as llm:
        outputs = llm.generate([p["prompt"] for p in problems], SamplingParams(max_tokens=8))
    right = sum(o.text == p["answer"] for o, p in zip(outputs, problems, strict=True))
    assert len(problems) == 1000 and right >= 990


@pytest.mark.parametrize("options", [{}, {"async_scheduling": True}, {"num_blocks": 40, "num_cpu_blocks": 20}], ids=str)
def test_restart_goes_on_from_what_there_is(make: Make, options: dict[str, Any]) -> None:
    params = SamplingParams(max_tokens=20, temperature=0.8, seed=3, logprobs=0)
    expected = make(**options).generate(TEXTS, params)
    llm, outputs = make(**options), {}
    ids = [llm.add_request(text, params) for text in TEXTS]
    for steps in (3, 1, 7):
        for _ in range(steps):
            outputs |= {o.request_id: o for o in llm.step()}
        llm.restart()
    while llm.unfinished:
        outputs |= {o.request_id: o for o in llm.step()}
    assert [outputs[i].token_ids for i in ids] == [o.token_ids for o in expected]
    assert [outputs[i].text for i in ids] == [o.text for o in expected] and is_clean(llm)
