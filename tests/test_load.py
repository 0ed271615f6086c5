"""Many clients, many rounds: a server's work and memory, with the bytes of a network inside this process."""

import json
import sys
from itertools import pairwise
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
import load_line
from load_line import Post, line_through, server
from soak import growth, soak

from fedmezo.runtime import distant, packing, pull
from fedmezo.runtime.journal import SLOW, Journal


@pytest.fixture(autouse=True)
def _small(no_waiting, monkeypatch):
    monkeypatch.setattr(load_line, "DIM", 64)


def started(folder, *, clients, rounds, kind="light", each=lambda _: None, **told):
    """Returns the line of a run that is over, and its rounds as the journal has them."""
    line, go = server(kind, folder=folder, clients=clients, cohort=clients, steps=2, rounds=rounds, **told)
    go(lambda report: each(line, report))
    with Journal.open(folder / "run" / "journal.sqlite", readonly=True) as journal:
        return line, list(journal.rounds())


def nothing(line, report):
    pass


def counted(monkeypatch, owner, name):
    """Returns a list that gets an item for each call."""
    calls, inner = [], getattr(owner, name)

    def counting(*given, **named):
        calls.append(given)
        return inner(*given, **named)

    monkeypatch.setattr(owner, name, counting)
    return calls


def sent_parts(monkeypatch):
    """Returns a list that gets the sizes of the tasks that are sent together."""
    parts = []

    class Scales(Post):
        def send(self, parcels):
            if not any(parcel.greeting for parcel in parcels):
                parts.append([len(parcel.payload) for parcel in parcels])
            return super().send(parcels)

    monkeypatch.setattr(load_line, "Post", Scales)
    return parts


# --- many clients -----------------------------------------------------------------------------------------------------


def test_two_hundred_clients_are_in_every_round(tmp_path):
    line, rounds = started(tmp_path, kind="stub", clients=200, rounds=3, each=nothing)
    assert [[entry.task.client for entry in done.entries] for done in rounds] == [list(range(200))] * 3
    assert sum(entry.bytes_up for done in rounds for entry in done.entries) < line.up
    assert min(entry.bytes_up for entry in rounds[0].entries) > 0


def test_what_all_clients_are_told_is_packed_once(tmp_path, monkeypatch):
    calls = counted(monkeypatch, packing, "pack_told")
    started(tmp_path / "few", clients=3, rounds=5, each=nothing)
    few = len(calls)
    started(tmp_path / "many", clients=30, rounds=5, each=nothing)
    assert len(calls) - few == few == 5


def test_tasks_go_out_in_parts_that_fit_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(distant, "_AT_ONCE", 1000)
    parts = sent_parts(monkeypatch)
    _, rounds = started(tmp_path, clients=40, rounds=2, each=nothing)
    assert all(len(done.entries) == 40 for done in rounds)
    assert len(parts) > 4 and all(sum(part[:-1]) <= 1000 for part in parts)


def test_clients_that_are_behind_are_asked_again_together(tmp_path, monkeypatch):
    parts = sent_parts(monkeypatch)

    def harm(line, report):
        for answer in line.handlers.values() if report.round == 2 else ():
            answer.__self__._taking.bench.params["x"][0] += 1

    _, rounds = started(tmp_path, clients=8, rounds=6, each=harm)
    assert [len(done.entries) for done in rounds] == [8] * 6
    assert [len(part) for part in parts] == [8] * 7


# --- many rounds ------------------------------------------------------------------------------------------------------


def test_a_client_that_never_answers_leaves_no_more_behind_each_round(tmp_path, monkeypatch):
    waited = []

    class Listens(Post):
        def receive(self, tickets):
            waited.append(len(tickets))
            return super().receive(tickets)

    monkeypatch.setattr(load_line, "Post", Listens)
    monkeypatch.setattr(load_line, "DEADLINE", 0.001)

    def silence(line, report):
        line.silent = {101, 102}

    _, rounds = started(tmp_path, clients=4, rounds=30, each=silence)
    assert {len(done.entries) for done in rounds[3:]} == {2}
    assert max(waited) <= 2 * distant._LATE + 4


@pytest.mark.parametrize(("chosen", "dim"), [("auto", 64), ("pairs", 4096)])
def test_the_rounds_in_memory_do_not_grow_with_the_run(tmp_path, monkeypatch, chosen, dim):
    monkeypatch.setattr(pull, "RECENT", 10)
    kept = []
    remembering = pull.Downlink.remember

    def remember(self, done):
        remembering(self, done)
        kept.append(self.in_memory)

    monkeypatch.setattr(pull.Downlink, "remember", remember)
    monkeypatch.setattr(load_line, "DIM", dim)
    started(tmp_path, clients=3, rounds=40, each=nothing, pull=chosen)
    assert max(kept) <= 10


def test_a_client_that_was_away_for_long_is_told_all_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(pull, "RECENT", 5)
    monkeypatch.setattr(load_line, "DIM", 4096)
    sizes = []

    def away(line, report):
        sizes.append(line.largest.pop(102, 0))
        line.online = {100, 101} if 3 <= report.round < 33 else {100, 101, 102}

    _, rounds = started(tmp_path, clients=3, rounds=40, each=away, pull="pairs")
    assert [len(done.entries) for done in rounds[-4:]] == [3] * 4
    assert max(sizes) > 10 * sizes[-1]


def test_a_question_for_one_kind_of_events_finds_those_of_this_kind(tmp_path):
    started(tmp_path, clients=3, rounds=6, each=lambda line, _: line.failing.add(101))
    with Journal.open(tmp_path / "run" / "journal.sqlite", readonly=True) as journal:
        every = journal.events()
        assert journal.events("absent") == [event for event in every if event[1] == "absent"] != []
        assert journal.events("nothing") == []


def test_what_slows_a_run_is_what_a_journal_read_anew_says(tmp_path):
    started(tmp_path, clients=3, rounds=6, each=nothing)
    path = tmp_path / "run" / "journal.sqlite"

    def anew():
        with Journal.open(path, readonly=True) as other:
            return other.slowed()

    with Journal.open(path) as journal:
        for factor in ("0.5", "0.3", "1.7"):
            journal.add_event(3, SLOW, factor)
            assert journal.slowed() == anew() == journal.slowed() != 1
        journal.rollback(2, "for this test")
        assert journal.slowed() == anew() == 1
        journal.add_event(2, SLOW, "0.7")
        assert journal.slowed() == anew() == 0.7


def test_a_soak_goes_through_all_weathers_and_ends_with_a_slope(tmp_path):
    out = tmp_path / "soak.jsonl"
    fit = soak(kind="light", rounds=100, out=out, every=1)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    weathers = [row["weather"] for row in rows if "weather" in row]
    assert len(weathers) == len(set(weathers)) == 8
    samples = [row for row in rows if "round" in row]
    # The run went back once, so more rounds were walked than it has.
    assert samples[-1]["walked"] > samples[-1]["round"] + 1
    assert any(after["round"] < before["round"] + 1 for before, after in pairwise(samples))
    assert samples[-1]["files"] <= samples[2]["files"]  # fewer, where what other tests left is collected meanwhile
    for part in ("in all", "between"):
        assert rows[-1][part]["low"] <= fit[part]["slope"] == rows[-1][part]["slope"] <= rows[-1][part]["high"]
    assert set(fit["journals"]) == {"journal.sqlite", "journal.before-rollback-1.sqlite"}


def test_growth_between_events_is_told_from_the_steps_at_events():
    rows = []
    for n in range(1, 101):
        rows += [{"weather": "a storm"}] * (n in (31, 61))
        rows.append({"walked": 100 * n, "round": 100 * n, "rss_mb": 400 + 5.0 * (n > 30) + 5.0 * (n > 60) + n % 2})
    found = growth(rows)
    assert found["in all"]["slope"] > 0.8
    assert found["between"]["low"] < 0 < found["between"]["high"] < 0.2
    leaking = [row | {"rss_mb": row["rss_mb"] + row["walked"] / 1000} if "round" in row else row for row in rows]
    assert growth(leaking)["between"]["slope"] == pytest.approx(1 + found["between"]["slope"], abs=1e-3)


def test_a_line_through_points_of_one_line_is_that_line():
    found = line_through([(1, 5), (2, 7), (3, 9), (4, 11)])
    assert (found["slope"], found["intercept"], found["explained"]) == (2, 3, 1)
    noisy = line_through([(1, 5), (2, 8), (3, 8), (4, 11)])
    assert noisy["low"] < noisy["slope"] < noisy["high"]
