"""A configuration file: YAML with one value for each long option of a command, read as the command
line is."""

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import click
import yaml

from subspec.artifacts.common.command import HINT
from subspec.artifacts.common.errors import Exit, SubspecError

MAX_FILE = 64 << 10  # bytes
NULLS = ("null", "Null", "NULL", "~")  # without quotes: the file does not set the option


def values_of(
    context: click.Context, file: Path, known: Mapping[str, click.Option]
) -> dict[str, str | list[str]]:
    """Parameter name -> text as written, or a list of texts for an option that may be repeated.
    known: options by key. Raises SubspecError(USAGE)."""
    found = dict[str, str | list[str]]()
    seen = set[str]()
    for key_node, node in yaml_root(file).value:
        key: str | None = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
        place = f"{file}, line {key_node.start_mark.line + 1}"
        if key is None or key not in known:
            raise unknown_key(place, key, known)
        if key in seen:
            raise wrong(f"{place}: {key} is there twice", "leave one out")
        seen.add(key)
        if is_null(node):
            continue
        option = known[key]
        value = texts_of(node, option.multiple)
        if isinstance(value, Got):
            raise wrong(f"{place}: {key} is {value.what}, expected {expected_of(option)}")
        check_value(context, f"{place}: {key}", option, value)
        assert option.name is not None
        found[option.name] = value
    return found


def is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.style is None and node.value in NULLS


@dataclass(frozen=True)
class Got:
    """Description of a YAML node that is not a value, for errors."""

    what: str


def texts_of(node: yaml.Node, multiple: bool) -> str | list[str] | Got:
    listed = node.value if isinstance(node, yaml.SequenceNode) else [node]
    if isinstance(node, yaml.SequenceNode) and not multiple:
        return Got("a list")
    if not all(isinstance(one, yaml.ScalarNode) for one in listed):
        return Got("a mapping" if isinstance(node, yaml.MappingNode) else "a list of lists")
    if any(is_null(one) for one in listed):
        return Got("a list with null" if multiple else "null")
    if any(one.tag != yaml.BaseLoader.DEFAULT_SCALAR_TAG for one in listed):
        return Got("a value with a YAML tag")
    texts = [str(one.value) for one in listed]
    return texts if multiple else texts[0]


def yaml_root(file: Path) -> yaml.MappingNode:
    """Parse the file's one mapping into YAML nodes; no objects are constructed. Raises
    SubspecError(USAGE)."""
    try:
        with open(file, "rb") as opened:
            raw = opened.read(MAX_FILE + 1)
        if len(raw) > MAX_FILE:
            raise wrong(f"--config {file} has more than {MAX_FILE} bytes")
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


def unknown_key(place: str, key: str | None, known: Mapping[str, click.Option]) -> SubspecError:
    if key is None:
        return wrong(f"{place}: a key is not text, expected the name of an option")
    near = get_close_matches(key.replace("_", "-").lstrip("-"), known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(sorted(known))}"
    return wrong(f"{place}: {key!r} is not an option of this command", hint)


def wrong(message: str, hint: str = "docs/commands.md describes the file") -> SubspecError:
    return SubspecError(Exit.USAGE, message, hint)
