"""The command: exit codes, one JSON object on standard output, sentences on standard error, and quick answers."""

import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import fedmezo
from fedmezo.errors import ConfigError, JournalError, RunError
from fedmezo.studies import config as config_module
from fedmezo.studies.screen import Screen

with warnings.catch_warnings():
    # typer 0.20 still imports names that click 8.5 calls deprecated; neither is ours to mend.
    warnings.simplefilter("ignore", DeprecationWarning)
    from fedmezo.cli import main

VERBS = [
    "run",
    "resume",
    "compare",
    "eval",
    "ask",
    "export",
    "verify",
    "rollback",
    "report",
    "watch",
    "doctor",
    "plan",
    "fetch",
    "server",
    "client",
    "submit",
    "certs",
    "flower",
    "config",
    "bench",
    "analyze",
]
DIGEST = "ab" * 32


def report(number: int = 0, *, rounds: int = 2, **changed) -> SimpleNamespace:
    values = {
        "round": number,
        "rounds": rounds,
        "loss": 2.5,
        "rate": 4e-4,
        "clip": 0.0,
        "bytes_up": 100,
        "bytes_down": 200,
        "seconds": 0.5,
        "forwards": 60,
        "tokens": 600,
        "skipped": 0,
        "evaluations": {},
        "events": (),
        "epsilon": None,
        "clients": {},
    }
    return SimpleNamespace(**(values | changed))


def summary(folder) -> dict:
    return {
        "run_dir": str(folder),
        "rounds": 2,
        "clients": 3,
        "dim": 460800,
        "mu": 1e-3,
        "rate": 4.4e-4,
        "eval": {"start": {"loss": 2.6, "accuracy": math.nan}, "end": {"loss": 1.25, "accuracy": 0.5}},
        "bytes": {"up_per_client_round": 148, "down_per_client_round": 520, "up_total": 888, "down_total": 3120},
        "forwards": 360,
        "tokens": 3600,
        "seconds": 1.5,
        "peak_rss_mb": 900.0,
        "skipped_steps": 1,
        "digest": DIGEST,
    }


class FakeStudy(ModuleType):
    """Stands for studies.run and studies.plan: remembers its calls, prints where it must not, answers or raises."""

    def __init__(self) -> None:
        super().__init__("fake")
        self.calls: list[tuple[str, tuple, dict]] = []
        self.error: BaseException | None = None
        self.ok = True

    def _called(self, name, *args, **kwargs):
        self.calls.append((name, args, kwargs))
        sys.stdout.write("noise from a library\n")
        os.write(1, b"noise from a child process\n")
        if self.error is not None:
            raise self.error

    def _watched(self, name, folder, watch, *args, **kwargs):
        watch.start(
            {"run_dir": str(folder), "dim": 460800, "clients": 3, "rounds": 2, "sizes": {0: 5, 1: 7}, "done": 0}
        )
        watch.round(report(0, evaluations={"eval": {"loss": 2.5, "accuracy": 0.25}}))
        watch.round(report(1, clip=3.0, events=(("surge", "training loss surged to 9"),)))
        self._called(name, *args, **kwargs)
        watch.finish(summary(folder))
        return SimpleNamespace(as_dict=lambda: summary(folder))

    def run(self, config, *, out, watch):
        return self._watched("run", out, watch, config, out=out)

    def resume(self, folder, *, rounds, workers, watch):
        return self._watched("resume", folder, watch, folder, rounds=rounds, workers=workers)

    def evaluate(self, target, **kwargs):
        self._called("evaluate", target, **kwargs)
        return {"target": str(target), "loss": 1.5, "tokens": 100, "examples": 20, "rouge_l": math.nan}

    def export(self, folder, **kwargs):
        self._called("export", folder, **kwargs)
        return Path(folder) / "merged"

    def verify(self, folder):
        self._called("verify", folder)
        return {"ok": self.ok, "digest": DIGEST, "rounds": 2}

    def rollback(self, folder, **kwargs):
        self._called("rollback", folder, **kwargs)
        return {"run_dir": str(folder), "rounds": 1, "backup": "old.sqlite"}

    def plan(self, config):
        self._called("plan", config)
        advice = ["rate 9 is too high [really]"]
        return {
            "forwards": 360,
            "bytes": {"up_total": 888},
            "memory_mb": {"weights": 540},
            "seconds": 1.5,
            "advice": advice,
        }


@pytest.fixture
def study(monkeypatch, tmp_path) -> FakeStudy:
    fake = FakeStudy()
    for name in ("run", "plan", "report"):
        monkeypatch.setitem(sys.modules, f"fedmezo.studies.{name}", fake)
        monkeypatch.setattr(fedmezo.studies, name, fake, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEDMEZO_DEBUG", raising=False)
    return fake


def stdout_object(capfd) -> tuple[dict, str]:
    """Returns the one object on standard output, read by strict JSON, and what standard error holds."""
    out, err = capfd.readouterr()
    assert out.count("\n") == 1

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(out, parse_constant=refuse), err


@pytest.mark.parametrize(
    "arguments",
    [
        ["run"],
        ["run", "--quiet"],
        ["resume", "d"],
        ["eval", "d"],
        ["export", "d", "--to", "merged"],
        ["verify", "d"],
        ["rollback", "d", "--round", "1"],
        ["plan"],
        ["config", "show"],
        ["config", "schema"],
        ["config", "init"],
    ],
    ids=" ".join,
)
def test_json_is_one_object_whatever_else_prints(study, capfd, arguments):
    assert main([*arguments, "--json"]) == 0
    found, err = stdout_object(capfd)
    assert found
    assert len(study.calls) == err.count("noise from a library") == err.count("noise from a child process")


def test_the_summary_goes_out_as_it_is_and_what_is_not_finite_becomes_null(study, capfd):
    assert main(["run", "--json", "--out", "here"]) == 0
    found, _ = stdout_object(capfd)
    wanted = summary("here")
    wanted["eval"]["start"]["accuracy"] = None
    assert found == wanted


def test_numbers_of_numpy_and_paths_become_plain(study, capfd, monkeypatch):
    import numpy as np

    monkeypatch.setattr(
        study, "verify", lambda folder: {"ok": True, "x": np.float32(0.5), "n": np.int64(3), "at": folder}
    )
    assert main(["verify", "d", "--json"]) == 0
    assert stdout_object(capfd)[0] == {"ok": True, "x": 0.5, "n": 3, "at": "d"}


def test_run_shows_progress_on_standard_error_and_the_result_on_standard_output(study, capfd):
    assert main(["run", "--out", "a folder"]) == 0
    out, err = capfd.readouterr()
    assert "round 1/2  eval: loss 2.500, accuracy 0.2500" in err
    assert "surge: training loss surged to 9" in err
    assert "5 to 7 training examples per client" in err
    assert "2.600" in out and "1.250" in out and "148 B up" in out
    assert "fedmezo resume 'a folder' --rounds 4" in out
    assert "round 1/2" not in out and "noise" not in out


def test_quiet_leaves_only_the_result(study, capfd):
    assert main(["run", "--quiet"]) == 0
    out, err = capfd.readouterr()
    assert "1.250" in out
    assert "round" not in err and "examples" not in err


def test_a_terminal_of_80_columns_holds_every_progress_line(monkeypatch, capfd):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    with Screen() as watch:
        watch.start({"dim": 460800, "clients": 3, "rounds": 500, "rate": 4.42e-4, "mu": 1e-3})
        watch.round(report(498, rounds=500, clip=3.14159, bytes_up=123_456_789, rate=4.4194e-5))
        watch._bar.refresh()
        line = max((line for line in capfd.readouterr().err.split("\r") if "499/500" in line), key=len)
    for part in ("loss 2.500", "rate 4.42e-05", "clip 3.14", "123 MB", "120/s", "0:0"):
        assert part in line


def test_a_round_before_the_first_one_seen_is_shown_too(capfd):
    """A run that is gone on with may go back to before the round it went on at."""
    with Screen() as watch:
        watch.start({"done": 8, "rounds": 20})
        watch.round(report(8, rounds=20))
        watch.round(report(7, rounds=20))
    assert "round 8/20" in capfd.readouterr().err


def test_folders_are_named_after_the_configuration(study):
    Path("mine.toml").write_text("[federation]\nclients = 2\n")
    assert main(["run", "mine.toml", "--json"]) == 0
    assert main(["run", "--json"]) == 0
    assert main(["run", "--set", "output.dir=there", "--json"]) == 0
    assert main(["run", "--set", "output.dir=there", "--out", "here", "--json"]) == 0
    folders = [call[2]["out"] for call in study.calls]
    assert folders[0].parent == Path("runs") and folders[0].name.startswith("mine-")
    assert folders[1].name.startswith("skills-")
    assert folders[2:] == [Path("there"), Path("here")]


def test_the_configuration_and_the_changes_arrive(study):
    Path("mine.toml").write_text("[federation]\nclients = 2\n")
    assert main(["run", "mine.toml", "--set", "federation.rounds=7", "--set", "algorithm.lr=0.5", "--json"]) == 0
    assert main(["plan", "mine.toml", "--json"]) == 0
    (_, (config,), _), (_, (planned,), _) = study.calls
    assert (config.federation.clients, config.federation.rounds, config.algorithm.rate) == (2, 7, 0.5)
    assert planned.federation.clients == 2


def test_every_option_reaches_its_verb(study):
    Path("c.toml").write_text("")
    calls = [
        (["resume", "d", "--rounds", "9"], ("resume", (Path("d"),), {"rounds": 9, "workers": None})),
        (["resume", "d", "--workers", "2"], ("resume", (Path("d"),), {"rounds": None, "workers": 2})),
        (["eval", "d", "--round", "3", "--examples", "5"], ("evaluate", (Path("d"),), {"round": 3, "examples": 5})),
        (
            ["eval", "d", "--metric", "rouge_l"],
            ("evaluate", (Path("d"),), {"round": None, "examples": None, "metrics": ["rouge_l"]}),
        ),
        (["rollback", "d", "--round", "3"], ("rollback", (Path("d"),), {"round": 3})),
        (
            ["export", "d", "--to", "merged", "--round", "3", "--out", "o"],
            ("export", (Path("d"),), {"to": "merged", "round": 3, "out": Path("o")}),
        ),
        (
            ["eval", "a", "--config", "c.toml"],
            ("evaluate", (Path("a"),), {"round": None, "examples": None, "config": config_module.load_config()}),
        ),
    ]
    for arguments, _ in calls:
        assert main([*arguments, "--json"]) == 0
    assert study.calls == [call for _, call in calls]


def test_report_is_written_from_the_journal_and_the_summary(study, capfd):
    seen = {}
    study.write_report = lambda journal, **kwargs: seen.update(kwargs, journal=journal) or kwargs["out"]
    Path("d").mkdir()
    assert main(["report", "d"]) == 2
    assert capfd.readouterr().err == "error: d is not the folder of a run: it holds no journal.sqlite.\n"
    Path("d/journal.sqlite").touch()
    Path("d/summary.json").write_text('{"rounds": 2, "split": {"sizes": [1, 2]}}')
    assert main(["report", "d", "--json"]) == 0
    assert stdout_object(capfd)[0] == {"path": "d/report.html"}
    assert seen["split"] == {"sizes": [1, 2]} and seen["summary"]["rounds"] == 2


def test_fetch_tells_its_stages_and_the_folder(monkeypatch, capfd):
    fake = ModuleType("fake")
    fake.fetch = lambda name, *, say: (say("Downloading."), Path("cache") / name)[1]
    monkeypatch.setitem(sys.modules, "fedmezo.models.fetch", fake)
    assert main(["fetch", "smollm2-135m", "--json"]) == 0
    found, err = stdout_object(capfd)
    assert found == {"name": "smollm2-135m", "path": "cache/smollm2-135m"} and err == "Downloading.\n"


@pytest.mark.parametrize(
    ("error", "code"), [(ConfigError("Bad key."), 2), (RunError("Stuck."), 1), (JournalError("Torn."), 1)]
)
def test_an_error_is_one_sentence_and_its_exit_code(study, capfd, error, code):
    study.error = error
    assert main(["verify", "d"]) == code
    out, err = capfd.readouterr()
    assert out == "" and err.splitlines()[-1] == f"error: {error}" and "Traceback" not in err
    assert main(["verify", "d", "--json"]) == code
    assert stdout_object(capfd)[0] == {"error": {"type": type(error).__name__, "message": str(error)}}


def test_every_problem_of_a_configuration_has_its_line(capfd):
    assert main(["config", "show", "--set", "federation.rounds=0", "--set", "federation.local_step=3"]) == 2
    assert capfd.readouterr().err.splitlines() == [
        "error: federation.rounds: expected a whole number >= 1, got 0.",
        "error: Unknown key 'local_step' in [federation]; did you mean 'local_steps'?",
    ]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "--fast"], "error: No such option"),
        (["walk"], "error: No such command 'walk'"),
        (["resume"], "error: Missing argument 'DIR'"),
        (["rollback", "d"], "error: Missing option '--round'"),
        (["rollback", "d", "--round", "-1"], "error: Invalid value for '--round'"),
        (["export", "d", "--to", "onnx"], "error: Invalid value for '--to'"),
        (["config", "show", "a", "b"], "error: Got unexpected extra argument"),
        (["run", "nowhere.toml"], "error: The configuration nowhere.toml does not exist"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_of_use_exit_with_2_and_one_line(study, capfd, arguments, says):
    assert main(arguments) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith(says) and err.count("\n") == 1
    assert main([*arguments, "--json"]) == 2
    assert set(stdout_object(capfd)[0]["error"]) == {"type", "message"}


def test_a_bug_is_one_line_with_a_hint_and_a_traceback_on_demand(study, capfd, monkeypatch):
    study.error = ValueError("odd\nthing")
    assert main(["verify", "d"]) == 1
    err = capfd.readouterr().err
    assert "error: Unexpected ValueError: odd thing (set FEDMEZO_DEBUG=1 for the traceback)\n" in err
    assert "Traceback" not in err
    monkeypatch.setenv("FEDMEZO_DEBUG", "1")
    assert main(["verify", "d", "--json"]) == 1
    found, err = stdout_object(capfd)
    assert found["error"]["type"] == "ValueError" and "Traceback (most recent call last)" in err


def test_an_interrupted_run_says_how_to_go_on(study, capfd):
    study.error = KeyboardInterrupt()
    assert main(["run", "--out", "d"]) == 130
    assert capfd.readouterr().err.splitlines()[-1] == "error: Interrupted before the run began; start it again."
    Path("d").mkdir()
    Path("d/journal.sqlite").touch()
    assert main(["resume", "d", "--json"]) == 130
    found, err = stdout_object(capfd)
    assert err.splitlines()[-1] == "error: Interrupted; no finished round is lost. Go on with: fedmezo resume d"
    assert "fedmezo resume d" in found["error"]["message"]
    assert main(["verify", "d"]) == 130
    assert capfd.readouterr().err.splitlines()[-1] == "error: Interrupted."


def test_verify_fails_with_1_when_the_digests_differ(study, capfd):
    study.ok = False
    assert main(["verify", "d", "--json"]) == 1
    assert stdout_object(capfd)[0]["ok"] is False


def test_tables_print_text_as_it_is(study, capfd):
    assert main(["plan"]) == 0
    out = capfd.readouterr().out
    assert "- rate 9 is too high [really]" in out and "540 MB" in out and "888 B" in out
    assert main(["verify", "d"]) == 0
    assert DIGEST in capfd.readouterr().out


def test_config_show_prints_a_file_that_means_the_same(study, capfd):
    assert main(["config", "show", "--set", "federation.clients=5"]) == 0
    Path("shown.toml").write_text(capfd.readouterr().out)
    assert config_module.load_config("shown.toml") == config_module.load_config(None, ["federation.clients=5"])


def test_config_init_writes_the_ready_ones_too(study, capfd):
    names = sorted(path.stem for path in (Path(__file__).parents[1] / "configs").glob("*.toml"))
    assert main(["config", "init", "new.toml", "--like", "demo"]) == 0
    assert Path("new.toml").read_text() == (Path(__file__).parents[1] / "configs" / "demo.toml").read_text()
    assert main(["config", "init", "odd.toml", "--like", "odd"]) == 2
    assert ", ".join(names) in capfd.readouterr().err and not Path("odd.toml").exists()


def test_config_init_never_writes_over_a_file_unasked(study, capfd):
    assert main(["config", "init"]) == 0
    assert config_module.load_config("fedmezo.toml") == config_module.load_config()
    Path("fedmezo.toml").write_text("mine")
    assert main(["config", "init"]) == 2
    assert "is there already" in capfd.readouterr().err and Path("fedmezo.toml").read_text() == "mine"
    assert main(["config", "init", "--force"]) == 0
    assert Path("fedmezo.toml").read_text() != "mine"
    assert main(["config", "init", "no/such/folder.toml"]) == 2


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_and_argument_is_explained(capfd, monkeypatch, verb):
    monkeypatch.setenv("COLUMNS", "80")
    assert main([verb, "--help"]) == 0
    out = capfd.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    if "Arguments" in out:
        rows = out.split("Arguments")[1].split("╰")[0].splitlines()[1:]
        assert all(len(row.strip("│* ").split()) > 4 for row in rows if row.strip("│ ") and "[required]" not in row)


def test_help_and_version_load_no_torch():
    code = (
        "import sys; from fedmezo.cli import main; code = main(sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'numba', 'plotly', 'numpy'} & set(sys.modules); "
        "print(sorted(heavy), file=sys.stderr); sys.exit(code)"
    )
    for arguments in (["--help"], ["--version"], ["run", "--help"], ["config", "show"], ["config", "init", "-h"], []):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "[]\n"), arguments
        assert done.stdout


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "fedmezo", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"fedmezo {fedmezo.__version__}\n")
    done = subprocess.run(
        [sys.executable, "-m", "fedmezo", "run", "--bad"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")


def test_commands_paths_and_digests_are_never_broken_over_lines(study, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    folder = "a-folder-with-a-name-that-is-longer-than-the-line"
    assert main(["run", "--out", folder]) == 0
    assert f"fedmezo export {folder} --to merged\n" in capfd.readouterr().out
    assert main(["verify", "d"]) == 0
    assert DIGEST in capfd.readouterr().out
    assert main(["run", "--out", folder]) == 0
    assert "460,800 trained numbers, 3 clients, 2 rounds\n" in capfd.readouterr().err
