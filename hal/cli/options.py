"""Command line options made from the fields of EngineConfig and the declared parameters of SamplingParams."""

from __future__ import annotations

import argparse
import dataclasses
import os
import types
import typing
from typing import TYPE_CHECKING, Any

from hal.config import EngineConfig
from hal.sampling.params import SamplingParams

if TYPE_CHECKING:
    from hal.engine.llm import LLM

ENGINE_HELP = {
    "model": "checkpoint directory in Hugging Face format, a GGUF file, or a hub id whose files are in the local cache",
    "device": "auto, a backend's name (`hal env` lists them), or module:attribute of a backend",
    "dtype": "of weights and KV cache",
    "kv_dtype": "of the KV cache, where it is not the weights'",
    "quantize": "bits that a dense checkpoint's weights keep as they are read",
    "tp": "tensor-parallel processes",
    "pp": "pipeline stages",
    "ep": "expert-parallel groups of the tensor-parallel ranks; a divisor of tp",
    "max_model_len": "longest prompt + output in tokens",
    "max_num_seqs": "sequences in one step",
    "max_num_batched_tokens": "tokens in one step; longer prompts are cut into chunks",
    "itl_target_ms": "milliseconds between two tokens of a sequence that chunks of prompts shall not exceed",
    "block_size": "tokens per KV block",
    "num_blocks": "KV blocks",
    "num_cpu_blocks": "KV blocks on the host, for preempted sequences; 0 recomputes them",
    "kv_cache_bytes": "bytes of each rank's KV cache, where num_blocks does not size it",
    "memory_fraction": "share of the free memory that the KV cache may take",
    "async_scheduling": "prepare a step before the tokens of the one before it are known on the host",
    "steps_per_message": "decode steps that ranks take for one message, or auto: 8 while no request waits",
    "batch_invariant": "the same bits for a request in any batch, where the device offers it, at some cost",
    "expert_loads": "count the tokens that each expert computes",
    "graphs": "run every step eagerly",
    "prefix_caching": "do not reuse the KV blocks of equal prefixes",
    "speculate": "what proposes tokens for the model to verify: ngram, draft, eagle or module:attribute of a Proposer",
    "speculative_tokens": "the most tokens that are proposed at a time",
    "draft_model": "checkpoint directory of --speculate draft or eagle",
    "draft_tp": "tensor-parallel ranks of the draft model; a divisor of tp",
    "max_adapters": "adapters that may be loaded at a time",
    "max_adapter_rank": "the largest rank of an adapter",
    "executor": "who starts the other ranks",
    "wire": "what crosses the control plane",
    "control_plane": "the mechanism that carries it",
    "heartbeat": "seconds of silence after which a rank counts as failed",
    "seed": "of requests that give none",
    "random_weights": "initialise instead of loading",
    "trust_remote_code": "run the checkpoint's own Python where its tokenizer or its model is made of that",
    "generation_config": "auto: the checkpoint's generation_config.json sets the sampling options that are not given",
    "chat_template": "a Jinja file that takes the place of the checkpoint's chat template",
    "pooling": "how hidden states become an embedding; auto: as the checkpoint's modules.json says, if it has one",
    "model_impl": "a definition of hal, or transformers' modelling code",
}
_UNSET = {"chat_template": "the checkpoint's", "quantize": "all", "speculate": "nothing", "draft_model": "none",
         "max_model_len": "the model's context, or what memory holds", "itl_target_ms": "none",
         "num_blocks": "from free memory", "kv_cache_bytes": "from free memory",
         "model": "the bundled model, which adds numbers below 1,000",
         "async_scheduling": "where the device gains from it"}


def _add(group: argparse._ArgumentGroup, name: str, hint: Any, default: Any, text: str, unset: str | None) -> None:
    """Add one option. If the user does not give it, it is absent from the namespace, so the field's default holds."""
    options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": text}
    flag = "--use-adapter" if name == "adapter" else "--" + name.replace("_", "-")  # --adapter loads one
    if hint is bool:
        flag = flag if not default else "--no-" + flag[2:]
        group.add_argument(flag, action="store_false" if default else "store_true", **options)
        return
    if unset is not None:
        options["help"] += f" (default: {unset})"
    elif default not in ((), None):
        options["help"] += f" (default: {default})"
    if hint == int | typing.Literal["auto"]:
        options |= {"type": _number_or_auto, "metavar": "N"}
        group.add_argument(flag, **options)
        return
    if typing.get_origin(hint) in (types.UnionType, typing.Union):  # X | None
        hint = next(part for part in typing.get_args(hint) if part is not types.NoneType)
    if hint is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif typing.get_origin(hint) is typing.Literal:
        options["choices"] = typing.get_args(hint)
    elif typing.get_origin(hint) is tuple:
        element = typing.get_args(hint)[0]
        options["help"] += "; repeatable"
        options |= {"action": "append", **({"type": element, "metavar": "TEXT" if element is str else "ID"}
                                           if element in (str, int) else {"type": _pair, "metavar": "ID=X"})}
    else:
        options |= {"type": hint, "metavar": {int: "N", float: "X"}.get(hint, "NAME")}
    group.add_argument(flag, **options)


def _number_or_auto(text: str) -> int | str:
    return text if text == "auto" else int(text)


def positive(text: str) -> int:
    """The type of an option that counts something."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not above 0")
    return value


def count(text: str) -> int:
    """The type of an option that counts something, of which there may be none."""
    if (value := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{value} is below 0")
    return value


def path(text: str) -> str:
    """The type of an option that names a file or folder. It expands a leading ~, which a shell leaves as it is in
    `--output=~/run`. EngineConfig expands the path of a model."""
    return os.path.expanduser(text)


def add_engine_options(parser: argparse.ArgumentParser, *, skip: tuple[str, ...] = ("chat_template",)) -> None:
    group = parser.add_argument_group("engine")
    hints = typing.get_type_hints(EngineConfig)
    for field in dataclasses.fields(EngineConfig):
        if field.name not in ("seed", "random_weights", *skip):
            _add(group, field.name, hints[field.name], field.default, ENGINE_HELP[field.name], _UNSET.get(field.name))
    if "max_adapters" not in skip:
        add_adapter_option(group)


def add_adapter_option(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    parser.add_argument("--adapter", dest="adapters", action="append", type=_named, default=[], metavar="NAME=DIR",
                        help="load the adapter (LoRA) of a directory, for requests that name it; repeatable")


def add_recording_options(parser: argparse.ArgumentParser) -> None:
    """What a recording's model is read from. See `recording_options`."""
    parser.add_argument("--model", metavar="DIR", help="the recorded checkpoint; without it, only the bundled model "
                        "is read")
    add_adapter_option(parser)
    parser.add_argument("--random-weights", action="store_true", help="initialise the shape that the file gives, where "
                        "it was recorded so")


def recording_options(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Arguments of functions that run a recording: those of `add_recording_options`, and the options of these names
    that the user gave."""
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return {"model": args.model, "adapters": dict(args.adapters), **given,
            **({"random_weights": True} if args.random_weights else {})}


def load_adapters(llm: LLM, args: argparse.Namespace) -> None:
    """Load what --adapter names. Raises as LLM.load_adapter."""
    for name, directory in args.adapters:
        llm.load_adapter(name, directory)


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    for field in dataclasses.fields(SamplingParams):
        param = SamplingParams.param(field.name)
        _add(group, field.name, SamplingParams.kind(field.name)[0], field.default, param.help, param.unset)


def _named(text: str) -> tuple[str, str]:
    """ "NAME=DIR" of the command line."""
    name, _, directory = text.partition("=")
    if not name or not directory:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=DIR")
    return name, path(directory)


def _pair(text: str) -> tuple[str, float]:
    """ "ID=X" of the command line."""
    token, _, number = text.partition("=")
    return token, float(number)


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of EngineConfig that the user gave, or that --adapter needs. Its `seed` has no option: `--seed` is the
    seed of sampling."""
    given = {name: value for name, value in _given(args, EngineConfig).items() if name != "seed"}
    if getattr(args, "adapters", None):  # room for those of --adapter, where the user says nothing else
        from hal.adapters.files import read_adapter

        given.setdefault("max_adapters", len(args.adapters))
        if "max_adapter_rank" not in given:
            given["max_adapter_rank"] = max(read_adapter(directory).max_rank for _, directory in args.adapters)
    return given


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of SamplingParams that the user gave."""
    return _given(args, SamplingParams)


def _given(args: argparse.Namespace, kind: type) -> dict[str, Any]:
    return {f.name: getattr(args, f.name) for f in dataclasses.fields(kind) if hasattr(args, f.name)}
