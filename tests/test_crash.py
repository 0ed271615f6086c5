"""What a fault cannot do: lose a round, mix old and new, or change one bit of a folder unnoticed."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_runtime_journal import HEADER, a_journal, a_round, content
from tiny_runs import StopAfter, StopError, small

from fedmezo.cli import main
from fedmezo.errors import ConfigError, JournalError, RunError, SealError
from fedmezo.models.bench import ModelBench
from fedmezo.runtime.journal import Journal
from fedmezo.runtime.sqlitefile import head_of
from fedmezo.studies import folder as folder_module
from fedmezo.studies.folder import write_whole
from fedmezo.studies.run import evaluate, export, resume, rollback, run, verify
from fedmezo.studies.seal import MANIFEST, broken, check, renew, seal, seal_of, unseal

ROOT = Path(__file__).resolve().parent.parent


def flipped(data: bytes, at: int, bit: int = 0) -> bytes:
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


# --- the seal ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sealed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sealed")
    (folder / "a.bin").write_bytes(bytes(range(256)))
    (folder / "b.txt").write_text("b")
    (folder / "empty").write_bytes(b"")
    seal(folder, kind="adapter", about={"digest": "d"})
    return folder


def test_a_sealed_folder_is_what_its_manifest_says(sealed):
    known = check(sealed)
    assert known == seal_of(sealed)
    assert (known.kind, known.about) == ("adapter", {"digest": "d"})
    assert {name: size for name, (size, _) in known.files.items()} == {"a.bin": 256, "b.txt": 1, "empty": 0}
    assert json.loads((sealed / MANIFEST).read_text())["seal"] == known.seal


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(["a.bin", "b.txt"]), at=st.integers(0, 255), bit=st.integers(0, 7))
def test_one_flipped_bit_of_any_file_is_found_and_named(sealed, name, at, bit):
    whole = (sealed / name).read_bytes()
    (sealed / name).write_bytes(flipped(whole, at % len(whole), bit))
    try:
        assert broken(sealed) == [name]
        with pytest.raises(SealError, match=f"{name} is not what it was when the folder was sealed"):
            check(sealed)
    finally:
        (sealed / name).write_bytes(whole)
    assert check(sealed)


def test_one_flipped_bit_of_any_byte_of_the_manifest_is_found(sealed):
    path, draw = sealed / MANIFEST, random.Random(3)
    whole = path.read_bytes()
    try:
        for at in range(len(whole)):
            path.write_bytes(flipped(whole, at, draw.randrange(8)))
            with pytest.raises(SealError):
                check(sealed)
    finally:
        path.write_bytes(whole)
    assert check(sealed)


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"files": 3}', "[" * 100_000, " " * ((1 << 24) + 1)])
def test_a_manifest_that_is_none_seals_nothing(tmp_path, text):
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(SealError, match="is damaged, so it seals nothing"):
        check(tmp_path)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../b"])
def test_a_manifest_never_leads_out_of_its_folder(tmp_path, name):
    from fedmezo.studies.seal import _spelt

    (tmp_path / MANIFEST).write_text(_spelt("adapter", {name: (1, "0" * 64)}, {})[0])
    with pytest.raises(SealError, match="is damaged"):
        check(tmp_path)


def test_links_are_not_followed(tmp_path):
    (tmp_path / "out").write_text("secret")
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a").write_text("a")
    seal(folder, kind="adapter")
    (folder / "a").unlink()
    (folder / "a").symlink_to(tmp_path / "out")
    assert broken(folder) == ["a"]
    seal(folder, kind="adapter")
    assert seal_of(folder).files == {}


def test_a_lost_file_is_found_unless_a_part_is_asked_for(sealed, tmp_path):
    folder = Path(shutil.copytree(sealed, tmp_path / "copy"))
    (folder / "empty").unlink()
    with pytest.raises(SealError, match="empty is not what it was"):
        check(folder)
    assert check(folder, in_part=True) == seal_of(sealed)
    unseal(folder)
    assert check(folder) is None and broken(folder) == []


def test_a_folder_that_somebody_seals_anew_meanwhile_is_no_damaged_one(sealed, tmp_path, monkeypatch):
    from fedmezo.studies import seal as module

    folder, real = Path(shutil.copytree(sealed, tmp_path / "copy")), module._same

    def late(*given):
        if "new" not in (folder / "b.txt").read_text():
            unseal(folder)
            (folder / "b.txt").write_text("new")
            seal(folder, kind="adapter")
            return False
        return real(*given)

    monkeypatch.setattr(module, "_same", late)
    assert module.sound(folder, "b.txt")
    (folder / "b.txt").write_text("b")
    seal(folder, kind="adapter")
    assert check(folder) == seal_of(folder)
    monkeypatch.setattr(module, "_same", lambda *_: False)
    assert not module.sound(folder, "b.txt")


def test_a_file_that_is_written_anew_is_sealed_anew_and_no_other(sealed, tmp_path):
    folder = Path(shutil.copytree(sealed, tmp_path / "copy"))
    (folder / "a.bin").write_text("new")
    (folder / "b.txt").write_text("damaged")
    renew(folder, "a.bin")
    assert broken(folder) == ["b.txt"]
    renew(tmp_path, "a.bin")
    assert not (tmp_path / MANIFEST).exists()


def test_a_text_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    write_whole(tmp_path / "a", "old")

    def dies(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(folder_module.os, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"


# --- the journal's head -----------------------------------------------------------------------------------------------


def killed_journal(folder):
    """Returns the path of a journal whose writer was killed, so that its newest rounds are in SQLite's log."""
    path = a_journal(folder, rounds=2)
    child = os.fork()
    if not child:
        journal = Journal.open(path)
        for number in range(2, 6):
            journal.append(a_round(number))
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert Path(f"{path}-wal").stat().st_size > 4096
    return path


def lay(path, whole, **changed):
    for suffix, data in {**whole, **changed}.items():
        Path(f"{path}{suffix.replace('_', '-')}").write_bytes(data)


def parts_of(path):
    return {suffix: Path(f"{path}{suffix.replace('_', '-')}").read_bytes() for suffix in ("", "_wal", ".lock")}


def test_a_killed_writers_rounds_are_there(tmp_path):
    path = killed_journal(tmp_path)
    with Journal.open(path, readonly=True) as journal:
        journal.verify_chain()
        assert repr([done.entries for done in journal.rounds()]) == repr([a_round(n).entries for n in range(6)])


@pytest.mark.parametrize("at", [0, 9, 17, 30, 24 + 32 + 700])
def test_rounds_that_a_damaged_log_takes_with_it_are_missed(tmp_path, at):
    path = killed_journal(tmp_path)
    log = Path(f"{path}-wal")
    log.write_bytes(flipped(log.read_bytes(), at))
    sentence = r"the 2 rounds in it are sound, but its 4 newest records are gone; .*fedmezo rollback .* --round 2`"
    for check_it in (Journal.verify_chain, Journal.check_head):
        with Journal.open(path, readonly=True) as journal, pytest.raises(JournalError, match=sentence):
            check_it(journal)
    with Journal.open(path) as journal:
        journal.rollback(2, "damage")
        journal.verify_chain()
        journal.append(a_round(2))
    with Journal.open(path, readonly=True) as journal:
        journal.verify_chain()


def test_any_flipped_bit_of_a_killed_run_is_found_or_changes_no_round(tmp_path):
    path, draw, counts = killed_journal(tmp_path), random.Random(5), {"found": 0, "harmless": 0}
    whole = parts_of(path)
    with Journal.open(path, readonly=True) as journal:
        journal.verify_chain()
    truth = content(path)
    for number in range(400):
        suffix = ("", "_wal", ".lock")[number % 3]
        for stale in tmp_path.glob("journal.sqlite-*"):
            stale.unlink()
        lay(path, whole, **{suffix: flipped(whole[suffix], draw.randrange(len(whole[suffix])), draw.randrange(8))})
        try:
            with Journal.open(path, readonly=True) as journal:
                journal.verify_chain()
            assert content(path) == truth
            counts["harmless"] += 1
        except JournalError:
            counts["found"] += 1
    assert counts["found"] > 150


def test_the_head_follows_the_journal_and_never_runs_ahead(tmp_path):
    path = a_journal(tmp_path, rounds=3)
    with Journal.open(path) as journal:
        for number, kept in ((3, 3), (1, 1)):
            journal.append(a_round(3)) if number == 3 else None
            journal.rollback(kept, "test")
            assert head_of(path).links == journal._ledger.length()
            journal.verify_chain()


def test_a_way_back_is_one_transaction_with_all_that_follows_from_it(tmp_path):
    path = a_journal(tmp_path)
    with Journal.open(path) as journal:
        journal.rollback(2, "surge", slowed=0.125, look="{}")
        assert journal.slowed() == 0.125
        assert [kind for _, kind, _ in journal.events()[-3:]] == ["rollback", "slow", "look"]
        assert len(journal._ledger.query("SELECT DISTINCT link FROM events WHERE round = 2")) == 1
        journal.add_event(2, "slow", "0.5")
        journal.append(a_round(2))
        journal.rollback(2, "surge", slowed=0.03125)
        assert journal.slowed() == 0.03125


def test_the_evaluations_of_the_untrained_model_are_written_together_or_not_at_all(tmp_path):
    with Journal.create(tmp_path / "journal.sqlite", HEADER) as journal:
        with pytest.raises(JournalError, match="has no metric"):
            journal.record_evaluations(-1, {"eval": {"loss": 2.0}, "client-0": {}})
        assert journal.evaluations() == []
        journal.record_evaluations(-1, {"eval": {"loss": 2.0}, "client-0": {"loss": 3.0}})
        assert len(journal.evaluations()) == 2
        journal.record_evaluations(-1, {})
        assert journal._ledger.length() == 2


def test_a_new_journal_forgets_the_head_of_a_removed_one(tmp_path):
    path = a_journal(tmp_path)
    path.unlink()
    with Journal.create(path, HEADER) as journal:
        journal.verify_chain()
        assert head_of(path).links == 1


def test_a_journal_without_a_head_is_read_as_before(tmp_path):
    path = a_journal(tmp_path)
    for lock in (b"", None):
        Path(f"{path}.lock").unlink() if lock is None else Path(f"{path}.lock").write_bytes(lock)
        with Journal.open(path, readonly=True) as journal:
            journal.verify_chain()


def test_to_open_and_close_a_journal_changes_no_bit_of_it(tmp_path):
    path = a_journal(tmp_path)
    before = path.read_bytes()
    for readonly in (True, False):
        Journal.open(path, readonly=readonly).close()
        assert path.read_bytes() == before


def test_a_settled_journal_stays_as_it_is_whoever_still_reads_it(tmp_path):
    path = a_journal(tmp_path)
    with Journal.open(path, readonly=True) as reader:
        with Journal.open(path) as journal:
            journal.append(a_round(4))
            assert journal.settle()
            before = path.read_bytes()
        assert reader.last == 5
    assert path.read_bytes() == before


# --- runs -------------------------------------------------------------------------------------------------------------


def config_of(data, **sections):
    plain = {"guard": {"batches": 0}, "algorithm": {"rate": 2e-3, "mu": 1e-3}, "output": {"export": True}}
    return small(data, **{name: plain.get(name, {}) | sections.get(name, {}) for name in {**plain, **sections}})


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "finished"
    return folder, run(config_of(data), out=folder)


@pytest.fixture
def own(finished, tmp_path):
    return Path(shutil.copytree(finished[0], tmp_path / "own"))


def test_verify_finds_a_flipped_bit_where_the_chain_has_nothing(own):
    path = own / "journal.sqlite"
    whole = path.read_bytes()
    slack = max(at for at in range(len(whole) - 64) if not any(whole[at : at + 64]))
    path.write_bytes(flipped(whole, slack + 32))
    with Journal.open(path, readonly=True) as journal:
        journal.verify_chain()
    with pytest.raises(SealError, match=r"journal.sqlite is not what it was"):
        verify(own)
    with pytest.raises(JournalError, match=r"journal.sqlite is damaged: it is not what it was when it was sealed"):
        resume(own, rounds=9)
    assert (own / MANIFEST).exists()


@pytest.mark.parametrize("name", ["summary.json", "config.toml", "start.json", "adapter/adapter_model.safetensors"])
def test_verify_finds_a_flipped_bit_beside_the_journal(own, name, capfd):
    whole = (own / name).read_bytes()
    (own / name).write_bytes(flipped(whole, len(whole) // 2))
    assert main(["verify", str(own)]) == 1
    assert f"{name} is not what it was when the folder was sealed" in capfd.readouterr().err


def test_an_adapter_is_sealed_and_refused_when_a_bit_of_it_has_changed(own, finished, capfd):
    adapter = own / "adapter"
    told = verify(adapter)
    assert (told["ok"], told["kind"], told["digest"]) == (True, "adapter", finished[1].digest)
    assert evaluate(adapter)["loss"] == finished[1].eval["end"]["loss"]
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(flipped(weights.read_bytes(), weights.stat().st_size - 3))
    assert main(["verify", str(adapter)]) == 1
    assert "adapter_model.safetensors is not what it was" in capfd.readouterr().err
    with pytest.raises(SealError, match=r"adapter_model.safetensors is not what it was"):
        evaluate(adapter)
    (adapter / MANIFEST).unlink()
    with pytest.raises(ConfigError, match="has no seal"):
        verify(adapter)


@pytest.mark.parametrize("to", ["peft", "merged"])
def test_what_is_exported_is_sealed(own, to):
    told = verify(export(own, to=to, round=2))
    assert told["kind"] == {"peft": "adapter", "merged": "model"}[to]
    assert verify(own)["seal"]


def test_a_run_is_sealed_when_a_verb_ended_well_and_only_then(data, tmp_path, finished):
    folder = tmp_path / "r"
    with pytest.raises(StopError):
        run(config_of(data), out=folder, watch=StopAfter(1))
    assert verify(folder)["seal"] is None
    rollback(folder, round=1)
    assert verify(folder)["seal"]
    with pytest.raises(StopError):
        resume(folder, watch=StopAfter(2))
    assert verify(folder)["seal"] is None
    assert resume(folder).digest == finished[1].digest
    assert verify(folder)["seal"]


def test_a_refused_resume_leaves_the_seal(own):
    (own / "data.sha256").write_text("other\n")
    with pytest.raises(JournalError, match="data has changed"):
        resume(own, rounds=9)
    assert (own / MANIFEST).exists()


def test_a_report_that_is_written_again_is_sealed_again(own):
    pytest.importorskip("plotly")
    (own / "summary.json").touch()
    assert main(["report", str(own)]) == 0
    assert "report.html" in seal_of(own).files
    assert verify(own)["seal"]


def test_a_folder_that_may_not_be_entered_is_told_of_in_a_sentence(data, tmp_path):
    if os.geteuid():
        pytest.skip("only root can become another user")
    shut = tmp_path / "shut"
    shut.mkdir(mode=0o700)
    for path in (tmp_path, *tmp_path.parents[:2]):
        path.chmod(0o755)
    os.seteuid(65534)
    try:
        with pytest.raises(ConfigError, match="cannot be written"):
            run(config_of(data), out=shut / "r")
        for verb in (resume, export, evaluate):
            with pytest.raises((ConfigError, JournalError), match=r"cannot be read|is damaged|cannot be"):
                verb(shut / "r")
    finally:
        os.seteuid(0)


def test_what_a_kill_kept_from_being_written_is_written_by_resume(data, tmp_path, finished):
    folder = tmp_path / "r"
    with pytest.raises(StopError):
        run(config_of(data), out=folder, watch=StopAfter(-1))
    names = ("config.toml", "data.sha256", "start.json")
    for name in names:
        (folder / name).unlink()
    resume(folder)
    assert [(folder / name).read_bytes() for name in names] == [(finished[0] / name).read_bytes() for name in names]


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")]
)
def test_no_memory_in_a_walk_is_told_in_a_sentence_and_loses_no_round(data, tmp_path, finished, monkeypatch, error):
    real, calls = ModelBench.losses, []

    def losses(self, points):
        calls.append(points)
        if len(calls) == 4:
            raise error
        return real(self, points)

    with monkeypatch.context() as patch:
        patch.setattr(ModelBench, "losses", losses)
        with pytest.raises(RunError, match=r"not enough memory for a round; .*fedmezo resume"):
            run(config_of(data), out=tmp_path / "r")
    assert verify(tmp_path / "r")["rounds"] > 0
    assert resume(tmp_path / "r").digest == finished[1].digest


def trials(out, *words):
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    command = [sys.executable, ROOT / "scripts" / "crash.py", "--out", out, *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_faults_of_every_kind_lose_nothing(tmp_path):
    rows = trials(tmp_path / "rows.jsonl", "--part", "boundary,random,disk,place,clock,crowd,kept", "--every", 23)
    assert len(rows) > 40
    assert {row["part"] for row in rows} == {"boundary", "random", "disk", "place", "clock", "crowd", "kept"}
    assert sum(row.get("died", False) for row in rows) > 15
    assert [row for row in rows if not row["equal"] or row["lost"] or row.get("bug")] == []


def test_a_writer_killed_at_any_write_leaves_what_it_kept_or_what_it_was_writing(tmp_path):
    rows = trials(tmp_path / "rows.jsonl", "--part", "kept")
    assert sum(row["died"] for row in rows) >= 4
    assert all(row["equal"] for row in rows)
