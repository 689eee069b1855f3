"""Prometheus metrics with vLLM's names and the prefix subspec:, so that its dashboards need one
change."""

from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

from subspec.runtime.server.generation import Outcome
from subspec.runtime.server.response_metrics import draft_rounds

# Seconds. With streamed weights a prompt may take minutes.
LATENCIES = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640, 1280)
PER_TOKEN = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5, 5, 10)
ACCEPTED = (0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32)


class Metrics:
    """Metrics in a registry of their own. depth: of the draft tree."""

    def __init__(self, model: str, depth: int, predicted_tokens_per_second: float | None) -> None:
        self.registry = CollectorRegistry()
        self._depth, self._model = depth, model
        self._requests = self._counter(
            "request_success", "Answers by finish reason.", "finished_reason"
        )
        self._rejected = self._counter("rejected", "Refused requests.", "reason")
        self._responses = self._counter("http_responses", "HTTP responses.", "status")
        self._prompt = self._counter("prompt_tokens", "Prompt tokens.")
        self._cached = self._counter(
            "prompt_tokens_cached", "Prompt tokens served from the KV cache."
        )
        self._generated = self._counter("generation_tokens", "Generated tokens.")
        self._drafts = self._counter("spec_decode_num_drafts", "Rounds with a draft.")
        self._drafted = self._counter("spec_decode_num_draft_tokens", "Drafted tokens.")
        self._accepted = self._counter("spec_decode_num_accepted_tokens", "Accepted draft tokens.")
        self._accepted_at = self._counter(
            "spec_decode_num_accepted_tokens_per_pos",
            "Rounds that accepted a token at this level.",
            "position",
        )
        for level in range(depth):
            self._accepted_at.labels(model, str(level))
        self._streamed = self._counter("streamed_bytes", "Weight bytes streamed while decoding.")
        self._waited = self._counter(
            "stream_wait_seconds", "Seconds spent waiting for streamed weights."
        )
        self._first = self._histogram(
            "time_to_first_token_seconds", "Seconds from the request to its first token.", LATENCIES
        )
        self._per_token = self._histogram(
            "time_per_output_token_seconds", "Mean seconds per token after the first.", PER_TOKEN
        )
        self._whole = self._histogram(
            "e2e_request_latency_seconds", "Seconds from the request to its last token.", LATENCIES
        )
        self._queued = self._histogram(
            "request_queue_time_seconds", "Seconds in the queue.", LATENCIES
        )
        self._length = self._histogram(
            "spec_decode_accepted_per_draft",
            "Mean accepted tokens per round of an answer.",
            ACCEPTED,
        )
        predicted = self._gauge(
            "predicted_tokens_per_second", "Predicted tokens/s of a single answer."
        )
        predicted.labels(model).set(predicted_tokens_per_second or float("nan"))
        self._speed = self._gauge("last_tokens_per_second", "Tokens/s of the latest answer.")

    def watch(
        self,
        num_running: Callable[[], int],
        num_waiting: Callable[[], int],
        peak_bytes: Callable[[], int],
    ) -> None:
        """Read the gauges from these functions."""
        waiting = "Waiting requests."
        for name, said, value in (
            ("num_requests_running", "Running requests.", num_running),
            ("num_requests_waiting", waiting, num_waiting),
            ("queue_depth", waiting, num_waiting),
            ("fast_memory_peak_bytes", "Measured peak of fast memory.", peak_bytes),
        ):
            self._gauge(name, said).labels(self._model).set_function(value)

    def rejected(self, reason: str) -> None:
        self._rejected.labels(self._model, reason).inc()

    def responded(self, status: int) -> None:
        self._responses.labels(self._model, str(status)).inc()

    def ended(self, reason: str) -> None:
        self._requests.labels(self._model, reason).inc()

    def answered(self, outcome: Outcome, first_seconds: float, seconds: float) -> None:
        """Record a complete answer that took `seconds`, `first_seconds` of them to its first
        token."""
        stats, model = outcome.stats, self._model
        self._prompt.labels(model).inc(stats.prompt_tokens)
        self._cached.labels(model).inc(stats.cached_tokens)
        self._generated.labels(model).inc(stats.generated_tokens)
        self._streamed.labels(model).inc(stats.streamed_bytes)
        self._waited.labels(model).inc(stats.stream_wait_seconds)
        self._first.labels(model).observe(first_seconds)
        self._whole.labels(model).observe(seconds)
        self._queued.labels(model).observe(outcome.queue_seconds)
        if stats.generated_tokens > 1:
            per_token = stats.decode_seconds / (stats.generated_tokens - 1)
            self._per_token.labels(model).observe(per_token)
            self._speed.labels(model).set(stats.decode_tokens_per_second)
        rounds = draft_rounds(outcome)
        if stats.method == "plain" or not rounds:
            return
        num_accepted = sum(accepted for _, accepted in rounds)
        self._drafts.labels(model).inc(len(rounds))
        self._drafted.labels(model).inc(stats.drafted_tokens)
        self._accepted.labels(model).inc(num_accepted)
        self._length.labels(model).observe(num_accepted / len(rounds))
        for level in range(max(self._depth, *stats.accepted)):
            count = sum(accepted > level for _, accepted in rounds)
            self._accepted_at.labels(model, str(level)).inc(count)

    def text(self) -> bytes:
        """Return the metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, said: str, *labels: str) -> Counter:
        return Counter(f"subspec:{name}", said, ("model_name", *labels), registry=self.registry)

    def _gauge(self, name: str, said: str) -> Gauge:
        return Gauge(f"subspec:{name}", said, ("model_name",), registry=self.registry)

    def _histogram(self, name: str, said: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(
            f"subspec:{name}", said, ("model_name",), registry=self.registry, buckets=buckets
        )
