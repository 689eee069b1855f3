"""A long text: what reading it takes, and what the next turns read again.

    python benchmarks/long_context.py [--kind hybrid|windows|full] [--tokens 32768] [--vram SIZE]

A random model, of the layers of Qwen3.5 (three delta nets, then attention), Gemma 3 (five windows,
then all tokens) or Qwen3: it measures bytes, seconds and what is read again, and says nothing of
acceptance. It is planned without a rehearsal and drafts with a short chain. The budget is what the
weights take and twice what the keys and values do, unless given: some of the weights stream.

Four turns, in one sequence: a text of so many tokens; the answer and a few tokens more; the same
turn with another end, as when a user edits a question; one that departs from the middle of the
text. Each says how many tokens were read, after what time (and what was predicted for the first),
and whether its answer is that of a fresh sequence (`--no-fresh` saves that time). Then the peak of
fast memory and the ledger. The last line of stdout is one JSON object.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import click
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, Qwen3_5TextConfig, Qwen3Config

from subspec.artifacts.common.command import reported, size_option
from subspec.artifacts.common.sizes import short_size
from subspec.artifacts.footprint import model_bytes, text_bytes
from subspec.artifacts.format.store import Artifact, open_artifact
from subspec.artifacts.plan import Constraints, Usage
from subspec.planner.model.checkpoint import read_spec
from subspec.planner.model.hub import Resolved, resolve
from subspec.planner.planning import PlanRequest, plan_model
from subspec.planner.solve.outlook import predict_for
from subspec.planner.solve.storage import Storage
from subspec.runtime.engine import Engine, OpenOptions
from subspec.runtime.sequence import GenerationParams, Sequence

Kind = Literal["hybrid", "windows", "full"]
TOKENIZER = Path(__file__).resolve().parent.parent / "planner" / "demo-model"
ANSWER_TOKENS = 24
MORE_TOKENS = 40  # a next question
EDITED_TOKENS = 10  # at its end


@dataclass(frozen=True)
class Turn:
    name: str
    prompt_tokens: int
    read_tokens: int
    first_token_seconds: float
    as_fresh: bool | None  # None: no fresh sequence was asked


def random_model(kind: Kind, layers: int, hidden: int, out: Path) -> Resolved:
    """A checkpoint folder."""
    heads = hidden // 64
    sizes: dict[str, Any] = {
        "hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": max(1, heads // 4), "head_dim": 64,
        "vocab_size": 8192, "tie_word_embeddings": True, "max_position_embeddings": 1 << 17,
        "eos_token_id": 0, "pad_token_id": 0, "bos_token_id": None,
    }  # fmt: skip
    nets = {
        "linear_num_key_heads": heads // 2, "linear_num_value_heads": heads,
        "linear_key_head_dim": 64, "linear_value_head_dim": 64,
    }  # fmt: skip
    makes: dict[Kind, Callable[[], Any]] = {
        "hybrid": lambda: Qwen3_5TextConfig(**sizes, **nets),
        "windows": lambda: Gemma3TextConfig(**sizes, sliding_window=1024),
        "full": lambda: Qwen3Config(**sizes),
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(makes[kind](), dtype=torch.bfloat16)
    model.save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (out / name).write_bytes((TOKENIZER / name).read_bytes())
    return resolve(str(out))


def planned(model: Resolved, context: int, budget_bytes: int | None, out: Path) -> Artifact:
    fixed = Constraints(context, width=1, depth=4, method="substitute")
    spec = read_spec(model.path, model.source)
    budget = budget_bytes or 2 * text_bytes(spec, context) + model_bytes(spec)
    plan_model(PlanRequest(budget, fixed, "cpu", rehearse=0), model, out, notify=say)
    return open_artifact(out)


def run(artifact: Artifact, text: list[int], fresh: bool) -> tuple[list[Turn], Engine]:
    """The turns, and the engine, closed."""
    with Engine.open(artifact, OpenOptions()) as engine:
        turns = list[Turn]()
        with engine.new_sequence() as sequence:
            first = asked(sequence, "the text", text, turns)
            answers = [(text, first)]
            question = [*text, *first, *numbers(MORE_TOKENS, 1)]
            answers.append((question, asked(sequence, "the next question", question, turns)))
            edited = [*question[:-EDITED_TOKENS], *numbers(EDITED_TOKENS, 2)]
            answers.append((edited, asked(sequence, "its end edited", edited, turns)))
            half = [*text[: len(text) // 2], *numbers(MORE_TOKENS, 3)]
            answers.append((half, asked(sequence, "from the middle on", half, turns)))
        if fresh:
            for index, (prompt, answer) in enumerate(answers):
                with engine.new_sequence() as alone:
                    same = asked(alone, "fresh", prompt, []) == answer
                turns[index] = replace(turns[index], as_fresh=same)
    return turns, engine


def asked(sequence: Sequence, name: str, prompt: list[int], turns: list[Turn]) -> list[int]:
    said = list[int]()
    for tokens in sequence.generate(prompt, GenerationParams(ANSWER_TOKENS)):
        said += tokens
    stats = sequence.stats
    read = stats.prompt_tokens - stats.cached_tokens
    turn = Turn(name, stats.prompt_tokens, read, stats.time_to_first_token_seconds, None)
    turns.append(turn)
    say(f"{name}: {read} of {turn.prompt_tokens} tokens read in {turn.first_token_seconds:.2f} s")
    return said


def predicted_seconds(artifact: Artifact, tokens: int) -> float:
    """Of the first token after a text of so many."""
    plan, stored = artifact.plan, Storage(tuple(artifact.stored_parts()))
    usage = Usage(tokens, ANSWER_TOKENS)
    said = predict_for(artifact.spec, artifact.profile, plan, stored, "substitute", usage)
    return said.time_to_first_token_seconds


def numbers(count: int, seed: int) -> list[int]:
    """Random tokens, none of which ends an answer."""
    drawn = torch.Generator().manual_seed(seed)
    return torch.randint(1, 8192, (count,), generator=drawn).tolist()


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@click.command()
@click.option("--kind", type=click.Choice(["hybrid", "windows", "full"]), default="hybrid")
@click.option("--tokens", default=32768, show_default=True, help="Of the text.")
@click.option("--layers", default=12, show_default=True)
@click.option("--hidden", default=512, show_default=True)
@click.option("--vram", callback=size_option, metavar="SIZE")
@click.option("--fresh/--no-fresh", default=True, help="Ask fresh sequences too.")
@reported
def main(kind: Kind, tokens: int, layers: int, hidden: int, vram: int | None, fresh: bool) -> None:
    """A long text, three turns after it, and the ledger."""
    with tempfile.TemporaryDirectory() as scratch:
        model = random_model(kind, layers, hidden, Path(scratch) / "model")
        context = tokens + 4 * (ANSWER_TOKENS + MORE_TOKENS)
        artifact = planned(model, context, vram, Path(scratch) / "artifact")
        predicted = predicted_seconds(artifact, tokens)
        say(f"predicted: the first token after {predicted:.2f} s")
        turns, engine = run(artifact, numbers(tokens, 0), fresh)
    ledger, peak = engine.placement.ledger, engine.peak.peak_bytes
    for turn in turns:
        if turn.as_fresh is not None:
            say(
                f"{turn.name}: {'the answer' if turn.as_fresh else 'NOT THE ANSWER'} of a fresh one"
            )
    say(f"peak {short_size(peak)} of {short_size(ledger.total_bytes)}")
    found = {
        "kind": kind,
        "predicted_seconds": predicted,
        "turns": [asdict(turn) for turn in turns],
        "peak_bytes": peak,
        "ledger": asdict(ledger),
        "ledger_bytes": ledger.total_bytes,
    }
    print(json.dumps(found))
    if any(turn.as_fresh is False for turn in turns):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
