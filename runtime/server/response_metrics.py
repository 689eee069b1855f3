"""Statistics of an answer as OpenAI's usage, vLLM's metrics and llama.cpp's timings."""

from typing import Any

from subspec.runtime.lossy import verification_json
from subspec.runtime.server.generation import Outcome
from subspec.runtime.server.model_info import ModelInfo


def usage(
    prompt_tokens: int,
    cached_tokens: int,
    completion_tokens: int,
    accepted_tokens: int,
    reasoning_tokens: int | None = None,
) -> dict[str, Any]:
    """OpenAI's usage. accepted_tokens: accepted draft tokens in the completion."""
    details = {"accepted_prediction_tokens": accepted_tokens}
    if reasoning_tokens is not None:
        details = {"reasoning_tokens": reasoning_tokens, **details}
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
        "completion_tokens_details": details,
    }


def metrics(outcome: Outcome, model: ModelInfo) -> dict[str, Any]:
    """vLLM's per-request metrics, with our own under "subspec"."""
    stats = outcome.stats
    num_after_first = stats.generated_tokens - 1
    mean = 1000 * stats.decode_seconds / num_after_first if num_after_first > 0 else None
    first = outcome.queue_seconds + stats.time_to_first_token_seconds
    return {
        "time_to_first_token_ms": 1000 * first,
        "generation_time_ms": 1000 * outcome.generation_seconds,
        "queue_time_ms": 1000 * outcome.queue_seconds,
        "mean_itl_ms": mean,
        "tokens_per_second": stats.decode_tokens_per_second,
        "speculative_decoding": speculative_decoding(outcome, model),
        "subspec": {
            "method": stats.method,
            "predicted_tokens_per_second": outcome.predicted_tokens_per_second,
            "tree_width": model.width,
            "draft_ms": 1000 * stats.draft_seconds,
            "verify_ms": 1000 * stats.verify_seconds,
            "stream_wait_ms": 1000 * stats.stream_wait_seconds,
            "streamed_bytes": stats.streamed_bytes,
            **verification_json(outcome.lossy),
            "lossy_tokens": stats.lossy_tokens,
        },
    }


def speculative_decoding(outcome: Outcome, model: ModelInfo) -> dict[str, Any] | None:
    """vLLM's speculative decoding metrics; None for plain decoding. AIPerf requires integers,
    sum(histogram) == steps, sum(j * histogram[j]) == accepted. As in vLLM, rounds without a draft
    do not count."""
    if outcome.stats.method == "plain":
        return None
    rounds = draft_rounds(outcome)
    histogram = [0] * (1 + max(model.depth, *outcome.stats.accepted, 0))
    by_length: dict[str, list[int]] = {}
    for levels, accepted in rounds:
        histogram[accepted] += 1
        by_length.setdefault(str(levels), [0] * (levels + 1))[accepted] += 1
    num_accepted = sum(accepted for _, accepted in rounds)
    num_drafted = outcome.stats.drafted_tokens
    return {
        "mean_acceptance_length": 1 + num_accepted / len(rounds) if rounds else 1.0,
        "draft_acceptance_rate": num_accepted / num_drafted if num_drafted else 0.0,
        "acceptance_histogram": histogram,
        "acceptance_histogram_by_draft_length": by_length,
        "num_spec_steps": len(rounds),
        "num_accepted_draft_tokens": num_accepted,
        "num_draft_tokens": num_drafted,
        "num_spec_tokens": model.depth,
    }


def draft_rounds(outcome: Outcome) -> list[tuple[int, int]]:
    """(drafted levels, accepted levels) of each round with a draft."""
    stats = outcome.stats
    return [pair for pair in zip(stats.drafted, stats.accepted, strict=True) if pair[0]]


def timings(outcome: Outcome, model: ModelInfo) -> dict[str, Any]:
    """llama.cpp's timings."""
    stats = outcome.stats
    read = stats.prompt_tokens - stats.cached_tokens
    prompt_seconds, seconds = stats.time_to_first_token_seconds, stats.decode_seconds
    found: dict[str, Any] = {
        "cache_n": stats.cached_tokens,
        "prompt_n": read,
        "prompt_ms": 1000 * prompt_seconds,
        "prompt_per_token_ms": 1000 * prompt_seconds / read if read else 0.0,
        "prompt_per_second": read / prompt_seconds if prompt_seconds else 0.0,
        "predicted_n": stats.generated_tokens,
        "predicted_ms": 1000 * seconds,
        "predicted_per_token_ms": 1000 * seconds / max(1, stats.generated_tokens),
        "predicted_per_second": stats.decode_tokens_per_second,
    }
    if stats.method != "plain":
        found["draft_n"] = stats.drafted_tokens
        found["draft_n_accepted"] = sum(accepted for _, accepted in draft_rounds(outcome))
    return found
