"""`subspec-bench speed`: rows as in llama-bench, for prompts (pp) and generation (tg)."""

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass
from pathlib import Path

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.runtime.bench.records import (
    SAME_IN_A_RUN,
    SpeedRow,
    append_row,
    rows_to_resume,
    setting_of,
)
from subspec.runtime.bench.variants import (
    Source,
    Variant,
    Way,
    measurable,
    opened_engine,
    plans,
)
from subspec.runtime.engine import Engine
from subspec.runtime.sequence import GenerationParams, Sequence, Stats
from subspec.runtime.text.tokenizer import load_tokenizer

# Filler text, repeated: neither trivial nor impossible to draft.
TEXT = (
    "The lighthouse keeper wrote down every ship that passed, its flag, its sails and the weather. "
    "In forty years he filled ninety books. When the light became electric, nobody asked for them; "
    "a teacher found them in a shed, and her pupils drew the first map of the winds of that coast. "
    "Each of them took one year, counted the storms in it, and wrote what the keeper had not seen."
    "\n\n"
)


@dataclass(frozen=True)
class Tests:
    """Tests to run: prompt lengths, generated tokens, and tokens already in the cache."""

    prompt_tokens: tuple[int, ...] = (128,)
    generated_tokens: tuple[int, ...] = (64,)
    cached_tokens: tuple[int, ...] = (0,)
    repetitions: int = 3

    @property
    def longest(self) -> int:
        return max(self.cached_tokens) + max((*self.prompt_tokens, *self.generated_tokens)) + 2


def speed_rows(
    source: Source,
    every: Many[Variant],
    methods: Many[Way],
    tests: Tests,
    out: Path | None,
    notify: Callable[[str], None],
) -> Iterator[SpeedRow]:
    """Yield rows as they are measured. methods: as the ways of `measurable`. out: file of results
    to append to; its rows are not measured again. Raises SubspecError, for plans before anything is
    measured."""
    artifacts = plans(source, every, notify)
    for artifact in artifacts:
        if tests.longest > artifact.plan.context:
            raise SubspecError(
                Exit.USAGE,
                f"the tests need {tests.longest} tokens, the plan's context is "
                f"{artifact.plan.context}",
                f"smaller tests, or --contexts {tests.longest}",
            )
    for artifact, method in measurable(artifacts, methods, notify):
        text = load_tokenizer(artifact.path / "tokenizer").plain_ids(TEXT)
        ids = text * (tests.longest // len(text) + 1)
        with opened_engine(artifact, source, method) as engine:
            setting, wanted = setting_of(engine), list(rows_of(tests))
            done = rows_to_resume(out, SpeedRow, setting, SAME_IN_A_RUN) if out else []
            found = {
                one.test: one
                for one in done
                if one.setting == setting and len(one.tokens_per_second) == tests.repetitions
            }
            if any(name not in found for name, *_ in wanted):
                warm_up(engine, ids[:8])
            for name, filled, read, decoded in wanted:
                if name in found:
                    notify(f"{method} {name} is in {out} already")
                    yield found[name]
                    continue
                notify(f"{method} {name}")
                new = row(engine, name, ids, (filled, read, decoded), tests.repetitions)
                if out is not None:
                    append_row(out, new)
                yield new


def rows_of(tests: Tests) -> Iterator[tuple[str, int, int, int]]:
    """Yield name, cached tokens, prompt tokens, generated tokens."""
    for filled in tests.cached_tokens:
        after = f" @ d{filled}" if filled else ""
        for count in tests.prompt_tokens:
            yield f"pp{count}{after}", filled, count, 0
        for count in tests.generated_tokens:
            yield f"tg{count}{after}", filled, 0, count


def row(
    engine: Engine, name: str, ids: list[int], counts: tuple[int, int, int], repeats: int
) -> SpeedRow:
    filled, read, decoded = counts
    # The first one is a warm-up: buffers grow, and kernels see new shapes.
    found = [measured(engine, ids, *counts) for _ in range(repeats + 1)][1:]
    if read:
        rates = [read / one.time_to_first_token_seconds for one in found]
    else:
        rates = [decoded / one.decode_seconds for one in found]
    rounds = sum(len(one.accepted) for one in found)
    return SpeedRow(
        "subspec.bench.speed/1",
        setting_of(engine),
        name,
        tuple(rates),
        sum(sum(one.accepted) for one in found) / rounds if rounds else 0.0,
        sum(one.streamed_bytes for one in found) / (repeats * decoded) if decoded else 0.0,
        engine.peak.peak_bytes,
    )


def measured(engine: Engine, ids: list[int], filled: int, read: int, decoded: int) -> Stats:
    """Measure prefill of the next tokens, or decoding, with the first `filled` tokens in the cache.
    End tokens are ignored."""
    with engine.new_sequence() as sequence:
        before = max(filled, 0 if read else 1)  # decoding needs a token
        if filled and read:
            decode(sequence, ids[:filled], 1)
        decode(sequence, ids[: before + read], decoded + 1)
        return sequence.stats


def warm_up(engine: Engine, prompt: list[int]) -> None:
    """Run a short unmeasured answer: the first pass also checks digests, grows buffers and
    compiles. It prefills as much of the prompt as one pass takes."""
    with engine.new_sequence() as sequence:
        most = min(engine.plan.prefill_chunk_tokens, engine.plan.context // 2)
        decode(sequence, prompt[:most], 3)


def decode(sequence: Sequence, prompt: list[int], count: int) -> None:
    for _ in sequence.generate(prompt, GenerationParams(count)):
        pass
