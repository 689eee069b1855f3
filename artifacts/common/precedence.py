"""Options that do not go together: which of them counts, by where each comes from."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import click
from click.core import ParameterSource

ORIGINS = {  # the highest first
    ParameterSource.COMMANDLINE: "the command line",
    ParameterSource.ENVIRONMENT: "the environment",
    ParameterSource.DEFAULT_MAP: "the configuration file",
    ParameterSource.DEFAULT: "default",
}
Pair = tuple[str, str]


@dataclass(frozen=True)
class Rules:
    """Pairs of a command's parameters, by their names in Python. A parameter is given if its value
    is not its default."""

    needs: tuple[Pair, ...] = ()  # the first needs the second
    excludes: tuple[Pair, ...] = ()
    # Of all values; pairs that are not here hold in any case.
    only_if: Mapping[Pair, Callable[[Mapping[str, Any]], bool]] = field(default_factory=dict)

    def hold(self, pair: Pair, values: Mapping[str, Any]) -> bool:
        return pair not in self.only_if or self.only_if[pair](values)


@dataclass(frozen=True)
class Overridden:
    source: ParameterSource  # of the value that does not count
    by: str  # "drafter of the command line"


def settle(context: click.Context, rules: Rules) -> dict[str, Overridden]:
    """Reset parameters in `context.params` to their defaults: those that exclude one from a higher
    source, and those that need one that a higher source has unset. Contradictions within one source
    are left as they are."""
    parameters = {one.name: one for one in context.command.params if one.name}
    named = {name for pair in (*rules.needs, *rules.excludes) for name in pair} & set(parameters)
    defaults = {name: default_of(context, parameters[name]) for name in named}
    decided = {name: source_of(context, name) for name in named}  # the source of its present value
    sources = list(ORIGINS)
    overridden = dict[str, Overridden]()

    def lost_to(source: ParameterSource) -> Iterator[Pair]:
        given = {name for name in named if context.params[name] != defaults[name]}
        for loser, winner in contradictions(rules, given, context.params):
            lower = sources[sources.index(source) + 1 :]
            if decided.get(winner) == source and decided[loser] in lower:
                yield loser, winner

    for source in sources:  # from the top: what is overridden overrides nothing
        while pair := next(lost_to(source), None):
            loser, winner = pair
            known = overridden.get(winner)
            by = known.by if known else said(parameters[winner], source)
            overridden[loser] = Overridden(decided[loser], by)
            context.params[loser] = defaults[loser]
            context.set_parameter_source(loser, ParameterSource.DEFAULT)
            decided[loser] = source
    return overridden


def contradictions(rules: Rules, given: set[str], values: Mapping[str, Any]) -> Iterator[Pair]:
    """Pairs of (parameter to reset, parameter that contradicts it)."""
    for first, second in rules.excludes:
        if {first, second} <= given and rules.hold((first, second), values):
            yield first, second
            yield second, first
    for first, second in rules.needs:
        if first in given and second not in given and rules.hold((first, second), values):
            yield first, second


def default_of(context: click.Context, parameter: click.Parameter) -> Any:
    """The parameter's default as the command would get it, without the configuration file."""
    return parameter.process_value(context, parameter.to_info_dict().get("default"))


def source_of(context: click.Context, name: str) -> ParameterSource:
    return context.get_parameter_source(name) or ParameterSource.DEFAULT


def said(parameter: click.Parameter, source: ParameterSource) -> str:
    name = str(parameter.name).upper()  # ARTIFACT
    if isinstance(parameter, click.Option):
        name = parameter.opts[-1].lstrip("-")  # the key of a file
    return f"{name} of {ORIGINS[source]}"
