"""Every format over two tensor-parallel ranks and over two pipeline stages, in threads of this process."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lockstep import LockstepCommunicator

sys.path.insert(0, str(Path(__file__).parent))

import llama_cpp_values
import published
from published import FORMATS
from test_experts import Made, made, plain
from test_published import PROMPTS, build, forward

from hal.checkpoints.hf_config import read_config
from hal.checkpoints.loader import load_weights
from hal.config import Topology
from hal.contracts.attention import ForwardContext
from hal.errors import ConfigError
from hal.models import build_model
from hal.models.ops import Ops
from hal.weights.grid import GridScheme

__all__ = ["made", "plain"]  # fixtures
LAYOUTS = {"tp2": Topology(2), "pp2": Topology(1, 2), "ep2": Topology(2, 1, 0, 2)}


def logprobs(path: Path, mesh: Topology) -> torch.Tensor:
    """Of a prompt, by all ranks of a mesh. Raises what a rank raises."""
    ids, shelf, barrier = PROMPTS[0], [None] * mesh.tp, threading.Barrier(mesh.tp)

    def rank(topology: Topology, given: Any = None) -> Any:
        model = build_model(read_config(path), topology, LockstepCommunicator(topology, shelf, barrier), Ops(),
                            torch.float32, torch.device("cpu"))
        load_weights(model, path)
        if topology.is_last_stage and given is None:
            return forward(model, ids)
        return staged(model, ids, given)

    if mesh.pp == 1:
        with ThreadPoolExecutor(mesh.tp) as pool:
            found = list(pool.map(rank, mesh.every_rank()))
        assert all(torch.equal(found[0], each) for each in found)
        return found[0]
    given = None
    for topology in mesh.every_rank():
        given = rank(topology, given)
    return given


def staged(model: Any, ids: list[int], given: Any) -> Any:
    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        spec = model.attention_specs[layer]
        groups = spec.num_heads // spec.num_kv_heads
        heads = (x.transpose(0, 1) for x in (q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)))
        found = F.scaled_dot_product_attention(*heads, is_causal=True, scale=spec.scale)
        return found.transpose(0, 1).flatten(1)

    with torch.inference_mode():
        out = model(torch.tensor(ids, dtype=torch.int32), torch.arange(len(ids), dtype=torch.int32),
                    ForwardContext(attend, None), given)  # type: ignore[arg-type]
        return out if not model.topology.is_last_stage else model.compute_logits(out).float().log_softmax(-1)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_ranks_give_what_one_gives(made: Made, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mixture, whose attention and experts are quantised. Inputs are exact here: a rank rounds its part of a row by
    a scale of its own, which may choose another expert."""
    monkeypatch.setattr(GridScheme, "linear", lambda self, x, layer: F.linear(x, self.dequantize(layer), layer.bias))
    path = made(name)[0]
    expected = logprobs(path, Topology())
    for layout in LAYOUTS if name != "fp8-blocks-across" else ("pp2",):
        torch.testing.assert_close(logprobs(path, LAYOUTS[layout]), expected, rtol=0, atol=2e-4)
    if name == "fp8-blocks-across":
        with pytest.raises(ConfigError, match=r"(?s)tp=2 cuts a group.*'fp8-block'.*largest below is 1"):
            logprobs(path, LAYOUTS["tp2"])


def test_published_blocks_are_cut_at_their_boundaries_alone(plain: Callable[[str], Path], tmp_path: Path) -> None:
    """Blocks of 128 x 128: an expert of 64 inner units is one, and no tp cuts it."""
    config = FORMATS["fp8-blocks"][0]
    path, _ = published.write(plain("qwen3-moe"), tmp_path, {**config, "weight_block_size": [128, 128]},
                              published.fp8_blocks(128))
    assert build(path) is not None
    with pytest.raises(ConfigError, match=r"(?s)tp=2 cuts a group of the weight scheme 'fp8-block'.*multiple of 128"):
        build(path, Topology(2))


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q4_K", "Q6_K"])
def test_blocks_of_gguf(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    path = llama_cpp_values.write(tmp_path / "model.gguf", "qwen3", only=kind, head=128)
    expected = logprobs(path, Topology())
    for layout in ("tp2", "pp2"):
        torch.testing.assert_close(logprobs(path, LAYOUTS[layout]), expected, rtol=0, atol=2e-4)
    if "K" in kind:  # 512 inputs of a row-parallel layer are two blocks
        with pytest.raises(ConfigError, match=rf"(?s)tp=4 cuts a group.*'gguf-{kind}'.*largest below is 2"):
            build(path, Topology(4))
