"""Records: every file format, every preset, every error sentence."""

import csv
import gzip
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
from test_data_prompt import byte_tokenizer

from fedmezo.data import DataSource, Record, encode, load_records
from fedmezo.errors import DataError

ROWS = [
    {"instruction": "Add.", "input": "1 2", "output": "3", "category": "sum"},
    {"instruction": "Größe?", "input": None, "output": 'groß, "sehr"\nja', "category": "word"},
]
RECORDS = [Record("Add.", "1 2", "3", "sum"), Record("Größe?", "", 'groß, "sehr"\nja', "word")]


def write(path, rows):
    """Writes rows in the format the name asks for."""
    if path.name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    if path.name.endswith(".csv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        return path
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n"
    text = lines if ".jsonl" in path.name else json.dumps(rows, indent=1)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
    return path


def load(path, **options):
    return load_records(DataSource(path=str(path), **options))


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.jsonl", "a.jsonl.gz", "a.csv", "a.parquet"])
def test_every_format_gives_the_same_records(tmp_path, name):
    assert load(write(tmp_path / name, ROWS)) == RECORDS


def test_missing_values_are_empty_text_and_never_none(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"instruction": "a", "output": "b", "input": None}, {"instruction": "c"}])
    assert load(path) == [Record("a", "", "b"), Record("c", "", "")]
    path = write(tmp_path / "a.parquet", [{"instruction": "a", "output": float("nan")}])
    assert load(path) == [Record("a", "", "")]


def test_numbers_become_text(tmp_path):
    assert load(write(tmp_path / "a.json", [{"instruction": "a", "output": 3}])) == [Record("a", "", "3")]


def test_byte_order_mark_is_no_part_of_a_column(tmp_path):
    (tmp_path / "a.csv").write_bytes("\ufeffinstruction,output\na,b\n".encode())
    assert load(tmp_path / "a.csv") == [Record("a", "", "b")]


def test_folder_is_its_files_by_name_and_names_categories(tmp_path):
    write(tmp_path / "b.jsonl.gz", [{"instruction": "b", "output": "1"}])
    write(tmp_path / "a.x.csv", [{"instruction": "a", "output": "2"}])
    write(tmp_path / "c.json", [{"instruction": "c", "output": "3", "category": "own"}])
    (tmp_path / "readme.txt").write_text("not data")
    (tmp_path / "deeper").mkdir()
    write(tmp_path / "deeper" / "d.json", ROWS)
    assert load(tmp_path) == [Record("a", "", "2", "a.x"), Record("b", "", "1", "b"), Record("c", "", "3", "own")]


def test_local_file_may_be_given_as_a_name(tmp_path):
    assert load_records(DataSource(name=str(write(tmp_path / "a.json", ROWS)))) == RECORDS


def test_column_map_names_any_column(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"input": "q", "target": "a", "kind": "k"}])
    columns = {"instruction": "input", "output": "target", "category": "kind"}
    assert load(path, columns=columns) == [Record("q", "", "a", "k")]


def test_choices_are_a_list_or_parted_text(tmp_path):
    wanted = [Record("a", "", "x", choices=("x", "y"))]
    assert load(write(tmp_path / "a.json", [{"instruction": "a", "output": "x", "choices": ["x", "y"]}])) == wanted
    assert load(write(tmp_path / "a.csv", [{"instruction": "a", "output": "x", "choices": "x | y"}])) == wanted
    path = write(tmp_path / "b.json", [{"instruction": "a", "output": "x"}])
    assert load(path, choices=("x", "y")) == wanted


def test_limit_is_a_sample_in_order_named_by_the_seed(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"instruction": str(n), "output": "x"} for n in range(50)])
    first = [int(record.instruction) for record in load(path, limit=10)]
    assert first == sorted(first)
    assert len(set(first)) == 10
    assert first == [int(record.instruction) for record in load(path, limit=10)]
    assert first != [int(record.instruction) for record in load(path, limit=10, seed=1)]
    assert len(load(path, limit=99)) == 50


TASK = {
    "Definition": ["Tell."],
    "Categories": ["Kind"],
    "Instances": [{"id": 1, "input": "i", "output": ["o", "p"]}, {"id": 2, "input": "j", "output": ["q"]}],
}
MBXP = {"prompt": "def f():\n", "description": "Say f.", "language": "python", "canonical_solution": " return 1"}
PRESET_CASES = [
    (
        "gsm8k",
        [{"question": "1+1?", "answer": "It is 2\n#### 2"}],
        [Record("1+1?", "", "It is 2\nThe answer is 2")],
    ),
    (
        "dolly",
        [{"instruction": "i", "context": "", "response": "r", "category": "c"}],
        [Record("i", "", "r", "c")],
    ),
    (
        "sst2",
        [{"sentence": "so good", "label": 1}],
        [
            Record(
                "Is this review great or terrible? Answer with one word.",
                "so good",
                "great",
                "great",
                ("terrible", "great"),
            )
        ],
    ),
    (
        "mbxp",
        [MBXP, {**MBXP, "canonical_solution": None}, {**MBXP, "prompt": None}],
        [Record("def f():\n", "", " return 1", "python"), Record("Say f.", "", " return 1", "python")],
    ),
    ("natural_instructions", [TASK], [Record("Tell.", "i", "o", "a"), Record("Tell.", "j", "q", "a")]),
    (
        "natural_instructions",
        [{**TASK, "task": "task7"}],
        [Record("Tell.", "i", "o", "task7"), Record("Tell.", "j", "q", "task7")],
    ),
    ("alpaca", [{"instruction": "i", "input": "j", "output": "o"}], [Record("i", "j", "o")]),
]


@pytest.mark.parametrize(("preset", "rows", "records"), PRESET_CASES)
def test_presets_are_named_or_told_from_the_columns(tmp_path, preset, rows, records):
    path = write(tmp_path / "a.jsonl", rows)
    assert load(path, preset=preset) == records
    assert load(path) == records


def test_natural_instructions_file_is_one_task_named_by_its_file(tmp_path):
    path = tmp_path / "task9_x.json.gz"
    path.write_bytes(gzip.compress(json.dumps(TASK).encode()))
    assert {record.category for record in load(path)} == {"task9_x"}
    assert {record.category for record in load(path, columns={"category": "category"})} == {"Kind"}


def test_none_is_the_text_of_a_missing_input_where_that_is_asked_for(tmp_path):
    path = write(tmp_path / "g.jsonl", [{"question": "1+1?", "answer": "#### 2"}])
    assert load(path) == [Record("1+1?", "", "The answer is 2")]
    assert load(path, none_input=True) == [Record("1+1?", "None", "The answer is 2")]
    rows = [{"instruction": "a", "output": "b", "input": value} for value in (None, "", "c")]
    found = load(write(tmp_path / "a.jsonl", [*rows, {"instruction": "a", "output": "b"}]), none_input=True)
    assert [record.input for record in found] == ["None", "", "c", "None"]
    assert load_records(DataSource(name="builtin:skills", limit=20, none_input=True)) == load_records(
        DataSource(name="builtin:skills", limit=20)
    )


def test_code_alpaca_takes_the_language_and_leaves_assembly_out(tmp_path):
    rows = [{"instruction": "i", "input": x, "output": "o"} for x in ("Python", "X86-64 Assembly")]
    path = write(tmp_path / "a.json", rows)
    assert load(path, preset="code-alpaca") == [Record("i", "Python", "o", "Python")]
    write(path, [{"instruction": "i", "input": "x = 1\ny = 2", "output": "o"}])
    with pytest.raises(DataError, match=r"expects a language's name in the input column.*use preset 'alpaca'"):
        load(path, preset="code_alpaca")


def test_map_of_the_answer_keeps_a_preset_from_being_guessed(tmp_path):
    path = write(tmp_path / "a.json", [{"sentence": "s", "label": "entailment"}])
    assert load(path, columns={"input": "sentence", "output": "label"}) == [Record("", "s", "entailment")]
    with pytest.raises(DataError, match="Preset 'sst2' expects the label 0 or 1, got 'entailment'"):
        load(path)


def test_hub_rows_go_through_the_preset(monkeypatch):
    asked = []

    def load_dataset(name, config, *, split):
        asked.append((name, config, split))
        return [{"question": "q", "answer": "#### 1"}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    wanted = [Record("q", "", "The answer is 1")]
    assert load_records(DataSource(name="gsm8k", split="test")) == wanted
    assert load_records(DataSource(name="someone/maths:easy")) == wanted
    assert asked == [("openai/gsm8k", "main", "test"), ("someone/maths", "easy", "train")]


def test_hub_that_cannot_be_reached_is_one_clear_error(monkeypatch):
    def load_dataset(*_args, **_options):
        raise ConnectionError("no route\nretrying")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(DataError, match=r"No data set 'gsm8'.*ConnectionError: no route\).*did you mean 'gsm8k'"):
        load_records(DataSource(name="gsm8"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="needs the package 'datasets'"):
        load_records(DataSource(name="gsm8k"))
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *_, **__: []))
    with pytest.raises(DataError, match="no rows in split 'train'"):
        load_records(DataSource(name="gsm8k"))


def test_builtin_corpus_is_made_on_demand(monkeypatch):
    asked = []

    def skills(**options):
        asked.append(options)
        return [Record("a", "", "b", "c")] * options["count"]

    monkeypatch.setitem(sys.modules, "fedmezo.data.skills", SimpleNamespace(skills=skills))
    assert len(load_records(DataSource(name="builtin:skills", limit=5, seed=3))) == 5
    assert len(load_records(DataSource(name="builtin:skills/add, sort"))) == 2000
    assert asked == [
        {"count": 5, "seed": 3, "categories": None},
        {"count": 2000, "seed": 0, "categories": ("add", "sort")},
    ]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", b'{"instruction": 1, "output": 2}\n\n{"instruction": \n', "line 3: bad JSON"),
        ("a.json", b'[{"instruction": 1},\n nonsense]', "line 2: bad JSON"),
        ("a.jsonl", b"[1]\n", "line 1: expected a JSON object, got list"),
        ("a.json", b"[{}, 3]", "record 2: expected a JSON object, got int"),
        ("a.json", b"", "line 1: bad JSON"),
        ("a.json", b"[]", "the file holds no rows"),
        ("a.jsonl", b"\n\n", "the file holds no rows"),
        ("a.csv", b"instruction,output\n", "the file holds no rows"),
        ("a.csv", b"instruction,output\na,b,c\n", "line 2: more values than the header has columns"),
        ("a.csv", b'instruction,output\n"a"x,b\n', "line 2: bad CSV"),
        ("a.json.gz", b"no gzip", "cannot be read"),
        ("a.jsonl.gz", gzip.compress(b'{"instruction": 1}', mtime=0)[:-9], "cannot be read"),
        ("a.json", b'[{"instruction": "\xff"}]', "not UTF-8"),
        ("a.parquet", b"PAR1", "not a readable parquet file"),
        ("a.txt", b"x", "Cannot read .*a.txt' by its name; expected one ending in .jsonl, "),
        ("a.json", b'[{"question": 1, "target": 2}]', "no column for 'output'; columns found: question, target"),
        ("a.json", b'[{"output": 1, "q": 2}]', "no column for 'instruction'; columns found: output, q"),
        ("a.json", b'[{"instruction": [1], "output": 2}]', "record 1: column 'instruction' is list, expected text"),
        (
            "a.json",
            b'[{"instruction": 1, "output": 2, "choices": 3}]',
            "column 'choices' is 3, expected a list or text",
        ),
        ("a.json", b'[{"prompt": 1, "canonical_solution": null, "language": 2}]', "rules leave no record"),
    ],
)
def test_bad_files_are_one_clear_error(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=sentence):
        load(tmp_path / name)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "Expected either a path or a name of data, got path=None and name=None"),
        ({"path": "a.json", "name": "gsm8k"}, "Expected either a path or a name"),
        ({"path": "no/such/file.json"}, "There is no data file or folder 'no/such/file.json'"),
        ({"name": "no/such.jsonl.gz"}, "There is no data file or folder"),
        ({"name": "builtin:skulls"}, "Unknown built-in corpus 'builtin:skulls'; known is 'builtin:skills'"),
        ({"name": "code_alpaca"}, "'code_alpaca' has no hub copy"),
        ({"name": "x", "limit": 0}, "limit: expected at least 1 record, got 0"),
        (
            {"name": "x", "columns": {"outputs": "a"}},
            "Unknown field 'outputs' in the column map; did you mean 'output'",
        ),
        ({"name": "x", "preset": "dolyl"}, "Unknown preset 'dolyl'; did you mean 'dolly'"),
        ({"name": "x", "preset": "zzzz"}, "Unknown preset 'zzzz'; known are alpaca, code_alpaca"),
    ],
)
def test_bad_sources_are_one_clear_error(options, sentence):
    with pytest.raises(DataError, match=sentence):
        load_records(DataSource(**options))


def test_unknown_column_lists_the_columns_found(tmp_path):
    path = write(tmp_path / "a.json", ROWS)
    with pytest.raises(
        DataError, match="no column 'x' for 'input'; columns found: instruction, input, output, category"
    ):
        load(path, columns={"input": "x"})


def test_folder_without_data_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match="holds no file ending in"):
        load(tmp_path)


def test_parquet_without_its_package_is_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", ROWS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match="needs the package 'pyarrow'"):
        load(path)


DATA = os.environ.get("FEDMEZO_DATA")
REAL = [
    ("gsm8k/train.jsonl.gz", 7473, 1, "answer"),
    ("dolly15k", 13513, 8, "answer"),
    ("alpaca", 8307, 1, "answer"),
    ("sst2/dev.jsonl.gz", 872, 2, "choices"),
    ("mbxp", 6253, 9, "answer"),
    ("natural_instructions/tasks", 19665, 26, "answer"),
    ("natural_instructions/test_tasks.lite.jsonl.gz", 2470, 52, "answer"),
]


@pytest.mark.skipif(DATA is None, reason="FEDMEZO_DATA is not set")
@pytest.mark.parametrize(("path", "count", "categories", "objective"), REAL)
def test_real_data_loads_and_encodes(path, count, categories, objective):
    records = load(Path(DATA) / path)
    assert len(records) == count
    assert len({record.category for record in records}) == categories
    assert all("None" not in (record.instruction, record.input) for record in records)
    some = records[:: max(1, len(records) // 300)]
    template = "sst2" if objective == "choices" else "auto"
    encoded = encode(some, byte_tokenizer(), template=template, max_tokens=4096, objective=objective)
    assert len(encoded.examples) + encoded.dropped == len(some)
    assert encoded.dropped <= len(some) // 50
    for example in encoded.examples:
        record = some[example.record]
        assert example.category == record.category
        if objective == "choices":
            assert len(example.options) == 2
            assert record.choices[example.answer] == record.output
