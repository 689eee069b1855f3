"""Progress of a task: the name of its stage, and the share of the stage that is done."""

from collections.abc import Callable

Progress = Callable[[str, float], None]


def unseen(stage: str, share: float) -> None:
    """A Progress that shows nothing."""
