"""`ZOTrainer`: what Hugging Face's Trainer promises, without gradients, and what is refused."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedmezo import ZOTrainer, ZOTrainingArguments, ask, export, resume, run, verify
from fedmezo.data.sft import Reading, encode_rows
from fedmezo.data.skills import skills
from fedmezo.errors import ConfigError, DataError, JournalError, ModelError
from fedmezo.models.given import adopt, lora_settings
from fedmezo.models.load import load_model
from fedmezo.studies.build import build
from fedmezo.studies.trainer.arguments import course_of

# PEFT reads an attribute that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
TARGETS = ["q_proj", "v_proj"]
IGNORED = -100


@pytest.fixture(scope="module")
def tiny():
    return load_model("builtin:tiny")


@pytest.fixture(scope="module")
def rows():
    records = skills(count=60, seed=1, categories=["pairs"])
    return [{"prompt": f"{r.instruction}\n{r.input}", "completion": f" {r.output}"} for r in records]


def lora(**more):
    from peft import LoraConfig

    return LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": TARGETS, **more})


def told(folder: Path, **more) -> ZOTrainingArguments:
    small = {"max_steps": 12, "logging_steps": 2, "per_device_train_batch_size": 2, "save_strategy": "no"}
    return ZOTrainingArguments(str(folder), **{**small, "learning_rate": 2e-3, "use_cpu": True, **more})


def trainer(folder: Path, rows, **more) -> ZOTrainer:
    parts = {"train_dataset": rows[:40], "eval_dataset": rows[40:], "peft_config": lora()}
    named = {key: more.pop(key) for key in ("train_dataset", "eval_dataset", "peft_config", "callbacks") if key in more}
    return ZOTrainer("builtin:tiny", told(folder, **more), **{**parts, **named})


def logged(state) -> list[dict[str, float]]:
    return [entry for entry in state.log_history if "train_runtime" not in entry]


class StopAt:
    """A callback that ends the training after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step >= self.step
        return control


class Heard:
    """A callback that keeps the events' names."""

    def __init__(self) -> None:
        self.events = []

    def __getattr__(self, name):
        if not name.startswith("on_"):
            raise AttributeError(name)
        return lambda args, state, control, **more: self.events.append((name, state.global_step))


def test_the_loss_falls_and_everything_is_in_the_log(tmp_path, rows):
    zo = trainer(tmp_path, rows, learning_rate="auto", max_steps=40, logging_steps=5, eval_strategy="steps")
    out = zo.train()
    entries = logged(zo.state)
    evaluated = [entry["eval_loss"] for entry in entries if "eval_loss" in entry]
    assert evaluated[-1] < evaluated[0]
    assert out.global_step == zo.state.global_step == zo.state.max_steps == 40
    assert zo.state.epoch == out.metrics["epoch"] == 40 / 20
    assert {entry["step"] for entry in entries if "loss" in entry} == {5, 10, 15, 20, 25, 30, 35, 40}
    assert zo.state.log_history[-1]["train_loss"] == out.training_loss


def test_resume_equals_uninterrupted(tmp_path, rows):
    whole = trainer(tmp_path / "whole", rows, eval_strategy="steps", eval_steps=4)
    whole.train()
    stopped = trainer(tmp_path / "parts", rows, eval_strategy="steps", eval_steps=4, callbacks=[StopAt(6)])
    assert stopped.train().global_step == 6
    again = trainer(tmp_path / "parts", rows, eval_strategy="steps", eval_steps=4)
    assert again.train(resume_from_checkpoint=True).global_step == 12
    digests = [verify(tmp_path / name)["digest"] for name in ("whole", "parts")]
    assert digests[0] == digests[1]
    steady = [entry for entry in logged(again.state) if entry["step"] not in (6,)]
    assert [entry for entry in logged(whole.state) if entry["step"] not in (6,)] == steady


def test_going_back_to_a_checkpoint_gives_the_same_bits(tmp_path, rows):
    whole = trainer(tmp_path, rows, save_strategy="steps", save_steps=4)
    whole.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-12", "checkpoint-4", "checkpoint-8",
    ]  # fmt: skip
    digest = verify(tmp_path)["digest"]
    again = trainer(tmp_path, rows, save_strategy="steps", save_steps=4)
    again.train(resume_from_checkpoint=tmp_path / "checkpoint-4")
    assert verify(tmp_path)["digest"] == digest
    assert verify(tmp_path / "checkpoint-8")["ok"]


def test_only_so_many_checkpoints_are_kept(tmp_path, rows):
    trainer(tmp_path, rows, save_strategy="steps", save_steps=2, save_total_limit=2).train()
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-10", "checkpoint-12"}


def test_more_steps_go_on_where_the_run_ended(tmp_path, rows):
    trainer(tmp_path, rows).train()
    longer = trainer(tmp_path, rows, max_steps=16)
    assert longer.train(resume_from_checkpoint=True).global_step == 16
    assert verify(tmp_path)["rounds"] == 8


def test_a_run_goes_on_with_its_own_arguments_only(tmp_path, rows):
    trainer(tmp_path, rows).train()
    with pytest.raises(ConfigError, match="holds a run already; give another output_dir, or resume_from_checkpoint"):
        trainer(tmp_path, rows).train()
    with pytest.raises(ConfigError, match=r"begun with another algorithm.rate \(0.002, not 0.003\)"):
        trainer(tmp_path, rows, learning_rate=3e-3).train(resume_from_checkpoint=True)
    with pytest.raises(JournalError, match="The data has changed"):
        trainer(tmp_path, rows, train_dataset=rows[1:41]).train(resume_from_checkpoint=True)
    with pytest.raises(ConfigError, match="begun by a Python program"):
        resume(tmp_path)
    with pytest.raises(ConfigError, match="holds no run to go on with"):
        trainer(tmp_path / "other", rows).train(resume_from_checkpoint=True)
    with pytest.raises(ConfigError, match=r"expected True or .*checkpoint-N"):
        trainer(tmp_path, rows).train(resume_from_checkpoint=tmp_path / "adapter")


def test_the_saved_folder_loads_with_plain_peft(tmp_path, rows, tiny):
    from peft import PeftModel

    zo = trainer(tmp_path / "run", rows, learning_rate=2e-2)
    zo.train()
    zo.save_model(tmp_path / "mine")
    tuned = PeftModel.from_pretrained(load_model("builtin:tiny").model, tmp_path / "mine")
    assert theirs(tuned, tokens(rows[40:], tiny.tokenizer)) == pytest.approx(zo.evaluate()["eval_loss"], rel=1e-4)
    assert theirs(tiny.model, tokens(rows[40:], tiny.tokenizer)) != pytest.approx(zo.evaluate()["eval_loss"], rel=1e-3)
    with pytest.raises(ConfigError, match="holds the run"):
        zo.save_model(tmp_path / "run")
    assert ask(tmp_path / "mine", rows[41]["prompt"], max_tokens=3) == ask(
        tmp_path / "run", rows[41]["prompt"], max_tokens=3
    )
    at_two = export(tmp_path / "run", round=1, out=tmp_path / "two")
    assert (at_two / "adapter_model.safetensors").exists()


def tokens(rows, tokenizer) -> list[dict[str, list[int]]]:
    """Returns rows with labels, as one would tokenise them oneself."""
    made = []
    for row in rows:
        prompt = tokenizer([row["prompt"]], add_special_tokens=False)["input_ids"][0]
        whole = tokenizer([row["prompt"] + row["completion"] + "</s>"], add_special_tokens=False)["input_ids"][0]
        front = tokenizer(["a"])["input_ids"][0][: -len(tokenizer(["a"], add_special_tokens=False)["input_ids"][0])]
        assert whole[: len(prompt)] == prompt
        ids = [*front, *whole]
        made.append({"input_ids": ids, "labels": [IGNORED] * (len(front) + len(prompt)) + whole[len(prompt) :]})
    return made


def theirs(model, rows) -> float:
    """Returns transformers' own loss, as a mean over the label tokens of all rows."""
    total = count = 0.0
    with torch.no_grad():
        for row in rows:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
            mask = torch.tensor([row.get("attention_mask", [1] * len(row["input_ids"]))])
            known = int((labels[:, 1:] != IGNORED).sum())
            total += float(model(input_ids=ids, attention_mask=mask, labels=labels).loss) * known
            count += known
    return total / count


def test_masked_labels_give_the_loss_of_transformers(tmp_path, rows, tiny):
    whole = tokens(rows[:6], tiny.tokenizer)
    holes = []
    for at, row in enumerate(whole):
        ids = row["input_ids"]
        labels = [token if (k + at) % 5 < 2 else IGNORED for k, token in enumerate(ids)]
        holes.append({
            "input_ids": [*ids, 0, 0],
            "labels": [*labels, IGNORED, IGNORED],
            "attention_mask": [1] * len(ids) + [0, 0],
        })  # fmt: skip
    full = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in whole]
    for some in (whole, holes, full):
        zo = trainer(tmp_path, rows, train_dataset=some, eval_dataset=some)
        assert zo.evaluate()["eval_loss"] == pytest.approx(theirs(tiny.model, some), rel=1e-4)
    without = [{"input_ids": row["input_ids"]} for row in whole]
    assert trainer(tmp_path, rows, eval_dataset=without).evaluate()["eval_loss"] == pytest.approx(
        theirs(tiny.model, full), rel=1e-4
    )


def test_padding_on_either_side_is_left_out(tiny):
    bare = {"input_ids": [5, 6, 7, 8], "labels": [IGNORED, IGNORED, 7, 8]}
    left = {"input_ids": [0, 0, 5, 6, 7, 8], "labels": [IGNORED] * 4 + [7, 8], "attention_mask": [0, 0, 1, 1, 1, 1]}
    one, other = encode_rows([bare], None, reading=Reading()), encode_rows([left], None, reading=Reading())
    assert one.examples == other.examples
    assert one.examples[0].rows[0].ids == (5, 6, 7, 8) and one.examples[0].rows[0].start == 2


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"input_ids": [1, 2, 3], "labels": [IGNORED, 2, 4]}, "label 4 at token 2 is not the token there"),
        ({"input_ids": [1, 2, 3], "labels": [1, 2]}, "3 input_ids, 2 labels"),
        ({"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}, "hides tokens in the middle"),
        ({"input_ids": [1, 2], "labels": [IGNORED, IGNORED]}, "None of the 1 rows has a label token"),
        ({"question": "a"}, "Expected a column input_ids, messages, text, or prompt and completion; got question"),
        ({"text": "a"}, "give processing_class"),
    ],
)
def test_rows_that_cannot_be_trained_on_are_refused(row, said):
    with pytest.raises(DataError, match=said):
        encode_rows([row], None, reading=Reading())


def test_texts_are_learnt_whole_and_completions_alone(tiny):
    tokenizer = tiny.tokenizer
    spoken = {"text": "The lamp is red."}, {"prompt": "The lamp is ", "completion": "red."}
    text, completion = (encode_rows([row], tokenizer, reading=Reading()).examples[0].rows[0] for row in spoken)
    whole = encode_rows([spoken[1]], tokenizer, reading=Reading(completion_only=False)).examples[0].rows[0]
    assert text.start == whole.start == 1 and text.ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(completion.ids[completion.start :]).strip() == "red.</s>"
    cut = encode_rows([spoken[0]], tokenizer, reading=Reading(max_length=3)).examples[0].rows[0]
    assert cut.ids == text.ids[:3]


def test_the_assistants_turns_are_learnt_alone_when_asked(tiny):
    import copy

    tokenizer = copy.deepcopy(tiny.tokenizer)
    turns = [
        {"role": "user", "content": "colour of a lamp"}, {"role": "assistant", "content": "red"},
        {"role": "user", "content": "and of grass"}, {"role": "assistant", "content": "green"},
    ]  # fmt: skip
    row = {"messages": turns}
    with pytest.raises(DataError, match="no chat template"):
        encode_rows([row], tokenizer, reading=Reading())
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant> {% endif %}"
    )
    whole = encode_rows([row], tokenizer, reading=Reading()).examples
    turned = encode_rows([row], tokenizer, reading=Reading(assistant_only=True)).examples
    assert len(whole) == 1 and whole[0].rows[0].start == 1
    said = [tokenizer.decode(e.rows[0].ids[e.rows[0].start :]).strip() for e in turned]
    assert said == ["red", "green"]
    asked = {"prompt": turns[:3], "completion": turns[3:]}
    assert encode_rows([asked], tokenizer, reading=Reading()).examples[0].rows[0] == turned[1].rows[0]


def test_all_parameters_of_a_given_model_are_trained_in_place(tmp_path, rows, tiny):
    model = load_model("builtin:tiny").model
    args = told(tmp_path, learning_rate=2e-4)
    parts = {"train_dataset": rows[:40], "eval_dataset": rows[40:], "processing_class": tiny.tokenizer}
    zo = ZOTrainer(model, args, **parts)
    before = zo.evaluate()["eval_loss"]
    zo.train()
    assert zo.model is model and zo.evaluate()["eval_loss"] < before
    labelled = tokens(rows[40:], tiny.tokenizer)
    assert theirs(model, labelled) == pytest.approx(zo.evaluate()["eval_loss"], rel=1e-4)
    with pytest.raises(JournalError, match="The base model has changed"):
        ZOTrainer(model, replace(args, max_steps=16), **parts).train(resume_from_checkpoint=True)
    named = ZOTrainer("builtin:tiny", args, **parts)
    named.train(resume_from_checkpoint=True)
    assert named.evaluate()["eval_loss"] == zo.evaluate()["eval_loss"]


def test_a_folder_of_peft_is_a_start(tmp_path, rows):
    first = trainer(tmp_path / "first", rows, learning_rate=2e-2)
    first.train()
    second = trainer(tmp_path / "second", rows, peft_config=tmp_path / "first" / "adapter", eval_strategy="steps")
    assert second.evaluate()["eval_loss"] == pytest.approx(first.evaluate()["eval_loss"], rel=1e-6)
    second.train()
    assert verify(tmp_path / "second")["ok"]


def test_a_lora_config_means_what_it_means_to_peft(tiny):
    linear = lora_settings(tiny.model, lora(target_modules="all-linear"))
    assert set(linear["targets"]) >= {"q_proj", "k_proj", "v_proj", "o_proj", "down_proj"}
    some = lora_settings(tiny.model, lora(layers_to_transform=[1]))
    assert some["targets"] == ("model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj")
    with pytest.raises(ModelError, match="one rank and one alpha for all modules"):
        lora_settings(tiny.model, lora(rank_pattern={"q_proj": 4}))
    with pytest.raises(ModelError, match=r"lora_dropout=0\.1 is not supported"):
        lora_settings(tiny.model, lora(lora_dropout=0.1))


def test_what_is_no_base_model_is_refused(tmp_path, rows, tiny):
    from peft import get_peft_model

    with pytest.raises(ModelError, match="expected the name of a model or a causal language model"):
        ZOTrainer(object(), told(tmp_path), eval_dataset=rows).evaluate()
    with pytest.raises(ModelError, match="has adapters of PEFT in it"):
        adopt(get_peft_model(load_model("builtin:tiny").model, lora()), None)
    with pytest.raises(ConfigError, match="The model given is float32, not bfloat16"):
        ZOTrainer(tiny.model, told(tmp_path, bf16=True), eval_dataset=rows, peft_config=lora()).evaluate()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"gradient_accumulation_steps": 4}, "computes no gradient, so gradient_accumulation_steps has nothing"),
        ({"optim": "adamw_torch"}, "ZOTrainer computes no gradient: optim has nothing to act on; leave it out."),
        ({"warmup_ratio": 0.1}, "no warm-up"),
        ({"fsdp": "full_shard"}, "one process on one machine"),
        ({"load_best_model_at_end": True}, "goes back to its best round by itself"),
        ({"learning_rte": 1.0}, "ZOTrainingArguments has no 'learning_rte'; did you mean 'learning_rate'?"),
        ({"logging_steps": 0}, "logging_steps: expected a whole number of at least 1, got 0"),
        ({"max_steps": 0}, "max_steps: expected at least 1"),
        ({"num_train_epochs": 0}, "num_train_epochs: expected more than 0"),
        ({"eval_strategy": "often"}, "eval_strategy: expected no, steps or epoch, got 'often'"),
        ({"bf16": True, "fp16": True}, "both set"),
        ({"report_to": "mlflow"}, "report_to: expected none, tensorboard or wandb, got 'mlflow'"),
    ],
)
def test_what_cannot_be_honoured_is_refused_in_a_sentence(given, said):
    with pytest.raises(ConfigError, match=said.replace("(", r"\(")):
        ZOTrainingArguments("out", **given)


def test_the_trainer_refuses_what_it_cannot_do(tmp_path, rows):
    for name in ("compute_metrics", "data_collator", "optimizers", "model_init"):
        with pytest.raises(ConfigError, match=name):
            trainer_with = {name: print}
            ZOTrainer("builtin:tiny", told(tmp_path), **trainer_with)
    with pytest.raises(ConfigError, match=r"expected fedmezo\.ZOTrainingArguments, got dict"):
        ZOTrainer("builtin:tiny", {})
    with pytest.raises(ConfigError, match="keeps no logits"):
        trainer(tmp_path, rows).predict(rows)
    with pytest.raises(ConfigError, match="eval_dataset: expected rows, got none"):
        trainer(tmp_path, rows, eval_dataset=None, eval_strategy="steps").train()
    with pytest.raises(ConfigError, match="make a list of it"):
        trainer(tmp_path, rows, train_dataset=iter(rows)).train()


def test_a_data_set_of_hugging_face_and_a_formatting_function_will_do(tmp_path, rows):
    from datasets import Dataset

    plain = trainer(tmp_path, rows)
    table = Dataset.from_list(rows[40:])
    assert plain.evaluate(table)["eval_loss"] == plain.evaluate()["eval_loss"]
    texts = [{"text": row["prompt"] + row["completion"]} for row in rows[40:]]
    whole = plain.evaluate(texts)["eval_loss"]
    form = {"formatting_func": lambda row: row["prompt"] + row["completion"], "eval_dataset": table}
    formed = ZOTrainer("builtin:tiny", told(tmp_path), peft_config=lora(), **form)
    assert formed.evaluate()["eval_loss"] == whole != plain.evaluate()["eval_loss"]


def test_steps_become_rounds_that_end_where_something_is_due():
    course = course_of(ZOTrainingArguments(max_steps=100, logging_steps=10, eval_strategy="steps", eval_steps=25), 80)
    assert (course.round_steps, course.rounds, course.log_rounds, course.eval_rounds, course.save_rounds) == (
        5, 20, 2, 5, 100,
    )  # fmt: skip
    plain = course_of(ZOTrainingArguments(max_steps=37, save_strategy="no"), 80)
    assert (plain.round_steps, plain.rounds, plain.steps) == (10, 4, 40)
    epochs = course_of(ZOTrainingArguments(eval_strategy="epoch", num_train_epochs=2, logging_steps=500), 800)
    assert (epochs.epoch_steps, epochs.steps, epochs.round_steps, epochs.eval_rounds) == (100, 200, 25, 4)


def test_a_total_that_is_no_whole_number_of_rounds_is_told(tmp_path, rows, caplog):
    with caplog.at_level(logging.WARNING):
        assert trainer(tmp_path, rows, max_steps=3).train().global_step == 4
    assert "max_steps is 4 instead of 3" in caplog.text


def test_callbacks_of_transformers_hear_what_they_know(tmp_path, rows, capsys):
    import transformers

    heard = Heard()
    more = {"eval_strategy": "steps", "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    trainer(tmp_path, rows, callbacks=[heard, transformers.PrinterCallback], **more).train()
    assert heard.events == [
        ("on_train_begin", 0), ("on_step_begin", 0),
        ("on_step_end", 2), ("on_log", 2), ("on_evaluate", 2), ("on_log", 2), ("on_save", 2), ("on_step_begin", 2),
        ("on_step_end", 4), ("on_log", 4), ("on_evaluate", 4), ("on_log", 4), ("on_save", 4), ("on_step_begin", 4),
        ("on_log", 4), ("on_train_end", 4),
    ]  # fmt: skip
    assert "'eval_loss'" in capsys.readouterr().out


def test_what_was_built_is_run_once(tmp_path, tiny):
    from tiny_runs import small, write_records

    config = small(write_records(tmp_path), federation={"rounds": 2})
    built = build(config)
    run(built, out=tmp_path / "one")
    with pytest.raises(ConfigError, match="has been trained since"):
        run(built, out=tmp_path / "two")
    again = build(config)
    whole = run(config, out=tmp_path / "whole")
    stopped = run(again, out=tmp_path / "parts", stop=lambda report: report.round == 0)
    assert stopped.rounds == 1
    assert resume(tmp_path / "parts", built=build(config)).digest == whole.digest
