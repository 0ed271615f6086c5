import json
import math
import random
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import numpy as np
import pytest

from fedmezo.errors import ConfigError
from fedmezo.fl.algorithm import Reply, Task
from fedmezo.runtime.journal import Entry, Header, Journal, Round
from fedmezo.studies.charts import Chart, figures_json
from fedmezo.studies.facts import Split, gather
from fedmezo.studies.page import DASH, change, duration, number, size
from fedmezo.studies.report import write_report
from fedmezo.studies.watch import NullWatch, TensorBoardWatch, Watchers

EVIL = "<script>alert('x')</script>"
CONFIG = {
    "model": {"name": "smollm2-135m", "dtype": "float32"},
    "data": {"name": "builtin:skills"},
    "federation": {"clients": 3, "rounds": 20},
    "algorithm": {"name": "fedmezo", "clip": 3.0, "lora": {"targets": ["q_proj", "v_proj"], "dropout": None}},
}


class FakeJournal:
    """As much of a journal as the report reads, in memory."""

    def __init__(self, config=CONFIG, *, rounds=(), evaluations=()):
        self.header = SimpleNamespace(
            config=json.dumps(config),
            fingerprint="ab" * 32,
            layout="cd" * 32,
            law="gaussian",
            noise_version=1,
            package="0.1.0",
            created="2026-01-02T03:04:05Z",
            kind="simulation",
        )
        self._rounds, self._evaluations = list(rounds), list(evaluations)
        self.last = len(self._rounds)

    def rounds(self):
        return iter(self._rounds)

    def evaluations(self):
        return list(self._evaluations)


def a_round(at, *, cohort, draw, broken=False, steps=5, limit=math.inf):
    loss = 1.2 + 2.0 * math.exp(-at / 40)
    entries = []
    for client in cohort:
        slopes = tuple(math.nan if broken else float(np.float32(draw.gauss(0, 30))) for _ in range(steps))
        heard = math.nan if broken else loss + 0.08 * client + draw.gauss(0, 0.1)
        task = Task(at, client, 7, rate=1e-5 * (1 + 0.1 * client), mu=1e-3, steps=steps, clip=limit)
        entries.append(
            SimpleNamespace(
                task=task,
                reply=Reply(at, client, steps, heard, slopes),
                weight=1 / len(cohort),
                bytes_down=190 + 40 * client,
                bytes_up=16 + 4 * steps,
            )
        )
    return SimpleNamespace(
        round=at,
        entries=tuple(entries),
        loss=math.nan if broken else fmean(entry.reply.loss for entry in entries),
        rate=1e-5,
        slowed=1.0,
        seconds=4.0 + draw.random(),
        forwards=2 * steps * len(cohort),
        tokens=200 * steps * len(cohort),
        digest=f"{at:064x}",
        evaluations={},
        events=(),
        news=(
            ("skipped", f"{steps} directions skipped: a loss was not finite"),
            ("surge", f"training loss surged {EVIL}"),
        )
        if broken
        else (),
    )


def a_journal(*, clients=3, rounds=20, cohort=None, broken=(), every=5, config=CONFIG, accuracy=True):
    draw = random.Random(3)
    done = [
        a_round(
            at,
            cohort=sorted(draw.sample(range(clients), cohort or clients)),
            draw=draw,
            broken=at in broken,
            limit=math.inf if at < 2 else 85.0,
        )
        for at in range(rounds)
    ]
    marks = [-1, *(at for at in range(rounds) if (at + 1) % every == 0)]
    evaluations = []
    for at in marks:
        score = {"loss": 1.1 + 2.1 * math.exp(-(at + 1) / 50), "tokens": 5210.0, "examples": 200.0}
        if accuracy:
            score |= {"accuracy": 0.3 + 0.5 * (1 - math.exp(-(at + 1) / 60))}
            score |= {
                f"category/{name}/{kind}": value
                for n, name in enumerate(("sorting", "arithmetic", "translation"))
                for kind, value in (("accuracy", 0.2 + 0.1 * n + 0.002 * at), ("examples", 66.0 + n))
            }
        evaluations.append((at, "test", score))
    return FakeJournal(config, rounds=done, evaluations=evaluations)


def a_split(clients, labels=("arithmetic", "sorting", "translation", "spelling", "dates", EVIL)):
    draw = random.Random(5)
    counts = {client: {name: int(400 * draw.random() ** 4) for name in labels} for client in range(clients)}
    return {
        "sizes": [sum(found.values()) for found in counts.values()],
        "labels": counts,
        "distance": [draw.random() for _ in counts],
    }


SUMMARY = {
    "run_dir": "runs/demo",
    "rounds": 20,
    "clients": 3,
    "dim": 460_800,
    "mu": 1e-3,
    "rate": 1e-5,
    "eval": {"start": {"loss": 3.2}, "end": {"loss": 2.5}},
    "bytes": {"up_per_client_round": 36, "down_per_client_round": 230, "up_total": 2160, "down_total": 13800},
    "forwards": 600,
    "tokens": 60_000,
    "seconds": 90.0,
    "peak_rss_mb": 1480.0,
    "skipped_steps": 0,
    "digest": "ef" * 32,
}


class Page(HTMLParser):
    """What a browser would see: every tag with its attributes, the text outside scripts and styles, the scripts."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.texts, self.scripts, self._inside = [], [], [], ""
        self.feed(Path(path).read_text(encoding="utf-8"))
        self.text = " ".join(self.texts)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag if tag in ("script", "style") else ""

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts.append(data)
        elif not self._inside and data.strip():
            self.texts.append(" ".join(data.split()))

    @property
    def figures(self):
        return json.loads(self.scripts[0])


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    path = write_report(a_journal(broken=(4,)), out=folder / "report.html", summary=SUMMARY, split=a_split(3))
    assert [found.name for found in folder.iterdir()] == ["report.html"]
    return Page(path)


def test_report_loads_nothing_from_anywhere(page):
    for tag, attrs in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base")
        assert not {"src", "href", "srcset", "action", "poster"} & set(attrs)
    policy = next(attrs["content"] for _, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "http" not in policy


def test_report_has_every_section(page):
    for title in ("Evaluation", "Training", "Traffic", "Clients", "Evaluation by category", "Events", "Configuration"):
        assert title in page.texts
    assert "Check it, go on with it" in page.texts
    ids = {attrs.get("id") for _, attrs in page.tags}
    named = {"evaluation-loss", "evaluation-accuracy", "training-loss", "slopes", "rate", "traffic", "split"}
    assert named == set(page.figures) and named <= ids


def test_a_category_says_how_many_examples_it_has_once(page):
    _, _, told = page.text.partition("Evaluation by category")
    assert told.partition("Events")[0].count("Examples") == 1 and "67" in told


def test_report_states_the_key_figures(page):
    assert "3.200 → 2.508" in page.text and "30.0% → 44.2%" in page.text and "+14.2 points" in page.text
    assert "36 B" in page.text and "51,200 times less than the weights" in page.text
    assert "460,800 trainable scalars" in page.text and "1.48 GB" in page.text
    assert "ef" * 32 in page.text and "ab" * 32 in page.text and "cd" * 32 in page.text
    assert "fedmezo verify runs/demo" in page.text and "fedmezo resume runs/demo --rounds 40" in page.text
    assert "algorithm.lora.targets" in page.text and "q_proj, v_proj" in page.text


def test_report_escapes_every_text(tmp_path):
    config = {"model": {"name": EVIL}, "data": {"name": EVIL}, EVIL: EVIL, "list": [EVIL], "algorithm": {"name": EVIL}}
    journal = a_journal(rounds=6, broken=(1,), config=config)
    at, _, metrics = journal._evaluations[0]
    journal._evaluations[0] = (at, EVIL, {**metrics, f"category/{EVIL}/accuracy": 0.5, EVIL: 1.0})
    journal.header.created = journal.header.package = journal.header.fingerprint = EVIL
    summary = {**SUMMARY, "run_dir": EVIL, "digest": EVIL, "clients": EVIL}
    path = write_report(journal, out=tmp_path / "report.html", summary=summary, split=a_split(3))
    assert "<script>alert" not in path.read_text()
    found = Page(path)
    assert len([tag for tag, _ in found.tags if tag == "script"]) == 3
    assert found.text.count("alert('x')") >= 12
    assert any(name.startswith("&lt;script") for name in found.figures["split"]["data"][0]["x"])


def test_report_survives_losses_that_are_not_finite(tmp_path):
    journal = a_journal(rounds=8, broken=range(8))
    journal._evaluations = [(-1, "eval", {"loss": 2.0}), (7, "eval", {"loss": math.nan, "accuracy": math.inf})]
    path = write_report(journal, out=tmp_path / "report.html", summary={**SUMMARY, "peak_rss_mb": math.nan})
    found = Page(path)
    assert f"2.000 → {DASH}" in found.text and not re.search(r"\b(nan|inf|NaN|None)\b", found.text)
    assert found.figures["training-loss"]["data"][0]["y"] == [None] * 8
    assert "training loss surged <script>" in found.text


@pytest.mark.parametrize("clients", [3, 60])
def test_report_of_a_cohort_draws_each_client_or_their_spread(tmp_path, clients):
    journal = a_journal(clients=clients, rounds=12, cohort=3)
    figures = Page(write_report(journal, out=tmp_path / "r.html")).figures
    names = [trace["name"] for trace in figures["training-loss"]["data"]]
    assert names[-1] == "mean of the cohort" and len(names) == (4 if clients == 3 else 3)


def test_report_of_a_run_that_has_not_begun_says_so(tmp_path):
    found = Page(write_report(FakeJournal(), out=tmp_path))
    assert "0 of 20 rounds" in found.text and "Nothing was evaluated yet." in found.texts
    assert found.text.count("No round is complete yet.") == 2 and found.figures == {}
    assert "--rounds" not in found.text


def test_evaluations_are_drawn_against_all_that_was_spent(tmp_path):
    journal = a_journal(rounds=10)
    (trace,) = Page(write_report(journal, out=tmp_path / "r.html")).figures["evaluation-loss"]["data"]
    assert trace["x"] == trace["meta"]["rounds"] == [0, 5, 10]
    assert trace["meta"]["forwards"] == [0, 150, 300]
    sent = [sum(e.bytes_up + e.bytes_down for e in done.entries) for done in journal.rounds()]
    assert trace["meta"]["bytes"] == [0, sum(sent[:5]), sum(sent)]


def test_totals_of_the_clients_are_the_totals_of_the_rounds():
    facts = gather(a_journal(clients=7, rounds=9, cohort=4, broken=(8,)))
    totals, end = facts.totals().values(), facts.spent()[8]
    assert sum(total.up for total in totals) == end["up"] and sum(total.down for total in totals) == end["down"]
    assert sum(total.rounds for total in totals) == 36 and sum(total.skipped for total in totals) == 20
    assert all(math.isfinite(total.loss) for total in totals)


def test_rare_labels_share_a_name_and_no_example_is_lost():
    given = a_split(4, [f"task{at}" for at in range(40)])
    split = Split(given)
    assert len(split.names) == 12 and split.names[-1] == "all others"
    assert [sum(held.values()) for held in split.labels.values()] == given["sizes"]


def test_a_split_is_read_from_a_file_or_from_the_splitter():
    histograms = [{"a": 1, "b": 2}, {"b": 3}]
    fresh = Split({"sizes": [3, 3], "histograms": histograms, "distances": [0.1, 0.2]})
    stored = Split({"sizes": [3, 3], "labels": {"0": histograms[0], "1": histograms[1]}, "distance": [0.1, 0.2]})
    assert fresh.labels == stored.labels == {0: {"b": 2, "a": 1}, 1: {"b": 3, "a": 0}}
    assert fresh.distance == stored.distance == {0: 0.1, 1: 0.2}


def test_report_without_plotly_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(ConfigError, match=r"pip install 'fedmezo\[report\]'"):
        write_report(a_journal(rounds=1), out=tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (number(math.nan), DASH),
        (number(None), DASH),
        (number(0.0), "0.000"),
        (number(2e-6, 3), "2.0e-6"),
        (number(1234.56), "1,235"),
        (number(9.99996), "10.000"),
        (size(999), "999 B"),
        (size(1_480_000), "1.48 MB"),
        (size(math.inf), DASH),
        (duration(4.5), "4.50 s"),
        (duration(905), "15 min 5 s"),
        (duration(36_000), "10 h 0 min"),
        (change(2.0, 1.5), "\N{MINUS SIGN}0.500"),
        (change(1.0, math.nan), DASH),
        (change(1.0, 1.0), "no change"),
    ],
)
def test_numbers_are_written_for_people(text, wanted):
    assert text == wanted


def a_report(at, *, evaluations=None, loss=2.0):
    clients = {0: {"loss": loss, "rate": 1e-5}, 1: {"loss": math.nan, "rate": 1e-5}}
    return SimpleNamespace(
        round=at,
        rounds=4,
        loss=loss,
        rate=1e-5,
        clip=0.0 if at == 0 else 80.0,
        bytes_up=72,
        bytes_down=400,
        seconds=2.0,
        forwards=60,
        tokens=4000,
        skipped=0,
        evaluations=evaluations or {},
        events=(("surge", "training loss surged"),) if at == 1 else (),
        clients=clients,
    )


def curves(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder)).Reload()
    scalars = {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}
    return scalars, set(read.Tags()["tensors"])


def test_tensorboard_curves_read_back(tmp_path):
    watch = TensorBoardWatch(tmp_path)
    watch.start({"model": "m", "dim": 8})
    watch.note("the rate was chosen by a probe")
    for at in range(3):
        watch.round(
            a_report(at, loss=2.0 - at / 2, evaluations={"eval": {"loss": 1.5, "accuracy": 0.25}} if at == 2 else None)
        )
    watch.finish(SUMMARY)
    scalars, texts = curves(tmp_path)
    assert scalars["train/loss"] == [(1, 2.0), (2, 1.5), (3, 1.0)]
    assert scalars["clients/0/loss"] == scalars["train/loss"] and "clients/1/loss" not in scalars
    assert scalars["train/clip"] == [(2, 80.0), (3, 80.0)] and scalars["eval/eval/accuracy"] == [(3, 0.25)]
    assert scalars["bytes/up"][0] == (1, 72.0) and scalars["speed/forwards_per_second"][0] == (1, 30.0)
    assert scalars["train/rate"][0][1] == pytest.approx(1e-5)
    assert {tag.removesuffix("/text_summary") for tag in texts} == {"run", "notes", "events/surge", "summary"}


def test_a_large_cohort_is_drawn_as_three_curves(tmp_path):
    watch, report = TensorBoardWatch(tmp_path), a_report(0)
    report.clients = {client: {"loss": float(client) if client else math.nan} for client in range(102)}
    watch.round(report)
    watch.finish({})
    scalars, _ = curves(tmp_path)
    drawn = {tag: values[0][1] for tag, values in scalars.items() if tag.startswith("clients/")}
    assert drawn == {"clients/lowest/loss": 1, "clients/median/loss": 51, "clients/highest/loss": 101}


def test_rounds_done_again_replace_their_curves(tmp_path):
    for first, loss in ((0, 9.0), (2, 1.0)):
        watch = TensorBoardWatch(tmp_path)
        watch.start({})
        for at in range(first, 4):
            watch.round(a_report(at, loss=loss))
        watch.finish({})
    scalars, _ = curves(tmp_path)
    assert scalars["train/loss"] == [(1, 9.0), (2, 9.0), (3, 1.0), (4, 1.0)]


def test_going_on_with_a_finished_run_keeps_its_curves(tmp_path):
    watch = TensorBoardWatch(tmp_path)
    watch.start({"done": 0})
    watch.round(a_report(0))
    watch.finish({})
    again = TensorBoardWatch(tmp_path)
    again.start({"done": 1})
    again.finish({})
    assert curves(tmp_path)[0]["train/loss"] == [(1, 2.0)]


def test_figures_may_stand_inside_a_script_element():
    chart = Chart("id", "title", [{"name": "</script>", "y": [1.0, math.nan, -math.inf, 1 / 3]}], {})
    text = figures_json([chart])
    assert "<" not in text
    assert json.loads(text)["id"]["data"][0] == {"name": "</script>", "y": [1.0, None, None, 0.3333333]}


def test_tensorboard_missing_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"pip install 'fedmezo\[report\]'"):
        TensorBoardWatch(tmp_path)


def test_watchers_tell_each_in_order():
    told = []

    class Ear(NullWatch):
        def __init__(self, name):
            self.name = name

        def round(self, report):
            told.append((self.name, report))

        def note(self, text):
            told.append((self.name, text))

    both = Watchers([Ear("a"), NullWatch(), Ear("b")])
    both.start({})
    both.round("report")
    both.note("text")
    both.finish({})
    assert told == [("a", "report"), ("b", "report"), ("a", "text"), ("b", "text")]


def test_report_reads_a_journal_from_its_file(tmp_path):
    fake = a_journal(rounds=6, broken=(2,))
    start, *later = fake.evaluations()
    judged = {at: {split: metrics} for at, split, metrics in later}
    with Journal.create(tmp_path / "journal.sqlite", Header(**vars(fake.header))) as journal:
        journal.record_evaluation(*start)
        for done in fake.rounds():
            entries = tuple(Entry(**vars(entry)) for entry in done.entries)
            told = {name: value for name, value in vars(done).items() if name != "news"} | {"events": done.news}
            journal.append(Round(**{**told, "entries": entries, "evaluations": judged.get(done.round, {})}))
        while_open = Page(write_report(tmp_path / "journal.sqlite", out=tmp_path / "file.html", summary=SUMMARY))
    from_fake = Page(write_report(fake, out=tmp_path / "fake.html", summary=SUMMARY))
    assert while_open.figures == from_fake.figures and "slopes" in from_fake.figures
    assert while_open.texts == from_fake.texts
