"""The documentation of all parameters: `python -m hal.sampling.document` prints docs/parameters.md."""

from __future__ import annotations

import dataclasses
from typing import get_args

from hal.features.params import Param, Params

_HEAD = """# Parameters of a request

The same names are fields of `SamplingParams`, keys of a JSON Lines request, and options of the command line
(`--top-k` for `top_k`). This page is printed by `python -m hal.sampling.document`.

"""
_TAIL = """
Logprobs and ranks are of the raw logits. A token's score goes through repetition, presence and frequency penalties, the
logit bias, and the token mask of its step; then a sequence with a temperature above 0 divides it by the temperature,
and the filters top_k, top_p and min_p leave tokens out in this order.
"""


def table(params: type[Params]) -> str:
    """A markdown table of these parameters."""
    rows = ["| parameter | type | default | range | meaning |", "| --- | --- | --- | --- | --- |"]
    for field in dataclasses.fields(params):  # type: ignore[arg-type]
        param = params.param(field.name)
        default = param.unset if field.default is None else "none" if field.default == () else repr(field.default)
        rows.append(f"| `{field.name}` | {_type(params, field.name)} | {default} | {_range(param)} | {param.help} |")
    return "\n".join(rows) + "\n"


def _type(params: type[Params], name: str) -> str:
    kind, _ = params.kind(name)
    names = {int: "integer", float: "number", bool: "boolean", str: "text"}
    if kind in names:
        return names[kind]
    element = get_args(kind)[0]
    return f"list of {names[element]}s" if element in names else "numbers by token id"


def _range(param: Param) -> str:
    low = "" if param.low is None else f"{'above' if param.above else 'from'} {param.low:g}"
    high = "" if param.high is None else f"to {param.high:g}"
    most = "" if param.most is None else f"; at most {param.most} entries"
    return f"{low} {high}".strip() + most


def page() -> str:
    from hal.sampling.params import SamplingParams

    return _HEAD + table(SamplingParams) + _TAIL


if __name__ == "__main__":
    print(page(), end="")
