"""A run over Flower on this machine's loopback, with TLS and keys, beside the same run in one process.

Run: FEDMEZO_DATA=... python scripts/across_machines.py --out DIR [--config configs/gsm8k.toml] [--set KEY=VALUE]... [--json FILE]

It makes certificates, starts `fedmezo server` and one `fedmezo client` per client as processes, waits for the end, then
simulates the same configuration and compares the digests of what was trained. Nothing but the commands of the command
line is used; all their output is kept in DIR. What it prints is one JSON object: digests, payloads, times.
"""

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from fedmezo.runtime.journal import Journal
from fedmezo.studies.config import load_config

FEDMEZO = [sys.executable, "-m", "fedmezo"]
MARK = b"FEDMEZO_MEASURED_BY"
PROGRAMS = ("flower-superlink", "flower-supernode", "flower-superexec", "flwr-serverapp", "flwr-clientapp",
            "fedmezo.flower_worker", "fedmezo server", "fedmezo client")  # fmt: skip
ROOT = Path(__file__).resolve().parent.parent


def start(arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Starts a command whose output goes to a file."""
    with log.open("wb") as file:
        return subprocess.Popen([*FEDMEZO, *arguments], stdout=file, stderr=subprocess.STDOUT, start_new_session=True)


def free_port() -> int:
    """Returns a port nobody listens on."""
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return int(door.getsockname()[1])


def watch_memory_(peaks: dict[str, int]) -> None:
    """Raises each program's largest resident set, MB, to what its processes under this one show now."""
    for folder in Path("/proc").iterdir():
        try:
            command = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            ours = str(os.getpid()).encode() in (folder / "environ").read_bytes().partition(MARK + b"=")[2][:12]
            peak = re.search(r"VmHWM:\s+(\d+)", (folder / "status").read_text())
        except OSError:
            continue
        name = next((name for name in PROGRAMS if name in " ".join(command)), None)
        if ours and name is not None and peak is not None:
            peaks[name] = max(peaks.get(name, 0), round(int(peak[1]) * 1024 / 1e6))


def across(config: Sequence[str], *, clients: int, out: Path, peaks: dict[str, int]) -> float:
    """Runs over Flower; returns the seconds it took from the start of the server to its end."""
    os.environ[MARK.decode()] = str(os.getpid())
    certs, port = out / "certs", str(free_port())
    subprocess.run([*FEDMEZO, "certs", "init", str(certs), "--clients", str(clients)], check=True, stdout=sys.stderr)
    began = time.perf_counter()
    server = start(
        ["server", *config, "--out", str(out / "distributed"), "--port", port, "--certs", str(certs)],
        out / "server.log",
    )
    joined = [
        start(
            ["client", "--trust", "--server", f"127.0.0.1:{port}", "--id", str(client), "--certs", str(certs / f"client-{client}"),
             "--state", str(out / f"state-{client}")],
            out / f"client-{client}.log",
        )
        for client in range(clients)
    ]  # fmt: skip
    try:
        while server.poll() is None:
            time.sleep(0.5)
            watch_memory_(peaks)
        if server.returncode != 0:
            raise SystemExit((out / "server.log").read_text())
        return time.perf_counter() - began
    finally:
        for process in (*joined, server):
            if process.poll() is None:
                os.kill(process.pid, signal.SIGTERM)
        for process in joined:
            process.wait(60)


def summary_of(out: Path, *, clients: int, steps: int) -> dict[str, object]:
    """Returns what the two runs left behind, side by side."""
    told = {name: json.loads((out / name / "summary.json").read_text()) for name in ("distributed", "simulated")}
    with Journal.open(out / "distributed" / "journal.sqlite", readonly=True) as journal:
        rounds = list(journal.rounds())
    steady = [entry for done in rounds[1:] for entry in done.entries]
    walks = [re.findall(r"Round \d+: loss \S+, ([\d.]+) s", log(out, client)) for client in range(clients)]
    slowest = [max(map(float, at)) for at in zip(*walks, strict=True)]
    return {
        "digest": told["distributed"]["digest"],
        "same bits as simulated": told["distributed"]["digest"] == told["simulated"]["digest"],
        "clients": clients,
        "rounds": len(rounds),
        "steps": steps,
        "payload up, bytes, at most": max(entry.bytes_up for entry in steady),
        "allowed up": 4 * steps + 96,
        "payload down, bytes, at most": max(entry.bytes_down for entry in steady),
        "allowed down": 4 * steps * clients + 256,
        "flower, bytes": told["distributed"].get("flower"),
        "models loaded per client": [log(out, client).count("takes part with") for client in range(clients)],
        "round, seconds": [round(done.seconds, 2) for done in rounds],
        "slowest walk, seconds": slowest,
        "round beyond the walk, seconds, median": round(
            median(done.seconds - walk for done, walk in zip(rounds[1:], slowest[1:], strict=True)), 2
        ),
        "evaluation loss": {when: metrics["loss"] for when, metrics in told["distributed"]["eval"].items()},
        "dim": told["distributed"]["dim"],
    }


def log(out: Path, client: int) -> str:
    """Returns what a client said."""
    return (out / f"client-{client}.log").read_text()


def main() -> None:
    """Does both runs and prints how they compare."""
    asked = argparse.ArgumentParser()
    asked.add_argument("--out", type=Path, required=True)
    asked.add_argument("--config", default=str(ROOT / "configs/gsm8k.toml"))
    asked.add_argument("--set", action="append", default=[], dest="settings")
    asked.add_argument("--json", type=Path)
    given = asked.parse_args()
    # One client per forward pass and one thread: as many as a client on its own machine has.
    settings = ["runtime.lanes=2", "runtime.threads=1", *given.settings]
    wanted = load_config(given.config, settings)
    clients, steps = wanted.federation.clients, wanted.federation.local_steps * wanted.algorithm.directions
    told = [given.config, *(part for one in settings for part in ("--set", one))]
    given.out.mkdir(parents=True)
    peaks: dict[str, int] = {}
    seconds = across(told, clients=clients, out=given.out, peaks=peaks)
    began = time.perf_counter()
    subprocess.run(
        [*FEDMEZO, "run", *told, "--out", str(given.out / "simulated"), "--quiet"], check=True, stdout=sys.stderr
    )
    found = summary_of(given.out, clients=clients, steps=steps)
    found |= {"memory at most, MB": dict(sorted(peaks.items()))}
    found |= {"seconds in all": round(seconds, 1), "simulated, seconds": round(time.perf_counter() - began, 1)}
    text = json.dumps(found, indent=2)
    print(text)
    if given.json:
        given.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
