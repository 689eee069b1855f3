"""The clients that are tried: what is installed, and which script runs them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Client:
    """installs: arguments of pip, one call each. torch goes first and by its exact version: asked
    for loosely, pip would bring gigabytes of CUDA. model: which artifact answers. tokenizer: the
    script gets the checkpoint's folder as well."""

    name: str
    installs: tuple[tuple[str, ...], ...]
    scripts: tuple[str, ...]
    model: str = "demo"
    tokenizer: bool = False
    limit_seconds: float = 180.0


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
)
