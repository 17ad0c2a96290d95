"""The chat page at `/`: a few files, sent as they are.

The page holds no data and needs no key; what it asks the API for does. It loads nothing from
elsewhere, and its policy lets it load nothing from elsewhere, run no inline script, turn no text
into HTML and stand in no other page's frame.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import Response

FOLDER = Path(__file__).parent / "web"
# Path in an address -> file and its type.
FILES = {
    "/": ("index.html", "text/html"),
    "/web/chat.css": ("chat.css", "text/css"),
    "/web/chat.js": ("chat.js", "text/javascript"),
    "/web/api.js": ("api.js", "text/javascript"),
    "/web/markdown.js": ("markdown.js", "text/javascript"),
    "/web/pictures.js": ("pictures.js", "text/javascript"),
    "/web/icon.svg": ("icon.svg", "image/svg+xml"),
}
PATHS = frozenset(FILES)
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",  # pictures that the reader has added
        "connect-src 'self'",
        "form-action 'none'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)


def add_page(app: FastAPI) -> None:
    """Serve the page's files at `PATHS`."""
    for path, (name, media_type) in FILES.items():
        content = (FOLDER / name).read_bytes()
        app.get(path, include_in_schema=False)(_sender(content, media_type))


def _sender(content: bytes, media_type: str):
    headers = {
        "etag": f'"{hashlib.sha256(content).hexdigest()[:16]}"',
        "cache-control": "no-cache",  # asked again each time, answered by 304
        "content-security-policy": POLICY,
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }

    async def send(request: Request) -> Response:
        if request.headers.get("if-none-match") == headers["etag"]:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=f"{media_type}; charset=utf-8", headers=headers)

    return send
