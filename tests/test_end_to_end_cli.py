"""The command, end to end: one JSON object per verb, a clear sentence and the right exit code for every bad input."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
import warnings
from contextlib import closing
from pathlib import Path

import pytest
from tiny_runs import asked, small

from fedmezo.studies.run import run as run_study

with warnings.catch_warnings():
    # typer 0.20 still imports names that click 8.5 calls deprecated; neither is ours to mend.
    warnings.simplefilter("ignore", DeprecationWarning)
    from fedmezo.cli import main


@pytest.fixture(scope="module")
def settings(data) -> list[str]:
    """The small run as --set options."""
    pairs = [f"{name}.{key}={json.dumps(value)}" for name, part in asked(data).items() for key, value in part.items()]
    return [word for pair in pairs for word in ("--set", pair)]


@pytest.fixture(scope="module")
def toml(data, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "small.toml"
    path.write_text(small(data).to_toml())
    return path


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> Path:
    """A finished run; for reading only."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    run_study(small(data), out=folder)
    return folder


def one_object(capfd) -> dict:
    out = capfd.readouterr().out
    assert out.endswith("\n")
    assert out.count("\n") == 1
    return json.loads(out)


def sentence(capfd) -> str:
    """The one line on standard error that tells what was wrong; standard output is empty."""
    out, err = capfd.readouterr()
    assert out == ""
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    assert "Unexpected" not in err
    return lines[0]


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# One object on standard output


def test_every_verb_prints_one_json_object(toml, tmp_path, capfd, monkeypatch):
    folder = str(tmp_path / "r")

    def told(*words) -> dict:
        assert main([*words, "--json"]) == 0
        return one_object(capfd)

    ran = told("run", str(toml), "--out", folder)
    assert (ran["run_dir"], ran["rounds"]) == (folder, 4)
    assert {"loss", "tokens", "examples"} <= set(told("eval", folder, "--round", "2"))
    verified = told("verify", folder)
    assert len(verified.pop("seal")) == 64
    assert verified == {"ok": True, "digest": ran["digest"], "rounds": 4, "compared": 2, "run_dir": folder}
    assert Path(told("export", folder)["path"]).is_dir()
    assert Path(told("export", folder, "--to", "merged", "--round", "1")["path"]).name == "merged-round-1"
    assert told("rollback", folder, "--round", "2")["rounds"] == 2
    assert told("resume", folder)["digest"] == ran["digest"]
    assert Path(told("report", folder)["path"]).is_file()
    assert {"forwards", "tokens", "bytes", "memory_mb", "seconds", "advice"} <= set(told("plan", str(toml)))
    assert told("config", "show", str(toml))["federation"]["rounds"] == 4
    assert told("config", "schema")["title"] == "fedmezo configuration"
    assert told("config", "init", str(tmp_path / "new.toml"))["path"] == str(tmp_path / "new.toml")
    monkeypatch.setattr("fedmezo.models.fetch.fetch", lambda name, **_: tmp_path / name)
    assert told("fetch", "smollm2-135m")["name"] == "smollm2-135m"


def test_an_error_is_one_json_object_too(tmp_path, capfd):
    assert main(["verify", str(tmp_path), "--json"]) == 2
    assert one_object(capfd)["error"]["type"] == "ConfigError"


def test_a_summary_for_people_tells_the_losses_and_what_to_do_next(toml, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["run", str(toml), "--out", str(tmp_path / "r")]) == 0
    out, err = capfd.readouterr()
    assert "fedmezo eval " in out
    assert "loss" in out
    assert "examples" not in out
    assert "category/" not in err
    assert "round 4/4  eval: loss" in err


# Bad input


BAD = [
    (["federation.roundz=3"], "rounds"),
    (["federation.rounds=many"], "federation.rounds"),
    (["algorithm.rate=0"], "algorithm.rate"),
    (["algorithm.rate=-1e-3"], "algorithm.rate"),
    (["federation.clients=500"], "Cannot give 500 clients a record each from 52"),
    (["federation.clients=5", "split.kind=meta"], "use at most 4 clients"),
    (["split.kind=lda", "split.alpha=1e-9", "federation.clients=30"], "raise alpha"),
    (["split.kind=meta", "split.field=colour"], "split.field"),
    (["data.path=nowhere.jsonl"], "nowhere.jsonl"),
    (["data.path=$FEDMEZO_NOT_SET/x.jsonl"], "set the environment variable FEDMEZO_NOT_SET"),
    (['data.columns={output="kolour"}'], "no column 'kolour'"),
    (["model.name=builtin:tinny"], "builtin:tiny"),
    (["model.name=./nowhere"], "There is no model folder"),
    (["data.max_tokens=2"], "None of the 60 records can be used"),
    (["data.template=chat"], "no chat template"),
    (["adapter.targets=['nonsense']"], "nonsense"),
    (["eval.per_client=true", "data.eval_examples='auto'", "data.eval_path=other.jsonl"], "data.eval_path"),
]


@pytest.mark.parametrize(("changes", "told"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_bad_settings_are_refused_before_anything_is_written(settings, tmp_path, capfd, monkeypatch, changes, told):
    monkeypatch.delenv("FEDMEZO_NOT_SET", raising=False)
    monkeypatch.chdir(tmp_path)
    words = [word for change in changes for word in ("--set", change)]
    assert main(["run", *settings, *words, "--out", "r", "--quiet"]) == 2
    assert told in sentence(capfd)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("--rounds", "--set federation.rounds=VALUE"),
        ("--lr", "--set algorithm.rate=VALUE"),
        ("--seed", "--set data.seed=VALUE or --set federation.seed=VALUE"),
        ("--nonsense", "See `fedmezo run --help`"),
    ],
)
def test_a_key_given_as_an_option_is_told_as_a_key(capfd, option, told):
    assert main(["run", option, "5"]) == 2
    assert told in sentence(capfd)


def test_one_guess_is_made_for_a_mistyped_verb(capfd):
    assert main(["rum"]) == 2
    assert sentence(capfd).lower().count("did you mean") == 1


@pytest.mark.parametrize("bad", ["", "{", "[]", "\0\1\2", '{"instruction": "a"}\n'])
def test_a_data_file_that_holds_no_records_is_refused(settings, tmp_path, capfd, bad):
    path = tmp_path / "bad.jsonl"
    path.write_text(bad)
    assert main(["run", *settings, "--set", f"data.path={path}", "--out", str(tmp_path / "r"), "--quiet"]) == 2
    assert "bad.jsonl" in sentence(capfd)


def test_a_run_never_goes_over_another(toml, finished, capfd):
    before = content(finished)
    assert main(["run", str(toml), "--out", str(finished)]) == 2
    assert f"fedmezo resume {finished}" in sentence(capfd)
    assert content(finished) == before


@pytest.mark.parametrize("verb", ["resume", "verify", "export", "eval", "report"])
def test_a_folder_that_is_no_run_is_refused(tmp_path, capfd, verb):
    assert main([verb, str(tmp_path)]) == 2
    assert "journal.sqlite" in sentence(capfd)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["a file/r", "a file"])
def test_a_run_cannot_go_where_a_file_is(toml, tmp_path, capfd, where):
    (tmp_path / "a file").write_text("precious")
    assert main(["run", str(toml), "--out", str(tmp_path / where), "--quiet"]) == 2
    assert "is a file, not a folder" in sentence(capfd)
    assert (tmp_path / "a file").read_text() == "precious"


def test_a_run_cannot_go_where_the_system_lets_nobody_write(toml, capfd):
    assert main(["run", str(toml), "--out", "/proc/fedmezo", "--quiet"]) == 2
    assert "/proc/fedmezo" in sentence(capfd)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_run_cannot_go_into_a_read_only_folder(toml, tmp_path, capfd):
    tmp_path.chmod(0o500)
    assert main(["run", str(toml), "--out", str(tmp_path / "r"), "--quiet"]) == 2
    assert "may not be written" in sentence(capfd)


@pytest.mark.parametrize("verb", ["resume", "verify", "export", "eval", "report"])
def test_a_foreign_journal_is_refused_and_left_alone(tmp_path, capfd, verb):
    with closing(sqlite3.connect(tmp_path / "journal.sqlite")) as db:
        db.execute("CREATE TABLE bookmarks (url TEXT)")
        db.commit()
    before = content(tmp_path)
    assert main([verb, str(tmp_path)]) == 1
    assert "another kind" in sentence(capfd)
    assert {name: data for name, data in content(tmp_path).items() if not name.endswith(".lock")} == before


@pytest.mark.parametrize("verb", ["resume", "verify", "export", "eval", "report"])
@pytest.mark.parametrize("kept", [0, 100, 9000])
def test_a_damaged_journal_is_told(finished, tmp_path, capfd, verb, kept):
    whole = (finished / "journal.sqlite").read_bytes()
    (tmp_path / "journal.sqlite").write_bytes(whole[:kept])
    assert main([verb, str(tmp_path)]) == 1
    assert "journal.sqlite" in sentence(capfd)


def test_verify_of_a_flipped_bit_fails_and_names_the_round(finished, tmp_path, capfd):
    content = bytearray((finished / "journal.sqlite").read_bytes())
    with closing(sqlite3.connect(finished / "journal.sqlite")) as db:
        reply = db.execute("SELECT reply FROM replies WHERE round = 3 AND client = 0").fetchone()[0]
    content[content.index(reply) + 20] ^= 4
    (tmp_path / "journal.sqlite").write_bytes(content)
    assert main(["verify", str(tmp_path)]) == 1
    assert "round 3 is damaged" in sentence(capfd)


# Killed, crowded, out of space


def command(*words: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "fedmezo", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def rounds_in(journal: Path) -> int:
    try:
        with closing(sqlite3.connect(f"file:{journal}?mode=ro", uri=True)) as db:
            return db.execute("SELECT COUNT(*) FROM rounds").fetchone()[0]
    except sqlite3.Error:
        return 0


def test_a_killed_run_resumes_to_the_same_bits_and_lets_nobody_else_write_meanwhile(data, toml, tmp_path, capfd):
    rounds, folder = 150, tmp_path / "r"
    process = command("run", toml, "--set", f"federation.rounds={rounds}", "--out", folder, "--quiet")
    try:
        deadline = time.monotonic() + 240
        while rounds_in(folder / "journal.sqlite") < 2 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGSTOP)
        assert main(["resume", str(folder), "--quiet"]) == 1
        assert "another process is writing it" in sentence(capfd)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert 2 <= rounds_in(folder / "journal.sqlite") < rounds
    assert main(["resume", str(folder), "--quiet", "--json"]) == 0
    whole = run_study(small(data, federation={"rounds": rounds}), out=tmp_path / "whole")
    assert one_object(capfd)["digest"] == whole.digest


# The limit on a file's size stands for a full disk; it comes after a first run, when all that is compiled is compiled.
CROWDED = """
import resource, sys
from fedmezo.cli import main
toml, first, second = sys.argv[1:]
assert main(["run", toml, "--out", first, "--quiet", "--set", "federation.rounds=1"]) == 0
resource.setrlimit(resource.RLIMIT_FSIZE, (120_000, 120_000))
sys.exit(main(["run", toml, "--out", second, "--quiet", "--set", "federation.rounds=30", *EXTRA]))
"""


@pytest.mark.parametrize("extra", [[], ["--set", "output.tensorboard=true"]], ids=["journal", "tensorboard"])
def test_a_full_disk_loses_no_round(data, toml, tmp_path, capfd, extra):
    script = CROWDED.replace("EXTRA", repr(extra))
    words = [sys.executable, "-c", script, str(toml), str(tmp_path / "first"), str(tmp_path / "r")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 1, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "cannot be written" in errors[0]
    assert "are safe" in errors[0]
    assert f"fedmezo resume {tmp_path / 'r'}" in errors[0]
    assert 0 < rounds_in(tmp_path / "r" / "journal.sqlite") < 30
    assert main(["resume", str(tmp_path / "r"), "--quiet", "--json"]) == 0
    whole = run_study(small(data, federation={"rounds": 30}), out=tmp_path / "whole")
    assert one_object(capfd)["digest"] == whole.digest
