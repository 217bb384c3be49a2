from __future__ import annotations

import os
import sys
import time

import llama_cpp as cpp
import numpy as np
from gguf_file import KINDS, as_gguf

_STEP = 2048  # tokens of a call of llama_decode
_FILES = {"Q4_0": cpp.LLAMA_FTYPE_MOSTLY_Q4_0, "Q8_0": cpp.LLAMA_FTYPE_MOSTLY_Q8_0}
_FLASH = {"on": 1, "off": 0}  # LLAMA_FLASH_ATTN_TYPE_ENABLED, _DISABLED


def _file(model: str, kind: str, threads: int, scratch: str) -> str:
    """A GGUF file of the model. llama.cpp quantises it as for its users: of Q4_0 the head has 6 or 8 bits."""
    if model.endswith(".gguf") or kind not in _FILES:
        return as_gguf(model, kind, scratch)
    dense, file = as_gguf(model, "BF16", scratch), os.path.join(scratch, f"{kind}.gguf")
    params = cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = _FILES[kind], threads
    if cpp.llama_model_quantize(dense.encode(), file.encode(), params):
        sys.exit("llama.cpp cannot quantise the model")
    os.remove(dense)
    return file


class Peer:
    def __init__(self, model: str, dtype: str, threads: int, length: int, batch: int, bits: str | None,
                 scratch: str) -> None:
        kind = KINDS[bits or dtype]
        cpp.llama_backend_init()
        self._silence = cpp.llama_log_callback(lambda *_: None)
        cpp.llama_log_set(self._silence, None)
        self.model = cpp.llama_model_load_from_file(_file(model, kind, threads, scratch).encode(),
                                                    cpp.llama_model_default_params())
        if not self.model:
            sys.exit("llama.cpp cannot load the model")
        self.vocab = cpp.llama_vocab_n_tokens(cpp.llama_model_get_vocab(self.model))
        self.threads, self.length, self.most = threads, length, batch
        self.batch = cpp.llama_batch_init(_STEP, 0, 1)
        # The better of two settings, by a short run.
        spent = {}
        for name in _FLASH:
            self._open(name)
            self.run([[1] * 64], 2)
            spent[name] = self.run([[1] * 64], 16)[-1][0]
        best = min(spent, key=spent.__getitem__)
        self._open(best)
        self.about = f"llama.cpp of llama-cpp-python {cpp.__version__}, {kind}, flash attention {best}"

    def _open(self, flash: str) -> None:
        if hasattr(self, "context"):
            cpp.llama_free(self.context)
        params = cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = self.most * (-(-self.length // 256) * 256), self.most
        params.n_batch, params.n_threads, params.n_threads_batch = _STEP, self.threads, self.threads
        params.flash_attn_type = _FLASH[flash]
        self.context = cpp.llama_init_from_model(self.model, params)

    def run(self, prompts: list[list[int]], new_tokens: int) -> list[tuple[float, int, int]]:
        cpp.llama_memory_clear(cpp.llama_get_memory(self.context), True)
        start, events = time.perf_counter(), []
        places = [(i, at, token, at == len(prompt) - 1) for i, prompt in enumerate(prompts)
                  for at, token in enumerate(prompt)]
        for n in range(new_tokens):
            chosen: dict[int, int] = {}
            for begin in range(0, len(places), _STEP):
                chosen |= self._decode(places[begin:begin + _STEP])
                if n == 0:
                    events += [(time.perf_counter() - start, i, 1) for i in chosen
                               if i not in {e[1] for e in events}]
            if n:
                events += [(time.perf_counter() - start, i, 1) for i in chosen]
            places = [(i, len(prompts[i]) + n, token, True) for i, token in chosen.items()]
        return events

    def _decode(self, places: list[tuple[int, int, int, bool]]) -> dict[int, int]:
        """The most likely next token of each sequence that asks for it."""
        batch = self.batch
        batch.n_tokens = len(places)
        for k, (sequence, position, token, wanted) in enumerate(places):
            batch.token[k], batch.pos[k], batch.logits[k] = token, position, wanted
            batch.n_seq_id[k], batch.seq_id[k][0] = 1, sequence
        if cpp.llama_decode(self.context, batch):
            sys.exit("llama_decode failed")
        return {place[0]: int(np.ctypeslib.as_array(cpp.llama_get_logits_ith(self.context, k), (self.vocab,)).argmax())
                for k, place in enumerate(places) if place[3]}
