"""Serves the live page to browsers on this machine, and to nobody else.

The server listens on 127.0.0.1 only. Every path begins with a random token; a request without it, or for another host
name (as by DNS rebinding), is refused with 403. Pages elsewhere may not put it into a frame, nor read from it.
"""

import gzip
import hmac
import re
import secrets
import sys
import threading
import webbrowser
from collections.abc import Callable
from functools import cache, partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fedmezo.errors import ConfigError, missing
from fedmezo.studies.live.feed import Feed
from fedmezo.studies.live.shell import shell

__all__ = ["PORT", "LivePage", "watch"]

HOST, PORT = "127.0.0.1", 8650
# A tunnel from another machine may begin at any port, and at any of its names for itself.
_HERE = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d{1,5})?", re.IGNORECASE)
_TOKEN = re.compile(r"[A-Za-z0-9_-]{16,200}")
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",  # the token is in the address
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


class LivePage:
    """A page that follows one run; a context manager that ends it. The run does not notice.

    Attributes:
      folder: the run's folder.
      url: the page's address, token and all; show it to nobody else.
      token: the secret part of it.
      port: where it listens.
    """

    def __init__(self, folder: Path, *, port: int | None, token: str) -> None:
        """Listens; use `watch`."""
        self.folder, self.token = folder, token
        self._feed = Feed(folder)
        self._server = _listen(port, partial(_Handler, self._feed, token.encode()))
        self.port = int(self._server.server_address[1])
        self.url = f"http://{HOST}:{self.port}/{token}/"
        self._thread = threading.Thread(target=self._server.serve_forever, name="fedmezo live server", daemon=True)
        self._feed.start()
        self._thread.start()

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the page."""
        self.close()

    def close(self) -> None:
        """Ends the page; a second call does nothing."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()
        self._feed.stop()

    def wait(self) -> None:
        """Serves until the page is closed, or Ctrl-C."""
        while self._thread.is_alive():
            self._thread.join(timeout=1.0)


def watch(
    folder: Path | str, *, port: int | None = None, token: str | None = None, open_browser: bool = False
) -> LivePage:
    """Returns a page on this machine that follows the run in a folder, now, later, and after its end.

        with fedmezo.watch("runs/mine") as page:
            print(page.url)
            fedmezo.run(config, out="runs/mine")

    It reads what the run writes, in whichever process. What `run(watch=...)` takes is something else: an object that
    the run itself tells of every round.

    Args:
      folder: the run's folder; neither it nor its journal need be there yet.
      port: the port on 127.0.0.1; 0 for any; None for 8650, or any where that is taken.
      token: the secret part of the address, at least 16 letters, digits, - and _; None for a new one. With the same
        port and token a page that is open in a browser goes on after a restart.
      open_browser: open the page in this machine's browser.

    Raises:
      ConfigError: plotly is not installed, the port is taken, the token is short, or `folder` is a file.
    """
    place = Path(folder)
    if place.exists() and not place.is_dir():
        raise ConfigError(f"{place} is a file; give the folder of a run, the one that `fedmezo run --out` names.")
    if token is not None and not _TOKEN.fullmatch(token):
        raise ConfigError("The token needs 16 to 200 letters, digits, - and _; leave it out for a new one.")
    if find_spec("plotly") is None:
        raise missing("The live page needs plotly", extra="report")
    page = LivePage(place, port=port, token=token or secrets.token_urlsafe(24))
    if open_browser:
        webbrowser.open(page.url)
    return page


@cache
def _script() -> bytes:
    # The charts bring torch, which takes seconds to load.
    from fedmezo.studies.charts import plotly_script

    return gzip.compress(plotly_script().encode(), compresslevel=6)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing of a browser that went away in the middle of an answer."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


def _listen(port: int | None, handler: Callable[..., Any]) -> _Server:
    try:
        return _Server((HOST, PORT if port is None else port), handler)
    except (OSError, OverflowError) as error:
        if port is not None:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"Nothing can listen on {HOST}:{port} ({reason}); give another port, or 0.") from error
        return _Server((HOST, 0), handler)


class _Handler(BaseHTTPRequestHandler):
    """Answers one browser."""

    protocol_version = "HTTP/1.0"  # one request per connection, so that none outlives the page
    server_version, sys_version = "fedmezo", ""
    timeout = 30  # seconds for a browser that says nothing

    def __init__(self, feed: Feed, token: bytes, *args: Any) -> None:
        self._feed, self._token = feed, token
        super().__init__(*args)

    def __getattr__(self, name: str) -> Any:
        # A method of any name is looked up here; all but GET and HEAD are refused, with the token or without.
        if name.startswith("do_"):
            return self._refuse
        raise AttributeError(name)

    def do_GET(self) -> None:
        """Sends the page, its script, or what is new."""
        allowed = self._allowed()
        rest, _, query = (allowed or "").partition("?")
        if allowed is None:
            self._refuse()
        elif not rest:  # the slash at the end, which some programs drop
            self._send(308, "text/plain", b"", to=f"/{self._token.decode()}/")
        elif rest == "/":
            self._send(200, "text/html", shell().encode())
        elif rest == "/data":
            self._send(200, "application/json", self._feed.answer(query.removeprefix("since=")))
        elif rest == "/plotly.js":
            self._send(200, "text/javascript", _script(), zipped=True, cached="private, max-age=3600")
        else:
            self._send(404, "text/plain", b"There is no such page.\n")

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: Any) -> None:
        """Writes nothing: addresses hold the token."""

    def _allowed(self) -> str | None:
        """Returns what stands after the token in the path; None for a request that may see nothing."""
        hosts = self.headers.get_all("Host") or []
        here = len(hosts) == 1 and _HERE.fullmatch(hosts[0].strip()) is not None
        given, slash, rest = self.path.removeprefix("/").partition("/")
        right = hmac.compare_digest(given.encode(), self._token)
        return slash + rest if here and right else None

    def _refuse(self) -> None:
        allowed = self._allowed() is not None
        text = b"This page can only be read.\n" if allowed else b"Open the address that `fedmezo watch` printed.\n"
        self._send(405 if allowed else 403, "text/plain", text)

    def _send(
        self, status: int, kind: str, body: bytes, *, zipped: bool = False, cached: str = "no-store", to: str = ""
    ) -> None:
        takes = "gzip" in self.headers.get("Accept-Encoding", "")
        if zipped and not takes:
            body, zipped = gzip.decompress(body), False
        elif takes and not zipped and len(body) > 2000:
            body, zipped = gzip.compress(body, compresslevel=1), True
        self.send_response(status)
        told = {"Content-Type": f"{kind}; charset=utf-8", "Content-Length": str(len(body)), "Cache-Control": cached}
        told |= {"Content-Encoding": "gzip"} if zipped else {}
        told |= {"Location": to} if to else {}
        for name, value in {**told, **_HEADERS, "Content-Security-Policy": "frame-ancestors 'none'"}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
