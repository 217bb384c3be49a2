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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    triton = importlib.util.find_spec("triton") is not None
    for item in items:
        if here not in item.path.parents or item.path.name == "test_backend.py":
            continue
        item.add_marker(pytest.mark.cuda)
        interpreted = os.environ.get("TRITON_INTERPRET") == "1" and item.path.name == "test_kernels.py"
        if not triton or not (torch.cuda.is_available() or interpreted):
            item.add_marker(pytest.mark.skip(reason="requires an NVIDIA GPU, a CUDA build of PyTorch, and Triton"))
