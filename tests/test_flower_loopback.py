"""The whole way through Flower on the loopback, by the commands a user types; slow but for one smoke test."""

import json
import os
import re
import signal
import socket
import threading
from contextlib import closing
from pathlib import Path

import pytest

pytest.importorskip("flwr")

from flower_cluster import Cluster, Program
from tiny_runs import write_records

from fedmezo.runtime.journal import Journal
from fedmezo.studies.config import load_config
from fedmezo.studies.run import run

SMALL = [
    "model.name=builtin:tiny", "adapter.rank=2", "adapter.alpha=4", "data.max_tokens=32", "data.eval_examples=8",
    "data.template={instruction} {input} is", "federation.rounds=2", "federation.local_steps=3",
    "federation.batch_size=2", "algorithm.rate=2e-3", "algorithm.mu=1e-3", "guard.batches=0", "eval.examples=8",
    "runtime.lanes=2", "runtime.threads=1", "output.report=false", "output.tensorboard=false",
]  # fmt: skip


def settings(folder: Path, clients: int, *more: str) -> list[str]:
    return [*SMALL, f"data.path={write_records(folder)}", f"federation.clients={clients}", *more]


def simulated(told: list[str], folder: Path) -> str:
    return run(load_config(None, told), out=folder).digest


def events(cluster: Cluster) -> list[str]:
    with Journal.open(cluster.run / "journal.sqlite", readonly=True) as journal:
        return [f"{kind}: {text}" for _, kind, text in journal.events()]


@pytest.mark.timeout(240)
def test_two_clients_over_flower_give_the_bits_of_the_simulation(tmp_path):
    told = settings(tmp_path, 2)
    with Cluster(tmp_path, 2, settings=told) as cluster:
        summary = cluster.result()
    assert summary["digest"] == simulated(told, tmp_path / "simulated")
    assert summary["rounds"] == 2
    assert summary["bytes"]["up_per_client_round"] <= 4 * 3 + 96
    assert summary["bytes"]["down_per_client_round"] <= 4 * 3 * 2 + 256
    # Flower counts its own framing too.
    assert summary["flower"]["up"] > summary["bytes"]["up_total"]
    for number in range(2):
        said = (tmp_path / f"client-{number}" / "flower" / "worker.log").read_text()
        assert said.count("takes part with") == 1  # the model was loaded once
        assert len(re.findall(r"Round \d: loss", said)) == 2


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("signal", ["none", "update-difference"])
def test_three_authenticated_clients_give_the_bits_of_the_simulation(tmp_path, signal):
    told = settings(tmp_path, 3, f"personal.signal={signal}", "federation.rounds=3")
    with Cluster(tmp_path, 3, tls=True, settings=told) as cluster:
        summary = cluster.result()
    assert summary["digest"] == simulated(told, tmp_path / "simulated")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_client_trains_on_its_own_file(tmp_path):
    own = write_records(tmp_path, count=13)
    told = settings(tmp_path, 2)
    with Cluster(tmp_path, 2, settings=told, own={1: own}) as cluster:
        summary = cluster.result()
    assert json.loads((cluster.run / "clients.json").read_text())["1"] == 13
    assert summary["digest"] != simulated(told, tmp_path / "simulated")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_key_that_nobody_knows_is_not_let_in(tmp_path):
    with Cluster(tmp_path, 1, tls=True) as cluster:
        strangers = tmp_path / "strangers"
        cluster.call("certs", "init", strangers, "--clients", 1)
        (strangers / "client-0" / "ca.crt").write_bytes((cluster.certs / "client-0" / "ca.crt").read_bytes())
        told = ["client", "--server", cluster.address, "--id", 0, "--certs", strangers / "client-0"]
        stranger = Program("stranger", told, folder=tmp_path)
        try:
            # A minute of that is for a client that was killed and is back before Flower has noticed.
            cluster.until(lambda: stranger.code is not None, None, seconds=200)
        finally:
            stranger.stop()
    assert stranger.code == 1
    assert "its key is not registered there" in stranger.said().splitlines()[-1]


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("what", ["worker", "client"])
def test_a_client_killed_in_a_round_comes_back_and_nothing_is_lost(tmp_path, what):
    told = settings(tmp_path, 2, "federation.rounds=3", "federation.local_steps=400", "network.quorum=2")
    with Cluster(tmp_path, 2, settings=told) as cluster:
        victim = cluster.clients[1]
        cluster.until(lambda: "Round 0: loss" in victim.said(), victim, seconds=120)
        # The second round's walk takes a second or two; the kill falls into it, or into the way there.
        cluster.until(lambda: busy(worker_of(victim.process.pid)), victim, seconds=30)
        if what == "worker":
            os.kill(worker_of(victim.process.pid), signal.SIGKILL)
        else:
            for pid in (*descendants(victim.process.pid), victim.process.pid):
                os.kill(pid, signal.SIGKILL)
            cluster.start_client(1)
        summary = cluster.result(seconds=240)
    assert summary["rounds"] == 3
    assert summary["digest"] == simulated(told, tmp_path / "simulated")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_server_killed_in_a_round_goes_on_where_it_was(tmp_path):
    told = settings(tmp_path, 2, "federation.rounds=4", "federation.local_steps=100")
    with Cluster(tmp_path, 2, settings=told) as cluster:
        cluster.until(lambda: "Round 1: loss" in cluster.clients[0].said(), cluster.server, seconds=120)
        for pid in (*descendants(cluster.server.process.pid), cluster.server.process.pid):
            os.kill(pid, signal.SIGKILL)
        cluster.start_server(resume=True)
        summary = cluster.result(seconds=240)
        for client in cluster.clients.values():
            assert client.code is None and client.said().count("takes part with") == 1
    assert summary["rounds"] == 4
    assert summary["digest"] == simulated(told, tmp_path / "simulated")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_nothing_outside_is_asked_for(tmp_path, monkeypatch):
    asked: list[bytes] = []
    with closing(socket.create_server(("127.0.0.1", 0))) as refuser:

        def refuse() -> None:
            while True:
                try:
                    connection, _ = refuser.accept()
                except OSError:
                    return
                with closing(connection):
                    asked.append(connection.recv(200).split(b"\r\n")[0])

        threading.Thread(target=refuse, daemon=True).start()
        proxy = f"http://127.0.0.1:{refuser.getsockname()[1]}"
        for name in ("http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.setenv(name, proxy)
            monkeypatch.setenv(name.upper(), proxy)
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.setenv(name, "127.0.0.1,localhost")
        told = settings(tmp_path, 2)
        with Cluster(tmp_path, 2, tls=True, settings=told) as cluster:
            cluster.result()
        cluster.call("flower", "init", tmp_path / "app", "--set", "model.name=builtin:tiny")
        cluster.call("server", "--out", tmp_path / "dry", "--dry-run")
    assert asked == []


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def descendants(pid: int) -> list[int]:
    """Returns all processes below one, the newest first; those that were detached are not among them."""
    found = []
    for child in children(pid):
        found += [*descendants(child), child]
    return found


def worker_of(pid: int) -> int:
    """Returns the worker process below a `fedmezo client`."""
    commands = {child: Path(f"/proc/{child}/cmdline").read_bytes() for child in descendants(pid)}
    return next(child for child, command in commands.items() if b"fedmezo.flower_worker" in command)


def busy(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "R"
