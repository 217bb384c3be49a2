"""A vendor's collectives carry an engine's data plane and control plane, with no edit in workers/."""

from __future__ import annotations

import pytest
import torch
import vendor

from hal import LLM, SamplingParams
from hal.contracts.device import Collectives
from hal.errors import BackendError
from workers.links.groups import dist, make_group

PROMPTS, PARAMS = [[5, 6, 7, 8, 9], [1, 2, 3]], SamplingParams(max_tokens=6, ignore_eos=True)


def tokens(device: str, **options: object) -> list[list[int]]:
    with LLM(device=device, num_blocks=64, **options) as llm:
        return [output.token_ids for output in llm.generate(PROMPTS, PARAMS)]


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "sizes"), [({"tp": 2}, [2, 2]), ({"pp": 2}, [2, 2, 2])], ids=["tp2", "pp2"])
def test_an_engine_runs_over_groups_that_a_vendor_registered(layout: dict[str, int], sizes: list[int]) -> None:
    """The groups: those of the control plane, one more to the rank that samples, and one along the axis."""
    vendor.made.clear()
    assert tokens("vendor:backend", control_plane="collectives", **layout) == tokens("null")
    assert vendor.made == sizes


def test_collectives_that_nobody_registered_are_refused_with_those_that_are_there() -> None:
    with pytest.raises(BackendError, match=r"(?s)no such collectives.*got: othercl.*gloo or .*vendorccl"):
        make_group(Collectives("othercl"), dist.HashStore(), "x", 0, 1)


def test_the_extended_form_of_registration_is_served() -> None:
    """Vendors whose groups need more than a store and a rank register a function of torch's options."""
    seen = []
    dist.Backend.register_backend("extendedccl", lambda options, more: seen.append(
        (options.group_rank, options.group_size, more)) or torch, extended_api=True, devices=["cpu"])
    assert make_group(Collectives("extendedccl"), dist.HashStore(), "x", 1, 2) is torch
    assert seen == [(1, 2, None)]
