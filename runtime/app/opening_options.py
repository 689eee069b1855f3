"""The options that subspec-run and subspec-serve share: which artifact, and how it is opened."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, get_args

import click

from subspec.artifacts.common.command import HINT, size_option
from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.plan import DrafterName, Method, method_of

DEVICE = re.compile(r"cpu|cuda(:[0-9]{1,3})?", re.ASCII)
# The first option of a pair needs the second.
NEEDS = (
    ("model", "vram"),
    ("context", "model"),
    ("rehearse", "model"),
    ("draft_model", "model"),
)

Command = Callable[..., None]
Decorator = Callable[[Command], Command]


@dataclass(frozen=True, kw_only=True)
class OpeningOptions:
    """As click parsed them."""

    model: str | None = None
    context: int | None = None
    sequences: int | None = None
    rehearse: str | None = None
    draft_model: str | None = None
    no_speculation: bool = False
    drafter: DrafterName | None = None
    no_graphs: bool = False
    vram: int | None = None
    no_replan: bool = False
    trust_kernels: bool = False
    device: str | None = None
    link_bandwidth: int | None = None
    no_record: bool = False

    @property
    def method(self) -> Method | None:
        """None: the plan's."""
        if self.no_speculation:
            return "plain"
        return None if self.drafter is None else method_of(self.drafter)


def option_with_default_of(options: type[OpeningOptions]) -> Callable[..., Decorator]:
    """Makes click options, each with the default of its field in `options`."""

    def option(name: str, help: str, **settings: Any) -> Decorator:
        default = getattr(options, name.lstrip("-").replace("-", "_"))
        shown = default not in (None, False, ())
        return click.option(name, default=default, show_default=shown, help=help, **settings)

    return option


def device_option(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> str | None:
    if value is not None and DEVICE.fullmatch(value) is None:
        raise click.BadParameter(
            f"{value!r} is not a device{HINT}use cpu, cuda, or one of several GPUs, such as cuda:1"
        )
    return value


def plan_options(command: Command) -> Command:
    """Adds the options of what is done with an artifact's plan on this machine."""
    option = option_with_default_of(OpeningOptions)
    for add in (
        option(
            "--link-bandwidth",
            "Limit the weight stream to SIZE per second (disk, or PCIe on a GPU).",
            callback=size_option,
            metavar="SIZE",
        ),
        option(
            "--device", "cpu, or one GPU such as cuda:1.", callback=device_option, metavar="DEVICE"
        ),
        option(
            "--trust-kernels",
            "Load the pre-built kernels and graphs in ARTIFACT. They are executable code: for "
            "trusted artifacts only.",
            is_flag=True,
        ),
        option("--no-replan", "Use the stored plan as it is, on any machine.", is_flag=True),
        option(
            "--vram",
            "Budget: re-plan for SIZE if the plan needs more.",
            callback=size_option,
            metavar="SIZE",
        ),
        option("--no-graphs", "On a GPU: no CUDA graphs for the draft.", is_flag=True),
    ):  # --help names the last one first
        command = add(command)
    return command  # fmt: skip


def drafter_option(command: Command) -> Command:
    return option_with_default_of(OpeningOptions)(
        "--drafter",
        "The 4-bit substitute, prompt lookup, a draft head or a draft model. substitute+X: X "
        "proposes, the substitute checks.  [default: the plan's]",
        type=click.Choice(get_args(DrafterName)),
    )(command)


def check_opening(options: OpeningOptions, needs: Iterable[tuple[str, str]] = ()) -> None:
    """Raises SubspecError(USAGE) for what click cannot see. needs: pairs beyond NEEDS."""
    for flag, other in (*NEEDS, *needs):
        if is_given(options, flag) and not is_given(options, other):
            message = f"{spelled(flag)} was given without {spelled(other)}"
            raise SubspecError(Exit.USAGE, message, f"add {spelled(other)}")
    if options.no_speculation and options.drafter is not None:
        message = "--no-speculation and --drafter exclude each other"
        raise SubspecError(Exit.USAGE, message, "leave one out")
    if options.model is None and options.vram and options.no_replan:
        message = "--vram and --no-replan exclude each other"
        raise SubspecError(Exit.USAGE, message, "leave one out")


def is_given(options: OpeningOptions, field: str) -> bool:
    return bool(getattr(options, field) != getattr(type(options), field))


def spelled(field: str) -> str:
    names = {"as_json": "--json", "prompt": "a PROMPT", "verify": "--verify lossy"}
    return names.get(field, "--" + field.replace("_", "-"))
