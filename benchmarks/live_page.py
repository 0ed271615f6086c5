"""What the live page costs for a long run: CPU seconds of reading, looking, drawing and the doctor; bytes.

PYTHONPATH=tests python benchmarks/live_page.py [ROUNDS]
"""

import gzip
import sys
import tempfile
import time
from pathlib import Path

from test_studies_live import a_round, header, settled

from fedmezo.runtime.journal import Journal
from fedmezo.studies.doctor import diagnose
from fedmezo.studies.live.reader import Reader
from fedmezo.studies.live.view import view_of


def timed(what, times=1):
    began = time.process_time()
    for _ in range(times):
        result = what()
    return result, (time.process_time() - began) / times


rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    with Journal.create(folder / "journal.sqlite", header(rounds=rounds)) as journal:
        # Nothing of this has to survive a power cut, and a sync per round would take minutes.
        journal._ledger._db.execute("PRAGMA synchronous = OFF")
        for number in range(rounds):
            journal.append(a_round(number, steps=10, evaluated=number % 10 == 9))
    reader = Reader(folder)
    seen, reading = timed(lambda: settled(reader))
    _, looking = timed(reader.look, times=20)
    view, drawing = timed(lambda: view_of(seen, folder=folder, findings=()), times=20)
    _, doctor = timed(lambda: diagnose(folder))
    told = "".join([*view.parts.values(), *view.figures.values()]).encode()
    print(f"{rounds:,} rounds drawn in {len(seen.facts.rows)} points")
    print(f"CPU seconds: all read {reading:.2f}, a look {looking:.4f}, a view {drawing:.4f}, the doctor {doctor:.2f}")
    print(f"bytes to a new browser: {len(told):,}, compressed {len(gzip.compress(told, 1)):,}")
