"""Our program against other exact ones that run a model larger than memory, in one run.

    python benchmarks/peers.py CHECKPOINT ARTIFACT [--tokens 64] [--limit SIZE]
                                                   [--peers llama.cpp,accelerate,airllm]

Same model (the checkpoint that the artifact was made of), same prompts, greedy, and the same memory
for each process, page cache included: the artifact's budget, what an idle interpreter holds, and
64 MB. The kernel keeps it (a cgroup without swap), and the model's files are not in the page cache
when a program starts. One that is killed for memory gets twice as much, and the table says so.

`make peers` installs the others into build/peers; what is not there is left out. Rates are of the
tokens after the first of each prompt. A program that is slow is stopped at --time-limit, and its
rate is that of the tokens that came. Tokens may differ from ours: each program sums bfloat16
products in its own order. The last line of stdout is one JSON object.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import distributions, version
from itertools import takewhile
from pathlib import Path

import click
import torch
from memory_limit import ALLOWANCE_BYTES, idle_bytes, memory_group

from subspec.artifacts.common.command import Program, reported, say, size_option
from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.common.sizes import short_size
from subspec.artifacts.format.store import Artifact, open_artifact
from subspec.planner.model.checkpoint import read_spec

HERE = Path(__file__).resolve().parent
TOOLS = HERE.parent / "build" / "peers"
PACKAGES = TOOLS / "python"  # not in the environment: accelerate changes what transformers does
NODE_LLAMA = TOOLS / "node_modules" / "node-llama-cpp"
OURS = "subspec-run"
PROMPTS = (
    "Why is the sky blue? Explain it in a few sentences.",
    "Write the Python function read_lines: return the lines of a text file.",
    "Name three rivers of Europe and the seas that they flow into.",
)


@dataclass(frozen=True)
class Task:
    """What a peer's process is told, as a JSON file."""

    model: str  # checkpoint or GGUF file
    folder: str  # of files that the peer makes
    prompts: list[list[int]]
    end_tokens: list[int]
    tokens: int  # for each prompt, at most
    context: int
    threads: int
    weights_bytes: int  # what weights may take, for a peer that has to be told
    seconds_per_prompt: float


@dataclass(frozen=True)
class Answer:
    token_ids: list[int]
    first_token_seconds: float
    decode_seconds: float  # after the first token


@dataclass(frozen=True)
class Ended:
    """A process that ran within a limit."""

    lines: list[str]  # of stdout
    exit_code: int
    killed: bool  # for memory
    late: bool
    said: str  # the end of stderr


@dataclass(frozen=True)
class Peer:
    name: str
    version: Callable[[], str | None]  # None: not installed
    prepare: Callable[[Task], Task]  # makes files, without a limit
    words: tuple[str, ...]  # the command; the task's file follows
    weight_shares: tuple[float, ...] = (1,)  # of the budget, tried in turn before the limit grows


@dataclass(frozen=True)
class Result:
    """One program over all prompts. Without tokens, `note` says why."""

    program: str
    version: str
    limit_bytes: int
    killed_at_bytes: list[int]  # smaller limits that it was killed at
    tokens_per_second: float | None
    ours_over_theirs: float | None
    first_token_seconds: float | None
    num_tokens: int
    same_tokens: int  # as ours, from the beginning of each answer
    compared_tokens: int
    note: str


# ---- the programs ----


def python_version(name: str) -> str | None:
    found = next(iter(distributions(name=name, path=[str(PACKAGES)])), None)
    return found.version if found else None


def llama_version() -> str | None:
    if shutil.which("node") is None or importlib.util.find_spec("gguf") is None:
        return None
    package = NODE_LLAMA / "package.json"
    return str(json.loads(package.read_text("utf-8"))["version"]) if package.exists() else None


def prepare_llama(task: Task) -> Task:
    """The checkpoint as one GGUF file."""
    file = Path(task.folder) / "model.gguf"
    if not file.exists():
        words = [str(HERE / "write_gguf.py"), task.model, str(file)]
        prepare_by([sys.executable, *words])
    return replace(task, model=str(file))


def prepare_airllm(task: Task) -> Task:
    """One file per layer: made when the model is opened."""
    with task_file(replace(task, prompts=[])) as file:
        prepare_by([*AIRLLM.words, file])
    return task


def prepare_by(words: Sequence[str]) -> None:
    done = subprocess.run(words, env=environment(), capture_output=True, text=True)
    if done.returncode:
        raise SubspecError(Exit.UNSUPPORTED, last_line(done.stderr))


def transformers_words(name: str) -> tuple[str, ...]:
    return (sys.executable, str(HERE / "transformers_worker.py"), name)


LLAMA = Peer(
    "llama.cpp",
    llama_version,
    prepare_llama,
    ("node", str(HERE / "llama_worker.mjs"), str(NODE_LLAMA / "dist" / "index.js")),
)
ACCELERATE = Peer(
    "accelerate",
    lambda: python_version("accelerate"),
    lambda task: task,
    transformers_words("accelerate"),
    weight_shares=(1, 0.5),
)
AIRLLM = Peer(
    "airllm", lambda: python_version("airllm"), prepare_airllm, transformers_words("airllm")
)
PEERS = {peer.name: peer for peer in (LLAMA, ACCELERATE, AIRLLM)}


# ---- running one ----


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(PACKAGES), "HF_HUB_OFFLINE": "1"}


def run_within(
    words: Sequence[str], limit_bytes: int, seconds: float, stop: signal.Signals
) -> Ended:
    """Run a command within a limit; after `seconds` it gets the signal `stop`, then SIGKILL."""
    with memory_group(limit_bytes) as group, tempfile.TemporaryFile() as errors:
        if group is None:
            raise SubspecError(
                Exit.RESOURCES,
                "this process may not make a cgroup that bounds memory",
                "run as root, or under: systemd-run --user --scope",
            )

        def enter() -> None:
            group.enter()
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background job ignores it

        child = subprocess.Popen(
            words,
            preexec_fn=enter,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
        late = threading.Event()

        def end(by: signal.Signals) -> None:
            late.set()
            child.send_signal(by)

        timers = [
            threading.Timer(seconds, end, [stop]),
            threading.Timer(seconds + 60, end, [signal.SIGKILL]),
        ]
        for timer in timers:
            timer.start()
        try:
            assert child.stdout is not None
            lines = child.stdout.read().splitlines()
            code = child.wait()
        finally:
            for timer in timers:
                timer.cancel()
            child.kill()
            child.wait()
        errors.seek(0)
        said = errors.read().decode("utf-8", "replace")
        return Ended(lines, code, group.num_killed() > 0, late.is_set(), said)


def drop_page_cache(*paths: Path) -> None:
    """Of files, or of all files in folders: pages that somebody else read cost a group nothing."""
    for path in paths:
        for file in path.rglob("*") if path.is_dir() else [path]:
            if file.is_file():
                descriptor = os.open(file, os.O_RDONLY)
                os.fsync(descriptor)  # pages not yet written stay
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)


def run_ours(
    artifact: Artifact, limit_bytes: int, tokens: int, time_limit: float
) -> tuple[dict[int, Answer], list[list[int]]]:
    """A process for each prompt -> its answers, and the tokens of the prompts."""
    command = str(Path(sys.executable).with_name(OURS))
    options = ["--json", "--no-record", "--no-replan", "--max-tokens", str(tokens)]
    answers, prompts = {}, []
    for number, prompt in enumerate(PROMPTS):
        drop_page_cache(artifact.path)
        words = [command, str(artifact.path), prompt, *options]
        # As long again for opening, as a peer has. Interrupted, it gives what came.
        ended = run_within(words, limit_bytes, 2 * time_limit / len(PROMPTS), signal.SIGINT)
        found = json.loads(ended.lines[-1]) if ended.lines else {}
        if "stats" not in found:
            raise SubspecError(
                Exit.RESOURCES,
                f"{OURS} gave no answer within {short_size(limit_bytes)}: {why(ended)}",
                "a larger --limit, or a longer --time-limit",
            )
        stats = found["stats"]
        seconds = stats["draft_seconds"] + stats["verify_seconds"]
        answers[number] = Answer(found["token_ids"], stats["time_to_first_token_seconds"], seconds)
        prompts.append(found["prompt_token_ids"])
    return answers, prompts


def run_peer(
    peer: Peer,
    task: Task,
    limit_bytes: int,
    idle: int,
    time_limit: float,
    ours: dict[int, Answer],
) -> Result:
    """Within the limit, or the first doubling of it that the peer survives."""
    version, killed_at = peer.version() or "", list[int]()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        task = peer.prepare(task)
    except SubspecError as error:
        return result(peer.name, version, limit_bytes, [], {}, ours, error.message)
    while limit_bytes < memory:
        for share in peer.weight_shares:
            weights = int(share * max(0, limit_bytes - idle - ALLOWANCE_BYTES))
            drop_page_cache(Path(task.model), Path(task.folder))
            with task_file(replace(task, weights_bytes=weights)) as file:
                ended = run_within([*peer.words, file], limit_bytes, 2 * time_limit, signal.SIGKILL)
            if not ended.killed:
                answers = answers_of(ended.lines)
                failed = ended.exit_code != 0 and not ended.late
                note = why(ended) if failed or not answers else ""
                if not note and tokens_per_second(answers) is None:
                    note = "no second token within the time limit"
                return result(peer.name, version, limit_bytes, killed_at, answers, ours, note)
        killed_at.append(limit_bytes)
        limit_bytes *= 2
    return result(peer.name, version, killed_at[-1], killed_at, {}, ours, "killed at every limit")


@contextmanager
def task_file(task: Task) -> Iterator[str]:
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(asdict(task), file)
        file.flush()
        yield file.name


def answers_of(lines: Sequence[str]) -> dict[int, Answer]:
    """By prompt, from a peer's lines: {"prompt": 0, "at": seconds} where a prompt begins, then the
    same with a "token" for each. The last line may be cut off."""
    began: dict[int, float] = {}
    came: dict[int, list[tuple[int, float]]] = {}
    for line in lines:
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            break
        if "token" in event:
            came.setdefault(event["prompt"], []).append((event["token"], event["at"]))
        else:
            began[event["prompt"]] = event["at"]
    return {
        prompt: Answer(
            [token for token, _ in tokens],
            first_token_seconds=tokens[0][1] - began[prompt],
            decode_seconds=tokens[-1][1] - tokens[0][1],
        )
        for prompt, tokens in came.items()
    }


# ---- what came of it ----


def why(ended: Ended) -> str:
    if ended.killed:
        return "killed for memory"
    if ended.late:
        return "no token within the time limit"
    return last_line(ended.said) or f"exit code {ended.exit_code}"


def last_line(said: str) -> str:
    """Without the hint that follows a message of ours."""
    lines = said.partition("\n\nhint: ")[0].strip().splitlines()
    return lines[-1].removeprefix("error: ") if lines else ""


def result(
    program: str,
    version: str,
    limit_bytes: int,
    killed_at: list[int],
    answers: dict[int, Answer],
    ours: dict[int, Answer],
    note: str,
) -> Result:
    rate, ours_rate = tokens_per_second(answers), tokens_per_second(ours)
    shared = [(answers[prompt].token_ids, ours[prompt].token_ids) for prompt in answers]
    return Result(
        program,
        version,
        limit_bytes,
        killed_at,
        rate,
        ours_rate / rate if rate and ours_rate else None,
        statistics.mean(one.first_token_seconds for one in answers.values()) if answers else None,
        num_tokens=sum(len(one.token_ids) for one in answers.values()),
        same_tokens=sum(common_prefix(*pair) for pair in shared),
        compared_tokens=sum(min(map(len, pair)) for pair in shared),
        note=note,
    )


def tokens_per_second(answers: dict[int, Answer]) -> float | None:
    """None if no answer has a second token."""
    num_tokens = sum(len(one.token_ids) - 1 for one in answers.values())
    seconds = sum(one.decode_seconds for one in answers.values())
    return num_tokens / seconds if num_tokens else None


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def header() -> str:
    return (
        f"{'':24}{'limit':>10}{'tokens/s':>10}{'ours is':>9}{'first':>9}{'tokens':>8}  same as ours"
    )


def row(one: Result) -> str:
    name = f"{one.program} {one.version}"
    start = f"{name:24}{short_size(one.limit_bytes):>10}"
    if one.tokens_per_second is None or one.first_token_seconds is None:
        return f"{start}  {one.note}"
    ratio = "" if one.ours_over_theirs is None else f"{one.ours_over_theirs:.2f}x"
    killed = ", ".join(map(short_size, one.killed_at_bytes))
    return (
        f"{start}{one.tokens_per_second:10.2f}{ratio:>9}{one.first_token_seconds:7.1f} s"
        f"{one.num_tokens:8}  {one.same_tokens} of {one.compared_tokens}"
        + (f"; killed at {killed}" if killed else "")
        + (f"; {one.note}" if one.note else "")
    )


# ---- the command ----


def chosen(names: str) -> list[Peer]:
    """Raises SubspecError(USAGE)."""
    given = [name.strip() for name in names.split(",")]
    for name in given:
        if name not in PEERS:
            raise SubspecError(
                Exit.USAGE, f"--peers {name!r}, expected some of {', '.join(PEERS)}", ""
            )
    return [PEERS[name] for name in given]


def check_same_model(checkpoint: Path, artifact: Artifact) -> None:
    if read_spec(checkpoint, artifact.spec.source) != artifact.spec:
        raise SubspecError(
            Exit.USAGE,
            f"{artifact.path} was not made of {checkpoint}: their layers differ",
            "name the checkpoint that subspec-plan got with --model",
        )


def files_folder(checkpoint: Path, peer: Peer) -> Path:
    """Of what a peer makes of this checkpoint, kept for the next run."""
    found = [(file.name, file.stat()) for file in sorted(checkpoint.iterdir())]
    state = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]
    key = hashlib.sha256(repr((checkpoint, state)).encode()).hexdigest()[:8]
    folder = TOOLS / "models" / f"{checkpoint.name}-{key}" / peer.name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@click.command(cls=Program)
@click.argument("checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--tokens", type=click.IntRange(min=2), default=64, show_default=True)
@click.option("--peers", default=",".join(PEERS), show_default=True, metavar="NAMES")
@click.option("--limit", callback=size_option, metavar="SIZE", help="Memory for each program.")
@click.option(
    "--time-limit",
    type=click.FloatRange(min=1),
    default=180,
    show_default=True,
    help="Seconds for the prompts of one program.",
)
@reported
def main(
    checkpoint: Path, artifact: Path, tokens: int, peers: str, limit: int | None, time_limit: float
) -> None:
    """Compare ARTIFACT with other programs that run CHECKPOINT."""
    asked, checkpoint = chosen(peers), checkpoint.resolve()
    opened = open_artifact(artifact)
    check_same_model(checkpoint, opened)
    idle = idle_bytes()
    limit = limit or opened.plan.budget_bytes + idle + ALLOWANCE_BYTES
    weights = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    say(
        f"{len(PROMPTS)} prompts, {tokens} tokens each, {short_size(weights)} of weights within "
        f"{short_size(limit)}, of which an idle interpreter takes {short_size(idle)}"
    )
    say(header())
    ours, prompts = run_ours(opened, limit, tokens, time_limit)
    results = [result(OURS, version("subspec"), limit, [], ours, ours, "")]
    say(row(results[0]))
    for peer in asked:
        if peer.version() is None:
            say(f"{peer.name} is not installed: make peers (llama.cpp needs node and npm)")
            continue
        task = Task(
            model=str(checkpoint),
            folder=str(files_folder(checkpoint, peer)),
            prompts=prompts,
            end_tokens=list(opened.spec.eos_token_ids),
            tokens=tokens,
            context=opened.plan.context,
            threads=torch.get_num_threads(),
            weights_bytes=0,
            seconds_per_prompt=time_limit / len(PROMPTS),
        )
        results.append(run_peer(peer, task, limit, idle, time_limit, ours))
        say(row(results[-1]))
    found = {
        "checkpoint": checkpoint.name,
        "artifact": opened.path.name,
        "budget_bytes": opened.plan.budget_bytes,
        "limit_bytes": limit,
        "weights_bytes": weights,
        "idle_bytes": idle,
        "tokens": tokens,
        "prompts": len(PROMPTS),
        "threads": torch.get_num_threads(),
        "programs": [asdict(one) for one in results],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
