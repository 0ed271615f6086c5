"""The live page: it shows what the report shows while the run is written, changes nothing, and opens to its token."""

import hashlib
import http.client
import json
import math
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import pytest
from browser import CHROMIUM, Browser
from flower_cluster import environment, free_port

import fedmezo
from fedmezo.errors import ConfigError
from fedmezo.fl.algorithm import Reply, Task
from fedmezo.runtime.journal import Entry, Header, Journal, Round
from fedmezo.studies.charts import charts
from fedmezo.studies.facts import gather
from fedmezo.studies.live import watch
from fedmezo.studies.live.course import MOST_ROWS, Course
from fedmezo.studies.live.feed import Feed
from fedmezo.studies.live.reader import Reader
from fedmezo.studies.live.shell import PARTS
from fedmezo.studies.live.situation import Tempo, planned_of
from fedmezo.studies.live.view import view_of
from fedmezo.studies.seal import check, sealing

EVIL = "<script>alert('x')</script>"
TOKEN = "a-token-for-tests-only"
PLANNED = 40


def header(*, rounds=PLANNED, name="builtin:tiny", **federation):
    config = {
        "model": {"name": name, "dtype": "float32"},
        "data": {"name": "builtin:skills"},
        "federation": {"clients": 3, "rounds": rounds, **federation},
        "algorithm": {"name": "fedmezo", "rate": 1e-3, "mu": 1e-3},
    }
    return Header(json.dumps(config), "ab" * 32, "cd" * 32, "gaussian", 1, "0.1.0", "2026-01-02T03:04:05+00:00")


def a_round(number, *, clients=(0, 1, 2), steps=4, events=(), evaluated=False, better=0.0):
    draw = random.Random(f"{number} {better}")
    entries = []
    for client in clients:
        task = Task(number, client, 7, 1e-3 * (1 + client / 10), 1e-3, steps, clip=math.inf if number < 2 else 90.0)
        slopes = tuple(draw.randrange(-640, 640) / 8 for _ in range(steps))
        reply = Reply(number, client, 2 * steps, 6.0 - number / 400 - better + draw.gauss(0, 0.05), slopes)
        entries.append(Entry(task, reply, 1 / len(clients), 200 + client, 40 + client))
    return Round(
        round=number,
        entries=tuple(entries),
        loss=fmean(entry.reply.loss for entry in entries),
        rate=1e-3,
        slowed=1.0,
        seconds=0.5 + draw.random() / 100,
        forwards=2 * steps * len(clients),
        tokens=100 * len(clients),
        evaluations={"eval": {"loss": 5.9 - number / 300 - better, "accuracy": 0.5}} if evaluated else {},
        events=events,
    )


def write(folder, *, rounds, head=None, start=0):
    folder.mkdir(parents=True, exist_ok=True)
    with closing(Journal.create(folder / "journal.sqlite", head or header())) as journal:
        journal.record_evaluation(-1, "eval", {"loss": 6.0, "accuracy": 0.4})
        for number in range(start, rounds):
            journal.append(a_round(number, evaluated=(number + 1) % 5 == 0))
    return folder


def facts_of(folder):
    with closing(Journal.open(folder / "journal.sqlite", readonly=True)) as journal:
        return gather(journal)


def settled(reader):
    """Returns what is seen when all is read."""
    while (seen := reader.look()).behind:
        pass
    return seen


def same(mine, its):
    """Whether a live view draws what the report draws."""
    drawn = {name: [repr(chart) for chart in group] for name, group in charts(mine).items()}
    return drawn == {name: [repr(chart) for chart in group] for name, group in charts(its).items()}


def ask(page, path, *, method="GET", host=None, headers=None):
    """Returns status, headers and body of one request."""
    connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=20)
    with closing(connection):
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name in [f"127.0.0.1:{page.port}"] if host is None else host:
            connection.putheader("Host", name)
        for name, value in (headers or {}).items():
            connection.putheader(name, value)
        connection.endheaders()
        reply = connection.getresponse()
        return reply.status, dict(reply.getheaders()), reply.read()


def data(page, cursor=""):
    status, _, body = ask(page, f"/{page.token}/data?since={cursor}")
    assert status == 200
    return json.loads(body)


def until(true, *, seconds=30.0):
    limit = time.monotonic() + seconds
    while not (value := true()):
        assert time.monotonic() < limit
        time.sleep(0.02)
    return value


# What is read


def test_the_page_draws_what_the_report_draws(tmp_path):
    folder = write(tmp_path / "run", rounds=23)
    seen = settled(Reader(folder))
    assert same(seen.facts, facts_of(folder))
    assert seen.facts.totals() == facts_of(folder).totals()
    assert (seen.situation.state, seen.situation.done, seen.situation.planned) == ("stopped", 23, PLANNED)


def test_a_run_is_followed_while_it_is_written(tmp_path):
    reader, folder = Reader(tmp_path / "run"), tmp_path / "run"
    waiting = reader.look()
    assert waiting.situation.state == "waiting"
    assert not any(text for name, text in view_of(waiting, folder=folder, findings=()).parts.items() if name != "head")

    def run():
        folder.mkdir()
        with closing(Journal.create(folder / "journal.sqlite", header())) as journal:
            time.sleep(0.05)
            journal.record_evaluation(-1, "eval", {"loss": 6.0})
            for number in range(30):
                journal.append(a_round(number, evaluated=number % 4 == 3))

    writer = threading.Thread(target=run)
    writer.start()
    seen = []
    while writer.is_alive():
        seen.append(reader.look())
    writer.join()
    done = [one.situation.done for one in seen]
    assert done == sorted(done) and len(set(done)) > 2
    last = settled(reader)
    assert last.facts.done == 30 and same(last.facts, facts_of(folder))


@pytest.mark.parametrize("kept", [0, 1, 7, 12])
def test_rounds_that_went_back_are_forgotten(tmp_path, kept):
    folder = write(tmp_path / "run", rounds=12)
    reader = Reader(folder)
    assert settled(reader).facts.done == 12
    with closing(Journal.open(folder / "journal.sqlite")) as journal:
        journal.rollback(kept, "loss surge")
        for number in range(kept, 15):
            journal.append(a_round(number, better=0.5))
    seen = settled(reader)
    assert seen.facts.done == 15 and same(seen.facts, facts_of(folder))
    assert seen.facts.totals() == facts_of(folder).totals()
    assert any(kind == "rollback" for _, kind, _ in seen.facts.happened)


def test_the_old_curves_stand_until_the_new_ones_are_read(tmp_path):
    folder = write(tmp_path / "run", rounds=30)
    reader = Reader(folder, patience=0.002)
    settled(reader)
    with closing(Journal.open(folder / "journal.sqlite")) as journal:
        journal.rollback(28, "loss surge")
    looks = [reader.look()]
    while looks[-1].behind:
        looks.append(reader.look())
    assert len(looks) > 1 and {one.facts.done for one in looks[:-1]} == {30} and looks[-1].facts.done == 28


def test_another_run_in_the_same_folder_is_another_run(tmp_path):
    folder = write(tmp_path / "run", rounds=9)
    reader = Reader(folder)
    assert settled(reader).facts.done == 9
    for path in folder.iterdir():
        path.unlink()
    assert reader.look().situation.state == "waiting"
    write(folder, rounds=11, head=header(name="another"))
    assert settled(reader).facts.done == 11 and "another" in settled(reader).facts.header.config


def test_a_look_takes_no_longer_than_it_may(tmp_path):
    folder = write(tmp_path / "run", rounds=60)
    reader = Reader(folder, patience=0.001)
    first = reader.look()
    assert first.behind and first.situation.state == "reading" and 0 < first.facts.done < 60
    assert first.situation.written == 60 and settled(reader).facts.done == 60


def test_a_damaged_journal_is_told_and_what_is_sound_is_shown(tmp_path):
    folder = write(tmp_path / "run", rounds=8)
    with closing(sqlite3.connect(folder / "journal.sqlite")) as db:
        db.execute("UPDATE rounds SET loss = 0 WHERE round = 5")
        db.commit()
    reader = Reader(folder)
    seen = [reader.look() for _ in range(6)][-1]
    assert seen.situation.state == "unreadable" and "round 5" in seen.situation.problem
    assert seen.facts.done == 5 and not seen.behind


def test_what_is_no_journal_is_told(tmp_path):
    (tmp_path / "journal.sqlite").write_bytes(b"not a journal" * 100)
    reader = Reader(tmp_path)
    seen = [reader.look() for _ in range(6)]
    assert seen[0].situation.state == "waiting"
    assert seen[-1].situation.state == "unreadable" and "not a journal" in seen[-1].situation.problem


def test_a_servers_words_and_its_number_of_rounds_are_heard(tmp_path):
    folder = write(tmp_path / "run", rounds=6)
    live = folder / "live.jsonl"
    live.write_text('{"start": {"rounds": 90}}\n{"note": "client 1 has come"}\n{"half')
    reader = Reader(folder)
    seen = reader.look()
    assert seen.notes == ("client 1 has come",) and seen.situation.planned == 90
    live.unlink()
    live.write_text('{"note": "again"}\nnonsense\n[1]\n')
    assert reader.look().notes == ("client 1 has come", "again")


# What is not changed


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_looking_changes_no_byte_of_a_run_that_has_ended(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with closing(Journal.create(folder / "journal.sqlite", header(rounds=4))) as journal, sealing(folder, journal):
        for number in range(4):
            journal.append(a_round(number))
    before = hashes(folder)
    reader = Reader(folder)
    assert settled(reader).situation.state == "ended"
    feed = Feed(folder)
    feed.look()
    assert hashes(folder) == before and check(folder) is not None


def test_a_run_is_written_sealed_and_taken_back_while_pages_look_all_the_time(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    over = threading.Event()

    def look():
        reader = Reader(folder)
        while not over.is_set():
            reader.look()

    lookers = [threading.Thread(target=look) for _ in range(3)]
    for looker in lookers:
        looker.start()
    slowest = 0.0
    try:
        with closing(Journal.create(folder / "journal.sqlite", header())) as journal, sealing(folder, journal):
            for number in range(40):
                began = time.monotonic()
                journal.append(a_round(number))
                slowest = max(slowest, time.monotonic() - began)
            journal.rollback(20, "loss surge")
            journal.append(a_round(20))
            journal.verify_chain()
            assert journal.settle()
    finally:
        over.set()
        for looker in lookers:
            looker.join()
    assert check(folder).about == {"rounds": "21"}
    assert slowest < 5.0  # SQLite would wait 30 s for a reader that blocks


def test_a_journal_that_did_not_change_is_not_opened_again(tmp_path, monkeypatch):
    folder, opened = write(tmp_path / "run", rounds=4), []
    reader = Reader(folder)
    settled(reader)
    truly = Journal.open
    monkeypatch.setattr(Journal, "open", lambda *args, **more: opened.append(1) or truly(*args, **more))
    assert reader.look().facts.done == 4 and not opened
    with closing(truly(folder / "journal.sqlite")) as journal:
        journal.append(a_round(4))
        assert reader.look().facts.done == 5 and len(opened) == 1
        assert reader.look().facts.done == 5 and len(opened) == 1
        journal.add_event(5, "network", "client 1 has come")
    assert settled(reader).facts.done == 5


def test_a_reader_takes_no_lock_that_a_writer_needs(tmp_path):
    folder = write(tmp_path / "run", rounds=5)
    with closing(Journal.open(folder / "journal.sqlite", readonly=True)) as reading:
        reading.round(4)
        with closing(Journal.open(folder / "journal.sqlite")) as journal:
            journal.append(a_round(5))
        assert reading.last == 6


# How it is


def test_the_state_follows_whoever_writes(tmp_path):
    folder = write(tmp_path / "run", rounds=3, head=header(rounds=4))
    reader = Reader(folder)
    assert settled(reader).situation.state == "stopped"
    with closing(Journal.open(folder / "journal.sqlite")) as journal:
        running = settled(reader).situation
        assert running.state == "running" and running.left == pytest.approx(running.pace)
        assert running.memory.now > 1e6 and running.memory.peak >= running.memory.now
        journal.append(a_round(3))
        assert settled(reader).situation.state == "finishing"
        journal.append(a_round(4))  # as a run that was resumed with more rounds
        beyond = settled(reader).situation
        assert (beyond.state, beyond.planned) == ("running", 0) and math.isnan(beyond.left)
    assert settled(reader).situation.state == "ended"


def test_a_budget_ends_a_run_before_its_rounds(tmp_path):
    per_round = 2 * 4 * 3
    folder = write(tmp_path / "run", rounds=5, head=header(budget={"forwards": 10 * per_round}))
    facts = settled(Reader(folder)).facts
    assert planned_of(facts, {}) == 10 and planned_of(facts, {"rounds": 8}) == 8


def test_the_pace_is_that_of_the_clock_once_some_rounds_were_seen():
    tempo = Tempo()
    tempo.see(100, 50.0)
    assert tempo.pace(10.0, 20) == 0.5 and math.isnan(tempo.pace(0.0, 0))
    for at in range(4):
        tempo.see(101 + at, 52.0 + 2 * at)
        tempo.see(101 + at, 53.0 + 2 * at)
    assert tempo.pace(10.0, 20) == 2.0
    tempo.see(90, 100.0)  # rounds went back
    assert tempo.pace(10.0, 20) == 0.5


# How much it is


def many(number, *, cohort=3, clients=3):
    course, draw = Course(header(rounds=number)), random.Random(0)
    for at in range(number):
        course.add(a_round(at, clients=tuple(sorted(draw.sample(range(clients), cohort))), steps=1, evaluated=True))
    return course.facts({"dim": 10})


def test_ten_thousand_rounds_are_drawn_in_few_points_with_exact_sums():
    facts = many(10_000)
    assert MOST_ROWS / 2 <= len(facts.rows) <= MOST_ROWS and len(facts.evaluations) <= MOST_ROWS + 1
    rounds = [row.round for row in facts.rows]
    assert rounds == sorted(rounds) and rounds[-1] == 9_999
    assert sum(row.forwards for row in facts.rows) == 60_000 and facts.spent()[9_999]["forwards"] == 60_000
    assert facts.spent()[9_999]["up"] == 10_000 * (40 + 41 + 42)
    assert facts.spent()[9_999]["dense"] == 4 * 10 * 30_000
    assert {total.rounds for total in facts.totals().values()} == {10_000}
    spent = facts.spent()
    assert all(row.round in spent for row in facts.rows) and all(at in spent for at, _, _ in facts.evaluations)
    seen = SeenFor(facts)
    view = view_of(seen, folder=Path("run"), findings=())
    assert sum(map(len, view.figures.values())) + sum(map(len, view.parts.values())) < 400_000
    assert "stands for several rounds" in view.parts["training"]


def SeenFor(facts):
    from fedmezo.studies.live.reader import Seen
    from fedmezo.studies.live.situation import Situation

    return Seen(Situation("running", facts.done, facts.done), facts)


@pytest.mark.parametrize("rounds", [1, MOST_ROWS, MOST_ROWS + 1, 3 * MOST_ROWS + 7])
def test_thinning_keeps_the_mean_of_the_losses(rounds):
    course, losses = Course(header()), []
    for at in range(rounds):
        done = a_round(at, steps=1)
        course.add(done)
        losses.append(done.loss)
    facts = course.facts({})
    covers = [after - before for before, after in pairwise([-1, *(row.round for row in facts.rows)])]
    assert sum(covers) == rounds
    mean = sum(row.loss * cover for row, cover in zip(facts.rows, covers, strict=True)) / rounds
    assert mean == pytest.approx(fmean(losses), rel=1e-9)
    assert len(facts.rows) == rounds if rounds <= MOST_ROWS else len(facts.rows) < rounds


def test_a_large_federation_is_drawn_as_a_band_from_a_bounded_number_of_losses():
    facts = many(120, cohort=100, clients=1000)
    assert max(len(row.clients) for row in facts.rows) <= 64 and len(facts.clients) == 1000
    assert facts.spent()[119]["up"] == sum(total.up for total in facts.totals().values())
    (training,) = charts(facts)["training"]
    low, high = ([y for y in trace["y"]] for trace in training.traces[:2])
    assert all(a < b for a, b in zip(low, high, strict=True))


def test_losses_that_are_not_finite_do_not_hide_their_neighbours():
    course = Course(header())
    for at in range(2 * MOST_ROWS):
        done = a_round(at, steps=1)
        course.add(replace(done, loss=math.nan) if at % 2 else done)
    assert all(math.isfinite(row.loss) for row in course.facts({}).rows[: MOST_ROWS // 2])


# What is told


def test_a_browser_is_told_only_what_is_new_to_it(tmp_path):
    folder = write(tmp_path / "run", rounds=5)
    feed = Feed(folder)
    feed.look()
    first = json.loads(feed.answer(""))
    assert set(first["parts"]) == set(PARTS) and first["figures"] and first["state"] == "stopped"
    again = json.loads(feed.answer(first["cursor"]))
    assert again["parts"] == {} and again["figures"] == [] and again["cursor"] == first["cursor"]
    with closing(Journal.open(folder / "journal.sqlite")) as journal:
        journal.append(a_round(5))
    feed.look()
    more = json.loads(feed.answer(first["cursor"]))
    assert "cards" in more["parts"] and "head" not in more["parts"] and more["figures"]


@pytest.mark.parametrize("cursor", ["", "0", "other-5", "-1", "nonsense", "-", "½-²", "9" * 400])
def test_an_unknown_cursor_gets_everything(tmp_path, cursor):
    feed = Feed(write(tmp_path / "run", rounds=2))
    feed.look()
    assert set(json.loads(feed.answer(cursor))["parts"]) == set(PARTS)


def test_nobody_looks_when_nobody_asks(tmp_path, monkeypatch):
    monkeypatch.setattr("fedmezo.studies.live.feed._FORGOTTEN", 0.2)
    monkeypatch.setattr("fedmezo.studies.live.feed._SELDOM", 0.01)
    folder = write(tmp_path / "run", rounds=2)
    feed, looks = Feed(folder), []
    look = feed.look
    monkeypatch.setattr(feed, "look", lambda: looks.append(1) or look())
    feed.start()
    try:
        until(lambda: json.loads(feed.answer("")).get("state"))
        time.sleep(0.6)
        before = len(looks)
        time.sleep(0.4)
        assert len(looks) == before
        feed.answer("")
        until(lambda: len(looks) > before)
    finally:
        feed.stop()


def test_a_run_that_cannot_be_shown_says_so_and_keeps_the_page(tmp_path, monkeypatch):
    folder = write(tmp_path / "run", rounds=3)
    feed = Feed(folder)
    feed.look()
    monkeypatch.setattr("fedmezo.studies.live.view.view_of", lambda *a, **b: 1 / 0)
    assert feed.look() is False
    told = json.loads(feed.answer(""))
    assert told["state"] == "unreadable" and "ZeroDivisionError" in told["words"] and told["parts"]["cards"]


def test_every_text_is_escaped(tmp_path):
    folder = tmp_path / EVIL.replace("/", "")
    folder.mkdir()
    with closing(Journal.create(folder / "journal.sqlite", header(name=EVIL))) as journal:
        journal.append(a_round(0, events=(("surge", EVIL), (EVIL, "x"))))
        journal.record_evaluation(0, EVIL, {"loss": 1.0, EVIL: 1.0})
    (folder / "live.jsonl").write_text(json.dumps({"note": EVIL}) + "\n")
    feed = Feed(folder)
    feed.look()
    told = json.loads(feed.answer(""))
    assert "<script" not in "".join(told["parts"].values()) and "&lt;script&gt;" in told["parts"]["events"]
    assert not any("<script" in json.dumps(figure) for figure in told["figures"])


def test_a_private_run_shows_what_was_spent_and_no_loss(tmp_path):
    spent = json.dumps({"epsilon": 1.5, "budget": 8.0, "delta": 1e-5, "unit": "client"})
    with closing(Journal.create(tmp_path / "journal.sqlite", header())) as journal:
        done = a_round(0, events=(("privacy", spent),))
        hidden = [replace(entry, reply=replace(entry.reply, loss=math.nan)) for entry in done.entries]
        journal.append(replace(done, entries=tuple(hidden), loss=math.nan))
    view = view_of(settled(Reader(tmp_path)), folder=tmp_path, findings=())
    assert "epsilon 1.50" in view.parts["cards"] and "Training loss" not in view.parts["cards"]
    assert "training-loss" not in view.figures


# Who may see it


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = write(tmp_path_factory.mktemp("served") / "run", rounds=6)
    with watch(folder, port=0, token=TOKEN) as served:
        until(lambda: data(served).get("state") == "stopped", seconds=60)
        yield served


def test_the_page_its_script_and_its_data_are_served(page):
    assert page.url == f"http://127.0.0.1:{page.port}/{TOKEN}/"
    status, headers, body = ask(page, f"/{TOKEN}/")
    assert status == 200 and headers["Content-Type"].startswith("text/html") and b"fedmezo live page" in body
    assert b"default-src 'none'" in body and b"connect-src 'self'" in body and b"http://" not in body
    status, headers, body = ask(page, f"/{TOKEN}/plotly.js")
    assert status == 200 and len(body) == int(headers["Content-Length"]) > 1_000_000
    status, headers, zipped = ask(page, f"/{TOKEN}/plotly.js", headers={"Accept-Encoding": "gzip"})
    assert headers["Content-Encoding"] == "gzip" and len(zipped) < len(body) / 2
    status, headers, body = ask(page, f"/{TOKEN}/data", method="HEAD")
    assert (status, body) == (200, b"") and int(headers["Content-Length"]) > 1000
    assert ask(page, f"/{TOKEN}")[1]["Location"] == f"/{TOKEN}/" and ask(page, f"/{TOKEN}/other")[0] == 404


@pytest.mark.parametrize(
    "path",
    ["/", "/data", "/plotly.js", f"/{TOKEN[:-1]}/", f"/{TOKEN}x/data", f"/{TOKEN.upper()}/", f"/x/{TOKEN}/", "*",
     f"/?token={TOKEN}", "/%C3%A4/", f"http://127.0.0.1/{TOKEN}/", "//[", "/" + "a" * 3000],
)  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "OPTIONS", "BREW"])
def test_a_request_without_the_token_is_refused_and_learns_nothing(page, path, method):
    status, _, body = ask(page, path, method=method)
    assert status == 403 and len(body) < 100 and TOKEN.encode() not in body


@pytest.mark.parametrize(
    "host", [[], ["evil.example"], [f"evil.example:{8650}"], ["127.0.0.1.evil.example"], ["localhost", "evil.example"],
             ["evil.example@127.0.0.1"], [""], ["[::1"], ["127.0.0.1:"]]
)  # fmt: skip
def test_a_request_for_another_host_is_refused(page, host):
    assert ask(page, f"/{TOKEN}/data", host=host)[0] == 403


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LOCALHOST:9999", "[::1]:80"])
def test_a_tunnel_may_begin_anywhere(page, host):
    assert ask(page, f"/{TOKEN}/data", host=[host])[0] == 200


def test_the_page_can_only_be_read(page):
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        assert ask(page, f"/{TOKEN}/", method=method)[0] == 405


def test_answers_forbid_frames_caches_and_to_pass_the_address_on(page):
    for path in (f"/{TOKEN}/", f"/{TOKEN}/data", "/"):
        _, headers, _ = ask(page, path)
        assert headers["X-Frame-Options"] == "DENY" and headers["Referrer-Policy"] == "no-referrer"
        assert headers["Cache-Control"] == "no-store" and headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"


def test_nobody_can_listen_from_outside(page):
    assert page._server.server_address[0] == "127.0.0.1"
    with closing(socket.socket()) as probe, pytest.raises(OSError, match="refused"):
        probe.connect(("127.0.0.2", page.port))


def test_many_browsers_get_the_same(page):
    found = []
    threads = [threading.Thread(target=lambda: found.append(data(page)["parts"]["clients"])) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 12 and len(set(found)) == 1


def test_every_page_has_a_token_of_its_own(tmp_path):
    with watch(tmp_path, port=0) as one, watch(tmp_path, port=0) as other:
        assert one.token != other.token and len(one.token) >= 32
        assert ask(one, f"/{other.token}/")[0] == 403


def test_what_cannot_be_served_is_refused_in_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file"):
        watch(tmp_path / "file")
    for token in ("short", "a" * 15, "has a space in it, sir", "slash/slash/slash/slash", "a" * 201):
        with pytest.raises(ConfigError, match="16 to 200"):
            watch(tmp_path, token=token)
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match="give another port"):
            watch(tmp_path, port=taken.getsockname()[1])
    monkeypatch.setattr("fedmezo.studies.live.server.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'fedmezo\[report\]'"):
        watch(tmp_path)


def test_a_port_that_nobody_asked_for_gives_way(tmp_path, monkeypatch):
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setattr("fedmezo.studies.live.server.PORT", taken.getsockname()[1])
        with watch(tmp_path) as page:
            assert page.port != taken.getsockname()[1] and ask(page, f"/{page.token}/")[0] == 200


def test_the_package_offers_it_by_name():
    assert fedmezo.watch is watch and isinstance(fedmezo.LivePage, type)


# The verb


@contextmanager
def verb(*arguments, cwd):
    # A test run in the background of a shell may have been told to ignore Ctrl-C.
    listens = "import signal, sys; signal.signal(2, signal.default_int_handler); from fedmezo.cli import main; "
    command = [sys.executable, "-c", f"{listens}sys.exit(main())", "watch", *map(str, arguments)]
    process = subprocess.Popen(
        command, cwd=cwd, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_the_verb_prints_the_address_and_ends_with_ctrl_c(tmp_path):
    with verb("run", "--port", 0, "--json", cwd=tmp_path) as process:
        told = json.loads(process.stdout.readline())
        assert told["url"].startswith("http://127.0.0.1:") and told["folder"] == "run"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0 and "the page waits for one" in err and "Ctrl-C" in err


# In a browser

chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
DRAWN = "document.querySelectorAll('.js-plotly-plot .main-svg').length > 8"
STATE = "document.getElementById('status').dataset.state"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("browser")) as one:
        yield one


@chromium
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_a_browser_draws_the_page_without_an_error(page, browser, width, dark):
    browser.errors.clear()
    browser.open(page.url, width=width, dark=dark, phone=width < 500)
    browser.until(DRAWN)
    assert browser.get("document.documentElement.scrollWidth") <= width
    assert browser.get("document.title") == "6/40 stopped: builtin:tiny, fedmezo"
    assert browser.get("document.querySelectorAll('#training-loss .scatterlayer .trace').length") == 4
    small = "[...document.querySelectorAll('main *')].some((e) => e.getBoundingClientRect().right > innerWidth + 1"
    assert browser.get(f"{small} && !e.closest('.scroll') && !e.closest('.js-plotly-plot'))") is False
    assert browser.errors == []


@chromium
def test_the_charts_can_be_drawn_against_another_axis(page, browser):
    browser.open(page.url)
    browser.until(DRAWN)
    browser.get("document.querySelector('.switch input[value=forwards]').click()")
    browser.until("document.querySelector('#evaluation-loss .xtitle').textContent === 'Forward passes'")
    assert browser.get("Math.max(...document.getElementById('evaluation-loss').data[0].x)") == 5 * 24


@chromium
def test_a_page_goes_on_after_the_run_began_grew_and_its_server_was_started_again(tmp_path, browser):
    folder, port = tmp_path / "run", free_port()
    browser.errors.clear()
    with watch(folder, port=port, token=TOKEN) as served:
        browser.open(served.url)
        browser.until(f"{STATE} === 'waiting'")
        write(folder, rounds=3)
        browser.until("document.title.startsWith('3/40')")
        browser.until(DRAWN)
        assert browser.errors == []
    browser.until(f"{STATE} === 'lost' && document.documentElement.classList.contains('stale')")
    assert "Reconnecting" in browser.get("document.getElementById('words').textContent")
    with closing(Journal.open(folder / "journal.sqlite")) as journal:
        journal.append(a_round(3))
    with watch(folder, port=port, token=TOKEN):
        browser.until("document.title.startsWith('4/40')")
        browser.until(f"{STATE} === 'stopped' && !document.documentElement.classList.contains('stale')")
    with watch(folder, port=port, token=TOKEN[::-1]):
        browser.until("document.getElementById('words').textContent.startsWith('The address has changed')")


@chromium
def test_a_browser_alone_shows_the_page(page, tmp_path):
    """Without the debugging pipe: the page as any browser loads it, its DOM printed."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}",
               "--virtual-time-budget=8000", "--dump-dom", page.url]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "js-plotly-plot" in done.stdout and "Stopped: 6 of 40 rounds" in done.stdout
