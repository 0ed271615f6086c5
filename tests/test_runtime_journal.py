"""The journal: what is appended is there, whatever happens to the process, the disk or the file; damage is found."""

import json
import math
import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toys import quadratic_bench, quadratic_params

from fedmezo.errors import JournalError, RunError
from fedmezo.fl.algorithm import Reply, Task
from fedmezo.fl.fedmezo import Settings, fedmezo
from fedmezo.runtime import binary
from fedmezo.runtime.journal import Entry, Header, Journal, Round, replay, update_of
from fedmezo.runtime.ledger import TABLES
from fedmezo.runtime.simulate import simulate
from fedmezo.zo.coding import CODINGS, coded
from fedmezo.zo.params import Params
from fedmezo.zo.perturb import apply_
from fedmezo.zo.seedsum import DenseDelta

HEADER = Header('{"a": 1}', "ab" * 32, quadratic_params().layout(), "gaussian", 1, "0.1.0", "2026-01-02T03:04:05+00:00")


def a_round(number, *, clients=(0, 4), steps=3, dense=False):
    draw = random.Random(number)
    entries = []
    for client in clients:
        task = Task(number, client, 7, 0.01 + draw.random() / 100, 1e-3, steps, clip=draw.choice([0.0, 2.5, math.inf]))
        task = replace(task, dense=dense)
        slopes = tuple(draw.choice([math.nan, 1.5, -0.25, draw.randrange(64) / 8]) for _ in range(steps))
        reply = Reply(number, client, draw.randrange(9), draw.choice([math.nan, draw.random()]), slopes)
        entries.append(Entry(task, reply, 1 / len(clients), 80 + client, 60 + client))
    return Round(
        round=number,
        entries=tuple(entries),
        loss=draw.choice([math.nan, draw.random()]),
        rate=0.01,
        slowed=0.5,
        seconds=draw.random(),
        forwards=12,
        tokens=2**40 + number,
        digest=draw.choice([None, f"{number:064x}"]),
        evaluations={"eval": {"loss": draw.random(), "accuracy": math.nan}, "train": {"loss": 1.0}},
        events=(("surge", "training loss surged"), ("note", "naïve")),
    )


def a_journal(folder, *, rounds=4):
    path = Path(folder) / "journal.sqlite"
    with Journal.create(path, HEADER) as journal:
        journal.record_evaluation(-1, "eval", {"loss": 2.0})
        for number in range(rounds):
            journal.append(a_round(number))
        journal.add_event(journal.last, "slow", "0.5")
    return path


def content(path):
    """Everything a journal says, as text: nan equals nan."""
    with Journal.open(path, readonly=True) as journal:
        return repr((journal.header, list(journal.rounds()), journal.evaluations(), journal.events(), journal.last))


def python(code, *values, **options):
    """A new interpreter that has imported this file as `t`."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", f"import test_runtime_journal as t, sys; {code}", *map(str, values)]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, **options)


@contextmanager
def powerless(folder):
    """Root may write anywhere, so become nobody for a while."""
    root = os.geteuid() == 0
    folder.chmod(0o555)
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)


def test_what_was_appended_is_read_back(tmp_path):
    with Journal.open(a_journal(tmp_path)) as journal:
        assert journal.header == HEADER
        assert journal.last == 4
        assert repr(list(journal.rounds())) == repr([a_round(number) for number in range(4)])
        assert journal.evaluations()[0] == (-1, "eval", {"loss": 2.0})
        assert [(number, split) for number, split, _ in journal.evaluations()][1:3] == [(0, "eval"), (0, "train")]
        assert journal.events()[-1] == (4, "slow", "0.5")


def test_a_person_can_query_it(tmp_path):
    with closing(sqlite3.connect(a_journal(tmp_path))) as db:
        got = db.execute("SELECT round, client, rate, loss, examples, skipped, bytes_up FROM replies").fetchall()
    expected = [
        (done.round, e.task.client, e.task.rate, e.reply.loss, e.reply.examples, e.reply.skipped, e.bytes_up)
        for done in map(a_round, range(4))
        for e in done.entries
    ]
    assert repr(got).replace("None", "nan") == repr(expected)


def test_rounds_come_in_order_and_once(tmp_path):
    with Journal.open(a_journal(tmp_path)) as journal:
        for number in (3, 5):
            with pytest.raises(JournalError, match=f"next round is 4, got round {number}"):
                journal.append(a_round(number))
        with pytest.raises(JournalError, match="no round 4; it has rounds 0 to 3"):
            journal.round(4)


def test_a_round_whose_parts_do_not_belong_together_is_refused():
    done = a_round(3)
    for entries in ((done.entries[0],) * 2, done.entries[::-1], a_round(2).entries):
        with pytest.raises(RunError, match="Round 3"):
            replace(done, entries=entries)


def test_events_and_evaluations_of_a_round_come_with_it_whenever_they_were_written(tmp_path):
    with Journal.open(a_journal(tmp_path)) as journal:
        journal.record_evaluation(1, "test", {"loss": 0.5})
        journal.append(a_round(4))
        assert journal.round(1).evaluations["test"] == {"loss": 0.5}
        assert journal.round(4).events[0] == ("slow", "0.5")
        for number, split in ((1, "test"), (0, "eval"), (5, "eval"), (-2, "eval")):
            with pytest.raises(JournalError, match="evaluation already, or is not complete"):
                journal.record_evaluation(number, split, {"loss": 0.5})


def test_slowed_is_the_product_of_the_slow_events(tmp_path):
    with Journal.open(a_journal(tmp_path)) as journal:
        journal.append(replace(a_round(4), events=(("slow", "0.25"),)))
        assert journal.slowed() == 0.125
        for detail in ("0", "-1", "nan", "inf", "half"):
            with pytest.raises(JournalError, match="factor above 0"):
                journal.add_event(5, "slow", detail)


def a_run(folder, *, dense=False, rounds=6):
    bench = quadratic_bench()
    digests = [bench.params.digest()]
    path = folder / "journal.sqlite"
    method = fedmezo(Settings(rate=0.01, steps=4, dense=dense), seed=5, cohort=2)
    with Journal.create(path, HEADER) as journal:
        for _ in simulate(method, bench, journal=journal, clients=range(3), rounds=rounds, every=1):
            digests.append(bench.params.digest())
    return path, digests


@pytest.mark.parametrize("dense", [False, True])
def test_replay_gives_the_bits_of_every_round(tmp_path, dense):
    path, digests = a_run(tmp_path, dense=dense)
    with Journal.open(path, readonly=True) as journal:
        for upto, digest in enumerate(digests):
            params = quadratic_params()
            replay(params, journal, upto=upto)
            assert params.digest() == digest
        params = quadratic_params()
        replay(params, journal)
        assert params.digest() == digests[-1]
        for upto in (-1, 7):
            with pytest.raises(JournalError, match="give 0 to 6"):
                replay(params, journal, upto=upto)


def test_dense_walks_are_kept_as_slopes_and_gradients_as_they_are(tmp_path):
    params = quadratic_params()
    delta = DenseDelta({name: torch.ones_like(tensor) / 3 for name, tensor in params})
    walked, trained = a_round(0, dense=True), a_round(1, dense=True)
    walked = replace(walked, entries=tuple(replace(e, reply=replace(e.reply, delta=delta)) for e in walked.entries))
    entries = [
        replace(e, task=replace(e.task, method=method), reply=replace(e.reply, slopes=(), delta=delta))
        for e, method in zip(trained.entries, ("sgd", "adamw"), strict=True)
    ]
    trained = replace(trained, entries=tuple(entries))
    with Journal.create(tmp_path / "journal.sqlite", HEADER) as journal:
        journal.append(walked)
        journal.append(trained)
        assert all(entry.reply.delta is None for entry in journal.round(0).entries)
        assert all(entry.reply.delta is not None for entry in journal.round(1).entries)
        kept = quadratic_params()
        replay(kept, journal)
    for done in (a_round(0), trained):
        apply_(params, update_of(done), law="gaussian")
    assert kept.digest() == params.digest()


def test_backpropagation_without_its_parameters_is_not_replayed():
    done = a_round(1)
    lacking = [replace(e, task=replace(e.task, method="sgd"), reply=replace(e.reply, slopes=())) for e in done.entries]
    with pytest.raises(RunError, match=r"Round 1: client 0 sent no parameters; a reply to sgd has to"):
        update_of(replace(done, entries=tuple(lacking)))


def a_pooled_round(number, *, clients=(0, 4), steps=3, coding="float32", pool=8):
    """A round of FedKSeed-Pro, whose odds are as good as random after a few rounds."""
    draw = random.Random(number)
    odds = tuple(draw.randrange(24_000, 65_536) for _ in range(pool))
    entries = []
    for client in clients:
        task = Task(
            number, client, 7, 0.01, 1e-3, steps, clip=2.5, pool=pool, odds=odds, importance=True, coding=coding
        )
        slopes = tuple(coded(draw.randrange(1 << 20) / 2**18, coding) for _ in range(steps))
        reply = Reply(number, client, steps, draw.random(), slopes, coding=coding)
        entries.append(Entry(task, reply, 1 / len(clients), 8_288, 836))
    return replace(a_round(number), entries=tuple(entries))


@pytest.mark.parametrize("coding", CODINGS)
def test_a_round_of_a_pool_is_read_back(tmp_path, coding):
    truth = [a_pooled_round(0, coding=coding), a_round(1), a_pooled_round(2, clients=(1, 3, 9), coding=coding)]
    path = tmp_path / "journal.sqlite"
    with Journal.create(path, HEADER) as journal:
        for done in truth:
            journal.append(done)
    with Journal.open(path, readonly=True) as journal:
        assert repr(list(journal.rounds())) == repr(truth)
        first, second = (entry.task.odds for entry in journal.round(0).entries)
        assert first is second


def test_the_odds_of_a_round_are_stored_once(tmp_path):
    with Journal.create(tmp_path / "journal.sqlite", HEADER) as journal:
        journal.append(a_pooled_round(0, clients=range(5), pool=100))
        sizes = [size for (size,) in journal._ledger.query("SELECT length(task) FROM replies ORDER BY place")]
    assert sizes == [96 + 2 * 100, 96, 96, 96, 96]


def test_a_round_with_several_odds_is_refused():
    done = a_pooled_round(3)
    for odds in ((), done.entries[0].task.odds[::-1]):
        for place in (0, 1):
            entries = list(done.entries)
            entries[place] = replace(entries[place], task=replace(entries[place].task, odds=odds))
            with pytest.raises(RunError, match="Round 3: all tasks of a round must have the same odds"):
                replace(done, entries=tuple(entries))


@pytest.mark.parametrize(
    ("steps", "coding", "megabytes"),
    [(30, "float32", 0.85), (100, "float32", 1), (200, "float16", 1), (200, "float32", 1.25)],
)
def test_a_journal_of_fedkseed_pro_stays_small(tmp_path, steps, coding, megabytes):
    path = tmp_path / "journal.sqlite"
    with Journal.create(path, HEADER) as journal:
        for number in range(60):
            journal.append(a_pooled_round(number, clients=range(10), steps=steps, coding=coding, pool=4096))
    with Journal.open(path, readonly=True) as journal:
        assert journal.last == 60
        assert repr(journal.round(59)) == repr(
            a_pooled_round(59, clients=range(10), steps=steps, coding=coding, pool=4096)
        )
    assert path.stat().st_size < megabytes * 1e6


def test_a_row_that_sqlite_cannot_hold_is_refused_in_one_sentence(tmp_path):
    done = a_round(1, clients=(0,))
    delta = DenseDelta({"a": torch.zeros(5_000)})
    entry = replace(done.entries[0], task=replace(done.entries[0].task, method="sgd"))
    large = replace(done, entries=(replace(entry, reply=replace(entry.reply, slopes=(), delta=delta)),))
    with Journal.create(tmp_path / "journal.sqlite", HEADER) as journal:
        journal.append(a_round(0))
        before = journal._ledger._db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 20_000)
        assert before == 10**9
        sentence = (
            r"journal.sqlite cannot hold a row of 21,\d\d\d bytes in its table replies, SQLite takes .* 20,000; not"
        )
        with pytest.raises(JournalError, match=sentence):
            journal.append(large)
        assert journal.last == 1
        journal.verify_chain()
        journal._ledger._db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 22_000)
        journal.append(large)
        assert journal.last == 2


def test_the_limit_of_a_row_is_checked_before_sqlite_meets_it(tmp_path):
    with Journal.create(tmp_path / "journal.sqlite", HEADER) as journal:
        journal._ledger._db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 20_000)
        for size in range(18_000, 20_100, 100):
            try:
                journal.add_event(0, "note", "x" * size)
            except JournalError as error:
                assert "cannot hold a row" in str(error)
                assert size > 18_900
            else:
                assert size < 19_000
        journal.verify_chain()


def test_a_journal_of_another_wire_format_names_the_package_that_wrote_it(tmp_path, monkeypatch):
    path = tmp_path / "journal.sqlite"
    with monkeypatch.context() as old:
        old.setattr(binary, "WIRE_VERSION", 1)
        with Journal.create(path, HEADER) as journal:
            journal.append(a_round(0))
    sentence = r"journal.sqlite, written by fedmezo 0\.1\.0: round 0 cannot be read \(.*wire format 1, expected 2"
    with Journal.open(path, readonly=True) as journal:
        journal.verify_chain()
        with pytest.raises(JournalError, match=sentence):
            journal.round(0)


def test_replay_into_other_parameters_is_refused(tmp_path):
    other = Params({"c": torch.zeros(3)})
    sentence = f"layout {HEADER.layout[:12]}, these have {other.layout()[:12]}"
    with Journal.open(a_journal(tmp_path)) as journal, pytest.raises(JournalError, match=sentence):
        replay(other, journal)


def columns():
    for table in TABLES:
        with closing(sqlite3.connect(":memory:")) as db:
            db.execute(f"CREATE TABLE t ({TABLES[table]})")
            yield from ((table, row[1]) for row in db.execute("PRAGMA table_info(t)"))


@pytest.mark.parametrize(("table", "column"), [*columns(), ("links", "round"), ("links", "digest")])
def test_a_change_of_any_column_is_found_and_its_round_named(tmp_path, table, column):
    path = a_journal(tmp_path)
    with closing(sqlite3.connect(path)) as db:
        where = "" if table == "run" else "WHERE link = (SELECT link FROM rounds WHERE round = 2)"
        where += "" if table in ("run", "rounds", "links") else " AND place = 0"
        new = f"CASE WHEN typeof({column}) IN ('integer', 'real') THEN {column} + 1000 ELSE 'x' || {column} || 'x' END"
        assert db.execute(f"UPDATE {table} SET {column} = COALESCE({new}, 1) {where}").rowcount == 1
        db.commit()
    if table == "run":
        with pytest.raises(JournalError, match="its header differs"):
            Journal.open(path)
        return
    sentence = "round 2 is damaged, the 2 before it are sound"
    with Journal.open(path, readonly=True) as journal, pytest.raises(JournalError, match=sentence):
        journal.verify_chain()


@pytest.mark.parametrize("table", ["rounds", "replies", "evaluations", "events", "links"])
def test_a_lost_row_is_found_and_its_round_named(tmp_path, table):
    path = a_journal(tmp_path)
    with closing(sqlite3.connect(path)) as db:
        link = db.execute("SELECT link FROM rounds WHERE round = 1").fetchone()[0]
        db.execute(f"DELETE FROM {table} WHERE link = ?", (link,))
        db.commit()
    with Journal.open(path, readonly=True) as journal, pytest.raises(JournalError, match="round 1 is damaged"):
        journal.verify_chain()


def test_a_damaged_round_is_not_replayed(tmp_path):
    path = a_journal(tmp_path)
    with closing(sqlite3.connect(path)) as db:
        db.execute("UPDATE replies SET weight = 0.25 WHERE round = 2 AND client = 0")
        db.commit()
    sentence = r"record 4 \(round 2\) differs from its checksum"
    with Journal.open(path, readonly=True) as journal, pytest.raises(JournalError, match=sentence):
        replay(quadratic_params(), journal)


def test_a_flipped_bit_anywhere_is_found_or_changes_nothing(tmp_path):
    path, broken = a_journal(tmp_path), tmp_path / "broken.sqlite"
    whole, truth, draw, found = path.read_bytes(), content(path), random.Random(1), 0
    # Most of a page is empty: aim at bytes that hold something.
    full = [at for at, byte in enumerate(whole) if byte]
    for at in draw.sample(full, 300):
        data = bytearray(whole)
        data[at] ^= 1 << draw.randrange(8)
        broken.write_bytes(data)
        for stale in tmp_path.glob("broken.sqlite-*"):
            stale.unlink()
        try:
            with Journal.open(broken, readonly=True) as journal:
                journal.verify_chain()
            assert content(broken) == truth
        except JournalError:
            found += 1
    assert found > 200


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda path: None, "no journal at"),
        (lambda path: path.mkdir(), "no journal at"),
        (lambda path: path.write_bytes(b""), "another kind"),
        (lambda path: path.write_bytes(b"not a database " * 400), "damaged or not a journal"),
        (lambda path: sqlite3.connect(path).execute("CREATE TABLE a (b)").connection.close(), "another kind"),
        (lambda path: a_journal(path.parent) and alter(path, "DROP TABLE events"), "lacks .'events'."),
        (lambda path: a_journal(path.parent) and alter(path, "PRAGMA user_version = 2"), "format 2.*up to 1; update"),
        (lambda path: a_journal(path.parent) and path.write_bytes(path.read_bytes()[:5000]), "damaged|cannot be"),
    ],
)
@pytest.mark.parametrize("readonly", [False, True])
def test_what_is_not_a_journal_is_named_in_one_sentence(tmp_path, make, sentence, readonly):
    path = tmp_path / "journal.sqlite"
    make(path)
    with pytest.raises(JournalError, match=sentence):
        Journal.open(path, readonly=readonly)


def alter(path, sql):
    with closing(sqlite3.connect(path)) as db:
        db.execute(sql)
        db.commit()


def test_a_journal_is_never_overwritten(tmp_path):
    path = a_journal(tmp_path)
    truth = content(path)
    with pytest.raises(JournalError, match="there already"):
        Journal.create(path, HEADER)
    assert content(path) == truth


def test_left_overs_of_a_removed_journal_do_not_enter_a_new_one(tmp_path):
    path = tmp_path / "journal.sqlite"
    with Journal.create(path, HEADER) as journal:
        journal.append(a_round(0))
        shutil.copy(f"{path}-wal", tmp_path / "old-wal")
    path.unlink()
    shutil.copy(tmp_path / "old-wal", f"{path}-wal")
    with Journal.create(path, HEADER) as journal:
        assert journal.last == 0
        journal.verify_chain()


def test_a_read_only_folder_is_readable_and_says_why_it_is_not_writable():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        path = a_journal(folder)
        Path(f"{path}.lock").unlink()
        with powerless(folder):
            with Journal.open(path, readonly=True) as journal:
                journal.verify_chain()
                assert journal.last == 4
            with pytest.raises(JournalError, match=r"cannot be written: Permission denied .*make that folder writable"):
                Journal.open(path)
            with pytest.raises(JournalError, match="cannot be written: Permission denied"):
                Journal.create(folder / "new.sqlite", HEADER)
        assert sorted(folder.iterdir()) == [path]


def test_a_journal_opened_for_reading_cannot_be_changed(tmp_path):
    with Journal.open(a_journal(tmp_path), readonly=True) as journal:
        for change in (
            lambda: journal.append(a_round(4)),
            lambda: journal.add_event(4, "note", ""),
            lambda: journal.rollback(1, "test"),
        ):
            with pytest.raises(JournalError, match="not open for writing"):
                change()
    with pytest.raises(JournalError, match="closed"):
        journal.round(0)


def test_a_full_disk_keeps_the_rounds_and_says_how_to_go_on(tmp_path):
    path = a_journal(tmp_path, rounds=3)
    with Journal.open(path) as journal:
        db = journal._ledger._db
        db.execute(f"PRAGMA max_page_count = {db.execute('PRAGMA page_count').fetchone()[0] + 2}")
        with pytest.raises(JournalError, match=r"is full\); the \d+ rounds up to round \d+ are safe.*fedmezo resume"):
            for number in range(3, 400):
                journal.append(a_round(number))
        kept = journal.last
        assert 3 <= kept < 400
        db.execute("PRAGMA max_page_count = 1000000")
        journal.append(a_round(kept))
        journal.verify_chain()
        got = [done.entries for done in journal.rounds()]
        assert repr(got) == repr([a_round(number).entries for number in range(kept + 1)])


def say(what):
    """Tells the test that started this process."""
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def append_until_it_fails(path, limit):
    """In a process whose files may not grow beyond `limit` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    with Journal.open(Path(path)) as journal:
        try:
            while True:
                journal.append(a_round(journal.last))
        except JournalError as error:
            say([str(error), journal.last])


def test_a_failing_write_keeps_the_rounds_and_says_how_to_go_on(tmp_path):
    path = a_journal(tmp_path)
    child = python("t.append_until_it_fails(sys.argv[1], 200_000)", path)
    sentence, kept = json.loads(child.communicate()[0])
    assert f"the {kept} rounds up to round {kept - 1} are safe" in sentence
    with Journal.open(path) as journal:
        journal.verify_chain()
        assert journal.last == kept > 4
        journal.append(a_round(kept))


def hold(path):
    """Opens for writing, says so, and waits to be killed."""
    with Journal.open(Path(path)) as journal:
        journal.append(a_round(journal.last))
        say("open")
        time.sleep(60)


def test_one_process_writes_while_others_read_and_a_crash_frees_the_journal(tmp_path):
    path = a_journal(tmp_path)
    child = python("t.hold(sys.argv[1])", path)
    assert json.loads(child.stdout.readline()) == "open"
    with pytest.raises(JournalError, match="another process is writing it"):
        Journal.open(path)
    with Journal.open(path, readonly=True) as reader:
        assert reader.last == 5
        reader.verify_chain()
        child.kill()
        child.communicate()
        with Journal.open(path) as journal:
            journal.append(a_round(5))
            assert reader.last == journal.last == 6
        reader.verify_chain()


def test_two_writers_in_one_process_exclude_each_other(tmp_path):
    path = a_journal(tmp_path)
    with Journal.open(path), pytest.raises(JournalError, match="another process is writing it"):
        Journal.open(path)
    Journal.open(path).close()


def test_a_closed_journal_leaves_no_files_but_its_own_and_the_lock(tmp_path):
    path = a_journal(tmp_path)
    content(path)
    assert {file.name for file in tmp_path.iterdir()} == {"journal.sqlite", "journal.sqlite.lock"}


@pytest.mark.parametrize("kept", range(5))
def test_rollback_gives_the_journal_that_never_went_further(tmp_path, kept):
    (tmp_path / "short").mkdir()
    path = a_journal(tmp_path)
    truth, short = content(path), tmp_path / "short" / "journal.sqlite"
    with Journal.create(short, HEADER) as journal:
        journal.record_evaluation(-1, "eval", {"loss": 2.0})
        for number in range(kept):
            journal.append(a_round(number))
        if kept == 4:
            journal.add_event(4, "slow", "0.5")
    with Journal.open(path) as journal, Journal.open(short) as never:
        backup = journal.rollback(kept, "by hand")
        journal.verify_chain()
        assert backup == tmp_path / "journal.before-rollback-1.sqlite"
        assert content(backup) == truth
        assert journal.last == kept
        assert repr(list(journal.rounds())) == repr(list(never.rounds()))
        assert repr(journal.evaluations()) == repr(never.evaluations())
        assert journal.slowed() == never.slowed()
        detail = f"by hand: kept {kept} of 4 rounds, all of them are in {backup.name}"
        assert journal.events() == [*never.events(), (kept, "rollback", detail)]
        journal.append(a_round(kept))
        journal.verify_chain()
        assert journal.rollback(kept, "again").name == "journal.before-rollback-2.sqlite"


def test_rollback_to_rounds_that_are_not_there_changes_nothing(tmp_path):
    path = a_journal(tmp_path)
    truth = content(path)
    with Journal.open(path) as journal:
        for kept in (-1, 5):
            with pytest.raises(JournalError, match="give 0 to 4"):
                journal.rollback(kept, "test")
    assert content(path) == truth
    assert not list(tmp_path.glob("*rollback*"))


def test_rollback_without_room_for_the_copy_changes_nothing(tmp_path):
    path = a_journal(tmp_path)
    truth = content(path)
    with Journal.open(path) as journal:
        half = tmp_path / "journal.before-rollback-1.sqlite.new"
        half.mkdir()
        with pytest.raises(JournalError, match="cannot be written"):
            journal.rollback(1, "test")
    assert content(path) == truth


def test_a_damaged_journal_can_be_rolled_back_to_its_sound_rounds(tmp_path):
    path = a_journal(tmp_path)
    alter(path, "UPDATE replies SET weight = 2 WHERE round = 2 AND client = 0")
    with Journal.open(path) as journal:
        journal.rollback(2, "damage")
        journal.verify_chain()
        assert repr(list(journal.rounds())) == repr([a_round(0), a_round(1)])


def kill_children(path, trials):
    """Forks children that append, kills each at a random instant, prints what each said it had committed."""
    path, draw = Path(path), random.Random(2)
    for _ in range(trials):
        told, tell = os.pipe()
        child = os.fork()
        if not child:
            with Journal.open(path) as journal:
                os.write(tell, b"!")
                while True:
                    journal.append(a_round(journal.last, clients=range(8), steps=30))
                    os.write(tell, b".")
        os.close(tell)
        os.read(told, 1)
        time.sleep(draw.random() * 0.06)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with open(told, "rb") as pipe:
            committed = len(pipe.read())
        with Journal.open(path, readonly=bool(draw.randrange(2))) as journal:
            journal.verify_chain()
            say([committed, journal.last])


def test_a_killed_process_leaves_the_rounds_it_committed(tmp_path):
    path = tmp_path / "journal.sqlite"
    Journal.create(path, HEADER).close()
    child = python("t.kill_children(sys.argv[1], 15)", path)
    lines = [json.loads(line) for line in child.communicate(timeout=60)[0].splitlines()]
    assert len(lines) == 15
    before = 0
    for committed, last in lines:
        assert last - before in (committed, committed + 1)
        before = last
    assert before > 15
    with Journal.open(path) as journal:
        expected = [a_round(number, clients=range(8), steps=30) for number in range(before)]
        assert repr(list(journal.rounds())) == repr(expected)
