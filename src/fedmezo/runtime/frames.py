"""What processes of one machine have in common: frames between them, and that a child ends with its parent.

A frame is a length, u64, and as many bytes. What it means is said in `workers.py` and `resident.py`; the peers are the
same user's and trusted, unlike those of `wire.py`. torch is not imported here before there is a tensor.
"""

import os
import socket
import struct
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["bits_of", "end_with_parent", "get", "put"]

_SIZE = struct.Struct("<Q")
_PART = 1 << 20  # bytes for which there is room before any has come


def put(line: socket.socket, frame: bytes | memoryview) -> None:
    """Sends one frame; raises OSError when nobody is there."""
    line.sendall(_SIZE.pack(len(frame)))
    if frame:  # to send nothing fails too, once the other side has read the length, answered and closed
        line.sendall(frame)


def get(line: socket.socket, into: memoryview | None = None, *, most: int | None = None) -> memoryview:
    """Returns the next frame, written to `into` if that is given.

    Raises:
      EOFError: nobody is there, or the frame has not the size of `into`, or more than `most` bytes.
    """
    size = int(_SIZE.unpack(_exactly(line, memoryview(bytearray(_SIZE.size))))[0])
    if most is not None and size > most:
        raise EOFError(f"a frame of {size} bytes where at most {most} were expected")
    if into is None:
        return _growing(line, size)
    if len(into) != size:
        raise EOFError(f"a frame of {size} bytes where {len(into)} were expected")
    return _exactly(line, into)


def _growing(line: socket.socket, size: int) -> memoryview:
    """Returns the next `size` bytes; takes memory as they come, for a length is easily said."""
    room = bytearray()
    while len(room) < size:
        room += _exactly(line, memoryview(bytearray(min(size - len(room), max(_PART, len(room))))))
    return memoryview(room)


def _exactly(line: socket.socket, room: memoryview) -> memoryview:
    done = 0
    while done < len(room):
        got = line.recv_into(room[done:])
        if not got:
            raise EOFError("the other side is gone")
        done += got
    return room


def bits_of(tensor: "Tensor") -> memoryview:
    """Returns the bytes of a contiguous tensor; those of one on the CPU are its own memory."""
    import torch

    return memoryview(tensor.detach().cpu().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def end_with_parent() -> None:
    """Ends this process, in the middle of whatever it does, when its parent dies or closes the pipe on descriptor 0."""
    threading.Thread(target=_watch_parent, daemon=True).start()


def _watch_parent() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)
