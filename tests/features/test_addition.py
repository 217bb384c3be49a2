"""A step feature that the library does not know, declared in one module of a third party, arrives everywhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hal.errors import ConfigError
from hal.sampling.document import page

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs" / "parameters.md"


@pytest.mark.slow
def test_a_feature_of_a_third_party_arrives_everywhere() -> None:
    path = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "HAL_FEATURES": "odd_bonus:OddBonus", "PYTHONPATH": path}
    run = subprocess.run([sys.executable, str(HERE / "use_odd_bonus.py")], env=environment, capture_output=True,
                         text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert all(token % 2 for token in found["asked"]) and len(found["asked"]) == 6  # tp=2
    assert not all(token % 2 for token in found["plain"])
    assert found["jsonl"] == found["asked"]
    assert all(token % 2 for token in json.loads(found["option"])["token_ids"])
    floats, field = found["recorded"]
    assert 1000.0 in floats[0] and field == [1000.0]
    assert "equal to the last bit" in found["replay"]
    assert "float32[num_new, 7]" in found["column"] and "float32[num_sampled]" in found["field"]
    assert found["row"] == ["| `odd_bonus` | number | 0.0 | from 0 to 1e+06 | added to the logits of tokens with an "
                            "odd id |"]


@pytest.mark.parametrize("name", ["no_such_module:Feature", "odd_bonus:Missing", "json:JSONDecoder", ":"])
def test_a_feature_that_cannot_be_loaded_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from hal import features

    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setenv("HAL_FEATURES", name)
    with pytest.raises(ConfigError, match=name):
        list(features._third_party())


def test_the_documentation_has_all_parameters() -> None:
    assert DOCS.read_text() == page(), "python -m hal.sampling.document > docs/parameters.md"
