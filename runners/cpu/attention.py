"""The default attention, whose decoding reads the paged cache where it lies if the compiled kernels are there."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch

from hal.contracts.attention import AttentionSpec
from hal.contracts.inputs import PagedModelInput
from hal.paged.attention import AttentionBatch, PagedAttention, PagedStep
from runners.cpu.compiled import Decode
from runners.cpu.linears import KINDS, Kernels, call_kernel


class CpuAttention(PagedAttention):
    """Without the kernels, decoding gathers the keys. If every query head has keys of its own, this uses PyTorch's
    slowest products in bfloat16 (of a matrix with one row), and Intel's extension is 1.4 to 2.5 times faster. It is not
    faster for groups, or in fp32.

    Attributes:
        reads: whether the kernels compute every layer's decoding.
    """

    def __init__(self, specs: Sequence[AttentionSpec], *, device: torch.device, dtype: torch.dtype,
                 kernels: Kernels | None = None) -> None:
        super().__init__(specs, device=device, dtype=dtype)
        self.kernels = Kernels() if kernels is None else kernels
        self.reads = bool(self.kernels) and dtype in KINDS and all(
            spec.value_dim == spec.head_dim and spec.head_dim % 32 == 0 and spec.softcap is None and spec.sinks is None
            and not spec.values_in_keys for spec in specs)
        self.head_maps = {spec.num_heads: torch.arange(spec.num_heads, dtype=torch.int32) for spec in specs
                          if self._single(spec)}
        self.ipex = ipex_attention() if self.head_maps and not self.reads else None

    def _single(self, spec: AttentionSpec) -> bool:
        return (self.dtype == torch.bfloat16 and spec.num_heads == spec.num_kv_heads and spec.softcap is None
                and spec.sinks is None)

    def begin(self, model_input: PagedModelInput, kv_caches: Sequence[torch.Tensor]) -> PagedStep:
        reads = self.reads and all(cache.dtype == self.dtype for cache in kv_caches)
        return (CpuStep if reads else PagedStep)(self, model_input, kv_caches)

    def decode(self, q: torch.Tensor, cache: torch.Tensor, batch: AttentionBatch, spec: AttentionSpec) -> torch.Tensor:
        if batch.blocks is None:
            return self.read(q, cache, batch, spec, None)
        if not self._single(spec) or cache.dtype == torch.uint8:
            return super().decode(q, cache, batch, spec)
        if self.ipex is not None and spec.window is None and spec.value_dim == spec.head_dim:
            assert batch.tables is not None
            # The extension needs contiguous rows. These rows are not contiguous if another sequence has more blocks.
            tables, out = batch.tables.contiguous(), torch.empty(q.shape, dtype=q.dtype)
            heads = self.head_maps[spec.num_heads]
            self.ipex.single_query_cached_kv_attention(out, q.contiguous(), cache[0], cache[1], heads, spec.scale,
                                                       tables, batch.lens, cache.shape[3], batch.context, None)
            return out
        # Two equal rows are faster than one.
        return super().decode(q.repeat_interleave(2, 1), cache, batch, spec)[:, :, 0]


    def read(self, q: torch.Tensor, cache: torch.Tensor, batch: AttentionBatch, spec: AttentionSpec,
             rotary: tuple[torch.Tensor, torch.Tensor] | None, slots: torch.Tensor | None = None) -> torch.Tensor:
        """`decode` by the kernels, or, with the table of one sequence, the attention of its last n tokens.

        Args:
            q: [n, heads, head_dim]. With `rotary`, the heads of k and of v follow those of q; neither is in the cache.
            rotary: what Ops.begin_rotary gives. slots: [n] int32, where k and v are written, with `rotary`. The first
                slot of a block clears the block.
        """
        assert batch.tables is not None and batch.lens is not None
        tables, lens, n = batch.tables, batch.lens, len(q)
        if q.stride(2) != 1 or q.stride(1) != spec.head_dim:
            q = q.contiguous()
        if tables.stride(1) != 1:
            tables = tables.contiguous()
        out = q.new_empty(n, spec.num_heads, spec.head_dim)
        step = self.native(q, out, cache, spec, rotary)
        step.tables, step.lens, step.n, step.table_stride = tables.data_ptr(), lens.data_ptr(), n, tables.stride(0)
        step.slots = None if slots is None else slots.data_ptr()
        call = self.kernels.functions.hal_decode if len(tables) == n else self.kernels.functions.hal_prompt
        if call_kernel(call, ctypes.addressof(step), torch.get_num_threads()):
            raise MemoryError("attention found no memory for its scores")
        return out

    def native(self, q: torch.Tensor, out: torch.Tensor, cache: torch.Tensor, spec: AttentionSpec,
               rotary: tuple[torch.Tensor, torch.Tensor] | None) -> Decode:
        """The structure of kernels.h, without what differs from step to step."""
        cos, sin = (None, None) if rotary is None else (x.data_ptr() for x in rotary)
        return Decode(q=q.data_ptr(), out=out.data_ptr(), keys=cache[0].data_ptr(), values=cache[1].data_ptr(), cos=cos,
                      sin=sin, heads=spec.num_heads, kv_heads=spec.num_kv_heads, head_dim=spec.head_dim,
                      block_size=cache.shape[3], q_stride=q.stride(0), window=spec.window or 0, scale=spec.scale,
                      kind=KINDS[q.dtype], level=self.kernels.level)


class CpuStep(PagedStep):
    """A step whose decoding sequences are one batch, of which nothing is gathered or masked. Nor is that of a prompt in
    bfloat16."""

    attention: CpuAttention

    def __init__(self, attention: CpuAttention, m: PagedModelInput, kv_caches: Sequence[torch.Tensor]) -> None:
        super().__init__(attention, m, kv_caches)
        count = m.num_decode_seqs
        self.alone = 0 < count == len(m.seq_lens) == len(m.input_ids) == self.real
        self.written = m.slot_mapping

    def _decode_batches(self, m: PagedModelInput, lens: list[int]) -> list[AttentionBatch]:
        if not lens:
            return []
        context = -(-max(lens) // self.block_size) * self.block_size
        return [AttentionBatch(0, len(lens), None, context, {}, m.block_tables[:len(lens)], m.seq_lens[:len(lens)])]

    def _prefill_batch(self, table: torch.Tensor, start: int, end: int, context: int) -> AttentionBatch:
        if self.attention.dtype != torch.bfloat16:
            return super()._prefill_batch(table, start, end, context)
        lens = torch.tensor([context], dtype=torch.int32)
        return AttentionBatch(start, end, None, context, {}, table[None], lens)

    def rotary(self, layer: int, qkv: torch.Tensor, begun: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor | None:
        """Ops.rotary_attention for a step of decoding sequences alone; None where the step is another one."""
        cache, spec = self.kv_caches[layer], self.attention.specs[layer]
        if not self.alone or begun[0].shape[-1] != spec.head_dim or begun[0].dtype != qkv.dtype:
            return None
        return self.attention.read(qkv, cache, self.batches[0], spec, begun, self.written).flatten(1)


def ipex_attention() -> Any:
    """Intel's PagedAttention, or None. With a torch that it was not built for, the extension fails in many ways."""
    if importlib.util.find_spec("intel_extension_for_pytorch") is None:
        return None
    try:
        from intel_extension_for_pytorch.llm.modules import PagedAttention as IntelAttention
    except Exception:
        return None
    return IntelAttention
