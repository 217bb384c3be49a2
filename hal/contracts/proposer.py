"""Proposers of speculative decoding: each gives tokens that a sequence may have next. The target model verifies them.

A proposer is one class. A `HostProposer` reads tokens where the scheduler runs. A `RankProposer` runs on the ranks of
the last pipeline stage, behind the target's sampler, and may have weights and a KV cache.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from hal.contracts.runner import Progress, no_progress
from hal.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from hal.config import EngineConfig, WorkerConfig
    from hal.contracts.inputs import PagedModelInput
    from hal.contracts.outputs import SamplerOutput
    from hal.model_config import ModelConfig

BUILT_IN = {"ngram": "hal.speculation.ngram:NgramProposer", "draft": "hal.speculation.draft:DraftProposer",
            "eagle": "hal.speculation.eagle:EagleProposer"}
Propose = Callable[[Sequence[int], int], list[int]]  # output tokens so far, most tokens to propose -> proposed tokens


class Proposer:
    """Attributes: cost: the time of proposing one token for each sequence, in decode steps of the target model."""

    cost: float = 0.0

    @classmethod
    def check(cls, engine: EngineConfig, target: ModelConfig) -> Any:
        """Called before any rank starts, where the engine is made.

        Raises:
            ConfigError, ModelLoadError: the proposer cannot propose tokens for this model in this engine.
        """


class HostProposer(Proposer, abc.ABC):
    """Made with the EngineConfig, once for an engine. What it proposes must follow from the tokens alone: with
    wire="none" every rank has a scheduler of its own, and all of them must propose the same."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config

    @abc.abstractmethod
    def begin(self, prompt_ids: Sequence[int]) -> Propose:
        """Begin a request. The returned function is called after each step that gave the sequence tokens. It gets the
        output so far, which has grown at its end since the call before, and proposes any number of tokens up to the
        given one."""


class RankProposer(Proposer, abc.ABC):
    """Made on each rank with the arguments of Backend.make_runner and the target's runner. The calls and their order
    are those of ModelRunnerBase. On ranks of earlier pipeline stages it is not made.

    The caches are paged by the target's block ids: a token's keys and values lie in the slot that the step's
    slot_mapping gives the token, so the scheduler allocates once, and blocks move and are shared together.
    """

    def __init__(self, config: WorkerConfig, device: torch.device, communicator: Any, target: Any) -> None:
        self.config, self.device, self.communicator, self.target = config, device, communicator, target

    @abc.abstractmethod
    def load_model(self, progress: Progress = no_progress) -> None:
        """Raises ModelLoadError, ConfigError. The target is loaded already."""

    def kv_bytes_per_block(self) -> int:
        return 0

    def reserve_bytes(self) -> int:
        return 0

    def make_kv_caches(self, num_blocks: int) -> Sequence[torch.Tensor]:
        return ()

    def warmup(self, kv_caches: Sequence[torch.Tensor], progress: Progress = no_progress) -> None:
        """`kv_caches` are those that `make_kv_caches` made."""

    @abc.abstractmethod
    def propose(self, m: PagedModelInput, output: SamplerOutput, forwarded: Any, kv_caches: Sequence[torch.Tensor],
                ) -> torch.Tensor | None:
        """Propose what follows the tokens of this step. Phase execute. Called in every step that computes a token, also
        where m.num_proposals is 0, on every rank of the last stage.

        Args:
            m: the step's input. Tokens of rejected drafts are in it, too; what the proposer has cached for them, a
                later step writes again, as it writes the target's cache.
            output: on all tensor-parallel ranks token_ids [num_rows * width] and counts [num_rows] (None: one token of
                each row) of the sampled sequences. Other arrays are on the sampling rank alone.
            forwarded: the result of the target's forward pass.

        Returns:
            int32 [num_rows, m.num_proposals] on the rank that samples, on the device: -1 behind a row's last token.
            None where m.num_proposals is 0, and on the other ranks.
        """


def proposer_class(name: str) -> type[Proposer]:
    """The class of a proposer: of BUILT_IN, or "module:attribute".

    Raises:
        ConfigError: it is unknown, or cannot be imported, or is no proposer.
    """
    module, _, attribute = BUILT_IN.get(name, name).partition(":")
    expected = f"{', '.join(BUILT_IN)}, or module:attribute"
    if not (module and attribute):
        raise ConfigError("unknown proposer of speculative decoding", got=f"speculate={name!r}", expected=expected)
    try:
        kind = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError("a proposer of speculative decoding cannot be imported",
                          got=f"speculate={name!r}: {type(error).__name__}: {error}", expected=expected) from error
    if not (isinstance(kind, type) and issubclass(kind, (HostProposer, RankProposer))):
        raise ConfigError("not a proposer of speculative decoding", got=f"speculate={name!r}: {kind!r}",
                          expected="a subclass of hal.contracts.proposer.HostProposer or RankProposer")
    return kind
