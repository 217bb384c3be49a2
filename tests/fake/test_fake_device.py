"""The fake device: what it refuses, what it delays, and that what is right stays right."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))  # `fake_runners`

import fake_runners
from fake_runners import OnCpu, StaticRunner

from hal import LLM, SamplingParams
from hal.config import BUNDLED_MODEL
from hal.conformance.cases.engine import in_two_phases
from hal.conformance.context import Context, Session
from hal.conformance.run import Options, run
from hal.engine.scheduler import Scheduler
from hal.engine.sequence import Sequence
from hal.errors import BackendError, DeviceError, HalError, WorkerError
from hal.paged.runner import PagedModelRunner
from hal.testing.fake import FakeBackend, FakeRunner
from hal.testing.fake_device import GARBAGE, DeviceTensor, Event

pytestmark = pytest.mark.torch_release
GREEDY = SamplingParams(max_tokens=6, ignore_eos=True)
HELDOUT = Path(__file__).parents[2] / "hal" / "assets" / "add-tiny" / "heldout.jsonl"
MODULE = "hal.testing.fake:backend"


@pytest.fixture
def context(tmp_path: Path) -> Callable[..., Context]:
    return lambda backend, name="": Context(backend, "fake", "float32", 0, name=name, scratch=tmp_path)


def steps(ctx: Context, **options: Any) -> None:
    """Three sequences, one after another, and whether each token is right."""
    options = {"async_scheduling": True, **options}
    ctx.verify(ctx.engine(ctx.prompts(5, 9, 17), GREEDY, apart=1, **options))


# What is right.

@pytest.mark.slow
def test_the_bundled_model_adds() -> None:
    problems = [json.loads(line) for line in HELDOUT.read_text().splitlines()][::16][:60]
    with LLM(device=MODULE) as llm:
        outputs = llm.generate([p["prompt"] for p in problems])
        assert [o.text for o in outputs] == [p["answer"] for p in problems] and len(problems) == 60
        assert llm.scheduler.ahead  # steps were submitted before the tokens of the last were known
        assert llm.backend.fake.issued > 0  # type: ignore[attr-defined]


@pytest.mark.slow
def test_command(capfd: pytest.CaptureFixture[str]) -> None:
    from hal.cli import main

    assert main(["generate", "--device", MODULE, "37+85="]) == 0
    assert "122" in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [{"tp": 2}, {"pp": 2}])
def test_ranks(ranks: dict[str, int]) -> None:
    with LLM(device=MODULE, **ranks) as llm:
        assert [o.text for o in llm.generate(["37+85=", "123+456="])] == ["122", "579"]


@pytest.mark.slow
def test_it_is_conformant() -> None:
    report = run(Options(MODULE, examples=8, dtypes=("float32",)))
    assert report.verdict.startswith("Conformant L6 (float32)"), report.failed


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [{}, pytest.param({"pp": 2}, marks=pytest.mark.slow)])
def test_outputs_and_caches_that_their_runner_alone_can_open(ranks: dict[str, int]) -> None:
    """Steps run ahead on one rank; with two stages the last one's output travels. Blocks are swapped in the kit."""
    with LLM(device="fake_runners:opaque_backend", **ranks) as llm:
        assert [o.text for o in llm.generate(["37+85=", "123+456="])] == ["122", "579"]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["L0/runner/keeps_its_contract", "L3/cache/writes_nothing_else",
                                  "L3/cache/warmup_leaves_it_clean", "L3/output/outlives_the_next_step"])
def test_the_kit_opens_them_no_more_than_a_worker_does(case: str) -> None:
    report = run(Options("fake_runners:opaque_backend", cases=(case,), dtypes=("float32",)))
    assert [r.status for r in report.results] == ["pass"], [r.text for r in report.results]


def test_the_kit_sees_blocks_that_are_not_written_as_they_are_read() -> None:
    report = run(Options("fake_runners:shifting_backend", cases=("L0/runner/*",), dtypes=("float32",)))
    assert "blocks after 5 and 2 were written" in report.results[0].text


@pytest.mark.slow
def test_no_step_waits(context: Callable[..., Context]) -> None:
    """The default runner with copies that do not wait, drawn with every filter there is for a small vocabulary."""
    backend = FakeBackend(forbid_syncs=True)
    drawn = replace(GREEDY, temperature=0.8, top_k=9, top_p=0.9, min_p=0.01, repetition_penalty=1.2)
    ctx = context(backend)
    runs = ctx.engine(ctx.prompts(5, 9, 30), [drawn, GREEDY, replace(GREEDY, logprobs=2)], apart=1,
                      async_scheduling=True, max_num_batched_tokens=24)
    ctx.verify(runs)


@pytest.mark.slow
def test_no_part_of_a_step_in_two_phases_waits(context: Callable[..., Context]) -> None:
    """Rows are drawn with top-k, whose largest value the sampler reads from the host's copy."""
    in_two_phases(context(FakeBackend(forbid_syncs=True)))


# What is wrong, and passes on the CPU.

TRAPS: list[tuple[str, dict[str, Any], str, str]] = [
    ("adds_a_host_tensor", {}, "aten.add.Tensor", "several devices"),
    ("indexes_by_host_memory", {}, "aten.index.Tensor", "several devices"),
    ("writes_to_a_host_scalar", {}, "aten.add_.Tensor", "several devices"),
    ("reads_it_as_numpy", {}, "Tensor.numpy", "not the host's"),
    ("hands_a_pointer_to_c", {}, "Tensor.data_ptr", "not the host's"),
    ("reduces_host_memory", {}, "Communicator.all_reduce", "host memory"),
    ("waits_in_a_step", {"forbid_syncs": True}, "aten._local_scalar_dense", "waits for the device"),
    ("selects_by_mask", {"static_shapes": True}, "aten.index.Tensor", "depends on data"),
    ("reuses_a_buffer_in_flight", {}, "copy from the host", "written before"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options", "operation", "text"), TRAPS, ids=[t[0] for t in TRAPS])
def test_faults_of_a_runner_are_found(
        context: Callable[..., Context], monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, Any],
        operation: str, text: str) -> None:
    monkeypatch.delenv("HAL_STRICT", raising=False)  # its checks read every input back, and so wait for the device
    kind = getattr(fake_runners, name)
    steps(context(OnCpu(kind)))
    with pytest.raises(HalError) as caught:
        steps(context(FakeBackend(kind, **options)))
    error = caught.value if isinstance(caught.value, DeviceError) else caught.value.__cause__
    assert isinstance(error, DeviceError) and text in str(error)
    assert error.operation == operation and Path(error.site.rpartition(":")[0]).name == "fake_runners.py"


def test_a_default_copy_waits(context: Callable[..., Context]) -> None:
    steps(context(FakeBackend(PagedModelRunner)))
    with pytest.raises(WorkerError, match="waits for the device in a step; got copy from the host"):
        steps(context(FakeBackend(PagedModelRunner, forbid_syncs=True)))


@pytest.mark.slow
def test_a_round_of_a_draft_model_waits_for_nothing() -> None:
    """Neither between its parts nor within them; nor do the steps of prompts."""
    with LLM(device="fake_runners:no_syncs", speculate="draft", draft_model=BUNDLED_MODEL, speculative_tokens=3,
             max_num_seqs=2, num_blocks=40) as llm:
        assert [o.text for o in llm.generate(["37+85=", "999+1=", "7+8="])] == ["122", "1000", "15"]
        assert llm.stats().accepted_tokens == llm.stats().drafted_tokens > 0


def test_a_buffer_may_be_used_again_when_its_copy_has_run(context: Callable[..., Context],
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HAL_STRICT", raising=False)
    steps(context(FakeBackend(fake_runners.waits_for_its_buffer)))


def first_step(session: Session) -> Any:
    """The output of a prefill, on the device."""
    scheduler: Scheduler = session.scheduler()
    scheduler.add(Sequence(request_id=0, prompt_ids=[3, 4, 5], params=GREEDY, seed=0, limit=9))
    return session.execute(session.prepare(scheduler.schedule().request))  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["tells_tokens_too_early", "waits_for_a_mark_set_too_early"])
def test_tokens_that_have_not_arrived(context: Callable[..., Context], name: str) -> None:
    backend = FakeBackend(getattr(fake_runners, name))
    session = context(backend).session()
    output = first_step(session)
    result = session.runner.fetch(output)().token_ids
    assert result.numpy().tobytes() == bytes([GARBAGE] * 4)
    right = FakeRunner.fetch(session.runner, output)().token_ids  # type: ignore[arg-type]
    assert result.equal(right) and right.equal(output.token_ids.cpu())  # its mark lies behind the other copy


# Shapes.

@pytest.mark.slow
def test_shapes_that_the_warm_up_had_not(context: Callable[..., Context], monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = context(FakeBackend(static_shapes=True))
    steps(context(FakeBackend()))
    monkeypatch.setenv("HAL_STRICT", "1")
    with pytest.raises(WorkerError, match="a shape that the warm-up had not"):
        steps(ctx)
    monkeypatch.delenv("HAL_STRICT")
    session = ctx.session()
    before = session.runner.compiled
    assert before > 0
    first_step(session)
    assert session.runner.compiled > before
    assert FakeBackend().make_runner(ctx.config(), session.device, session.runner.communicator).compiled == 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_padded_runner_compiles_nothing(context: Callable[..., Context], seed: int) -> None:
    from hal.conformance.context import drive

    ctx = context(FakeBackend(StaticRunner, static_shapes=True), str(seed))
    session = ctx.session()
    before = session.runner.compiled
    prompts = ctx.prompts(*ctx.rng.integers(1, 60, 6).tolist())
    ctx.verify(drive(session.step, session.scheduler(max_num_batched_tokens=50), prompts, GREEDY, apart=1))
    assert session.runner.compiled == before > 0


# Tensors.

def test_devices_are_apart() -> None:
    one, other = FakeBackend(), FakeBackend()
    x, y = torch.ones(2, device=one.device(0)), torch.ones(2, device=other.device(0))
    with pytest.raises(DeviceError, match="several devices"):
        x + y
    assert (x + y.to(x.device, non_blocking=True)).tolist() == [2, 2] and one.device(0) == one.device(3)


def test_what_a_device_tensor_can_do_and_what_not() -> None:
    backend = FakeBackend()
    device = backend.device(0)
    x = torch.arange(6.0, device=device).view(2, 3)
    assert isinstance(x, DeviceTensor) and x.device == device and not x.is_cpu
    assert (x + torch.tensor(1.0)).tolist() == [[1, 2, 3], [4, 5, 6]]  # a scalar of the host
    before = backend.fake.syncs
    assert (x.sum().item(), int(x[1, 1]), bool(x.any()), x.tolist()[0]) == (15.0, 4, True, [0, 1, 2])
    assert backend.fake.syncs == before + 4
    torch.tensor([1, 2], device=device)
    assert x[x > 1].shape == (4,) and backend.fake.syncs == before + 6
    x[0] = torch.zeros(3)
    x[:, 1] = 7
    host = torch.zeros(3)
    host[1:] = x[1, 1:]
    assert host.tolist() == [0, 7, 5] and x.tolist() == [[0, 7, 0], [3, 7, 5]]
    x.zero_()
    assert "0." in repr(x) and "fake" in repr(x)
    for wrong in (lambda: x[torch.tensor([0])], lambda: host[torch.zeros(1, dtype=torch.long, device=device)],
                  lambda: torch.stack((x[0], host)), x.__array__, x.__dlpack__, x.t_, lambda: x.resize_(9),
                  lambda: torch.add(x, x, out=torch.empty(0, device=device))):
        with pytest.raises(DeviceError):
            wrong()
    linear = torch.nn.Linear(3, 2).to(device)
    assert isinstance(linear(x), DeviceTensor) and linear(x).shape == (2, 2)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_it_computes_what_the_cpu_does(data: st.DataObject) -> None:
    """Programs of operations, views and writes in place, in and out of inference mode; at the end no memory is left."""
    backend = FakeBackend()
    size = st.integers(0, 3)
    operations: list[Callable[[Any, Any, int, int], Any]] = [
        lambda x, y, i, j: x + y, lambda x, y, i, j: x.mul_(0.5), lambda x, y, i, j: x.t(),
        lambda x, y, i, j: x[i:i + 1].add_(y[j:j + 1]) + x, lambda x, y, i, j: torch.cat((x, y), 1)[:, 2:6],
        lambda x, y, i, j: x.softmax(-1) @ y, lambda x, y, i, j: x.masked_fill(y > 0, 1.5),
        lambda x, y, i, j: x.copy_(y + 1), lambda x, y, i, j: x[:, :i + 1].sum(1, keepdim=True).expand(4, 4) * y,
        lambda x, y, i, j: x.index_select(0, torch.tensor([i, j, i, j]).to(x.device)),
        lambda x, y, i, j: x.clone().index_put_((torch.tensor([i], device=x.device),), y[j]).contiguous(),
        lambda x, y, i, j: torch.where(x > y, x, float(j)).to(torch.bfloat16).float(), lambda x, y, i, j: x.sort(1)[0],
        lambda x, y, i, j: torch.nn.functional.scaled_dot_product_attention(x[None], y[None], x[None])[0]]
    program = data.draw(st.lists(st.tuples(st.sampled_from(operations), size, size, size, size), max_size=8))
    with torch.inference_mode(data.draw(st.booleans())):
        values = []
        for device in (torch.device("cpu"), backend.device(0)):
            state = [torch.arange(k, k + 16.0).view(4, 4).sin().to(device) for k in range(4)]
            for operation, a, b, i, j in program:
                state[b] = operation(state[a], state[b], i, j)
            values.append([x.cpu() for x in state])
    for cpu, fake in zip(*values, strict=True):
        torch.testing.assert_close(fake, cpu, atol=1e-5, rtol=1e-5)
    del state
    assert backend.fake.used == 0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["out", "in", "record", "wait", "synchronize", "read", "write"]), max_size=24))
def test_copies_end_when_something_waits_for_them(actions: list[str]) -> None:
    """Against a model of it: copies in order, of which those up to an event, or all, are done."""
    backend = FakeBackend()
    device, event = backend.device(0), Event(backend.device(0))
    source, issued, done, mark = torch.zeros(2, dtype=torch.int32, device=device), 0, 0, 0
    out: list[tuple[int, torch.Tensor, int]] = []
    sent: list[tuple[int, torch.Tensor]] = []
    for n, action in enumerate(actions):
        if action == "out":
            source.fill_(n)
            issued += 1
            out.append((issued, torch.empty(2, dtype=torch.int32).copy_(source, non_blocking=True), n))
        elif action == "in":
            issued += 1
            sent.append((issued, torch.full((2,), n, dtype=torch.int32)))
            assert sent[-1][1].to(device, non_blocking=True).elem.tolist() == [n, n]  # type: ignore[attr-defined]
        elif action == "record":
            event.record()
            mark = issued
        elif action == "write" and sent and sent[-1][0] > done:
            sent[-1][1].add_(1)
            with pytest.raises(DeviceError, match="written before"):
                backend.runtime.synchronize(device)
            return
        elif action in ("wait", "synchronize", "read"):
            {"wait": event.synchronize, "synchronize": lambda: backend.runtime.synchronize(device),
             "read": lambda: source.sum().item()}[action]()
            done = max(done, mark) if action == "wait" else issued
        for at, host, value in out:
            assert host.numpy().tobytes() == bytes([GARBAGE] * 8) if at > done else host.tolist() == [value] * 2


# The process that it is in.

def other_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_importing_it_changes_nothing_and_another_device_is_respected() -> None:
    out = other_process("import torch, hal.testing.fake as f; print(torch._C._get_privateuse1_backend_name())\n"
                        "torch.utils.rename_privateuse1_backend('npu'); print(f.backend.unavailable())\n"
                        "try: f.backend.device(0)\nexcept f.BackendError as e: print(e.got)"
                        .replace("f.BackendError", "__import__('hal.errors').errors.BackendError"))
    first, why, got = out.splitlines()
    assert first == "privateuseone" and "'npu'" in why and got == "npu"


def test_a_fake_device_must_be_made_before_it_is_used() -> None:
    FakeBackend().device(0)
    with pytest.raises(BackendError, match="no such fake device"):
        torch.zeros(2, device="fake:126")
