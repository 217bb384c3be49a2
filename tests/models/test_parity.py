"""The model definitions against transformers, on one rank and cut into tensor-parallel and pipeline ranks."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import checkpoints
import pytest
import torch
from lockstep import LockstepCommunicator

from hal.checkpoints.hf_config import read_config
from hal.checkpoints.loader import load_weights
from hal.config import BUNDLED_MODEL, Topology
from hal.contracts.attention import AttentionSpec, ForwardContext, LayerAttention
from hal.contracts.communicator import Communicator, LocalCommunicator
from hal.contracts.inputs import IntermediateTensors
from hal.model_config import ModelConfig
from hal.models import build_model
from hal.models.causal_lm import CausalLM
from hal.models.layers import Linear
from hal.models.ops import Ops

Checkpoint = Callable[[str], Path]
CPU = torch.device("cpu")
PROMPT = checkpoints.prompts(1, longest=48)[0]  # beyond every window


class DenseAttention:
    """Causal attention within one prompt, written out; no cache."""

    def __init__(self, specs: list[AttentionSpec]) -> None:
        self.specs = specs

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        spec, n = self.specs[layer], q.shape[0]
        assert q.shape == (n, spec.num_heads, spec.head_dim)
        assert k.shape == v.shape == (n, spec.num_kv_heads, spec.head_dim)
        groups = spec.num_heads // spec.num_kv_heads
        k, v = (x.repeat_interleave(groups, 1).transpose(0, 1) for x in (k, v))
        age = torch.arange(n)[:, None] - torch.arange(n)
        seen = (age >= 0) & (age < (spec.window or n))
        scores = (q.transpose(0, 1) @ k.transpose(1, 2) * spec.scale).masked_fill(~seen, float("-inf"))
        weights = scores.float().softmax(-1).to(q.dtype)
        return (weights @ v).transpose(0, 1).reshape(n, -1)


def load(path: Path, topology: Topology, communicator: Communicator, dtype: torch.dtype = torch.float32) -> CausalLM:
    model = build_model(read_config(path), topology, communicator, Ops(), dtype, CPU)
    load_weights(model, path)
    return model


def context(attention: LayerAttention) -> ForwardContext:
    """Of a step without an input of its own."""
    return ForwardContext(attention, None)  # type: ignore[arg-type]


def step(model: CausalLM, token_ids: list[int], intermediate: IntermediateTensors | None = None,
         ) -> torch.Tensor | IntermediateTensors:
    ids = torch.tensor(token_ids, dtype=torch.int32)
    positions = torch.arange(len(token_ids), dtype=torch.int32)
    out = model(ids, positions, context(DenseAttention(model.attention_specs)), intermediate)
    return model.compute_logits(out).float().log_softmax(-1) if isinstance(out, torch.Tensor) else out


def stages(path: Path, token_ids: list[int], tp: int, pp: int) -> list[torch.Tensor]:
    """Log-probabilities as every tp rank of the last stage has them."""
    between: list[IntermediateTensors | None] = [None] * tp
    outputs: list[torch.Tensor | IntermediateTensors] = []
    for stage in range(pp):
        barrier, shelf = threading.Barrier(tp), [None] * tp
        ranks = [Topology(tp, pp, stage * tp + i) for i in range(tp)]
        models = [load(path, t, LockstepCommunicator(t, shelf, barrier)) for t in ranks]
        with ThreadPoolExecutor(tp) as pool:
            outputs = list(pool.map(lambda m, x: step(m, token_ids, x), models, between))
        if stage < pp - 1:
            for model, out in zip(models, outputs, strict=True):
                assert isinstance(out, model.intermediate_type)
                out.validate()
            # What travels is bytes: the next stage unpacks it as its own declaration.
            between = [m.intermediate_type.from_buffer(out.to_buffer().copy())
                       for m, out in zip(models, outputs, strict=True)]
    return outputs


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


@pytest.mark.parametrize("name", checkpoints.NAMES)
def test_logprobs_equal_transformers(checkpoint: Checkpoint, name: str) -> None:
    path = checkpoint(name)
    ours = step(load(path, Topology(), LocalCommunicator()), PROMPT)
    theirs = checkpoints.logprobs(checkpoints.load(path), PROMPT)
    assert ours.shape == (len(PROMPT), checkpoints.VOCAB)
    assert_close(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("name", checkpoints.NAMES)
def test_bfloat16_is_as_near_to_fp32_as_transformers_is(checkpoint: Checkpoint, name: str) -> None:
    path = checkpoint(name)
    exact = checkpoints.logprobs(checkpoints.load(path), PROMPT)
    theirs = (checkpoints.logprobs(checkpoints.load(path, torch.bfloat16), PROMPT) - exact).square().mean().sqrt()
    ours = (step(load(path, Topology(), LocalCommunicator(), torch.bfloat16), PROMPT) - exact).square().mean().sqrt()
    assert ours < 1.25 * theirs, f"root mean square error {ours:.4f} against transformers' {theirs:.4f}"


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (4, 1), (1, 2), (1, 3), (2, 2)])
@pytest.mark.parametrize("name", checkpoints.NAMES)
def test_layouts_agree_with_transformers(checkpoint: Checkpoint, name: str, tp: int, pp: int) -> None:
    path = checkpoint(name)
    theirs = checkpoints.logprobs(checkpoints.load(path), PROMPT)
    for ours in stages(path, PROMPT, tp, pp):
        assert_close(ours, theirs)


@pytest.mark.parametrize("layout", [(1, 1), (2, 2)], ids=str)
def test_bundled_model(layout: tuple[int, int]) -> None:
    tokens = json.loads((BUNDLED_MODEL / "tokenizer.json").read_text())["model"]["vocab"]
    ids = [tokens[c] for c in "37+85="]
    theirs = checkpoints.logprobs(checkpoints.load(BUNDLED_MODEL), ids)
    for ours in stages(BUNDLED_MODEL, ids, *layout):
        assert_close(ours, theirs)


def test_a_sliding_window_changes_the_result(checkpoint: Checkpoint) -> None:
    """The parity above would not notice a window that nobody applies, if it made no difference."""
    model = load(checkpoint("mistral-window"), Topology(), LocalCommunicator())
    windowed = step(model, PROMPT)
    model.attention_specs = [dataclasses.replace(s, window=None) for s in model.attention_specs]
    full = step(model, PROMPT)
    assert_close(windowed[:checkpoints.WINDOW], full[:checkpoints.WINDOW])
    assert (windowed[checkpoints.WINDOW:] - full[checkpoints.WINDOW:]).abs().max() > 0.1


@pytest.mark.parametrize("name", ["llama3-gqa", "qwen3", "gpt2"])
def test_each_row_of_a_mixed_batch_is_its_own(checkpoint: Checkpoint, name: str) -> None:
    """Tokens at any positions in one step, as a decode batch has them: a row depends on its own token and place."""
    model = load(checkpoint(name), Topology(), LocalCommunicator())
    kv = model.attention_specs[0].num_kv_heads

    def own_value(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = (x.repeat_interleave(q.shape[1] // kv, 1) for x in (k, v))
        return (q * (1 + k) + v).flatten(1)

    ids, positions = (torch.tensor(x, dtype=torch.int32) for x in ([5, 198, 7, 5], [200, 0, 31, 3]))
    together = model.compute_logits(model(ids, positions, context(own_value)))
    for i in range(4):
        alone = model.compute_logits(model(ids[i:i + 1], positions[i:i + 1], context(own_value)))
        torch.testing.assert_close(together[i:i + 1], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.torch_release
@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_compiles_without_a_break(checkpoint: Checkpoint, name: str) -> None:
    model = load(checkpoint(name), Topology(), LocalCommunicator())
    step = context(DenseAttention(model.attention_specs))
    ids, positions = torch.tensor(PROMPT, dtype=torch.int32), torch.arange(len(PROMPT), dtype=torch.int32)
    compiled = torch.compile(lambda i, p: model.compute_logits(model(i, p, step)), fullgraph=True,
                             backend="aot_eager")
    torch.testing.assert_close(compiled(ids, positions), model.compute_logits(model(ids, positions, step)),
                               rtol=1e-4, atol=1e-4)


def test_a_tied_head_is_the_embedding_unless_on_another_stage(checkpoint: Checkpoint) -> None:
    path = checkpoint("qwen2-tied")
    whole = load(path, Topology(), LocalCommunicator())
    assert whole.head.weight is whole.embed.weight
    last = load(path, Topology(pp=3, rank=2), LocalCommunicator())
    assert not hasattr(last, "embed") and len(last.attention_specs) == 1
    assert torch.equal(last.head.weight, whole.head.weight)


def test_ops_are_replaceable_and_see_every_linear(checkpoint: Checkpoint) -> None:
    class Packing(Ops):
        packed = 0

        def pack_linear(self, layer: object) -> None:
            layer.weight = torch.nn.Parameter(layer.weight.t().contiguous(), requires_grad=False)  # type: ignore[attr-defined]
            self.packed += 1

        def linear(self, x: torch.Tensor, layer: Linear) -> torch.Tensor:
            y = x @ layer.weight
            return y if layer.bias is None else y + layer.bias

    path, ops = checkpoint("qwen2-tied"), Packing()
    config: ModelConfig = read_config(path)
    model = build_model(config, Topology(), LocalCommunicator(), ops, torch.float32, CPU)
    load_weights(model, path)
    assert ops.packed == 4 * config.num_layers + 1
    assert_close(step(model, PROMPT), checkpoints.logprobs(checkpoints.load(path), PROMPT))
