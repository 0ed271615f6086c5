"""The built-in corpus and the tiny model pretrained on it."""

import hashlib
import re
from collections import Counter
from importlib.resources import files

import pytest

from fedmezo.data.skills import CATEGORIES, CHOICE_CATEGORIES, skills
from fedmezo.errors import DataError

GOLDEN_CORPUS = "a08ef387f10e50a6"


def made(category: str, count: int = 300):
    return skills(count=count, seed=3, categories=[category])


def test_the_corpus_is_a_pure_function_of_its_arguments():
    assert skills(count=50, seed=1) == skills(count=50, seed=1)
    assert skills(count=50, seed=1) != skills(count=50, seed=2)
    assert skills(count=20, seed=1) == skills(count=50, seed=1)[:20]


# Of the corpus itself; pins the texts that the tiny model and the results of the demo are made of.
def test_golden_corpus():
    text = repr([(r.instruction, r.input, r.output, r.category, r.choices) for r in skills(count=1100, seed=0)])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == GOLDEN_CORPUS


def test_categories_come_in_turn():
    counts = Counter(record.category for record in skills(count=110, seed=0))
    assert counts == dict.fromkeys(CATEGORIES, 10)


def test_every_record_has_text_and_an_answer_among_its_choices():
    for record in skills(count=1100, seed=5):
        assert record.instruction
        assert record.input
        assert record.output
        assert bool(record.choices) == (record.category in CHOICE_CATEGORIES)
        assert not record.choices or record.output in record.choices


@pytest.mark.parametrize("category", CATEGORIES)
def test_records_are_varied_and_other_seeds_give_others(category):
    one = {(r.instruction, r.input) for r in made(category)}
    other = {(r.instruction, r.input) for r in skills(count=300, seed=4, categories=[category])}
    assert len(one) > 240
    assert len(one & other) < 60


def test_the_whole_corpus_is_varied_and_other_seeds_give_others():
    one = {(r.instruction, r.input) for r in skills(count=5500, seed=3)}
    other = {(r.instruction, r.input) for r in skills(count=5500, seed=4)}
    assert len(one) > 5000
    assert len(one & other) < 0.08 * len(other)


@pytest.mark.parametrize("category", CHOICE_CATEGORIES)
def test_no_choice_is_rare(category):
    counts = Counter(record.output for record in made(category))
    assert set(counts) == set(made(category)[0].choices)
    assert min(counts.values()) > 300 / len(counts) * 0.7


def test_comparisons_are_right():
    for record in made("compare"):
        first, second = map(int, re.findall(r"\d+", record.input))
        assert first != second
        assert record.output == ("first" if first > second else "second")


def test_sorted_and_reversed_words_are_right():
    for record in made("sorting"):
        assert record.output.split(", ") == sorted(record.input.split(", "))
    for record in made("reverse"):
        assert record.output.split() == record.input.split()[::-1]


def test_initials_are_right():
    for record in made("initials"):
        assert record.output == " ".join(f"{word[0]}." for word in record.input.split())


def test_what_is_found_is_what_was_asked_for():
    form = re.compile(r"On (?P<date>\d+ \w+) (?P<buyer>\w+) paid (?P<amount>\d+ dollars) in (?P<city>\w+) for a \w+\.")
    for record in made("extract"):
        what = record.instruction.removeprefix("Find the ").removesuffix(".")
        assert record.output == form.fullmatch(record.input)[what]
    for record in made("pairs"):
        name = re.fullmatch(r"What does (\w+) have\?", record.instruction)[1]
        assert f"{name}: {record.output}" in record.input


def test_chains_of_comparison_are_right():
    for record in made("follows"):
        order = re.match(r"(\w+) is \w+ than (\w+)\. \2 is \w+ than (\w+)\. Is (\w+) \w+ than (\w+)\?", record.input)
        a, _, c, asked, other = order.groups()
        assert {asked, other} == {a, c}
        assert record.output == ("yes" if (asked, other) == (a, c) else "no")


# Cue words written apart from the generator's lists; each message of a label holds one of its own and none of the rest.
CUES = {
    "routing": {
        "green": r"parcel|courier|delivered|box was|Tracking|send the",
        "blue": r"charged|invoice|refund|declined|fee of|receipt",
        "red": r"password|locked|no code|email address|logged in to|login page",
    },
    "priority": {
        "apple": r"right now|before noon|cannot work|are waiting|emergency",
        "lemon": r"whenever|no hurry|some day|can wait|small wish",
    },
    "sentiment": {
        "good": r"perfectly|joy|lovely|solid|worth every|early",
        "bad": r"broke|loud|awful|cheap|waste|never worked",
    },
    "kind": {
        "animal": r"horse|rabbit|eagle|salmon|tiger|beetle|goose|donkey|lizard|otter|badger|sparrow|camel|wolf|"
        r"shark|mouse",
        "food": r"bread|cheese|apple|soup|rice|carrot|butter|honey|noodle|pepper|onion|yoghurt|cake|bean|pear|biscuit",
        "tool": r"hammer|saw|ladder|wrench|drill|shovel|needle|brush|chisel|rake|pliers|scissors|axe|file|broom|clamp",
    },
}


@pytest.mark.parametrize("category", CUES)
def test_labels_follow_their_cues(category):
    for record in made(category):
        # What is judged stands last: after "but" in a review, after the verb in a sighting.
        text = re.split(r", but | saw a ", record.input)[-1]
        assert [label for label, cue in CUES[category].items() if re.search(rf"\b({cue})\b", text)] == [record.output]


@pytest.mark.parametrize("categories", [["nothing"], []])
def test_unknown_categories_are_refused(categories):
    with pytest.raises(DataError, match="choose from"):
        skills(count=3, seed=0, categories=categories)


def test_the_tiny_model_is_small_and_knows_only_what_it_has_seen():
    from fedmezo.data.prompt import encode
    from fedmezo.models.adapters import make_adapter
    from fedmezo.models.bench import ModelBench
    from fedmezo.models.load import load_model

    folder = files("fedmezo") / "assets" / "tiny"
    assert sum(len(part.read_bytes()) for part in folder.iterdir()) < 4_000_000
    loaded = load_model("builtin:tiny")
    assert sum(p.numel() for p in loaded.model.parameters()) < 1_000_000
    bench = ModelBench(loaded, make_adapter(loaded.model, kind="lora"))

    def loss(category):
        text = encode(made(category, 40), loaded.tokenizer, template="{instruction}\n{input} ", max_tokens=96)
        return bench.evaluate(text.examples).loss

    assert max(loss(name) for name in ("sentiment", "kind", "compare", "initials")) < 1.2
    assert min(loss(name) for name in ("routing", "priority", "follows", "pairs", "extract")) > 3.5
