"""No memory in a walk: in this process, in a worker process, in a client across a line."""

import os
import resource
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from crashing.bed import Bed, Row, Trial, telling
from crashing.fork import Tell, forked


def memory(bed: Bed) -> Iterator[Trial]:
    for at in (1, 2, 5, 9, 14, 20):
        for kind in ("MemoryError", "allocator"):
            yield f"memory {kind} {at}", lambda k=kind, n=at: _out_of_memory(bed, k, n)
    for megabytes in (0, 1, 2, 4, 8, 16, 32):
        yield f"memory address-space {megabytes}", lambda n=megabytes: _no_room(bed, n)
    for at in range(2):
        yield f"memory worker {at}", lambda n=at: _worker_killed(bed, n)
    for at in range(3):
        yield f"memory client {at}", lambda n=at: _client_killed(bed, n)


def _out_of_memory(bed: Bed, kind: str, at: int) -> Row:
    from fedmezo.models.bench import ModelBench

    folder = bed.begin("run")
    real, calls = ModelBench.losses, [0]

    def losses(self: Any, points: Any) -> Any:
        calls[0] += 1
        if calls[0] == at:
            text = "[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried to allocate"
            raise MemoryError if kind == "MemoryError" else RuntimeError(text)
        return real(self, points)

    def work(tell: Tell) -> None:
        ModelBench.losses = losses  # type: ignore[method-assign]
        bed.act("run", folder)(tell)

    ended = forked(work)
    return {"error": ended.error, "bug": ended.bug, **bed.judged("run", folder, ended)}


def _no_room(bed: Bed, megabytes: int) -> Row:
    """The process may not grow by more than this; before its first round it has nobody to tell that in a sentence."""
    folder = bed.begin("run")

    def work(tell: Tell) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + megabytes * 1_000_000
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        bed.act("run", folder)(tell)

    ended = forked(work)
    row = {"signal": ended.signal, "error": ended.error, "raised": ended.bug}
    return {**row, **bed.judged("run", folder, ended)}


def _worker_killed(bed: Bed, at: int) -> Row:
    """The system kills a worker process, as it does when memory is short."""
    from fedmezo.runtime.workers import Workers
    from fedmezo.studies.run import run

    folder = bed.begin("workers")

    def work(tell: Tell) -> None:
        watch, real = telling(tell), Workers.start
        told = watch.round

        def starts(self: Workers, *given: Any) -> Any:
            wait = real(self, *given)
            if given[0][0].round == at:
                os.kill(self.pids[1], signal.SIGKILL)
            return wait

        watch.round = told
        Workers.start = starts  # type: ignore[method-assign]
        run(bed.config("workers"), out=folder, watch=watch)

    ended = forked(work)
    return {"error": ended.error, "bug": ended.bug, **bed.judged("workers", folder, ended)}


def _client_killed(bed: Bed, at: int) -> Row:
    """A client across a line has no memory for a walk: its process ends, another one takes its place."""
    from fake_line import Crash, FakeLine

    from fedmezo.runtime import distant
    from fedmezo.studies import build
    from fedmezo.studies.resident import ClientOptions, build_resident
    from fedmezo.studies.run import run

    distant._POLL, distant._GREET, distant._PAUSE = 0.0005, 0.0, 0.002
    folder, whole = bed.begin("run"), bed.begin("run")
    config = bed.config("run")
    config = config.model_copy(update={"network": config.network.model_copy(update={"quorum": 3})})

    def line(*, dies: bool) -> FakeLine:
        handlers = {
            10 + client: build_resident(ClientOptions(client=client, trusting=True)).answer for client in range(3)
        }
        made, inner, walks = FakeLine(handlers), handlers[11], [0]

        def answer(request: bytes) -> bytes:
            walks[0] += request[:1] == b"\2"
            if dies and walks[0] == at + 1 and request[:1] == b"\2":
                made.online.remove(11)
                made.handlers[77] = build_resident(ClientOptions(client=1, trusting=True)).answer
                made.online.add(77)
                raise Crash("MemoryError")
            return bytes(inner(request))

        made.handlers[11] = answer
        return made

    def work(tell: Tell) -> None:
        build.load_model = build.load_model.__wrapped__  # type: ignore[attr-defined]  # each has a model of its own
        digests = [run(config, out=out, line=line(dies=out is folder)).digest for out in (folder, whole)]
        tell({"equal": digests[0] == digests[1]})

    ended = forked(work)
    equal = any(one.get("equal") for one in ended.told)
    for path in (folder, whole):
        shutil.rmtree(path, ignore_errors=True)
    return {"error": ended.error, "bug": ended.bug, "lost": 0, "equal": equal}
