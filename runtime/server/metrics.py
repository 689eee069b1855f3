"""Prometheus: vLLM's names with the prefix subspec:, so that its dashboards need one change."""

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

# Seconds. A prompt of a model that streams may take minutes.
LATENCIES = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640, 1280)
PER_TOKEN = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5, 5, 10)
ACCEPTED = (0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32)


class Metrics:
    """Counted in a registry of its own. depth: of the draft tree."""

    def __init__(self, model: str, depth: int, predicted_tokens_per_second: float | None) -> None:
        self.registry = CollectorRegistry()
        self._depth, self._model = depth, model
        self._requests = self._counter(
            "request_success", "Answers by how they ended.", "finished_reason"
        )
        self._rejected = self._counter("rejected", "Requests that were not taken.", "reason")
        self._responses = self._counter("http_responses", "HTTP responses.", "status")
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts.")
        self._cached = self._counter("prompt_tokens_cached", "Of them, that were in the cache.")
        self._generated = self._counter("generation_tokens", "Tokens of answers.")
        self._drafts = self._counter("spec_decode_num_drafts", "Rounds that drafted.")
        self._drafted = self._counter("spec_decode_num_draft_tokens", "Drafted tokens.")
        self._accepted = self._counter(
            "spec_decode_num_accepted_tokens", "Drafted tokens that answers have."
        )
        self._accepted_at = self._counter(
            "spec_decode_num_accepted_tokens_per_pos", "Rounds that accepted a level.", "position"
        )
        for level in range(depth):
            self._accepted_at.labels(model, str(level))
        self._streamed = self._counter(
            "streamed_bytes", "Over the link to fast memory while decoding."
        )
        self._waited = self._counter("stream_wait_seconds", "Waiting for streamed weights.")
        self._first = self._histogram(
            "time_to_first_token_seconds", "From the request to its first token.", LATENCIES
        )
        self._per_token = self._histogram(
            "time_per_output_token_seconds", "After the first token, mean of an answer.", PER_TOKEN
        )
        self._whole = self._histogram(
            "e2e_request_latency_seconds", "From the request to its last token.", LATENCIES
        )
        self._queued = self._histogram(
            "request_queue_time_seconds", "From the request to its sequence.", LATENCIES
        )
        self._length = self._histogram(
            "spec_decode_accepted_per_draft",
            "Accepted tokens per round, mean of an answer.",
            ACCEPTED,
        )
        predicted = self._gauge("predicted_tokens_per_second", "Of one answer alone, by the plan.")
        predicted.labels(model).set(predicted_tokens_per_second or float("nan"))
        self._speed = self._gauge("last_tokens_per_second", "Of the newest answer.")

    def watch(
        self,
        num_running: Callable[[], int],
        num_waiting: Callable[[], int],
        peak_bytes: Callable[[], int],
    ) -> None:
        """From now on the gauges ask these."""
        waiting = "Requests that wait for a sequence."
        for name, said, value in (
            ("num_requests_running", "Requests that are answered.", num_running),
            ("num_requests_waiting", waiting, num_waiting),
            ("queue_depth", waiting, num_waiting),
            ("fast_memory_peak_bytes", "Of fast memory, measured.", peak_bytes),
        ):
            self._gauge(name, said).labels(self._model).set_function(value)

    def rejected(self, reason: str) -> None:
        self._rejected.labels(self._model, reason).inc()

    def responded(self, status: int) -> None:
        self._responses.labels(self._model, str(status)).inc()

    def ended(self, reason: str) -> None:
        self._requests.labels(self._model, reason).inc()

    def answered(self, outcome: Outcome, first_seconds: float, seconds: float) -> None:
        """An answer came to its end after `seconds`, its first token after `first_seconds`."""
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
        """In Prometheus' text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, said: str, *labels: str) -> Counter:
        return Counter(f"subspec:{name}", said, ("model_name", *labels), registry=self.registry)

    def _gauge(self, name: str, said: str) -> Gauge:
        return Gauge(f"subspec:{name}", said, ("model_name",), registry=self.registry)

    def _histogram(self, name: str, said: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(
            f"subspec:{name}", said, ("model_name",), registry=self.registry, buckets=buckets
        )
