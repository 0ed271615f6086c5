"""The process that keeps a client's model: private, one request after the other, and a death costs one reply."""

import os
import select
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest

import fedmezo
from fedmezo.errors import DataError, RunError
from fedmezo.runtime.frames import put
from fedmezo.runtime.keeper import Keeper
from fedmezo.runtime.resident import ask, serve_socket

ENV = {**os.environ, "PYTHONPATH": str(Path(fedmezo.__file__).parents[1])}

SERVER = """
import json, os, pathlib, sys, time
from fedmezo.errors import DataError
from fedmezo.runtime.resident import serve_socket

def answer(request):
    match request:
        case b"pid":
            return str(os.getpid()).encode()
        case b"hang":
            busy.touch()
            time.sleep(60)
        case b"refuse":
            raise DataError("no such\\n  column")
        case b"fail":
            raise ValueError("a bug")
        case b"overflow":
            raise MemoryError
    return request[::-1]

order = json.loads(sys.stdin.readline())
path = pathlib.Path(order["socket"])
busy = path.with_suffix(".busy")
time.sleep(order.get("slow", 0))
serve_socket(path, answer)
"""

WORKER = """
import dataclasses, sys, types
from fedmezo.errors import DataError
from fedmezo.flower_worker import main

@dataclasses.dataclass
class ClientOptions:
    client: int
    state: object = None
    settings: tuple = ()
    own: bool = False
    threads: int | None = None

class Resident:
    def __init__(self, asked, say):
        self.asked, self.say = asked, say

    def answer(self, request):
        if request == b"overflow":
            raise MemoryError
        self.say("a sentence")
        return str(self.asked).encode() + request

def build_resident(asked, *, say):
    print("a library prints this")
    if asked.client == 13:
        raise DataError("data.path: no file\\n nowhere.jsonl.")
    if asked.client == 14:
        raise ZeroDivisionError("by zero")
    return Resident(asked, say)

stand_in = types.SimpleNamespace(ClientOptions=ClientOptions, build_resident=build_resident)
sys.modules["fedmezo.studies.resident"] = stand_in
sys.exit(main())
"""


def keeper_of(code: str, path: Path, **options) -> Keeper:
    log, say = options.pop("log", None), options.pop("say", lambda _: None)
    return Keeper([sys.executable, "-c", code], order={"socket": str(path), **options}, env=ENV, log=log, say=say)


def poll_until(keeper: Keeper, wanted, *, seconds: float = 20.0) -> None:
    """Polls as `fedmezo client` does, only faster, until `wanted()`."""
    wait_for(lambda: keeper.poll() or wanted(), seconds=seconds)


def wait_for(wanted, *, seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not wanted():
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.01)


def is_gone(pid: int) -> bool:
    """Returns whether a process has ended; one that nobody has waited for yet has ended too."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


class Background(threading.Thread):
    """An `ask` that is under way, and what came of it."""

    def __init__(self, path: Path, request: bytes) -> None:
        super().__init__(daemon=True)
        self.path, self.request, self.found = path, request, None
        self.start()

    def run(self) -> None:
        try:
            self.found = ask(self.path, self.request)
        except RunError as error:
            self.found = error

    def result(self) -> bytes | RunError:
        self.join(20)
        assert self.found is not None, "it hangs"
        return self.found


@pytest.fixture
def path():
    """A path that is short enough, whatever pytest's own folders are."""
    with tempfile.TemporaryDirectory(prefix="fedmezo-") as folder:
        yield Path(folder) / "inner" / "worker.sock"


@pytest.fixture(scope="module")
def server():
    """A server for the tests that leave it as they found it."""
    with tempfile.TemporaryDirectory(prefix="fedmezo-") as folder:
        path = Path(folder) / "inner" / "worker.sock"
        with closing(keeper_of(SERVER, path)) as keeper:
            keeper.start()
            yield path


# Requests and answers


@pytest.mark.parametrize("request_", [b"", b"abc", os.urandom(5_000_000)], ids=["empty", "small", "large"])
def test_an_answer_is_what_was_made_of_the_request(server, request_):
    assert ask(server, request_) == request_[::-1]


def test_requests_in_a_row_are_answered_by_the_same_process(server):
    assert ask(server, b"pid") == ask(server, b"pid")


def test_requests_at_once_are_all_answered(server):
    words = [b"word %d" % number for number in range(20)]  # more than may wait for their turn
    several = [Background(server, word) for word in words]
    assert [one.result() for one in several] == [word[::-1] for word in words]


@pytest.mark.parametrize(("request_", "sentence"), [(b"refuse", "no such column"), (b"fail", "ValueError: a bug")])
def test_an_exception_is_told_to_the_one_who_asked_and_ends_nothing(server, request_, sentence):
    before = ask(server, b"pid")
    with pytest.raises(RunError) as caught:
        ask(server, request_)
    assert str(caught.value) == sentence
    assert ask(server, b"pid") == before


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        struct.pack("<Q", 2**63),
        struct.pack("<Q", 2**32 + 1),
        struct.pack("<Q", 100) + b"too little",
        struct.pack("<Q", 3) + b"too much of it",
        os.urandom(4096),
    ],
)
def test_a_connection_that_brings_garbage_disturbs_nobody(server, garbage):
    before = ask(server, b"pid")
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(str(server))
        line.sendall(garbage)
    assert ask(server, b"pid") == before


def test_one_who_does_not_wait_for_the_answer_disturbs_nobody(server):
    before = ask(server, b"pid")
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(str(server))
        line.sendall(struct.pack("<Q", 3) + b"abc")
    assert ask(server, b"pid") == before


def test_an_empty_frame_is_its_length_alone():
    sent = []  # to send nothing after it would fail when the other side has answered and closed by then
    put(SimpleNamespace(sendall=sent.append), b"")
    assert sent == [bytes(8)]


# The socket


def test_the_socket_and_its_folder_are_their_owners_alone(server):
    ask(server, b"pid")
    assert stat.S_IMODE(server.stat().st_mode) == 0o600
    assert stat.S_IMODE(server.parent.stat().st_mode) == 0o700


def test_a_folder_that_others_may_enter_is_refused(path):
    path.parent.mkdir(mode=0o755)
    path.parent.chmod(0o755)
    with pytest.raises(RunError, match=f"must be its user's alone.*755.*chmod 700 {path.parent}"):
        serve_socket(path, bytes)


def test_a_path_too_long_for_a_socket_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(RunError, match=r"at most 103 bytes.*choose a shorter folder"):
        serve_socket(tmp_path / ("x" * 100), bytes)


def test_the_longest_path_is_taken(path):
    path = path.with_name("x" * (103 - len(str(path.parent)) - 1))
    with closing(keeper_of(SERVER, path)) as keeper:
        keeper.start()
        assert ask(path, b"ab") == b"ba"


def test_a_file_at_the_path_is_not_overwritten(path):
    path.parent.mkdir(mode=0o700)
    path.write_text("dear")
    with pytest.raises(RunError, match="a file is there"):
        serve_socket(path, bytes)
    assert path.read_text() == "dear"


def test_the_socket_of_a_living_process_is_not_taken_over(server):
    before = ask(server, b"pid")
    with pytest.raises(RunError, match="Another process answers"):
        serve_socket(server, bytes)
    assert ask(server, b"pid") == before


# Patience


def test_a_request_waits_for_a_process_that_is_still_loading(path):
    with closing(keeper_of(SERVER, path, slow=0.5)) as keeper:
        keeper.start()
        assert ask(path, b"pid") == str(keeper.pid).encode()


@pytest.mark.parametrize("stale", [False, True])
def test_patience_ends_in_a_sentence(path, stale):
    if stale:  # what a process leaves that was killed
        path.parent.mkdir(mode=0o700)
        with socket.socket(socket.AF_UNIX) as line:
            line.bind(str(path))
    began = time.monotonic()
    with pytest.raises(RunError, match=r"No worker process answered at .* within 0\.2 s"):
        ask(path, b"pid", patience=0.2)
    assert 0.2 <= time.monotonic() - began < 5


def test_a_request_that_nobody_has_begun_is_asked_again(path):
    path.parent.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(str(path))
        door.listen()
        asked = Background(path, b"ab")
        select.select([door], [], [], 20)
    with closing(keeper_of(SERVER, path)) as keeper:
        keeper.start()
        assert asked.result() == b"ba"


def test_a_socket_that_may_not_be_opened_is_told_at_once(path):
    with pytest.raises(RunError, match=r"cannot be reached: .*too long"):
        ask(path.with_name("x" * 200), b"")


# Death


def test_death_in_the_middle_of_a_request_costs_that_reply_only(path):
    said = []
    with closing(keeper_of(SERVER, path, say=said.append)) as keeper:
        keeper.start()
        first = keeper.pid
        asked = Background(path, b"hang")
        wait_for(path.with_suffix(".busy").exists)
        os.kill(first, signal.SIGKILL)
        found = asked.result()
        assert isinstance(found, RunError) and "ended before it had answered" in str(found)
        next_ = Background(path, b"pid")  # asked before anybody has noticed that the process is gone
        poll_until(keeper, lambda: keeper.pid != first)
        assert next_.result() == str(keeper.pid).encode()
        assert ask(path, b"pid") == str(keeper.pid).encode()
    assert said == [
        "The worker process was killed by signal 9, perhaps for lack of memory; it is started again (1 of 5 times)."
    ]


def test_a_process_out_of_memory_ends(path):
    with closing(keeper_of(SERVER, path)) as keeper:
        keeper.start()
        first = keeper.pid
        with pytest.raises(RunError, match="ended before it had answered"):
            ask(path, b"overflow")
        poll_until(keeper, lambda: keeper.pid != first)
        assert ask(path, b"ab") == b"ba"


def test_close_ends_the_process_in_the_middle_of_a_request(path):
    keeper = keeper_of(SERVER, path)
    keeper.start()
    pid = keeper.pid
    asked = Background(path, b"hang")
    wait_for(path.with_suffix(".busy").exists)
    began = time.monotonic()
    keeper.close()
    assert time.monotonic() - began < 4  # by itself, not by force
    assert is_gone(pid) and keeper.pid is None
    assert isinstance(asked.result(), RunError)
    keeper.poll()  # what was closed is not started again
    assert keeper.pid is None
    keeper.close()


def test_the_process_ends_when_its_parent_is_killed(path):
    code = (
        "import sys, time; from fedmezo.runtime.keeper import Keeper\n"
        f"keeper = Keeper([sys.executable, '-c', {SERVER!r}], order={{'socket': {str(path)!r}}})\n"
        "keeper.start(); print(keeper.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], env=ENV, stdout=subprocess.PIPE) as parent:
        pid = int(parent.stdout.readline())
        assert ask(path, b"pid") == str(pid).encode()
        asked = Background(path, b"hang")
        wait_for(path.with_suffix(".busy").exists)
        parent.kill()
        assert isinstance(asked.result(), RunError)
    wait_for(lambda: is_gone(pid))


# The keeper


def test_a_process_that_always_ends_is_given_up_after_five_restarts():
    said = []
    with closing(Keeper(["false"], order={}, say=said.append)) as keeper:
        keeper.start()
        with pytest.raises(RunError, match="ended with code 1, for the 6th time within 10 minutes"):
            poll_until(keeper, lambda: False)
    assert [sentence.rpartition("(")[2] for sentence in said] == [f"{number} of 5 times)." for number in range(1, 6)]


def test_restarts_long_ago_do_not_count(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("fedmezo.runtime.keeper.time.monotonic", lambda: now[0])
    with closing(Keeper(["false"], order={})) as keeper:
        keeper.start()
        for _ in range(20):
            keeper._process.wait()
            keeper.poll()
            now[0] += 121


def test_a_command_that_cannot_be_started_is_told():
    with pytest.raises(RunError, match=r"cannot be started.*no-such-program"):
        Keeper(["no-such-program"], order={}).start()


def test_a_second_start_is_the_first(path):
    with closing(keeper_of(SERVER, path)) as keeper:
        assert keeper.pid is None
        keeper.start()
        first = keeper.pid
        keeper.start()
        assert keeper.pid == first


def test_the_trace_of_a_refusal_is_in_the_log(path, tmp_path):
    log = tmp_path / "worker.log"
    log.write_text("older\n")
    with closing(keeper_of(SERVER, path, log=log)) as keeper:
        keeper.start()
        with pytest.raises(RunError):
            ask(path, b"fail")
    assert log.read_text().startswith("older\nTraceback") and "ValueError: a bug" in log.read_text()


# python -m fedmezo.flower_worker


def test_the_worker_builds_what_it_is_ordered(path, tmp_path):
    log = tmp_path / "worker.log"
    order = {"client": 3, "state": str(tmp_path), "settings": ["data.path=x"], "own": True, "threads": 2}
    with closing(keeper_of(WORKER, path, log=log, **order)) as keeper:
        keeper.start()
        told = f"ClientOptions(client=3, state={tmp_path!r}, settings=('data.path=x',), own=True, threads=2)"
        assert ask(path, b"!") == told.encode() + b"!"
        assert log.read_text() == "a library prints this\nfedmezo: a sentence\n"  # at once, not at the end


def test_an_order_may_leave_out_what_has_a_default(path):
    with closing(keeper_of(WORKER, path, client=3)) as keeper:
        keeper.start()
        assert ask(path, b"") == b"ClientOptions(client=3, state=None, settings=(), own=False, threads=None)"


@pytest.mark.parametrize(
    ("client", "kind", "sentence", "code"),
    [(13, DataError, "data.path: no file nowhere.jsonl.", 2), (14, RunError, "ZeroDivisionError: by zero", 1)],
)
def test_a_worker_that_cannot_be_built_says_why_and_is_not_started_again(path, tmp_path, client, kind, sentence, code):
    said, log = [], tmp_path / "worker.log"
    with closing(keeper_of(WORKER, path, log=log, say=said.append, client=client)) as keeper:
        keeper.start()
        first, process = keeper.pid, keeper._process
        with pytest.raises(kind) as caught:
            poll_until(keeper, lambda: False, seconds=60)
        assert (type(caught.value), str(caught.value), process.returncode) == (kind, sentence, code)
        assert keeper.pid == first and said == []
    assert "a library prints this" in log.read_text() and "Traceback" in log.read_text()


def test_what_ends_a_worker_that_has_begun_is_no_reason_to_leave_it_so(path):
    with closing(keeper_of(WORKER, path, client=3)) as keeper:
        keeper.start()
        first = keeper.pid
        with pytest.raises(RunError, match="ended before it had answered"):
            ask(path, b"overflow")
        poll_until(keeper, lambda: keeper.pid != first)


def test_a_socket_that_cannot_be_is_a_reason_too(path):
    path.parent.mkdir(mode=0o700)
    path.touch()
    with closing(keeper_of(WORKER, path, client=3)) as keeper:
        keeper.start()
        with pytest.raises(RunError, match="a file is there"):
            poll_until(keeper, lambda: False, seconds=60)


# The shim


@pytest.fixture
def flower(monkeypatch):
    """Returns a function that hands one message to the ClientApp, as Flower's own process does.

    A message can be made only where a task's identity is set, which Flower does in private.
    """
    pytest.importorskip("flwr")
    from flwr.app import ConfigRecord, Context, Message, RecordDict
    from flwr.supercore.task_identity import TaskIdentity

    from fedmezo.flower_client import app

    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)

    def send(records, *, kind="train", **node_config):
        content = RecordDict({name: ConfigRecord(record) for name, record in records.items()})
        context = Context(1, 1, node_config, RecordDict(), {})
        return app(Message(content=content, message_type=kind, dst_node_id=1), context)

    return send


@pytest.mark.parametrize("kind", ["query", "train"])
def test_the_app_carries_bytes_there_and_back(flower, server, kind):
    reply = flower({"fedmezo": {"payload": b"\x00bytes\xff"}}, kind=kind, worker=str(server))
    assert {name: dict(record) for name, record in reply.content.items()} == {"fedmezo": {"payload": b"\xffsetyb\x00"}}
    assert reply.metadata.message_type == kind


def test_a_refusal_is_raised_in_the_app(flower, server):
    with pytest.raises(RunError, match=r"^no such column$"):
        flower({"fedmezo": {"payload": b"refuse"}}, worker=str(server))


@pytest.mark.parametrize(
    "records",
    [{}, {"other": {"payload": b""}}, {"fedmezo": {}}, {"fedmezo": {"payload": "text"}}, {"fedmezo": {"load": b""}}],
)
def test_a_message_of_somebody_else_is_refused(flower, server, records):
    with pytest.raises(RunError, match="not from a fedmezo server"):
        flower(records, worker=str(server))


@pytest.mark.parametrize("node_config", [{}, {"worker": 3}])
def test_a_supernode_without_a_worker_is_told_so(flower, node_config):
    with pytest.raises(RunError, match="start it with `fedmezo client`"):
        flower({"fedmezo": {"payload": b""}}, **node_config)


def test_a_simulated_node_keeps_its_client_in_its_own_process(flower):
    noted = flower({"fedmezo": {"payload": b"\3hello"}}, **{"partition-id": 1, "num-partitions": 2})
    assert noted.content["fedmezo"]["payload"] == b"\6"


@pytest.mark.parametrize("patience", [0, 0.1])
def test_patience_is_the_nodes_to_choose(flower, path, patience):
    with pytest.raises(RunError, match=f"within {patience} s"):
        flower({"fedmezo": {"payload": b""}}, worker=str(path), patience=patience)
    with pytest.raises(RunError, match="a number of seconds, got 'long'"):
        flower({"fedmezo": {"payload": b""}}, worker=str(path), patience="long")


def imported(code: str) -> set[str]:
    """Returns the modules that `code` prints the names of, in a fresh interpreter."""
    found = subprocess.run([sys.executable, "-c", code], env=ENV, capture_output=True, text=True, check=True)
    return set(found.stdout.split())


def test_the_door_needs_neither_torch_nor_numpy():
    found = imported("import sys, fedmezo.runtime.resident, fedmezo.runtime.keeper; print(*sys.modules)")
    assert "fedmezo.runtime.resident" in found
    assert not {name.partition(".")[0] for name in found} & {"torch", "numpy", "flwr", "pydantic"}


def test_the_app_imports_nothing_that_flower_has_not_imported():
    pytest.importorskip("flwr")
    code = "import sys, flwr.clientapp, flwr.app; before = set(sys.modules); import fedmezo.flower_client"
    found = imported(f"{code}; print(*set(sys.modules) - before)")
    assert "fedmezo.flower_client" in found
    assert {name.partition(".")[0] for name in found} == {"fedmezo"}
