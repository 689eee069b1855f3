"""Grammars compiled by llguidance, as the engine's Constraint (runtime/model/constraint.py).

V = vocabulary
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy
import torch
from llguidance import LLMatcher, LLParserLimits
from torch import Tensor

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.runtime.server.grammar_tokens import GrammarTokens

Result = TypeVar("Result")

MAX_GRAMMAR_BYTES = 256 << 10
COMPILE_SECONDS = 1.0
# A compiled grammar runs in the engine's thread, where all answers wait for it: with
# llguidance's own limits a step may take a second, with these about 0.1, a usual one 0.02 ms.
INITIAL_FUEL = 500_000
STEP_FUEL = 50_000
STEP_ITEMS = 20_000
ROW_ITEMS = 2_000
LEXER_STATES = 30_000  # of 1 to 2 KB each
GRAMMAR_SYMBOLS = 20_000
HINT = "make the grammar simpler"


def compile_grammar(tokens: GrammarTokens, grammar: str, what: str) -> LLMatcher:
    """Compile `grammar`: Lark, or llguidance's JSON list of grammars; `what` names it in errors.
    Nothing it refers to is fetched. Raises SubspecError(USAGE) if it is invalid, unsupported, can
    never be satisfied, or exceeds the limits."""
    if (size := len(grammar.encode("utf-8", "replace"))) > MAX_GRAMMAR_BYTES:
        raise SubspecError(
            Exit.USAGE, f"{what} has {size} bytes, expected at most {MAX_GRAMMAR_BYTES}", HINT
        )
    begin = time.monotonic()
    matcher = _matcher(tokens, grammar)
    _check(matcher, what)
    _try_a_step(matcher, tokens, what)
    if (seconds := time.monotonic() - begin) > COMPILE_SECONDS:
        raise _too_slow(what, seconds)
    return matcher


class GrammarThreads:
    """Threads that compile grammars off the event loop; two, so that a slow one does not block
    others. Threads cannot be stopped, but the limits bound their work."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(2, "grammar")

    async def run(self, work: Callable[[], Result], what: str) -> Result:
        """Return work(). Raises its exceptions, or SubspecError(USAGE) if it runs longer than twice
        COMPILE_SECONDS: by then compile_grammar should have failed itself."""
        loop = asyncio.get_running_loop()
        begun = asyncio.Event()

        def begin() -> Result:
            loop.call_soon_threadsafe(begun.set)
            return work()

        future = loop.run_in_executor(self._threads, begin)
        await begun.wait()
        done, _ = await asyncio.wait([future], timeout=2 * COMPILE_SECONDS)
        if not done:
            future.add_done_callback(lambda late: late.exception())  # its result is not needed
            raise _too_slow(what, 2 * COMPILE_SECONDS)
        return future.result()

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


class GrammarConstraint:
    """A grammar from its beginning. `allowed` and `push` raise SubspecError(USAGE) if a state
    exceeds the limits or no token can follow. To continue after that, `rollback` recompiles the
    grammar."""

    def __init__(self, tokens: GrammarTokens, grammar: str, what: str) -> None:
        """Compile the grammar. Raises SubspecError as compile_grammar does."""
        self._tokens = tokens
        self._grammar = grammar
        self._what = what
        # None: the last one failed. Its error is permanent and shared with its copies.
        self._matcher: LLMatcher | None = compile_grammar(tokens, grammar, what)
        self._pushed: list[int] = []  # tokens pushed to the matcher
        self._allowed: Tensor | None = None  # None: not computed in this state

    def allowed(self) -> Tensor:
        """bool [V]; includes end tokens where the grammar may end."""
        if self._allowed is None:
            self._allowed = self._mask()
        return self._allowed

    def push(self, token: int) -> None:
        """Advance by one token. Raises ValueError for one that was not allowed, or an end token."""
        if token in self._tokens.ends:
            raise ValueError(f"token {token} is no part of {self._what}: it ends the answer")
        matcher = self._usable()
        if not matcher.consume_token(token):
            error = matcher.get_error()
            self._matcher = None
            if "doesn't satisfy the grammar" in error or "out of range" in error:
                raise ValueError(f"token {token} is not allowed by {self._what}")
            raise _too_complex(self._what, error)
        self._pushed.append(token)
        self._allowed = None

    def rollback(self, num_tokens: int) -> None:
        if num_tokens > len(self._pushed):
            raise ValueError(f"pop of {num_tokens} tokens, {len(self._pushed)} were pushed")
        if num_tokens:
            del self._pushed[len(self._pushed) - num_tokens :]
            self._allowed = None
            if self._matcher is not None and not self._matcher.rollback(num_tokens):
                self._matcher = None
        self._usable()

    def _usable(self) -> LLMatcher:
        """Return the matcher, advanced by the pushed tokens."""
        if self._matcher is None:
            self._matcher = _matcher(self._tokens, self._grammar)
            self._matcher.consume_tokens(self._pushed)
        return self._matcher

    def _mask(self) -> Tensor:
        vocab_size = self._tokens.vocab_size
        bits = numpy.empty(-(-vocab_size // 32), numpy.uint32)
        matcher = self._usable()
        matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        if matcher.is_error():  # the mask then has the end tokens
            error = matcher.get_error()
            self._matcher = None
            raise _too_complex(self._what, error)
        flags = numpy.unpackbits(bits.view(numpy.uint8), count=vocab_size, bitorder="little")
        return torch.from_numpy(flags).view(torch.bool)


def _matcher(tokens: GrammarTokens, grammar: str) -> LLMatcher:
    limits = LLParserLimits(
        max_items_in_row=ROW_ITEMS,
        initial_lexer_fuel=INITIAL_FUEL,
        step_lexer_fuel=STEP_FUEL,
        step_max_items=STEP_ITEMS,
        max_lexer_states=LEXER_STATES,
        max_grammar_size=GRAMMAR_SYMBOLS,
        verbose_errors=False,
    )
    return LLMatcher(tokens.tokenizer, grammar, log_level=0, limits=limits)


def _try_a_step(matcher: LLMatcher, tokens: GrammarTokens, what: str) -> None:
    """Try one step. Raises SubspecError(USAGE) for a grammar that cannot begin or roll back."""
    bits = numpy.frombuffer(matcher.compute_bitmask(), numpy.uint8)
    _check(matcher, what)
    allowed = numpy.flatnonzero(numpy.unpackbits(bits, count=tokens.vocab_size, bitorder="little"))
    first = next((int(token) for token in allowed if int(token) not in tokens.ends), None)
    if first is not None:
        matcher.consume_token(first)
        _check(matcher, what)
        matcher.compute_bitmask()
        _check(matcher, what)
        matcher.rollback(1)
        _check(matcher, what)


def _check(matcher: LLMatcher, what: str) -> None:
    if matcher.is_error():
        raise SubspecError(
            Exit.USAGE, f"{what} cannot be used: {reason(matcher.get_error())}", HINT
        )


def reason(error: str) -> str:
    """One line of an llguidance error, without the grammar that it may repeat."""
    lines = [line.strip() for line in error.split("<non-verbose/>")[0].splitlines()]
    first = next((line for line in lines if line), "no reason given")
    last = next((line for line in lines if line.startswith("error: ")), "")  # of a regex
    known = {
        "NoExtensionBias": "nothing can satisfy it",
        "NoExtension": "nothing can satisfy it",
        "ParserTooComplex": "it is too complex",
        "LexerTooComplex": "it is too complex",
    }
    first = first if len(first) <= 200 else first[:200] + "…"
    return known.get(first, f"{first} ({last[7:200]})" if last else first)


def _too_slow(what: str, seconds: float) -> SubspecError:
    return SubspecError(
        Exit.USAGE,
        f"{what} takes more than {seconds:.1f} s to compile, expected at most {COMPILE_SECONDS} s",
        HINT,
    )


def _too_complex(what: str, error: str) -> SubspecError:
    return SubspecError(Exit.USAGE, f"{what} cannot be followed further: {reason(error)}", HINT)
