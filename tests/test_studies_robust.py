"""Runs under a robust rule: the same bits wherever clients walk and however often the run is stopped, whoever lies."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from attacks import ATTACKS
from fake_line import FakeLine
from tiny_runs import StopAfter, StopError, small

from fedmezo.errors import ConfigError, RunError
from fedmezo.fl.whole import is_whole
from fedmezo.runtime.calls import Done, decode_answer, encode_answer
from fedmezo.runtime.journal import Journal
from fedmezo.runtime.wire import decode_reply, encode_reply
from fedmezo.studies.config import load_config, parse_config
from fedmezo.studies.resident import ClientOptions, build_resident
from fedmezo.studies.run import resume, run
from fedmezo.studies.uses import verify

pytestmark = pytest.mark.usefixtures("no_waiting")

ROOT = Path(__file__).parent.parent
CLIENTS = 5
FEW = {"clients": 3}  # enough where nobody's neighbours are counted


def config_of(records, rule, **sections):
    plain = {
        "guard": {"batches": 0},
        "algorithm": {"rate": 2e-3, "mu": 1e-3, "shared": True},
        "robust": {"rule": rule},
        "runtime": {"lanes": 2, "threads": 1},
        "federation": {"clients": CLIENTS, "rounds": 3, "local_steps": 2, "batch_size": 1},
        "eval": {"every": 10, "examples": 4},
    }
    merged = {name: plain.get(name, {}) | sections.get(name, {}) for name in {**plain, **sections}}
    return small(records, **merged)


def lying(answer, attack):
    """Returns a node that sends what the attack makes of its replies."""

    def node(request):
        honest = answer(request)
        told = decode_answer(honest)
        if not isinstance(told, Done):
            return honest
        reply = decode_reply(told.reply)
        sent = attack(reply, reply)
        return encode_answer(replace(told, reply=sent if isinstance(sent, bytes) else encode_reply(sent)))

    return node


def line_of(attack=None, *, liars=(1,), clients=3):
    nodes = {
        10 + client: build_resident(ClientOptions(client=client, trusting=True)).answer for client in range(clients)
    }
    if attack is not None:
        nodes |= {10 + client: lying(nodes[10 + client], attack) for client in liars}
    return FakeLine(nodes)


def journal_of(folder):
    with Journal.open(folder / "journal.sqlite", readonly=True) as journal:
        return list(journal.rounds()), list(journal.events())


@pytest.mark.parametrize(
    ("rule", "sections"),
    [
        *((rule, {}) for rule in ("median", "krum", "multi-krum")),
        ("norm-bound", {"algorithm": {"shared": False}, "federation": {"cohort": 3}}),
        ("multi-krum", {"algorithm": {"name": "fedavg", "rate": 0.05, "shared": False, "mu": "auto"}}),
        ("median", {"algorithm": {"name": "fedkseed", "pool": 32}, "federation": {"pull": "pairs"}}),
        ("trimmed-mean", {"algorithm": {"momentum": 0.5, "directions": 2, "coding": "float16"}}),
        ("median", {"personal": {"signal": "round-loss"}}),
    ],
    ids=str,
)
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(records, tmp_path, rule, sections):
    config = config_of(records, rule, **sections)
    whole = run(config, out=tmp_path / "whole")
    with pytest.raises(StopError):
        run(config, out=tmp_path / "cut", watch=StopAfter(0))
    assert resume(tmp_path / "cut").digest == whole.digest
    verify(tmp_path / "cut")


@pytest.mark.parametrize("rule", ["median", "norm-bound"])
def test_a_network_gives_the_bits_of_the_simulation(records, tmp_path, rule):
    config = config_of(records, rule, federation=FEW)
    simulated = run(config, out=tmp_path / "simulated")
    assert run(config, out=tmp_path / "distributed", line=line_of()).digest == simulated.digest


def test_a_round_is_one_walk_of_nobody_and_clients_catch_up_by_that_alone(records, tmp_path):
    summary = run(config_of(records, "median"), out=tmp_path / "median")
    plain = run(config_of(records, "none"), out=tmp_path / "plain")
    for done in journal_of(tmp_path / "median")[0]:
        assert [entry.weight for entry in done.entries] == [0.0] * CLIENTS + [1.0]
        assert is_whole(done.entries[-1].task) and len(done.entries[-1].reply.slopes) == 2
        assert done.loss == pytest.approx(sorted(e.reply.loss for e in done.entries[:-1])[CLIENTS // 2])
    assert summary.bytes["down_total"] < plain.bytes["down_total"]
    assert summary.digest != plain.digest


@pytest.mark.parametrize("rule", ["median", "norm-bound"])
def test_whatever_a_silent_client_sends_the_run_is_the_same(records, tmp_path, rule):
    """Infinities, garbage, old answers: refused, and absent. Nan only: in the journal, and as absent to the model."""
    config, digests = config_of(records, rule, federation=FEW | {"rounds": 2}), set()
    for name in ("nan", "inf", "garbage", "stale"):
        out = tmp_path / name
        digests.add(run(config, out=out, line=line_of(ATTACKS[name])).digest)
        rounds, events = journal_of(out)
        kinds = {kind for _, kind, _ in events}
        there = {entry.task.client for done in rounds for entry in done.entries}
        assert ("absent" in kinds, 1 in there) == ((False, True) if name == "nan" else (True, False))
    assert len(digests) == 1


def test_a_claimed_loss_turns_the_plain_mean_back_and_no_rule(records, tmp_path):
    def boast(_, reply):
        return replace(reply, loss=10.0 ** (reply.round + 2))

    for rule in ("none", "median", "norm-bound"):
        config = config_of(records, rule, federation=FEW | {"rounds": 6})
        try:
            summary = run(config, out=tmp_path / rule, line=line_of(boast))
        except RunError as error:
            assert rule == "none" and "keeps surging" in str(error)
            continue
        surged = "surge" in {kind for _, kind, _ in journal_of(tmp_path / rule)[1]}
        assert surged == (rule == "none")
        assert rule == "none" or summary.taken_back == 0


def test_a_fixed_clip_and_a_lower_quantile_reach_the_clients(records, tmp_path):
    fixed = config_of(records, "none", algorithm={"clip_at": 1.5})
    lower = config_of(records, "none", algorithm={"clip_quantile": 0.25})
    clips = {}
    for name, config in {"fixed": fixed, "lower": lower, "median": config_of(records, "none")}.items():
        run(config, out=tmp_path / name)
        clips[name] = [done.entries[0].task.clip for done in journal_of(tmp_path / name)[0]]
    assert clips["fixed"] == [1.5] * 3
    assert clips["lower"][0] == clips["median"][0] == 0.0
    assert clips["lower"][1] != clips["median"][1]


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (["robust.rule=median"], "^algorithm.shared: .*needs true, got false"),
        (["robust.rule=sign-vote", "algorithm.name=fedavg"], "^algorithm.name: .*norm-bound, krum and multi-krum"),
        (["robust.rule=krum"], "^federation.clients: .*needs at least 5, got 3"),
        (["robust.rule=krum", "federation.clients=9", "federation.cohort=4"], "^federation.cohort: .*at least 5"),
        (["robust.rule=multi-krum", "robust.share=0.4", "federation.clients=5"], "needs at least 7"),
        (["robust.rule=norm-bound", "federation.clients=2"], "needs at least 3, got 2"),
        (["robust.rule=norm-bound", "federation.weighting=samples"], "^federation.weighting: .*says of itself"),
        (["robust.rule=norm-bound", "federation.weighting=dataset"], "^federation.weighting: .*says of itself"),
        (["robust.rule=norm-bound", "federation.transport=dense"], "^federation.transport: "),
        (["robust.share=0.5"], "robust.share"),
        (["robust.bound=0"], "robust.bound"),
        (["robust.rule=mean"], "robust.rule"),
        (["algorithm.clip_at=1", "algorithm.name=fedavg"], "algorithm.clip_at is a limit on slopes"),
        (["algorithm.clip_quantile=1"], "algorithm.clip_quantile"),
    ],
)
def test_combinations_without_a_meaning_are_refused_in_a_sentence(overrides, match):
    with pytest.raises(ConfigError, match=match.lstrip("^")) as caught:
        load_config(None, overrides)
    assert not match.startswith("^") or re.search(match.lstrip("^").split(":")[0], str(caught.value))
    assert "\n" not in str(caught.value)


def test_secret_sums_cannot_be_outvoted():
    secret = {"network": {"secure": True, "secure_clip": 5.0}, "algorithm": {"shared": True}, "federation": {}}
    try:
        parse_config(secret)
    except ConfigError:
        secret["algorithm"] = {"name": "fedkseed"}
        parse_config(secret)
    with pytest.raises(ConfigError, match="sees no single walk"):
        parse_config(secret | {"robust": {"rule": "norm-bound"}})


def test_the_documented_figures_are_the_recorded_ones():
    command = [sys.executable, str(ROOT / "scripts" / "attacks.py"), "--table"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) > 3
    assert done.stdout.strip() in (ROOT / "docs" / "robust.md").read_text()


@pytest.mark.slow
def test_the_example_shows_what_each_rule_is_worth():
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "robust.py")], capture_output=True, text=True, check=True
    )
    rows = re.findall(r"^(.+?) +loss [\d.]+ -> (\S+)$", done.stdout, re.MULTILINE)
    ends = {name: float(end) for name, end in rows}
    means = [ends.pop("mean, as in the paper"), ends.pop("mean of clipped slopes")]
    assert len(ends) == 3 and not min(means) < max(ends.values())
