"""EAGLE-3 heads against a forward pass in plain PyTorch, the hidden states that they read, and damaged heads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import checkpoints
import heads
import pytest
import torch
from safetensors.torch import load_file, save_file

from hal.checkpoints.draft import read_draft
from hal.checkpoints.hf_config import read_config
from hal.checkpoints.loader import load_weights, random_weights
from hal.config import Topology
from hal.contracts.attention import AttentionSpec, ForwardContext
from hal.contracts.communicator import LocalCommunicator
from hal.errors import ConfigError, HalError, ModelLoadError
from hal.model_config import ModelConfig
from hal.models import build_model
from hal.models.causal_lm import CausalLM
from hal.models.eagle3 import Eagle3
from hal.models.ops import Ops

Checkpoint = Callable[[str], Path]
HIDDEN = 64  # of the checkpoints
PROMPT = checkpoints.prompts(1, longest=24)[0]


class Causal:
    """Causal attention within one sequence, without a cache."""

    def __init__(self, specs: list[AttentionSpec]) -> None:
        self.specs = specs

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True,
                                                               scale=self.specs[layer].scale)
        return out.transpose(0, 1).flatten(1)


def build(config: ModelConfig) -> CausalLM:
    return build_model(config, Topology(), LocalCommunicator(), Ops(), torch.float32, torch.device("cpu"))


def run(model: CausalLM, ids: torch.Tensor, hidden: torch.Tensor | None = None,
        taps: dict[int, torch.Tensor | None] | None = None) -> torch.Tensor:
    context = ForwardContext(Causal(model.attention_specs), None, taps=taps)  # type: ignore[arg-type]
    given = None if hidden is None else model.make_intermediate(hidden)
    out = model(ids.int(), torch.arange(len(ids), dtype=torch.int32), context, given)
    assert isinstance(out, torch.Tensor)
    return out


@pytest.mark.parametrize(("drafts", "embeddings", "before"), [(50, False, False), (None, True, False),
                                                              (50, True, True)])
def test_a_head_equals_plain_pytorch(checkpoint: Checkpoint, tmp_path: Path, drafts: int | None, embeddings: bool,
                                     before: bool) -> None:
    target = checkpoint("llama3-gqa")
    path = heads.save(tmp_path / "head", vocab=checkpoints.VOCAB, hidden=HIDDEN, drafts=drafts, embeddings=embeddings,
                      norm_before_residual=before)
    config = read_draft(path, "eagle", read_config(target), 200)
    assert config.eagle is not None and config.eagle.own_embeddings == embeddings
    head, model = build(config), build(read_config(target))
    load_weights(head, path)
    load_weights(model, target)
    if not embeddings:
        head.embed = model.embed
    assert isinstance(head, Eagle3)
    taps: dict[int, torch.Tensor | None] = dict.fromkeys(config.eagle.taps)
    ids = torch.tensor(PROMPT)
    run(model, ids, taps=taps)
    states = torch.cat([taps[i] for i in config.eagle.taps], -1)  # type: ignore[misc]
    table = load_file(path / "model.safetensors")["embed_tokens.weight"] if embeddings else model.embed.weight
    hidden = head.combine(states)
    theirs = states @ load_file(path / "model.safetensors")["fc.weight"].T
    for _ in range(2):  # from the target's states, then from the head's own
        shifted = ids[1:]
        hidden, (theirs, logits) = run(head, shifted, hidden[:-1]), heads.forward(path, table, shifted, theirs[:-1],
                                                                                  before=before)
        torch.testing.assert_close(hidden, theirs, rtol=0, atol=2e-4)
        torch.testing.assert_close(head.compute_logits(hidden), logits, rtol=0, atol=1e-3)
        ids = logits.argmax(-1)
        if drafts is not None:
            assert int(logits[0].isfinite().sum()) == drafts


@pytest.mark.parametrize("name", ["llama3-gqa", "gpt2"])
@torch.no_grad()
def test_taps_are_the_inputs_of_layers(checkpoint: Checkpoint, name: str) -> None:
    model, theirs = build(read_config(checkpoint(name))), checkpoints.load(checkpoint(name))
    load_weights(model, checkpoint(name))
    taps: dict[int, torch.Tensor | None] = {0: None, 2: None}
    run(model, torch.tensor(PROMPT), taps=taps)
    states = theirs(input_ids=torch.tensor([PROMPT]), output_hidden_states=True).hidden_states
    for layer, found in taps.items():
        assert found is not None
        torch.testing.assert_close(found, states[layer][0], rtol=0, atol=1e-4)


def test_random_weights_map_into_the_vocabulary(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = heads.save(tmp_path / "head", vocab=checkpoints.VOCAB, hidden=HIDDEN, drafts=50)
    head = build(read_draft(path, "eagle", read_config(checkpoint("llama3-gqa")), 10, weights=False))
    random_weights(head)
    assert isinstance(head, Eagle3) and head.offsets is not None
    assert int((torch.arange(50) + head.offsets).max()) < checkpoints.VOCAB


def edited(path: Path, **values: object) -> Path:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **values}))
    return path


@pytest.mark.parametrize(("values", "error", "named"), [
    ({"vocab_size": 250, "draft_vocab_size": None}, ConfigError, ("vocabulary", "250", "199")),
    ({"max_position_embeddings": 128}, ConfigError, ("128", "max_model_len to at most 128")),
    ({"target_hidden_size": 32}, ConfigError, ("another target", "32", "64")),
    ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 2, 4]}}, ConfigError, ("[0, 2, 4]", "0 to 3")),
    ({"eagle_aux_hidden_state_layer_ids": [0, 2]}, ModelLoadError, ("eagle_aux_hidden_state_layer_ids", "three")),
    ({"num_hidden_layers": 2}, ModelLoadError, ("num_hidden_layers", "one layer")),
    ({"draft_vocab_size": 400}, ModelLoadError, ("draft_vocab_size", "400")),
    ({"architectures": ["Eagle3Speculator"]}, ModelLoadError, ("Eagle3Speculator", "LlamaForCausalLMEagle3")),
], ids=lambda value: next(iter(value)) if isinstance(value, dict) else "")
def test_heads_that_do_not_fit_are_refused(checkpoint: Checkpoint, tmp_path: Path, values: dict[str, object],
                                           error: type[HalError], named: tuple[str, ...]) -> None:
    path = edited(heads.save(tmp_path / "head", vocab=checkpoints.VOCAB, hidden=HIDDEN, drafts=50), **values)
    with pytest.raises(error) as caught:
        read_draft(path, "eagle", read_config(checkpoint("llama3-gqa")), 200)
    for text in named:
        assert text in str(caught.value)


def test_a_draft_model_that_does_not_fit_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    target = read_config(checkpoint("llama3-gqa"))
    assert read_draft(checkpoint("gpt2"), "draft", target, 256).family == "gpt2"
    with pytest.raises(ConfigError, match="context is shorter"):
        read_draft(checkpoint("gpt2"), "draft", target, 257)
    head = heads.save(tmp_path / "head", vocab=checkpoints.VOCAB, hidden=HIDDEN, drafts=50)
    with pytest.raises(ModelLoadError, match="--speculate eagle"):
        read_draft(head, "draft", target, 10)
    with pytest.raises(ModelLoadError, match="--speculate draft"):
        read_draft(checkpoint("gpt2"), "eagle", target, 10)


@pytest.mark.parametrize(("name", "value", "named"), [
    ("d2t", torch.full((50,), 150), "d2t"), ("fc.weight", torch.ones(64, 64), "fc.weight"),
    ("midlayer.hidden_norm.weight", None, "midlayer.hidden_norm.weight"), ("mask_hidden", torch.ones(1), "mask_hidden"),
])
def test_damaged_heads_are_refused(checkpoint: Checkpoint, tmp_path: Path, name: str, value: torch.Tensor | None,
                                   named: str) -> None:
    path = heads.save(tmp_path / "head", vocab=checkpoints.VOCAB, hidden=HIDDEN, drafts=50)
    tensors = load_file(path / "model.safetensors")
    tensors.pop(name, None)
    save_file(tensors if value is None else {**tensors, name: value}, path / "model.safetensors")
    with pytest.raises(ModelLoadError, match=named):
        load_weights(build(read_draft(path, "eagle", read_config(checkpoint("llama3-gqa")), 10)), path)
