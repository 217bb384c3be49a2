"""Typed access to a checkpoint's JSON files, for the parsers of families. This loads no torch.

Every number has a range, so that a damaged or hostile file ends as an error before anything is allocated.
"""

from __future__ import annotations

from typing import Any

from hal.checkpoints.stored import shown
from hal.errors import ModelLoadError
from hal.model_config import RopeConfig

_MISSING = object()
# The largest values that are accepted; each is at least eight times that of any published model of these families,
# except the positions (the largest published context has 10 million tokens).
MAX_LAYERS, MAX_HIDDEN, MAX_INNER, MAX_HEADS, MAX_HEAD_DIM = 1024, 1 << 17, 1 << 20, 1024, 4096
MAX_VOCAB, MAX_POSITIONS, MAX_PARAMS, MAX_EXPERTS, INT32 = 1 << 22, 1 << 24, 10**13, 4096, (1 << 31) - 1
_DTYPES = {"auto": "float32", "float32": "float32", "float64": "float32", "float16": "float16", "half": "float16",
           "bfloat16": "bfloat16"}
_THETA, _FACTOR = (1.0, 1e15), (1.0, 1e6)  # the smallest and the largest that are accepted
_LAYER_TYPES = ("full_attention", "sliding_attention")
_KINDS = {int: "an integer", float: "a number", str: "a text", bool: "true or false", dict: "an object", list: "a list"}
_SCALINGS: dict[str, tuple[str, ...]] = {  # and the keys that each must have
    "default": (), "linear": ("factor",), "dynamic": ("factor",), "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"), "longrope": ("short_factor", "long_factor")}


class Reader:
    """The content of a JSON file; each method raises ModelLoadError naming the key. `hint` says what to do then."""

    def __init__(self, data: dict[str, Any], file: str = "config.json", hint: str | None = None) -> None:
        self.data, self.file, self.hint = data, file, hint

    def get(self, kinds: type | tuple[type, ...], default: Any, *names: str, null: Any = _MISSING) -> Any:
        """The value of the first of `names` that is present; the other names are aliases. `null` stands for JSON's
        null."""
        for name in names:
            value = self.data.get(name, _MISSING)
            if value is None and null is not _MISSING:
                return null
            if value is not _MISSING:
                if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
                    wanted = kinds if isinstance(kinds, tuple) else (kinds,)
                    raise self.unusable(name, value, " or ".join(
                        _KINDS[k] for k in wanted if k in _KINDS and not (k is int and float in wanted)))
                return value
        return default

    def size(self, default: Any, most: int, *names: str, null: Any = _MISSING) -> Any:
        """An integer from 1 to `most`."""
        value = self.get(int, default, *names, null=null)
        if isinstance(value, int) and not 1 <= value <= most:
            raise self.unusable(names[0], value, f"an integer from 1 to {most}")
        return value

    def number(self, default: float, low: float, high: float, name: str) -> float:
        """A number from `low` to `high`, both above 0."""
        value = self.get((int, float), default, name)
        if not low <= value <= high:
            raise self.unusable(name, value, f"a number from {low:g} to {high:g}")
        return float(value)

    def optional(self, low: float, high: float, name: str, default: float | None = None) -> float | None:
        """A number as `number` reads it, or None where it is absent or null."""
        if self.data.get(name, default) is None:
            return None
        return self.number(default or low, low, high, name)

    def flag(self, default: bool, name: str) -> bool:
        return bool(self.get(bool, default, name, null=default))

    def numbers(self, name: str, count: int) -> tuple[float, ...]:
        values = self.get(list, [], name)
        if len(values) != count or not all(type(v) in (int, float) and 1e-6 <= v <= 1e6 for v in values):
            raise self.unusable(name, values, f"{count} numbers from 1e-06 to 1e+06")
        return tuple(map(float, values))

    def layers(self, name: str, count: int) -> tuple[int, ...]:
        """Numbers of layers, of which the model has `count`."""
        values = self.get(list, [], name, null=[])
        if not all(type(v) is int and 0 <= v < count for v in values):
            raise self.unusable(name, values, f"integers from 0 to {count - 1}")
        return tuple(values)

    def refuse(self, name: str, what: str, allowed: Any) -> None:
        value = self.data.get(name, allowed)
        if value is not None and value != allowed:
            raise ModelLoadError(f"{self.file} asks for {what}, which is not supported", got=f"{name} = {shown(value)}")

    def unusable(self, name: str, value: object, expected: str) -> ModelLoadError:
        return ModelLoadError(f"{name} in {self.file} is not usable", got=shown(value), expected=expected,
                              hint=self.hint)

    # What families have in common.

    def eps(self, default: float, name: str) -> float:
        """The epsilon of a norm. It must be above 0 in fp32, since with 0 a row of zeros (the embedding of a padding
        token) is normalised to NaN."""
        return self.number(default, 1e-30, 1.0, name)

    def bos(self, default: int | None) -> int | None:
        value = self.get(int, default, "bos_token_id", null=None)
        return None if value is None else self._token("bos_token_id", value)

    def eos(self, default: int | tuple[int, ...] | None) -> tuple[int, ...]:
        given = self.get((int, list, tuple), default, "eos_token_id", null=None)
        ids = given if isinstance(given, (list, tuple)) else [] if given is None else [given]
        return tuple(self._token("eos_token_id", i) for i in ids)

    def _token(self, name: str, value: object) -> int:
        """A token id. Some checkpoints have -1 for "none"; it is accepted, since no token has it."""
        if type(value) is not int or not -1 <= value <= INT32:
            raise self.unusable(name, value, f"an integer from -1 to {INT32}, or null; for eos_token_id also a list")
        return value

    def dtype_name(self) -> str:
        """As config.json spells it; "auto" where it leaves it open."""
        value: str = self.get(str, "auto", "dtype", "torch_dtype", null="auto").removeprefix("torch.")
        if value not in _DTYPES:
            raise ModelLoadError("the checkpoint's dtype is not supported", got=shown(value),
                                 expected=", ".join(_DTYPES))
        return value

    def dtype(self) -> str:
        return _DTYPES[self.dtype_name()]

    def windows(self, layers: int, window: int | None, default: list[str]) -> tuple[int | None, ...]:
        """The window of each layer, which `layer_types` says; `default` are the types where it is absent."""
        types = self.get(list, default, "layer_types", null=default)
        if len(types) != layers or any(t not in _LAYER_TYPES for t in types):
            raise ModelLoadError(f"layer_types in {self.file} is not usable", got=shown(types),
                                 expected=f"{layers} entries, each one of {', '.join(_LAYER_TYPES)}")
        return tuple(window if t == "sliding_attention" else None for t in types)

    def ropes(self, max_position: int, head_dim: int, *, theta: float = 10000.0, local_theta: float | None = None,
              partial: float | None = None, interleaved: bool = False, default: dict[str, Any] | None = None,
              ) -> tuple[RopeConfig, RopeConfig | None]:
        """The rotary embedding of layers without and with a window. The second is None where there is one for all.

        Transformers 4 writes `rope_scaling` and `rope_theta`; transformers 5 writes both into `rope_parameters`.

        Args:
            theta, partial: the family's defaults; a `partial` of None refuses a rotary embedding of part of the head.
            local_theta: of a family whose windowed layers have an embedding of their own, which is never scaled in the
                old spelling. default: the family's parameters where config.json has none.
        """
        params = self.get(dict, {}, "rope_scaling", null={}) or self.get(dict, {}, "rope_parameters", null={})
        theta = self.number(theta, *_THETA, "rope_theta")
        if local_theta is None:
            return self._rope(params or default or {}, max_position, head_dim, theta, partial, interleaved), None
        of_types = {name: params.get(name) for name in _LAYER_TYPES}
        if any(isinstance(value, dict) for value in of_types.values()):
            whole, local = (value if isinstance(value, dict) else {} for value in of_types.values())
        else:
            whole, local = params, {}
        local_theta = self.number(local_theta or theta, *_THETA, "rope_local_base_freq")
        return (self._rope(whole, max_position, head_dim, theta, partial, interleaved),
                self._rope(local, max_position, head_dim, local_theta, partial, interleaved))

    def _rope(self, params: dict[str, Any], max_position: int, head_dim: int, theta: float, partial: float | None,
              interleaved: bool) -> RopeConfig:
        rope = Reader(params, self.file)
        kind = rope.get(str, "default", "rope_type", "type")
        if any(isinstance(value, dict) for value in params.values()):
            raise ModelLoadError("config.json asks for one rotary embedding for each type of layer, which is not "
                                 "supported for this architecture", got=shown(params))
        if kind not in _SCALINGS:
            raise ModelLoadError(f"config.json asks for rope type {shown(kind)}, which is not supported",
                                 got=shown(params), expected=", ".join(_SCALINGS))
        for name in _SCALINGS[kind]:
            if params.get(name) is None:
                raise ModelLoadError(f"rope type {kind!r} in config.json lacks {name!r}", got=shown(params))
        made: dict[str, Any] = {"theta": rope.number(theta, *_THETA, "rope_theta"), "interleaved": interleaved}
        if partial is None:
            for reader in (self, rope):
                reader.refuse("partial_rotary_factor", "rotary embedding over part of the head", 1.0)
        else:
            share = rope.number(self.number(partial, 1e-6, 1.0, "partial_rotary_factor"), 1e-6, 1.0,
                                "partial_rotary_factor")
            dim = int(head_dim * share)
            if dim < 2 or dim % 2:
                raise ModelLoadError("a rotary embedding needs an even number of entries", got=f"{dim} of {head_dim}")
            made["rotary_dim"] = 0 if dim == head_dim else dim
        if kind == "default":
            return RopeConfig(**made)
        factor = rope.optional(*_FACTOR, "factor")
        made |= {"scaling": kind, "factor": factor or 1.0}
        if kind in ("linear", "dynamic"):
            return RopeConfig(**made)
        original = self.size(rope.size(max_position, MAX_POSITIONS, "original_max_position_embeddings"), MAX_POSITIONS,
                             "original_max_position_embeddings")
        made["original_max_position"] = original
        if kind == "llama3":
            low, high = (rope.number(1.0, 1e-6, 1e6, name) for name in ("low_freq_factor", "high_freq_factor"))
            if low >= high:
                raise ModelLoadError("low_freq_factor in config.json is not below high_freq_factor",
                                     got=f"{low} and {high}")
            return RopeConfig(**made, low_freq_factor=low, high_freq_factor=high)
        return RopeConfig(**made, **(self._yarn if kind == "yarn" else self._longrope)(
            rope, made, factor, max_position, head_dim))

    @staticmethod
    def _yarn(rope: Reader, made: dict[str, Any], factor: float | None, max_position: int, head_dim: int,
              ) -> dict[str, Any]:
        from math import log

        def scale(by: float | None) -> float:
            return 1.0 + 0.1 * (by or 1.0) * log(factor or 1.0)

        if made["theta"] <= 1.0:
            raise rope.unusable("rope_theta", made["theta"], "more than 1, since yarn divides by its logarithm")
        fast, slow = (rope.optional(1e-6, 1e6, name) or default
                      for name, default in (("beta_fast", 32.0), ("beta_slow", 1.0)))
        whole, all_dims = (rope.optional(1e-6, 1e6, name) for name in ("mscale", "mscale_all_dim"))
        attention = rope.optional(1e-6, 1e6, "attention_factor")
        if attention is None:
            attention = scale(whole) / scale(all_dims) if whole and all_dims else scale(None)
        return {"beta_fast": fast, "beta_slow": slow, "truncate": rope.flag(True, "truncate"),
                "attention_factor": attention}

    @staticmethod
    def _longrope(rope: Reader, made: dict[str, Any], factor: float | None, max_position: int, head_dim: int,
                  ) -> dict[str, Any]:
        from math import log, sqrt

        original, count = made["original_max_position"], (made.get("rotary_dim") or head_dim) // 2
        longer = factor or max_position / original
        attention = rope.optional(1e-6, 1e6, "attention_factor")
        if attention is None:
            attention = sqrt(1 + log(longer) / log(original)) if longer > 1.0 and original > 1 else 1.0
        short, long = (rope.numbers(name, count) for name in ("short_factor", "long_factor"))
        return {"short_factors": short, "long_factors": long, "attention_factor": attention}
