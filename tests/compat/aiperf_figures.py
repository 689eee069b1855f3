"""AIPerf against a running server: `aiperf_figures.py BASE_URL --tokenizer FOLDER`.

It reads how drafts fared from `metrics.speculative_decoding` of streams, and drops all of it if the
figures do not agree with each other.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from importlib.metadata import version
from pathlib import Path
from typing import Any

NUM_REQUESTS = 6
REVISION = "0" * 40


def fake_hub(folder: Path, tokenizer: Path) -> str:
    """A cache of the model hub in `folder` with this tokenizer, whose name is returned: AIPerf
    takes no path while it is offline."""
    model = folder / "hub" / "models--local--tokenizer"
    snapshot = model / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copyfile(tokenizer / name, snapshot / name)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(REVISION)
    return "local/tokenizer"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base_url", help="as in http://127.0.0.1:8000")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of the checkpoint")
    options = parser.parse_args()
    base_url = options.base_url.rstrip("/")
    with urllib.request.urlopen(f"{base_url}/v1/models") as response:
        model = json.load(response)["data"][0]["id"]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        name = fake_hub(folder, options.tokenizer)
        command = [Path(sys.executable).parent / "aiperf", "profile", "--model", model]
        command += ["--url", base_url, "--endpoint-type", "chat", "--streaming"]
        command += ["--tokenizer", name, "--request-count", str(NUM_REQUESTS), "--concurrency", "2"]
        command += ["--isl", "64", "--osl", "32", "--ui", "none", "--artifact-dir", folder / "out"]
        environment = {**os.environ, "HF_HOME": place, "HF_HUB_OFFLINE": "1"}
        subprocess.run(command, check=True, env=environment)
        (report,) = folder.glob("out/**/profile_export_aiperf.json")
        check_report(json.loads(report.read_text()))
    print(f"aiperf {version('aiperf')}: figures of drafts are read")


def check_report(found: dict[str, Any]) -> None:
    assert found["request_count"]["avg"] == NUM_REQUESTS, found["request_count"]
    assert not found.get("error_summary"), found["error_summary"]
    drafts = {key: value for key, value in found.items() if "spec" in key or "accept" in key}
    assert drafts, f"no figures of drafts among {sorted(found)}"
    print(json.dumps(drafts)[:2000])


if __name__ == "__main__":
    main()
