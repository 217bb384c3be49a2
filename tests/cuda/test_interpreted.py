"""The whole CUDA runner where there is no GPU: kernels in Triton's interpreter, and a graph's replay runs what was
captured once more. It shows that the parts fit, not what a device makes of them."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import adapters_by_hand
import families
import numpy as np
import pytest
import sentences
import torch
from eager import eager_steps
from safetensors.torch import load_file, save_file

from hal.checkpoints.hf_config import read_config
from hal.config import BUNDLED_MODEL, EngineConfig
from hal.contracts.backend import select
from hal.contracts.executor import make_executor
from hal.engine.llm import LLM
from hal.engine.scheduler import Scheduler
from hal.engine.sequence import Sequence
from hal.errors import CapacityError
from hal.sampling.params import SamplingParams

PROMPTS, ANSWERS = ["37+85=", "123+456=", "999+1=", "7+8=", "250+250="], ["122", "579", "1000", "15", "500"]


class Anything:
    """Events and graphs."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.replay: Callable[[], None] = lambda: None

    def record(self, stream: object = None) -> None: ...

    def synchronize(self) -> None: ...


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("the rest of these tests run on the GPU")
    from runners.cuda import CudaBackend, ops, runner, staging
    from runners.cuda.kernels import gemv

    empty, capture, choice = torch.empty, runner.capture, itertools.count()
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: None)
    for name, value in (("mem_get_info", (1 << 30, 1 << 30)), ("memory_allocated", 0), ("max_memory_allocated", 0),
                        ("get_device_capability", (9, 0))):
        monkeypatch.setattr(torch.cuda, name, lambda *args, value=value: value)
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **kind: empty(*size, **kind))
    monkeypatch.setattr(torch.cuda, "Event", Anything)
    monkeypatch.setattr(staging, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Anything)
    monkeypatch.setattr(torch.cuda, "graph", lambda *args, **options: contextlib.nullcontext())
    monkeypatch.setattr(CudaBackend, "unavailable", lambda self: None)
    monkeypatch.setattr(CudaBackend, "device", lambda self, rank: torch.device("cpu"))
    monkeypatch.setattr(runner.CudaModelRunner, "reserve_bytes", lambda self: 0)
    monkeypatch.setattr(runner, "prompt_sizes", lambda *args: ())  # they would take minutes to run once
    # The last is the best: each use of the matrix-vector kernel gets the tile, a large one that makes few programs.
    monkeypatch.setattr(ops, "TILES", (gemv.Tile(64, 256, 4),))
    monkeypatch.setattr(ops, "_milliseconds", lambda graph: -next(choice))

    def captured(blank: Any, dims: Any, received: Any, run: Callable[..., Any], *more: Any) -> Any:
        steps: list[Any] = []
        graph = capture(blank, dims, received, lambda *step: (steps.append(step), run(*step))[1], *more)

        def replay() -> None:
            for into, result in zip(graph.results, run(*steps[-1]), strict=True):
                into.copy_(result)

        graph.graph.replay = replay
        return graph

    monkeypatch.setattr(runner, "capture", captured)


@pytest.fixture(scope="module")
def thin(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The bundled model's first layer, in a quarter of the time: its texts are nonsense."""
    folder = tmp_path_factory.mktemp("thin") / "model"
    shutil.copytree(BUNDLED_MODEL, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    tensors = load_file(folder / "model.safetensors")
    save_file({name: x for name, x in tensors.items() if ".layers." not in name or ".layers.0." in name},
              folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def test_a_padded_step_is_staged_where_its_graph_reads() -> None:
    with LLM(device="cuda", dtype="float32", num_blocks=16, max_num_seqs=4, block_size=24, max_model_len=24) as llm:
        runner = llm.executor._worker.runner
        assert [o.text for o in llm.generate(PROMPTS[:3])] == ANSWERS[:3]
        assert (4, 1, 4, False) in runner._views and 3 not in runner.graphs


def replays_of(graphs: Any) -> list[Any]:
    """The keys of graphs, as they are replayed from now on."""
    seen: list[Any] = []
    for key, graph in graphs.items():
        def counted(key: Any = key, replay: Callable[[], None] = graph.graph.replay) -> None:
            seen.append(key)
            replay()

        graph.graph.replay = counted
    return seen


@pytest.mark.slow
def test_a_round_of_a_draft_model_is_replays_of_graphs(thin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy, and drawn with penalties and logprobs; alone, and as two sequences of unequal drafts. The tokens are
    those of plain decoding, and nothing but prompts is computed without a graph."""
    sizes = {"num_blocks": 24, "max_num_seqs": 2, "block_size": 8, "max_model_len": 24, "dtype": "float32"}
    drawn = {"temperature": 0.5, "seed": 3, "repetition_penalty": 1.2, "logprobs": 2}
    params = [SamplingParams(max_tokens=6, ignore_eos=True, **more) for more in ({}, {}, drawn)]
    batches = [PROMPTS[:1], params[:1]], [PROMPTS[1:3], params[1:]]
    with LLM(thin, device="cuda", **sizes) as llm:
        plain = [[o.token_ids for o in llm.generate(*batch)] for batch in batches]
    from hal.engine.speculation import Speculation
    from runners.cuda import runner

    take_times = Speculation.take_times
    monkeypatch.setattr(Speculation, "take_times", lambda self, measured: take_times(  # two drafts always gain
        self, [(rows, drafts, 1.0) for rows, drafts, _ in measured]))
    monkeypatch.setattr(runner, "prompt_sizes", lambda *args: (8,))
    with LLM(thin, device="cuda", speculate="draft", draft_model=thin, speculative_tokens=2, **sizes) as llm:
        composed = llm.executor._worker.runner
        target, draft = composed.target, composed.proposer.runner
        assert not (target.prompts or draft.prompts)
        captured, seen = composed.compiled, [replays_of(r.several) for r in (target, draft)]
        eager = eager_steps(monkeypatch)
        assert [[o.token_ids for o in llm.generate(*batch)] for batch in batches] == plain
        stats = llm.stats()
        assert stats.accepted_tokens == stats.drafted_tokens > 0 and composed.compiled == captured
        assert {n for n, _ in seen[0]} == {1, 2} and {(1, 4), (2, 4)} <= {*seen[1]}
        assert min(m.max_query_len for m in eager) > 4 and draft.graphs[1].input.seq_lens[0] > 0


def test_a_graph_that_cannot_be_captured_leaves_nothing_of_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even while the error is handled: its traceback must not keep the model."""
    from runners.cuda import graphs, runner

    made = []
    captured = runner.CudaModelRunner._captured

    def fails(self: Any, *step: Any) -> Any:
        made.append(weakref.ref(self))
        captured(self, *step)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(runner.CudaModelRunner, "_captured", fails)
    monkeypatch.setattr(runner, "capture", graphs.capture)
    try:
        LLM(device="cuda", dtype="float32", num_blocks=8, max_num_seqs=2, block_size=24, max_model_len=24)
    except CapacityError as error:
        assert "CUDA graphs" in str(error) and made[0]() is None
    else:
        pytest.fail("it fits")


def test_a_prompt_whose_logprobs_are_wanted_joins_no_graph(thin: str) -> None:
    """Though the step has as many logits as sequences, and blocks as a graph."""
    found = []
    for graphs in (False, True):
        with LLM(thin, device="cuda", dtype="float32", num_blocks=8, max_num_seqs=2, max_num_batched_tokens=2,
                 block_size=24, max_model_len=24, graphs=graphs) as llm:
            plain, asked = SamplingParams(max_tokens=16, ignore_eos=True), SamplingParams(prompt_logprobs=0)
            found.append(llm.generate(["7", "123+456="], [plain, asked])[1].prompt_logprobs)
    assert found[0] is not None and found[1] is not None and len(found[0]) == len(found[1]) > 2


@pytest.mark.slow
def test_steps_with_prompts_are_replays_too(thin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks beside sequences whose tokens the host does not know when the step is made, greedy and drawn; and a step
    of more tokens than a graph holds. The tokens are those of the CPU."""
    from runners.cuda import graphs, runner

    monkeypatch.setattr(graphs, "_FEW_SEQS", 2)
    monkeypatch.setattr(runner, "prompt_sizes", lambda *args: (4, 8))
    sizes = {"num_blocks": 24, "max_num_seqs": 3, "max_num_batched_tokens": 9, "block_size": 4, "max_model_len": 24,
             "dtype": "float32"}
    params = [SamplingParams(temperature=0.5 * (i == 1), seed=3, max_tokens=3, ignore_eos=True) for i in range(4)]
    with LLM(thin, device="cpu", **sizes) as llm:
        expected = [o.token_ids for o in llm.generate(PROMPTS[:4], params)]
    with LLM(thin, device="cuda", **sizes) as llm:
        prompts = llm.executor._worker.runner.prompts
        eager, seen = eager_steps(monkeypatch), replays_of(prompts)
        assert {*prompts} == {(4, 2), (4, 3), (8, 2), (8, 3)}
        assert [o.token_ids for o in llm.generate(PROMPTS[:4], params)] == expected
    assert {(8, 2), (8, 3)} <= {*seen} and {len(m.input_ids) for m in eager} == {9}


@pytest.mark.parametrize("options", [{"dtype": "float16", "max_num_seqs": 2},
                                     {"kv_dtype": "fp8", "async_scheduling": False}], ids=str)
def test_the_bundled_model_adds(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunked, in batches that fill graphs and that do not; drawn and greedy; twice, from cached prefixes."""
    sizes = {"num_blocks": 40, "max_num_seqs": 4, "max_num_batched_tokens": 14, "block_size": 4, "max_model_len": 24}
    if "kv_dtype" in options:
        from runners.cuda import runner as module

        monkeypatch.setattr(module, "prompt_sizes", lambda *args: (8,))
    with LLM(device="cuda", **{"dtype": "float32", **sizes, **options}) as llm:
        runner = llm.executor._worker.runner
        assert runner.graphs and bool(runner.ops.tiles) == (options.get("dtype") == "float16")
        assert bool(runner.prompts) == ("kv_dtype" in options)
        greedy = [o.text for o in llm.generate(PROMPTS)]
        drawn = llm.generate(PROMPTS, SamplingParams(temperature=0.3, top_k=20, top_p=0.95, repetition_penalty=1.05,
                                                     seed=3, max_tokens=8, logprobs=2))
    right = sum(text == answer for text, answer in zip(greedy, ANSWERS, strict=True))
    assert right >= (3 if "kv_dtype" in options else 5)
    assert "kv_dtype" in options or [o.text for o in drawn] == ANSWERS


def test_masks_that_arrive_after_a_replay_hold_for_its_tokens(thin: str) -> None:
    """Greedy and drawn rows, of which one is restricted; then none is, and the graph's own tokens count."""
    found = []
    for late in (False, True):
        config = EngineConfig(model=thin, device="cuda", dtype="float32", num_blocks=16, max_num_seqs=4, block_size=24,
                              max_model_len=24, async_scheduling=late)
        model, backend = read_config(config.model), select("cuda")
        executor = make_executor(config, model, backend)
        scheduler = Scheduler(config, executor.num_blocks, ahead=late)
        seqs = [Sequence(request_id=i, prompt_ids=[7, 11, 9 + i], seed=i, limit=8, params=SamplingParams(
            ignore_eos=True, temperature=0.8 * (i == 2))) for i in range(3)]
        for seq in seqs:
            scheduler.add(seq)
        for count in range(5):
            step = scheduler.schedule()
            assert step is not None
            masks = {0: np.arange(model.vocab_size) % 3 == count % 3} if count < 3 else {}
            if not late:
                step.restrict(masks, model.vocab_size)
            handle = executor.execute_model(step.request, sampling_follows=late)
            if late:
                step.restrict(masks, model.vocab_size, handle)
            scheduler.update(step, handle.result().token_ids.numpy())
        executor.shutdown()
        assert all(token % 3 == i for i, token in enumerate(seqs[0].output_ids[:3]))
        found.append([seq.output_ids for seq in seqs])
    assert found[0] == found[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt-oss", "deepseek-v3"])
def test_families(tmp_path: Path, name: str) -> None:
    """Experts, sinks and windows; latents: tokens and logprobs are those of transformers in fp64."""
    path = families.save(name, tmp_path / "model")
    with families.run(path, "cuda", max_model_len=32, num_blocks=12, max_num_seqs=1, max_num_batched_tokens=13) as llm:
        asked = families.PROMPTS[1:2]
        families.assert_parity(path, asked, families.generate(llm, asked, 4))


@pytest.mark.slow
def test_several_decode_steps_are_replays_without_the_host_between(thin: str) -> None:
    """Greedy, and drawn with penalties and logprobs: the tokens are those of one step a message."""
    sizes = {"num_blocks": 40, "max_num_seqs": 3, "block_size": 4, "max_model_len": 24, "dtype": "float32"}
    params = [SamplingParams(max_tokens=5, ignore_eos=True), SamplingParams(max_tokens=8, logprobs=1),
              SamplingParams(max_tokens=5, temperature=0.5, seed=3, repetition_penalty=1.2, logprobs=2)]
    found = []
    for steps in (1, 4):
        with LLM(thin, device="cuda", steps_per_message=steps, **sizes) as llm:
            runner = llm.executor._worker.runner
            replays = replays_of(runner.graphs)
            outputs = [o for p in (params[:1], params[1:]) for o in llm.generate(PROMPTS[:len(p)], p)]
            found.append([(o.token_ids, o.text, o.finish_reason, [x.token_id for x in o.logprobs or ()],
                           [x.rank for x in o.logprobs or ()]) for o in outputs])
            if steps > 1:
                assert len(replays) > llm.stats().steps
    assert found[0] == found[1]


@pytest.mark.slow
def test_decode_steps_with_adapters_are_replays_of_graphs_of_their_own(thin: str, tmp_path: Path) -> None:
    """An adapter and none in one batch give the tokens of the CPU; a batch without adapters replays the others. One row
    has a penalty, whose fields lie behind those that a graph reads."""
    sizes = {"num_blocks": 12, "max_num_seqs": 2, "block_size": 24, "max_model_len": 24, "dtype": "float32",
             "max_adapters": 2}
    path = adapters_by_hand.write(tmp_path / "one", Path(thin), 1, r=3, strength=0.3)
    params = [SamplingParams(max_tokens=3, ignore_eos=True, adapter=name, repetition_penalty=penalty)
              for name, penalty in (("one", 1.0), (None, 1.2))]
    found = []
    for device in ("cpu", "cuda"):
        with LLM(thin, device=device, **sizes) as llm:
            llm.load_adapter("one", path)
            runner = llm.executor._worker.runner
            plain, adapted = [replays_of(g) for g in (runner.graphs, runner.adapted)] if device == "cuda" else ([], [])
            found.append([o.token_ids for o in llm.generate(PROMPTS[:2], params)])
            assert (2 in adapted) == (device == "cuda") and 2 not in plain
            found.append([o.token_ids for o in llm.generate(PROMPTS[1:2], params[1:])])
            assert bool(plain) == (device == "cuda")
    assert found[:2] == found[2:] and found[0][1] == found[1][0] != found[0][0]


@pytest.mark.slow
def test_embeddings_of_a_decoder(tmp_path: Path) -> None:
    """The norms and the rotary embedding are the kernels; the attention over whole texts is PyTorch's."""
    path, texts = sentences.save("qwen3-last", tmp_path), sentences.texts()[:4]
    with LLM(str(path), device="cuda", dtype="float32", max_num_seqs=3, max_num_batched_tokens=40) as llm:
        np.testing.assert_allclose(llm.embed(texts), sentences.vectors("qwen3-last", path, texts), atol=1e-5)


@pytest.mark.slow
def test_the_same_bits_in_any_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, and beside another one, which cuts the second prompt into chunks."""
    from runners.cuda import invariant
    from runners.cuda.kernels.attention import Division

    monkeypatch.setattr(invariant, "_DIVISION", Division(splits=2))
    params = SamplingParams(max_tokens=3, logprobs=1)
    with LLM(device="cuda", dtype="float32", num_blocks=12, max_num_seqs=2, block_size=8, max_model_len=16,
             max_num_batched_tokens=9, batch_invariant=True) as llm:
        alone = llm.generate(PROMPTS[1:2], params)
        together = llm.generate(PROMPTS[:2], params)
    assert [o.text for o in together] == [answer[:3] for answer in ANSWERS[:2]]
    assert [(o.token_ids, o.logprobs) for o in together[1:]] == [(o.token_ids, o.logprobs) for o in alone]
