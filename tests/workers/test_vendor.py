"""A vendor's collectives carry an engine's data plane and control plane, with no edit in workers/."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import vendor

from hal import LLM, SamplingParams
from hal.checkpoints.hf_config import read_config
from hal.config import BUNDLED_MODEL, EngineConfig, Topology, WorkerConfig
from hal.contracts.backend import in_host_memory
from hal.contracts.communicator import LocalCommunicator
from hal.contracts.device import Collectives
from hal.errors import BackendError
from hal.testing.null import NullBackend
from workers.links.groups import dist, make_group
from workers.worker.generic import Worker

PROMPTS, PARAMS = [[5, 6, 7, 8, 9], [1, 2, 3]], SamplingParams(max_tokens=6, ignore_eos=True)


def tokens(device: str, **options: object) -> list[list[int]]:
    with LLM(device=device, num_blocks=64, **options) as llm:
        return [output.token_ids for output in llm.generate(PROMPTS, PARAMS)]


@pytest.mark.slow
@pytest.mark.parametrize(("options", "sizes"), [
    ({"tp": 2, "control_plane": "collectives"}, [2, 2]), ({"pp": 2, "control_plane": "collectives"}, [2, 2, 2]),
    ({"tp": 2}, [2]), ({"pp": 2}, [2])], ids=str)
def test_an_engine_runs_over_groups_that_a_vendor_registered(options: dict[str, Any], sizes: list[int]) -> None:
    """The groups: those of a control plane that uses them, one more to the rank that samples, and one along the axis.
    The data plane uses them although the vendor's tensors lie in host memory, where there is shared memory too."""
    vendor.made.clear()
    assert tokens("vendor:backend", **options) == tokens("null")
    assert vendor.made == sizes


def test_host_memory_is_what_the_backend_declares() -> None:
    """A device with memory of its own may show tensors of type "cpu" to torch."""
    cpu, other = torch.device("cpu"), torch.device("meta")
    made = NullBackend()
    for declared, expected in ((None, (True, False)), (True, (True, True)), (False, (False, False))):
        made.capabilities = replace(NullBackend.capabilities, host_memory=declared)
        assert (in_host_memory(made, cpu), in_host_memory(made, other)) == expected


def test_a_rank_of_a_device_with_memory_of_its_own_counts_all_of_it() -> None:
    """The cache is as large as the device's memory, and no rank shares it with the other one."""
    made = NullBackend()
    made.capabilities = replace(NullBackend.capabilities, host_memory=False)
    counts = []
    config = WorkerConfig(EngineConfig(device="null", tp=2), read_config(BUNDLED_MODEL), Topology(tp=2))
    for backend in (NullBackend(), made):
        worker = Worker(config, backend)
        worker.init_device()
        worker.communicator = LocalCommunicator()
        worker.runner = backend.make_runner(worker.config, worker.device, worker.communicator)
        counts.append(worker.determine_num_blocks())
    blocks = (16 << 30) * 0.9 // worker.runner.kv_bytes_per_block()
    assert counts[0] < 10_000 and 0.95 * blocks < counts[1] <= blocks


def test_collectives_that_nobody_registered_are_refused_with_those_that_are_there() -> None:
    with pytest.raises(BackendError, match=r"(?s)no such collectives.*got: othercl.*gloo or .*vendorccl"):
        make_group(Collectives("othercl"), dist.HashStore(), "x", 0, 1)


@pytest.mark.slow
def test_the_extended_form_of_registration_is_served() -> None:
    """Vendors whose groups need more than a store and a rank register a function of torch's options."""
    seen = []
    dist.Backend.register_backend("extendedccl", lambda options, more: seen.append(
        (options.group_rank, options.group_size, more)) or torch, extended_api=True, devices=["cpu"])
    assert make_group(Collectives("extendedccl"), dist.HashStore(), "x", 1, 2) is torch
    assert seen == [(1, 2, None)]
