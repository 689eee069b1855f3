"""The server while its plan is made: /health reports it, the chat page waits, and other requests
are refused as while weights load."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from socket import socket
from threading import Thread

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from subspec.runtime.server.admission import LOADING
from subspec.runtime.server.chat_page import page_router
from subspec.runtime.server.errors import error_response, unavailable
from subspec.runtime.server.middleware import GuardSettings, guarded
from subspec.runtime.server.serving import Server, close_idle, server_of


@contextmanager
def answering_meanwhile(listening: socket, guards: GuardSettings) -> Iterator[None]:
    """Serve in a thread until the end of the block; `listening` stays open."""
    server, own = server_of(planning_app(guards)), listening.dup()
    # Create the coroutine in the thread: the process may end before the thread starts.
    thread = Thread(target=lambda: asyncio.run(served(server, own)), daemon=True)
    thread.start()
    try:
        yield
    finally:
        while not server.started and thread.is_alive():  # else accepted connections would be lost
            time.sleep(0.01)
        server.should_exit = True
        thread.join()


async def served(server: Server, listening: socket) -> None:
    with listening:
        sweeping = asyncio.create_task(close_idle(server))
        await server.serve(sockets=[listening])
        sweeping.cancel()


def planning_app(guards: GuardSettings) -> ASGIApp:
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    app.add_route("/health", health)
    app.include_router(page_router())
    app.add_route("/{path:path}", refused, ["GET", "POST"])
    return guarded(app, guards)


async def health(request: Request) -> Response:
    return JSONResponse({"status": "ok", "engine": "planning"})


async def refused(request: Request) -> Response:
    return error_response(unavailable(LOADING, 503), request.url.path)
