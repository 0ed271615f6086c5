"""How long a round over Flower takes beyond its walks, against the least that Flower itself needs for a round.

Run: python benchmarks/flower_rounds.py --json benchmarks/results/flower-rounds.json

Both are measured in one run of one SuperLink with two SuperNodes each, on this machine's loopback: an app of ten lines
whose client answers an empty message at once and whose server looks for answers every 0.1 s, and a run of fedmezo with
the built-in model and two steps a round.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from flower_cluster import Cluster

from fedmezo.runtime.flower.control import Control
from fedmezo.runtime.flower.programs import Address
from fedmezo.runtime.journal import Journal

ROUNDS = 8
APP = """
import json, time
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

client = ClientApp()

@client.train()
def answer(msg, context):
    return Message(content=RecordDict({"r": ConfigRecord({"b": b"x"})}), reply_to=msg)

server = ServerApp()

@server.main()
def main(grid, context):
    while len(list(grid.get_node_ids())) < 2:
        time.sleep(0.1)
    seconds = []
    for number in range(context.run_config["rounds"]):
        began = time.perf_counter()
        content = RecordDict({"r": ConfigRecord({"b": bytes([number])})})
        ids = set(grid.push_messages([Message(content, node, MessageType.TRAIN) for node in grid.get_node_ids()]))
        while ids:
            ids -= {m.metadata.reply_to_message_id for m in grid.pull_messages(ids)}
            time.sleep(0.1 if ids else 0)
        seconds.append(time.perf_counter() - began)
    with open(context.run_config["out"], "w") as file:
        json.dump(seconds, file)
"""
PROJECT = f"""
[project]
name = "floor"
version = "1.0.0"
description = "The least a round needs"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "fedmezo"
[tool.flwr.app.components]
serverapp = "floor.app:server"
clientapp = "floor.app:client"
[tool.flwr.app.config]
rounds = {ROUNDS}
out = "OUT"
"""


def floor(cluster: Cluster) -> list[float]:
    """Returns the seconds of every round of the app of ten lines."""
    folder, out = cluster.work / "floor", cluster.work / "floor.json"
    (folder / "floor").mkdir(parents=True)
    (folder / "floor" / "__init__.py").touch()
    (folder / "floor" / "app.py").write_text(APP)
    (folder / "pyproject.toml").write_text(PROJECT.replace("OUT", str(out)))
    control = Control(Address.parse(cluster.address), home=cluster.work / "home", tls=None)
    run = control.submit(folder)
    while not (state := control.state(run)).ended:
        time.sleep(1)
    if not state.good:
        raise SystemExit(control.log(run))
    return json.loads(out.read_text())


def ours(cluster: Cluster) -> tuple[list[float], list[float]]:
    """Returns the seconds of every round of a run, and of the slowest walk in it."""
    settings = ["model.name=builtin:tiny", "data.limit=100", "data.eval_examples=5", "federation.clients=2",
                f"federation.rounds={ROUNDS}", "federation.local_steps=2", "eval.every=100", "guard.batches=0",
                "algorithm.rate=1e-3", "algorithm.mu=1e-3"]  # fmt: skip
    run = cluster.work / "run-of-ours"
    told = [part for one in settings for part in ("--set", one)]
    cluster.call("submit", *told, "--server", cluster.address, "--out", run)
    while not (run / "summary.json").exists():
        time.sleep(1)
    with Journal.open(run / "journal.sqlite", readonly=True) as journal:
        rounds = [done.seconds for done in journal.rounds()]
    said = [re.findall(r"Round \d+: loss \S+, ([\d.]+) s", client.said()) for client in cluster.clients.values()]
    return rounds, [max(map(float, walks)) for walks in zip(*said, strict=True)]


def main() -> None:
    """Measures and prints one JSON object."""
    asked = argparse.ArgumentParser()
    asked.add_argument("--json", type=Path)
    given = asked.parse_args()
    with tempfile.TemporaryDirectory() as folder, Cluster(Path(folder), 2) as cluster:
        bare = floor(cluster)
        rounds, walks = ours(cluster)
    beyond = [took - walk for took, walk in zip(rounds, walks, strict=True)]
    found = {
        "flower alone, seconds a round": [round(one, 2) for one in bare],
        "fedmezo, seconds a round": [round(one, 2) for one in rounds],
        "slowest walk, seconds": walks,
        "median of flower alone": round(median(bare[1:]), 2),
        "median of fedmezo beyond the walk": round(median(beyond[1:]), 2),
        "difference": round(median(beyond[1:]) - median(bare[1:]), 2),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "flwr": subprocess.run([sys.executable, "-c", "import flwr; print(flwr.__version__)"], capture_output=True,
                               text=True, check=True).stdout.strip(),
    }  # fmt: skip
    text = json.dumps(found, indent=2)
    print(text)
    if given.json:
        given.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
