"""The engine's state of one unfinished request, and the log-probabilities of a step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from hal.contracts.outputs import SamplerOutput
from hal.engine.request_output import RequestOutput, TokenLogprob
from hal.engine.sequence import Sequence
from hal.engine.text import TextStream, TokenBytes
from hal.errors import NumericsError


@dataclass(slots=True)
class RequestState:
    """Attributes:
        polled: LLM.step returns the request's outputs; the outputs of other requests go to the call that made them.
        shown: the number of output tokens that `text` has taken.
    """

    seq: Sequence
    output: RequestOutput
    text: TextStream | None
    polled: bool
    shown: int = 0

    def write_text(self, *, show: bool = True) -> None:
        """Bring the text up to date with the tokens. A stop text cuts the text, not the tokens.

        Args:
            show: write output.text too. The text of a complete output is written in any case.
        """
        output, done = self.output, self.seq.finish_reason is not None
        if self.text is None:
            return
        start, self.shown = self.shown, len(output.token_ids)
        tokens = output.token_ids[start:]
        if done and tokens and self.seq.finish_reason == "stop" and not (
                self.text.stopped or self.seq.params.include_stop_str_in_output):
            tokens = tokens[:-1]  # the token that ended the output is not shown
        if len(tokens) > 1 and self.seq.params.stop:
            self._append_until_stopped(tokens, start, done)
        elif tokens or done:
            self.text.append(tokens, last=done)
        if show or done:
            output.text = self.text.text if done else self.text.safe

    def _append_until_stopped(self, tokens: list[int], start: int, done: bool) -> None:
        """Append several tokens, the output's from `start` on, to the text. Where a stop text ends within them, the
        later tokens are removed: the output is then the same as if each step had given one token."""
        output, text = self.output, self.text
        assert text is not None
        for end, token in enumerate(tokens, start + 1):
            text.append([token], last=done and end == start + len(tokens))
            if text.stopped:
                self.shown = end
                del output.token_ids[end:]
                if output.logprobs is not None:
                    del output.logprobs[end:]
                break

    def stop_reason(self) -> str | int | None:
        """See RequestOutput. The name of a special token may be a stop text, and ends the output by its id."""
        params, tokens = self.seq.params, self.output.token_ids
        if self.text is not None and self.text.stopped:
            return self.text.stop
        if self.seq.finish_reason != "stop" or not tokens or tokens[-1] not in params.stop_token_ids:
            return None
        hidden = {} if self.text is None or not params.stop else TokenBytes.of(self.text.tokenizer).hidden
        return next((name for name in params.stop if hidden.get(name) == tokens[-1]), tokens[-1])

    def numerics_error(self, dtype: str) -> NumericsError:
        """Why the sequence ended with "error", of a model that computes in `dtype`."""
        number, position = self.seq.request_id, len(self.output.token_ids)
        return NumericsError(
            f"request {number} ended before output token {position}: the model's logits have no finite maximum",
            request_id=number, position=position, got=f"NaN or infinity, computed in {dtype}", expected="finite logits",
            hint="check the checkpoint, whose weights may be damaged; where they are sound, the model overflows this "
                 "dtype: use " + ("dtype='float32'" if dtype == "bfloat16" else "dtype='bfloat16'" if dtype == "float32"
                                  else "dtype='bfloat16' or 'float32'"))

    def recover(self, text: TextStream | None) -> None:
        """Restore all state that follows from the tokens, after an exception has left it half changed. The sequence is
        then a waiting one. A token whose logprobs are missing is removed: it will be sampled again.

        Args:
            text: a new TextStream for this request.
        """
        seq, output = self.seq, self.output
        if output.logprobs is not None:
            count = min(len(output.logprobs), len(output.token_ids))
            del output.logprobs[count:], output.token_ids[count:]
        if seq.finish_reason != "abort":  # any other reason follows from the tokens
            seq.finish_reason = output.finish_reason = output.error = None
        seq.drafts, seq.propose = [], None  # the proposer may have seen tokens that are removed
        seq.distrusted = False  # the cache that held its prefix is gone
        seq.row, seq.num_computed, seq.blocks, seq.host_blocks, seq.hashes, seq.owner = -1, 0, [], [], [], self
        self.text, self.shown = text, 0


@dataclass(frozen=True, slots=True)
class Logprobs:
    """A step's logprobs on the host, by row; `of` gives one row's."""

    chosen: np.ndarray
    ranks: np.ndarray
    top_ids: np.ndarray
    top: np.ndarray

    @classmethod
    def sampled(cls, output: SamplerOutput) -> Logprobs | None:
        return cls._make(output.logprobs, output.ranks, output.top_ids, output.top_logprobs)

    @classmethod
    def prompt(cls, output: SamplerOutput) -> Logprobs | None:
        return cls._make(output.prompt_logprobs, output.prompt_ranks, output.prompt_top_ids, output.prompt_top_logprobs)

    @classmethod
    def _make(cls, chosen: torch.Tensor | None, ranks: torch.Tensor | None, ids: torch.Tensor | None,
              top: torch.Tensor | None) -> Logprobs | None:
        if chosen is None or ranks is None:
            return None
        if ids is None or top is None:
            none = np.zeros((len(chosen), 0), np.int32)
            return cls(chosen.numpy(), ranks.numpy(), none, none)
        return cls(chosen.numpy(), ranks.numpy(), ids.numpy(), top.numpy())

    def of(self, row: int, token: int, count: int) -> TokenLogprob:
        """The logprobs of a row's token. `count` is the number that this request asked for; a step reports the largest
        number that any request asked for."""
        ids, values = self.top_ids[row, :count].tolist(), self.top[row, :count].tolist()
        return TokenLogprob(token, float(self.chosen[row]), int(self.ranks[row]), list(zip(ids, values, strict=True)))
