"""Clients on other machines: a simulation's bits, whatever fails on the way; the network is inside this process."""

import json
import re
from dataclasses import replace

import pytest
from fake_line import Crash, FakeLine
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import StopAfter, StopError, small

from fedmezo import __version__, diagnose
from fedmezo.errors import ConfigError, RunError, WireError
from fedmezo.runtime import calls
from fedmezo.runtime.calls import (
    Addend,
    Behind,
    Done,
    Hello,
    Noted,
    Notice,
    Refused,
    Share,
    Stranger,
    Walk,
    Welcome,
    decode_answer,
    decode_request,
    encode_answer,
    encode_request,
)
from fedmezo.runtime.journal import Journal
from fedmezo.runtime.wire import WIRE_VERSION, decode_reply, encode_reply
from fedmezo.studies.config import parse_config
from fedmezo.studies.consent import refuse_unasked
from fedmezo.studies.resident import ClientOptions, build_resident, refuse_strangers
from fedmezo.studies.run import resume, run

pytestmark = pytest.mark.usefixtures("no_waiting")

ONE_PER_PASS = {"lanes": 2, "threads": 1}


def config_of(records, **sections):
    plain = {"guard": {"batches": 0}, "algorithm": {"rate": 2e-3, "mu": 1e-3}, "runtime": ONE_PER_PASS}
    merged = {name: plain.get(name, {}) | sections.get(name, {}) for name in {**plain, **sections}}
    return small(records, **merged)


def resident(client, **asked_):
    return build_resident(ClientOptions(client=client, **{"trusting": True, **asked_}))


def line_of(clients=3, **asked_):
    return FakeLine({10 + client: resident(client, **asked_).answer for client in range(clients)})


def own_file(folder, *, count):
    rows = [{"instruction": "Say", "input": str(number), "output": "zebra"} for number in range(count)]
    path = folder / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def events_of(folder):
    with Journal.open(folder / "journal.sqlite", readonly=True) as journal:
        return [(number, kind, text) for number, kind, text in journal.events() if kind != "look"]


def rounds_of(folder):
    with Journal.open(folder / "journal.sqlite", readonly=True) as journal:
        return list(journal.rounds())


# --- the same run -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"adapter": {"kind": "full"}},
        {"adapter": {"kind": "full"}, "model": {"dtype": "bfloat16"}},
        {"algorithm": {"name": "fedavg", "rate": 0.05}},
        {"algorithm": {"name": "fedkseed", "pool": 64}, "federation": {"pull": "pairs"}},
        {"algorithm": {"name": "fedkseed-pro", "pool": 64}, "federation": {"pull": "pairs"}},
        {"federation": {"transport": "dense"}},
        {"federation": {"pull": "dense"}},
        {"federation": {"cohort": 2, "rounds": 6}},
        {"algorithm": {"coding": "float16", "momentum": 0.5, "directions": 2}},
        {"personal": {"signal": "round-loss"}},
        {"guard": {"batches": 4}},
        {"algorithm": {"rate": "auto", "mu": "auto"}, "guard": {"batches": "auto"}, "federation": {"rounds": 8}},
    ],
    ids=str,
)
def test_a_network_gives_the_bits_of_the_simulation(records, tmp_path, sections):
    config = config_of(records, **sections)
    simulated = run(config, out=tmp_path / "simulated")
    distributed = run(config, out=tmp_path / "distributed", line=line_of())
    assert distributed.digest == simulated.digest
    assert distributed.eval == simulated.eval
    assert distributed.forwards == simulated.forwards and distributed.tokens == simulated.tokens
    losses = [
        [
            (entry.reply.client, entry.reply.loss, entry.reply.slopes)
            for done in rounds_of(folder)
            for entry in done.entries
        ]
        for folder in (tmp_path / "distributed", tmp_path / "simulated")
    ]
    assert losses[0] == losses[1]


SIGNALS = ["round-loss", "five-round-loss", "update-difference", "heterogeneity", "random"]


@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize(("clients", "cohort"), [(2, None), (3, None), (20, 5)])
def test_every_signal_of_personal_rates_works_over_a_network(records, tmp_path, signal, clients, cohort):
    taking_part = {"clients": clients, "rounds": 6, "batch_size": 1} | ({"cohort": cohort} if cohort else {})
    config = config_of(records, personal={"signal": signal}, federation=taking_part)
    simulated = run(config, out=tmp_path / "simulated")
    distributed = run(config, out=tmp_path / "distributed", line=line_of(clients))
    rates = {entry.task.rate for done in rounds_of(tmp_path / "distributed") for entry in done.entries}
    assert distributed.digest == simulated.digest
    # Of two clients each is as far from their mean as the other, and equal signals give the default rate.
    assert len(rates) > 1 or (signal, clients) == ("update-difference", 2)


def test_a_rollback_of_the_server_reaches_the_clients(records, tmp_path):
    config = config_of(records, algorithm={"rate": 0.5}, guard={"batches": 8}, federation={"rounds": 8})
    simulated = run(config, out=tmp_path / "simulated")
    distributed = run(config, out=tmp_path / "distributed", line=line_of())
    assert simulated.taken_back > 0
    assert (distributed.digest, distributed.taken_back) == (simulated.digest, simulated.taken_back)


def test_sums_of_a_pool_agree_up_to_rounding(records, tmp_path):
    config = config_of(
        records, algorithm={"name": "fedkseed", "pool": 16}, federation={"pull": "sums", "local_steps": 20}
    )
    simulated = run(config, out=tmp_path / "simulated")
    distributed = run(config, out=tmp_path / "distributed", line=line_of())
    assert distributed.eval["end"]["loss"] == pytest.approx(simulated.eval["end"]["loss"], rel=1e-4)
    assert distributed.eval["end"]["loss"] != distributed.eval["start"]["loss"]


def test_a_clients_own_file_never_reaches_the_server(records, tmp_path):
    own = tmp_path / "own.jsonl"
    own.write_text(
        "".join(json.dumps({"instruction": "Say", "input": str(n), "output": "zebra"}) + "\n" for n in range(7))
    )
    config = config_of(records, federation={"clients": 2})
    line = FakeLine(
        {
            1: resident(0, own=True, settings=(f"data.path={own}",)).answer,
            2: resident(1).answer,
        }
    )
    run(config, out=tmp_path / "run", line=line)
    assert json.loads((tmp_path / "run" / "clients.json").read_text())["0"] == 7
    assert {entry.reply.examples for done in rounds_of(tmp_path / "run") for entry in done.entries} == {4}


def test_weights_by_dataset_are_those_the_clients_say_also_after_a_restart(records, tmp_path):
    own = tmp_path / "own.jsonl"
    own.write_text(
        "".join(json.dumps({"instruction": "Say", "input": str(n), "output": "zebra"}) + "\n" for n in range(9))
    )
    config = config_of(
        records,
        federation={"clients": 2, "weighting": "dataset", "pull": "pairs"},
        algorithm={"name": "fedkseed", "pool": 8},
    )

    def line():
        return FakeLine({c: resident(c, own=True, settings=(f"data.path={own}",)).answer for c in range(2)})

    whole = run(config, out=tmp_path / "whole", line=line())
    assert [entry.weight for entry in rounds_of(tmp_path / "whole")[0].entries] == [0.5, 0.5]
    with pytest.raises(StopError):
        run(config, out=tmp_path / "cut", line=line(), watch=StopAfter(1))
    assert resume(tmp_path / "cut", line=line()).digest == whole.digest


# --- bytes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clients", [3, 8])
def test_payloads_of_the_steady_state(records, tmp_path, clients):
    steps = 30
    config = config_of(records, federation={"clients": clients, "local_steps": steps, "rounds": 4, "batch_size": 1})
    line = line_of(clients)
    run(config, out=tmp_path / "run", line=line)
    walks = [(request, answer) for _, request, answer in line.log if request[:1] == b"\2"]
    assert len(walks) == 4 * clients
    for request, answer in walks[clients:]:
        assert len(answer) <= 4 * steps + 96
        assert len(request) <= 4 * steps * clients + 256
    for done in rounds_of(tmp_path / "run"):
        sizes = {(entry.bytes_down, entry.bytes_up) for entry in done.entries}
        assert sizes <= {(len(request), len(answer)) for request, answer in walks}


def test_a_client_that_comes_late_gets_all_it_missed(records, tmp_path):
    config = config_of(records, federation={"rounds": 6}, network={"clients": 2, "quorum": 2})
    line = line_of()
    late = line.handlers.pop(12)
    line.online = {10, 11}

    class Joins(StopAfter):
        def round(self, report):
            if report.round == 2:
                line.handlers[12] = late
                line.online.add(12)

    run(config, out=tmp_path / "run", line=line, watch=Joins(99))
    took = [[entry.task.client for entry in done.entries] for done in rounds_of(tmp_path / "run")]
    assert took[0] == [0, 1] and took[-1] == [0, 1, 2]


# --- faults -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unbroken(records, tmp_path_factory):
    return run(config_of(records), out=tmp_path_factory.mktemp("unbroken") / "run").digest


class Sick:
    """Passes requests on; `what` decides what becomes of the n-th walk."""

    def __init__(self, inner, what):
        self.inner, self.what, self.walks = inner, what, 0

    def __call__(self, request):
        if request[:1] != b"\2":
            return self.inner(request)
        self.walks += 1
        return self.what(self, request)


def test_a_client_killed_in_a_round_is_asked_again_when_it_is_back(records, tmp_path, unbroken):
    line = line_of()
    healthy = line.handlers[11]

    def dies_once(sick, request):
        if sick.walks != 2:
            return sick.inner(request)
        line.online.remove(11)
        line.handlers[77] = resident(1).answer  # another node, another process, no memory
        line.online.add(77)
        raise Crash("the node is gone")

    line.handlers[11] = Sick(healthy, dies_once)
    config = config_of(records, network={"quorum": 3})
    assert run(config, out=tmp_path / "run", line=line).digest == unbroken
    assert all(len(done.entries) == 3 for done in rounds_of(tmp_path / "run"))


def test_a_run_of_other_machines_does_not_go_on_as_a_simulation(records, tmp_path):
    run(config_of(records), out=tmp_path / "run", line=line_of())
    with pytest.raises(ConfigError, match=r"on other machines; go on with `fedmezo server --resume"):
        resume(tmp_path / "run", rounds=9)


def test_a_restarted_client_goes_on_from_its_disk(records, tmp_path, unbroken):
    line = line_of()
    line.handlers[11] = resident(1, state=tmp_path / "state").answer
    with pytest.raises(StopError):
        run(config_of(records), out=tmp_path / "run", line=line, watch=StopAfter(1))
    line.handlers[11] = resident(1, state=tmp_path / "state").answer
    line.log.clear()
    assert resume(tmp_path / "run", line=line).digest == unbroken
    told = [decode_answer(answer) for _, request, answer in line.log if request[:1] == b"\1"]
    assert {(told.client, told.held) for told in told} == {(0, 1), (1, 1), (2, 1)}
    assert not any(isinstance(decode_answer(answer), Behind) for *_, answer in line.log)


@pytest.mark.parametrize("harm", ["flip", "cut", "other", "gone"])
def test_a_damaged_state_is_noticed_and_fetched_anew(records, tmp_path, unbroken, harm):
    line = line_of()
    line.handlers[11] = resident(1, state=tmp_path / "state").answer
    with pytest.raises(StopError):
        run(config_of(records), out=tmp_path / "run", line=line, watch=StopAfter(1))
    file = tmp_path / "state" / "model.safetensors"
    data = bytearray(file.read_bytes())
    if harm == "flip":
        data[-5] ^= 1
        file.write_bytes(data)
    elif harm == "cut":
        file.write_bytes(data[: len(data) // 2])
    elif harm == "other":
        file.write_bytes(b"something else")
    else:
        file.unlink()
    line.handlers[11] = resident(1, state=tmp_path / "state").answer
    assert resume(tmp_path / "run", line=line).digest == unbroken


def test_wrong_bits_that_claim_to_be_right_are_noticed_by_the_check(records, tmp_path, unbroken):
    line = line_of()
    broken = build_resident(ClientOptions(client=1, trusting=True))
    line.handlers[11] = broken.answer
    with pytest.raises(StopError):
        run(config_of(records), out=tmp_path / "run", line=line, watch=StopAfter(1))
    tensor = next(iter(broken._taking.bench.params))[1]
    tensor.data.view(-1)[0] += 1e-7
    line.log.clear()
    assert resume(tmp_path / "run", line=line).digest == unbroken
    assert Behind(0) in [decode_answer(answer) for node, _, answer in line.log if node == 11]


class Kills(FakeLine):
    """A network whose server dies at the n-th use of it."""

    def __init__(self, handlers, *, at, use):
        super().__init__(handlers)
        self.at, self.use, self.uses = at, use, 0

    def _used(self, use):
        self.uses += use == self.use
        if self.uses == self.at and use == self.use:
            raise StopError

    def send(self, parcels):
        self._used("send" if not parcels[0].greeting else "greet")
        given = super().send(parcels)
        self._used("sent")
        return given

    def receive(self, tickets):
        back = super().receive(tickets)
        if back:
            self._used("receive")
        return back


@pytest.mark.parametrize(
    ("use", "at"), [("greet", 1), ("send", 1), ("sent", 3), ("sent", 5), ("receive", 3), ("receive", 4), ("send", 4)]
)
def test_a_server_killed_at_any_instant_goes_on_with_the_same_bits(records, tmp_path, unbroken, use, at):
    handlers = line_of().handlers
    with pytest.raises(StopError):
        run(config_of(records), out=tmp_path / "run", line=Kills(handlers, at=at, use=use))
    assert resume(tmp_path / "run", line=FakeLine(handlers)).digest == unbroken


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_server_killed_around_a_journals_write_goes_on_with_the_same_bits(
    records, tmp_path, unbroken, when, monkeypatch
):
    handlers, append = line_of().handlers, Journal.append

    def dies(self, done):
        if when == "after" or done.round != 2:
            append(self, done)
        if done.round == 2:
            raise StopError

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", dies)
        with pytest.raises(StopError):
            run(config_of(records), out=tmp_path / "run", line=FakeLine(handlers))
    assert resume(tmp_path / "run", line=FakeLine(handlers)).digest == unbroken


def test_a_straggler_is_left_behind_at_the_deadline_and_counted(records, tmp_path):
    line = line_of()
    line.slow[12] = 5
    config = config_of(records, network={"deadline": 0.02, "quorum": 2}, federation={"rounds": 12})
    run(config, out=tmp_path / "run", line=line)
    kinds = [(kind, text) for _, kind, text in events_of(tmp_path / "run")]
    assert ("absent", "client 2 did not answer within 0.02 s") in kinds
    assert any(kind == "stale" and text.startswith("client 2 answered round 0 after") for kind, text in kinds)
    assert all([e.task.client for e in done.entries][:2] == [0, 1] for done in rounds_of(tmp_path / "run"))


def test_one_of_four_clients_always_fails(records, tmp_path):
    line = line_of(4)

    def dies(sick, request):
        raise Crash("its disk is full")

    line.handlers[12] = Sick(line.handlers[12], dies)
    config = config_of(records, federation={"clients": 4})
    run(config, out=tmp_path / "run", line=line)
    assert [[e.task.client for e in done.entries] for done in rounds_of(tmp_path / "run")] == [[0, 1, 3]] * 4
    told = [text for _, kind, text in events_of(tmp_path / "run") if kind == "absent"]
    assert told == ["client 2 failed (its disk is full)"] * 4
    found = {finding.kind: finding for finding in diagnose(tmp_path / "run").findings}
    assert found["silent-client"].numbers == {"client": 2, "missed": 4, "asked": 4}
    assert "did not answer in 4 of the 4 rounds" in found["silent-client"].sentence
    assert "its worker has died" in found["silent-client"].advice


def test_without_a_quorum_the_run_ends_in_a_sentence_and_can_go_on(records, tmp_path, unbroken):
    line = line_of()
    healthy = dict(line.handlers)

    def refuses(sick, request):
        return encode_answer(Refused("no disk")) if sick.walks > 1 else sick.inner(request)

    for node in (11, 12):
        line.handlers[node] = Sick(line.handlers[node], refuses)
    config = config_of(records, network={"deadline": 0.02, "patience": 0.1, "quorum": 2})
    with pytest.raises(RunError, match=r"Round 1: 1 of 3 clients answered, 2 are needed \(client 1 refused: no disk"):
        run(config, out=tmp_path / "run", line=line)
    assert len(rounds_of(tmp_path / "run")) == 1
    assert resume(tmp_path / "run", line=FakeLine(healthy)).digest == unbroken


def test_too_few_clients_at_the_start_end_in_a_sentence(records, tmp_path):
    line = FakeLine({10: resident(0).answer})
    config = config_of(records, network={"patience": 1e-6})
    with pytest.raises(RunError, match=r"Only 1 of 3 clients are there after 1e-06 s, clients 1, 2 are not"):
        run(config, out=tmp_path / "run", line=line)
    waiting = [text for *_, text in events_of(tmp_path / "run") if "Waiting" in text]
    assert waiting == ["Waiting for clients 1, 2: 1 are there, 3 are wanted."]


def garbage(request, answer):
    return b"\2 this is no reply"


def of_another_round(request, answer):
    done = decode_answer(answer)
    reply = decode_reply(done.reply)
    return encode_answer(replace(done, reply=encode_reply(replace(reply, round=reply.round + 1))))


def of_another_client(request, answer):
    done = decode_answer(answer)
    return encode_answer(replace(done, reply=encode_reply(replace(decode_reply(done.reply), client=0))))


def too_short(request, answer):
    done = decode_answer(answer)
    reply = decode_reply(done.reply)
    return encode_answer(replace(done, reply=encode_reply(replace(reply, slopes=reply.slopes[:-1]))))


def empty(request, answer):
    return b""


@pytest.mark.parametrize("forge", [garbage, of_another_round, of_another_client, too_short, empty])
def test_what_is_no_reply_is_dropped_and_told(records, tmp_path, forge):
    line = line_of()
    line.handlers[11] = Sick(line.handlers[11], lambda sick, request: forge(request, sick.inner(request)))
    run(config_of(records), out=tmp_path / "run", line=line)
    assert [[e.task.client for e in done.entries] for done in rounds_of(tmp_path / "run")] == [[0, 2]] * 4
    assert sum(kind == "absent" and "client 1" in text for _, kind, text in events_of(tmp_path / "run")) == 4


def test_a_replayed_reply_is_dropped(records, tmp_path):
    line, first = line_of(), []

    def replays(sick, request):
        first.append(sick.inner(request))
        return first[0]

    line.handlers[11] = Sick(line.handlers[11], replays)
    run(config_of(records), out=tmp_path / "run", line=line)
    assert [len(done.entries) for done in rounds_of(tmp_path / "run")] == [3, 2, 2, 2]
    assert any("of client 1 for round 0, asked for" in text for _, _, text in events_of(tmp_path / "run"))


def test_two_clients_with_one_number(records, tmp_path, unbroken):
    line, heard = line_of(), []
    line.handlers[13] = build_resident(ClientOptions(client=1, trusting=True), say=heard.append).answer
    line.online.add(13)
    assert run(config_of(records), out=tmp_path / "run", line=line).digest == unbroken
    assert any("A second client says it is client 1" in text for *_, text in events_of(tmp_path / "run"))
    kinds = {finding.kind for finding in diagnose(tmp_path / "run").findings}
    assert "turned-away" in kinds and "silent-client" not in kinds
    assert any("give this one another --id" in text for text in heard)


def test_a_node_that_fails_at_its_greeting_is_asked_again_and_told_of_once(records, tmp_path, unbroken):
    line, greeted = line_of(), []
    healthy = line.handlers[11]

    def slow_to_load(request):
        greeted.append(request)
        if len(greeted) < 4:
            raise Crash("no worker yet")
        return healthy(request)

    line.handlers[11] = slow_to_load
    assert run(config_of(records), out=tmp_path / "run", line=line).digest == unbroken
    assert sum("no worker yet" in text for *_, text in events_of(tmp_path / "run")) == 1


def test_a_number_the_run_does_not_have(records, tmp_path, unbroken):
    line, heard = line_of(), []
    line.handlers[13] = build_resident(ClientOptions(client=3, trusting=True), say=heard.append).answer
    line.online.add(13)
    assert run(config_of(records), out=tmp_path / "run", line=line).digest == unbroken
    assert any("clients 0 to 2, got --id 3" in text for text in heard)


def test_another_base_model_is_refused_at_the_handshake(records, tmp_path):
    line = line_of(2)
    heard = []
    line.handlers[12] = build_resident(ClientOptions(client=2, trusting=True), say=heard.append).answer
    genuine = line.handlers[12]

    def elsewhere(request):
        told = decode_request(request)
        return genuine(encode_request(replace(told, fingerprint="0" * 64)) if isinstance(told, Hello) else request)

    line.handlers[12] = elsewhere
    line.online.add(12)
    config = config_of(records, network={"clients": 2})
    run(config, out=tmp_path / "run", line=line)
    assert all(len(done.entries) == 2 for done in rounds_of(tmp_path / "run"))
    assert (
        len(heard) == 1 and "Client 2 has another base model" in heard[0] and "give it the server's model" in heard[0]
    )


@pytest.mark.parametrize("name", ["protocol", "wire", "noise", "package"])
def test_another_version_is_refused_by_name(name):
    hello = Hello("r", __version__, WIRE_VERSION, 1, "f", "l", "{}")
    refuse_strangers(hello)
    other = replace(hello, **{name: "9.9" if name == "package" else 99})
    with pytest.raises(RunError, match=f"The server has {name} version 9.?9, this client .*; install one version"):
        refuse_strangers(other)


def test_a_client_sets_its_data_and_machine_and_nothing_else():
    build_resident(ClientOptions(client=0, settings=("data.path=x", "runtime.threads=2", "model.name=y")))
    with pytest.raises(ConfigError, match=r"--set algorithm.rate=1: a client sets data"):
        build_resident(ClientOptions(client=0, settings=("algorithm.rate=1",)))


def test_a_worker_that_forgot_the_run_is_told_again(records, tmp_path, unbroken):
    line = line_of()

    def forgets(sick, request):
        if sick.walks == 2:
            sick.inner = resident(1).answer
        return sick.inner(request)

    line.handlers[11] = Sick(line.handlers[11], forgets)
    config = config_of(records, network={"quorum": 3})
    assert run(config, out=tmp_path / "run", line=line).digest == unbroken


def test_an_error_inside_a_client_is_a_refusal_and_the_client_lives():
    heard = []
    own = build_resident(ClientOptions(client=0, trusting=True), say=heard.append)
    assert decode_answer(own.answer(b"\1{")) == Refused(heard[0])
    assert decode_answer(own.answer(encode_request(Walk(bytes(8), b"x")))) == Stranger()
    assert decode_answer(own.answer(encode_request(Notice("hello")))) == Noted()
    assert heard[-1] == "hello"


# --- bytes of the calls -----------------------------------------------------------------------------------------------

REQUESTS = [
    Hello("r", "p", 3, 1, "f", "l", '{"a": 1}'), Walk(b"12345678", b"task"), Notice("one sentence"),
    Addend(b"12345678", b"task"),
]  # fmt: skip
ANSWERS = [
    Welcome("r", 3, "ab", 5, 7, exact=False), Done(b"reply", 3, 2**40, 1.5), Behind(9), Stranger(), Refused("no"),
    Noted(), Share(b"\0\0\x80?" * 3),
]  # fmt: skip


def test_calls_come_back_as_they_were():
    assert [decode_request(encode_request(one)) for one in REQUESTS] == REQUESTS
    assert [decode_answer(encode_answer(one)) for one in ANSWERS] == ANSWERS


@pytest.mark.parametrize("decode", [decode_request, decode_answer])
@given(data=st.one_of(st.binary(max_size=60), st.sampled_from([encode_request(r) for r in REQUESTS])))
def test_any_bytes_are_a_call_or_a_wire_error(decode, data):
    try:
        decode(data)
    except WireError as error:
        assert str(error).endswith(".")


def test_a_hello_needs_every_field_of_its_type():
    body = json.loads(encode_request(REQUESTS[0])[1:])
    for change in ({"wire": True}, {"wire": -1}, {"run": 3}, {"more": 1}):
        with pytest.raises(WireError):
            decode_request(b"\1" + json.dumps(body | change).encode())
    with pytest.raises(WireError, match="at most"):
        decode_request(b"\1" + b" " * (calls.MAX_JSON + 1))


def test_a_sentence_cannot_order_a_terminal():
    told = decode_answer(b"\5" + b"red \x1b[31m\r\nnext line " + b"x" * 9000)
    assert "\x1b" not in told.text and "\n" not in told.text and len(told.text) <= calls.MAX_SENTENCE


# What a server may name on a client's machine


def test_a_client_reads_no_file_that_nobody_at_it_has_named(records, tmp_path):
    config = config_of(records)
    line = line_of(trusting=False)
    config = config.model_copy(update={"network": config.network.model_copy(update={"patience": 0.05})})
    with pytest.raises(RunError):
        run(config, out=tmp_path / "run", line=line)
    said = {answer[1:].decode() for _, _, answer in line.log if answer[:1] == b"\5"}
    (sentence,) = said
    assert f"names data.path = '{records}' on this machine, which nobody here has confirmed" in sentence
    assert f"--set data.path={records}, with data of its own by --data, or with --trust" in sentence


def test_a_word_of_the_client_s_own_is_enough(records, tmp_path):
    config = config_of(records)
    own = line_of(trusting=False, settings=(f"data.path={records}",))
    named = run(config, out=tmp_path / "named", line=own)
    assert named.digest == run(config, out=tmp_path / "trusted", line=line_of()).digest


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ({"model": {"name": "someone/model"}}, "model.name"),
        ({"model": {"name": "./folder"}}, "model.name"),
        ({"data": {"name": "someone/data"}}, "data.name"),
        ({"data": {"path": "${HOME}/.ssh/id_rsa"}}, "data.path"),
        ({"data": {"eval_path": "/etc/passwd"}}, "data.eval_path"),
    ],
)
def test_what_a_server_names_needs_a_word(section, key):
    config = parse_config(section)
    value = section[key.split(".")[0]][key.split(".")[1]]
    with pytest.raises(ConfigError, match=re.escape(f"names {key} = '{value}'")):
        refuse_unasked(config, (), own=False)
    refuse_unasked(config, (f"{key}={value}",), own=False)
    if key.startswith("data."):
        refuse_unasked(config, (), own=True)


@pytest.mark.parametrize("name", ["builtin:skills", "gsm8k"])
def test_built_in_things_need_no_word(name):
    refuse_unasked(parse_config({"model": {"name": "smollm2-135m"}, "data": {"name": name}}), (), own=False)
