"""examples/ with two replicas of the demo model on this machine: `replicas.py [--bin DIR] [--folder
DIR]`. Each router has a virtual environment of its own. Standard library only.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from clients import LITELLM_PROXY, RAY, environment
from models import DEMO, HERE, ROOT, make_artifact


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("--bin", type=Path, default=ROOT / ".venv" / "bin", help="of subspec")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "compat")
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    artifact = make_artifact("demo", DEMO, options.bin, folder)
    served = [str(artifact), str(options.bin.absolute() / "subspec-serve")]
    litellm = environment(LITELLM_PROXY, folder).parent / "litellm"
    python = environment(RAY, folder)
    commands = (
        (LITELLM_PROXY, [sys.executable, HERE / "litellm_replicas.py", *served, litellm, folder]),
        (RAY, [python, HERE / "ray_replicas.py", *served]),
    )
    failed = 0
    for router, command in commands:
        try:
            failed += subprocess.run(
                command,
                timeout=router.limit_seconds,
                env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"},
            ).returncode
        except subprocess.TimeoutExpired:
            print(f"{router.name} took more than {router.limit_seconds:.0f} s", file=sys.stderr)
            failed = 1
    return int(failed != 0)


if __name__ == "__main__":
    sys.exit(main())
