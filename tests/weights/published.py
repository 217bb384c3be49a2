"""Writers of quantised checkpoints in published layouts, apart from hal's own code: each takes a dense weight [out, in]
and returns the stored tensors of a projection and the weight that they stand for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import checkpoints
import numpy as np
import torch
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    import pytest

Tensors = dict[str, torch.Tensor]
Written = tuple[Tensors, torch.Tensor]
GROUP = 16
E4M3 = torch.float8_e4m3fn


def packed(values: np.ndarray, axis: int, bits: int = 4, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Integers [rows, columns] into int32 along an axis; `order`: which value has the place of each nibble."""
    count = 32 // bits
    values = np.moveaxis(values.astype(np.uint32), axis, -1)
    values = np.pad(values, ((0, 0), (0, -values.shape[-1] % count))).reshape(values.shape[0], -1, count)
    words = np.zeros(values.shape[:2], np.uint32)
    for place, i in enumerate(order or range(count)):
        words |= values[:, :, i] << np.uint32(bits * place)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(words.view(np.int32), -1, axis)))


def fp8_tensor(w: torch.Tensor, name: str) -> Written:
    scale = w.abs().max() / 448
    values = (w / scale).to(E4M3)
    return {"weight": values, "weight_scale": scale, "input_scale": torch.tensor([0.05])}, values.float() * scale


def fp8_channel(w: torch.Tensor, name: str) -> Written:
    scale = (w.abs().amax(1, keepdim=True) / 448).bfloat16()
    values = (w / scale.float()).clamp(-448, 448).to(E4M3)
    return {"weight": values, "weight_scale": scale}, values.float() * scale.float()


def fp8_blocks(size: int) -> Callable[[torch.Tensor, str], Written]:
    def write(w: torch.Tensor, name: str) -> Written:
        rows, columns = -(-w.shape[0] // size), -(-w.shape[1] // size)
        scales, values, dense = torch.zeros(rows, columns), torch.zeros(w.shape).to(E4M3), torch.zeros(w.shape)
        for i in range(rows):
            for j in range(columns):
                here = slice(i * size, (i + 1) * size), slice(j * size, (j + 1) * size)
                scales[i, j] = w[here].abs().max() / 448
                values[here] = (w[here] / scales[i, j]).to(E4M3)
                dense[here] = values[here].float() * scales[i, j]
        return {"weight": values, "weight_scale_inv": scales}, dense
    return write


def int8_channel(w: torch.Tensor, name: str) -> Written:
    scale = w.abs().amax(1, keepdim=True) / 127
    values = (w / scale).round().to(torch.int8)
    return {"weight": values, "weight_scale": scale}, values.float() * scale


def quantised(w: torch.Tensor, bits: int, symmetric: bool, index: np.ndarray) -> tuple[np.ndarray, ...]:
    """Integers from 0 on [out, in], and scales and zeros [out, groups]; `index` has the group of each input."""
    x, top = w.numpy().astype(np.float64), 2**bits - 1
    scales, zeros = (np.zeros((x.shape[0], index.max() + 1)) for _ in range(2))
    values = np.zeros(x.shape)
    for g in range(scales.shape[1]):
        part = x[:, index == g]
        if symmetric:
            scale, zero = np.abs(part).max(1) / (top // 2), np.full(len(x), 2.0 ** (bits - 1))
        else:
            low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
            scale = (high - low) / top
            zero = np.clip(np.round(-low / scale), 1, top)  # GPTQ's first version cannot hold a zero point of 0
        scale = scale.astype(np.float16).astype(np.float64)
        values[:, index == g] = np.clip(np.round(part / scale[:, None] + zero[:, None]), 0, top)
        scales[:, g], zeros[:, g] = scale, zero
    return values, scales, zeros, ((values - zeros[:, index]) * scales[:, index]).astype(np.float32)


def groups(inputs: int, name: str, act_order: bool) -> np.ndarray:
    """With act order, q, k and v of a layer share one, as they share their inputs, and gate and up do not."""
    index = np.arange(inputs) // GROUP
    if act_order:
        np.random.default_rng(0 if "self_attn" in name else sum(name.encode())).shuffle(index)
    return index


def int4_packed(bits: int = 4, symmetric: bool = True, act_order: bool = False,
                ) -> Callable[[torch.Tensor, str], Written]:
    def write(w: torch.Tensor, name: str) -> Written:
        index = groups(w.shape[1], name, act_order)
        values, scales, zeros, dense = quantised(w, bits, symmetric, index)
        stored = {"weight_packed": packed(values, 1, bits), "weight_scale": torch.from_numpy(scales).bfloat16(),
                  "weight_shape": torch.tensor(w.shape)}
        dense = (values - zeros[:, index]) * stored["weight_scale"].double().numpy()[:, index]
        if not symmetric:
            stored["weight_zero_point"] = packed(zeros, 0, bits)
        if act_order:
            stored["weight_g_idx"] = torch.from_numpy(index.astype(np.int32))
        return stored, torch.from_numpy(dense).float()
    return write


def gptq(act_order: bool = False, offset: int = 1) -> Callable[[torch.Tensor, str], Written]:
    def write(w: torch.Tensor, name: str) -> Written:
        index = groups(w.shape[1], name, act_order)
        values, scales, zeros, dense = quantised(w, 4, False, index)
        return {"qweight": packed(values.T, 0), "qzeros": packed(zeros.T - offset, 1),
                "scales": torch.from_numpy(scales.T.copy()).half(), "g_idx": torch.from_numpy(index.astype(np.int32)),
                }, torch.from_numpy(dense)
    return write


def awq(w: torch.Tensor, name: str) -> Written:
    values, scales, zeros, dense = quantised(w, 4, False, groups(w.shape[1], name, False))
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {"qweight": packed(values.T, 1, order=order), "qzeros": packed(zeros.T, 1, order=order),
            "scales": torch.from_numpy(scales.T.copy()).half()}, torch.from_numpy(dense)


def mxfp4(w: torch.Tensor, name: str) -> Written:
    levels = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    x = w.numpy().reshape(w.shape[0], -1, 32).astype(np.float64)
    exponents = np.floor(np.log2(np.abs(x).max(-1))) - 1
    scaled = x / 2.0 ** exponents[..., None]
    codes = np.abs(np.abs(scaled)[..., None] - levels).argmin(-1)
    dense = np.sign(scaled) * levels[codes] * 2.0 ** exponents[..., None]
    codes = (codes + 8 * (scaled < 0)).astype(np.uint8).reshape(w.shape)
    stored = {"weight_packed": torch.from_numpy(codes[:, ::2] | codes[:, 1::2] << 4),
              "weight_scale": torch.from_numpy((exponents + 127).astype(np.uint8))}
    return stored, torch.from_numpy(dense.reshape(w.shape)).float()


def compressed(layout: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group},
            "ignore": ["lm_head"], "kv_cache_scheme": None, "quantization_status": "compressed"}


def _int4(bits: int, symmetric: bool, actorder: str | None = None) -> dict[str, Any]:
    return compressed("pack-quantized", {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group",
                                         "group_size": GROUP, "actorder": actorder, "dynamic": False})


def _gptq(**options: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False, "lm_head": False,
            **options}


def auto_round(layout: str, **options: Any) -> dict[str, Any]:
    return {"quant_method": "auto-round", "packing_format": layout, "bits": 4, "group_size": GROUP, "sym": False,
            "data_type": "int", "block_name_to_quantize": "model.layers", **options}


def _fp8(size: int) -> dict[str, Any]:
    return {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [size, size]}


_TOKEN8: dict[str, Any] = {"num_bits": 8, "symmetric": True, "strategy": "token", "dynamic": True}
_CHANNEL8 = {"num_bits": 8, "symmetric": True, "strategy": "channel", "dynamic": False}
# Of each format: quantization_config, the writer, and how far log-probabilities may be from those of the dequantised
# model in fp32. The formats that round inputs are further away than those that compute with exact ones.
FORMATS: dict[str, tuple[dict[str, Any], Callable[[torch.Tensor, str], Written], float]] = {
    "fp8-tensor-static": ({"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]},
                          fp8_tensor, 1.5),
    "fp8-channel": (compressed("float-quantized", {**_CHANNEL8, "type": "float"}, {**_TOKEN8, "type": "float"}),
                    fp8_channel, 1.5),
    "fp8-blocks": (_fp8(16), fp8_blocks(16), 1.5),
    "fp8-blocks-across": (_fp8(24), fp8_blocks(24), 1.5),  # blocks cross the boundaries of merged projections
    "int8-channel": (compressed("int-quantized", {**_CHANNEL8, "type": "int"}, {**_TOKEN8, "type": "int"}),
                     int8_channel, 0.3),
    "int4-packed": (_int4(4, True), int4_packed(), 2e-4),
    "int4-packed-zeros": (_int4(4, False), int4_packed(symmetric=False), 2e-4),
    "int4-packed-act-order": (_int4(4, True, "group"), int4_packed(act_order=True), 2e-4),
    "int8-packed": (_int4(8, True), int4_packed(8), 2e-4),
    "gptq": (_gptq(), gptq(), 2e-4),
    "gptq-v2": (_gptq(checkpoint_format="gptq_v2"), gptq(offset=0), 2e-4),
    "gptq-act-order": (_gptq(desc_act=True), gptq(True), 2e-4),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}, awq, 2e-4),
    "auto-round": (auto_round("auto_round:auto_gptq"), gptq(), 2e-4),
    "auto-round-awq": (auto_round("auto_round:auto_awq"), awq, 2e-4),
    "mxfp4": (compressed("mxfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "group",
                                                  "group_size": 32}), mxfp4, 2e-4),
}


def write(source: Path, directory: Path, config: dict[str, Any], writer: Callable[[torch.Tensor, str], Written],
          dense_layers: tuple[str, ...] = ("lm_head",)) -> tuple[Path, Path]:
    """A checkpoint in a format, and the dense one in fp32 that it stands for. `dense_layers`: parts of names."""
    paths = directory / "quantised", directory / "dense"
    tensors = load_file(source / "model.safetensors")
    stored, dense = dict(tensors), dict(tensors)
    for key, weight in tensors.items():
        name = key.removesuffix(".weight")
        if name.endswith("_proj") and not any(part in name for part in dense_layers):
            found, dense[key] = writer(weight, name)
            del stored[key]
            stored |= {f"{name}.{part}": value for part, value in found.items()}
    for path, content in zip(paths, (stored, dense), strict=True):
        shutil.copytree(source, path)
        save_file({k: v.contiguous() for k, v in content.items()}, path / "model.safetensors", {"format": "pt"})
    settings = json.loads((source / "config.json").read_text())
    (paths[0] / "config.json").write_text(json.dumps({**settings, "quantization_config": config}))
    return paths


def made_once(source: Path, folders: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """A function that gives what `write` makes of a dense checkpoint in one of FORMATS, and writes it on first use."""
    def save(name: str, directory: Path) -> tuple[Path, Path]:
        config, writer, _ = FORMATS[name]
        return write(source, directory, config, writer)

    return checkpoints.made_once(save, folders)
