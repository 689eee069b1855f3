"""How far something has come: the name of its stage, and the share of it that is done."""

from collections.abc import Callable

Progress = Callable[[str, float], None]


def unseen(stage: str, share: float) -> None:
    """A Progress that shows nothing."""
