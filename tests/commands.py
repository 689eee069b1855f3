"""Commands in this process."""

import click
import pytest


def printed(
    capsys: pytest.CaptureFixture[str], command: click.Command, *words: object
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    try:
        code = command.main([str(word) for word in words]) or 0
    except SystemExit as end:
        code = int(end.code or 0)
    said = capsys.readouterr()
    return code, said.out, said.err
