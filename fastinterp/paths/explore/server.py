"""The HTTP server of the page: on the loopback interface alone, for requests that have the program's token."""

from __future__ import annotations

import asyncio
import errno
import hmac
import json
import socket
import threading
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from fastinterp.errors import FastinterpError, StorageError, UsageError
from fastinterp.messages import plain
from fastinterp.paths.explore.checkpoint import CheckpointWriter, command_of, recipe_text
from fastinterp.paths.explore.requests import GenerationRequest, read_alphas, read_folder, read_generation
from fastinterp.paths.explore.session import Session
from fastinterp.paths.explore.sliders import Sliders

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

HOST = "127.0.0.1"
# Accepted Host headers: a page elsewhere whose name resolves to this machine (DNS rebinding) sends another.
_HOSTS = [HOST, "localhost"]
_REQUEST_BYTES = 1 << 20  # most bytes of a request
_CONNECTIONS = 64  # at the same time
_INTERRUPTED = 130  # exit code after SIGINT
_HEADERS = {
    # The page loads nothing from elsewhere, and no page elsewhere may frame it.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_ASSETS = {"page.css": "text/css", "page.js": "text/javascript", "figures.js": "text/javascript"}


class _Refused(Exception):
    """A request that is not carried out, with its status."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


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


class Page:
    """What the routes of the page answer.

    facts  its data, as `facts.facts` makes them
    token  what every request but that for the page itself must have in its header X-Token
    """

    def __init__(
        self, sliders: Sliders, session: Session, writer: CheckpointWriter, facts: Mapping[str, Any], token: str
    ):
        self._sliders, self._session, self._writer, self._facts, self._token = sliders, session, writer, facts, token
        self._names = list(sliders.models)

    async def page(self, request: Request) -> Response:
        from starlette.responses import HTMLResponse

        if not self._knows(request.query_params.get("token", "")):
            text = "Open the address that fastinterp explore printed, with its token: <code>...?token=...</code>"
            return HTMLResponse(f"<title>fastinterp explore</title><p>{text}", 403, headers=_HEADERS)
        html = Path(__file__).with_name("page.html").read_text("utf-8")
        return HTMLResponse(html, headers=_HEADERS)

    async def asset(self, request: Request) -> Response:
        from starlette.responses import Response

        name = request.url.path.lstrip("/")
        return Response(Path(__file__).with_name(name).read_bytes(), headers=_HEADERS, media_type=_ASSETS[name])

    async def data(self, request: Request) -> Any:
        self._refuse_strangers(request)
        return self._facts

    async def progress(self, request: Request) -> Any:
        self._refuse_strangers(request)
        return {"fraction": self._writer.fraction}

    async def text(self, request: Request) -> Any:
        generation = read_generation(await self._document(request), self._names, self._session.most_tokens)
        text = await self._generated(request, generation)
        if text is None:
            raise _Refused(409, "superseded")
        return {"text": text}

    async def recipe(self, request: Request) -> Any:
        alphas = read_alphas(await self._document(request), self._names)
        return {"recipe": recipe_text(self._sliders, alphas), "command": command_of(self._sliders, alphas)}

    async def save(self, request: Request) -> Any:
        from starlette.concurrency import run_in_threadpool

        document = await self._document(request)
        alphas, folder = read_alphas(document, self._names), read_folder(document)
        report = await run_in_threadpool(self._writer.write, alphas, folder)
        return {"folder": str(Path(folder).expanduser().resolve()), "report": report.summary()}

    async def _generated(self, request: Request, generation: GenerationRequest) -> str | None:
        """The text; the generation ends early if the client goes away."""
        from starlette.concurrency import run_in_threadpool

        dropped = threading.Event()

        async def listen() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            dropped.set()

        listening = asyncio.create_task(listen())
        try:
            return await run_in_threadpool(self._session.text, generation, dropped)
        finally:
            listening.cancel()

    async def _document(self, request: Request) -> Any:
        """The JSON of a request that this page sent. Raises: _Refused; ClientDisconnect."""
        self._refuse_strangers(request)
        if not _is_json(request):
            raise _Refused(403, "only this page may send requests")
        if int(request.headers.get("content-length", _REQUEST_BYTES + 1)) > _REQUEST_BYTES:
            raise _Refused(413, "the request is too long")
        try:
            return json.loads(await request.body())
        except (ValueError, RecursionError) as error:
            raise _Refused(400, f"the request is not JSON: {error}") from None

    def _refuse_strangers(self, request: Request) -> None:
        origin = f"http://{request.headers.get('host', '')}"
        if request.headers.get("origin", origin) != origin or not self._knows(request.headers.get("x-token", "")):
            raise _Refused(403, "only this page may send requests. Open the address that the program printed")

    def _knows(self, token: str) -> bool:
        return hmac.compare_digest(token.encode(errors="replace"), self._token.encode())


def make_app(page: Page) -> Starlette:
    """The web application: the page, its data, and what it asks for, as JSON; errors as `{"error": ...}`."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import ClientDisconnect
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    def answered(call: Callable[[Request], Any]) -> Callable[[Request], Any]:
        async def answer(request: Request) -> Response:
            try:
                result = await call(request)
            except _Refused as error:
                return _json({"error": str(error)}, error.status)
            except ValueError as error:
                return _json({"error": plain(str(error))}, 400)
            except FastinterpError as error:
                return _json({"error": plain(str(error))}, 422)
            except ClientDisconnect:  # nobody reads the answer
                return Response(status_code=400)
            return result if isinstance(result, Response) else _json(result, 200)

        return answer

    def _json(content: Any, status: int) -> Response:
        return JSONResponse(content, status, headers=_HEADERS)

    async def failed(request: Request, error: Exception) -> Response:
        """A programming error, whose traceback is on the terminal."""
        message = f"{type(error).__name__}: {error}"[:300].encode(errors="backslashreplace").decode()
        return _json({"error": f"the program failed: {message}"}, 500)

    async def refuse(request: Request, error: Any) -> Response:
        return _json({"error": error.detail}, error.status_code)

    routes = [
        Route("/", answered(page.page)),
        Route("/facts", answered(page.data)),
        Route("/progress", answered(page.progress)),
        Route("/text", answered(page.text), methods=["POST"]),
        Route("/recipe", answered(page.recipe), methods=["POST"]),
        Route("/save", answered(page.save), methods=["POST"]),
        *(Route(f"/{name}", answered(page.asset)) for name in _ASSETS),
    ]
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=_HOSTS, www_redirect=False)
    return Starlette(routes=routes, middleware=[hosts], exception_handlers={Exception: failed, HTTPException: refuse})


def _is_json(request: Request) -> bool:
    """Whether the body is JSON: a page elsewhere cannot send that without a preflight request, which is refused."""
    return request.headers.get("content-type", "").split(";")[0].strip().lower() == "application/json"


def serve(
    app: Starlette, sock: socket.socket, token: str, end: Callable[[], object], ready: Callable[[str], object]
) -> None:
    """Serve until SIGINT or SIGTERM. `ready` is called with the page's address, `end` at the signal, in its handler.

    Returns after SIGINT, the usual end; SIGTERM is raised again for the program's own handler.
    """
    import uvicorn

    from fastinterp.paths.explore.connection import TimedConnection

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            end()
            super().handle_exit(sig, frame)

    config = uvicorn.Config(
        app, log_config=None, access_log=False, lifespan="off", ws="none", http=TimedConnection, workers=1,
        timeout_graceful_shutdown=5, limit_concurrency=_CONNECTIONS,
    )  # fmt: skip
    ready(f"http://{HOST}:{sock.getsockname()[1]}/?token={token}")
    try:
        Server(config).run(sockets=[sock])
    except KeyboardInterrupt as stopped:  # what the program's handler raises when uvicorn, at its end, signals again
        if getattr(stopped, "exit_code", _INTERRUPTED) != _INTERRUPTED:
            raise
