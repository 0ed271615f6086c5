"""docs/contracts.md: each contract is pinned by values that older runs and other machines rely on.

A value here changes only together with its contract's version; docs/contracts.md says what follows from that. The
values were made by the expressions they are compared with, on Linux, x86-64, Python 3.11; sums are correctly rounded,
so that no vector unit or library has a say in them.
"""

import hashlib
import math
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from toys import ToyBench

import fedmezo
from fedmezo.data.batches import Batches
from fedmezo.data.split import split
from fedmezo.fl.algorithm import Algorithm, Bench, Point, Reply, Task
from fedmezo.runtime.binary import OLDEST_VERSION, WIRE_VERSION
from fedmezo.runtime.calls import PROTOCOL
from fedmezo.runtime.chain import digest_of
from fedmezo.runtime.sqlitefile import APPLICATION_ID, FORMAT, TABLES
from fedmezo.zo.noise import NOISE_VERSION
from fedmezo.zo.params import Params
from fedmezo.zo.perturb import apply_
from fedmezo.zo.seedsum import DenseDelta, SeedSum, Update, Walk

SPLITS = {"iid": "6e3f4ca5", "lda": "a6d7d3ef", "meta": "a340db68", "natural": "cc7d91a2"}
PAGE = Path(__file__).parent.parent / "docs" / "contracts.md"
SETTINGS = fedmezo.Settings(rate=0.0625, mu=1 / 128, steps=4, clip=math.inf)


def params():
    return Params({"b": torch.arange(20).reshape(4, 5) / 8, "a": torch.arange(7) / -4})


def loss(tensors, client, _round, step):
    values = [value for name in sorted(tensors) for value in tensors[name].flatten().tolist()]
    return 0.5 * math.fsum((value - client - step / 4) ** 2 for value in values)


def names(kind):
    return [field.name for field in fields(kind)]


def test_the_page_names_every_contract_with_the_version_that_the_code_has():
    text = PAGE.read_text(encoding="utf-8")
    told = dict(re.findall(r"^## (.+), version (\d+)$", text, re.MULTILINE))
    assert told == {
        "Noise": str(NOISE_VERSION),
        "Parameters": "1",
        "Update algebra": "1",
        "Messages": str(WIRE_VERSION),
        "Calls between machines": str(PROTOCOL),
        "Journal": str(FORMAT),
        "Algorithm": "1",
        "Bench": "1",
        "Data": "1",
    }
    assert f"versions {OLDEST_VERSION} and {OLDEST_VERSION + 1} are still read" in text


def test_the_page_points_at_tests_that_are_there():
    pointed = re.findall(r"`(test_\w+\.py)::(test_\w+)`", PAGE.read_text(encoding="utf-8"))
    assert len(pointed) >= 12
    for file, name in pointed:
        assert re.search(rf"^def {name}\(", (Path(__file__).parent / file).read_text(), re.MULTILINE), (file, name)


def test_the_page_names_every_field_of_what_others_write_code_against():
    text = PAGE.read_text(encoding="utf-8")
    for kind in (Algorithm, Task, Reply, Point):
        assert [name for name in names(kind) if f"`{name}`" not in text] == []
    assert [name for name in vars(Bench) if not name.startswith("_") and f"`{name}`" not in text] == []


def test_the_layout_of_parameters_is_pinned():
    assert params().layout() == LAYOUT
    assert params().digest() == BEFORE


def test_what_a_round_adds_is_pinned_to_the_bit():
    got = params()
    walk = Walk((7, 2**64 - 1), (0.3, -0.1))
    dense = DenseDelta({name: torch.full_like(tensor, 0.25) for name, tensor in got})
    apply_(got, Update((walk, dense), (0.7, 0.2)), law="gaussian")
    assert got.digest() == AFTER_AN_UPDATE
    assert SeedSum.of([(9, 0.1), (2, 1.0), (9, 0.2)]) == SeedSum((2, 9), (1.0, 0.30000000000000004))


def test_five_rounds_of_fedmezo_are_pinned_to_the_bit():
    bench = ToyBench(params(), loss)
    algorithm = fedmezo.fedmezo(SETTINGS, seed=5, cohort=2)
    state = algorithm.init()
    for _ in range(5):
        tasks = algorithm.plan(state, (0, 1, 2))
        state, update = algorithm.aggregate(state, tasks, algorithm.client(tasks, bench))
        apply_(bench.params, update, law="gaussian")
    assert bench.params.digest() == AFTER_FIVE_ROUNDS


def test_what_an_algorithm_and_a_bench_are_is_pinned():
    assert names(Algorithm) == [
        "init", "plan", "client", "aggregate", "slow_down", "with_factors", "sums", "gather", "remarks",
    ]  # fmt: skip
    assert {name for name in vars(Bench) if not name.startswith("_")} == {
        "params", "capacity", "open", "losses", "each", "examples", "gradient",
    }  # fmt: skip
    assert names(Point) == ["params", "seed", "offset", "client", "round", "step", "draw"]


def test_the_tables_of_the_journal_and_its_chain_are_pinned():
    text = "\n".join(f"{table}: {' '.join(columns.split())}" for table, columns in TABLES.items())
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == TABLES_DIGEST
    assert (APPLICATION_ID, FORMAT) == (0x464D5A4A, 1)
    rows = {table: [] for table in TABLES} | {"events": [(3, "slow", "0.5"), (3, "look", None)]}
    assert digest_of(b"\1" * 32, (4, 3), rows).hex()[:16] == LINK


@pytest.mark.parametrize(("kind", "digest"), sorted(SPLITS.items()))
def test_who_gets_which_records_and_batches_is_pinned(kind, digest):
    labels = [f"task {n % 4}" for n in range(24)]
    options = {"clients": 4 if kind == "natural" else 3, "seed": 11}
    parts = split(kind, labels, **options)
    batches = Batches(parts, batch_size=3, local_steps=2, seed=11)
    told = [[batches(client, turn, 1) for turn in range(3)] for client in range(options["clients"])]
    assert hashlib.sha256(repr((parts, told)).encode()).hexdigest()[:8] == digest


LAYOUT = "c9d69892d7e1614d9678e3f3b52095723c58e902dc6309733a747e9d4abf2a93"
BEFORE = "31935a69958fdb614b3421c61a08a41bbe354aa865b63aa5999b58c197ff836c"
AFTER_AN_UPDATE = "0674a49c844003ab60061109c1f38dfc3650a53b4c046ab637db97de78b5ac23"
AFTER_FIVE_ROUNDS = "56910ec58d514e404619026559d329824fa0a73bdcb198b39cde95b6ad7fb692"
TABLES_DIGEST = "427be628bfb71624"
LINK = "67db0e3d8e4d89d6"
