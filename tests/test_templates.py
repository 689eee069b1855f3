"""Templates load by name, escape in pages, and fail loudly where something is missing."""

import tomllib
from pathlib import Path

import pytest
from jinja2 import Environment, TemplateNotFound, UndefinedError

from subspec.templates import load

ROOT = Path(__file__).parent.parent
NAMES = sorted(path.name.removesuffix(".jinja") for path in (ROOT / "templates").glob("*.jinja"))


@pytest.mark.parametrize("name", NAMES)
def test_every_template_is_valid(name: str) -> None:
    assert load(name).name == f"{name}.jinja"


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_value_is_an_error(name: str) -> None:
    with pytest.raises(UndefinedError):
        load(name).render()


def test_only_pages_escape() -> None:
    def escapes(name: str) -> bool:
        environment: Environment = load(name).environment
        return environment.autoescape is True

    assert (escapes("report.html"), escapes("artifact.md")) == (True, False)


def test_an_unknown_name_is_an_error() -> None:
    with pytest.raises(TemplateNotFound):
        load("nothing.html")


def test_the_wheel_takes_the_templates_along() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    assert "*.jinja" in settings["package-data"]["subspec.templates"]
