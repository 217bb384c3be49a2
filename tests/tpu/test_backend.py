"""What the backend says of itself where it cannot run, and that asking costs nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

from hal.contracts import backend as backends
from hal.errors import BackendError
from runners import tpu


@pytest.mark.parametrize(("packages", "pjrt", "chips", "told"), [
    ({"torch": "2.8.0"}, "CPU", False, "torch_xla is not installed: pip install torch==2.8.0 torch_xla==2.8.1"),
    ({"torch": "2.13.0+cpu", "torch_xla": "2.8.1"}, "CPU", False,
     "torch_xla 2.8.1 does not load with torch 2.13.0+cpu: pip install torch==2.8.0 torch_xla==2.8.1"),
    ({"torch": "2.8.0", "torch_xla": "2.8.1"}, None, False, "set PJRT_DEVICE=CPU"),
    ({"torch": "2.8.0", "torch_xla": "2.8.1"}, "TPU", False, "run on a TPU host, or set PJRT_DEVICE=CPU"),
    ({"torch": "2.8.0", "torch_xla": "2.8.1"}, "NEURON", False, "set it to TPU or CPU"),
    ({"torch": "2.8.0", "torch_xla": "2.8.1"}, "CPU", False, None),
    ({"torch": "2.8.0", "torch_xla": "2.8.1"}, None, True, None)])
def test_a_missing_requirement_is_named(monkeypatch: pytest.MonkeyPatch, packages: dict[str, str], pjrt: str | None,
                                  chips: bool, told: str | None) -> None:
    def version(name: str) -> str:
        if name not in packages:
            raise tpu.PackageNotFoundError(name)
        return packages[name]

    monkeypatch.setattr(tpu, "version", version)
    monkeypatch.setattr(tpu.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(tpu, "glob", lambda pattern: ["/dev/accel0"] if chips else [])
    monkeypatch.delenv("PJRT_DEVICE") if pjrt is None else monkeypatch.setenv("PJRT_DEVICE", pjrt)
    reason = tpu.backend.unavailable()
    assert reason == told or (told and reason and told in reason)
    if told:
        with pytest.raises(BackendError, match="not available here") as caught:
            backends.select("runners.tpu:backend")
        assert caught.value.got == reason


def test_auto_never_selects_xla_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = backends.load("runners.cpu:backend")
    monkeypatch.setenv("PJRT_DEVICE", "CPU")
    assert tpu.backend.priority < cpu.priority
    monkeypatch.delenv("PJRT_DEVICE")
    assert tpu.backend.priority > cpu.priority


def test_importing_loads_neither_torch_nor_torch_xla() -> None:
    code = ("import sys, runners.tpu as t; t.backend.unavailable(); t.backend.priority;"
            "assert not {'torch', 'torch_xla'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_collective_along_an_axis_of_one_rank_changes_nothing() -> None:
    """The other axis has several ranks, whose shares lie side by side."""
    import torch

    from hal.config import Topology
    from runners.tpu.spmd import MeshCommunicator

    shares = torch.arange(12.0).view(4, 3)
    for topology, axes in ((Topology(tp=2), ("pp", "ep")), (Topology(), ("tp", "pp", "ep"))):
        communicator = MeshCommunicator(topology, None)
        for axis in axes:
            for collective in (communicator.all_reduce, communicator.all_gather, communicator.reduce_scatter,
                               communicator.all_to_all, communicator.broadcast):
                assert torch.equal(collective(shares, axis), shares), (topology, axis, collective)


@pytest.mark.torch_release
@pytest.mark.usefixtures("xla")
def test_versions_tell_what_pjrt_sees() -> None:
    found = tpu.backend.versions()
    assert found["torch_xla"] and found["PJRT devices"] == "1 CPU"
