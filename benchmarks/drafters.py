"""Who should propose tokens? One artifact, every drafter, prompts in turns.

    python benchmarks/drafters.py ARTIFACT [--drafters NAMES] [--prompts 6] [--tokens 96]

An answer has the same tokens whoever drafts, which is checked. Each drafter answers each prompt,
one after another, and who begins alternates, so that slow minutes of the machine favour nobody.
Kinds: code and chat from prompts.jsonl, which no plan is rehearsed on, and copying, where the
answer is to repeat a text of the prompt with a change. Drafters that the plan has no room for are
left out.

Each line says tokens/s over all tokens of a kind, a round's tokens, and milliseconds of a round's
draft and verification. The last line of stdout is one JSON object.
"""

import json
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

import click

from subspec.artifacts.common.command import reported, size_option
from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.format.store import Artifact, open_artifact
from subspec.artifacts.plan import DrafterName, method_of
from subspec.planner.rehearse.calibration import Message, Sample, read_samples, sample_ids
from subspec.runtime.engine import Engine, OpenOptions
from subspec.runtime.open_model import check_drafter, check_head
from subspec.runtime.sequence import GenerationParams, Stats
from subspec.runtime.text.tokenizer import load_tokenizer

KINDS = {"code": ("code",), "chat": ("question", "turns")}  # of prompts.jsonl
PROMPTS = Path(__file__).with_name("prompts.jsonl")
MIN_COPIED = 200  # characters
CHANGES = (
    "Repeat the following text word for word.",
    "Repeat the following text, but write every number as digits.",
    "Correct the spelling of the following text and repeat all of it.",
)


@dataclass(frozen=True)
class Row:
    kind: str
    drafter: str
    tokens_per_second: float
    tokens_per_round: float
    draft_milliseconds: float  # of a round
    verify_milliseconds: float


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--drafters", default=",".join(get_args(DrafterName)), show_default=True)
@click.option("--prompts", default=6, show_default=True, help="Of each kind.")
@click.option("--tokens", default=96, show_default=True, help="Longest answer.")
@click.option("--link-bandwidth", callback=size_option, metavar="SIZE")
@reported
def main(
    artifact: Path, drafters: str, prompts: int, tokens: int, link_bandwidth: int | None
) -> None:
    """Speed of every drafter over ARTIFACT."""
    made = open_artifact(artifact)
    names = [one for one in get_args(DrafterName) if one in drafters.split(",")]
    rows = []
    with ExitStack() as stack:
        engines = dict[str, Engine]()
        for name in names:
            if has_room(made, name):
                how = OpenOptions(drafter=name, link_bandwidth=link_bandwidth)
                engines[name] = stack.enter_context(Engine.open(made, how))
        for kind, given in by_kind(made, prompts).items():
            for engine in engines.values():
                answer(engine, given[0], 2)  # weights are checked when they stream first
            rows += rows_of(kind, in_turns(engines, given, tokens))
    for row in rows:
        say(
            f"{row.kind:8} {row.drafter:23} {row.tokens_per_second:7.2f} tokens/s, "
            f"{row.tokens_per_round:5.2f} a round: draft {row.draft_milliseconds:6.1f} ms, "
            f"verify {row.verify_milliseconds:6.1f} ms"
        )
    print(json.dumps({"schema": "subspec.drafters/1", "rows": [asdict(row) for row in rows]}))


def has_room(artifact: Artifact, name: DrafterName) -> bool:
    try:
        check_drafter(artifact, name)
        placement = artifact.plan.placement(method_of(name))
        check_head(artifact.spec, placement, name)
    except SubspecError as error:
        say(f"without {name}: {error.message}")
        return False
    return True


def by_kind(artifact: Artifact, count: int) -> dict[str, list[list[int]]]:
    """Token ids of prompts, by kind."""
    text, samples = load_tokenizer(artifact.path / "tokenizer"), read_samples(PROMPTS)
    longest = artifact.plan.context // 2
    found = {kind: [one for one in samples if one.kind in some] for kind, some in KINDS.items()}
    texts = [one for sample in samples if len(one := last_words(sample)) > MIN_COPIED]
    found["copying"] = [
        Sample("copying", (Message("user", f"{CHANGES[n % len(CHANGES)]}\n\n{one}"),))
        for n, one in enumerate(texts)
    ]
    return {
        kind: [sample_ids(text, one)[-longest:] for one in some[:count]]
        for kind, some in found.items()
    }


def last_words(sample: Sample) -> str:
    return sample.prompt if isinstance(sample.prompt, str) else sample.prompt[-1].content


def in_turns(
    engines: dict[str, Engine], prompts: list[list[int]], num_tokens: int
) -> dict[str, list[Stats]]:
    """Raises SubspecError(UNEXPECTED) if two drafters give different tokens."""
    found: dict[str, list[Stats]] = {name: [] for name in engines}
    for turn, prompt in enumerate(prompts):
        said = dict[str, list[int]]()
        for name in engines if turn % 2 else reversed(engines):
            said[name], stats = answer(engines[name], prompt, num_tokens)
            found[name].append(stats)
        if any(tokens != next(iter(said.values())) for tokens in said.values()):
            raise SubspecError(
                Exit.UNEXPECTED, f"drafters differ in what prompt {turn} is answered"
            )
    return found


def answer(engine: Engine, prompt: list[int], num_tokens: int) -> tuple[list[int], Stats]:
    ends = frozenset(engine.artifact.spec.eos_token_ids)
    with engine.new_sequence() as sequence:
        params = GenerationParams(num_tokens, stop_token_ids=ends)
        tokens = [one for some in sequence.generate(prompt, params) for one in some]
        return tokens, sequence.stats


def rows_of(kind: str, answers: dict[str, list[Stats]]) -> list[Row]:
    found = []
    for name, some in answers.items():
        tokens = sum(stats.generated_tokens - 1 for stats in some)
        rounds = max(1, sum(len(stats.accepted) for stats in some))
        draft, verify = (
            sum(seconds)
            for seconds in zip(
                *((stats.draft_seconds, stats.verify_seconds) for stats in some), strict=True
            )
        )
        found.append(
            Row(kind, name, tokens / (draft + verify), tokens / rounds,
                1e3 * draft / rounds, 1e3 * verify / rounds)
        )  # fmt: skip
    return found


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
