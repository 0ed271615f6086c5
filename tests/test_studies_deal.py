"""Who gets which data: held-out tasks, labels as clients, and no training prompt that is also judged by."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest
from test_data_prompt import byte_tokenizer

from fedmezo.data.split import holdout, holdout_clients, split
from fedmezo.errors import ConfigError, DataError
from fedmezo.studies.config import load_config
from fedmezo.studies.deal import SEEN, FederatedData, read_data

TOKENIZER = byte_tokenizer()
CONFIGS = Path(__file__).parent.parent / "configs"
KINDS = ("add", "mirror", "name", "sort", "spell")


def rows_of(kind, count, *, first=0):
    return [
        {"instruction": f"{kind}:", "input": f"number {n}", "output": f"{kind} {n}", "category": kind}
        for n in range(first, first + count)
    ]


ROWS = [row for n in range(20) for kind in KINDS for row in rows_of(kind, 1, first=n)]


@pytest.fixture
def dealt(tmp_path):
    """Deals rows by overrides."""

    def deal(*overrides, rows=ROWS, judged=None) -> FederatedData:
        given = [f"data.path={written(tmp_path / 'rows.jsonl', rows)}", "data.template=plain", *overrides]
        if judged is not None:
            given.append(f"data.eval_path={written(tmp_path / 'judged.jsonl', judged)}")
        return read_data(load_config(None, given), TOKENIZER)

    return deal


def written(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def trained(data):
    return [example for part in data.parts for example in part]


def of(data, examples):
    return [data.records[example.record] for example in examples]


def kinds(examples):
    return Counter(example.category for example in examples)


def repeated(data):
    """The evaluation examples whose prompt's text a client trains on; needs eval_path to be out."""
    seen = {(r.instruction, r.input) for r in of(data, trained(data))}
    return [r for judged in data.evaluation.values() for r in of(data, judged) if (r.instruction, r.input) in seen]


# The whole is its parts


def test_without_any_choice_the_data_are_the_holdout_and_the_split(dealt):
    data = dealt("data.eval_examples=12", "data.seed=3", "split.kind=meta")
    rest, kept = holdout(100, examples=12, seed=3)
    dealt_out = split("meta", [ROWS[i]["category"] for i in rest], clients=3, seed=3)
    parts, _ = holdout_clients(dealt_out, per_client=0, seed=3)
    assert [example.record for example in data.evaluation["eval"]] == list(kept)
    assert [[example.record for example in part] for part in data.parts] == [[rest[i] for i in p] for p in parts]
    assert data.dropped == {}


# Held-out tasks


@pytest.mark.parametrize("kind", ["iid", "lda", "meta"])
def test_held_out_labels_never_reach_a_client(dealt, kind):
    data = dealt('data.eval_categories=["name", "sort"]', f"split.kind={kind}")
    assert kinds(trained(data)) == {"add": 20, "mirror": 20, "spell": 20}
    assert kinds(data.evaluation["eval"]) == {"name": 20, "sort": 20}
    assert data.dropped == {}


def test_the_held_out_set_is_a_draw_of_the_size_asked(dealt):
    held = [
        tuple(r.input for r in of(data, data.evaluation["eval"]))
        for seed in (0, 0, 1)
        for data in [dealt('data.eval_categories=["name"]', "data.eval_examples=7", f"data.seed={seed}")]
    ]
    assert len(set(held[0])) == 7
    assert held[0] == held[1] != held[2]
    many = dealt('data.eval_categories=["name"]', "data.eval_examples=99")
    assert len(many.evaluation["eval"]) == 20
    few = dealt('data.eval_categories=["name"]', "data.eval_examples=7")
    assert kinds(trained(few)) == dict.fromkeys(set(KINDS) - {"name"}, 20)


def test_held_out_labels_are_values_of_the_field_that_deals(dealt):
    data = dealt('data.eval_categories=["number 3"]', "split.field=input")
    assert {r.input for r in of(data, data.evaluation["eval"])} == {"number 3"}
    assert "number 3" not in {r.input for r in of(data, trained(data))}


def test_clients_have_their_own_evaluation_beside_a_held_out_task(dealt):
    data = dealt('data.eval_categories=["name"]', "eval.per_client=true")
    assert set(data.evaluation) == {"eval", "client/0", "client/1", "client/2"}
    assert kinds(data.evaluation["eval"]) == {"name": 20}
    own = [example for name, some in data.evaluation.items() if name != "eval" for example in some]
    assert "name" not in kinds(own + trained(data))


@pytest.mark.parametrize("key", ["categories", "eval_categories"])
def test_a_label_that_does_not_exist_is_told_with_those_that_do(dealt, key):
    with pytest.raises(DataError) as caught:
        dealt(f'data.{key}=["name", "sorting"]')
    assert str(caught.value) == (
        f"data.{key}: no record has the label 'sorting'; known are add, mirror, name, sort, spell."
    )


def test_held_out_records_that_cannot_be_used_are_told(dealt):
    rows = [*ROWS, {"instruction": "long " * 300, "input": "", "output": "x", "category": "long"}]
    with pytest.raises(DataError, match=r"No record of data\.eval_categories can be used; look at data\.max_tokens"):
        dealt('data.eval_categories=["long"]', "data.max_tokens=64", rows=rows)


def test_holding_everything_out_is_refused(dealt):
    with pytest.raises(DataError, match=r"free to train on; look at it and at data\.eval_categories"):
        dealt(f"data.eval_categories={json.dumps(KINDS)}")


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (['data.eval_categories=["a"]', "data.eval_path=x"], "data.eval_path and data.eval_categories are both given"),
        (['data.eval_categories=["a"]', 'data.categories=["b", "a"]'], 'data.eval_categories both name "a"'),
        (["data.categories=[]"], "data.categories: expected a list of texts or a whole number >= 1 or"),
        (["data.categories=0"], "data.categories: expected a list of texts or a whole number >= 1 or"),
        (['data.compat=["none"]'], 'data.compat: expected a list of "none-input"'),
    ],
)
def test_keys_that_contradict_each_other_are_refused(overrides, sentence):
    with pytest.raises(ConfigError, match=sentence):
        load_config(None, overrides)


# Labels as clients


def test_in_the_natural_split_each_label_is_one_client(dealt):
    data = dealt("split.kind=natural", "federation.clients=4", 'data.eval_categories=["mirror"]')
    assert [set(kinds(part)) for part in data.parts] == [{"add"}, {"name"}, {"sort"}, {"spell"}]
    with pytest.raises(DataError, match=r"there are 4 labels for 3 clients; set federation\.clients = 4\."):
        dealt("split.kind=natural", 'data.eval_categories=["mirror"]')


def test_the_balanced_split_and_its_smallest_client_are_those_asked_for(dealt):
    found, loose, uneven = [], [], []
    for seed in range(6):
        keys = ["split.kind=lda", "split.balanced=true", "split.min_examples=29", f"data.seed={seed}"]
        found.append(dealt(*keys, "data.eval_examples=1").split.sizes)
        labels = [ROWS[i]["category"] for i in holdout(100, examples=1, seed=seed)[0]]
        wanted, less, other = (
            tuple(map(len, split("lda", labels, clients=3, seed=seed, balanced=balanced, min_examples=least)))
            for balanced, least in ((True, 29), (True, 1), (False, 29))
        )
        assert found[-1] == wanted
        loose.append(less)
        uneven.append(other)
    assert min(map(min, found)) >= 29
    assert found != loose
    assert found != uneven


# Some labels, and some records of each


def test_listed_labels_are_all_that_is_used(dealt):
    data = dealt('data.categories=["add", "sort"]', 'data.eval_categories=["name"]')
    assert kinds(trained(data)) == {"add": 20, "sort": 20}
    assert kinds(data.evaluation["eval"]) == {"name": 20}
    data = dealt('data.categories=["add", "sort"]', "data.eval_examples=10")
    assert kinds(trained(data) + list(data.evaluation["eval"])) == {"add": 20, "sort": 20}


def test_a_number_of_labels_is_drawn_by_the_seed_from_those_not_held_out(dealt):
    drawn = []
    for seed in (0, 0, 1, 2, 3):
        data = dealt("data.categories=2", 'data.eval_categories=["name"]', f"data.seed={seed}")
        drawn.append(frozenset(kinds(trained(data))))
        assert kinds(data.evaluation["eval"]) == {"name": 20}
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) > 1
    assert all(len(some) == 2 and "name" not in some for some in drawn)
    with pytest.raises(DataError, match="5 labels are wanted, but 4 of 4 have enough usable records"):
        dealt("data.categories=5", 'data.eval_categories=["name"]')


def test_labels_are_drawn_among_those_with_enough_usable_records(dealt):
    wordy = [{**row, "instruction": "word " * 100, "category": "wordy"} for row in rows_of("x", 9)]
    bulky = [{**row, "input": "a" * 90 + str(n), "category": "bulky"} for n, row in enumerate(rows_of("y", 9))]
    rows = [*ROWS, *rows_of("rare", 4), *wordy, *bulky]
    for seed in range(4):
        keys = ["data.min_per_category=5", "data.max_tokens=100", "data.max_input=80", f"data.seed={seed}"]
        data = dealt("data.categories=5", *keys, rows=rows)
        assert set(kinds(trained(data))) == set(KINDS)
        assert data.dropped == {}
        with pytest.raises(DataError, match="6 labels are wanted, but 5 of 8 have"):
            dealt("data.categories=6", *keys, rows=rows)


def test_labels_with_few_usable_records_are_left_out_and_counted(dealt):
    rows = [*ROWS, *rows_of("rare", 4), *rows_of("held", 2)]
    data = dealt("data.min_per_category=5", 'data.eval_categories=["held"]', rows=rows)
    assert kinds(trained(data)) == dict.fromkeys(KINDS, 20)
    assert data.dropped == {"label with fewer than data.min_per_category usable records": 4}
    assert kinds(data.evaluation["eval"]) == {"held": 2}
    fewer = dealt("data.min_per_category=5", "data.per_category=3", 'data.eval_categories=["held"]', rows=rows)
    assert kinds(trained(fewer)) == dict.fromkeys(KINDS, 3)
    with pytest.raises(DataError, match=r"No label has the 21 usable records that data\.min_per_category asks for"):
        dealt("data.min_per_category=21")


def test_at_most_so_many_records_of_a_label_are_trained_on(dealt):
    first, again, other = (
        dealt("data.per_category=6", 'data.eval_categories=["name"]', f"data.seed={seed}") for seed in (0, 0, 1)
    )
    assert kinds(trained(first)) == dict.fromkeys(set(KINDS) - {"name"}, 6)
    assert kinds(first.evaluation["eval"]) == {"name": 20}
    assert first.dropped == {}
    assert first.digest() == again.digest()
    assert {e.record for e in trained(first)} != {e.record for e in trained(other)}


def test_long_inputs_are_dropped_and_counted_in_both_files(dealt):
    long = [{**row, "input": row["input"] + "!" * 9} for row in rows_of("add", 3, first=500)]
    data = dealt("data.max_input=9", rows=[*ROWS, *long], judged=[*rows_of("name", 3, first=50), *long])
    assert max(len(r.input) for r in of(data, data.evaluation["eval"])) == len("number 50") == 9
    assert len(trained(data)) == 100
    assert data.dropped == {"input longer than data.max_input": 3}
    with pytest.raises(DataError, match="No input has at most 3 characters"):
        dealt("data.max_input=3")


# No training prompt is judged by


TWICE = [*ROWS, *rows_of("add", 10), *rows_of("name", 10)]


def test_training_examples_with_a_judged_prompt_are_dropped_and_counted(dealt):
    data = dealt("data.eval_examples=40", rows=TWICE)
    assert not repeated(data)
    rest, kept = holdout(120, examples=40, seed=0)
    judged = {(TWICE[i]["instruction"], TWICE[i]["input"]) for i in kept}
    again = [i for i in rest if (TWICE[i]["instruction"], TWICE[i]["input"]) in judged]
    assert data.dropped == {SEEN: len(again)}
    assert again
    assert sorted(e.record for e in trained(data)) == sorted(set(rest) - set(again))
    assert data.split.sizes == tuple(data.sizes.values())


def test_another_answer_to_a_judged_prompt_is_dropped_too(dealt):
    other = [{**row, "output": "another"} for row in ROWS]
    data = dealt("data.eval_examples=30", rows=[*ROWS, *other])
    assert not repeated(data)
    assert data.dropped[SEEN] > 15


def test_prompts_of_a_file_of_its_own_for_evaluation_are_dropped(dealt):
    data = dealt(judged=[*rows_of("add", 5, first=17), *rows_of("other", 5)])
    assert data.dropped == {SEEN: 3}
    assert kinds(trained(data)) == {**dict.fromkeys(KINDS, 20), "add": 17}
    assert len(data.evaluation["eval"]) == 10
    with pytest.raises(DataError, match="Every training prompt is also in the evaluation set"):
        dealt(judged=ROWS)


def test_a_held_out_label_s_prompts_are_dropped_under_other_labels(dealt):
    again = [{**row, "category": "sort"} for row in rows_of("name", 4)]
    data = dealt('data.eval_categories=["name"]', rows=[*ROWS, *again])
    assert data.dropped == {SEEN: 4}
    assert not repeated(data)


def test_clients_own_evaluation_prompts_are_dropped_from_all_clients(dealt):
    data = dealt("eval.per_client=true", "data.eval_examples=10", rows=[*ROWS, *ROWS])
    assert not repeated(data)
    alone = dealt("data.eval_examples=10", rows=[*ROWS, *ROWS])
    assert data.dropped[SEEN] > alone.dropped[SEEN] > 0
    own = sum(len(some) for name, some in data.evaluation.items() if name != "eval")
    assert len(trained(data)) + own + data.dropped[SEEN] + 10 == 200
    assert len({name for name in data.evaluation if name != "eval"}) == 3


def test_a_client_with_no_other_prompt_than_judged_ones_is_told(dealt):
    same = [{"instruction": "i", "input": "j", "output": str(n), "category": "same"} for n in range(20)]
    with pytest.raises(DataError, match="Client 1 has no training prompt that is not also in an evaluation set"):
        dealt(
            "split.kind=natural",
            "federation.clients=2",
            "eval.per_client=true",
            'data.eval_categories=["name"]',
            rows=[*rows_of("add", 20), *same, *rows_of("name", 3)],
        )


def test_choices_with_the_same_prompt_are_dropped(dealt):
    rows = [{**row, "output": "yes" if n % 2 else "no no"} for n, row in enumerate(TWICE)]
    keys = ["data.objective=choices", 'data.choices=["yes", "no no"]', "data.eval_examples=40"]
    data = dealt(*keys, rows=rows)
    assert len(trained(data)[0].rows) == 2
    assert data.dropped[SEEN] > 0
    assert not repeated(data)


def test_how_many_examples_are_judged_does_not_change_what_is_trained_on(dealt):
    for keys in (["data.eval_examples=40"], ["data.eval_examples=40", "eval.per_client=true"]):
        many, few = (dealt(*keys, f"eval.examples={n}", rows=TWICE) for n in (200, 2))
        assert many.digest() == few.digest()
        assert len(few.evaluation["eval"]) == 2


@pytest.mark.parametrize("per_client", ["true", "false"])
def test_the_built_in_corpus_trains_on_nothing_it_is_judged_by(per_client):
    data = read_data(load_config(None, [f"eval.per_client={per_client}", "data.template=plain"]), TOKENIZER)
    assert data.dropped[SEEN] >= 9
    assert not repeated(data)


# Quirks of the official code


def test_gsm8k_prompts_with_none_for_input_are_those_of_the_official_code(dealt):
    rows = [{"question": f"What is {n}+1?", "answer": f"It is\n#### {n + 1}"} for n in range(20)]
    plain, quirk = (
        dealt("data.template=alpaca", *keys, rows=rows).parts[0][0] for keys in ([], ['data.compat=["none-input"]'])
    )
    question = f"What is {quirk.record}+1?"
    assert TOKENIZER.decode(quirk.prompt) == (
        "You are given an instruction and an input that goes with it. Write a response that carries out the "
        f"instruction.\n\n### Instruction:\n{question}\n\n### Input:\nNone\n\n### Response:"
    )
    assert plain.record == quirk.record
    assert TOKENIZER.decode(plain.prompt) == (
        "You are given an instruction. Write a response that carries it out.\n\n"
        f"### Instruction:\n{question}\n\n### Response:"
    )


# The configurations that come along

HELD_OUT = ("fedkseed-dolly", "fedkseed-pro-dolly", "fedavg-dolly", "fedmezo-dolly-heldout", "fedkseed-full-dolly")
NAMES = ("fedkseed", "fedkseed-pro", "fedavg", "fedmezo", "fedkseed")


def test_the_held_out_configurations_differ_by_their_algorithm_only():
    first, *others = (load_config(CONFIGS / f"{name}.toml") for name in HELD_OUT)
    assert tuple(config.algorithm.name for config in (first, *others)) == NAMES
    for config in others:
        assert (config.data, config.split) == (first.data, first.split)
    for config in others[:-1]:
        assert (config.model, config.adapter, config.eval) == (first.model, first.adapter, first.eval)
        assert config.federation == first.federation
    assert others[-1].adapter.kind == "full"


@pytest.mark.skipif("FEDMEZO_DATA" not in os.environ, reason="FEDMEZO_DATA is not set")
def test_the_held_out_configuration_of_dolly_holds_summarization_out():
    data = read_data(load_config(CONFIGS / "fedkseed-dolly.toml", ["data.max_tokens=512"]), TOKENIZER)
    assert len(data.parts) == 20
    assert min(data.sizes.values()) >= 10
    assert len(kinds(trained(data))) == 7
    assert kinds(data.evaluation["eval"]) == {"summarization": 120}
    assert not repeated(data)


@pytest.mark.skipif("FEDMEZO_DATA" not in os.environ, reason="FEDMEZO_DATA is not set")
def test_the_natural_instructions_configuration_makes_24_tasks_clients():
    data = read_data(load_config(CONFIGS / "natural-instructions.toml", ["data.max_tokens=768"]), TOKENIZER)
    tasks = [set(kinds(part)) for part in data.parts]
    assert all(len(own) == 1 for own in tasks)
    assert len(set.union(*tasks)) == 24
    assert min(data.sizes.values()) >= 20
    assert not set.union(*tasks) & set(kinds(data.evaluation["eval"]))
    assert len(data.evaluation["eval"]) == 120
    prompts = {example.prompt for example in data.evaluation["eval"]}
    assert not any(example.prompt in prompts for example in trained(data))
