"""The requests of an engine, from the call that enqueues one until its last output is returned."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from hal.engine.request_state import RequestState
from hal.features.adapter import Adapter


class RequestTable:
    """A signal handler may raise between any two instructions. LLM.restart needs `live` alone to build the state of an
    engine again: a request is entered there before anything else knows it, and leaves it last.

    Attributes:
        live: requests that are not complete, by number.
        grown: requests of LLM.add_request whose outputs the next LLM.step returns, by number, in the order in which
            they grew last.
        cancelled: requests that end in the next step. A finalizer cancels a request in the middle of another call.
        next_id: the number of the next request.
        stop_texts, constrained: how many live requests have stop texts, and token masks.
    """

    def __init__(self) -> None:
        self.live: dict[int, RequestState] = {}
        self.grown: dict[int, RequestState] = {}
        self.cancelled: deque[RequestState] = deque()
        self.next_id = self.stop_texts = self.constrained = 0

    def take_number(self) -> int:
        number, self.next_id = self.next_id, self.next_id + 1
        return number

    def add(self, request: RequestState) -> None:
        seq = request.seq
        self.live[seq.request_id] = seq.owner = request
        self.stop_texts += bool(seq.params.stop)
        self.constrained += seq.constraint is not None

    def remove(self, request: RequestState) -> bool:
        """Remove a complete request. Returns whether it was live."""
        seq = request.seq
        seq.owner = None  # without this, the sequence and the request are a reference cycle
        if self.live.pop(seq.request_id, None) is None:
            return False
        self.stop_texts -= bool(seq.params.stop)
        self.constrained -= seq.constraint is not None
        return True

    def drop(self, request: RequestState) -> None:
        """Forget a request of an engine whose state is unknown; LLM.restart builds the state from the other requests.
        """
        self.live.pop(request.seq.request_id, None)
        request.output.finish_reason = request.output.finish_reason or "abort"
        request.seq.owner = None

    def drop_since(self, first: int) -> None:
        """Forget the requests of a call that ends by an exception, since nobody can ask for their outputs.

        Args:
            first: the number of the call's first request.
        """
        for number in [n for n in self.live if n >= first]:
            self.drop(self.live[number])

    def recount(self) -> None:
        """Drop the requests that are cancelled, and count the others, after an exception may have ended a change in the
        middle."""
        while self.cancelled:
            self.drop(self.cancelled.popleft())
        self.stop_texts = sum(bool(r.seq.params.stop) for r in self.live.values())
        self.constrained = sum(r.seq.constraint is not None for r in self.live.values())

    def keep(self, requests: Iterable[RequestState]) -> None:
        """Enter requests whose outputs grew into `grown`."""
        for request in requests:
            if request.polled:
                self.grown.pop(request.seq.request_id, None)
                self.grown[request.seq.request_id] = request

    @property
    def adapters(self) -> list[Adapter]:
        """The adapter of each live request that has one."""
        return [r.seq.adapter for r in self.live.values() if r.seq.adapter is not None]
