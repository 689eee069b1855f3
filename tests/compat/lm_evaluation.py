"""lm-eval against a running server: `lm_evaluation.py BASE_URL --tokenizer FOLDER`.

Tasks of its own from local files; nothing is fetched. Multiple choice asks `/v1/completions` for
the log probabilities of token ids, the other task asks the chat to write.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import urllib.request
from importlib.metadata import version
from pathlib import Path
from typing import Any

CHOICES = [
    {"question": "The sky is", "choices": ["blue", "a potato"], "answer": 0},
    {"question": "import numpy as", "choices": ["np", "the moon"], "answer": 0},
    {"question": "Two and two are", "choices": ["green", "four"], "answer": 1},
]
QUESTIONS = [{"question": "Say hello.", "answer": "hello"}, {"question": "1 + 1?", "answer": "2"}]
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
"""
CHOICE = """\
doc_to_choice: choices
metric_list:
  - metric: acc
"""
WRITTEN = """\
generation_kwargs:
  until: ["\\n\\n", "Question:"]
  max_gen_toks: 24
  do_sample: false
metric_list:
  - metric: exact_match
"""


def write_tasks(folder: Path) -> None:
    for name, kind, documents, more in (
        ("local_choice", "multiple_choice", CHOICES, CHOICE),
        ("local_written", "generate_until", QUESTIONS, WRITTEN),
    ):
        file = folder / f"{name}.jsonl"
        file.write_text("".join(f"{json.dumps(one)}\n" for one in documents))
        task = TASK.format(name=name, file=file, kind=kind) + more
        (folder / f"{name}.yaml").write_text(task)


def evaluate(folder: Path, model: str, arguments: dict[str, Any], *options: str) -> dict[str, Any]:
    """The samples by task, and the results under "results"."""
    out = folder / model
    said = ",".join(f"{key}={value}" for key, value in arguments.items())
    command = [sys.executable, "-m", "lm_eval", "--model", model, "--model_args", said]
    command += ["--include_path", str(folder), "--output_path", str(out), "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hub")}
    subprocess.run(
        [*command, *options], check=True, env={**os.environ, **offline, "OPENAI_API_KEY": "none"}
    )
    (results,) = out.rglob("results_*.json")
    found: dict[str, Any] = {"results": json.loads(results.read_text())["results"]}
    for path in out.rglob("samples_*.jsonl"):
        task = path.name.removeprefix("samples_").rsplit("_", 1)[0]
        found[task] = [json.loads(line) for line in path.read_text().splitlines()]
    return found


def check_choice(folder: Path, base: dict[str, Any], tokenizer: Path) -> None:
    """Each choice's log probability is that which the server gives for its tokens."""
    arguments = {
        **base,
        "base_url": f"{base['base_url']}/completions",
        "tokenizer": tokenizer,
        "tokenizer_backend": "huggingface",
        "tokenized_requests": True,
        "max_length": 1024,
    }
    tasks = ("--tasks", "local_choice,local_written", "--batch_size", "2")
    found = evaluate(folder, "local-completions", arguments, *tasks)
    for sample in found["local_choice"]:
        for value, _ in (one[0] for one in sample["resps"]):
            assert math.isfinite(float(value)) and float(value) < 0, sample
    assert len(found["local_choice"]) == len(CHOICES)
    assert len(found["local_written"]) == len(QUESTIONS)
    print(f"  accuracy {found['results']['local_choice']['acc,none']:.2f}")


def check_chat(folder: Path, base: dict[str, Any]) -> None:
    arguments = {**base, "base_url": f"{base['base_url']}/chat/completions"}
    tasks = ("--tasks", "local_written", "--apply_chat_template")
    found = evaluate(folder, "local-chat-completions", arguments, *tasks)
    assert all(sample["resps"][0] for sample in found["local_written"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base_url", help="as in http://127.0.0.1:8000")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of the checkpoint")
    options = parser.parse_args()
    base_url = options.base_url.rstrip("/") + "/v1"
    with urllib.request.urlopen(f"{base_url}/models") as response:
        model = json.load(response)["data"][0]["id"]
    base = {"model": model, "base_url": base_url, "num_concurrent": 2, "max_retries": 1}
    name = f"lm-eval {version('lm-eval')}"
    with tempfile.TemporaryDirectory() as folder:
        write_tasks(Path(folder))
        check_choice(Path(folder), base, options.tokenizer)
        print(f"{name}: check_choice", flush=True)
        check_chat(Path(folder), base)
        print(f"{name}: check_chat", flush=True)


if __name__ == "__main__":
    main()
