"""The TPU's step input: a paged batch padded to its bucket. One call moves its arrays to the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from hal.contracts.inputs import ModelInput, PagedModelInput
from hal.features import ADJUSTING
from hal.features.drawing import Draw, MinP, TopK, TopP
from hal.paged.shape_plan import Bucket, ShapePlan
from hal.schema import Packed
from hal.schema.declared import Self
from hal.schema.packed import as_tensor, packed_source
from runners.tpu import lowering

# The fields of each sampling program; a program's fields include those of the ones before it.
DRAWN = tuple(Draw.fields)
FILTERED = (*DRAWN, *TopK.fields, *TopP.fields, *MinP.fields)
ADJUSTED = (*FILTERED, *(name for feature in ADJUSTING for name in feature.fields))


class StagedInput(ModelInput):
    """An input whose arrays one call moves to the device."""

    @classmethod
    def from_buffer(cls: type[Self], buffer: Any, device: Any = None) -> Self:
        # A copy: the message is valid until the next one, and the transfer may take longer.
        packed: Packed[Any] = cls.schema.unpack(np.array(buffer))
        host = device is None or torch.device(device).type == "cpu"
        made: Self = packed.to(device) if host else stage(packed)
        return made

    def check(self) -> None:
        """Check on the host, since every comparison on the device would be a program. Raises InputError."""
        if self["input_ids"].is_cpu:
            super().check()
        else:
            (packed_source(self) or type(self).schema.pack(self)).to().check()


class TpuModelInput(StagedInput, PagedModelInput):
    """A paged batch in one of the plan's shapes. Only what `prompt_targets` adds has a size of its own: no program of
    the step takes it whole."""


def stage(packed: Packed[Any]) -> Any:
    """The instance on the device. Arrays are not cut from one buffer there, since XLA would compile the cutting."""
    tensors = [as_tensor(array, packed.schema.by_name[name].array.dtype)  # type: ignore[union-attr]
               for name, array in packed.arrays.items()]
    return packed.bind(dict(zip(packed.arrays, lowering.to_device(tensors), strict=True)))


def bucket_for(plan: ShapePlan, packed: Packed[TpuModelInput]) -> Bucket:
    """The bucket of a step. A step of decoding sequences alone has the kind "decode", every other the kind "mixed"."""
    decodes = packed.values["num_decode_seqs"]
    kind = "decode" if decodes == int(packed.arrays["query_start_loc"][-1]) else "mixed"
    dims = packed.dims
    if packed.values["num_samples"] > dims["num_seqs"]:
        dims = {**dims, "num_seqs": packed.values["num_samples"]}
    return plan.bucket_for(kind, dims)


def fit(packed: Packed[TpuModelInput], plan: ShapePlan, widths: Mapping[str, int]) -> Packed[TpuModelInput]:
    """The batch in its bucket's shapes, or the same object if it has them already. It has the sampling fields of one
    sampling program, or none; where it stands for several steps, those by which sequences stop too.

    Args:
        widths: sizes of the symbols that only sampling fields have.
    """
    dims, here = packed.dims, packed.arrays
    sizes = bucket_for(plan, packed).dims
    seqs = sizes["num_seqs"]
    sizes.setdefault("num_tokens", seqs)
    present: set[str] = set()
    for fields in (DRAWN, FILTERED, ADJUSTED):
        if any(name in here for name in fields if name not in present):
            present = set(fields)
    if present or "max_new" in here:
        sizes["num_sampled"] = seqs
    if len(present) == len(ADJUSTED):
        sizes |= widths
    sizes["num_logits"] = max(seqs, packed.values["num_samples"] + dims["num_targets"])
    if all(dims[symbol] == size for symbol, size in sizes.items()) and present <= here.keys():
        return packed
    return packed.padded(present, **sizes)
