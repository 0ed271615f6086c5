"""Frames between the processes of one machine: a length, u64, and as many bytes.

What they mean is said in `workers.py`; their peers are trusted, unlike those of `wire.py`.
"""

import socket
import struct

import torch
from torch import Tensor

__all__ = ["bits_of", "get", "put"]

_SIZE = struct.Struct("<Q")


def put(line: socket.socket, frame: bytes | memoryview) -> None:
    """Sends one frame; raises OSError when nobody is there."""
    line.sendall(_SIZE.pack(len(frame)))
    line.sendall(frame)


def get(line: socket.socket, into: memoryview | None = None) -> memoryview:
    """Returns the next frame, written to `into` if that is given; raises EOFError when nobody is there."""
    size = int(_SIZE.unpack(_exactly(line, memoryview(bytearray(_SIZE.size))))[0])
    room = memoryview(bytearray(size)) if into is None else into
    if len(room) != size:
        raise EOFError(f"a frame of {size} bytes where {len(room)} were expected")
    return _exactly(line, room)


def _exactly(line: socket.socket, room: memoryview) -> memoryview:
    done = 0
    while done < len(room):
        got = line.recv_into(room[done:])
        if not got:
            raise EOFError("the other side is gone")
        done += got
    return room


def bits_of(tensor: Tensor) -> memoryview:
    """Returns the bytes of a contiguous tensor; those of one on the CPU are its own memory."""
    return memoryview(tensor.detach().cpu().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
