"""The families of models that run natively, by the architecture that config.json names. Importing this loads no torch.

A package adds a family by an entry point of the group `hal.models`: its name is the architecture, its value
"module:attribute" of a Family. A native architecture stays native. The environment variable HAL_MODELS
("Architecture=module:attribute,...") does the same. All ranks of an engine must have the same families.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Any

from hal.errors import ConfigError
from hal.extensions import named

GROUP = "hal.models"


@dataclass(frozen=True, slots=True)
class Family:
    """Attributes:
        model_type: of config.json.
        parse: "module:function" from (hal.checkpoints.reader.Reader, architecture) to a ModelConfig. The module loads
            no torch.
        model: "module:class", a hal.models.causal_lm.CausalLM, made with (ModelConfig, hal.models.layers.Build).
    """

    model_type: str
    parse: str
    model: str

    def load(self, attribute: str) -> Any:
        """The object that `parse` or `model` names. Raises ConfigError: it cannot be imported."""
        value: str = getattr(self, attribute)
        module, _, name = value.partition(":")
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"the family of {self.model_type!r} cannot be imported", expected=f"{value} is there",
                              got=f"{type(error).__name__}: {error}") from error


def _family(model_type: str, parse: str, model: str) -> Family:
    return Family(model_type, f"hal.checkpoints.shapes:{parse}", f"hal.models.{model}")


NATIVE = {
    "LlamaForCausalLM": _family("llama", "llama", "decoder:Decoder"),
    "MistralForCausalLM": _family("mistral", "mistral", "decoder:Decoder"),
    "Qwen2ForCausalLM": _family("qwen2", "qwen2", "decoder:Decoder"),
    "Qwen3ForCausalLM": _family("qwen3", "qwen3", "decoder:Decoder"),
    "GPT2LMHeadModel": _family("gpt2", "gpt2", "gpt2:GPT2"),
    "SmolLM3ForCausalLM": _family("smollm3", "smollm3", "decoder:Decoder"),
    "Gemma2ForCausalLM": _family("gemma2", "gemma2", "dense:Gemma"),
    "Gemma3ForCausalLM": _family("gemma3_text", "gemma3", "dense:Gemma"),
    "Phi3ForCausalLM": _family("phi3", "phi3", "dense:Phi3"),
    "Olmo2ForCausalLM": _family("olmo2", "olmo2", "dense:Olmo"),
    "Olmo3ForCausalLM": _family("olmo3", "olmo3", "dense:Olmo"),
    "MixtralForCausalLM": _family("mixtral", "mixtral", "mixture:Mixtral"),
    "Qwen2MoeForCausalLM": _family("qwen2_moe", "qwen2_moe", "mixture:QwenMoe"),
    "Qwen3MoeForCausalLM": _family("qwen3_moe", "qwen3_moe", "mixture:QwenMoe"),
    "Qwen3NextForCausalLM": _family("qwen3_next", "qwen3_next", "hybrid:Hybrid"),
    "Qwen3_5ForCausalLM": _family("qwen3_5_text", "qwen3_5", "hybrid:Hybrid"),
    "GptOssForCausalLM": _family("gpt_oss", "gpt_oss", "mixture:GptOss"),
    "Glm4MoeForCausalLM": _family("glm4_moe", "glm4_moe", "mixture:MixtureDecoder"),
    "DeepseekV2ForCausalLM": _family("deepseek_v2", "deepseek_v2", "mixture:DeepSeek"),
    "DeepseekV3ForCausalLM": _family("deepseek_v3", "deepseek_v3", "mixture:DeepSeek"),
    "Glm4ForCausalLM": _family("glm4", "glm4", "dense:Glm4"),
}

# Those without a head, by which only an embedding can be computed.
EMBEDDERS = {
    **dict.fromkeys(("BertModel", "BertForMaskedLM"), _family("bert", "bert", "bert:Bert")),
    **dict.fromkeys(("RobertaModel", "RobertaForMaskedLM"), _family("roberta", "roberta", "bert:Bert")),
    **dict.fromkeys(("XLMRobertaModel", "XLMRobertaForMaskedLM"), _family("xlm-roberta", "xlm_roberta", "bert:Bert")),
    "LlamaModel": NATIVE["LlamaForCausalLM"], "MistralModel": NATIVE["MistralForCausalLM"],
    "Qwen2Model": NATIVE["Qwen2ForCausalLM"], "Qwen3Model": NATIVE["Qwen3ForCausalLM"],
    "Gemma3TextModel": NATIVE["Gemma3ForCausalLM"],
}


def architectures() -> list[str]:
    """All that generate, the native ones first. The modules of others are not imported."""
    return [*NATIVE, *sorted(_others())]


def native(model_type: str) -> list[str]:
    """The native architectures of a model_type, those that generate first."""
    return [name for name, family in {**NATIVE, **EMBEDDERS}.items() if family.model_type == model_type]


def family_of(architecture: str) -> Family | None:
    """None where the architecture is unknown.

    Raises:
        ConfigError: its entry point cannot be imported, or is no Family.
    """
    own = NATIVE.get(architecture) or EMBEDDERS.get(architecture)
    if own is not None:
        return own
    entry = _others().get(architecture)
    if entry is None:
        return None
    try:
        family = entry.load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"the family of {architecture!r} cannot be imported", got=f"{type(error).__name__}: {error}",
                          expected=f"{entry.value} is a hal.models.families.Family",
                          hint="entry points of hal.models and the variable HAL_MODELS name families") from error
    if not isinstance(family, Family):
        raise ConfigError(f"the family of {architecture!r} is not a Family", got=type(family).__name__,
                          expected=f"{entry.value} is a hal.models.families.Family")
    return family


def _others() -> dict[str, EntryPoint]:
    """By architecture."""
    return named(GROUP, "HAL_MODELS", "Architecture=module:attribute")
