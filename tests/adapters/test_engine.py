"""Adapters are loaded and unloaded while requests run. What is in use stays, and no request sees another's cache."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import adapters_by_hand
import checkpoints
import families
import pytest
import torch
from safetensors.torch import load_file, save_file

from hal.engine.llm import LLM
from hal.errors import BackendError, CapacityError, HalError, ModelLoadError, RequestError, WorkerError
from hal.sampling.params import SamplingParams

PROMPT = checkpoints.prompts(1)[0]


@pytest.fixture
def path(family: Callable[[str], Path]) -> Path:
    return family("llama")


@pytest.fixture
def written(path: Path, tmp_path: Path) -> list[Path]:
    return [adapters_by_hand.write(tmp_path / str(i), path, i) for i in range(3)]


@pytest.fixture
def llm(path: Path) -> Iterator[LLM]:
    with families.run(path, max_adapters=2, max_adapter_rank=4) as engine:
        yield engine


def of(adapter: str | None, tokens: int = 8, **options: Any) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, ignore_eos=True, adapter=adapter, **options)


def tokens_of(llm: LLM, adapter: str | None) -> list[int]:
    return llm.generate([PROMPT], of(adapter))[0].token_ids


def test_a_prompt_shares_no_cached_block_with_another_adapter(llm: LLM, written: list[Path]) -> None:
    llm.load_adapter("a", written[0])
    llm.load_adapter("b", written[1])
    alone, cached = {}, [0]
    for name in ("a", "b", None, "a", None):
        found = tokens_of(llm, name)
        cached.append(llm.stats().cached_tokens)
        assert alone.setdefault(name, found) == found
    assert cached[1:4] == [0, 0, 0] and cached[4] > 30 and cached[5] > cached[4] + 30
    assert len({*map(tuple, alone.values())}) == 3


def test_a_name_that_is_given_again_shares_nothing_with_the_adapter_before(llm: LLM, written: list[Path]) -> None:
    llm.load_adapter("a", written[0])
    first = tokens_of(llm, "a")
    llm.unload_adapter("a")
    llm.load_adapter("a", written[1])
    second = tokens_of(llm, "a")
    assert llm.stats().cached_tokens == 0 and first != second
    llm.unload_adapter("a")
    llm.load_adapter("other", written[0])
    assert tokens_of(llm, "other") == first


def test_requests_in_flight_keep_their_adapter(llm: LLM, written: list[Path]) -> None:
    """One is unloaded while it is in use; its slot is not given away before the request has ended."""
    for i in range(2):
        llm.load_adapter(str(i), written[i])
    expected = [tokens_of(llm, str(i)) for i in range(2)]
    first = llm.add_request(PROMPT, of("0", 30))
    llm.step()
    with pytest.raises(RequestError, match=r"(?s)requests use the adapter.*'0', 1 unfinished.*wait=True"):
        llm.unload_adapter("0")
    llm.unload_adapter("0", wait=True)
    assert llm.adapters == ["1"]
    with pytest.raises(RequestError, match=r"(?s)no adapter of this name is loaded.*'0'.*expected: 1"):
        llm.add_request(PROMPT, of("0"))
    with pytest.raises(CapacityError, match=r"(?s)no slot for an adapter is free.*max_adapters=2"):
        llm.load_adapter("2", written[2])
    outputs = {}
    while llm.unfinished:
        outputs |= {o.request_id: o.token_ids for o in llm.step()}
    assert outputs[first][:8] == expected[0]
    llm.load_adapter("2", written[2])
    assert tokens_of(llm, "1") == expected[1] and tokens_of(llm, "2") not in expected


def test_a_load_while_requests_run_changes_none_of_them(llm: LLM, written: list[Path]) -> None:
    llm.load_adapter("0", written[0])
    expected = [o.token_ids for o in llm.generate([PROMPT] * 2, [of("0", 20), of(None, 20)])]
    running = [llm.add_request(PROMPT, of(name, 20)) for name in ("0", None)]
    for _ in range(5):
        llm.step()
    llm.load_adapter("1", written[1])
    late, outputs = llm.add_request(PROMPT, of("1")), {}
    while llm.unfinished:
        outputs |= {o.request_id: o.token_ids for o in llm.step()}
    assert [outputs[number] for number in running] == expected
    assert outputs[late] == tokens_of(llm, "1")


def test_restarted_workers_have_the_adapters(llm: LLM, written: list[Path]) -> None:
    """Also the one that is unloaded and still in use."""
    for i in range(2):
        llm.load_adapter(str(i), written[i])
    expected = [tokens_of(llm, str(i)) for i in range(2)]
    number = llm.add_request(PROMPT, of("0"))
    for _ in range(3):
        llm.step()
    llm.unload_adapter("0", wait=True)
    llm.restart()
    outputs = {}
    while llm.unfinished:
        outputs |= {o.request_id: o.token_ids for o in llm.step()}
    assert outputs[number] == expected[0] and tokens_of(llm, "1") == expected[1]


@pytest.mark.slow
def test_preemption(path: Path, written: list[Path]) -> None:
    """Rows leave and come back, in other rows than before, with their slots."""
    found = []
    for blocks, host in ((200, 0), (34, 0), (34, 30)):
        with families.run(path, max_adapters=2, num_blocks=blocks, num_cpu_blocks=host, max_model_len=100) as llm:
            for i in range(2):
                llm.load_adapter(str(i), written[i])
            outputs = llm.generate([PROMPT[:30]] * 4, [of(name, 30) for name in ("0", None, "1", "0")])
            found.append([o.token_ids for o in outputs])
            assert (llm.stats().preemptions > 0) == (blocks < 100)
    assert found[0] == found[1] == found[2]


@pytest.mark.slow
def test_drafts_of_a_model_without_adapters(path: Path, written: list[Path], llm: LLM) -> None:
    llm.load_adapter("0", written[0])
    expected = [o.token_ids for o in llm.generate([PROMPT] * 2, [of("0", 20), of(None, 20)])]
    with families.run(path, max_adapters=1, speculate="draft", draft_model=str(path)) as other:
        other.load_adapter("0", written[0])
        assert [o.token_ids for o in other.generate([PROMPT] * 2, [of("0", 20), of(None, 20)])] == expected
        assert other.stats().accepted_tokens > 10


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"r": 5}, r"(?s)rank is above.*got: 5.*max_adapter_rank=4.*max_adapter_rank=5"),
    "dora": ({"use_dora": True}, r"(?s)use_dora, which is not supported.*merge_and_unload"),
    "saved": ({"modules_to_save": ["lm_head"]}, r"(?s)modules_to_save.*lm_head"),
    "bias": ({"bias": "all"}, r"(?s)has bias,.*'all'"),
    "unknown": ({"new_method": {"x": 1}}, r"(?s)has new_method, which is not supported"),
    "kind": ({"peft_type": "IA3"}, r"(?s)has peft_type.*'IA3'"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, r"(?s)init_lora_weights.*path_initial_model"),
    "pattern": ({"rank_pattern": {"(": 2}}, "rank_pattern in adapter_config.json is not usable"),
    "pattern's rank": ({"rank_pattern": {"q_proj": 2}}, r"(?s)wrong shape.*does not belong to these tensors"),
    "alpha": ({"lora_alpha": "x"}, "lora_alpha in adapter_config.json is not usable")}


@pytest.mark.parametrize("name", REFUSED)
def test_adapters_that_are_refused(llm: LLM, path: Path, tmp_path: Path, name: str) -> None:
    options, said = REFUSED[name]
    with pytest.raises(ModelLoadError, match=said):
        llm.load_adapter("x", adapters_by_hand.write(tmp_path / "x", path, 0, **options))
    assert not llm.adapters


def changed(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    tensors = load_file(directory / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, str(directory / "adapter_model.safetensors"))
    return directory


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


@pytest.mark.parametrize(("change", "said"), [
    (lambda t: t.update({FIRST.format("A"): torch.zeros(4, 96)}), r"(?s)wrong shape.*\[4, 96\].*\[4, 64\].*widths"),
    (lambda t: t.pop(FIRST.format("B")), r"(?s)not complete.*layers.0.self_attn.q_proj"),
    (lambda t: t[FIRST.format("B")].view(-1)[3:4].fill_(torch.inf), r"(?s)not finite.*damaged"),
    (lambda t: t.update({FIRST.format("A").replace("q_proj", "query"): torch.zeros(4, 64),
                         FIRST.format("B").replace("q_proj", "query"): torch.zeros(64, 4)}),
     r"(?s)does not have.*self_attn.query.*expected: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"),
    (lambda t: t.update({"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 64),
                         "base_model.model.lm_head.lora_B.weight": torch.zeros(199, 4)}),
     r"(?s)does not have.*lm_head"),
    (lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(2, 2)}), r"(?s)not supported.*lm_head.weight"),
    (lambda t: t.update({FIRST.format("A"): torch.zeros(4, 64, dtype=torch.int8)}), r"(?s)not supported.*I8")])
def test_tensors_that_are_refused(llm: LLM, path: Path, tmp_path: Path,
                                  change: Callable[[dict[str, torch.Tensor]], None], said: str) -> None:
    with pytest.raises(ModelLoadError, match=said):
        llm.load_adapter("x", changed(adapters_by_hand.write(tmp_path / "x", path, 0), change))


def test_an_adapter_of_a_wider_model(llm: LLM, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    other = adapters_by_hand.write(tmp_path / "x", checkpoint("qwen3"), 0, base_model_name_or_path="other/model")
    with pytest.raises(ModelLoadError, match=r"(?s)wrong shape.*trained for 'other/model'.*other widths"):
        llm.load_adapter("x", other)


def test_names_and_files(llm: LLM, path: Path, written: list[Path], tmp_path: Path) -> None:
    llm.load_adapter("a", written[0])
    cases: list[tuple[type[HalError], str, Callable[[], object]]] = [
        (RequestError, r"(?s)of this name is loaded.*'a'", lambda: llm.load_adapter("a", written[1])),
        (RequestError, "name of an adapter is not usable", lambda: llm.load_adapter("", written[1])),
        (RequestError, r"(?s)no adapter of this name.*expected: a", lambda: llm.unload_adapter("b")),
        (RequestError, r"(?s)no adapter of this name.*expected: a", lambda: llm.generate([PROMPT], of("b"))),
        (RequestError, "adapter is not usable", lambda: SamplingParams(adapter=3)),  # type: ignore[arg-type]
        (ModelLoadError, "no adapter_config.json", lambda: llm.load_adapter("b", tmp_path / "absent"))]
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "adapter_model.bin").touch()
    cases.append((ModelLoadError, r"(?s)pickled.*safe_serialization",
                  lambda: llm.load_adapter("b", tmp_path / "pickled")))
    for kind, said, call in cases:
        with pytest.raises(kind, match=said):
            call()
    refused = pytest.raises(CapacityError, match=r"(?s)no slots for adapters.*max_adapters=N")
    with families.run(path) as without, refused:
        without.load_adapter("a", written[0])


def test_a_backend_without_the_feature_refuses_it() -> None:
    with pytest.raises(BackendError, match=r"(?s)'null' takes no adapters.*max_adapters=2.*merge_and_unload"):
        LLM(device="null", max_adapters=2)


def test_the_slots_are_counted_before_the_kv_cache(path: Path) -> None:
    found = []
    for slots in (0, 64):
        with families.run(path, max_adapters=slots, max_adapter_rank=64, max_num_seqs=4) as llm:
            runner = llm.executor._worker.runner  # type: ignore[attr-defined]
            held = sum(x.adapters.a.nbytes + x.adapters.b.nbytes for x in runner.adapters.layers) if slots else 0
            found.append((held, runner.reserve_bytes()))
    inputs, outputs = 4 * (64 * 3 + 64 + 64 * 2 + 96), 4 * (64 + 2 * 32 + 64 + 96 * 2 + 64)
    assert found[1][0] == 64 * 64 * (inputs + outputs) * 4 and found[1][1] > found[0][1]


@pytest.mark.slow
def test_a_rank_that_cannot_read_the_files_is_named(path: Path, written: list[Path]) -> None:
    """The directory has changed since the engine checked it: the step fails as after any fault of a rank."""
    with families.run(path, max_adapters=1, tp=2) as llm:
        llm.load_adapter("0", written[0])
        (written[0] / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "use_dora": True}))
        with pytest.raises(WorkerError, match=r"(?s)rank [01] failed in step 1.*use_dora"):
            llm.generate([PROMPT], of(None))
