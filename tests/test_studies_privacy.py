"""Private runs as a user has them: chosen noise, budgets, resuming, clients of their own accord."""

import json
import math
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from fake_line import FakeLine
from test_cli import main, stdout_object
from tiny_runs import Notes, StopAfter, StopError, small

from fedmezo import diagnose, plan, resume, rollback, run, verify
from fedmezo.errors import ConfigError, RunError
from fedmezo.fl.accountant import Releases, epsilon
from fedmezo.runtime import distant
from fedmezo.runtime.journal import Journal
from fedmezo.studies.config import parse_config
from fedmezo.studies.resident import ClientOptions, build_resident
from fedmezo.studies.secret import SECRET, kept_secret, key_for

pytestmark = pytest.mark.usefixtures("no_waiting")

ROOT = Path(__file__).parent.parent
ALGORITHM = {"rate": 2e-3, "mu": 1e-3}
EXAMPLE = {"mode": "example", "clip": 0.05, "epsilon": 4.0}
CLIENT = {"mode": "client", "clip": 5.0, "sigma": 2.0}
CENTRAL = {"mode": "central", "clip": 5.0, "epsilon": 8.0}
ONE_PER_PASS = {"lanes": 2, "threads": 1}
MODES = {
    "example": {"privacy": EXAMPLE},
    "client": {"privacy": CLIENT},
    "central": {"privacy": CENTRAL, "algorithm": ALGORITHM | {"shared": True}, "federation": {"cohort": 2}},
}
SEEDED = {name: sections | {"privacy": sections["privacy"] | {"noise_seed": 7}} for name, sections in MODES.items()}


def config_of(records, **sections):
    base = {"algorithm": ALGORITHM, "runtime": ONE_PER_PASS, "network": {"patience": 5.0}}
    return small(records, **{**base, **sections})


def line_of(folder, clients=3, said=None, **asked):
    nodes = {}
    for client in range(clients):
        home = folder / f"client-{client}"
        told = build_resident(
            ClientOptions(client=client, state=home, trusting=True, **asked),
            say=(said if said is not None else []).append,
        )
        nodes[10 + client] = told.answer
    return FakeLine(nodes)


def rounds_of(folder):
    with Journal.open(folder / "journal.sqlite", readonly=True) as journal:
        return list(journal.rounds())


# --- the run ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_private_run_tells_what_it_spent_and_no_loss_of_anyone(records, tmp_path, mode):
    config = config_of(records, **MODES[mode])
    done = run(config, out=tmp_path / "run")
    rounds = rounds_of(tmp_path / "run")
    spent = [round_.epsilon for round_ in rounds]
    assert spent == sorted(set(spent)) and done.privacy["epsilon"] == spent[-1]
    assert spent[-1] <= (config.privacy.epsilon or math.inf)
    assert all(math.isnan(round_.loss) and round_.news == () for round_ in rounds)
    assert all(math.isnan(entry.reply.loss) for round_ in rounds for entry in round_.entries)
    assert verify(tmp_path / "run")["digest"] == done.digest
    assert done.taken_back == 0 and done.looks == 0


def test_central_rounds_keep_nobodys_slopes(records, tmp_path):
    run(config_of(records, **MODES["central"]), out=tmp_path / "run")
    for round_ in rounds_of(tmp_path / "run"):
        *clients, whole = round_.entries
        assert [entry.weight for entry in clients] == [0.0] * len(clients) and whole.weight == 1.0
        assert all(entry.reply.slopes == () for entry in clients) and len(whole.reply.slopes) == 2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("last", [-1, 0, 2])
def test_resume_equals_uninterrupted(records, tmp_path, mode, last):
    config = config_of(records, **SEEDED[mode])
    whole = run(config, out=tmp_path / "whole")
    with pytest.raises(StopError):
        run(config, out=tmp_path / "cut", watch=StopAfter(last))
    assert resume(tmp_path / "cut").digest == whole.digest
    assert rounds_of(tmp_path / "cut")[-1].epsilon == rounds_of(tmp_path / "whole")[-1].epsilon


def test_resume_with_a_secret_of_its_own_asks_for_the_same_noise(records, tmp_path):
    config = config_of(records, **MODES["example"])
    with pytest.raises(StopError):
        run(config, out=tmp_path / "run", watch=StopAfter(1))
    secret = (tmp_path / "run" / SECRET).read_bytes()
    resume(tmp_path / "run")
    assert (tmp_path / "run" / SECRET).read_bytes() == secret and len(secret) == 32
    assert stat.S_IMODE((tmp_path / "run" / SECRET).stat().st_mode) == 0o600
    other = run(config, out=tmp_path / "other")
    slopes = [
        [entry.reply.slopes for round_ in rounds_of(tmp_path / name) for entry in round_.entries]
        for name in ("run", "other")
    ]
    assert slopes[0] != slopes[1] and other.digest != verify(tmp_path / "run")["digest"]


def test_a_run_whose_secret_is_gone_does_not_go_on(records, tmp_path):
    with pytest.raises(StopError):
        run(config_of(records, **MODES["example"]), out=tmp_path / "run", watch=StopAfter(1))
    (tmp_path / "run" / SECRET).unlink()
    with pytest.raises(ConfigError, match="secret that this run's noise is made of cannot be read"):
        resume(tmp_path / "run")
    (tmp_path / "run" / SECRET).write_bytes(b"short")
    with pytest.raises(ConfigError, match="expected 32 bytes, got 5"):
        resume(tmp_path / "run")


def test_the_secret_is_in_nothing_that_leaves_the_folder(records, tmp_path):
    config = config_of(records, **MODES["example"], output={"export": True, "report": True, "tensorboard": False})
    done = run(config, out=tmp_path / "run")
    secret = (tmp_path / "run" / SECRET).read_bytes()
    for path in (path for path in (tmp_path / "run").rglob("*") if path.is_file() and path.name != SECRET):
        data = path.read_bytes()
        assert secret not in data and secret.hex().encode() not in data, path
    assert not (tmp_path / "run" / "adapter" / SECRET).exists()
    page = (tmp_path / "run" / "report.html").read_text()
    assert "training-loss" not in page  # nobody told one
    assert "Privacy spent" in page and f"{done.privacy['epsilon']:.3g}" in page


def test_workers_make_the_same_noise(records, tmp_path):
    one = run(config_of(records, **SEEDED["example"]), out=tmp_path / "one")
    runtime = ONE_PER_PASS | {"workers": 2}
    two = run(config_of(records, **SEEDED["example"], runtime=runtime), out=tmp_path / "two")
    assert one.digest == two.digest


def test_doctor_and_watchers_tell_epsilon(records, tmp_path):
    notes = Notes()
    done = run(config_of(records, **MODES["example"]), out=tmp_path / "run", watch=notes)
    assert notes.reports[-1].epsilon == done.privacy["epsilon"]
    found = diagnose(tmp_path / "run")
    assert found.facts["privacy"]["epsilon"] == done.privacy["epsilon"]
    assert "privacy" in [finding.kind for finding in found.findings]


# --- budget -------------------------------------------------------------------------------------------------------


def test_a_target_chooses_the_noise_and_plan_tells_before(records, tmp_path):
    config = config_of(records, **MODES["example"])
    told = plan(config)["privacy"]
    done = run(config, out=tmp_path / "run")
    assert told["epsilon"] == done.privacy["epsilon"] and 3.95 < told["epsilon"] <= 4.0
    assert told["sigma"] == done.privacy["sigma"] and told["unit"] == "example"
    steps = 4 * 2
    assert epsilon([Releases(told["sigma"], told["sampling_rate"], steps)], delta=1e-5) == told["epsilon"]


def test_a_run_is_refused_that_would_spend_more_than_its_budget(records, tmp_path):
    short = config_of(records, privacy=EXAMPLE | {"sigma": 0.3})
    with pytest.raises(ConfigError, match=r"privacy\.epsilon: 4 rounds would cost .* more than the budget of 4"):
        run(short, out=tmp_path / "run")
    with pytest.raises(ConfigError, match="without bound"):
        run(config_of(records, privacy=EXAMPLE | {"sigma": 0.0}), out=tmp_path / "run")


def test_a_run_does_not_go_on_beyond_its_budget(records, tmp_path):
    run(config_of(records, **MODES["example"]), out=tmp_path / "run")
    with pytest.raises(ConfigError, match=r"8 rounds would cost .* more than the budget of 4"):
        resume(tmp_path / "run", rounds=8)
    assert len(rounds_of(tmp_path / "run")) == 4


def test_what_was_told_cannot_be_taken_back(records, tmp_path):
    run(config_of(records, **MODES["example"]), out=tmp_path / "run")
    with pytest.raises(ConfigError, match="cannot be taken back"):
        rollback(tmp_path / "run", round=2)


def test_without_noise_the_epsilon_has_no_bound(records, tmp_path):
    done = run(config_of(records, privacy={"mode": "example", "clip": "none", "sigma": 0.0}), out=tmp_path / "run")
    assert done.privacy["epsilon"] is None and json.loads(json.dumps(done.as_dict()))


def test_cohorts_that_meet_a_client_less_often_cost_it_less(records):
    few = plan(config_of(records, privacy=EXAMPLE, federation={"cohort": 1, "rounds": 9}))["privacy"]
    all_of_them = plan(config_of(records, privacy=EXAMPLE, federation={"rounds": 9}))["privacy"]
    assert few["sigma"] < all_of_them["sigma"]


# --- what cannot be -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"privacy": {"epsilon": 1.0}}, "privacy.mode is none"),
        ({"privacy": {"mode": "example", "epsilon": 1.0}}, "needs a limit"),
        ({"privacy": {"mode": "example", "clip": 0.1}}, "give a noise multiplier"),
        ({"privacy": {"mode": "example", "clip": "none", "sigma": 1.0}}, "no noise hides"),
        ({"algorithm": {"name": "fedavg"}}, 'algorithm.name: privacy.mode = "example" needs not "fedavg"'),
        ({"algorithm": {"adapt": True}}, "algorithm.adapt"),
        ({"guard": {"batches": 8}}, "guard.batches"),
        ({"eval": {"per_client": True}}, "eval.per_client"),
        ({"personal": {"signal": "round-loss"}}, "personal.signal"),
        ({"federation": {"budget": {"tokens": 9.0}}}, "federation.budget"),
        ({"privacy": CLIENT, "federation": {"transport": "dense"}}, "federation.transport"),
        ({"privacy": CENTRAL}, "algorithm.shared"),
        ({"privacy": CENTRAL, "algorithm": {"shared": True}, "federation": {"weighting": "dataset"}}, "weighting"),
        ({"privacy": CENTRAL, "algorithm": {"shared": True, "name": "fedkseed-pro"}}, "algorithm.name"),
        ({"privacy": CENTRAL, "algorithm": {"shared": True}, "personal": {"signal": "heterogeneity"}}, "personal"),
        ({"privacy": CENTRAL, "algorithm": {"shared": True}, "robust": {"rule": "median"}}, "robust.rule"),
        (
            {"network": {"secure": True, "secure_clip": 5.0}, "algorithm": {"name": "fedkseed"}},
            "network.secure",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_would_leak_is_refused_in_one_sentence(sections, told):
    with pytest.raises(ConfigError) as caught:
        parse_config({"privacy": EXAMPLE} | sections)
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_nothing_of_the_data_sets_rate_or_mu(records, tmp_path):
    config = config_of(records, privacy=EXAMPLE, algorithm={})
    run(config, out=tmp_path / "run")
    with Journal.open(tmp_path / "run" / "journal.sqlite", readonly=True) as journal:
        resolved = parse_config(json.loads(journal.header.config))
    assert resolved.algorithm.adapt is False and resolved.algorithm.mu == 1e-3


# --- over a network -----------------------------------------------------------------------------------------------


def test_a_network_gives_the_bits_of_the_simulation_where_the_server_makes_the_noise(records, tmp_path):
    config = config_of(records, **SEEDED["central"])
    simulated = run(config, out=tmp_path / "simulated")
    distributed = run(config, out=tmp_path / "distributed", line=line_of(tmp_path))
    assert simulated.digest == distributed.digest


@pytest.mark.parametrize("mode", ["example", "client"])
def test_clients_count_what_they_told(records, tmp_path, mode):
    done = run(config_of(records, **MODES[mode]), out=tmp_path / "run", line=line_of(tmp_path))
    for client in range(3):
        home = tmp_path / f"client-{client}"
        (answers,) = json.loads((home / "privacy.json").read_text()).values()
        assert len(answers) == 4
        assert stat.S_IMODE((home / SECRET).stat().st_mode) == 0o600
        cost = epsilon([Releases(s, r, n * 4) for s, r, n in [next(iter(answers.values()))]], delta=1e-5)
        assert cost <= done.privacy["epsilon"] * (1 + 1e-9)


def test_answers_of_a_private_client_tell_no_time_and_no_tokens(records, tmp_path):
    line = line_of(tmp_path)
    run(config_of(records, **MODES["example"]), out=tmp_path / "run", line=line)
    for round_ in rounds_of(tmp_path / "run"):
        assert round_.tokens == 0
    answers = [distant.decode_answer(answer) for _, request, answer in line.log if request[:1] == b"\2"]
    assert len(answers) == 12
    assert {(answer.forwards, answer.tokens, answer.seconds) for answer in answers} == {(4, 0, 0.0)}


def test_a_server_that_was_killed_hears_the_same_answers_again(records, tmp_path):
    config = config_of(records, **SEEDED["example"])
    whole = run(config, out=tmp_path / "whole", line=line_of(tmp_path / "a"))
    with pytest.raises(StopError):
        run(config, out=tmp_path / "cut", line=line_of(tmp_path / "b"), watch=StopAfter(1))
    before = json.loads((tmp_path / "b" / "client-0" / "privacy.json").read_text())
    # New processes: what they know of the run is what lies on their disks.
    done = resume(tmp_path / "cut", line=line_of(tmp_path / "b"))
    after = json.loads((tmp_path / "b" / "client-0" / "privacy.json").read_text())
    assert done.rounds == whole.rounds == 4
    ((run_name, answers),) = after.items()
    assert set(before[run_name]) < set(answers) and len(answers) == 4


def test_a_client_stops_at_its_own_budget_whatever_the_server_says(records, tmp_path):
    said = []
    line = line_of(tmp_path, clients=2)
    frugal = build_resident(
        ClientOptions(client=2, state=tmp_path / "frugal", trusting=True, settings=("privacy.epsilon=3.4",)),
        say=said.append,
    )
    line.handlers[12] = frugal.answer
    line.online.add(12)
    run(config_of(records, **MODES["example"]), out=tmp_path / "run", line=line)
    there = [[entry.task.client for entry in round_.entries] for round_ in rounds_of(tmp_path / "run")]
    assert there == [[0, 1, 2], [0, 1, 2], [0, 1], [0, 1]]
    assert any("privacy budget is spent" in sentence and "3.4" in sentence for sentence in said)


def test_a_clients_own_budget_is_for_all_runs_together(records, tmp_path):
    said, settings = [], ("privacy.epsilon=5.0",)
    run(config_of(records, **MODES["example"]), out=tmp_path / "one", line=line_of(tmp_path, settings=settings))
    line = line_of(tmp_path, said=said, settings=settings)
    short = {"patience": 2.0, "deadline": 2.0}
    with pytest.raises(RunError, match="of 3 clients answered"):
        run(config_of(records, **MODES["example"], network=short), out=tmp_path / "two", line=line)
    there = len(rounds_of(tmp_path / "two"))
    assert 0 < there < 4 and any("privacy budget is spent" in sentence for sentence in said)


def test_a_client_that_wants_a_budget_takes_part_in_no_run_without_one(records, tmp_path):
    said = []
    line = line_of(tmp_path, said=said, settings=("privacy.epsilon=3",))
    with pytest.raises(RunError, match="Only 0 of 3"):
        run(config_of(records, network={"patience": 0.2}), out=tmp_path / "run", line=line)
    assert "privacy.mode is none" in said[-1]


def test_a_client_that_wants_a_budget_does_not_leave_the_noise_to_the_server(records, tmp_path):
    said = []
    line = line_of(tmp_path, said=said, settings=("privacy.epsilon=9",))
    with pytest.raises(RunError, match="Only 0 of 3"):
        run(config_of(records, **MODES["central"], network={"patience": 0.2}), out=tmp_path / "run", line=line)
    assert "the server sees its slopes as they are" in said[-1]


def test_a_client_counts_by_a_small_delta_and_ignores_a_seed_of_the_servers(records, tmp_path):
    config = config_of(records, privacy=EXAMPLE | {"noise_seed": 7, "delta": 0.5})
    done = [run(config, out=tmp_path / name, line=line_of(tmp_path / f"at {name}")) for name in ("one", "two")]
    assert done[0].digest != done[1].digest and done[0].privacy == done[1].privacy
    line = line_of(tmp_path / "at own", settings=("privacy.epsilon=0.5",))
    with pytest.raises(RunError, match="budget is spent"):
        run(
            config_of(records, privacy=EXAMPLE | {"delta": 0.5}, network={"patience": 1.0, "deadline": 1.0}),
            out=tmp_path / "own",
            line=line,
        )


def test_a_private_client_needs_a_place_to_remember(records, tmp_path):
    said = []
    nodes = {10 + c: build_resident(ClientOptions(client=c, trusting=True), say=said.append).answer for c in range(3)}
    with pytest.raises(RunError, match="Only 0 of 3"):
        run(config_of(records, **MODES["example"], network={"patience": 0.2}), out=tmp_path / "r", line=FakeLine(nodes))
    assert "start it with --state DIR" in said[-1]


def test_other_data_have_another_secret(tmp_path):
    secret = kept_secret(tmp_path, parse_config({"privacy": EXAMPLE}).privacy, make=True)
    assert (
        len({secret, key_for(secret, "run", "data"), key_for(secret, "run", "other"), key_for(secret, "rundata")}) == 4
    )


# --- the command line ---------------------------------------------------------------------------------------------


def test_the_command_line_plans_runs_and_refuses_to_go_on(records, tmp_path, capfd):
    config = config_of(records, **MODES["example"])
    (tmp_path / "run.toml").write_text(config.to_toml())
    assert main(["plan", str(tmp_path / "run.toml"), "--json"]) == 0
    planned = stdout_object(capfd)[0]["privacy"]
    assert main(["run", str(tmp_path / "run.toml"), "--out", str(tmp_path / "run"), "--json"]) == 0
    told, shown = stdout_object(capfd)
    assert told["privacy"]["epsilon"] == planned["epsilon"] and "epsilon 3.99" in shown
    assert main(["resume", str(tmp_path / "run"), "--rounds", "9"]) == 2
    assert "more than the budget of 4" in capfd.readouterr().err
    assert main(["rollback", str(tmp_path / "run"), "--round", "1"]) == 2
    assert "cannot be taken back" in capfd.readouterr().err


# --- the documentation --------------------------------------------------------------------------------------------


def test_the_table_of_the_documentation_is_that_of_the_raw_rows():
    script, rows = ROOT / "scripts" / "privacy_curve.py", ROOT / "docs" / "results" / "privacy.jsonl"
    command = [sys.executable, str(script), "--out", str(rows), "--table"]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert table in (ROOT / "docs" / "privacy.md").read_text()
    told = [json.loads(line) for line in rows.read_text().splitlines()]
    assert {row["epsilon"] for row in told} >= {"none", "inf", "8", "4", "1"}
    noisy = [row for row in told if row["epsilon"] not in ("none", "inf", "noise")]
    assert all(row["spent"] <= float(row["epsilon"]) for row in noisy)
