"""Sources of an option's value: default < configuration file < environment < command line."""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from copy import copy
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import click
import yaml
from click.core import ParameterSource

from subspec.artifacts.common.command import HINT, Program, fail, say
from subspec.artifacts.common.configuration_file import texts_of, values_of
from subspec.artifacts.common.errors import SubspecError
from subspec.artifacts.common.precedence import ORIGINS, Overridden, Rules, settle, source_of

NOT_CONFIGURED = ("config", "print-config", "help", "version")


class Configured(Program):
    """A command whose options also come from --config FILE and from the environment, as
    SUBSPEC_RUN_MAX_TOKENS for subspec-run's --max-tokens. Each flag has an opposite, so that the
    command line can take back what these say."""

    def __init__(
        self, name: str, program: str = "", rules: Rules | None = None, **settings: Any
    ) -> None:
        """program: the program that this is a subcommand of; "": none."""
        super().__init__(name, **settings)
        self.rules = rules or Rules()
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
        if flags_of(self):
            self.epilog = "Each flag has an opposite: --no-X for --X, and --X for --no-X."

    def make_parser(self, ctx: click.Context) -> Any:
        """The parser, with the flags' opposites, which --help does not list."""
        parser = super().make_parser(ctx)
        for name, option in flags_of(self).items():
            parser.add_option(
                option, [opposite(f"--{name}")], option.name, action="store_const", const=False
            )
        return parser

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            on_line, _, _ = self.make_parser(ctx).parse_args(list(args))
            prints = "print_config" in on_line
            command = with_nothing_required(self) if prints else self
            rest = click.Command.parse_args(command, ctx, args)
        except click.BadOptionUsage as error:
            raise with_opposite(error, self) from None
        except click.BadParameter as error:
            raise from_where(error) from None
        warn_of_unknown_variables(ctx)
        overridden = settle(ctx, self.rules)
        del ctx.params["config"], ctx.params["print_config"]
        if prints:
            print_configuration(ctx, on_line, overridden)
            ctx.exit()
        return rest

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SubspecError as error:
            if ctx.params.get("as_json"):  # the file or the environment may set it
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


def read_configuration(
    context: click.Context, parameter: click.Parameter, file: Path | None
) -> Path | None:
    """Callback of --config: what the file says replaces defaults. Raises SubspecError(USAGE)."""
    if file is not None:
        context.default_map = values_of(context, file, configured(context.command))
    return file


def from_where(error: click.BadParameter) -> click.BadParameter:
    """Name the environment variable in the error of a value that comes from it."""
    option, context = error.param, error.ctx
    if option is None or context is None or option.name is None:
        return error
    if context.get_parameter_source(option.name) == ParameterSource.ENVIRONMENT:
        error.param_hint = f"'--{long_name(option)}' of the environment's {option.envvar}"
    return error


def warn_of_unknown_variables(context: click.Context) -> None:
    """Print a note for each variable with the program's prefix that is none of its options."""
    program = context.find_root().command
    commands = program.commands.values() if isinstance(program, click.Group) else [program]
    options = [one for command in commands for one in command.params]
    known = [str(one.envvar) for one in options if one.envvar is not None]
    for variable in sorted(set(os.environ) - set(known)):
        if variable.startswith(f"{program.name}_".replace("-", "_").upper()):
            near = get_close_matches(variable, known, n=1)
            meant = f"; did you mean {near[0]}?" if near else ""
            what = f"is not an option of {program.name}{meant}"
            say(f"note: the environment variable {variable} {what}")


# ---- flags ----


def flags_of(command: click.Command) -> dict[str, click.Option]:
    return {name: one for name, one in configured(command).items() if one.is_flag}


def opposite(flag: str) -> str:
    """ "--raw" -> "--no-raw", "--no-replan" -> "--replan"."""
    return "--" + flag[len("--no-") :] if flag.startswith("--no-") else "--no-" + flag[2:]


def with_opposite(error: click.BadOptionUsage, command: click.Command) -> click.BadOptionUsage:
    """Add the flag's opposite as a hint to the error of --flag=false."""
    flags = [f"--{name}" for name in flags_of(command)]
    if error.option_name not in (*flags, *map(opposite, flags)):
        return error
    message = f"{error.message}{HINT}{opposite(error.option_name)} is its opposite"
    return click.BadOptionUsage(error.option_name, message, error.ctx)


# ---- what --print-config prints ----


def with_nothing_required(command: click.Command) -> click.Command:
    """A copy of the command without required parameters, for --print-config."""
    changed = copy(command)
    changed.params = [copy(one) for one in command.params]
    for one in changed.params:
        one.required = False
    return changed


def print_configuration(
    context: click.Context, on_line: Mapping[str, Any], overridden: Mapping[str, Overridden]
) -> None:
    """Print all options as a file for --config; those without a value and those that are overridden
    are comments. on_line: parameters given on the command line."""
    rows = []
    for key, option in configured(context.command).items():
        assert option.name is not None
        lost = overridden.get(option.name)
        source = lost.source if lost else source_of(context, option.name)
        origin = ORIGINS[source]
        if source == ParameterSource.ENVIRONMENT:
            origin += f"'s {option.envvar}"
        value = written_value(context, option, source, on_line)
        if option.is_flag:
            value = lost is not None or bool(context.params[option.name])
        if value in (None, [], ""):
            rows.append((f"# {key}:", origin))
        elif lost:
            rows.append((f"# {yaml_line(key, value)}", f"{origin}, overridden by {lost.by}"))
        else:
            rows.append((yaml_line(key, value), origin))
    width = max(len(line) for line, _ in rows)
    for line, origin in rows:
        click.echo(f"{line:<{width}}  # {origin}")


def written_value(
    context: click.Context,
    option: click.Option,
    source: ParameterSource,
    on_line: Mapping[str, Any],
) -> Any:
    """Text of an option's value as the user wrote it, or its default: 24GB, not 24000000000."""
    name = option.name or ""
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

    def line(written: Sequence[str]) -> str:
        return f"{key}: [{', '.join(written)}]" if many else f"{key}: {written[0]}"

    with suppress(yaml.YAMLError):
        [(_, node)] = yaml.compose(line(texts), Loader=yaml.BaseLoader).value
        if texts_of(node, many) == (texts if many else texts[0]):
            return line(texts)
    quoted = [yaml.safe_dump(one, default_style='"', width=1 << 20).strip() for one in texts]
    return line(quoted)
