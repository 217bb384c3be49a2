"""Needs an NVIDIA GPU with Triton; the kernels' own tests also run in Triton's interpreter (TRITON_INTERPRET=1)."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))


INTERPRETED = {"test_kernels.py", "test_few_bit_experts.py", "test_sampling.py", "test_sums.py", "test_interpreted.py"}


def interpret() -> None:
    """Triton 3.4's interpreter makes integers of arrays of one element, which NumPy 2.4 refuses."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: type, *scope: object) -> None:
        patch(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._patch_lang_tensor = patched


if os.environ.get("TRITON_INTERPRET") == "1":
    interpret()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    triton = importlib.util.find_spec("triton") is not None
    for item in items:
        if here not in item.path.parents or item.path.name in ("test_backend.py", "test_compile.py"):
            continue
        item.add_marker(pytest.mark.cuda)
        interpreted = os.environ.get("TRITON_INTERPRET") == "1" and item.path.name in INTERPRETED
        if item.path.name in INTERPRETED:
            item.add_marker(pytest.mark.interpreted)
        if not triton or not (torch.cuda.is_available() or interpreted):
            item.add_marker(pytest.mark.skip(reason="requires an NVIDIA GPU, a CUDA build of PyTorch, and Triton"))
