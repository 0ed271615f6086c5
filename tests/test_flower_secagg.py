"""Flower's secure aggregation inside this process: the mean is right, losses on the way are borne, nobody is seen."""

import math
import re
from itertools import chain

import numpy as np
import pytest

pytest.importorskip("flwr")
from fake_flower import FakeGrid, Silence
from flower_cluster import Cluster
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.common import bytes_to_ndarray
from flwr.common.secure_aggregation import secaggplus_utils
from flwr.common.secure_aggregation.quantization import quantize
from tiny_runs import Notes, StopAfter, StopError, small, write_records

from fedmezo import flower_client
from fedmezo.errors import ConfigError, RunError
from fedmezo.fl.whole import WHOLE
from fedmezo.runtime import secure
from fedmezo.runtime.calls import Addend, Behind, Refused, Share, encode_answer, encode_request
from fedmezo.runtime.flower import secagg, shim
from fedmezo.runtime.flower.line import FlowerLine
from fedmezo.runtime.flower.secagg import levels_of, secure_mean
from fedmezo.runtime.journal import Journal
from fedmezo.studies.config import load_config, parse_config
from fedmezo.studies.doctor import diagnose
from fedmezo.studies.resident import ClientOptions, build_resident
from fedmezo.studies.run import resume, run, verify

REQUEST = encode_request(Addend(bytes(8), b"task"))
STAGES = ["setup", "share_keys", "collect_masked_vectors", "unmask"]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(secagg, "_POLL", 0.0005)
    monkeypatch.setattr(secure, "_PAUSE", 0.001)


def stage_of(message):
    record = message.content.get("secaggplus_configs")
    return record.get("stage") if record is not None else None


def grid_of(answers, monkeypatch):
    """A grid whose node 10 + n is client n, whose worker is the function `answers[n]`."""
    nodes = {10 + number: {"worker": f"/nowhere/{number}"} for number in range(len(answers))}
    monkeypatch.setattr(shim, "ask", lambda path, request, *, patience: answers[int(path.name)](request))
    return FakeGrid(flower_client.app, nodes)


def shares_of(clients, numbers, *, seed=0):
    shares = np.random.default_rng(seed).uniform(-1, 1, (clients, numbers)).astype(np.float32)
    shares[:, 0], shares[:, 1], shares[:, 2] = 0, 1, -1
    return shares


def grid_with(shares, monkeypatch):
    return grid_of([lambda request, one=one: encode_answer(Share(one.tobytes())) for one in shares], monkeypatch)


def mean_from(grid, *, numbers, enough=2, deadline=5.0):
    requests = dict.fromkeys(grid.get_node_ids(), REQUEST)
    return secure_mean(grid, requests, numbers=numbers, enough=enough, deadline=deadline)


def dies(grid, node, stage, how=Silence):
    def before(at, message):
        if at == node and stage_of(message) == stage:
            raise how("dies")

    grid.before = before


# --- the mean ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clients", [3, 4, 9])
def test_the_mean_is_the_clear_mean_up_to_one_step_of_the_quantisation(clients, monkeypatch):
    shares = shares_of(clients, 500)
    got = mean_from(grid_with(shares, monkeypatch), numbers=500)
    off = np.abs(got.values - shares.mean(axis=0, dtype=np.float64))
    assert off.max() < 2 / levels_of(clients) == 2**-23
    assert off.max() > 0 and off[:3].max() < 1e-12  # 0, 1 and -1 are steps themselves
    assert got.took == {10 + number for number in range(clients)} and not got.failed


def test_no_number_of_clients_lets_a_sum_overflow():
    for clients in (3, 128, 129, 1000, 2**17):
        assert 2**29 < clients * levels_of(clients) <= 2**31 or levels_of(clients) == 2**24
    assert levels_of(2**17) == 2**14


def test_many_clients(monkeypatch):
    shares = shares_of(24, 20)
    got = mean_from(grid_with(shares, monkeypatch), numbers=20, enough=13)
    np.testing.assert_allclose(got.values, shares.mean(axis=0, dtype=np.float64), rtol=0, atol=2**-23)


@pytest.mark.parametrize("clients", [3, 5])
@pytest.mark.parametrize("how", [Silence, RuntimeError])
def test_a_client_lost_while_it_walks_is_left_out(clients, how, monkeypatch):
    shares = shares_of(clients, 50)
    grid = grid_with(shares, monkeypatch)
    dies(grid, 11, "collect_masked_vectors", how)
    got = mean_from(grid, numbers=50, deadline=0.3)
    others = np.delete(shares, 1, axis=0).mean(axis=0, dtype=np.float64)
    np.testing.assert_allclose(got.values, others, rtol=0, atol=2 / levels_of(clients))
    assert got.took == {10 + number for number in range(clients)} - {11}
    assert list(got.failed) == [11] and ("dies" in got.failed[11]) == (how is RuntimeError)


def test_a_client_lost_after_it_walked_is_in_the_mean(monkeypatch):
    shares = shares_of(4, 50)
    grid = grid_with(shares, monkeypatch)
    dies(grid, 11, "unmask")
    got = mean_from(grid, numbers=50, deadline=0.3)
    np.testing.assert_allclose(got.values, shares.mean(axis=0, dtype=np.float64), rtol=0, atol=2 / levels_of(4))
    assert 11 in got.took and 11 in got.failed


@pytest.mark.parametrize("stage", STAGES[:2])
def test_a_client_lost_before_the_walks_ends_the_attempt_before_anybody_walks(stage, monkeypatch):
    walks = []
    grid = grid_of([lambda request: walks.append(request)] * 4, monkeypatch)
    dies(grid, 12, stage)
    got = mean_from(grid, numbers=50, deadline=0.3)
    assert got.values is None and not got.took and list(got.failed) == [12] and not walks


def test_too_few_stayed_and_nothing_is_known(monkeypatch):
    grid = grid_with(shares_of(4, 50), monkeypatch)
    lost = iter([10, 11])

    def before(at, message):
        if stage_of(message) == "unmask" and at in (10, 11):
            raise Silence

    grid.before = before
    got = mean_from(grid, numbers=50, enough=3, deadline=0.3)
    assert got.values is None and not got.took and set(got.failed) == set(lost)


def test_a_share_of_another_length_is_left_out(monkeypatch):
    shares = shares_of(4, 50)
    answers = [lambda request, one=one: encode_answer(Share(one.tobytes())) for one in shares]
    answers[2] = lambda request: encode_answer(Share(shares[2, :49].tobytes()))
    got = mean_from(grid_of(answers, monkeypatch), numbers=50)
    assert got.took == {10, 11, 13} and got.failed == {12: "sent [1, 49] numbers instead of [1, 50]"}
    np.testing.assert_allclose(got.values, np.delete(shares, 2, axis=0).mean(axis=0), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (Refused("The disk is full."), "The disk is full."),
        (Behind(3), "another one than the server thought (it has 3 rounds)"),
    ],
)
def test_why_a_client_has_no_share_is_told(answer, said, monkeypatch):
    answers = [lambda request, one=one: encode_answer(Share(one.tobytes())) for one in shares_of(4, 9)]
    answers[0] = lambda request: encode_answer(answer)
    got = mean_from(grid_of(answers, monkeypatch), numbers=9)
    assert got.took == {11, 12, 13}
    assert said in got.failed[10]


# --- what is seen -----------------------------------------------------------------------------------------------------


def masked_of(grid, node):
    """Every masked vector that the server got from a node, weight and share."""
    found = []
    for at, reply in grid.replies:
        record = reply.content.get("secaggplus_configs", {})
        if at == node and "masked_params" in record:
            found.append([bytes_to_ndarray(part) for part in record["masked_params"]])
    return found


def test_what_the_server_gets_of_one_client_looks_like_nothing(monkeypatch):
    numbers = 20_000
    shares = shares_of(4, numbers)
    grid = grid_with(shares, monkeypatch)
    for _ in range(2):
        mean_from(grid, numbers=numbers)
    (weight, first), (_, second) = masked_of(grid, 10)
    plain = quantize([shares[0].astype(np.float64)], 1.0, levels_of(4))[0]
    assert weight.shape == (1,) and weight[0] != levels_of(4)
    for seen in (first, second, (first - second) % 2**32, (first - plain) % 2**32):
        assert seen.shape == (numbers,) and (seen != plain).mean() > 0.999
        assert seen.min() >= 0 and seen.max() < 2**32
        for shift in (0, 12, 28):  # low, middle and high bits: 16 bins, four deviations of each count
            counts = np.bincount(seen >> shift & 15, minlength=16)
            assert np.abs(counts - numbers / 16).max() < 4.5 * math.sqrt(numbers / 16)
        assert abs(np.corrcoef(seen, plain)[0, 1]) < 4.5 / math.sqrt(numbers)


def test_nothing_else_of_a_client_travels(monkeypatch):
    shares = shares_of(4, 50)
    grid = grid_with(shares, monkeypatch)
    mean_from(grid, numbers=50)
    own = [reply for node, reply in grid.replies if node == 10]
    assert len(own) == 4
    plain = {shares[0].tobytes(), shares[0].astype(np.float64).tobytes()}
    for reply in own:
        names = set(reply.content)
        assert names <= {
            "secaggplus_configs",
            *(f"fitres.{n}" for n in ("parameters", "num_examples", "metrics", "status")),
        }
        assert not reply.content.get("fitres.parameters") and not reply.content.get("fitres.metrics")
        assert dict(reply.content.get("fitres.num_examples", {"num_examples": 1})) == {"num_examples": 1}
        values = chain.from_iterable(
            v if isinstance(v, list) else [v] for v in reply.content["secaggplus_configs"].values()
        )
        assert not any(whole in part for part in values if isinstance(part, bytes) for whole in plain)


def test_masks_come_from_the_whole_secret():
    seed, swapped = bytes(range(64)), bytes([*range(4, 8), *range(4), *range(8, 64)])
    weak = secaggplus_utils.pseudo_rand_gen
    assert np.array_equal(weak(seed, 2**32, [(9,)])[0], weak(swapped, 2**32, [(9,)])[0])  # why Flower's own will not do
    first, other = (secagg._masks(one, 2**32, [(1,), (3, 3), ()]) for one in (seed, swapped))
    assert [part.shape for part in first] == [(1,), (3, 3), ()]
    assert all(not np.array_equal(a, b) for a, b in zip(first, other, strict=True))
    assert secagg._masks(seed, 2**20, [(1000,)])[0].max() < 2**20


def test_a_flower_that_masks_in_another_way_is_refused(monkeypatch):
    monkeypatch.delattr("flwr.server.workflow.secure_aggregation.secaggplus_workflow.pseudo_rand_gen")
    with pytest.raises(RunError, match=r"makes its masks in a way that is unknown here; install flwr"):
        secagg.strengthened()


@pytest.mark.parametrize("kind", [MessageType.QUERY, MessageType.TRAIN])
def test_a_share_is_not_given_unmasked(kind, monkeypatch):
    asked = []
    grid = grid_of([asked.append], monkeypatch)
    ids = grid.push_messages([Message(RecordDict({"fedmezo": ConfigRecord({"payload": REQUEST})}), 10, kind)])
    (reply,) = grid.pull_messages(ids)
    assert reply.has_error() and "masked only" in reply.error.reason and not asked


def test_a_client_takes_no_part_in_a_sum_of_two(monkeypatch):
    walks = []
    got = mean_from(grid_of([walks.append] * 2, monkeypatch), numbers=5)
    assert got.values is None and not walks
    assert "a sum of 2 clients, in which nobody hides" in got.failed[10]


# --- whole runs -------------------------------------------------------------------------------------------------------


def config_of(records, **sections):
    plain = {
        "federation": {"clients": 4, "rounds": 3, "local_steps": 8, "batch_size": 2, "pull": "pairs"},
        "algorithm": {"name": "fedkseed", "pool": 64, "rate": 2e-3, "mu": 1e-3, "shared": True},
        "network": {"secure": True, "secure_clip": 50.0, "deadline": 0.5, "patience": 2.0},
        "guard": {"batches": 0},
        "runtime": {"lanes": 2, "threads": 1},
    }
    merged = {name: plain.get(name, {}) | sections.get(name, {}) for name in {**plain, **sections}}
    return small(records, **merged)


def residents(count=4, **asked):
    return [build_resident(ClientOptions(client=number, trusting=True, **asked)) for number in range(count)]


def line_of(monkeypatch, clients):
    grid = grid_of([client.answer for client in clients], monkeypatch)
    return grid, FlowerLine(grid, ttl=60.0)


def rounds_of(folder):
    with Journal.open(folder / "journal.sqlite", readonly=True) as journal:
        return list(journal.rounds())


@pytest.mark.parametrize("name", ["fedmezo", "fedkseed"])
def test_a_secure_run_is_the_clear_sums_up_to_quantisation(name, records, tmp_path, monkeypatch):
    grid, line = line_of(monkeypatch, residents())
    hidden = run(config_of(records, algorithm={"name": name}), out=tmp_path / "hidden", line=line)
    clear = run(config_of(records, algorithm={"name": name}), out=tmp_path / "clear")
    open_ = config_of(records, network={"secure": False}, algorithm={"name": name, "clip_at": 50.0})
    plain = run(open_, out=tmp_path / "plain")
    start, end = hidden.eval["start"]["loss"], hidden.eval["end"]["loss"]
    assert end < start - 0.3
    assert end == pytest.approx(clear.eval["end"]["loss"], abs=5e-3)
    assert end == pytest.approx(plain.eval["end"]["loss"], abs=5e-2)  # an 11-bit mean of 11-bit coefficients
    assert hidden.forwards == clear.forwards == plain.forwards
    for one, other in zip(rounds_of(tmp_path / "hidden"), rounds_of(tmp_path / "clear"), strict=True):
        assert one.loss == pytest.approx(other.loss, abs=5e-3) and one.rate == other.rate == 2e-3
        assert len(one.entries) == 1 and one.entries[0].walks == 4
        assert ("summed", "clients 0, 1, 2, 3") in one.events
        assert {kind for kind, _ in one.news} <= {"network"}
    for folder in ("hidden", "clear"):
        assert verify(tmp_path / folder)["rounds"] == 3
    assert {stage_of(message) for _, message in grid.requests} == {None, *STAGES}
    assert hidden.bytes["up_per_client_round"] > 8 * 9 and hidden.bytes["down_per_client_round"] > 4 * 8


@pytest.mark.parametrize("pull", ["sums", "dense"])
def test_clients_follow_by_every_way_to_pull(pull, records, tmp_path, monkeypatch):
    _, line = line_of(monkeypatch, residents())
    config = config_of(records, federation={"pull": pull})
    end = run(config, out=tmp_path / "run", line=line).eval["end"]["loss"]
    assert end == pytest.approx(run(config, out=tmp_path / "clear").eval["end"]["loss"], abs=1e-2)


def test_a_killed_secure_run_goes_on(records, tmp_path, monkeypatch):
    clients = residents()
    _, line = line_of(monkeypatch, clients)
    with pytest.raises(StopError):
        run(config_of(records), out=tmp_path / "run", line=line, watch=StopAfter(1))
    first = rounds_of(tmp_path / "run")
    _, line = line_of(monkeypatch, [*clients[:2], *residents()[2:]])  # two of them have forgotten everything
    summary = resume(tmp_path / "run", line=line)
    assert rounds_of(tmp_path / "run")[:2] == first and summary.rounds == 3
    assert all(done.entries[0].walks == 4 for done in rounds_of(tmp_path / "run"))
    assert verify(tmp_path / "run")["digest"] == summary.digest


@pytest.mark.parametrize("stage", STAGES)
def test_a_server_killed_in_any_exchange_goes_on(stage, records, tmp_path, monkeypatch):
    clients = residents()
    grid, line = line_of(monkeypatch, clients)
    push, seen = grid.push_messages, []

    def dies(messages):
        seen.extend({stage_of(message) for message in messages} & {stage})
        if len(seen) == 2:
            raise StopError
        return push(messages)

    grid.push_messages = dies
    with pytest.raises(StopError):
        run(config_of(records), out=tmp_path / "run", line=line)
    assert len(rounds_of(tmp_path / "run")) == 1
    grid.push_messages = push  # the nodes and their half-done exchange stay as they are
    summary = resume(tmp_path / "run", line=line)
    assert [one.entries[0].walks for one in rounds_of(tmp_path / "run")] == [4, 4, 4]
    assert verify(tmp_path / "run")["digest"] == summary.digest


def test_a_run_whose_client_dies_while_it_walks_goes_on_with_the_others(records, tmp_path, monkeypatch):
    grid, line = line_of(monkeypatch, residents())

    def before(node, message):
        if node == 12 and stage_of(message) == "collect_masked_vectors":
            grid.online.discard(12)
            raise Silence

    grid.before = before
    run(config_of(records), out=tmp_path / "run", line=line)
    done = rounds_of(tmp_path / "run")
    assert [one.entries[0].walks for one in done] == [3, 3, 3]
    assert ("summed", "clients 0, 1, 3") in done[0].events
    assert ("absent", "client 2 failed (did not answer within 0.5 s)") in done[0].events


def test_a_client_that_never_gets_to_its_walk_is_left_out_of_the_next_attempt(records, tmp_path, monkeypatch):
    grid, line = line_of(monkeypatch, residents())
    begun = []

    def before(node, message):
        if stage_of(message) == "setup":
            begun.append(node)
            if node == 13:
                raise RuntimeError("an old Flower")

    grid.before = before
    run(config_of(records, federation={"rounds": 1}), out=tmp_path / "run", line=line)
    (done,) = rounds_of(tmp_path / "run")
    assert sorted(begun[:4]) == [10, 11, 12, 13] and sorted(begun[4:]) == [10, 11, 12]
    assert done.entries[0].walks == 3 and ("summed", "clients 0, 1, 2") in done.events
    assert any(kind == "absent" and "client 3 failed" in text and "an old Flower" in text for kind, text in done.events)


def test_a_model_that_is_not_what_the_server_thought_is_set_right(records, tmp_path, monkeypatch):
    clients = residents()
    _, line = line_of(monkeypatch, clients)
    with pytest.raises(StopError):
        run(config_of(records), out=tmp_path / "run", line=line, watch=StopAfter(0))
    next(iter(clients[1]._taking.bench.params))[1].data.view(-1)[0] += 1e-3
    resume(tmp_path / "run", line=line)
    done = rounds_of(tmp_path / "run")
    assert [one.entries[0].walks for one in done] == [4, 3, 4]
    assert any("another one than the server thought" in text for _, text in done[1].events)


def test_too_few_clients_end_in_a_sentence_and_the_run_can_go_on(records, tmp_path, monkeypatch):
    grid, line = line_of(monkeypatch, residents())

    def before(node, message):
        if node in (10, 11) and stage_of(message) == "collect_masked_vectors":
            raise RuntimeError("no disk")

    grid.before = before
    config = config_of(records, network={"deadline": 0.05, "patience": 0.1})
    with pytest.raises(RunError, match=r"Round 0: fewer than 3 .* stayed until .*client 0 failed .*no disk.* go on"):
        run(config, out=tmp_path / "run", line=line)
    _, line = line_of(monkeypatch, residents())
    assert resume(tmp_path / "run", line=line).rounds == 3


def test_a_client_of_a_secure_run_gives_no_single_walk(records, tmp_path, monkeypatch):
    heard, clients = [], residents()
    clients[0] = build_resident(ClientOptions(client=0, trusting=True), say=heard.append)
    grid, line = line_of(monkeypatch, clients)
    requests = []

    def before(node, message):
        if node == 10 and stage_of(message) == "collect_masked_vectors":
            requests.append(message.content["fitins.config"]["payload"])

    grid.before = before
    run(config_of(records), out=tmp_path / "run", line=line)
    clients[0].answer(b"\2" + requests[-1][1:])
    assert heard[-1] == "This run shows the server sums only, and it asked for a single client's slopes."


def test_the_bytes_of_a_secure_round(records, tmp_path, monkeypatch):
    _, line = line_of(monkeypatch, residents())
    many = config_of(records, algorithm={"pool": 4096}, federation={"rounds": 2, "local_steps": 200})
    run(many, out=tmp_path / "run", line=line)
    last = rounds_of(tmp_path / "run")[-1].entries[0]
    up, down = last.bytes_up / 4, last.bytes_down / 4
    assert 8 * 201 < up < 8 * 201 + 3000  # a masked number has 8 bytes
    assert 4 * 200 < down < 4 * 200 + 5000  # the last round's sum, by pairs


def test_doctor_and_report_know_only_what_the_sums_say(records, tmp_path):
    config = config_of(records, federation={"rounds": 4}, output={"report": True, "export": True, "tensorboard": False})
    told = Notes()
    summary = run(config, out=tmp_path / "run", watch=told)
    found = diagnose(tmp_path / "run")
    assert (found.facts["cohort"], found.facts["steps"]) == (4, 8)
    assert found.facts["bytes"]["up_per_client_round"] == pytest.approx(summary.bytes["up_per_client_round"])
    assert {finding.kind for finding in found.findings} == {"judged"}
    for report in told.reports:
        assert list(report.clients) == [0, 1, 2, 3]
        assert all(math.isnan(seen["loss"]) and seen["rate"] == 2e-3 for seen in report.clients.values())
        assert sum(seen["bytes_up"] for seen in report.clients.values()) == report.bytes_up
    page = (tmp_path / "run" / "report.html").read_text()
    assert f"client {WHOLE}" not in page and f">{WHOLE}<" not in page


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_three_clients_over_flower_hide_in_their_sum(tmp_path):
    told = [
        "model.name=builtin:tiny", "adapter.rank=2", "adapter.alpha=4", "data.max_tokens=32", "data.eval_examples=8",
        "data.template={instruction} {input} is", f"data.path={write_records(tmp_path)}", "federation.clients=3",
        "federation.rounds=3", "federation.local_steps=8", "federation.batch_size=2", "algorithm.name=fedkseed",
        "algorithm.pool=64", "algorithm.rate=2e-3", "algorithm.mu=1e-3", "algorithm.shared=true", "network.secure=true",
        "network.secure_clip=50", "guard.batches=0", "eval.examples=8", "runtime.lanes=2", "runtime.threads=1",
        "output.report=false", "output.tensorboard=false", "federation.pull=pairs",
    ]  # fmt: skip
    with Cluster(tmp_path, 3, settings=told) as cluster:
        summary = cluster.result()
    done = rounds_of(tmp_path / "run")
    clear = run(load_config(None, told), out=tmp_path / "clear")
    assert summary["eval"]["end"]["loss"] == pytest.approx(clear.eval["end"]["loss"], abs=5e-3)
    assert summary["eval"]["end"]["loss"] < summary["eval"]["start"]["loss"] - 0.3
    assert [(one.entries[0].task.client, one.entries[0].walks) for one in done] == [(WHOLE, 3)] * 3
    assert verify(tmp_path / "run")["digest"] == summary["digest"]
    for client in cluster.clients.values():
        assert len(re.findall(r"Round \d: loss", client.said())) == 3


# --- the configuration ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"network": {"secure_clip": None}}, "network.secure_clip: network.secure = true needs a number, got none: "),
        ({"algorithm": {"shared": False}}, "algorithm.shared: network.secure = true needs true, got False: "),
        ({"algorithm": {"name": "fedkseed-pro"}}, 'algorithm.name: .* got "fedkseed-pro": '),
        ({"algorithm": {"directions": 2}}, "algorithm.directions: network.secure = true needs 1, got 2: "),
        ({"algorithm": {"momentum": 0.5}}, "algorithm.momentum: network.secure = true needs 0, got 0.5: "),
        ({"algorithm": {"coding": "sign"}}, 'algorithm.coding: .* got "sign": '),
        ({"federation": {"weighting": "dataset"}}, 'federation.weighting: .* got "dataset": '),
        ({"federation": {"transport": "dense"}}, 'federation.transport: .* got "dense": '),
        ({"federation": {"sums_coding": "float16"}}, 'federation.sums_coding: .* got "float16": '),
        ({"personal": {"signal": "round-loss"}}, 'personal.signal: .* got "round-loss": '),
        ({"federation": {"clients": 2}}, "federation.clients: .* needs at least 3, got 2: "),
        ({"federation": {"clients": 9, "cohort": 2}}, "federation.cohort: .* needs at least 3, got 2: "),
    ],
    ids=str,
)
def test_what_a_secure_run_cannot_have_is_refused_in_a_sentence(sections, sentence):
    given = {"network": {"secure": True, "secure_clip": 9.0}, "algorithm": {"name": "fedkseed", "shared": True}}
    merged = {name: given.get(name, {}) | sections.get(name, {}) for name in {**given, **sections}}
    with pytest.raises(ConfigError, match=sentence) as raised:
        parse_config(merged)
    assert "\n" not in str(raised.value) and str(raised.value).endswith(".")
    parse_config(merged | {"network": {"secure": False}})


def test_the_limit_of_a_secure_run_decides_its_result():
    told = [{"secure": True, "secure_clip": 9.0}, {"secure": True, "secure_clip": 8.0}, {"secure": False}]
    pooled = {"name": "fedkseed", "shared": True}
    configs = [parse_config({"algorithm": pooled, "network": network}) for network in told]
    assert len({config.digest() for config in configs}) == 3
    assert configs[2].digest() == parse_config({"algorithm": pooled}).digest()


def test_a_way_that_takes_no_secret_sums_is_refused(records, tmp_path):
    from fake_line import FakeLine

    with pytest.raises(ConfigError, match="takes no secret sums"):
        run(config_of(records), out=tmp_path / "run", line=FakeLine({}))
