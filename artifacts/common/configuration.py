"""Where the value of an option comes from: default < configuration file < environment < command
line. A file has one value for each long option, and is read as the command line is."""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import click
import yaml
from click.core import ParameterSource

from subspec.artifacts.common.command import HINT, Program, fail
from subspec.artifacts.common.errors import Exit, SubspecError

LARGEST_FILE = 64 << 10  # bytes
NOT_CONFIGURED = ("config", "print-config", "help", "version")
ORIGINS = {
    ParameterSource.COMMANDLINE: "the command line",
    ParameterSource.ENVIRONMENT: "the environment",
    ParameterSource.DEFAULT_MAP: "the configuration file",
}


class Configured(Program):
    """A command whose options also come from --config FILE and from the environment, as
    SUBSPEC_RUN_MAX_TOKENS for subspec-run's --max-tokens."""

    def __init__(self, name: str, program: str = "", **settings: Any) -> None:
        """program: of which it is a command, if it is one."""
        super().__init__(name, **settings)
        self.params += [
            click.Option(
                ["--config"],
                type=click.Path(path_type=Path),
                metavar="FILE",
                is_eager=True,  # before the options that it has values for
                callback=read_configuration,
                help="Options from a YAML file; keys are long options.",
            ),
            click.Option(
                ["--print-config"],
                is_flag=True,
                help="Print each option's value and origin, and exit.",
            ),
        ]
        for option in self.params:
            if isinstance(option, click.Option) and long_name(option) not in NOT_CONFIGURED[1:]:
                option.envvar = variable_name(f"{program} {name}".strip(), option)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        given = list(args)
        try:
            rest = super().parse_args(ctx, args)
        except click.BadParameter as error:
            raise from_where(error) from None
        del ctx.params["config"]
        if ctx.params.pop("print_config"):
            print_configuration(ctx, given)
            ctx.exit()
        return rest

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SubspecError as error:
            if ctx.params.get("as_json"):  # which need not be said on the command line
                fail(error, as_json=True)
            raise


def variable_name(command: str, option: click.Option) -> str:
    """ "subspec-run", --max-tokens -> "SUBSPEC_RUN_MAX_TOKENS"."""
    return f"{command} {long_name(option)}".translate(str.maketrans(" -", "__")).upper()


def long_name(option: click.Parameter) -> str:
    return option.opts[-1].lstrip("-")


def configured(command: click.Command) -> dict[str, click.Option]:
    """The options that a file may have, by their long names."""
    options = {long_name(one): one for one in command.params if isinstance(one, click.Option)}
    return {name: one for name, one in options.items() if name not in NOT_CONFIGURED}


def from_where(error: click.BadParameter) -> click.BadParameter:
    """The same error, of a value that is not on the command line, with its variable."""
    option, context = error.param, error.ctx
    if option is None or context is None or option.name is None:
        return error
    if context.get_parameter_source(option.name) == ParameterSource.ENVIRONMENT:
        error.param_hint = f"'--{long_name(option)}' of the environment's {option.envvar}"
    return error


# ---- a file ----


def read_configuration(
    context: click.Context, parameter: click.Parameter, file: Path | None
) -> Path | None:
    """Callback of --config: what the file says replaces defaults. Raises SubspecError(USAGE)."""
    if file is not None:
        context.default_map = values_of(context, file)
    return file


def values_of(context: click.Context, file: Path) -> dict[str, str | list[str]]:
    """By parameter: text as it is written, a list of texts for an option that may be repeated."""
    known = configured(context.command)
    found = dict[str, str | list[str]]()
    for key_node, node in yaml_root(file).value:
        key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
        place = f"{file}, line {key_node.start_mark.line + 1}"
        if key not in known:
            raise unknown_key(place, key, known)
        option = known[key]
        assert option.name is not None
        if option.name in found:
            raise wrong(f"{place}: {key} is there twice", "leave one out")
        value = texts_of(node, option.multiple)
        if isinstance(value, Got):
            raise wrong(f"{place}: {key} is {value.what}, expected {expected_of(option)}")
        check_value(context, f"{place}: {key}", option, value)
        found[option.name] = value
    return found


@dataclass(frozen=True)
class Got:
    """What is there instead of a value."""

    what: str


def texts_of(node: yaml.Node, multiple: bool) -> str | list[str] | Got:
    listed = node.value if isinstance(node, yaml.SequenceNode) else [node]
    if isinstance(node, yaml.SequenceNode) and not multiple:
        return Got("a list")
    if not all(isinstance(one, yaml.ScalarNode) for one in listed):
        return Got("a mapping" if isinstance(node, yaml.MappingNode) else "a list of lists")
    if any(one.tag != yaml.BaseLoader.DEFAULT_SCALAR_TAG for one in listed):
        return Got("a value with a YAML tag")
    texts = [str(one.value) for one in listed]
    return texts if multiple else texts[0]


def yaml_root(file: Path) -> yaml.MappingNode:
    """The file's one mapping, as nodes: nothing of it becomes an object. Raises
    SubspecError(USAGE)."""
    try:
        with open(file, "rb") as opened:
            raw = opened.read(LARGEST_FILE + 1)
        if len(raw) > LARGEST_FILE:
            raise wrong(f"--config {file} has more than {LARGEST_FILE} bytes")
        root = yaml.compose(raw.decode("utf-8"), Loader=yaml.BaseLoader)
    except OSError as error:
        raise wrong(f"--config {file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise wrong(f"--config {file} is not UTF-8: {error.reason}") from None
    except RecursionError:
        raise wrong(f"--config {file} is nested too deep, expected key: value") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise wrong(f"--config {file}{line} is not YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise wrong(f"--config {file} is not YAML: {error}") from None
    if root is None:
        return yaml.MappingNode("", [])
    if not isinstance(root, yaml.MappingNode):
        raise wrong(f"--config {file} has no keys", "write lines such as: max-tokens: 256")
    return root


def check_value(
    context: click.Context, place: str, option: click.Option, value: str | list[str]
) -> None:
    """Raises SubspecError(USAGE) for what the command line would refuse."""
    try:
        if "" in (value if option.multiple else [value]):
            raise click.BadParameter("")
        option.process_value(context, value)
    except click.UsageError as error:
        got = repr(value) if value else "empty"
        hint = error.message.partition(HINT)[2]
        raise wrong(f"{place} is {got}, expected {expected_of(option)}", hint) from None


def expected_of(option: click.Option) -> str:
    kind = option.type
    if option.is_flag:
        return "true or false"
    if isinstance(kind, click.Choice):
        said = "one of " + ", ".join(map(str, kind.choices))
    elif isinstance(kind, click.IntRange | click.FloatRange):
        said = "a whole number" if isinstance(kind, click.IntRange) else "a number"
        if kind.min is not None:
            said += f" {'above' if kind.min_open else 'from'} {kind.min}"
        if kind.max is not None:
            said += f" {'below' if kind.max_open else 'to'} {kind.max}"
    else:
        said = option.metavar or kind.name
    return f"{said}, or a list of them" if option.multiple else said


def unknown_key(place: str, key: str | None, known: dict[str, click.Option]) -> SubspecError:
    if key is None:
        return wrong(f"{place}: a key is not text, expected the name of an option")
    near = get_close_matches(key.replace("_", "-").lstrip("-"), known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(sorted(known))}"
    return wrong(f"{place}: {key!r} is not an option of this command", hint)


def wrong(message: str, hint: str = "docs/commands.md describes the file") -> SubspecError:
    return SubspecError(Exit.USAGE, message, hint)


# ---- what --print-config prints ----


def print_configuration(context: click.Context, given: Sequence[str]) -> None:
    """All options on stdout, as a file for --config: those without a value are comments."""
    options = configured(context.command)
    on_line, _, _ = context.command.make_parser(context).parse_args(list(given))
    rows = []
    for key, option in options.items():
        assert option.name is not None
        source = context.get_parameter_source(option.name) or ParameterSource.DEFAULT
        origin = ORIGINS.get(source, "default")
        if source == ParameterSource.ENVIRONMENT:
            origin += f"'s {option.envvar}"
        value = written_value(context, option, source, on_line)
        empty = value in (None, [], "")
        rows.append((f"# {key}:" if empty else yaml_line(key, value), origin))
    width = max(len(line) for line, _ in rows)
    for line, origin in rows:
        click.echo(f"{line:<{width}}  # {origin}")


def written_value(
    context: click.Context, option: click.Option, source: ParameterSource, on_line: dict[str, Any]
) -> Any:
    """As a person wrote it, or the default: 24GB, not 24000000000."""
    name = option.name or ""
    if option.is_flag:
        return bool(context.params[name])
    if source == ParameterSource.COMMANDLINE:
        value = on_line[name]
    elif source == ParameterSource.ENVIRONMENT:
        value = os.environ[str(option.envvar)]
        value = option.type.split_envvar_value(value) if option.multiple else value
    elif source == ParameterSource.DEFAULT_MAP:
        value = context.lookup_default(name)
    elif option.multiple or not isinstance(context.params[name], tuple):
        value = context.params[name]
    else:  # a callback has taken it apart
        value = option.get_default(context)
    return [str(one) for one in value] if option.multiple else value


def yaml_line(key: str, value: Any) -> str:
    """`key: value`, quoted only where the file would be read as something else."""
    many = isinstance(value, list)
    texts = value if many else [str(value).lower() if isinstance(value, bool) else str(value)]

    def line(written: list[str]) -> str:
        return f"{key}: [{', '.join(written)}]" if many else f"{key}: {written[0]}"

    with suppress(yaml.YAMLError):
        [(_, node)] = yaml.compose(line(texts), Loader=yaml.BaseLoader).value
        if texts_of(node, many) == (texts if many else texts[0]):
            return line(texts)
    quoted = [yaml.safe_dump(one, default_style='"', width=1 << 20).strip() for one in texts]
    return line(quoted)
