"""What the network verbs start: command lines, app folder, run configuration, programs that end with their verb."""

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmezo.errors import ConfigError, RunError
from fedmezo.runtime.flower import children, control, programs
from fedmezo.runtime.flower.children import Child, Lines, free_port, listens, settle, tail
from fedmezo.runtime.flower.control import Control, RunState, answers, wait_until_ready
from fedmezo.runtime.flower.folder import write_app
from fedmezo.runtime.flower.programs import Address, Tls, connection, environment, superlink, supernode
from fedmezo.studies.appconfig import app_config, config_of
from fedmezo.studies.config import Config, parse_config

pytest.importorskip("flwr")
with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from fedmezo.cli import main

HERE = Address("127.0.0.1", 8000)
TLS = Tls(Path("/c/ca.crt"), Path("/c/server.pem"), Path("/c/server.key"))

# ---- addresses and command lines


@pytest.mark.parametrize(
    ("text", "host", "port", "loopback"),
    [
        ("127.0.0.1:8000", "127.0.0.1", 8000, True),
        ("localhost:1", "localhost", 1, True),
        ("[::1]:9", "::1", 9, True),
        ("tuning.example.org:65535", "tuning.example.org", 65535, False),
        ("[2001:db8::5]:80", "2001:db8::5", 80, False),
        ("0.0.0.0:80", "0.0.0.0", 80, False),
    ],
)
def test_an_address_is_read_and_written_alike(text, host, port, loopback):
    found = Address.parse(text)
    assert (found.host, found.port, found.loopback, str(found)) == (host, port, loopback, text)


@pytest.mark.parametrize(
    "text", ["", "host", "host:", ":80", "host:0", "host:65536", "host:x", "::1:80", "[::1]", "[h]:1"]
)
def test_what_is_no_address_is_refused(text):
    with pytest.raises(ConfigError, match="expected HOST:PORT"):
        Address.parse(text)


def test_all_addresses_of_a_machine_are_reached_by_its_loopback():
    assert Address("0.0.0.0", 5).from_here == Address("127.0.0.1", 5)
    assert Address("::", 5).from_here == Address("::1", 5)
    assert Address("192.0.2.7", 5).from_here == Address("192.0.2.7", 5)


def test_only_an_open_connection_is_insecure_and_keys_go_with_certificates():
    plain = superlink(HERE, database=Path("/d"), tls=None)
    assert "--insecure" in plain and "--enable-supernode-auth" not in plain
    safe = superlink(HERE, database=Path("/d"), tls=TLS)
    assert "--insecure" not in safe and "--enable-supernode-auth" in safe and "/c/server.key" in safe
    told = {"worker": "/a b/w.sock", "client-id": 3}
    node = supernode(HERE, tls=Tls(TLS.ca, key=Path("/k")), own=Address("127.0.0.1", 9), config=told)
    assert node[1:5] == ["--root-certificates", "/c/ca.crt", "--auth-supernode-private-key", "/k"]
    assert node[-1] == 'worker="/a b/w.sock" client-id=3'
    assert "--insecure" in supernode(HERE, tls=None, own=HERE, config={})


def test_flower_reads_a_node_configuration_and_a_connection_as_meant(tmp_path, monkeypatch):
    from flwr.cli.flower_config import read_superlink_connection
    from flwr.common.config import parse_config_args

    told = {"worker": "/a b/w.sock", "client-id": 3}
    line = supernode(HERE, tls=None, own=HERE, config=told)[-1]
    assert parse_config_args([line]) == told
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    for tls in (None, TLS):
        (tmp_path / "config.toml").write_text(connection(HERE, tls=tls))
        found = read_superlink_connection(None)
        assert (found.address, found.insecure) == ("127.0.0.1:8000", tls is None)
        assert found.root_certificates == (None if tls is None else "/c/ca.crt")


def test_flower_s_programs_call_nobody_and_are_found_beside_this_python(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.setenv("MINE", "kept")
    env = environment(tmp_path / "home")
    assert env["FLWR_HOME"] == str(tmp_path / "home") and env["MINE"] == "kept"
    assert env["FLWR_TELEMETRY_ENABLED"] == "0"
    assert env["FLWR_DISABLE_UPDATE_CHECK"] == env["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert env["PATH"].split(os.pathsep) == [str(Path(sys.executable).parent), "/usr/bin"]


def test_a_missing_or_other_flower_is_one_sentence(monkeypatch):
    monkeypatch.setattr(programs, "version", lambda _: "1.42.0")
    with pytest.raises(ConfigError, match=r"needs Flower 1\.41, got 1\.42\.0; run: pip install 'fedmezo\[flower\]'"):
        programs.need_flower()
    monkeypatch.setattr(programs.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"not installed; run: pip install 'fedmezo\[flower\]'"):
        programs.need_flower()


# ---- the run configuration and the app folder

words = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12)
configs = st.builds(
    lambda **sections: parse_config(sections),
    model=st.fixed_dictionaries({"name": words}, optional={"revision": words}),
    adapter=st.sampled_from([{}, {"preset": "paper"}, {"targets": ["q_proj", '["x"]']}, {"targets": "auto"}]),
    data=st.fixed_dictionaries(
        {"path": words},
        optional={
            "columns": st.dictionaries(words, words, max_size=2),
            "categories": st.one_of(st.lists(words, min_size=1, max_size=2), st.integers(1, 9), st.just("all")),
            "choices": st.lists(words, max_size=2),
            "template": words,
            "limit": st.one_of(st.just("all"), st.integers(1, 9)),
            "seed": st.integers(0, 2**63 - 1),
        },
    ),
    federation=st.fixed_dictionaries(
        {},
        optional={
            "budget": st.dictionaries(st.sampled_from(["tokens", "seconds"]), st.floats(1e-9, 1e18), max_size=2),
            "bandwidth": st.floats(1e-300, 1e300),
            "cohort": st.sampled_from(["all", 1, 3]),
        },
    ),
    algorithm=st.fixed_dictionaries(
        {},
        optional={
            "clip": st.one_of(st.just("none"), st.floats(1e-9, 1e9)),
            "rate": st.one_of(st.just("auto"), st.floats(1e-30, 1)),
            "adapt": st.sampled_from(["auto", True, False]),
        },
    ),
)


@given(config=configs)
@settings(max_examples=60, deadline=None)
def test_a_configuration_goes_to_flower_and_back_unchanged(config, tmp_path_factory):
    told = app_config(config, folder="/runs/x", resume=True, more=7)
    assert config_of(told) == config
    assert all(type(value) in (str, int, float, bool) for value in told.values())
    assert (told["folder"], told["resume"], told["more"]) == ("/runs/x", True, 7)
    folder = tmp_path_factory.getbasetemp() / "app"
    write_app(folder, told)
    assert flower_reads(folder) == told


def flower_reads(folder: Path, *changes: str) -> dict:
    """Returns the run configuration as Flower gives it to a server app."""
    from flwr.common.config import get_fused_config_from_dir, parse_config_args

    return get_fused_config_from_dir(folder, parse_config_args(list(changes)))


def test_every_key_of_a_configuration_can_be_changed_for_a_run(tmp_path):
    config = parse_config({"federation": {"budget": {"forwards": 9}}})
    told = app_config(config, folder="/r")
    assert {key.split(".")[0] for key in told} == {"folder", "resume", "more", *Config.model_fields}
    write_app(tmp_path, told)
    changed = config_of(
        flower_reads(tmp_path, 'federation.rounds=5 algorithm.rate=0.5 data.limit="all"', "folder='/s'")
    )
    assert (changed.federation.rounds, changed.algorithm.rate, changed.federation.budget) == (5, 0.5, {"forwards": 9})


def test_what_a_run_configuration_may_not_say_is_told_by_its_key():
    told = app_config(parse_config({}), folder="")
    for changes, says in [
        ({"federation.rounds": 0}, r"federation\.rounds: expected a whole number >= 1, got 0"),
        ({"data.choices": "[1"}, r"data\.choices: expected a list or table as JSON"),
        ({"federation.local_step": 3}, "Unknown key 'local_step'"),
        ({"nothing.at": 1}, "nothing"),
    ]:
        with pytest.raises(ConfigError, match=says):
            config_of(told | changes)


def test_the_app_folder_is_a_flower_app_of_the_installed_package(tmp_path):
    from flwr.common.config import validate_config

    write_app(tmp_path / "app", app_config(parse_config({}), folder="/r"))
    found = tomllib.loads((tmp_path / "app" / "pyproject.toml").read_text())
    assert validate_config(found, check_module=False) == (True, [], [])
    assert found["tool"]["flwr"]["app"]["components"] == {
        "serverapp": "fedmezo.flower_server:app",
        "clientapp": "fedmezo.flower_client:app",
    }
    with pytest.raises(ConfigError, match="takes text, numbers and booleans, got None"):
        write_app(tmp_path / "app", {"a": None})


# ---- programs


def sleeper(tmp_path: Path, body: str) -> Child:
    code = f"import os, signal, subprocess, sys, time\n{body}\nprint('ready', flush=True)\ntime.sleep(60)"
    child = Child("The sleeper", [sys.executable, "-c", code], env=environment(tmp_path), log=tmp_path / "log")
    until(lambda: "ready" in child.said())
    return child


def until(true, seconds: float = 20.0) -> None:
    limit = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < limit
        time.sleep(0.02)


def alive(number: int) -> bool:
    """Whether a process runs; one that nobody has asked for its exit code does not."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


DETACHED = """
there = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], start_new_session=True)
print('child', there.pid, flush=True)
"""


def test_closing_ends_a_program_and_what_it_started_in_sessions_of_their_own(tmp_path):
    child = sleeper(tmp_path, DETACHED)
    other = int(child.said().split("child ")[1].split()[0])
    assert alive(child.pid) and alive(other)
    child.close()
    assert child.code == -signal.SIGTERM and not alive(other)
    child.close()


def test_what_will_not_end_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(children, "_PATIENCE", 0.3)
    child = sleeper(tmp_path, "signal.signal(signal.SIGTERM, signal.SIG_IGN)")
    child.close()
    assert child.code == -signal.SIGKILL


VERB = """
import os, sys, time
from pathlib import Path
from fedmezo.runtime.flower.children import Child
from fedmezo.runtime.flower.programs import environment
home = Path(sys.argv[1])
Child("It", [sys.executable, "-c", sys.argv[2]], env=environment(home), log=home / "log")
time.sleep(60)
"""
STUBBORN = DETACHED.replace("there", "import subprocess, sys, time\nthere", 1) + "time.sleep(60)"


def test_a_killed_verb_takes_its_program_with_it_and_the_rest_is_ended_by_the_next(tmp_path):
    verb = subprocess.Popen([sys.executable, "-c", VERB, str(tmp_path), STUBBORN])
    log = tmp_path / "log"
    until(lambda: log.exists() and log.read_text().endswith("\n"))  # a line may come in pieces
    left = int(log.read_text().split("child ")[1].split()[0])
    found = settle(tmp_path)
    assert left in found and len(found) == 2  # its verb runs, so nothing was touched
    verb.kill()
    verb.wait()
    until(lambda: not alive(next(number for number in found if number != left)))
    assert alive(left)
    assert settle(tmp_path) == []
    assert not alive(left)


def test_a_program_that_is_not_there_ends_at_once_and_its_log_says_so(tmp_path):
    child = Child("It", ["no-such-program-anywhere"], env=environment(tmp_path), log=tmp_path / "log")
    until(lambda: child.code is not None)
    assert "no-such-program-anywhere" in child.said() or "FileNotFoundError" in child.said()


def test_lines_come_whole_and_once(tmp_path):
    path = tmp_path / "log"
    lines, later = Lines(path, told=False), Lines(tmp_path / "other")
    assert lines.new() == [] == later.new()
    path.write_bytes(b"one\ntwo\nth")
    assert lines.new() == ["one", "two"] and lines.new() == []
    with path.open("ab") as file:
        file.write("ree ü".encode() + b"\xff\n")
    assert lines.new() == ["three ü\ufffd"]
    assert Lines(path).new() == []


def test_a_log_ends_in_its_last_lines():
    assert tail("a\n\n b \nc\nd\n\n") == "b / c / d" and tail("") == ""


def test_readiness_is_of_our_program_not_of_another_at_its_port(tmp_path):
    child = Child(
        "The sleeper", [sys.executable, "-c", "print('no port')"], env=environment(tmp_path), log=tmp_path / "l"
    )
    with pytest.raises(RunError, match="The sleeper ended with code 0: no port"):
        wait_until_ready(child, Address("127.0.0.1", free_port()), tls=None)


def test_what_is_asked_of_flower_fails_in_its_own_last_sentence(tmp_path, monkeypatch):
    desk = Control(Address("127.0.0.1", free_port()), home=tmp_path, tls=None)
    said = {"success": False, "error-message": "Using SuperLink: fedmezo\n\nThe run is unknown.\n"}
    monkeypatch.setattr(control, "flwr_list", lambda run: ["echo", "hint\n", json.dumps(said)])
    with pytest.raises(RunError, match="refused: The run is unknown"):
        desk.state("7")
    monkeypatch.setattr(control, "flwr_list", lambda run: ["sh", "-c", "echo broken >&2"])
    with pytest.raises(RunError, match="failed: broken"):
        desk.state("7")
    good = {"success": True, "runs": [{"status": "finished:failed", "status-details": "why"}]}
    monkeypatch.setattr(control, "flwr_list", lambda run: ["echo", "hint\n", json.dumps(good, indent=1)])
    assert desk.state("7") == RunState("finished:failed", "why")


def test_a_failed_run_is_told_in_the_server_app_s_words():
    raised = RunState("finished:failed", "ServerApp failed with exception: Give more clients.")
    assert raised.ended and not raised.good and raised.reason == "Give more clients."
    assert RunState("finished:stopped", "").reason == "The run was stopped by `flwr stop`."
    assert "unknown error" in RunState("finished:failed", "Task failed with unknown error.").reason
    assert not RunState("running", "").ended and RunState("finished:completed", "").good


# ---- the verbs


def told(capfd) -> str:
    out, _ = capfd.readouterr()
    return out


def test_dry_runs_print_what_starts_and_start_nothing(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["certs", "init", "c", "--clients", "2"]) == 0
    told(capfd)
    tried = ["--set", "model.name=builtin:tiny", "--out", "r"]
    assert main(["server", *tried, "--certs", "c", "--host", "0.0.0.0", "--dry-run"]) == 0
    script = told(capfd)
    for part in (
        "FLWR_HOME=",
        "--enable-supernode-auth",
        "client-1/key.pub",
        "flwr run",
        "flower init",
        "127.0.0.1:8000",
    ):
        assert part in script
    assert script.index("flower-superlink") < script.index("register") < script.index("flwr run")
    assert main(["client", "--server", "192.0.2.7:8000", "--id", "1", "--certs", "c/client-1", "--dry-run"]) == 0
    script = told(capfd)
    for part in ("--auth-supernode-private-key", "fedmezo.flower_worker", "client-id=1", '"client": 1', '"own": false'):
        assert part in script
    asked = ["submit", "--server", "192.0.2.7:8000", "--out", "/srv/run", "--certs", "c", "--dry-run", "--json"]
    assert main(asked) == 0
    assert any("flwr run" in line for line in json.loads(told(capfd))["commands"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c"]


def test_a_client_s_own_records_are_named_and_marked(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.jsonl").write_text("{}")
    asked = ["client", "--server", "localhost:1", "--id", "0", "--data", "mine.jsonl", "--set", "data.limit=5"]
    assert main([*asked, "--threads", "2", "--state", "s", "--dry-run"]) == 0
    order = json.loads(told(capfd).split("echo '")[1].split("'")[0])
    assert order.pop("socket").endswith("worker.sock")
    assert order == {
        "client": 0,
        "state": str(tmp_path / "s"),
        "settings": [f"data.path={tmp_path / 'mine.jsonl'}", "data.limit=5"],
        "own": True,
        "threads": 2,
        "trusting": False,
    }


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["server", "--host", "0.0.0.0"], "needs --certs"),
        (["client", "--server", "192.0.2.7:8000", "--id", "0"], "needs --certs"),
        (["submit", "--server", "192.0.2.7:8000", "--out", "/r"], "needs --certs"),
        (["server", "--certs", "c", "--insecure"], "exclude each other"),
        (["server", "--certs", "c"], "has no file ca.crt"),
        (["server", "--rounds", "3"], "--rounds is for a run"),
        (["server", "--resume", "r", "--out", "s"], "give no CONFIG"),
        (["server", "--resume", "r"], "holds no run"),
        (["server", "--set", "federation.rounds=0"], "expected a whole number >= 1"),
        (["client", "--server", "localhost", "--id", "0"], "expected HOST:PORT"),
        (["client", "--server", "localhost:1", "--id", "0", "--data", "no.jsonl"], "there is no file no.jsonl"),
        (["submit", "--server", "192.0.2.7:8000", "--insecure", "--out", "r"], "from its root on"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_sentence_before_anything_starts(tmp_path, capfd, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    err = capfd.readouterr().err
    assert err.startswith("error: ") and says in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", ["server", "client", "submit", "certs init", "flower init"])
def test_every_option_and_argument_is_explained_in_80_columns(capfd, monkeypatch, verb):
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*verb.split(), "--help"]) == 0
    lines = told(capfd).splitlines()
    assert max(map(len, lines)) <= 80
    starts = [line for line in lines if line.startswith("│") and line[5:7].strip()]
    assert starts and all(len(line.strip("│* ").split()) > 3 for line in starts)


def test_a_server_tells_how_to_join_it_by_a_name_of_its_certificate_and_warns_of_its_open_port(tmp_path):
    from fedmezo.cli_flower import _how_to_join
    from fedmezo.runtime.flower.certs import make_certificates, server_tls
    from fedmezo.studies.host import Hosting

    make_certificates(tmp_path, hosts=["tuning.example.org"], clients=1)
    asked = Hosting(Address("0.0.0.0", 8000), tmp_path, server_tls(tmp_path))
    said = "\n".join(_how_to_join(asked, tmp_path))
    assert "fedmezo client --server tuning.example.org:8000 --id 0 --certs client-0" in said
    assert said.startswith("Warning: whoever reaches 0.0.0.0:8000 can start programs")
    near = "\n".join(_how_to_join(Hosting(HERE, tmp_path), None))
    assert "Warning" not in near and near.splitlines()[1].endswith("--server 127.0.0.1:8000 --id 0")


def test_an_app_folder_is_written_once(tmp_path, capfd):
    asked = ["flower", "init", str(tmp_path / "app"), "--set", "federation.rounds=7", "--out", "/srv/run"]
    assert main(asked) == 0
    found = flower_reads(tmp_path / "app")
    assert (found["federation.rounds"], found["folder"]) == (7, "/srv/run")
    assert main(asked) == 2
    assert "holds a pyproject.toml already" in capfd.readouterr().err


def test_a_port_or_a_folder_in_use_is_told_before_anything_starts(tmp_path, capfd):
    import socket

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert listens(Address("0.0.0.0", port))
        assert main(["server", "--out", str(tmp_path / "r"), "--port", str(port)]) == 2
        assert "Another program listens on" in capfd.readouterr().err
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "journal.sqlite").touch()
    asked = ["server", "--set", "model.name=builtin:tiny", "--out", str(tmp_path / "r"), "--port", str(free_port())]
    assert main(asked) == 2
    assert "fedmezo server --resume" in capfd.readouterr().err


def test_a_server_that_speaks_otherwise_is_told_apart_from_none(tmp_path):
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    from fedmezo.runtime.flower.certs import make_certificates, server_tls

    class Healthy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_) -> None:
            pass

    make_certificates(tmp_path / "c", hosts=[], clients=1)
    tls = server_tls(tmp_path / "c")
    with HTTPServer(("127.0.0.1", 0), Healthy) as plain:
        threading.Thread(target=plain.serve_forever, daemon=True).start()
        at = Address("127.0.0.1", plain.server_port)
        assert answers(at, tls=None)
        with pytest.raises(RunError, match="does not speak TLS"):
            answers(at, tls=tls)
        plain.shutdown()
    assert not answers(Address("127.0.0.1", free_port()), tls=None)
    assert not answers(Address("127.0.0.1", free_port()), tls=tls)


# ---- the whole way, with Flower's own programs


def test_server_and_clients_start_meet_and_end_by_keys_alone(tmp_path):
    from flower_cluster import Cluster

    with Cluster(tmp_path, 2, tls=True) as cluster:
        clients = dict(cluster.clients)
        assert "Submit a run with:" in cluster.server.said()
        with pytest.raises(RunError, match="does not speak plain HTTP"):
            answers(Address("127.0.0.1", cluster.port), tls=None)
        before = started_in(tmp_path)
        assert len(before) >= 3
        assert clients[0].stop() == 130
    assert clients[1].code == cluster.server.code == 130
    until(lambda: not any(map(alive, before)))
    assert "error: Stopped" in clients[0].said() and "error: Stopped." in cluster.server.said()


def started_in(work: Path) -> list[int]:
    """Returns the running programs of Flower that keep their things under a folder."""
    return [number for number, env in children._environments() if env.get("FLWR_HOME", "").startswith(str(work))]


@pytest.mark.slow
def test_a_client_without_a_known_key_is_told_so_and_ends(tmp_path):
    from flower_cluster import Cluster

    with Cluster(tmp_path, 1, tls=True) as cluster:
        cluster.call("certs", "init", tmp_path / "other", "--clients", "1")
        # Another authority is noticed at once; a strange key is tried for as long as a killed client is remembered.
        wrong = cluster._start(
            "wrong", ["client", "--server", cluster.address, "--id", "5", "--certs", tmp_path / "other/client-0"]
        )
        cluster.until(lambda: wrong.code is not None, None, seconds=60)
        assert wrong.code == 1 and "certificate" in wrong.said()
        (tmp_path / "other/client-0/ca.crt").write_bytes((cluster.certs / "ca.crt").read_bytes())
        strange = cluster._start(
            "strange", ["client", "--server", cluster.address, "--id", "5", "--certs", tmp_path / "other/client-0"]
        )
        cluster.until(lambda: "does not let client 5 in" in strange.said(), strange, seconds=60)
        cluster.until(lambda: strange.code is not None, None, seconds=200)
        assert strange.code == 1 and "exit code 305" in strange.said()


@pytest.mark.slow
def test_a_client_that_was_killed_comes_back_and_one_of_a_new_server_joins_again(tmp_path):
    from flower_cluster import Cluster

    with Cluster(tmp_path, 1, tls=True) as cluster:
        cluster.clients[0].stop(signal.SIGKILL)
        cluster.start_client(0)
        cluster.wait_for_client(0)
        cluster.server.stop()
        for path in (tmp_path / "run" / "flower").glob("superlink.db*"):
            path.unlink()
        cluster.start_server()
        client = cluster.clients[0]
        cluster.until(lambda: client.said().count("Connected to") == 2, client, seconds=90)
        assert "joining again" in client.said()


@pytest.mark.slow
def test_a_client_waits_for_its_server(tmp_path):
    from flower_cluster import Cluster

    cluster = Cluster(tmp_path, 0)
    try:
        client = cluster.start_client(0)
        cluster.until(lambda: "No server answers" in client.said(), client, seconds=60)
        cluster.start_server()
        cluster.wait_for_client(0)
        assert client.stop(signal.SIGINT) == 130
    finally:
        cluster.close()
