"""Orders of drafting and streaming on a GPU, played on paper: which one is worth building?

    python benchmarks/rounds_on_paper.py [--rounds 20000]

Three lanes are busy or idle: the GPU while it drafts, the link while weights stream, the GPU while
it verifies. A round of today drafts, then streams; the GPU verifies beside the stream. Schemes:

  today         draft, then stream
  ahead         while the link streams, draft on behind the likeliest leaf; if all of the tree up to
                it is accepted, and the exact model's own token is the one guessed, the next round
                has its draft already (ShadowSpec)
  interleaved   two sequences in turns: one drafts while the link streams for the other
  batched       two sequences draft together and share one stream, as the engine does
  hierarchical  levels cost 1 / 2.5: a small drafter proposes, the substitute checks several levels
                at once
  both          hierarchical and ahead

Each scheme has the depth that is best for it. Acceptance: the planner's published rates
(`PRIOR_RATES`). Machines: `MACHINES`, from published figures and the planner's estimate of an RTX
4090 behind 25 GB/s; no GPU was measured. The last line of stdout is one JSON object.
"""

import json
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass

import click

from subspec.artifacts.common.command import reported
from subspec.planner.solve.search import PRIOR_RATES

WIDTH = 4  # of the trees
DEPTHS = range(4, 129, 4)
CHEAPER = 2.5  # levels of a hierarchical draft
LEVELS_OF_TWO = 1.1  # seconds of a level for two sequences: it reads the same weights


@dataclass(frozen=True)
class Machine:
    """Seconds on a GPU. Interleaving and a batch need memory for a second cache as well."""

    level_seconds: float  # of a draft
    stream_seconds: float  # of all that streams in a round
    verify_seconds: float  # of the GPU, within the stream
    rest_seconds: float = 0.004  # acceptance, moving of keys and values


# 32B: a round drafts 0.96 s and streams 1.19 s at 13.5 tokens/s, 40 levels. 7B: 66 tokens/s from
# 6.3 GB a round, levels that read 4 GB of substitutes at 0.9 TB/s. The GPU's part of a
# verification: 64 rows at 120 Tflop/s, and residuals decoded at 150 G weights/s.
MACHINES = {
    "7B, 8 GB": Machine(level_seconds=0.0055, stream_seconds=0.25, verify_seconds=0.06),
    "32B, 24 GB": Machine(level_seconds=0.024, stream_seconds=1.19, verify_seconds=0.25),
}


@dataclass(frozen=True)
class Played:
    tokens_per_second: float  # of all sequences
    depth: int
    link_busy: float
    gpu_busy: float


Draw = Callable[[], float]  # from 0 to 1


def accepted_levels(depth: int, draw: Draw) -> int:
    rate = PRIOR_RATES[WIDTH]
    return next((level for level in range(depth) if draw() >= rate), depth)


def play_alone(machine: Machine, depth: int, num_rounds: int, draw: Draw, ahead: bool) -> Played:
    """One sequence. ahead: what of the stream's time the GPU does not verify in is drafted in."""
    idle = machine.stream_seconds - machine.verify_seconds
    possible = min(depth, int(idle / machine.level_seconds)) if ahead else 0
    tokens, seconds, gpu, ready = 0, 0.0, 0.0, 0
    for _ in range(num_rounds):
        drafting = (depth - ready) * machine.level_seconds
        seconds += drafting + machine.stream_seconds + machine.rest_seconds
        gpu += drafting + machine.verify_seconds + possible * machine.level_seconds
        accepted = accepted_levels(depth, draw)
        tokens += accepted + 1
        # A narrow draft guesses the exact model's own token as often as one token is accepted.
        hit = accepted == depth and draw() < PRIOR_RATES[1]
        ready = possible if hit else 0
    streamed = num_rounds * machine.stream_seconds
    return Played(tokens / seconds, depth, streamed / seconds, gpu / seconds)


def play_interleaved(machine: Machine, depth: int, num_rounds: int, draw: Draw) -> Played:
    """Two sequences: drafting and verifying share the GPU, the streams share the link."""
    drafting = depth * machine.level_seconds
    turn = max(machine.stream_seconds, drafting + machine.verify_seconds) + machine.rest_seconds
    tokens = sum(accepted_levels(depth, draw) + 1 for _ in range(num_rounds))
    seconds = turn * num_rounds
    busy = drafting + machine.verify_seconds
    return Played(tokens / seconds, depth, machine.stream_seconds / turn, busy / turn)


def play_batched(machine: Machine, depth: int, num_rounds: int, draw: Draw) -> Played:
    """Two sequences in one stream; the GPU verifies twice the rows in it."""
    drafting = depth * machine.level_seconds * LEVELS_OF_TWO
    verifying = 2 * machine.verify_seconds
    streaming = max(machine.stream_seconds, verifying)
    turn = drafting + streaming + machine.rest_seconds
    tokens = sum(accepted_levels(depth, draw) + 1 for _ in range(2 * num_rounds))
    seconds = turn * num_rounds
    return Played(tokens / seconds, depth, streaming / turn, (drafting + verifying) / turn)


def cheaper(machine: Machine) -> Machine:
    return Machine(
        machine.level_seconds / CHEAPER,
        machine.stream_seconds,
        machine.verify_seconds,
        machine.rest_seconds,
    )


def schemes(machine: Machine, num_rounds: int) -> dict[str, Callable[[int], Played]]:
    """By depth. Every scheme has the same luck."""

    def draw() -> Draw:
        return random.Random(0).random

    small = cheaper(machine)
    return {
        "today": lambda depth: play_alone(machine, depth, num_rounds, draw(), False),
        "ahead": lambda depth: play_alone(machine, depth, num_rounds, draw(), True),
        "hierarchical": lambda depth: play_alone(small, depth, num_rounds, draw(), False),
        "both": lambda depth: play_alone(small, depth, num_rounds, draw(), True),
        "interleaved": lambda depth: play_interleaved(machine, depth, num_rounds, draw()),
        "batched": lambda depth: play_batched(machine, depth, num_rounds, draw()),
    }


@click.command()
@click.option("--rounds", default=2000, show_default=True, type=click.IntRange(1, 1_000_000))
@reported
def main(rounds: int) -> None:
    """Play the rounds of each scheme on each machine."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, machine in MACHINES.items():
        found[name] = {}
        for scheme, play in schemes(machine, rounds).items():
            best = max(map(play, DEPTHS), key=lambda played: played.tokens_per_second)
            found[name][scheme] = vars(best)
            factor = best.tokens_per_second / found[name]["today"]["tokens_per_second"]
            print(
                f"{name:12} {scheme:13} {best.tokens_per_second:6.1f} tokens/s ({factor:.2f}x)  "
                f"depth {best.depth:3}  link {best.link_busy:4.0%}  GPU {best.gpu_busy:4.0%}",
                file=sys.stderr,
            )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
