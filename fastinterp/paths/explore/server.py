"""The HTTP server of the page: on the loopback interface alone, for requests whose Host is this machine."""

from __future__ import annotations

import errno
import math
import socket
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from fastinterp.errors import FastinterpError, StorageError, UsageError
from fastinterp.paths.explore.session import LONGEST, GenerationRequest, Session

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

HOST = "127.0.0.1"
# Accepted Host headers: a page elsewhere whose name resolves to this machine (DNS rebinding) sends another.
_HOSTS = [HOST, "localhost"]
_REQUEST_BYTES = 1 << 20  # most bytes of a request
_LARGEST = 1e6  # of a slider's value
_INTERRUPTED = 130  # exit code after SIGINT
_HEADERS = {
    # The page loads nothing from elsewhere, and no page elsewhere may frame it.
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def bound(port: int) -> socket.socket:
    """A listening socket on 127.0.0.1; port 0: any that is free.

    Raises: UsageError, if the port is in use, or starlette or uvicorn is not installed; StorageError.
    """
    if find_spec("starlette") is None or find_spec("uvicorn") is None:
        raise UsageError("explore needs starlette and uvicorn: pip install 'fastinterp[explore]'")
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # also a port that was closed a moment ago
    try:
        sock.bind((HOST, port))
        sock.listen(64)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise UsageError(
                f"port {port} of {HOST} is in use, perhaps by another page of this kind. Give another with --port, "
                "or --port 0 for any that is free"
            ) from None
        raise StorageError(f"port {port} of {HOST} cannot be opened: {error.strerror}") from None
    return sock


def make_app(session: Session, facts: Mapping[str, Any]) -> Starlette:
    """The web application: `/` the page, `/facts` its data, `/text` generates. facts: as `facts.facts` makes them."""
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import HTMLResponse, JSONResponse
    from starlette.routing import Route

    html = Path(__file__).with_name("page.html").read_text("utf-8")
    names = [slider["name"] for slider in facts["sliders"]]

    async def page(request: Request) -> Response:
        return HTMLResponse(html, headers=_HEADERS)

    async def data(request: Request) -> Response:
        return JSONResponse(facts, headers=_HEADERS)

    async def generate(request: Request) -> Response:
        def refused(status: int, message: str) -> Response:
            return JSONResponse({"error": message}, status, headers=_HEADERS)

        origin = f"http://{request.headers.get('host', '')}"
        if request.headers.get("origin", origin) != origin or not _is_json(request):
            return refused(403, "only this page may send requests")
        if int(request.headers.get("content-length", _REQUEST_BYTES + 1)) > _REQUEST_BYTES:
            return refused(413, "the request is too long")
        try:
            document = await request.json()
        except (ValueError, RecursionError) as error:
            return refused(400, f"the request is not JSON: {error}")
        try:
            generation = read_request(document, names)
        except ValueError as error:
            return refused(400, str(error))
        try:
            text = await run_in_threadpool(session.text, generation)
        except FastinterpError as error:
            return refused(422, str(error))
        return refused(409, "superseded") if text is None else JSONResponse({"text": text}, headers=_HEADERS)

    async def failed(request: Request, error: Exception) -> Response:
        """A programming error, whose traceback is on the terminal."""
        message = f"{type(error).__name__}: {error}"[:300].encode(errors="backslashreplace").decode()
        return JSONResponse({"error": f"the program failed: {message}"}, 500, headers=_HEADERS)

    async def refuse(request: Request, error: Any) -> Response:
        return JSONResponse({"error": error.detail}, error.status_code, headers=_HEADERS)

    routes = [Route("/", page), Route("/facts", data), Route("/text", generate, methods=["POST"])]
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=_HOSTS, www_redirect=False)
    return Starlette(routes=routes, middleware=[hosts], exception_handlers={Exception: failed, HTTPException: refuse})


def _is_json(request: Request) -> bool:
    """Whether the body is JSON: a page elsewhere cannot send that without a preflight request, which is refused."""
    return request.headers.get("content-type", "").split(";")[0].strip().lower() == "application/json"


def read_request(document: Any, names: list[str]) -> GenerationRequest:
    """A request from its JSON. names: of the sliders. Raises: ValueError, with what is wrong."""
    if not isinstance(document, dict) or not isinstance(document.get("alphas"), dict):
        raise ValueError("a request is an object with `alphas`")
    alphas = document["alphas"]
    if sorted(alphas) != sorted(names):
        raise ValueError(f"`alphas` must be {', '.join(names)}, got {', '.join(map(repr, alphas)) or 'none'}"[:200])
    values = {name: _number(alphas[name], name, -_LARGEST, _LARGEST) for name in names}
    prompt = document.get("prompt")
    if not isinstance(prompt, str) or not isinstance(document.get("sampled"), bool):
        raise ValueError("`prompt` must be text, and `sampled` true or false")
    surrogate = next((i for i, c in enumerate(prompt) if "\ud800" <= c <= "\udfff"), None)
    if surrogate is not None:
        raise ValueError(f"`prompt` is not valid Unicode text: character {surrogate + 1} is a surrogate. Remove it")
    return GenerationRequest(
        turn=_whole(document.get("turn"), "turn", 0, 2**53),
        alphas=values,
        prompt=prompt,
        sampled=document["sampled"],
        seed=_whole(document.get("seed"), "seed", 0, 2**32),
        length=_whole(document.get("length"), "length", 1, LONGEST),
        temperature=_number(document.get("temperature"), "temperature", 0.01, 100),
    )


def _number(value: Any, name: str, low: float, high: float) -> float:
    is_nan = isinstance(value, float) and math.isnan(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or is_nan:
        raise ValueError(f"`{name}` must be a number, got {value!r}"[:200])
    if not low <= value <= high:  # before float(): an integer may be beyond it
        shown = repr(value) if len(repr(value)) < 40 else f"{repr(value)[:20]}..."
        raise ValueError(f"`{name}` must be in {low:.10g}..{high:.10g}, got {shown}")
    return float(value)


def _whole(value: Any, name: str, low: int, high: int) -> int:
    number = _number(value, name, low, high)
    if number != int(number):
        raise ValueError(f"`{name}` must be a whole number, got {value!r}")
    return int(number)


def serve(app: Starlette, sock: socket.socket, session: Session, ready: Callable[[str], object]) -> None:
    """Serve until SIGINT or SIGTERM, which cancel a generation that runs. `ready` is called with the page's address.

    Returns after SIGINT, the usual end; SIGTERM is raised again for the program's own handler.
    """
    import uvicorn

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            session.end()
            super().handle_exit(sig, frame)

    config = uvicorn.Config(
        app, log_config=None, access_log=False, lifespan="off", ws="none", timeout_graceful_shutdown=5, workers=1
    )
    ready(f"http://{HOST}:{sock.getsockname()[1]}/")
    try:
        Server(config).run(sockets=[sock])
    except KeyboardInterrupt as stopped:  # what the program's handler raises when uvicorn, at its end, signals again
        if getattr(stopped, "exit_code", _INTERRUPTED) != _INTERRUPTED:
            raise
