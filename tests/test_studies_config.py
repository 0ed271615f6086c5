"""The configuration: what is accepted, what is refused and in which words, and that files say the same as values."""

import math
import tomllib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fedmezo.errors import ConfigError
from fedmezo.studies.config import Config, load_config, parse_config, schema, template_toml
from fedmezo.studies.keys import note_of
from fedmezo.studies.tomltext import toml

RICH = [
    "adapter.preset=paper",
    "data.path=data/a b.jsonl",
    'data.columns={ instruction = "the \\"question\\"", output = "a\\nb" }',
    'data.choices=["great", "terrible"]',
    "data.limit=100",
    "federation.clients=5",
    "federation.cohort=2",
    "algorithm.rate=2.5e-5",
    "algorithm.clip=none",
    'eval.metrics=["loss", "rouge_l"]',
    "runtime.lanes=6",
]


def problem(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides)
    return str(caught.value)


def written(folder: Path, text: str) -> Path:
    path = folder / "c.toml"
    path.write_text(text, encoding="utf-8")
    return path


def sections() -> dict[str, type]:
    return {name: field.annotation for name, field in Config.model_fields.items()}


def test_defaults_are_the_documented_ones():
    config = load_config()
    assert config.model.name == "smollm2-135m"
    assert (config.adapter.kind, config.adapter.rank, config.adapter.alpha, config.adapter.targets) == (
        "lora",
        8,
        16,
        None,
    )
    assert (config.data.name, config.data.max_tokens, config.data.template) == ("builtin:skills", 256, "auto")
    federation = config.federation
    assert (federation.clients, federation.cohort, federation.rounds, federation.local_steps) == (3, None, 20, 30)
    algorithm = config.algorithm
    assert (algorithm.rate, algorithm.mu, algorithm.clip, algorithm.directions) == (None, None, 3.0, 1)
    assert (algorithm.adapt, algorithm.decay) == (None, None)
    assert (config.eval.every, config.eval.examples, config.eval.metrics) == (5, 200, ("loss", "accuracy"))
    assert (config.guard.on_surge, config.guard.batches) == ("rollback", None)


@pytest.mark.parametrize("overrides", [[], RICH, ["adapter.kind=full", "data.name=alpaca", "model.revision=v1"]])
def test_a_resolved_file_loads_back_to_the_same_value(tmp_path, overrides):
    config = load_config(None, overrides)
    assert load_config(written(tmp_path, config.to_toml())) == config
    assert Config.model_validate_json(config.model_dump_json()) == config
    assert parse_config(config.model_dump(mode="json")) == config


@given(
    st.dictionaries(st.text(min_size=1), st.text(st.characters(exclude_categories=["Cs"]))), st.floats(allow_nan=False)
)
def test_toml_text_reads_back(table, number):
    value = {"table": table, "number": number, "list": list(table.values()), "yes": True}
    assert tomllib.loads("".join(f"{name} = {toml(part)}\n" for name, part in value.items())) == value


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    clients=st.integers(1, 10**6),
    rate=st.none() | st.floats(1e-300, 1e300),
    clip=st.just("none") | st.floats(1e-9, 1e9),
    name=st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
)
def test_any_valid_values_survive_the_file(tmp_path, clients, rate, clip, name):
    config = parse_config(
        {"model": {"name": name}, "federation": {"clients": clients}, "algorithm": {"rate": rate, "clip": clip}}
    )
    assert load_config(written(tmp_path, config.to_toml())) == config


def test_the_template_shows_every_key_and_loads_to_the_defaults(tmp_path):
    text = template_toml()
    assert load_config(written(tmp_path, text)) == load_config()
    for name, section in sections().items():
        block = text.split(f"\n[{name}]\n")[1].split("\n[")[0]
        for key, field in section.model_fields.items():
            assert field.description
            assert any(line.startswith((f"{key} = ", f"# {key} = ")) for line in block.splitlines()), key
    assert max(map(len, text.splitlines())) <= 120


def test_every_example_of_the_template_is_accepted(tmp_path):
    for name, section in sections().items():
        for key in section.model_fields:
            if example := note_of(section, key, "example"):
                line = next(row for row in template_toml().splitlines() if row.startswith(f"# {key} = {toml(example)}"))
                config = load_config(written(tmp_path, f"[{name}]\n{line.removeprefix('# ')}\n"))
                assert getattr(getattr(config, name), key) == example


def test_values_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        load_config().federation.rounds = 3


def test_the_digest_is_that_of_what_decides_the_result():
    base = load_config().digest()
    assert load_config(None, ["output.dir=elsewhere", "runtime.threads=1"]).digest() == base
    assert load_config(None, ["federation.seed=1"]).digest() != base
    assert len(base) == 64


ALIASES = [
    ("algorithm.lr=0.1", "algorithm.rate=0.1"),
    ("algorithm.learning_rate=0.1", "algorithm.rate=0.1"),
    ("algorithm.eps=0.1", "algorithm.mu=0.1"),
    ("algorithm.zo_eps=0.1", "algorithm.mu=0.1"),
    ("adapter.r=4", "adapter.rank=4"),
    ("adapter.lora_r=4", "adapter.rank=4"),
    ("adapter.lora_alpha=4", "adapter.alpha=4"),
    ('adapter.target_modules=["q_proj"]', 'adapter.targets=["q_proj"]'),
    ("federation.num_clients=7", "federation.clients=7"),
    ("federation.num_rounds=7", "federation.rounds=7"),
    ("data.max_length=64", "data.max_tokens=64"),
]


@pytest.mark.parametrize(("customary", "ours"), ALIASES)
def test_customary_names_mean_ours(tmp_path, customary, ours):
    wanted = load_config(None, [ours])
    assert load_config(None, [customary]) == wanted != load_config()
    dotted, value = customary.split("=", 1)
    section, key = dotted.split(".")
    assert load_config(written(tmp_path, f"[{section}]\n{key} = {value}\n")) == wanted


def test_no_name_means_two_keys_of_a_section():
    for section in sections().values():
        names = [
            *section.model_fields,
            *(also for key in section.model_fields for also in note_of(section, key, "also")),
        ]
        assert len(names) == len(set(names))


def test_one_key_under_two_names_is_refused(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load_config(written(tmp_path, "[algorithm]\nlr = 1.0\nrate = 2.0\n"))
    assert str(caught.value) == "[algorithm]: 'lr' and 'rate' mean the same key; give only 'rate'."
    with pytest.raises(ConfigError, match=r"\[algorithm\]: 'lr' and 'rate' mean the same key"):
        parse_config({"algorithm": {"lr": 1.0, "rate": 2.0}})


def test_an_override_wins_over_the_file_under_any_name(tmp_path):
    path = written(tmp_path, "[algorithm]\nlr = 1.0\n[data]\nname = 'alpaca'\n")
    assert load_config(path, ["algorithm.rate=2"]).algorithm.rate == 2.0
    assert load_config(path, ["algorithm.learning_rate=2"]).algorithm.rate == 2.0
    replaced = load_config(path, ["data.path=x.jsonl"]).data
    assert (replaced.path, replaced.name) == ("x.jsonl", None)


def test_overrides_are_toml_values_or_plain_text():
    config = load_config(
        None,
        [
            "model.name=some/model=x",
            "output.export=false",
            "data.columns.instruction=question",
            "federation.cohort=all",
            "data.template = {instruction} Answer: ",
        ],
    )
    assert config.data.template == "{instruction} Answer: "
    assert config.model.name == "some/model=x"
    assert config.output.export is False
    assert config.data.columns == {"instruction": "question"}
    assert config.federation.cohort is None


def test_words_stand_for_leaving_it_to_the_program():
    config = load_config(None, ["algorithm.rate=auto", "algorithm.mu=auto", "data.limit=all", "adapter.targets=auto"])
    assert config == load_config()
    assert 'rate = "auto"' in config.to_toml()


def test_the_paper_preset_is_its_three_keys():
    adapter = load_config(None, ["adapter.preset=paper"]).adapter
    assert (adapter.rank, adapter.alpha, adapter.targets) == (128, 256, ("q_proj", "v_proj"))
    assert problem("adapter.preset=paper", "adapter.r=4") == (
        'adapter.rank contradicts adapter.preset = "paper"; delete one of them.'
    )


def test_no_clip_is_an_infinite_multiple():
    assert load_config(None, ["algorithm.clip=none"]).algorithm.clip_multiple == math.inf
    assert load_config(None, ["algorithm.clip=inf"]).algorithm.clip == "none"
    assert load_config().algorithm.clip_multiple == 3.0


SENTENCES = [
    ("federation.local_step=3", "Unknown key 'local_step' in [federation]; did you mean 'local_steps'?"),
    ("federation.eps=1", "Unknown key 'eps' in [federation]; did you mean 'algorithm.mu'?"),
    ("fedration.rounds=2", "Unknown section [fedration]; did you mean [federation]?"),
    ("federation.rounds=many", 'federation.rounds: expected a whole number >= 1, got "many".'),
    ("federation.rounds=0", "federation.rounds: expected a whole number >= 1, got 0."),
    ("federation.rounds=1.5", "federation.rounds: expected a whole number >= 1, got 1.5."),
    ("federation.rounds=true", "federation.rounds: expected a whole number >= 1, got true."),
    ("federation.clients=0", "federation.clients: expected a whole number >= 1, got 0."),
    ("federation.cohort=9", "federation.cohort: expected at most federation.clients = 3, got 9."),
    ("federation.cohort=0", 'federation.cohort: expected a whole number >= 1 or "all", got 0.'),
    ("federation.batch_size=0", "federation.batch_size: expected a whole number >= 1, got 0."),
    ("federation.local_steps=0", "federation.local_steps: expected a whole number >= 1, got 0."),
    ("federation.seed=-1", "federation.seed: expected a whole number >= 0 and <= 9223372036854775807, got -1."),
    (
        "federation.weighting=equal",
        'federation.weighting: expected one of "uniform", "samples", "dataset", got "equal".',
    ),
    ("algorithm.rate=0", 'algorithm.rate: expected a number > 0 or "auto", got 0.'),
    ("algorithm.rate=-1e-3", 'algorithm.rate: expected a number > 0 or "auto", got -0.001.'),
    ("algorithm.rate=nan", 'algorithm.rate: expected a number > 0 or "auto", got NaN.'),
    ("algorithm.rate=fast", 'algorithm.rate: expected a number > 0 or "auto", got "fast".'),
    ("algorithm.mu=0", 'algorithm.mu: expected a number > 0 or "auto", got 0.'),
    ("algorithm.mu=inf", 'algorithm.mu: expected a number > 0 or "auto", got Infinity.'),
    ("algorithm.clip=0", 'algorithm.clip: expected a number > 0 or "none", got 0.'),
    ("algorithm.directions=0", "algorithm.directions: expected a whole number >= 1, got 0."),
    (
        "algorithm.name=adam",
        'algorithm.name: expected one of "fedmezo", "fedavg", "fedkseed", "fedkseed-pro", got "adam".',
    ),
    (
        "federation.pull=sums",
        'federation.pull = "sums" needs a pool of seeds: algorithm.name "fedkseed" or "fedkseed-pro", got "fedmezo".',
    ),
    (
        "federation.sums_coding=float16",
        'federation.sums_coding = "float16" needs a pool of seeds: algorithm.name "fedkseed" or "fedkseed-pro", '
        'got "fedmezo".',
    ),
    (
        "federation.budget={steps=3}",
        "federation.budget: expected one of rounds, forwards, tokens, seconds, bytes, got 'steps'.",
    ),
    ("federation.budget={rounds=0}", "federation.budget: expected more than 0 rounds, got 0.0."),
    (
        "algorithm.normalise=true",
        "algorithm.normalise divides by the deviation of a step's slopes: algorithm.directions must be at least 2, "
        "got 1.",
    ),
    (
        "algorithm.weight_decay=0.1",
        "algorithm.weight_decay is for fedavg only, got 0.1 with fedmezo: a decay is a multiple of the parameters, "
        "which no sum of named directions can express, so scalars could not carry it. Set it to 0.",
    ),
    ("algorithm.law=uniform", 'algorithm.law: expected one of "gaussian", "rademacher", got "uniform".'),
    ("algorithm.paper_eq2_scale=true", 'algorithm.paper_eq2_scale needs algorithm.estimator = "forward".'),
    ("split.alpha=0", "split.alpha: expected a number > 0, got 0."),
    ("split.kind=dirichlet", 'split.kind: expected one of "iid", "lda", "meta", "natural", got "dirichlet".'),
    (
        "eval.metrics=loss",
        'eval.metrics: expected a list of "loss", "accuracy", "rouge_l", "exact_match", got "loss".',
    ),
    (
        'eval.metrics=["los"]',
        'eval.metrics: expected a list of "loss", "accuracy", "rouge_l", "exact_match", got "los".',
    ),
    ("eval.metrics=[]", 'eval.metrics: expected a list of "loss", "accuracy", "rouge_l", "exact_match", got [].'),
    ("adapter.targets=q_proj", 'adapter.targets: expected a list of texts or "auto", got "q_proj".'),
    ("adapter.rank=0", "adapter.rank: expected a whole number >= 1, got 0."),
    ("data.columns=3", "data.columns: expected a table of texts, got 3."),
    ("data.path=3", "data.path: expected text, got 3."),
    ("data.eval_fraction=1", "data.eval_fraction: expected a number > 0 and < 1, got 1."),
    ("output.export=1", "output.export: expected true or false, got 1."),
    ("guard.on_surge=stop", 'guard.on_surge: expected one of "warn", "halve", "rollback", got "stop".'),
    ("runtime.lanes=0", 'runtime.lanes: expected a whole number >= 1 or "auto", got 0.'),
    (
        "rounds=3",
        "--set rounds=3: expected section.key=value, as in --set federation.rounds=5; got no section and key.",
    ),
    (
        "federation.rounds",
        "--set federation.rounds: expected section.key=value, as in --set federation.rounds=5; got no value.",
    ),
]


@pytest.mark.parametrize(("override", "sentence"), SENTENCES)
def test_one_sentence_says_what_was_wrong(override, sentence):
    assert problem(override) == sentence


def test_every_problem_is_told_at_once():
    told = problem("federation.rounds=0", "algorithm.rate=0", "model.nmae=x").splitlines()
    assert [line.split(":")[0].split(";")[0] for line in told] == [
        "Unknown key 'nmae' in [model]",
        "federation.rounds",
        "algorithm.rate",
    ]


def test_keys_outside_their_section_are_led_home(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load_config(written(tmp_path, "rounds = 3\nmodel = 4\n"))
    assert str(caught.value).splitlines() == [
        "[model]: expected a table of keys, got 4.",
        "Unknown key 'rounds' outside the sections; did you mean 'federation.rounds'?",
    ]


def test_exclusive_keys_are_refused_together(tmp_path):
    with pytest.raises(ConfigError, match=r"^data\.path and data\.name are both given; give one of them\.$"):
        load_config(written(tmp_path, "[data]\npath = 'a'\nname = 'b'\n"))
    assert problem("data.eval_path=x", "data.eval_examples=3").startswith("data.eval_path and data.eval_examples")


def test_long_values_are_cut_short():
    assert len(problem(f"federation.rounds={'x' * 500}")) < 140


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.toml does not exist; `fedmezo config init nowhere\.toml` writes"):
        load_config(tmp_path / "nowhere.toml")
    with pytest.raises(ConfigError, match=r"is a folder, not a file; name the file\.$"):
        load_config(tmp_path)
    with pytest.raises(ConfigError, match=r"c\.toml is not valid TOML: .*\(at line 2, column 10\)\.$"):
        load_config(written(tmp_path, "[federation]\nrounds = \n"))
    binary = tmp_path / "b.toml"
    binary.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"b\.toml cannot be read as text"):
        load_config(binary)


def test_the_schema_knows_every_key_and_its_word():
    found = schema()
    algorithm = found["$defs"]["Algorithm"]
    assert {"const": "auto"} in algorithm["properties"]["rate"]["anyOf"]
    assert algorithm["additionalProperties"] is False
    for name, section in sections().items():
        assert set(found["$defs"][section.__name__]["properties"]) == set(section.model_fields), name


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (["algorithm.name=fedavg"], "in float32 only"),
        (["algorithm.name=fedkseed", "federation.pull=sums"], "round every round"),
        (["algorithm.name=fedkseed", "federation.sums_coding=float16"], "round every round"),
    ],
)
def test_sixteen_bit_weights_are_refused_where_only_the_sum_would_travel(changes, sentence):
    whole = ["adapter.kind=full", "model.dtype=bfloat16"]
    with pytest.raises(ConfigError, match=sentence):
        load_config(None, [*whole, *changes])
    load_config(None, [*changes, "adapter.kind=lora", "model.dtype=bfloat16"])
    assert load_config(None, whole).rounds_weights
