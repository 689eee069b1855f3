"""A plan and the records of its runs, made by hand; no torch, no weights."""

from dataclasses import replace
from typing import Any

from subspec.artifacts.acceptance import Acceptance, Curve
from subspec.artifacts.plan import Ledger, Placement, Plan, Prediction, Tree
from subspec.artifacts.runs import Run, plan_digest

MACHINE = "cpu: a toy, 2 cpus"
PLACEMENT = Placement((), (), 4096, 2, Ledger(staging=8192))
SAID = Prediction(
    tokens_per_second=20.0,
    time_to_first_token_seconds=0.5,
    fast_peak_bytes=8_000_000,
    tokens_per_round=2.5,
    levels_per_round=3.0,
    draft_seconds=0.05,
    verify_seconds=0.075,
    stream_seconds=0.05,
    compute_seconds=0.02,
    decode_seconds=0.0,
    streamed_bytes=5_000_000,  # 100 MB a second
)
PLAN = Plan(
    device="cpu",
    machine=MACHINE,
    budget_bytes=9_000_000,
    context=256,
    num_sequences=1,
    method="substitute",
    tree=Tree(2, 3),
    verify_widths=(8,),
    prompt_widths=(8,),
    num_threads=1,
    int4_kernel="aten",
    prefill_chunk_tokens=64,
    placements={"substitute": PLACEMENT, "plain": PLACEMENT},
    residuals=(),
    predicted={"substitute": SAID, "plain": replace(SAID, tokens_per_second=8.0)},
    acceptance=Acceptance(
        (Curve(2, 0.0, "code", 8, 980, (980, 980, 980), (784, 588, 294), 0.25),), measured=True
    ),
)
RUN = Run(
    time="2026-11-20T16:45:00Z",
    plan=plan_digest(PLAN),
    machine=MACHINE,
    method="substitute",
    padded=True,
    link_bandwidth=None,
    greedy=True,
    prompt_tokens=24,
    cached_tokens=0,
    generated_tokens=11,
    includes_digest_check=False,
    drafted=(4, 4, 4),
    accepted=(1, 1, 0, 2),
    draft_seconds=0.25,
    verify_seconds=0.375,
    stream_wait_seconds=0.125,
    first_token_seconds=0.5,
    streamed_bytes=20_000_000,
    fast_peak_bytes=7_500_000,
    predicted_tokens_per_second=20.0,
    predicted_first_token_seconds=0.5,
    predicted_peak_bytes=8_000_000,
)


def make_run(**changes: Any) -> Run:
    """4 rounds, 16 tokens/s."""
    return replace(RUN, **changes)
