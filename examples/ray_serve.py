"""Replicas of one artifact on Ray Serve: each is a `subspec-serve` of its own, behind Ray's HTTP
proxy. See README.md.

    serve run ray_serve:replicas artifact=qwen2.5-32b-24gb/ replicas=2
"""

import os
import socket
import subprocess
import time
from collections.abc import AsyncIterator
from threading import Thread
from typing import Any

import httpx
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from ray import serve

app = FastAPI()
NOT_FORWARDED = {"host", "content-length", "connection", "transfer-encoding"}


def is_ready(url: str) -> bool:
    try:
        return httpx.get(url).is_success
    except httpx.TransportError:
        return False


async def pieces(answer: httpx.Response) -> AsyncIterator[bytes]:
    """Ends the request if the client goes, so that the replica ends its answer."""
    try:
        async for piece in answer.aiter_raw():
            yield piece
    finally:
        await answer.aclose()


@serve.deployment(max_ongoing_requests=8, graceful_shutdown_timeout_s=60)
@serve.ingress(app)
class Replica:
    """revision: another one restarts all replicas, one after the other. It ends with its process,
    so that Ray sees a failure at once and starts another one."""

    def __init__(self, artifact: str, command: str, revision: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.process = subprocess.Popen([command, artifact, "--port", str(port)])
        Thread(target=lambda: os._exit(self.process.wait()), daemon=True).start()
        self.client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=None)
        while not is_ready(f"http://127.0.0.1:{port}/health/ready"):
            time.sleep(0.2)

    @app.api_route("/{path:path}", methods=["GET", "POST"])
    async def forward(self, path: str, request: Request) -> StreamingResponse:
        headers = {k: v for k, v in request.headers.items() if k not in NOT_FORWARDED}
        body = await request.body()
        sent = self.client.build_request(request.method, path, headers=headers, content=body)
        answer = await self.client.send(sent, stream=True)
        kept = {k: v for k, v in answer.headers.items() if k not in NOT_FORWARDED}
        return StreamingResponse(pieces(answer), answer.status_code, kept)

    def __del__(self) -> None:
        self.process.terminate()


def replicas(arguments: dict[str, Any]) -> serve.Application:
    deployment = Replica.options(num_replicas=int(arguments.get("replicas", 2)))
    command = arguments.get("command", "subspec-serve")
    return deployment.bind(arguments["artifact"], command, str(arguments.get("revision", "")))
