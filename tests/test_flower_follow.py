"""The live view of another process's run: every round once, in order, whatever happens to the journal meanwhile."""

import json
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from tiny_runs import Notes, small, write_records

from fedmezo.errors import JournalError
from fedmezo.runtime.journal import Header, Journal, Round
from fedmezo.runtime.progress import report_of
from fedmezo.studies.follow import LIVE, Teller, follow
from fedmezo.studies.run import run

JOURNAL = "journal.sqlite"


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> tuple[Header, list[Round]]:
    """Returns the header and the rounds of a small run."""
    work = tmp_path_factory.mktemp("material")
    run(small(write_records(work), federation={"rounds": 5}, guard={"on_surge": "warn"}), out=work / "run")
    with Journal.open(work / "run" / JOURNAL, readonly=True) as journal:
        return journal.header, list(journal.rounds())


def watched(folder: Path, write: Callable[[], None], **extra) -> Notes:
    """Returns what a follower was told while `write` ran in a thread."""
    told, failed = Notes(), []

    def body() -> None:
        try:
            write()
        except BaseException as error:
            failed.append(error)

    writer = threading.Thread(target=body)
    writer.start()
    follow(folder, told, ended=lambda: not writer.is_alive(), every=0.002, **extra)
    writer.join()
    assert not failed
    return told


def numbers(told: Notes) -> list[int]:
    return [report.round for report in told.reports]


def test_every_round_is_told_once_as_the_run_itself_would(material, tmp_path):
    header, rounds = material

    def write() -> None:
        time.sleep(0.05)
        folder = tmp_path / "run"
        folder.mkdir()
        with Journal.create(folder / JOURNAL, header) as journal:
            for done in rounds:
                journal.append(done)
                time.sleep(0.01)

    told = watched(tmp_path / "run", write)
    assert told.reports == [report_of(done, 5) for done in rounds]
    assert told.info["rounds"] == 5 and told.info["clients"] == 3 and told.info["model"] == "builtin:tiny"


def test_rounds_taken_back_are_told_again_and_no_others(material, tmp_path):
    header, rounds = material
    with closing(Journal.create(tmp_path / JOURNAL, header)) as journal:
        for done in rounds[:4]:
            journal.append(done)
    told = Notes()
    stages = iter([None, "back", "on", None])

    def ended() -> bool:
        stage = next(stages, "end")
        if stage in ("back", "on"):
            with Journal.open(tmp_path / JOURNAL) as writer:
                if stage == "back":
                    writer.rollback(1, "loss surge")
                for done in rounds[writer.last : writer.last + 2]:
                    writer.append(replace(done, loss=done.loss + 1))
        return stage == "end"

    follow(tmp_path, told, ended=ended, every=0)
    assert numbers(told) == [0, 1, 2, 3, 1, 2, 3, 4]
    assert [report.loss for report in told.reports[4:]] == [done.loss + 1 for done in rounds[1:5]]
    assert [kind for report in told.reports for kind, _ in report.events if kind == "rollback"] == ["rollback"]


def test_a_rollback_and_as_many_new_rounds_between_two_looks_are_noticed(material, tmp_path):
    header, rounds = material
    with closing(Journal.create(tmp_path / JOURNAL, header)) as journal:
        for done in rounds[:3]:
            journal.append(done)
    told, looks = Notes(), iter(range(3))

    def ended() -> bool:
        look = next(looks)
        if look == 1:
            with Journal.open(tmp_path / JOURNAL) as writer:
                for keep in (2, 1):  # the second takes the first one's event with it
                    writer.rollback(keep, "loss surge")
                for done in rounds[1:3]:
                    writer.append(done)
        return look == 2

    follow(tmp_path, told, ended=ended, every=0)
    assert numbers(told) == [0, 1, 2, 1, 2]


def test_a_journal_rolled_back_under_us_again_and_again_never_breaks_the_tale(material, tmp_path):
    header, rounds = material

    def write() -> None:
        with Journal.create(tmp_path / JOURNAL, header) as journal:
            for keep in (0, 1, 3, 2, 0, 4, 1):
                for done in rounds[journal.last :]:
                    journal.append(done)
                journal.rollback(keep, "loss surge")
            for done in rounds[journal.last :]:
                journal.append(done)

    told = watched(tmp_path, write)
    seen = numbers(told)
    assert seen[-1] == 4
    # Each step is to the next round, or back; no round is left out.
    assert all(after <= before + 1 for before, after in pairwise(seen)) and seen[0] == 0
    assert set(seen) == set(range(5))


def test_rounds_that_were_there_before_are_not_told(material, tmp_path):
    header, rounds = material
    with closing(Journal.create(tmp_path / JOURNAL, header)) as journal:
        for done in rounds[:3]:
            journal.append(done)

    def write() -> None:
        with Journal.open(tmp_path / JOURNAL) as journal:
            journal.append(rounds[3])

    told = watched(tmp_path, write, skip=3, rounds=9)
    assert numbers(told) == [3]
    assert told.reports[0].rounds == 9 and told.info["done"] == 3


def test_a_resumed_run_that_goes_back_at_once_is_told_from_there(material, tmp_path):
    header, rounds = material
    with closing(Journal.create(tmp_path / JOURNAL, header)) as journal:
        for done in rounds[:4]:
            journal.append(done)
        journal.rollback(2, "loss surge")
        journal.append(rounds[2])
    told = Notes()
    follow(tmp_path, told, ended=lambda: True, skip=4)
    assert numbers(told) == []
    with Journal.open(tmp_path / JOURNAL) as journal:
        journal.append(rounds[3])
    follow(tmp_path, told, ended=lambda: True, skip=3)
    assert numbers(told) == [3]


def test_what_a_teller_writes_is_told_before_the_rounds(material, tmp_path):
    header, rounds = material
    folder = tmp_path / "new" / "run"

    def write() -> None:
        teller = Teller(folder)
        teller.note("Downloading ünïcode.")
        with Journal.create(folder / JOURNAL, header) as journal:
            teller.start({"dim": 3584, "rounds": 7, "sizes": {0: 5}, "rate": float("nan"), "run_dir": folder})
            teller.note("Six batches are judged.")
            time.sleep(0.05)
            journal.add_event(0, "network", "Client 0 is there.")
            teller.note("Client 0 is there.")
            journal.append(rounds[0])

    told = watched(folder, write)
    assert told.info == {"dim": 3584, "rounds": 7, "sizes": {"0": 5}, "rate": None, "run_dir": str(folder)}
    assert told.notes == ["Downloading ünïcode.", "Six batches are judged.", "Client 0 is there."]
    assert [report.rounds for report in told.reports] == [7]
    assert not any(kind == "network" for kind, _ in told.reports[0].events)


def test_without_a_teller_who_came_is_told_from_the_journal_at_once(material, tmp_path):
    header, _ = material
    with closing(Journal.create(tmp_path / JOURNAL, header)) as journal:
        journal.add_event(0, "network", "Client 2 is there.")
    told = Notes()
    follow(tmp_path, told, ended=lambda: True)
    assert told.notes == ["Client 2 is there."] and not told.reports


def test_a_new_teller_begins_a_new_file_and_a_line_on_its_way_waits(tmp_path):
    Teller(tmp_path).note("old")
    Teller(tmp_path).note("new")
    with (tmp_path / LIVE).open("a") as file:
        file.write(json.dumps({"note": "half"})[:7])
    told = Notes()
    follow(tmp_path, told, ended=lambda: True)
    assert told.notes == ["new"]


def test_an_end_without_a_run_is_an_end(tmp_path):
    told = Notes()
    follow(tmp_path / "never", told, ended=lambda: True)
    assert not told.reports and not told.info


def test_a_file_that_is_no_journal_is_an_error_after_some_patience(tmp_path):
    (tmp_path / JOURNAL).write_bytes(b"x" * 4096)
    with pytest.raises(JournalError, match="not a journal"):
        follow(tmp_path, Notes(), ended=lambda: False, every=0)


def test_a_damaged_round_is_an_error_and_not_told(material, tmp_path):
    import sqlite3

    header, rounds = material
    with closing(Journal.create(tmp_path / JOURNAL, header)) as journal:
        for done in rounds[:2]:
            journal.append(done)
    with closing(sqlite3.connect(tmp_path / JOURNAL)) as db:
        db.execute("UPDATE rounds SET loss = 0.5 WHERE round = 1")
        db.commit()
    told = Notes()
    with pytest.raises(JournalError, match="differs from its checksum"):
        follow(tmp_path, told, ended=lambda: True)
    assert numbers(told) == [0]


def test_a_server_shows_when_each_client_was_heard_last():
    from types import SimpleNamespace

    from fedmezo.studies.attendance import Attendance

    clock = iter([10.0, 10.0, 20.0, 25.0, 25.0])
    seen = Attendance(now=lambda: next(clock))
    values = {"loss": 1.5, "rate": 1e-3, "bytes_up": 85.0, "bytes_down": 237.0}
    seen.hear(SimpleNamespace(round=0, clients={0: values, 1: values}))
    seen.hear(SimpleNamespace(round=1, clients={1: values | {"loss": 1.25}}))
    first, second = seen.rows()
    assert (first["client"], first["round"], first["seen"], first["up"]) == ("0", "1", "15.0 s ago", "85 B")
    assert (second["client"], second["round"], second["seen"], second["up"]) == ("1", "2", "5.00 s ago", "170 B")
    assert second["loss"].startswith("1.25")


def test_of_many_clients_those_not_heard_for_longest_are_shown():
    from types import SimpleNamespace

    from fedmezo.studies.attendance import Attendance

    ticks = iter(range(1000))
    seen = Attendance(now=lambda: float(next(ticks)))
    for at in range(30):
        seen.hear(SimpleNamespace(round=at, clients={at: {"loss": 1.0}}))
    assert [row["client"] for row in seen.rows()] == [str(client) for client in range(12)]
