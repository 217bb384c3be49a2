"""Before L0: PyTorch's own tests of a device, on the operations that the default runner is made of.

    pip install expecttest
    HAL_BACKEND=mypackage:backend python -m pytest --pyargs hal.conformance.torch_device

PyTorch's OpInfo makes the sample inputs, and its harness makes a test for each operation and dtype. The same operation
on the CPU gives the expected result. For a device whose tensors torch does not know this level means nothing.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from hal.contracts.backend import select

_TYPE = select(os.environ.get("HAL_BACKEND", "cpu")).device(0).type  # the harness looks for devices when it is imported

from torch.testing._internal.common_device_type import instantiate_device_type_tests, ops  # noqa: E402
from torch.testing._internal.common_methods_invocations import op_db  # noqa: E402
from torch.testing._internal.common_utils import TestCase  # noqa: E402

# As torch's OpInfo names them.
OPERATIONS = frozenset((
    "add", "addcmul", "argmax", "cat", "clamp", "cumsum", "div", "exp", "gather", "index_copy", "index_fill",
    "index_select", "log_softmax", "masked_fill", "matmul", "mul", "nn.functional.embedding", "nn.functional.gelu",
    "nn.functional.layer_norm", "nn.functional.linear", "nn.functional.rms_norm", "nn.functional.silu", "roll",
    "scatter", "scatter_add", "softmax", "sort", "sub", "topk", "where"))
SAMPLES = 6  # of each operation and dtype

# A device that torch knows by registration alone has this name in the harness, whatever its own is.
_OWN = ("privateuse1",) if torch._C._get_privateuse1_backend_name() == _TYPE else ()


class TestOperations(TestCase):
    @ops([op for op in op_db if op.name in OPERATIONS],  # type: ignore[untyped-decorator]
         allowed_dtypes=(torch.float32, torch.bfloat16))
    def test_as_on_the_cpu(self, device: str, dtype: torch.dtype, op: Any) -> None:
        for sample, _ in zip(op.sample_inputs("cpu", dtype), range(SAMPLES), strict=False):
            there = sample.transform(lambda x: x.to(device) if isinstance(x, torch.Tensor) else x)
            expected = op(sample.input, *sample.args, **sample.kwargs)
            got = op(there.input, *there.args, **there.kwargs)
            pairs = [x if isinstance(x, (tuple, list)) else [x] for x in (got, expected)]
            for one, other in zip(*pairs, strict=True):
                self.assertEqual(one.device.type, torch.device(device).type)
                self.assertEqual(one.cpu(), other)


instantiate_device_type_tests(TestOperations, globals(), only_for=(_TYPE, *_OWN))  # type: ignore[no-untyped-call]
