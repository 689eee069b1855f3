"""GuideLLM against a running server: `guidellm_benchmark.py BASE_URL --tokenizer FOLDER`.

It makes prompts of so many tokens, streams their answers, two at a time, and takes tokens from the
usage of the last chunk.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import urllib.request
from importlib.metadata import version
from pathlib import Path
from typing import Any

NUM_REQUESTS = 6
OUTPUT_TOKENS = 24
FORMATS = ("/v1/chat/completions", "/v1/completions")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base_url", help="as in http://127.0.0.1:8000")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of the checkpoint")
    options = parser.parse_args()
    base_url = options.base_url.rstrip("/")
    with urllib.request.urlopen(f"{base_url}/v1/models") as response:
        model = json.load(response)["data"][0]["id"]
    for form in FORMATS:
        with tempfile.TemporaryDirectory() as place:
            report = Path(place) / "report.json"
            backend = f"kind=openai_http,target={base_url},model={model},request_format={form}"
            data = f"kind=synthetic_text,prompt_tokens=48,output_tokens={OUTPUT_TOKENS}"
            command = [Path(sys.executable).parent / "guidellm", "run", "--backend", backend]
            command += ["--profile", "kind=concurrent,streams=2", "--data", data]
            command += ["--constraint", f"kind=max_requests,count={NUM_REQUESTS}"]
            command += ["--tokenizer", f"kind=hf_auto,model={options.tokenizer.resolve()}"]
            command += ["--output", f"kind=json,path={report}", "--disable-console-interactive"]
            subprocess.run(command, check=True)
            check_report(json.loads(report.read_text()))
    print(f"guidellm {version('guidellm')}: every answer was whole")


def check_report(found: dict[str, Any]) -> None:
    [benchmark] = found["benchmarks"]
    requests = benchmark["requests"]
    assert len(requests["successful"]) == NUM_REQUESTS and not requests["errored"], requests
    for one in requests["successful"]:
        assert one["output_tokens"] == OUTPUT_TOKENS, one


if __name__ == "__main__":
    main()
