"""L3: adapters (LoRA) of different slots in one batch, against the reference with each merged into its weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from hal.adapters.files import targets_of
from hal.checkpoints.hf_config import read_config
from hal.conformance.case import case
from hal.conformance.context import GREEDY, Context, Run, drive
from hal.conformance.reference import Reference
from hal.features.adapter import Adapter

_RANKS = 8, 3, 5, 8  # of adapters, of which the last takes the place of the first


@case(3, "adapters", "adapters", "checkpoints")
def of_several_slots_in_one_batch(ctx: Context) -> None:
    """Rows get the products of their own slot, of its rank and scale, in every linear layer; rows without an adapter
    get none. A slot that is filled again has nothing of the adapter before."""
    session = ctx.session(max_adapters=3, max_adapter_rank=8)
    made = [_make(ctx, ctx.scratch / f"{ctx.dtype}-adapter-{ctx.seed}-{i}", rank) for i, rank in enumerate(_RANKS)]
    for epoch, slots in enumerate(((0, 1, 2), (3, 1, 2))):
        scheduler, adapters = session.scheduler(), dict[int, Adapter]()
        scheduler.epoch = epoch
        for slot, i in enumerate(slots):
            adapters[i] = Adapter(str(i), str(made[i][0]), slot, b"")
            if not epoch or i not in (1, 2):
                scheduler.load_adapter(adapters[i])
        order = [*slots, -1, *reversed(slots)]
        runs = drive(session.step, scheduler, ctx.prompts(12, 30, 5, 21, 9, 2, 17), GREEDY, 1,
                     adapters=[adapters.get(i) for i in order])
        for i, run in zip(order, runs, strict=True):
            _verify(ctx, run, {} if i < 0 else made[i][1], "no adapter" if i < 0 else f"adapter {i}")


def _make(ctx: Context, directory: Path, rank: int) -> tuple[Path, dict[str, torch.Tensor]]:
    """An adapter's directory, and in fp64 what it adds to each weight."""
    tensors, deltas = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    for name, (size_in, size_out) in targets_of(read_config(ctx.model("llama"))).items():
        a, b = ctx.normal(rank, size_in, scale=size_in ** -0.5), ctx.normal(size_out, rank, scale=0.2 * rank ** -0.5)
        tensors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
        deltas[f"{name}.weight"] = 2 * b.double() @ a.double()
    directory.mkdir(exist_ok=True)
    save_file(tensors, str(directory / "adapter_model.safetensors"))
    (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank}))
    return directory, deltas


def _verify(ctx: Context, run: Run, deltas: dict[str, torch.Tensor], what: str) -> None:
    path = ctx.model("llama")
    reference = Reference(path, read_config(path), ctx.dtype)
    for name, delta in deltas.items():
        reference.weights[name] = reference.weights[name] + delta
    logits = reference.logits(run.tokens)[run.prompt - 1:-1]
    ctx.verify_choices(logits, run, what)
    expected = logits.log_softmax(-1).gather(1, torch.tensor(run.output)[:, None])[:, 0]
    ctx.close("model", torch.tensor(run.logprobs), expected, f"{what}: logprobs")
