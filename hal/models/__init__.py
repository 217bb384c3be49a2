"""Device-neutral model definitions. Importing this loads no torch; building a model does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hal.errors import ConfigError

if TYPE_CHECKING:  # hal.config imports this package
    import torch

    from hal.config import Topology
    from hal.contracts.communicator import Communicator
    from hal.model_config import ModelConfig
    from hal.models.causal_lm import CausalLM
    from hal.models.ops import Ops


def check_topology(config: ModelConfig, topology: Topology) -> None:
    """Check that the model can be sharded in this way.

    Raises:
        ConfigError: tp does not divide the heads, the key heads of a delta rule or the MLP, or neither divides nor is a
            multiple of the key-value heads; pp exceeds the layers; ep is given, and the model has no experts or ep does
            not divide them, or the Transformers backend runs it.
    """
    if topology.pp > config.num_layers:
        raise ConfigError("there are more pipeline stages than layers", got=f"pp={topology.pp}",
                          expected=f"at most num_layers ({config.num_layers})")
    if config.source is not None:  # the plans of transformers say what else is possible
        if topology.ep > 1:
            raise ConfigError("the Transformers backend has no expert parallelism", got=f"ep={topology.ep}",
                              expected="ep=1, which cuts every expert over tp",
                              hint="a native definition has it: see docs/models.md")
        return
    tp, kv = topology.tp, config.num_kv_heads
    for name in ("num_heads", "intermediate_size"):
        if getattr(config, name) % tp:
            raise ConfigError(f"tp={tp} does not divide the model's {name}", got=getattr(config, name),
                              expected=f"a multiple of {tp}", hint="choose another tp")
    if kv % tp and tp % kv:
        raise ConfigError(f"tp={tp} does not fit the model's num_kv_heads", got=kv,
                          expected=f"a multiple or a divisor of {tp}", hint="choose another tp")
    if config.delta is not None and config.delta.key_heads % tp:
        raise ConfigError(f"tp={tp} does not divide the key heads of the model's delta rule",
                          got=config.delta.key_heads, expected=f"a multiple of {tp}", hint="choose another tp")
    if (experts := config.experts) is not None and experts.layers:
        cut = tp // topology.ep
        if experts.count % topology.ep or experts.size % cut or experts.shared_size % tp:
            raise ConfigError("the ranks cannot share the model's experts evenly",
                              got=f"{experts.count} experts of {experts.size}, ep={topology.ep}, tp={tp}",
                              expected="ep divides the experts, tp / ep their inner size, and tp that of the shared "
                                       f"one ({experts.shared_size})", hint="choose another tp or ep")
    elif topology.ep > 1:
        raise ConfigError("expert parallelism needs a model with experts", got=f"ep={topology.ep}",
                          expected=f"ep=1: {config.architecture} has no experts")


def build_model(config: ModelConfig, topology: Topology, communicator: Communicator, ops: Ops, dtype: torch.dtype,
                device: torch.device, longest: int = 0) -> CausalLM:
    """One rank's part of the model on `device`, in inference mode, its weights not yet filled: call
    `hal.checkpoints.loader.load_weights` or `random_weights`. `longest` is the engine's longest sequence, in tokens; 0:
    the model's context.

    Raises:
        ConfigError: no family runs the architecture; the model cannot be sharded as `topology` says; `ops` cannot
            multiply by its weights.
        ModelLoadError: the checkpoint's format of weights is unknown, or refuses its configuration.
    """
    from hal.models.families import architectures, family_of
    from hal.models.layers import Build
    from hal.weights.formats import schemes

    build = Build(topology, communicator, ops, dtype, device, schemes(config.quantization), longest)
    check_topology(config, topology)
    if config.source is not None:
        from hal.models.transformers_model import TransformersModel

        return TransformersModel(config, build).eval()
    if config.eagle is not None:
        from hal.models.eagle3 import Eagle3

        return Eagle3(config, build).eval()
    family = family_of(config.architecture)
    if family is None:
        raise ConfigError("no family of models runs this architecture", got=config.architecture,
                          expected=", ".join(architectures()))
    model: CausalLM = family.load("model")(config, build)
    return model.eval()
