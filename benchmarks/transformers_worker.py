"""Greedy decoding with transformers, whose weights accelerate or AirLLM brings, for `peers.py`.

    python benchmarks/transformers_worker.py accelerate|airllm TASK

TASK is a JSON file (`peers.Task`). Prints one JSON object a line: {"prompt": 0, "at": seconds}
where a prompt begins, {"prompt": 0, "token": 57, "at": seconds} for each token. What the libraries
print goes to stderr.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation import BaseStreamer, MaxTimeCriteria, StoppingCriteriaList


class Events(BaseStreamer):  # type: ignore[misc]
    """Tokens of one prompt as lines; `generate` hands over the prompt first."""

    def __init__(self, out: int, prompt: int) -> None:
        self.out = out
        self.prompt = prompt
        self.began = False

    def put(self, value: torch.Tensor) -> None:
        said: dict[str, object] = {"prompt": self.prompt, "at": time.monotonic()}
        if self.began:
            said["token"] = int(value.item())
        self.began = True
        os.write(self.out, json.dumps(said).encode() + b"\n")

    def end(self) -> None:
        pass


def accelerate_model(task: dict[str, Any]) -> Any:
    """What does not fit into `weights_bytes` stays in the checkpoint's files."""
    return AutoModelForCausalLM.from_pretrained(
        task["model"],
        dtype=torch.bfloat16,
        device_map="auto",
        max_memory={"cpu": task["weights_bytes"]},
        offload_folder=task["folder"],
        local_files_only=True,
    )


def airllm_model(task: dict[str, Any]) -> Any:
    """A file per layer in `folder`, made if it is not there; one layer in memory at a time."""
    from airllm import AutoModel  # only here: an import of it takes long and prints

    return AutoModel.from_pretrained(
        task["model"], device="cpu", layer_shards_saving_path=task["folder"]
    )


MODELS = {"accelerate": accelerate_model, "airllm": airllm_model}


def main() -> None:
    name, file = sys.argv[1:]
    task = json.loads(Path(file).read_text("utf-8"))
    out = os.dup(1)
    os.dup2(2, 1)
    torch.set_num_threads(task["threads"])
    model = MODELS[name](task)
    greedy = GenerationConfig(
        do_sample=False,
        max_new_tokens=task["tokens"],
        eos_token_id=task["end_tokens"],
        pad_token_id=0,
    )
    for prompt, ids in enumerate(task["prompts"]):
        tokens = torch.tensor([ids])
        model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            generation_config=greedy,
            streamer=Events(out, prompt),
            stopping_criteria=StoppingCriteriaList([MaxTimeCriteria(task["seconds_per_prompt"])]),
        )


if __name__ == "__main__":
    main()
