"""Options shared by the commands that run a model: artifact, opening, drafter, verification."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

import click

from subspec.artifacts.common.command import HINT, finite_option, size_option
from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.common.precedence import Rules
from subspec.artifacts.plan import DrafterName, Method, method_of
from subspec.runtime.lossy import Lossy, ThresholdMethod, Verify

DRAFT_TEMPERATURES = (0.01, 100.0)
DEVICE = re.compile(r"cpu|cuda(:[0-9]{1,3})?", re.ASCII)
OPENING = Rules(
    needs=(
        ("model", "vram"),
        ("context", "model"),
        ("rehearse", "model"),
        ("draft_model", "model"),
        ("threshold_method", "verify"),
        ("threshold", "verify"),
        ("window", "verify"),
    ),
    excludes=(
        ("no_speculation", "drafter"),
        ("no_speculation", "draft_temperature"),
        ("no_speculation", "verify"),
        ("drafter", "draft_temperature"),
        ("vram", "no_replan"),
    ),
    only_if={
        ("drafter", "draft_temperature"): lambda given: given["drafter"] == "lookup",
        # With --model, --vram is the budget of its plan, which may be used as stored.
        ("vram", "no_replan"): lambda given: given.get("model") is None,
    },
)

Command = Callable[..., None]
Decorator = Callable[[Command], Command]


@dataclass(frozen=True, kw_only=True)
class OpeningOptions:
    """Options as parsed by click."""

    model: str | None = None
    context: int | None = None
    sequences: int | None = None
    rehearse: str | None = None
    draft_model: str | None = None
    no_speculation: bool = False
    drafter: DrafterName | None = None
    draft_temperature: float | None = None  # None: that of the plan's trees
    verify: Verify = "exact"
    threshold_method: ThresholdMethod = Lossy.threshold_method
    threshold: float = Lossy.threshold
    window: int = Lossy.window
    no_graphs: bool = False
    vram: int | None = None
    no_replan: bool = False
    trust_kernels: bool = False
    device: str | None = None
    link_bandwidth: int | None = None
    no_record: bool = False

    @property
    def method(self) -> Method | None:
        """The decoding method; None: the plan's."""
        if self.no_speculation:
            return "plain"
        return None if self.drafter is None else method_of(self.drafter)

    @property
    def lossy(self) -> Lossy | None:
        if self.verify == "exact":
            return None
        return Lossy(self.threshold_method, self.threshold, self.window)


def option_with_default_of(options: type[OpeningOptions]) -> Callable[..., Decorator]:
    """Return a factory of click options whose defaults are the fields of `options`."""

    def option(name: str, help: str, **settings: Any) -> Decorator:
        default = getattr(options, name.lstrip("-").replace("-", "_"))
        shown = default not in (None, False, ())
        return click.option(name, default=default, show_default=shown, help=help, **settings)

    return option


def all_of(*options: Decorator) -> Decorator:
    """Combine options, which `--help` shows in this order."""

    def add(command: Command) -> Command:
        for one in reversed(options):
            command = one(command)
        return command

    return add


def device_option(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> str | None:
    if value is not None and DEVICE.fullmatch(value) is None:
        raise click.BadParameter(
            f"{value!r} is not a device{HINT}use cpu, cuda, or one of several GPUs, such as cuda:1"
        )
    return value


option = option_with_default_of(OpeningOptions)
# How an artifact's plan is used on this machine.
plan_options = all_of(
    option("--no-graphs", "On a GPU: no CUDA graphs for the draft.", is_flag=True),
    option(
        "--vram", "Budget: re-plan for SIZE if the plan needs more.",
        callback=size_option, metavar="SIZE",
    ),
    option("--no-replan", "Use the stored plan as it is, on any machine.", is_flag=True),
    option(
        "--trust-kernels",
        "Load the pre-built kernels and graphs in ARTIFACT. They are executable code: for trusted "
        "artifacts only.",
        is_flag=True,
    ),
    option("--device", "cpu, or one GPU such as cuda:1.", callback=device_option, metavar="DEVICE"),
    option(
        "--link-bandwidth", "Limit the weight stream to SIZE per second (disk, or PCIe on a GPU).",
        callback=size_option, metavar="SIZE",
    ),
)  # fmt: skip
# How tokens are drafted; the output does not depend on it.
drafting_options = all_of(
    option(
        "--no-speculation", "Disable speculative decoding; the tokens stay the same.", is_flag=True
    ),
    option(
        "--drafter",
        "The 4-bit substitute, prompt lookup, a draft head or a draft model. substitute+X: X "
        "proposes, the substitute checks.  [default: the plan's]",
        type=click.Choice(get_args(DrafterName)),
    ),
    option(
        "--draft-temperature",
        "Divide the draft's logits by T where its tokens are ranked.  [default: the plan's]",
        type=click.FloatRange(*DRAFT_TEMPERATURES), callback=finite_option, metavar="T",
    ),
)  # fmt: skip
# Lossy acceptance, and the criterion of its threshold.
verify_options = all_of(
    option(
        "--verify",
        "lossy also accepts some drafted tokens that the model would not choose: the answer "
        "changes.",
        type=click.Choice(get_args(Verify)),
    ),
    option(
        "--threshold-method", "With --verify lossy: criterion that the threshold applies to.",
        type=click.Choice(get_args(ThresholdMethod)),
    ),
)  # fmt: skip
lossy_options = all_of(
    verify_options,
    option(
        "--threshold", "With --verify lossy: maximum normalized entropy, or minimum probability.",
        type=click.FloatRange(0, 1), callback=finite_option,
    ),
    option(
        "--window", "With --verify lossy: following tokens that must match the model's choice.",
        type=click.IntRange(min=0), metavar="N",
    ),
)  # fmt: skip


def check_opening(options: OpeningOptions, rules: Rules = OPENING) -> None:
    """Raise SubspecError(USAGE) for combinations that click cannot check."""
    for flag, other in rules.needs:
        if is_given(options, flag) and not is_given(options, other):
            message = f"{spelled(flag)} was given without {spelled(other)}"
            raise SubspecError(Exit.USAGE, message, f"add {spelled(other)}")
    # The pair is also in `rules.excludes`, by which a command line's option unsets a file's: its
    # message would not say that only this drafter has no use for a temperature.
    if options.drafter == "lookup" and options.draft_temperature is not None:
        message = "--draft-temperature was given, and --drafter lookup has no probabilities"
        raise SubspecError(Exit.USAGE, message, "leave one out")
    for flag, other in rules.excludes:
        both = is_given(options, flag) and is_given(options, other)
        if both and rules.hold((flag, other), vars(options)):
            message = f"{spelled(flag)} and {spelled(other)} exclude each other"
            raise SubspecError(Exit.USAGE, message, "leave one out")


def is_given(options: OpeningOptions, field: str) -> bool:
    return bool(getattr(options, field) != getattr(type(options), field))


def spelled(field: str) -> str:
    names = {"as_json": "--json", "prompt": "a PROMPT", "verify": "--verify lossy"}
    return names.get(field, "--" + field.replace("_", "-"))
