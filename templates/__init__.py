"""Text that the planner renders: jinja2 templates, data rather than code."""

from jinja2 import Environment, PackageLoader, StrictUndefined, Template


def load(name: str) -> Template:
    """The template `name`.jinja; what is inserted in a .html page is escaped."""
    environment = Environment(
        loader=PackageLoader("subspec.templates", ""),
        autoescape=name.endswith(".html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(f"{name}.jinja")
