"""Models that no definition of hal runs: transformers' own code on this engine, and the certificates that admit it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hal.checkpoints.hf_config import read_config
from hal.engine import certificates, certify
from hal.engine.llm import LLM
from hal.engine.tiny import save_tiny, tiny_config
from hal.errors import ConfigError, ModelLoadError
from hal.models import swaps
from hal.models.ops import Ops
from hal.models.transformers_model import HfLinear, TransformersModel, _Merged
from hal.sampling.params import SamplingParams
from runners.tpu.spmd import TpuOps

NOT_NATIVE = ("stablelm", "starcoder2", "nemotron", "cohere", "granite", "olmo", "phi", "gpt_neox", "minicpm3",
              "modernbert-decoder", "gemma3n_text")


@pytest.fixture(scope="module")
def stablelm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stablelm")
    save_tiny(tiny_config("stablelm"), path)
    return path


@pytest.fixture(scope="module")
def olmo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A type whose certificate holds with two ranks of either kind."""
    path = tmp_path_factory.mktemp("olmo")
    save_tiny(tiny_config("olmo"), path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("kind", NOT_NATIVE)
def test_chunked_mixed_cached_and_decoded_tokens_are_those_of_transformers(kind: str) -> None:
    made = certify.certify(kind)
    assert made.admitted, made.reason
    assert made.error is not None and made.error < certify.TOLERANCE
    assert made.control is not None and made.control > 100 * made.error  # the cache ignored


@pytest.mark.slow
def test_two_ranks_of_each_kind_give_the_tokens_of_one() -> None:
    made = certify.certify("qwen3_moe", topologies=("tp2", "pp2"))
    assert (made.admitted, made.tp2, made.pp2) == (True, "held", "held")


def test_the_comparison_refuses_wrong_results_and_a_test_that_cannot_fail() -> None:
    right = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64).log()
    assert certify._difference([0], [float(right[0, 0])], right) == 0
    assert certify._difference([0], [float(right[0, 0]) + 1e-3], right) == pytest.approx(1e-3)
    assert certify._difference([1], [float(right[0, 1])], right) > 1  # its logprob is right, and the token is not
    assert certify._difference([0], [float("nan")], right) == float("inf")
    assert certify.judge(1e-6, 1.0) == ""
    assert "differ" in certify.judge(1e-3, 1.0) and "differ" in certify.judge(float("nan"), 1.0)
    assert "ignores its cache" in certify.judge(1e-6, 1e-3)


def test_linear_layers_are_merged_and_parts_are_ours(checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rotary operation a layer embeds the queries and keys of a step, if no norm comes before; here one of each."""
    used, rotary = [], Ops.rotary

    def counting(self: Ops, heads: torch.Tensor, begun: Any) -> torch.Tensor:
        used.append(heads.shape[1])
        return rotary(self, heads, begun)

    monkeypatch.setattr(Ops, "rotary", counting)
    for name, heads in (("llama3-gqa", [6] * 4), ("qwen3", [4, 2] * 3)):
        with LLM(str(checkpoint(name)), device="cpu", dtype="float32", model_impl="transformers") as llm:
            llm.generate([[5, 6, 7]], SamplingParams(max_tokens=1))  # the first step has tried everything
            used.clear()
            llm.generate([[5, 6, 7]], SamplingParams(max_tokens=1))
            assert used == heads, name
    with LLM(str(checkpoint("qwen3")), device="cpu", dtype="float32", model_impl="transformers") as llm:
        model = llm.executor._worker.runner.model  # type: ignore[attr-defined]
        assert isinstance(model, TransformersModel)
        layer = model.base.layers[0]
        assert isinstance(layer.self_attn.q_proj, _Merged) and len(layer.self_attn.q_proj.spec.projections) == 3
        assert isinstance(layer.mlp.gate_proj, _Merged) and len(layer.mlp.gate_proj.spec.projections) == 2
        assert isinstance(layer.self_attn.o_proj, HfLinear) and isinstance(layer.self_attn.q_norm.forward, swaps._Norm)
        assert isinstance(layer.mlp.forward, swaps._GatedMLP)
        original = type(layer.self_attn).forward.__globals__["apply_rotary_pos_emb"]
        assert not isinstance(original, swaps._Rotary)  # the module of transformers is as it was


def test_what_computes_something_else_is_not_swapped() -> None:
    from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as interleaved
    from transformers.models.gemma.modeling_gemma import GemmaMLP, GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaMLP, apply_rotary_pos_emb

    assert swaps._is_rotary(apply_rotary_pos_emb) and not swaps._is_rotary(interleaved)
    assert swaps._is_gated_mlp(LlamaMLP) and swaps._is_gated_mlp(GemmaMLP)  # with SiLU, which Gemma has not
    assert not swaps._is_rms_norm(GemmaRMSNorm)
    rotary, begun = swaps._Rotary(Ops(), apply_rotary_pos_emb), dict[int, Any]()
    rotary.begun = begun
    q, k, cos, sin = (torch.rand(1, *shape) for shape in ((4, 3, 8), (2, 3, 8), (3, 8), (3, 8)))
    for ours, theirs in zip(rotary(q, k, cos, sin), apply_rotary_pos_emb(q, k, cos, sin), strict=True):
        assert torch.equal(ours, theirs)  # the angles of the two halves differ
    assert rotary.halves is False and not begun
    rotary = swaps._Rotary(TpuOps(1), apply_rotary_pos_emb)
    rotary(q, k, cos, sin)
    assert rotary.halves is None  # a compiled step cannot compare values


@pytest.mark.slow
def test_both_implementations_of_one_checkpoint_give_the_same_tokens(checkpoint: Any) -> None:
    params = SamplingParams(max_tokens=24)
    tokens = []
    for impl in ("native", "transformers"):
        with LLM(str(checkpoint("qwen3")), device="cpu", dtype="float32", model_impl=impl) as llm:
            tokens.append([o.token_ids for o in llm.generate([[5, 6, 7] * 9, [8]], params)])
    assert tokens[0] == tokens[1]


@pytest.mark.slow
def test_a_native_definition_loads_no_modelling_code_of_transformers(checkpoint: Any) -> None:
    code = ("import sys; from hal.engine.llm import LLM\n"
            f"with LLM({str(checkpoint('qwen3'))!r}, device='cpu', dtype='float32') as llm: llm.generate([[1, 2]])\n"
            "loaded = [m for m in sys.modules if m.startswith('transformers.models.') and '.modeling_' in m and\n"
            "          '.auto.' not in m or m.startswith('hal.models.skeleton')]\n"
            "assert not loaded, loaded")
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize(("kind", "reason"), [
    ("gpt_neox_japanese", "attention of its own"), ("qwen3_next", "linear_attention"), ("lfm2", "conv"),
    ("llama4_text", "within chunks"), ("bart", "takes no positions"), ("roberta", "positions from another number")])
def test_a_refused_type_says_why(kind: str, reason: str) -> None:
    row = certificates.table()["types"][kind]
    assert not row["admitted"] and reason in row["reason"]


def test_a_type_that_the_table_refuses_is_refused_when_it_is_loaded(tmp_path: Path) -> None:
    save_tiny(tiny_config("roberta"), tmp_path)
    with pytest.raises(ModelLoadError, match="not certified") as raised:
        LLM(str(tmp_path), device="cpu", dtype="float32")
    assert "counts its positions from another number than 0" in str(raised.value)


def test_options_that_the_table_does_not_have_are_certified_at_load(olmo: Path, monkeypatch: Any) -> None:
    asked: list[str] = []

    def refuse(kind: str, source: Any, topologies: Any) -> certify.Certificate:
        asked.append(kind)
        return certify.Certificate(kind, reason="as planted")

    monkeypatch.setattr(certify, "certify", refuse)
    certificates.admit(read_config(olmo), tp=2, pp=2)  # the table has it
    data = json.loads((olmo / "config.json").read_text())
    other = olmo.parent / "other-options"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({**data, "attention_bias": True}))
    for admitted in (True, False):  # a refusal holds for the options of the row alone
        monkeypatch.setitem(certificates.table()["types"]["olmo"], "admitted", admitted)
        with pytest.raises(ModelLoadError, match="as planted"):
            certificates.admit(read_config(other, weights=False))
    assert asked == ["olmo"] * 2


def test_a_topology_that_the_table_says_is_wrong_is_refused(olmo: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(certificates.table()["types"]["olmo"], "tp2", "logprobs differ by 7.7e-02")
    config = read_config(olmo)
    certificates.admit(config, pp=2)
    with pytest.raises(ModelLoadError, match=r"with tp: logprobs differ by 7.7e-02"):
        certificates.admit(config, tp=2)


def test_layers_that_see_later_tokens_or_a_chunk_alone_are_refused_by_name(tmp_path: Path) -> None:
    for kind, options, match in (("bert", {"is_decoder": False}, "attention is in both directions"),
                                 ("llama4_text", {}, "attend within chunks")):
        save_tiny(tiny_config(kind), tmp_path)
        data = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**data, **options}))
        with pytest.raises(ConfigError, match=match):
            read_config(tmp_path)


def test_a_row_of_another_device_stands_beside_those_that_decide(tmp_path: Path) -> None:
    from hal.cli.certify import _add

    row = certify.Certificate("olmo", "OlmoForCausalLM", True, error=1e-6, control=4.0)
    _add(tmp_path / "table.json", row.row(), "cpu")
    _add(tmp_path / "table.json", {**row.row(), "error": 3e-6}, "tpu")
    found = json.loads((tmp_path / "table.json").read_text())
    assert found["types"]["olmo"]["error"] == 1e-6 and found["devices"]["tpu"]["olmo"]["error"] == 3e-6
    assert "| tpu | olmo | 3e-06 | 4.0 |" in certificates.markdown(found)


def test_code_of_a_checkpoint_is_refused_unless_it_is_trusted(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({
        "architectures": ["OwnForCausalLM"], "model_type": "own", "vocab_size": 96, "hidden_size": 64,
        "num_hidden_layers": 2,
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}}))
    with pytest.raises(ModelLoadError, match="code of its own") as raised:
        read_config(tmp_path)
    assert "--trust-remote-code" in str(raised.value) and "certificate" in str(raised.value)
    with pytest.raises(ModelLoadError, match=r"(?s)own code does not load.*own\.py.*its files are missing"):
        read_config(tmp_path, trust_remote_code=True)


def test_trusted_code_of_a_checkpoint_runs_and_is_said_to_be_uncertified(stablelm: Path, tmp_path: Path) -> None:
    data = json.loads((stablelm / "config.json").read_text())
    data |= {"model_type": "own_lm", "architectures": ["OwnForCausalLM"],
             "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}}
    (tmp_path / "config.json").write_text(json.dumps(data))
    (tmp_path / "own.py").write_text(
        "from transformers import StableLmConfig, StableLmForCausalLM\n"
        "class OwnConfig(StableLmConfig):\n    model_type = 'own_lm'\n"
        "class OwnForCausalLM(StableLmForCausalLM):\n    config_class = OwnConfig\n")
    (tmp_path / "model.safetensors").write_bytes((stablelm / "model.safetensors").read_bytes())
    tokens = []
    for path, options in ((stablelm, {}), (tmp_path, {"trust_remote_code": True})):
        context = pytest.warns(UserWarning, match="no certificate") if options else pytest.MonkeyPatch.context()
        with context, LLM(str(path), device="cpu", dtype="float32", **options) as llm:
            tokens.append(llm.generate([[1, 2, 3]], SamplingParams(max_tokens=8))[0].token_ids)
    assert tokens[0] == tokens[1]


def test_an_architecture_that_is_neither_native_nor_of_transformers_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["NoSuchForCausalLM"], "model_type": "no_such"}))
    with pytest.raises(ModelLoadError, match="not supported") as raised:
        read_config(tmp_path)
    assert "NoSuchForCausalLM" in str(raised.value)


@pytest.mark.parametrize(("change", "message"), [
    ({"hidden_act": "spiral"}, "does not know a value of config.json for OlmoForCausalLM.*spiral"),
    ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "does not know a value of config.json.*spiral"),
    ({"model_type": None}, "config.json has no model_type.*OlmoForCausalLM.*expected: model_type olmo"),
    ({"num_attention_heads": None}, "transformers refuses config.json.*num_attention_heads"),
    ({"quantization_config": {"quant_method": "exl2"}}, "unknown format of weights.*exl2")])
def test_a_value_that_transformers_cannot_take_is_named(olmo: Path, tmp_path: Path, change: dict[str, Any],
                                                        message: str) -> None:
    data = json.loads((olmo / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**data, **change}))
    with pytest.raises(ModelLoadError) as raised:
        read_config(tmp_path)
    assert re.search(message, str(raised.value), re.DOTALL) and "to do: " in str(raised.value)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "topology", "reason"), [
    ("olmo", {"pp": 9}, "more pipeline stages than layers"),
    ("olmoe", {"tp": 2, "ep": 2}, "the Transformers backend has no expert parallelism"),
    ("biogpt", {"tp": 2}, "BioGptForCausalLM: transformers declares no tensor-parallel plan"),
    ("gemma4_text", {"pp": 2}, "embeddings that a later pipeline stage has no tokens for"),
    ("longcat_flash", {"pp": 2}, "a layer of its pipeline plan has several attentions")])
def test_a_topology_that_a_model_cannot_have_is_refused_by_name(tmp_path: Path, kind: str, topology: dict[str, int],
                                                                reason: str) -> None:
    save_tiny(tiny_config(kind), tmp_path)
    config = read_config(tmp_path)
    from hal.config import Topology
    from hal.contracts.communicator import LocalCommunicator
    from hal.models import build_model
    from hal.models.ops import Ops

    with pytest.raises(ConfigError, match=reason):
        build_model(config, Topology(**topology), LocalCommunicator(), Ops(), torch.float32, torch.device("meta"))


def test_the_documented_table_is_the_shipped_one() -> None:
    page = Path(certificates.TABLE).parents[2] / "docs" / "architectures.md"
    assert page.read_text(encoding="utf-8") == certificates.markdown()
    admitted = [kind for kind, row in certificates.table()["types"].items() if row["admitted"]]
    assert len(admitted) >= 80


@pytest.mark.slow
def test_a_row_of_the_shipped_table_is_current() -> None:
    import transformers

    row = certificates.table()["types"]["olmo2"]
    if certificates.table()["transformers"] != transformers.__version__:
        pytest.skip("the table was made with another release of transformers")
    made = certify.certify("olmo2").row()
    assert {n: made[n] for n in ("architecture", "admitted", "reason", "options")} == {
        n: row[n] for n in ("architecture", "admitted", "reason", "options")}
