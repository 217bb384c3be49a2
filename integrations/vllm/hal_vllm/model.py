"""The class that vLLM's configuration inspects for an architecture. Nothing builds it: hal loads the checkpoint."""

from __future__ import annotations

from typing import Any

from torch import nn
from vllm.model_executor.models.interfaces import SupportsPP


class HalForCausalLM(nn.Module, SupportsPP):
    """vLLM decides by these methods that the architecture generates text and may be cut into pipeline stages."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        raise NotImplementedError("hal's runners build the model; this class only describes it to vLLM")

    def embed_input_ids(self, input_ids: Any) -> Any: ...

    def forward(self, input_ids: Any, positions: Any, intermediate_tensors: Any = None,
                inputs_embeds: Any = None) -> Any: ...

    def compute_logits(self, hidden_states: Any) -> Any: ...

    def make_empty_intermediate_tensors(self, *args: Any) -> Any: ...
