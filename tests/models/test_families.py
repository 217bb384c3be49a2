"""Every native family through the whole stack against transformers in fp64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest

Family = Callable[[str], Path]


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = families.save(name, tmp_path_factory.mktemp("family") / name)
        return made[name]

    return get


def prompts(name: str) -> list[list[int]]:
    return families.LONG if "longrope" in name else families.PROMPTS


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in ("gemma2", "glm4") else pytest.mark.slow)
                                  for name in families.FAMILIES])
def test_chunked_preempted_and_with_a_cached_prefix(family: Family, name: str) -> None:
    """One engine does it all: prompts in chunks of at most 13 tokens, sequences that outgrow the blocks, and a second
    request whose prompt and first tokens are cached."""
    asked = prompts(name)
    with families.run(family(name), max_num_batched_tokens=13, num_blocks=41, max_model_len=128) as llm:
        outputs = families.generate(llm, asked)
        families.assert_parity(family(name), asked, outputs)
        again = [asked[0] + outputs[0].token_ids[:20]]
        before = llm.stats().cached_tokens
        families.assert_parity(family(name), again, families.generate(llm, again, 8))
        stats = llm.stats()
    assert stats.preemptions > 0 and stats.cached_tokens > before


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "names"), [
    ({"tp": 2}, ("phi3", "olmo2")), ({"pp": 2}, ("gemma3",))], ids=["tp2", "pp2"])
def test_in_processes(family: Family, layout: dict[str, Any], names: tuple[str, ...]) -> None:
    for name in names:
        with families.run(family(name), max_num_batched_tokens=13, **layout) as llm:
            families.assert_parity(family(name), prompts(name), families.generate(llm, prompts(name)))
