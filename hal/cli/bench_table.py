"""The table of hal bench: what a row holds, how it follows from the measured times, and how it is printed."""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hal.config import EngineConfig
from hal.models import floors

if TYPE_CHECKING:
    from hal.cli.measure import Cell
    from hal.model_config import ModelConfig


@dataclass(frozen=True, slots=True)
class Row:
    """Medians for one batch size. Times in seconds; bandwidth in bytes/s a rank.

    Attributes:
        prompt_len, new_tokens, repeat: of this row, where --max-seconds left less than was asked for.
        together: all requests of the batch decoded at once.
        peer_prefill_tokens_per_s, peer_decode_tokens_per_s: of --peer.
        prefill_limit, decode_limit: "memory", "arithmetic" or "neither" (see Device.limit), with the share reached.
    """

    batch_size: int
    prompt_len: int
    new_tokens: int
    repeat: int
    together: bool
    ttft: float
    tpot: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    achieved_bandwidth: float
    share_of_measured: float
    prefill_limit: str
    prefill_share: float
    decode_limit: str
    decode_share: float
    peer_prefill_tokens_per_s: float | None = None
    peer_decode_tokens_per_s: float | None = None


HEAD = (("batch |  TTFT ms |  TPOT ms | prefill tok/s | decode tok/s |   GB/s |  prefill limit  |  decode limit  ",
          " | peer prefill  ratio | peer decode  ratio"),
         ("----- | -------- | -------- | ------------- | ------------ | ------ | --------------- | ---------------",
          " | ------------------- | ------------------"))


def row_of(config: EngineConfig, model: ModelConfig, dtype: str, device: floors.Device, cell: Cell) -> Row:
    """The row of a cell's times: those of this engine, and behind them those of the peer, if one is timed too."""
    runs, tokens = [sides[0] for sides in cell.rounds], cell.batch * cell.prompt_len
    (prefill, step), *peers = ([statistics.median(getattr(run, name) for run in of_side) for name in (
        "prefill", "decode_step")] for of_side in zip(*cell.rounds, strict=True))
    ranks, context = config.tp * config.pp, cell.prompt_len + cell.new_tokens // 2
    moved = floors.bytes_per_step(model, dtype, config.kv_dtype, cell.batch, context) / ranks
    read = floors.bytes_per_step(model, dtype, config.kv_dtype, cell.batch, cell.prompt_len, new=cell.prompt_len)
    steps = -(-tokens // config.max_num_batched_tokens)
    limits = (device.limit(prefill, read * steps / ranks,
                           floors.operations(model, cell.batch, cell.prompt_len, new=cell.prompt_len) / ranks),
              device.limit(step, moved, floors.operations(model, cell.batch, context) / ranks))
    return Row(cell.batch, cell.prompt_len, cell.new_tokens, len(runs), all(r.together for r in runs),
               statistics.median(r.ttft for r in runs), statistics.median(r.tpot for r in runs),
               tokens / prefill, cell.batch / step, moved / step, moved / step / device.bandwidth,
               *limits[0], *limits[1], *(done / seconds for other in peers for done, seconds in zip(
                   (tokens, cell.batch), other, strict=True)))


def line(row: Row, args: argparse.Namespace) -> str:
    """A line of the table, and below it how the row differs from what was asked for."""
    shown = (f"{row.batch_size:>5} | {row.ttft * 1e3:8.1f} | {row.tpot * 1e3:8.2f} | "
             f"{row.prefill_tokens_per_s:13.1f} | {row.decode_tokens_per_s:12.1f} | "
             f"{row.achieved_bandwidth / 1e9:6.1f} | {row.prefill_limit:>10} {row.prefill_share:4.0%} | "
             f"{row.decode_limit:>10} {row.decode_share:4.0%}")
    prefill, decode = row.peer_prefill_tokens_per_s, row.peer_decode_tokens_per_s
    if prefill and decode:
        shown += (f" | {prefill:12.1f} {row.prefill_tokens_per_s / prefill:6.2f}"
                  f" | {decode:11.1f} {row.decode_tokens_per_s / decode:6.2f}")
    if not row.together:
        shown += "\n      | not all requests decoded at once: the KV cache or a step of the engine holds fewer"
    if (row.prompt_len, row.new_tokens, row.repeat) != (args.prompt_len, args.new_tokens, args.repeat):
        shown += (f"\n      | for --max-seconds {args.max_seconds:g}: prompt {row.prompt_len}, {row.new_tokens} new "
                  f"tokens, median of {row.repeat}")
    return shown
