"""Hostile bytes: everything that takes bytes from strangers keeps its law; and what fuzzing has found stays mended."""

import ast
import gzip
import json
import math
import random
import sqlite3
import struct
import sys
import time
import tracemalloc
import warnings
import zlib
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "scripts"))

import fuzz  # noqa: E402
import fuzzing.course  # noqa: E402
from fuzzing import files, journals, messages, parties, seeds  # noqa: E402
from fuzzing.course import Course, Target, mutate  # noqa: E402
from fuzzing.mutation import edited, headed, sealed  # noqa: E402

from fedmezo.data.records import DataSource  # noqa: E402
from fedmezo.data.tasks import load_records  # noqa: E402
from fedmezo.errors import ConfigError, DataError, JournalError, ModelError, WireError  # noqa: E402
from fedmezo.fl import pool  # noqa: E402
from fedmezo.fl.algorithm import Reply, Task  # noqa: E402
from fedmezo.fl.walk import walk_of  # noqa: E402
from fedmezo.models.adapters import SETTINGS, WEIGHTS, load_adapter, make_adapter, save_adapter  # noqa: E402
from fedmezo.runtime import distant  # noqa: E402
from fedmezo.runtime.calls import Behind, Hello, Refused, Walk, decode_answer, decode_request, encode_request  # noqa: E402
from fedmezo.runtime.frames import get  # noqa: E402
from fedmezo.runtime.journal import Journal  # noqa: E402
from fedmezo.runtime.pace import Look  # noqa: E402
from fedmezo.runtime.wire import (  # noqa: E402
    News,
    Sums,
    decode_reply,
    decode_task,
    encode_reply,
    encode_task,
)
from fedmezo.studies import resident  # noqa: E402
from fedmezo.studies.appconfig import config_of  # noqa: E402
from fedmezo.studies.config import load_config, parse_config  # noqa: E402
from fedmezo.studies.kept import Held, kept  # noqa: E402
from fedmezo.zo.estimate import momentum_powers  # noqa: E402
from fedmezo.zo.seedsum import DenseDelta  # noqa: E402

TARGETS = [*messages.TARGETS, *files.TARGETS]
TASK = Task(3, 2, 7, 1e-5, 1e-3, 2, clip=12.5)


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    """What some targets put in the place of something dear goes back."""
    monkeypatch.setattr(resident, "load_base", resident.load_base)
    monkeypatch.setattr(distant, "_POLL", distant._POLL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PEFT's, about every key it does not know
        yield


def course_of(name, folder):
    target = next(target for target in TARGETS if target.name == name)
    course = Course(target, target.open(folder))
    course.warm_()
    return course


def broken(course):
    """What was wrong, but for the clock: other work may be on this machine."""
    return [what for what in course.found if not what.startswith("more time")]


# --- the law ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [target.name for target in TARGETS])
def test_whatever_comes_is_taken_in_whole_or_refused_in_one_sentence(name, tmp_path):
    course = course_of(name, tmp_path)
    mutate(course, 25 if course.target.dear else 250, seed=8)
    assert broken(course) == []
    assert course.inputs == (25 if course.target.dear else 250)


@pytest.mark.parametrize("name", [target.name for target in TARGETS])
def test_every_target_takes_valid_inputs(name, tmp_path):
    course = course_of(name, tmp_path)
    rng = random.Random(1)
    assert any(course.check(course.target.mend(seed, rng)) for seed in course.target.seeds())


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(seeds.tasks()), st.lists(st.tuples(st.integers(6, 400), st.binary(max_size=9)), max_size=4))
def test_a_task_with_any_bytes_replaced_is_a_task_or_refused(data, edits):
    for place, part in edits:
        data = data[:place] + part + data[place + len(part) :]
    body = data[:-4]
    try:
        told = decode_task(body + struct.pack("<I", zlib.crc32(body)))
    except WireError:
        return
    assert encode_task(*decode_task(encode_task(*told))) == encode_task(*told)


# --- the tool ---------------------------------------------------------------------------------------------------------


PEAKS = [100 << 20]  # what the process had at most, in bytes


def planted(fault):
    def check(data):
        if b"\x07" in data:
            fault()
        return True

    return Target("planted", lambda: [b"seven"], lambda folder: check, share=1, seconds=0.02)


WORK = {"seconds": 0.06}


def work():
    until = time.thread_time() + WORK["seconds"]
    while time.thread_time() < until:
        pass


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (lambda: {}["x"], "KeyError"),
        (lambda: [].index(1), "ValueError"),
        (work, "more time"),
        (lambda: PEAKS.append(PEAKS[-1] + (80 << 20)), "more memory"),
    ],
)
def test_a_planted_fault_is_found_with_its_input(fault, said, tmp_path, monkeypatch):
    monkeypatch.setattr(fuzzing.course, "_peak", lambda: PEAKS[-1])
    course = Course(planted(fault), planted(fault).open(tmp_path))
    course.warm_()
    course.try_(b"eight")
    assert course.found == {}
    course.try_(b"longer \x07")
    monkeypatch.setitem(WORK, "seconds", 0.12)  # only what is slower than the slowest is looked at again
    course.try_(b"\x07")
    (what,) = course.found
    assert said in what
    assert course.found[what] == b"\x07"
    assert course.row()["crashes"] == 1


def test_the_same_seed_gives_the_same_inputs(tmp_path):
    def inputs(seed):
        tried = []
        target = replace(planted(work), open=lambda folder: lambda data: bool(tried.append(data)) or True)
        mutate(Course(target, target.open(tmp_path)), 20, seed=seed)
        return tried

    assert inputs(1) == inputs(1) != inputs(2)


def test_edits_reach_what_is_behind_the_checksum():
    rng, good = random.Random(0), seeds.replies()
    tried = [sealed(edited(rng.choice(good), rng, others=good, most=1 << 12), rng) for _ in range(300)]
    good = sum(len(data) > 9 and zlib.crc32(data[:-4]) == struct.unpack("<I", data[-4:])[0] for data in tried)
    assert 240 < good < 300


def test_a_campaign_goes_on_where_it_ended_and_counts_every_input_once(tmp_path, monkeypatch, capsys):
    tried = []

    def row(target, engine, inputs, number, *, keep):
        tried.append((target.name, engine, number))
        return {"target": target.name, "inputs": inputs, "crashes": 0}

    monkeypatch.setattr(fuzz, "_apart", row)
    monkeypatch.setattr(fuzz, "_CHUNK", 100)
    monkeypatch.setattr(fuzz.importlib.util, "find_spec", lambda name: True)
    out = tmp_path / "rows.jsonl"
    for inputs in (500, 500, 900):
        monkeypatch.setattr(sys, "argv", ["fuzz", "--inputs", str(inputs), "--out", str(out), "--only", "task,reply"])
        fuzz.main()
        had = fuzz.done(out)
        shares = {target.name: target.share for target in TARGETS if target.name in ("task", "reply")}
        assert had == {name: math.ceil(inputs * part / sum(shares.values())) for name, part in shares.items()}
    assert len(set(tried)) == len(tried)
    assert {engine for _, engine, _ in tried} == {"atheris", "mutation"}
    assert len(capsys.readouterr().out.splitlines()) == len(tried)


def test_a_process_that_dies_is_a_crash(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    monkeypatch.setattr(
        sys,
        "argv",
        ["fuzz", "--inputs", "9", "--out", str(tmp_path / "rows"), "--only", "task", "--engine", "mutation"],
    )
    with pytest.raises(SystemExit, match="cannot be tried"):
        fuzz.main()
    monkeypatch.setattr(sys, "argv", ["fuzz"])
    row = fuzz._apart(messages.TARGETS[0], "mutation", 10, 0, keep=tmp_path)
    assert (row["crashes"], row["inputs"], row["target"]) == (1, 0, "task")
    assert "ended with code 1" in row["found"][0]


def test_a_chunk_in_a_process_of_its_own_writes_its_row(tmp_path):
    row = fuzz._apart(next(t for t in TARGETS if t.name == "frame"), "mutation", 200, 3, keep=tmp_path)
    assert (row["target"], row["engine"], row["inputs"], row["crashes"], row["chunk"]) == (
        "frame",
        "mutation",
        200,
        0,
        3,
    )
    assert row["source"] == fuzz.source()
    assert 0 < row["taken"] < 200


def test_the_recorded_campaign_is_long_and_ends_without_a_crash():
    rows = [json.loads(line) for line in (ROOT / "docs" / "results" / "fuzz.jsonl").read_text().splitlines()]
    assert sum(row["inputs"] for row in rows) >= 10_000_000
    assert {row["target"] for row in rows} == {target.name for target in TARGETS}
    last = {(row["target"], row["engine"]): row["crashes"] for row in rows}
    assert set(last.values()) == {0}


# --- what was found: messages -----------------------------------------------------------------------------------------


class Pipe:
    def __init__(self, data):
        self.data = data

    def recv_into(self, room):
        part, self.data = self.data[: len(room)], self.data[len(room) :]
        room[: len(part)] = part
        return len(part)


@pytest.mark.parametrize("size", [1 << 40, 1 << 62, (1 << 64) - 1])
def test_the_length_of_a_frame_takes_no_memory_before_its_bytes_come(size):
    with pytest.raises(EOFError, match="gone"):
        get(Pipe(struct.pack("<Q", size) + b"few"))


def test_a_long_frame_arrives_whole():
    data = random.Random(0).randbytes(5_000_001)
    assert bytes(get(Pipe(struct.pack("<Q", len(data)) + data))) == data


def test_the_walks_of_news_are_checked_once_for_all(monkeypatch):
    """A message of 1 MiB can tell of a million walks without a slope; each took 10 microseconds."""
    item = News(tuple(replace(TASK, client=client) for client in range(1000)), ((),) * 1000, (0.5,) * 1000)
    data, checked, check = encode_task(TASK, [item]), [], Task.__post_init__
    monkeypatch.setattr(Task, "__post_init__", lambda task: checked.append(task) or check(task))
    assert decode_task(data)[1] == (item,)
    assert len(checked) < 10


@pytest.mark.parametrize(("at", "value"), [(-1, math.nan), (-1, -1.0), (-2, math.inf), (-2, -1e-9), (-2, math.nan)])
def test_each_walk_of_news_is_still_checked(at, value):
    item = News((TASK, replace(TASK, client=5)), ((1.0,), (2.0,)), (0.5, 0.5))
    data = bytearray(encode_task(TASK, [item])[:-4])
    rate, clip = struct.pack("<d", TASK.rate), struct.pack("<d", TASK.clip)
    place = data.rindex(rate if at == -2 else clip)
    data[place : place + 8] = struct.pack("<d", value)
    with pytest.raises(WireError, match="rate" if at == -2 else "clip"):
        decode_task(bytes(data) + struct.pack("<I", zlib.crc32(data)))


def test_signs_take_one_object_each_whatever_their_number():
    reply = decode_reply(encode_reply(Reply(0, 0, 0, 0.0, (1.0, -1.0, 0.0, math.nan) * 1000, coding="sign")))
    assert len({id(slope) for slope in reply.slopes}) == 4


LARGE = {
    "signs": encode_reply(Reply(0, 0, 0, 0.0, (1.0,) * (1 << 17), coding="sign")),
    "walks": encode_task(
        TASK, [News(tuple(replace(TASK, client=c) for c in range(4096)), ((),) * 4096, (0.5,) * 4096)]
    ),
    "sums": encode_task(replace(TASK, pool=1 << 16), Sums(7, 1 << 16, "float16", (0.0,) * ((1 << 16) - 1) + (1.0,))),
}


@pytest.mark.parametrize("name", LARGE)
def test_a_message_takes_at_most_a_kilobyte_of_memory_a_byte(name):
    data, decode = LARGE[name], decode_reply if name == "signs" else decode_task
    decode(data)
    tracemalloc.start()
    decode(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1024 * len(data)


def test_a_reply_of_more_slopes_than_were_asked_for_is_refused_before_they_are_read():
    data = encode_reply(Reply(0, 0, 0, 0.0, (1.0,) * 9))
    assert len(decode_reply(data, most=9).slopes) == 9
    with pytest.raises(WireError, match="at most 8, got"):
        decode_reply(data, most=8)


@pytest.mark.parametrize("field", ["run", "config", "package"])
def test_half_letters_are_refused(field):
    hello = Hello("ab", "0.1.0", 4, 1, "cd", "ef", "{}")
    assert decode_request(encode_request(hello)) == hello
    with pytest.raises(WireError, match=f"{field} is"):
        decode_request(encode_request(replace(hello, **{field: "\ud800"})))


@pytest.mark.parametrize(
    ("request_", "kind"),
    [
        (b"", Refused),
        (encode_request(Walk(bytes(8), encode_task(replace(seeds.asked(0), round=2**32 - 1)))), Behind),
        (encode_request(Walk(bytes(8), encode_task(seeds.asked(0), DenseDelta({})))), Refused),
        (encode_request(Hello("cd" * 32, *["x"] * 1, 4, 1, "", "", "[" * 5000)), Refused),
    ],
)
def test_a_client_refuses_what_no_server_sends(request_, kind, tmp_path):
    answers = []
    open_ = resident.Resident.answer

    def heard(self, data):
        answers.append(open_(self, data))
        return answers[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resident.Resident, "answer", heard)
        parties._client(tmp_path)(request_)
    assert isinstance(decode_answer(answers[0]), kind)


@pytest.mark.parametrize("draws", [0, 5])
def test_only_the_directions_that_were_walked_are_named(monkeypatch, draws):
    short, named, derive = replace(TASK, pool=draws), [], pool.derive_seed
    monkeypatch.setattr(pool, "derive_seed", lambda *name: named.append(name) or derive(*name))
    long = replace(short, steps=2**24)
    assert walk_of(long, (1.0, 2.0)) == walk_of(short, (1.0, 2.0))
    assert walk_of(replace(long, steps=1, directions=2**24), (1.0, 2.0)).seeds == ()
    assert len(named) <= 8


def test_a_momentum_next_to_one_has_as_many_powers_as_are_wanted():
    assert momentum_powers(math.nextafter(1, 0), most=5) == pytest.approx([1.0] * 5)
    assert momentum_powers(0.5, most=3) == [1.0, 0.5, 0.25]
    slopes, task = (1.0, 2.0), replace(TASK, momentum=math.nextafter(1, 0))
    assert len(walk_of(task, slopes).coefficients) == 2


# --- what was found: files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["x = " + "9" * 5000, "x = " + "[" * 5000, "[model]\nname = " + "9" * 5000, "a" * 10 + " = \xff"]
)
def test_a_configuration_of_endless_numbers_or_lists_is_refused(text, tmp_path):
    path = tmp_path / "a.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError):
        load_config(path)


@pytest.mark.parametrize("override", ["data.template=\udcff", "data.\udcff=1", "\udcff.x=1", "data.path='\udc80'"])
def test_bytes_of_the_command_line_that_are_no_text_are_shown_as_such(override):
    try:
        told = load_config(None, [override]).to_toml()
    except ConfigError as error:
        told = str(error)
    assert r"\udc" in told.encode().decode()


@pytest.mark.parametrize("given", [{"data": {"path": "\ud800"}}, {"data": {"\ud800": 1}}, {"\ud800": {}}])
def test_a_configuration_of_half_letters_is_refused(given):
    with pytest.raises(ConfigError):
        parse_config(given)


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 5000, "2026-02-30", "0x" + "f" * 5000])
def test_an_override_of_endless_numbers_or_lists_is_refused(value):
    with pytest.raises(ConfigError):
        load_config(None, [f"federation.rounds={value}"])
    with pytest.raises(ConfigError):
        config_of({"data.columns": "{" + value, "eval.metrics": "[" + value})


def packed(folder, text, *, suffix):
    path = folder / f"rows{suffix}.gz"
    path.write_bytes(gzip.compress(text))
    return DataSource(path=str(path))


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_a_packed_file_unpacks_to_a_hundred_times_its_size_and_no_more(suffix, tmp_path):
    row = json.dumps({"instruction": "a", "output": "b"}).encode() + b"\n"
    few = (b"[" + b",".join([row] * 1000) + b"]") if suffix == ".json" else row * 1000
    assert len(load_records(packed(tmp_path, few, suffix=suffix))) == 1000
    bomb = packed(tmp_path, row + b" " * (110 << 20) + b"\n", suffix=suffix)
    assert Path(bomb.path).stat().st_size < 200_000
    tracemalloc.start()
    with pytest.raises(DataError, match="100 times its size"):
        load_records(bomb)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < (100 << 20) * 3


@pytest.mark.parametrize("text", ["9" * 5000, "[" * 100_000, '{"instruction": ' + "9" * 5000 + "}", "NaN"])
def test_rows_of_endless_numbers_or_lists_are_refused(text, tmp_path):
    for suffix in (".jsonl", ".json"):
        path = tmp_path / f"rows{suffix}"
        path.write_text(text)
        with pytest.raises(DataError):
            load_records(DataSource(path=str(path)))


def test_a_parquet_file_of_more_values_than_its_size_may_hold_is_refused(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"instruction": pa.nulls(50_000_000, pa.string()), "output": pa.nulls(50_000_000)}), path)
    assert path.stat().st_size < 300_000
    with pytest.raises(DataError, match="100,000,000 values"):
        load_records(DataSource(path=str(path)))


def test_a_parquet_file_of_dates_beyond_the_calendar_is_refused(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"instruction": ["a"], "output": pa.array([2**31 - 1], pa.date32())}), path)
    with pytest.raises(DataError, match="not a readable parquet file"):
        load_records(DataSource(path=str(path)))


def keeping(folder, **said):
    """A kept state with other things said of it."""
    from safetensors.torch import save_file

    told = {"run": "ab" * 32, "instance": "0" * 32, "rounds": 3, "exact": True, "digest": "x"} | said
    tensors = {name: tensor.clone() for name, tensor in files._params()}
    save_file(tensors, folder / "model.safetensors", metadata={"held": said.get("text") or json.dumps(told)})
    return folder


@pytest.mark.parametrize(
    "said",
    [{"text": "7"}, {"text": "null"}, {"text": "[" * 5000}, {"text": "[]"}, {"rounds": "x"}, {"rounds": math.inf},
     {"rounds": None}, {"run": 5}],
)  # fmt: skip
def test_a_kept_state_that_says_something_else_is_not_kept(said, tmp_path):
    params = files._params()
    assert kept(keeping(tmp_path, **said), params, wanted=files._HELD) is None
    assert params.digest() == files._params().digest()


def test_what_is_said_of_a_kept_state_is_under_its_digest(tmp_path):
    seed = files._keepings()[0]
    path = tmp_path / "model.safetensors"
    path.write_bytes(seed)
    assert kept(tmp_path, files._params(), wanted=files._HELD) == files._HELD
    for old, new in ((b'\\"exact\\": true', b'\\"exact\\": 0   '), (b'\\"rounds\\": 3', b'\\"rounds\\": 4')):
        assert old in seed
        path.write_bytes(headed(seed.replace(old, new), random.Random(1)))
        assert kept(tmp_path, files._params(), wanted=Held("ab" * 32, "0" * 32)) is None


@pytest.mark.parametrize(
    ("table", "row", "column", "value"),
    [
        ("run", 0, "config", "[]"), ("run", 0, "config", "nonsense"), ("run", 0, "law", "uniform"),
        ("run", 0, "noise_version", "x"), ("run", 0, "package", b"\x00"),
        ("rounds", 0, "forwards", "many"), ("rounds", 1, "tokens", 2.5), ("rounds", 0, "round", 2**63 - 1),
        ("replies", 0, "task", "text"), ("replies", 1, "reply", 5), ("replies", 0, "weight", math.inf),
        ("replies", 0, "weight", "heavy"), ("replies", 0, "bytes_down", "x"), ("replies", 2, "reply", b""),
        ("events", 6, "detail", "nan?"), ("events", 1, "detail", "{}"), ("events", 1, "detail", '{"at": "x"}'),
    ],
)  # fmt: skip
def test_a_journal_with_a_right_chain_and_wrong_rows_is_refused(table, row, column, value, tmp_path):
    path = tmp_path / "journal.sqlite"
    path.write_bytes(journals.journals()[-1])
    assert journals.read_all(path, verified=True)
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        rows = [number for (number,) in db.execute(f"SELECT rowid FROM {table} ORDER BY rowid")]
        db.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (value, rows[row]))
        journals._forge_(db, path, b"")
    with pytest.raises(JournalError):
        journals.read_all(path)


@pytest.mark.parametrize("text", ["", "[]", "{}", "[" * 5000, "9" * 5000, '{"at": 1}'])
def test_an_event_that_is_no_look_is_refused(text):
    with pytest.raises(JournalError, match="look"):
        Look.from_json(text)


@pytest.mark.parametrize("link", [0, 2])
def test_a_journal_whose_index_leads_elsewhere_is_refused(tmp_path, monkeypatch, link):
    path = tmp_path / "journal.sqlite"
    path.write_bytes(journals.journals()[-1])
    with Journal.open(path, readonly=True) as journal:
        query, asked = journal._ledger.query, "SELECT link FROM rounds"
        monkeypatch.setattr(
            journal._ledger, "query", lambda sql, *of: [(link,)] if sql.startswith(asked) else query(sql, *of)
        )
        with pytest.raises(JournalError, match="its index says"):
            journal.round(1)


@pytest.mark.parametrize(
    "statement",
    [
        "ALTER TABLE rounds ADD COLUMN bomb AS (zeroblob(1000000000))",
        "CREATE TRIGGER t AFTER INSERT ON links BEGIN DELETE FROM rounds; END",
        "CREATE VIEW v AS SELECT * FROM rounds",
        "CREATE TABLE more (a)",
    ],
)
def test_a_journal_with_a_program_in_it_is_refused(statement, tmp_path):
    path = tmp_path / "journal.sqlite"
    path.write_bytes(journals.journals()[-1])
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute(statement)
    for readonly in (True, False):
        with pytest.raises(JournalError, match="holds what no journal has"):
            Journal.open(path, readonly=readonly)


def test_wrong_rows_without_a_right_chain_are_found_by_the_chain(tmp_path):
    path = tmp_path / "journal.sqlite"
    path.write_bytes(journals.journals()[-1])
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("UPDATE rounds SET tokens = 41 WHERE round = 1")
    with pytest.raises(JournalError, match="checksum"):
        journals.read_all(path)
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        journals._forge_(db, path, b"")
    assert "tokens=41" in journals.read_all(path, verified=True)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("adapter"), files._model()
    made = make_adapter(model, kind="lora", rank=2)
    save_adapter(folder, made.start(model, seed=1), adapter=made, base="tiny")
    return folder, model, made


@pytest.mark.parametrize(
    "change",
    [{"target_modules": "(a+)+b"}, {"target_modules": ".*.*.*.*q_proj"}, {"rank_pattern": {"(q|q)*": 3}},
     {"alpha_pattern": {"x" * 600: 3}}, {"r": 10**30}, {"r": "2"}, {"target_modules": {"q": 1}}, {"peft_type": "X"},
     {"layers_to_transform": ["x"]}],
)  # fmt: skip
def test_an_adapter_with_endless_or_senseless_settings_is_refused(adapter, tmp_path, change):
    folder, model, _ = adapter
    (tmp_path / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes())
    (tmp_path / SETTINGS).write_text(json.dumps(json.loads((folder / SETTINGS).read_text()) | change))
    with pytest.raises(ModelError):
        load_adapter(tmp_path, model)


@pytest.mark.parametrize("settings_", [b"[" * 5000, b"\xff", b"null", b"7", b'{"r": ' + b"9" * 5000 + b"}", b""])
def test_an_adapter_with_settings_that_are_none_is_refused(adapter, tmp_path, settings_):
    folder, model, _ = adapter
    (tmp_path / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes())
    (tmp_path / SETTINGS).write_bytes(settings_)
    with pytest.raises(ModelError):
        load_adapter(tmp_path, model)


def test_an_adapter_is_not_written_through_a_link(adapter, tmp_path):
    _, model, made = adapter
    precious, folder = tmp_path / "precious", tmp_path / "out"
    precious.write_text("precious")
    folder.mkdir()
    for name in (SETTINGS, WEIGHTS):
        (folder / name).symlink_to(precious)
    save_adapter(folder, made.start(model, seed=1), adapter=made, base="tiny")
    assert precious.read_text() == "precious"
    assert load_adapter(folder, model)[0].shapes == made.shapes


def test_arrays_that_are_none_have_no_lengths():
    pytest.importorskip("flwr")
    from flwr.common import ndarray_to_bytes
    from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key

    from fedmezo.runtime.flower.secagg import _lengths

    def lengths(parts):
        records = {RECORD_KEY_CONFIGS: {Key.MASKED_PARAMETERS: parts}}
        return _lengths(SimpleNamespace(content=SimpleNamespace(config_records=records)))

    assert lengths([ndarray_to_bytes(torch.zeros(5).numpy())]) == [5]
    for parts in ([b""], [b"PK\x03\x04"], [b"\x80\x04K\x01."], [1], 1, [b"\x93NUMPY\x01\x00\xff\xff"]):
        assert lengths(parts) == []


# --- no code in data --------------------------------------------------------------------------------------------------

FORBIDDEN = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}


def test_nothing_unpickles_and_no_model_brings_code():
    for path in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not FORBIDDEN & {name.split(".")[0] for name in names}, path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"torch.load", "np.load", "numpy.load", "eval", "exec", "yaml.load"}, path
            pairs = [(word.arg, word.value) for word in getattr(node, "keywords", ())]
            if isinstance(node, ast.Dict):
                named = [key.value if isinstance(key, ast.Constant) else None for key in node.keys]
                pairs = list(zip(named, node.values, strict=True))
            for name, value in pairs:
                assert name not in ("trust_remote_code", "allow_pickle") or ast.unparse(value) == "False", path


def test_a_weight_file_of_pickles_is_refused(tmp_path, adapter):
    folder, model, _ = adapter
    (tmp_path / SETTINGS).write_bytes((folder / SETTINGS).read_bytes())
    torch.save({"a": torch.zeros(2)}, tmp_path / WEIGHTS)
    with pytest.raises(ModelError):
        load_adapter(tmp_path, model)
    assert not (tmp_path / "adapter_model.bin").exists()


def test_numbers_of_a_configuration_stay_within_those_of_toml():
    with pytest.raises(ConfigError):
        parse_config({"federation": {"seed": 2**64}})
