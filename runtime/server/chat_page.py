"""The chat page at /: static files, with headers that prevent model output from running or loading
anything.

The files hold no secrets and browsers send no key for them: PATHS need none. The page requests only
    this server's /v1/models, /v1/chat/completions and /props. Of the latter it reads
    `chat_template_caps` (`supports_enable_thinking`, `supports_reasoning_effort`) and `memory`
    (`budget_bytes`, `peak_bytes`), all optional.
"""

import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

FOLDER = Path(__file__).parent / "page"
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
}
POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "x-dns-prefetch-control": "off",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    "cache-control": "no-cache",  # revalidated on each load, not sent if unchanged
}


@dataclass(frozen=True)
class PageFile:
    content: bytes
    media_type: str

    @property
    def etag(self) -> str:
        return f'"{hashlib.sha256(self.content).hexdigest()[:32]}"'


def page_files(folder: Path = FOLDER) -> dict[str, PageFile]:
    """The page's files by URL path. Other kinds of files in `folder` are not served."""
    files = {
        f"/page/{file.name}": PageFile(file.read_bytes(), MEDIA_TYPES[file.suffix])
        for file in sorted(folder.iterdir())
        if file.suffix in MEDIA_TYPES
    }
    return {"/": files.pop("/page/index.html"), **files}


PATHS = frozenset(page_files())


def page_router() -> APIRouter:
    """Routes for GET and HEAD of each file; not in the API's description."""
    router = APIRouter()
    for path, file in page_files().items():
        router.add_route(path, partial(page_response, file), ["GET"], include_in_schema=False)
    return router


async def page_response(file: PageFile, request: Request) -> Response:
    headers = {**HEADERS, "etag": file.etag}
    if file.etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)
