"""What a client is told of an error."""

import pytest

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.runtime.server.errors import as_api_error


@pytest.mark.parametrize(
    "hint", ["--raw continues the PROMPT", "plan with --context 99", "run subspec-plan again"]
)
def test_a_hint_about_a_command_line_is_not_for_clients(hint: str) -> None:
    error = as_api_error(SubspecError(Exit.CORRUPT, "the template failed", hint))
    assert (error.status, error.code, error.message) == (
        400, "template_failed", "the template failed",
    )  # fmt: skip


def test_any_other_hint_is_told() -> None:
    error = as_api_error(SubspecError(Exit.USAGE, "it is wrong", "use well-known tokens -- ids"))
    assert error.message == "it is wrong (use well-known tokens -- ids)"
