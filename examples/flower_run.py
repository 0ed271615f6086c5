"""The Flower App of `flower_app/`, on this machine: a SuperLink, two clients, `flwr run`. About a minute.

python examples/flower_run.py [FOLDER]

It does what three people would type on three machines; on one machine, the loopback needs no certificates.
"""

import json
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from fedmezo import load_config, run
from fedmezo.runtime.flower.children import free_port
from fedmezo.runtime.flower.control import Control
from fedmezo.runtime.flower.programs import Address

APP = Path(__file__).parent / "flower_app"
folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/flower-app").absolute()
folder.mkdir(parents=True, exist_ok=True)
address = Address("127.0.0.1", free_port())


def start(stack: ExitStack, name: str, *arguments: str) -> Path:
    """Starts a `fedmezo` verb that ends with this program; returns the file of what it says."""
    said = folder / f"{name}.log"
    with said.open("w") as log:
        command = [sys.executable, "-m", "fedmezo", *arguments]
        child = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    print("fedmezo", *arguments)
    stack.callback(child.wait)
    stack.callback(child.terminate)
    return said


def wait_for(said: Path, words: str) -> None:
    """Waits until a program has said something."""
    until = time.monotonic() + 300
    while words not in said.read_text():
        if time.monotonic() > until:
            raise SystemExit(f"Not said in time: {words!r}. It said:\n{said.read_text()}")
        time.sleep(0.1)


signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that nothing it started outlives it
with ExitStack() as stack:
    # On the server's machine: Flower's SuperLink, to which anybody on the list brings runs.
    server = start(stack, "server", "server", "--port", str(address.port), "--out", str(folder / "server"))
    wait_for(server, "Submit a run")
    # On each client's machine; `--data mine.jsonl` would bring records of its own.
    clients = [start(stack, f"client-{n}", "client", "--server", str(address), "--id", str(n)) for n in range(2)]
    for said in clients:
        wait_for(said, "Connected to")
    # Anywhere: `flwr run`. Control is a thin cover of Flower's command line, with the address filled in.
    control = Control(address, home=folder / "flower", tls=None)
    print("flwr run", APP)
    ended = control.follow(control.submit(APP, changes=f'folder="{folder / "run"}"'))
    print("ended:", ended.status)

told = json.loads((folder / "run" / "summary.json").read_text())
config = load_config(folder / "run" / "config.toml")
simulated = run(config, out=folder / "simulated")
print("same bits as the simulation:", told["digest"] == simulated.digest)
