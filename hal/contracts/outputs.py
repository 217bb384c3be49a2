"""What a step yields."""

from __future__ import annotations

from typing import Annotated

import torch

from hal.schema import Array, Declared


class SamplerOutput(Declared):
    """One row per sampled sequence, in the order of the step's sequences; logprobs where any of them asked.

    Logprobs are of the raw logits, before temperature and penalties.
    """

    token_ids: Annotated[torch.Tensor, Array("int32", "num_samples", low=-1, doc="the sampled tokens; -1 where the "
                                                    "row's logits have no finite maximum: then its sequence ends with "
                                                    "an error, and its logprobs mean nothing")]
    logprobs: Annotated[torch.Tensor | None, Array("float32", "num_samples", doc="of the sampled tokens")] = None
    ranks: Annotated[torch.Tensor | None, Array("int32", "num_samples", low=1, doc="of the sampled tokens by raw "
                                                "logit; 1 is the most likely")] = None
    top_ids: Annotated[torch.Tensor | None, Array("int32", "num_samples", "num_top", low=0, doc="most likely tokens, "
                                                  "best first")] = None
    top_logprobs: Annotated[torch.Tensor | None, Array("float32", "num_samples", "num_top")] = None
    prompt_logprobs: Annotated[torch.Tensor | None, Array("float32", "num_targets", doc="of each prompt target")] = None
    prompt_ranks: Annotated[torch.Tensor | None, Array("int32", "num_targets", low=1)] = None
    prompt_top_ids: Annotated[torch.Tensor | None, Array("int32", "num_targets", "num_prompt_top", low=0)] = None
    prompt_top_logprobs: Annotated[torch.Tensor | None, Array("float32", "num_targets", "num_prompt_top")] = None
