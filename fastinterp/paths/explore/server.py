"""The page's server: on the loopback interface alone, for browsers that asked for this host by its name."""

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
from fastinterp.paths.explore.session import LONGEST, Session, Wish

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

HOST = "127.0.0.1"
_NAMES = [HOST, "localhost"]  # what a Host header may say: a page elsewhere that made its name point here says another
_LONGEST = 1 << 20  # bytes of a request
_LARGEST = 1e6  # of a slider's value
_INTERRUPTED = 130  # exit code after SIGINT
_HEADERS = {
    # Nothing from elsewhere is loaded or asked, and no page elsewhere may show this one.
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def bound(port: int) -> socket.socket:
    """A socket on 127.0.0.1; port 0: any that is free.

    Raises: UsageError, if the port is in use, or what serves pages is not installed; StorageError.
    """
    if find_spec("starlette") is None or find_spec("uvicorn") is None:
        raise UsageError("explore needs starlette and uvicorn: pip install 'fastinterp[explore]'")
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was just left may be taken again
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
    """facts: what the page shows besides the text, as JSON: sliders, report, change by layer."""
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

    async def tell(request: Request) -> Response:
        return JSONResponse(facts, headers=_HEADERS)

    async def write(request: Request) -> Response:
        def refused(status: int, said: str) -> Response:
            return JSONResponse({"error": said}, status, headers=_HEADERS)

        own = f"http://{request.headers.get('host', '')}"
        if request.headers.get("origin", own) != own or not _is_json(request):
            return refused(403, "only this page may ask")
        if int(request.headers.get("content-length", _LONGEST + 1)) > _LONGEST:
            return refused(413, "the request is too long")
        try:
            asked = await request.json()
        except (ValueError, RecursionError) as error:
            return refused(400, f"the request is not JSON: {error}")
        try:
            wish = read_wish(asked, names)
        except ValueError as error:
            return refused(400, str(error))
        try:
            text = await run_in_threadpool(session.text, wish)
        except FastinterpError as error:
            return refused(422, str(error))
        return refused(409, "superseded") if text is None else JSONResponse({"text": text}, headers=_HEADERS)

    async def failed(request: Request, error: Exception) -> Response:
        """Its traceback is on the terminal."""
        said = f"{type(error).__name__}: {error}"[:300].encode(errors="backslashreplace").decode()
        return JSONResponse({"error": f"the program failed: {said}"}, 500, headers=_HEADERS)

    async def refuse(request: Request, error: Any) -> Response:
        return JSONResponse({"error": error.detail}, error.status_code, headers=_HEADERS)

    routes = [Route("/", page), Route("/facts", tell), Route("/text", write, methods=["POST"])]
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=_NAMES, www_redirect=False)
    return Starlette(routes=routes, middleware=[hosts], exception_handlers={Exception: failed, HTTPException: refuse})


def _is_json(request: Request) -> bool:
    """A page elsewhere cannot send this type without asking first, and is never answered then."""
    return request.headers.get("content-type", "").split(";")[0].strip().lower() == "application/json"


def read_wish(given: Any, names: list[str]) -> Wish:
    """A request's JSON, checked. Raises: ValueError, with what is wrong."""
    if not isinstance(given, dict) or not isinstance(given.get("alphas"), dict):
        raise ValueError("a request is an object with `alphas`")
    alphas = given["alphas"]
    if sorted(alphas) != sorted(names):
        raise ValueError(f"`alphas` must be {', '.join(names)}, got {', '.join(map(repr, alphas)) or 'none'}"[:200])
    values = {name: _number(alphas[name], name, -_LARGEST, _LARGEST) for name in names}
    prompt = given.get("prompt")
    if not isinstance(prompt, str) or not isinstance(given.get("sampled"), bool):
        raise ValueError("`prompt` must be text, and `sampled` true or false")
    half = next((i for i, c in enumerate(prompt) if "\ud800" <= c <= "\udfff"), None)
    if half is not None:
        raise ValueError(f"`prompt` is not valid Unicode text: character {half + 1} is half of one. Remove it")
    return Wish(
        turn=_whole(given.get("turn"), "turn", 0, 2**53),
        alphas=values,
        prompt=prompt,
        sampled=given["sampled"],
        seed=_whole(given.get("seed"), "seed", 0, 2**32),
        length=_whole(given.get("length"), "length", 1, LONGEST),
        temperature=_number(given.get("temperature"), "temperature", 0.01, 100),
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
    """Answer until SIGINT or SIGTERM; `ready` is called with the page's address.

    A text that is being made then is given up. Returns after SIGINT, which is how one ends it; any other is raised
    again for the program's own handler.
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
