"""What a damaged or foreign checkpoint meets, and how weights are cut."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from safetensors.torch import load_file, save_file

from hal.checkpoints.hf_config import read_config
from hal.checkpoints.loader import load_weights, random_weights
from hal.config import EngineConfig, Topology, WorkerConfig
from hal.contracts.communicator import LocalCommunicator
from hal.errors import ConfigError, ModelLoadError
from hal.model_config import ModelConfig
from hal.models import build_model
from hal.models.causal_lm import CausalLM
from hal.models.ops import Ops
from hal.paged.runner import PagedModelRunner
from hal.weights.sharding import spec_of

Checkpoint = Callable[[str], Path]
Tensors = dict[str, torch.Tensor]
FP32 = torch.float32
ONE = Topology()


def build(config: ModelConfig, topology: Topology = ONE, dtype: torch.dtype = FP32) -> CausalLM:
    return build_model(config, topology, LocalCommunicator(), Ops(), dtype, torch.device("cpu"))


@pytest.fixture
def copy(checkpoint: Checkpoint, tmp_path: Path) -> Callable[..., Path]:
    """`copy(name, edit)`: a copy of a single-file checkpoint, its tensors edited in place."""

    def make(name: str, edit: Callable[[Tensors], object] = lambda tensors: None) -> Path:
        path = tmp_path / name
        shutil.copytree(checkpoint(name), path)
        if (path / "model.safetensors").exists():
            tensors = load_file(path / "model.safetensors")
            edit(tensors)
            save_file({k: v.contiguous() for k, v in tensors.items()}, path / "model.safetensors")
        return path

    return make


def refused(path: Path, *named: str) -> None:
    with pytest.raises(ModelLoadError) as caught:
        load_weights(build(read_config(path)), path)
    for text in named:
        assert text in str(caught.value)


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(("edit", "named"), [
    (lambda t: t.pop(Q), "layers.1.self_attn.q_proj.weight"),
    (lambda t: t.update({Q: t[Q][:-1]}), Q),
    (lambda t: t.update({Q: t[Q].flatten()}), Q),
    (lambda t: t.update({Q: t[Q].to(torch.int8)}), "I8"),
    (lambda t: t.update({Q: t[Q].to(torch.float8_e4m3fn)}), "has a quantization_config that says so"),
    (lambda t: t.update({"model.layers.3.input_layernorm.weight": torch.ones(64)}), "layers.3"),
    (lambda t: t.update({"model.layers.1.self_attn.q_proj.bias": torch.ones(64)}), "q_proj.bias"),
    (lambda t: t.update({Q.removeprefix("model."): t[Q].clone()}), "twice"),
    (lambda t: t.pop("lm_head.weight"), "lm_head.weight"),
    (lambda t: t.clear(), "lacks the tensor"),
], ids=["missing", "short", "flat", "int8", "fp8", "one layer more", "bias nobody adds", "twice", "no head", "empty"])
def test_wrong_tensors(copy: Callable[..., Path], edit: Callable[[Tensors], object], named: str) -> None:
    refused(copy("llama2-mha", edit), named)


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_truncated(copy: Callable[..., Path], keep: float) -> None:
    path = copy("llama2-mha")
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[:int(keep * len(data)) if isinstance(keep, float) else keep])
    refused(path, "model.safetensors", "damaged")


def test_corrupt_header(copy: Callable[..., Path]) -> None:
    path = copy("llama2-mha")
    data = bytearray((path / "model.safetensors").read_bytes())
    data[8:40] = b"?" * 32
    (path / "model.safetensors").write_bytes(data)
    refused(path, "model.safetensors", "damaged")


def test_missing_files(copy: Callable[..., Path]) -> None:
    path = copy("llama2-mha")
    (path / "model.safetensors").unlink()
    refused(path, "model.safetensors.index.json")
    (path / "model-00001-of-00002.safetensors").touch()
    refused(path, "with model-00001-of-00002.safetensors", "download the checkpoint again, whole")
    (path / "pytorch_model.bin").touch()
    refused(path, "pytorch_model.bin", "save_pretrained writes safetensors")


def test_shards(copy: Callable[..., Path]) -> None:
    path = copy(checkpoints.SHARDED)
    index = path / "model.safetensors.index.json"
    shards = sorted(path.glob("*.safetensors"))
    assert len(shards) > 2
    load_weights(build(read_config(path)), path)
    whole = index.read_text()
    for text in ("{", "{}", '{"weight_map": []}', '{"weight_map": {"x": 3}}'):
        index.write_text(text)
        refused(path, "index.json")
    index.write_text(whole)
    data = shards[1].read_bytes()
    shards[1].write_bytes(data[:-5])
    refused(path, shards[1].name, "damaged")
    shards[1].unlink()
    refused(path, shards[1].name, "missing")


@pytest.mark.parametrize("name", ["gpt2", "llama2-mha", "qwen2-tied"])
def test_harmless_differences(copy: Callable[..., Path], checkpoint: Checkpoint, name: str) -> None:
    """Names without a prefix, and constants that older releases saved, load as the same weights."""

    def edit(tensors: Tensors) -> None:
        plain = {k.removeprefix("model.").removeprefix("transformer."): v for k, v in tensors.items()}
        tensors.clear()
        tensors.update(plain)
        if name == "gpt2":
            tensors.update({"h.0.attn.bias": torch.ones(1, 1, 8, 8), "h.0.attn.masked_bias": torch.tensor(-1e4)})
        else:
            tensors["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        if name == "qwen2-tied":
            tensors["lm_head.weight"] = tensors["embed_tokens.weight"].clone()

    ours, theirs = build(read_config(checkpoint(name))), build(read_config(checkpoint(name)))
    load_weights(ours, copy(name, edit))
    load_weights(theirs, checkpoint(name))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("name", checkpoints.NAMES)
def test_ranks_together_hold_the_whole(checkpoint: Checkpoint, name: str, tp: int) -> None:
    """Every parameter's declaration, read by itself: the ranks' parts along `dim` make up each source, in order."""
    path = checkpoint(name)
    config = read_config(path)
    ranks = [build(config, Topology(tp, 1, r)) for r in range(tp)]
    whole = build(config)
    for model in (*ranks, whole):
        load_weights(model, path)
    for key, full in whole.named_parameters():
        dim = spec_of(full).sharded
        parts = [p for p in (dict(r.named_parameters()).get(key) for r in ranks) if p is not None]
        if dim is None:
            assert all(torch.equal(p, full) for p in parts)
            continue
        assert len(parts) == tp and all(spec_of(p).sharded == dim for p in parts)
        sources, offsets, at = spec_of(parts[0]).sources, [0] * tp, 0
        for s in sources:
            pieces, ends = [], 0
            for r, part in enumerate(parts):
                first, last = s.local(Topology(tp, 1, r).axis("tp"))
                piece = part.narrow(dim, offsets[r], last - first)
                offsets[r] += last - first
                if first - s.start >= ends:
                    pieces.append(piece)
                    ends = last - s.start
                else:  # key-value heads that ranks share
                    assert s.shards < tp and torch.equal(piece, pieces[-1])
            assert torch.equal(torch.cat(pieces, dim), full.narrow(dim, at, s.size))
            at += s.size
        assert at == full.shape[dim]
        for r, part in enumerate(parts):
            assert not part.narrow(dim, offsets[r], part.shape[dim] - offsets[r]).any()


@pytest.mark.parametrize(("topology", "named"), [
    (Topology(3), "num_heads"), (Topology(8), "num_heads"), (Topology(pp=4), "num_layers")])
def test_layouts_refused(checkpoint: Checkpoint, topology: Topology, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        build(read_config(checkpoint("llama2-mha")), topology)


def test_layouts_refused_for_other_reasons(checkpoint: Checkpoint) -> None:
    config = dataclasses.replace(read_config(checkpoint("llama2-mha")), num_heads=12, num_kv_heads=3)
    with pytest.raises(ConfigError, match="num_kv_heads"):
        build(config, Topology(2))
    build(config, Topology(6))
    with pytest.raises(ConfigError, match="intermediate_size"):
        build(dataclasses.replace(config, num_kv_heads=12, intermediate_size=90), Topology(4))


def test_progress_counts_up(checkpoint: Checkpoint) -> None:
    seen: list[tuple[str, int, int]] = []
    path = checkpoint("gpt2")
    load_weights(build(read_config(path)), path, lambda *args: seen.append(args))
    total = seen[0][2]
    assert seen == [("loading weights", i, total) for i in range(total + 1)] and total > 3 * 12


def test_dtype_of_the_model_wins(checkpoint: Checkpoint) -> None:
    path = checkpoint("qwen3")
    model = build(read_config(path), dtype=torch.bfloat16)
    load_weights(model, path)
    stored = load_file(path / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(model.embed.weight, stored.bfloat16())


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_random_weights(checkpoint: Checkpoint, name: str) -> None:
    config = read_config(checkpoint(name))
    models = [build(config, dtype=torch.bfloat16) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        random_weights(model, seed)
    for (key, a), *others in zip(*(m.named_parameters() for m in models), strict=True):
        b, c = (other for _, other in others)
        assert torch.equal(a, b)
        if a.ndim == 1 and spec_of(a).sources[0].name.endswith("weight"):
            assert (a == 1).all(), key
        else:
            assert not torch.equal(a, c) and 0.01 < a.float().std() < 0.03, key
    first, second = (getattr(layer, "attention", layer).qkv.weight for layer in models[0].layers[:2])
    assert not torch.equal(first, second)


@pytest.fixture
def sharded(copy: Callable[..., Path]) -> tuple[Path, dict[str, str]]:
    """A checkpoint of two shards, and its weight_map."""
    path = copy("llama2-mha")
    return path, checkpoints.shard(path, 2)


def test_a_config_that_is_not_of_the_weights_is_refused_before_anything_is_allocated(
        checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """The configuration asks for 26 GB of embeddings; the first allocation outside the meta device fails the test."""
    path = checkpoint("llama2-mha")
    large = dataclasses.replace(read_config(path), vocab_size=100_000, hidden_size=65_536, head_dim=16_384)
    empty = torch.empty

    def allocate(*args: Any, **options: Any) -> torch.Tensor:
        assert options.get("device") == torch.device("meta"), "memory is allocated for the model"
        return empty(*args, **options)

    monkeypatch.setattr(torch, "empty", allocate)
    runner = PagedModelRunner(WorkerConfig(EngineConfig(model=str(path), device="cpu"), large, ONE),
                              torch.device("cpu"), LocalCommunicator())
    with pytest.raises(ModelLoadError, match="has the wrong shape"):
        runner.load_model()


def remap(path: Path, mapped: object) -> None:
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": mapped}))


def same_weights(ours: Path, theirs: Path) -> bool:
    models = build(read_config(ours)), build(read_config(theirs))
    for model, path in zip(models, (ours, theirs), strict=True):
        load_weights(model, path)
    return all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models), strict=True))


def other(shard: str) -> str:
    return "shard-1.safetensors" if shard == "shard-0.safetensors" else "shard-0.safetensors"


def test_a_tensor_comes_from_the_shard_that_the_index_names(sharded: tuple[Path, dict[str, str]],
                                                            checkpoint: Checkpoint) -> None:
    """The other shard has one of the same name with other values, and one that no shard is mapped to."""
    path, mapped = sharded
    tensors = load_file(path / other(mapped[Q]))
    tensors |= {Q: torch.zeros(64, 64), "model.layers.9.x.weight": torch.zeros(2)}
    save_file(tensors, path / other(mapped[Q]))
    assert same_weights(path, checkpoint("llama2-mha"))
    remap(path, {**mapped, Q: other(mapped[Q])})
    assert not same_weights(path, checkpoint("llama2-mha"))


def test_a_file_that_no_tensor_is_mapped_to_is_not_opened(sharded: tuple[Path, dict[str, str]],
                                                          checkpoint: Checkpoint) -> None:
    path, _ = sharded
    (path / "shard-2.safetensors").write_bytes(b"damaged")
    assert same_weights(path, checkpoint("llama2-mha"))


def test_a_tensor_that_its_shard_lacks_is_named(sharded: tuple[Path, dict[str, str]]) -> None:
    path, mapped = sharded
    remap(path, {**mapped, Q: other(mapped[Q])})
    refused(path, Q, other(mapped[Q]))
    remap(path, {name: shard for name, shard in mapped.items() if name != Q})
    refused(path, Q.removeprefix("model."))
    remap(path, {**mapped, "model.layers.3.mlp.up_proj.weight": mapped[Q]})
    refused(path, "model.layers.3.mlp.up_proj.weight", "does not use")


@pytest.mark.parametrize("name", ["/etc/hostname", "../outside.safetensors", "a/../../outside.safetensors", "..", ".",
                                  "", "//x", None, 3, ["x"], {}, True])
def test_a_shard_name_that_leaves_the_directory_is_refused(sharded: tuple[Path, dict[str, str]], name: object) -> None:
    path, mapped = sharded
    shutil.copy(path / mapped[Q], path.parent / "outside.safetensors")
    (path / "a").mkdir()
    remap(path, {**mapped, Q: name})
    refused(path, "index.json", repr(name), "not a file of the checkpoint")


@pytest.mark.parametrize("name", ["a\0b", "\udcff", "x" * 5000, "a/b/c", "missing.safetensors"])
def test_a_shard_that_is_not_there_is_named(sharded: tuple[Path, dict[str, str]], name: str) -> None:
    path, mapped = sharded
    remap(path, {**mapped, Q: name})
    refused(path, "index.json", "is missing")


def test_shards_that_block_are_refused(sharded: tuple[Path, dict[str, str]]) -> None:
    """A named pipe would block whoever opens it; a directory cannot be read."""
    path, mapped = sharded
    os.mkfifo(path / "pipe")
    (path / "directory").mkdir()
    for name in ("pipe", "directory"):
        remap(path, {**mapped, Q: name})
        refused(path, name, "is missing")


def test_shards_of_a_download_cache(sharded: tuple[Path, dict[str, str]], checkpoint: Checkpoint) -> None:
    """There each file of the directory is a link to ../../blobs; a shard may also lie in a folder."""
    path, mapped = sharded
    snapshot, blobs = path.parent / "snapshots" / "main", path.parent / "blobs"
    (snapshot / "folder").mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate(sorted(path.iterdir())):
        shutil.copy(file, blobs / str(i))
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    (snapshot / "shard-1.safetensors").rename(snapshot / "folder" / "x.safetensors")
    (snapshot / "folder" / "x.safetensors").unlink()
    (snapshot / "folder" / "x.safetensors").symlink_to(blobs / str(sorted(path.iterdir()).index(
        path / "shard-1.safetensors")))
    (snapshot / "model.safetensors.index.json").unlink()
    remap(snapshot, {n: "folder/x.safetensors" if s == "shard-1.safetensors" else s for n, s in mapped.items()})
    assert same_weights(snapshot, checkpoint("llama2-mha"))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tensor"), [
    ("llama2-mha", "model.layers.1.input_layernorm.weight"), ("llama2-mha", "model.norm.weight"),
    ("qwen3", "model.layers.0.self_attn.k_norm.weight"), ("qwen2-tied", "model.layers.2.self_attn.v_proj.bias"),
    ("gpt2", "transformer.h.0.ln_1.bias"), ("gpt2", "transformer.h.1.mlp.c_proj.bias"),
    ("llama-linear-biases", "model.layers.1.mlp.down_proj.bias")])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_vectors_that_are_not_finite_are_refused(copy: Callable[..., Path], name: str, tensor: str,
                                                 value: float) -> None:
    def edit(tensors: Tensors) -> None:
        tensors[tensor][5] = value

    refused(copy(name, edit), tensor, f"{value} at 5, 1 of", "not finite in float32")


def test_a_norm_that_overflows_in_float16_is_refused(copy: Callable[..., Path]) -> None:
    path = copy("llama2-mha", lambda t: t["model.norm.weight"].mul_(0).add_(70000.0))
    load_weights(build(read_config(path), dtype=torch.bfloat16), path)
    with pytest.raises(ModelLoadError, match=r"(?s)model\.norm\.weight.*float16.*64 of 64.*bfloat16"):
        load_weights(build(read_config(path), dtype=torch.float16), path)


def test_index_json_names_are_all_read(copy: Callable[..., Path]) -> None:
    """A tensor that the index promises and its file lacks is missing, whatever the index says."""
    path = copy(checkpoints.SHARDED)
    index = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = load_file(path / index[Q])
    del tensors[Q]
    save_file(tensors, path / index[Q])
    refused(path, "layers.1.self_attn.q_proj.weight")
