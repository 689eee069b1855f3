"""Life cycle of a server process: listen, load, answer, drain, exit."""

import asyncio
import ctypes
import gc
import logging
import os
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Timer
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.common.signals import take
from subspec.runtime.server.admission import Admission, engine_failed, shutting_down
from subspec.runtime.server.generation import Status
from subspec.runtime.server.log_format import NAME
from subspec.runtime.server.middleware import without_brackets

MAX_CONNECTIONS = 512  # above this, idle connections are closed at once
MAX_FILES = 4096  # raised to this at the start if the hard limit allows, as reserve for bursts
OTHER_FILES = 64  # reserved for the engine and for files opened by requests
IDLE_SECONDS = 15.0  # without a complete request
STALLED_SECONDS = 60.0  # without the client reading its response
FINISH_SECONDS = 1  # for sending the rest of responses after their answers end
CLOSE_SECONDS = 2.0  # for the engine to free its memory
WATCH_SECONDS = 0.2
SWEEP_SECONDS = 1.0
TRIM_SECONDS = 5.0
ARENA_MAX, MAX_HEAPS = -8, 2  # glibc's M_ARENA_MAX
FAILED_SECONDS = 4.0  # maximum from the engine's failure to exit


class Server(uvicorn.Server):
    """A uvicorn server that leaves signals to `run`."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def server_of(app: ASGIApp) -> Server:
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=FINISH_SECONDS,
    )
    return Server(config)


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; port 0: a free one. A name with IPv4 and IPv6 addresses listens on
    IPv4, :: on both. Raises SubspecError(RESOURCES)."""
    address = without_brackets(host)
    try:
        listening = socket.create_server(
            (address, port),
            family=family_of(address),
            backlog=1024,
            dualstack_ipv6=address == "::" and socket.has_dualstack_ipv6(),
        )
    except (OSError, OverflowError) as error:
        reason = str(error.strerror if isinstance(error, OSError) else error)
        raise SubspecError(
            Exit.RESOURCES,
            f"cannot listen on {host} port {port}: {reason.partition(' (while')[0]}",
            "give another --host or --port; --port 0 takes a free one",
        ) from None
    # Connections inherit this. asyncio sets it only on sockets that name their protocol; without it
    # a piece of an answer, and the body of a response, waits until the client has acknowledged the
    # last one, which takes it 40 ms.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def family_of(host: str) -> socket.AddressFamily:
    """Return the address family. Raises OSError for a name without an address."""
    found = socket.getaddrinfo(host or None, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    families = {family for family, *_ in found}
    return socket.AF_INET if socket.AF_INET in families else socket.AF_INET6


def address_of(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(
    app: ASGIApp,
    admission: Admission,
    listening: socket.socket,
    shutdown_seconds: float,
    told: Callable[[Status], None],
) -> Exit:
    """Serve until a signal arrives or the engine fails. told: called with the engine's status at
    intervals. A second signal ends the process at once.

    Returns OK after a clean drain; HANGUP, INTERRUPTED or TERMINATED if answers were aborted.
    Raises SubspecError: UNEXPECTED if the engine failed, or its own error if it could not load.
    """
    return asyncio.run(run(app, admission, listening, shutdown_seconds, told))


async def run(
    app: ASGIApp,
    admission: Admission,
    listening: socket.socket,
    shutdown_seconds: float,
    told: Callable[[Status], None],
) -> Exit:
    server = server_of(app)
    with first_signal() as signalled:
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        sweeping = asyncio.create_task(close_idle(server))
        trimming = asyncio.create_task(give_back_memory())
        watching = asyncio.create_task(until_failed(admission, told))
        admission.engine.start()
        first: set[asyncio.Future[Any]] = {signalled, watching, serving}
        await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
        was_ready = watching.result() if watching.done() else True
        for task in (sweeping, trimming, watching):
            task.cancel()
        code = await ended(admission, signalled, shutdown_seconds)
        server.should_exit = True
        await serving
        error = admission.engine.status.error
        await closed(admission, code)
    if code == Exit.UNEXPECTED and error is not None:
        why = Exit.UNEXPECTED if was_ready else error.exit_code
        raise SubspecError(why, error.message, error.hint)
    return code


async def ended(
    admission: Admission, signalled: "asyncio.Future[int]", shutdown_seconds: float
) -> Exit:
    """Drain: wait until every answer has ended, by itself or with an error."""
    if admission.engine.status.phase == "failed" or not signalled.done():
        last = Timer(FAILED_SECONDS, os._exit, (int(Exit.UNEXPECTED),))
        last.daemon = True  # an engine in an unknown state may block
        last.start()
        admission.closing = True
        admission.cut(engine_failed())
        await admission.drained(FINISH_SECONDS)
        return Exit.UNEXPECTED
    admission.closing = True
    logger = logging.getLogger(NAME)
    logger.info("stopping", {"signal": signalled.result()})
    if admission.num_live:
        logger.info("draining", {"running": admission.num_live, "seconds": shutdown_seconds})
    if await admission.drained(shutdown_seconds):
        return Exit.OK
    admission.cut(shutting_down())
    await admission.drained(FINISH_SECONDS)
    return Exit(128 + signalled.result())


async def closed(admission: Admission, code: Exit) -> None:
    """Close the engine. If it does not respond, because it computes or has died, exit the
    process."""
    try:
        async with asyncio.timeout(CLOSE_SECONDS):
            await admission.engine.close(0)
    except TimeoutError:
        os._exit(int(code))


@contextmanager
def first_signal() -> Iterator["asyncio.Future[int]"]:
    """Return a future of the first signal's number. A second signal ends the process at once."""
    loop = asyncio.get_running_loop()
    signalled: asyncio.Future[int] = loop.create_future()
    arrived = False

    def note(number: int) -> None:
        if not signalled.done():
            signalled.set_result(number)

    def arrive(number: int, frame: FrameType | None) -> None:
        nonlocal arrived
        if arrived:
            os._exit(128 + number)
        arrived = True
        loop.call_soon_threadsafe(note, number)

    before = take(arrive)
    try:
        yield signalled
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


async def until_failed(admission: Admission, told: Callable[[Status], None]) -> bool:
    """Wait until the engine has failed; returns whether it had been ready."""
    was_ready = False
    while (status := admission.engine.status).phase != "failed":
        if status.phase == "ready" and not was_ready:
            was_ready = True
            keep_what_is_loaded()
        told(status)
        await asyncio.sleep(WATCH_SECONDS)
    return was_ready


def keep_what_is_loaded() -> None:
    """Exclude long-lived objects from garbage collection. A large request triggers a full
    collection, which would take 0.1 s or more for some 200,000 objects of libraries and block the
    event loop and the engine."""
    gc.collect()
    gc.freeze()


def most_connections() -> int:
    """Return the connection limit: MAX_CONNECTIONS, or what the limit of open files allows, which
    is first raised as far as permitted (systemd and shells set it low for select's sake)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if unlimited != soft < MAX_FILES:
        soft = max(soft, MAX_FILES if hard == unlimited else min(MAX_FILES, hard))
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    left = MAX_CONNECTIONS if soft == unlimited else soft - OTHER_FILES
    return max(1, min(MAX_CONNECTIONS, left))


async def close_idle(server: uvicorn.Server) -> None:
    """Close connections that stay idle for IDLE_SECONDS, or at once if there are too many: uvicorn
    waits for a request's head without a timeout. Also close those whose client reads nothing for
    STALLED_SECONDS."""
    most, since = most_connections(), dict[H11Protocol, float]()
    stalled: dict[H11Protocol, tuple[int, float]] = {}  # bytes that wait to be read, since when
    while True:
        await asyncio.sleep(min(IDLE_SECONDS / 5, SWEEP_SECONDS))
        now = time.monotonic()
        connections = [o for o in server.server_state.connections if isinstance(o, H11Protocol)]
        idle = [one for one in connections if waits(one)]
        since = {one: since.get(one, now) for one in idle}
        num_over = len(connections) - most
        for number, connection in enumerate(sorted(idle, key=since.__getitem__)):
            if number < num_over or now - since[connection] >= IDLE_SECONDS:
                connection.transport.close()
        sizes = {one: one.transport.get_write_buffer_size() for one in connections}
        stalled = {
            one: (size, stalled[one][1] if one in stalled and size >= stalled[one][0] else now)
            for one, size in sizes.items()
            if size
        }
        for connection, (_, began) in stalled.items():
            if now - began >= STALLED_SECONDS:
                connection.transport.abort()


async def give_back_memory() -> None:
    """Return free C heap memory to the system at intervals: glibc keeps it in a heap per thread,
    and a server's memory would grow with every kind of request."""
    libc = ctypes.CDLL(None)
    trim = getattr(libc, "malloc_trim", None)  # of glibc alone
    if trim is not None:
        libc.mallopt(ARENA_MAX, MAX_HEAPS)
    while trim is not None:
        await asyncio.sleep(TRIM_SECONDS)
        await asyncio.to_thread(trim, 0)


def waits(connection: H11Protocol) -> bool:
    """Return True if a connection has sent no complete request head, or part of the next one.
    Between requests uvicorn's own, longer timeout applies."""
    if connection.cycle is None:
        return True
    return connection.cycle.response_complete and connection.timeout_keep_alive_task is None
