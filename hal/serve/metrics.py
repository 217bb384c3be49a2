"""Numbers of a server in the text format of Prometheus.

The names are those of vLLM with the prefix "hal:" instead of "vllm:", where they mean the same. A dashboard for vLLM
then needs another prefix alone.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence

from hal.engine.stats import Stats

_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Histogram:
    """Args: bounds: upper bounds of the buckets, in seconds, rising."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds, self.counts, self.total = bounds, [0] * (len(bounds) + 1), 0.0

    def observe(self, seconds: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, seconds)] += times
        self.total += seconds * times

    def lines(self, name: str) -> list[str]:
        below, found = 0, []
        for bound, count in zip((*self.bounds, "+Inf"), self.counts, strict=True):
            below += count
            found.append(f'{name}_bucket{{le="{bound}"}} {below}')
        return [*found, f"{name}_sum {self.total}", f"{name}_count {below}"]


class Metrics:
    """Attributes: finished: requests by finish_reason. refused: HTTP requests that got an error, by status."""

    def __init__(self) -> None:
        self.first_token, self.between_tokens = Histogram(_SECONDS), Histogram(_TOKEN_SECONDS)
        self.whole = Histogram(_SECONDS)
        self.prompt_tokens = self.generation_tokens = 0
        self.finished: Counter[str] = Counter()
        self.refused: Counter[int] = Counter()

    def text(self, stats: Stats, failures: int, healthy: bool) -> str:
        used = stats.used_blocks / max(stats.num_blocks, 1)
        lines = []
        for kind, name, help_text, value in (
                ("gauge", "num_requests_running", "requests in the running batch", stats.running),
                ("gauge", "num_requests_waiting", "requests that wait for a place in it", stats.waiting),
                ("gauge", "kv_cache_usage_perc", "share of KV blocks that requests hold; 1 is all", used),
                ("gauge", "healthy", "1 while the engine can run steps", int(healthy)),
                ("counter", "engine_failures", "failures after which new workers were started", failures),
                ("counter", "num_preemptions", "requests that lost their KV blocks for a while", stats.preemptions),
                ("counter", "prompt_tokens", "tokens of prompts of completed requests", self.prompt_tokens),
                ("counter", "generation_tokens", "tokens given to clients", self.generation_tokens),
                ("counter", "prefix_cache_hits", "prompt tokens found in the prefix cache", stats.cached_tokens),
                ("counter", "spec_decode_num_draft_tokens", "drafts that were verified", stats.drafted_tokens),
                ("counter", "spec_decode_num_accepted_tokens", "drafts that were right", stats.accepted_tokens)):
            name = f"hal:{name}_total" if kind == "counter" else f"hal:{name}"
            lines += [f"# HELP {name} {help_text}", f"# TYPE {name} {kind}", f"{name} {value}"]
        for name, label, counts in (("request_success", "finished_reason", self.finished),
                                    ("http_errors", "status", self.refused)):
            lines += [f"# TYPE hal:{name}_total counter",
                      *(f'hal:{name}_total{{{label}="{key}"}} {count}' for key, count in counts.items())]
        for name, histogram in (("time_to_first_token_seconds", self.first_token),
                                ("inter_token_latency_seconds", self.between_tokens),
                                ("e2e_request_latency_seconds", self.whole)):
            lines += [f"# TYPE hal:{name} histogram", *histogram.lines(f"hal:{name}")]
        return "\n".join(lines) + "\n"
