"""The clients that are tried: what is installed, and which script runs them."""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Client:
    """installs: arguments of pip, one call each. torch goes first and by its exact version: asked
    for loosely, pip would bring gigabytes of CUDA. npm: a package with a program, and the program's
    name: the script gets its path as well. model: which artifact answers. tokenizer: the script
    gets the checkpoint's folder as well."""

    name: str
    installs: tuple[tuple[str, ...], ...]
    scripts: tuple[str, ...]
    model: str = "demo"
    tokenizer: bool = False
    limit_seconds: float = 180.0
    npm: tuple[str, str] | None = None


OPENAI_SCRIPTS = ("openai_chat.py", "openai_responses.py")
TORCH = ("torch==2.13.0",)

CLIENTS = (
    Client("openai-2", (("openai==2.54.0",),), OPENAI_SCRIPTS),
    Client("openai-3", (("openai==3.57.0",),), OPENAI_SCRIPTS),
    Client("anthropic", (("anthropic==2.14.0",),), ("anthropic_messages.py",)),
    Client("litellm", (("litellm==1.110.2",),), ("litellm_sdk.py",)),
    Client("langchain", (("langchain-openai==1.7.4",),), ("langchain_chat.py",)),
    Client(
        "smolagents",
        (("smolagents[openai]==1.26.0",),),
        ("smolagents_agent.py",),
        model="smollm2",
        limit_seconds=400,
    ),
    Client(
        "lm-eval",
        (TORCH, ("lm-eval[api]==0.4.13", "transformers==5.23.0")),
        ("lm_evaluation.py",),
        tokenizer=True,
        limit_seconds=300,
    ),
    Client("aiperf", (("aiperf==0.13.0",),), ("aiperf_figures.py",), tokenizer=True),
    Client("guidellm", (TORCH, ("guidellm==0.8.1",)), ("guidellm_benchmark.py",), tokenizer=True),
    Client(
        "codex",
        (),
        ("codex_agent.py",),
        model="smollm2",
        limit_seconds=600,
        npm=("@openai/codex@0.171.0", "codex"),
    ),
    Client(
        "claude-code",
        (),
        ("claude_code_agent.py",),
        model="smollm2",
        limit_seconds=600,
        npm=("@anthropic-ai/claude-code@2.1.197", "claude"),
    ),
)

LITELLM_PROXY = Client(
    "litellm-proxy", (("litellm[proxy]==1.106.2",),), ("litellm_replicas.py",), limit_seconds=400
)
RAY = Client(
    "ray", (("ray[serve]==2.60.0", "httpx==0.28.1"),), ("ray_replicas.py",), limit_seconds=400
)


def environment(client: Client, folder: Path) -> Path:
    """The Python of the client's virtual environment, made unless it is there."""
    place = folder / client.name
    done = place / ".installed"
    said = repr(client.installs)
    if not done.exists() or done.read_text() != said:
        subprocess.run([sys.executable, "-m", "venv", "--clear", place], check=True)
        for packages in client.installs:
            pip = [place / "bin" / "python", "-m", "pip", "install", "--quiet"]
            subprocess.run([*pip, "--disable-pip-version-check", *packages], check=True)
        done.write_text(said)
    return place / "bin" / "python"


def program(client: Client, folder: Path) -> Path:
    """The program of the client's package of npm, installed unless it is there. Raises
    RuntimeError without npm."""
    assert client.npm is not None
    package, name = client.npm
    place = folder / client.name / "npm"
    done = place / ".installed"
    if not done.exists() or done.read_text() != package:
        npm = shutil.which("npm")
        if npm is None:
            raise RuntimeError("npm is not installed")
        place.mkdir(parents=True, exist_ok=True)
        quiet = ("--no-fund", "--no-audit", "--loglevel", "error")
        subprocess.run([npm, "install", "--prefix", place, *quiet, package], check=True)
        done.write_text(package)
    return place / "node_modules" / ".bin" / name
