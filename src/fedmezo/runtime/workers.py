"""Several processes that walk, each with a bench of its own, for one process that serves.

    with Workers(recipe, 4) as workers:
        for report in simulate(algorithm, bench, journal=journal, ..., walkers=workers):

Task i of a round goes to process i modulo their number, and replies come back in task order, so a run is repeatable.
Before they walk, all processes get the bits of the server's model, and afterwards they prove that they still have them:
a copy costs less than to generate the directions of four steps again, and it serves resuming and rolling back as well.

A process is a fresh interpreter, not a fork: nothing of torch's threads is inherited and a caller's script needs no
`if __name__ == "__main__"`. Ctrl-C does not reach it; that is the parent's to handle. It ends, in the middle of a walk
too, as soon as the parent is gone: whatever ends the parent closes the pipe on the process's standard input.

Between the processes go frames (`frames.py`). An order is a JSON object; after "walk" follow the parameters' tensors in
name order and the tasks (`wire.py`). Replies are sent when they are asked for, so never do both sides wait to write.
"""

import json
import select
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Self

from fedmezo import errors
from fedmezo.errors import RunError
from fedmezo.fl.algorithm import Task
from fedmezo.runtime.frames import bits_of, get, put
from fedmezo.runtime.pull import Tell
from fedmezo.runtime.walkers import Walked, checksum
from fedmezo.runtime.wire import decode_reply, encode_task
from fedmezo.runtime.worker import Recipe
from fedmezo.zo.params import Params

__all__ = ["Recipe", "Workers"]

_PATIENCE = 5.0  # seconds a process gets to end by itself
_START = "import sys; sys.path[:] = {path!r}; from fedmezo.runtime.worker import serve; serve({line})"


class Workers:
    """Processes that walk; a context manager that ends them.

    Args:
      recipe: place -> the algorithm's client and a bench with a model of its own; called in process `place`. It
        goes there by its name, so it must be a function of a module, or a `functools.partial` of one whose arguments
        JSON can say.
      count: number of processes.
    """

    apart = True
    distant = False

    def __init__(self, recipe: Recipe, count: int) -> None:
        if count < 1:
            raise RunError(f"Workers: expected at least 1 process, got {count}.")
        self._workers: list[_Worker] = []
        self._rounds = 0
        self._ready = False
        packed = _by_name(recipe)
        try:
            self._workers += (_Worker(packed, place, count) for place in range(count))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the processes."""
        self.close()

    def close(self) -> None:
        """Ends the processes, whatever they are doing."""
        for worker in self._workers:
            worker.dismiss()
        for worker in self._workers:
            worker.end()

    @property
    def pids(self) -> tuple[int, ...]:
        """The process numbers."""
        return tuple(worker.process.pid for worker in self._workers)

    def there(self, clients: Sequence[int]) -> Sequence[int]:
        """Returns all of them."""
        return clients

    def start(self, tasks: Sequence[Task], params: Params, tell: Tell) -> Callable[[], Walked]:
        """Begins the walks from `params` as they are now; returns what waits for the replies, in task order.

        Raises:
          RunError: a process could not begin, or its bench is of other parameters. What happens later is raised by
            the function that is returned, so that a caller can write down what it has.
        """
        self._check_ready(params.layout())
        self._rounds += 1
        number, count = self._rounds, len(self._workers)
        busy = self._workers[: len(tasks)]
        for worker in busy:
            worker.send({"do": "walk", "number": number, "tasks": len(tasks[worker.place :: count])})
        for worker in busy:
            worker.send_model(params)
            worker.send(*map(encode_task, tasks[worker.place :: count]))
        held, shapes = checksum(params), {name: tuple(tensor.shape) for name, tensor in params}
        return lambda: self._take(number, busy, held=held, shapes=shapes)

    def _take(
        self, number: int, busy: Sequence["_Worker"], *, held: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]
    ) -> Walked:
        for worker in busy:
            worker.send({"do": "take", "number": number})
        by_place: dict[int, Walked] = {}
        for worker in _as_they_answer(busy):
            answer = worker.answer()
            if tuple(answer["held"]) != held:
                raise RunError(f"{worker} no longer has the model it was sent; this is a bug, please report it.")
            replies = tuple(decode_reply(worker.receive(), shapes=shapes) for _ in range(answer["replies"]))
            by_place[worker.place] = Walked(replies, answer["forwards"], answer["tokens"], answer["seconds"])
        parts = [by_place[worker.place] for worker in busy]
        most = max(len(part.replies) for part in parts)
        dealt = [part.replies[at] for at in range(most) for part in parts if at < len(part.replies)]
        sums = (sum(part.forwards for part in parts), sum(part.tokens for part in parts))
        return Walked(tuple(dealt), *sums, seconds=max(part.seconds for part in parts))

    def _check_ready(self, layout: str) -> None:
        """Waits, once, until every process has its bench."""
        for worker in _as_they_answer(self._workers) if not self._ready else ():
            if worker.answer()["layout"] != layout:
                raise RunError(f"{worker} has other trained parameters than the run; this is a bug, please report it.")
        self._ready = True


def _by_name(recipe: Recipe) -> bytes:
    """Returns a recipe as the name of its function, and the arguments it comes with."""
    made = recipe if isinstance(recipe, partial) else partial(recipe)
    if made.keywords:
        raise RunError(f"Workers: a recipe takes its arguments by place, got {sorted(made.keywords)} by name.")
    where = (made.func.__module__, made.func.__qualname__)
    return json.dumps({"module": where[0], "function": where[1], "arguments": made.args}).encode()


class _Worker:
    """The parent's end of one process."""

    def __init__(self, recipe: bytes, place: int, count: int) -> None:
        self.place, self._name = place, f"Worker process {place + 1} of {count}"
        self._line, other = socket.socketpair()
        with other:
            code = _START.format(path=sys.path, line=other.fileno())
            self.process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                pass_fds=[other.fileno()],
                start_new_session=True,
            )
        self.send({"place": place}, recipe)

    def __str__(self) -> str:
        """Returns its name, for messages."""
        return self._name

    def fileno(self) -> int:
        """Returns the descriptor that becomes readable when there is an answer, or nobody to give one."""
        return self._line.fileno()

    def send(self, *frames: bytes | Mapping[str, object]) -> None:
        """Sends frames; that a process is gone is said when its answer is asked for."""
        for frame in frames:
            self._send(frame if isinstance(frame, bytes) else json.dumps(frame).encode())

    def send_model(self, params: Params) -> None:
        """Sends the bits of every tensor, without a copy of them."""
        for _, tensor in params:
            self._send(bits_of(tensor))

    def _send(self, frame: bytes | memoryview) -> None:
        with suppress(OSError):
            put(self._line, frame)

    def receive(self) -> bytes:
        """Returns the next frame; raises RunError when the process is gone."""
        try:
            return bytes(get(self._line))
        except (OSError, EOFError) as error:
            raise self._gone() from error

    def answer(self) -> dict[str, Any]:
        """Returns the next answer; raises what the process raised."""
        found: dict[str, Any] = json.loads(self.receive())
        if "error" in found:
            kind = getattr(errors, found["error"], None)
            told = f"{self}: {found['error']}: {' '.join(found['text'].split())}"
            failure = kind(found["text"]) if kind else RunError(told)
            failure.add_note(found["trace"])
            raise failure
        return found

    def _gone(self) -> RunError:
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(_PATIENCE)
        code = self.process.returncode
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with code {code}"
        why = ", perhaps for lack of memory: each has a model of its own" if code == -9 else ""
        return RunError(
            f"{self} {how}{why}; every finished round is in the journal. Go on with `fedmezo resume`, if need be "
            "with fewer --workers."
        )

    def dismiss(self) -> None:
        """Tells the process to end, by closing all it hangs on."""
        self._line.close()
        if self.process.stdin is not None:
            self.process.stdin.close()

    def end(self) -> None:
        """Waits for the end of the process, and forces it."""
        try:
            self.process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _as_they_answer(workers: Sequence[_Worker]) -> Iterator[_Worker]:
    """Yields every worker once, when it has something to say."""
    waiting = {worker.fileno(): worker for worker in workers}
    poll = select.poll()
    for descriptor in waiting:
        poll.register(descriptor, select.POLLIN)
    while waiting:
        for descriptor, _ in poll.poll():
            poll.unregister(descriptor)
            yield waiting.pop(descriptor)
