"""A private door to the process that keeps a client's model and data: one request, one answer per connection.

    serve_socket(path, resident.answer)          # in the process that has the model
    answer = ask(path, request)                  # in the process that Flower starts for every message

Flower starts a new process for every message, so what is dear must live elsewhere. The door is a Unix socket that only
its owner may open, and `ask` needs neither torch nor numpy. A request is one frame (`frames.py`). Two come back: an
empty one when work on it begins, and the answer. The answer's first byte tells whether the rest is what was asked for
(1) or one sentence, in UTF-8, on why not (0).

The socket is there only while somebody answers, and `ask` waits for it: so a request finds a process that is still
loading, or one that has died and is started again. Requests that come together wait for each other. The death of the
process costs the answer it worked on; a request that had not begun is asked again.
"""

import os
import socket
import stat
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from fedmezo.errors import FedMeZOError, RunError
from fedmezo.runtime.frames import end_with_parent, get, put

__all__ = ["ask", "serve_socket"]

_GOOD, _REFUSED = b"\x01", b"\x00"
_LONGEST = 103  # bytes of a socket's path; Linux would take 107, macOS takes no more
_LARGEST = 1 << 32  # bytes of a request; Flower carries none above 2 GiB
_SLACK = 60.0  # seconds a connection may be silent when it is its turn to send or to take
_AGAIN = 0.05  # seconds between two attempts to connect
_WAITING = 16  # connections that may wait for their turn


def serve_socket(path: Path, answer: Callable[[bytes], bytes], *, ready: Callable[[], None] = lambda: None) -> None:
    """Answers requests at `path`, one at a time, until the parent of this process is gone; never returns.

    Args:
      path: where the socket is made. Its folder is made with it, for the owner only; a folder that others may enter
        is refused. What an earlier process left there is replaced.
      answer: request -> answer. What it raises is told to the one who asked, and to the log with its trace; only
        MemoryError ends the process, because what is left of it cannot be trusted.
      ready: called once, when requests are taken.

    Raises:
      RunError: there can be no private socket at `path`, or another process answers there.
    """
    with _door(path) as door:
        end_with_parent()
        ready()
        while True:
            line, _ = door.accept()
            with line, suppress(OSError, EOFError):
                line.settimeout(_SLACK)
                request = bytes(get(line, most=_LARGEST))
                put(line, b"")
                put(line, _outcome(answer, request))


def ask(path: Path, request: bytes, *, patience: float = 60.0) -> bytes:
    """Returns the answer of the process that serves `path`; takes as long as that process works on it.

    Args:
      path: the socket.
      request: what is asked.
      patience: seconds to wait for a process that is not there yet, or not there again.

    Raises:
      RunError: nobody came, or the process ended before it had answered, or it refused; then its own sentence.
    """
    if len(request) > _LARGEST:
        raise RunError(f"A request has at most {_LARGEST} bytes, got {len(request)}.")
    with _begun(path, request, patience) as line:
        try:
            said = bytes(get(line))
        except (OSError, EOFError) as error:
            raise RunError(
                f"The worker process at {path} ended before it had answered, perhaps for lack of memory; this reply is "
                "lost, and `fedmezo client` starts the worker again for the next one."
            ) from error
    if said[:1] != _GOOD:
        raise RunError(said[1:].decode("utf-8", "replace"))
    return said[1:]


def _outcome(answer: Callable[[bytes], bytes], request: bytes) -> bytes:
    try:
        return _GOOD + answer(request)
    except MemoryError:
        raise
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        known = isinstance(error, FedMeZOError)
        sentence = " ".join((str(error) if known else f"{type(error).__name__}: {error}").split())
        return _REFUSED + sentence.encode("utf-8", "backslashreplace")


def _door(path: Path) -> socket.socket:
    """Returns a socket that listens at `path` and that nobody but the owner can have connected to."""
    if len(os.fsencode(path)) > _LONGEST:
        raise RunError(f"The path of a socket has at most {_LONGEST} bytes, got {path}; choose a shorter folder.")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_private(path.parent)
        _clear(path)
        door = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            door.bind(os.fspath(path))
            path.chmod(0o600)  # before listen, so that no connection is older
            door.listen(_WAITING)
        except BaseException:
            door.close()
            raise
    except OSError as error:
        raise RunError(f"There can be no socket at {path} ({error.strerror or error}); choose another one.") from error
    return door


def _check_private(folder: Path) -> None:
    found = folder.stat()
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise RunError(
            f"The folder of a worker's socket must be its user's alone, got {folder} of user {found.st_uid} with mode "
            f"{stat.S_IMODE(found.st_mode):o}; choose a new folder, or say `chmod 700 {folder}` if it is yours."
        )


def _clear(path: Path) -> None:
    """Removes the socket of a process that is gone."""
    if not os.path.lexists(path):
        return
    if not stat.S_ISSOCK(path.lstat().st_mode):
        raise RunError(f"There can be no socket at {path}: a file is there; choose another path.")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe, suppress(ConnectionRefusedError):
        probe.connect(os.fspath(path))
        raise RunError(f"Another process answers at {path}; every client needs a socket of its own.")
    path.unlink()


def _begun(path: Path, request: bytes, patience: float) -> socket.socket:
    """Returns a connection at whose other end work on the request has begun."""
    until = time.monotonic() + patience
    while True:
        line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            line.connect(os.fspath(path))
            put(line, request)
            get(line, most=0)
            return line
        except (FileNotFoundError, ConnectionError, EOFError) as error:
            line.close()
            if time.monotonic() >= until:
                raise RunError(
                    f"No worker process answered at {path} within {patience:g} s; see whether `fedmezo client` still "
                    "runs, and what its log says."
                ) from error
        except OSError as error:
            line.close()
            raise RunError(f"The worker process at {path} cannot be reached: {error.strerror or error}.") from error
        time.sleep(_AGAIN)
