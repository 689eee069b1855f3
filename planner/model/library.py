"""transformers, called on files that somebody else wrote."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from subspec.artifacts.common.errors import Exit, SubspecError

MAX_REASON = 160  # characters


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Silence transformers on stderr in the block, and turn whatever it raises into
    SubspecError(CORRUPT), one sentence that begins with `what`, the file."""
    from transformers import logging as voice  # 1 s, and torch's: only for planning

    before = voice.get_verbosity()
    voice.set_verbosity(logging.CRITICAL)
    try:
        yield
    except SubspecError:
        raise
    except BaseException as error:
        # A panic of a library in Rust is no Exception. Those that are have no class of their own:
        # TypeError, KeyError, ImportError, ...
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:MAX_REASON] or "no reason given"
        raise SubspecError(
            Exit.CORRUPT,
            f"{what} cannot be read by transformers: {type(error).__name__}: {reason}",
        ) from error
    finally:
        voice.set_verbosity(before)
