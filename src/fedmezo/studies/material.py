"""The sections that say what a run is made of: model, adapter, data and how the data is dealt."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import model_validator

from fedmezo.studies.keys import MAX_SEED, Section, key

__all__ = ["Adapter", "Data", "Model", "Split"]

PRESETS: Mapping[str, Mapping[str, Any]] = {"paper": {"rank": 128, "alpha": 256, "targets": ("q_proj", "v_proj")}}


class Model(Section):
    """The language model that is tuned; its own weights stay frozen under a LoRA adapter."""

    name: str = key(
        "A local folder, a .gguf file, a Hugging Face id, or a short name that `fedmezo fetch` knows.",
        default="smollm2-135m",
        also=("id", "model_name", "model_name_or_path"),
        min_length=1,
    )
    revision: str | None = key(
        "Branch, tag or commit of a Hugging Face id.", default=None, example="main", min_length=1
    )
    dtype: Literal["float32", "bfloat16", "float16"] = key(
        "Number format of the frozen weights: float32 | bfloat16 | float16. The 16-bit formats need half the memory "
        "and a larger algorithm.mu. Trained parameters are always float32.",
        default="float32",
        also=("torch_dtype", "precision"),
    )


class Adapter(Section):
    """What is trained."""

    kind: Literal["lora", "full"] = key(
        "lora (small matrices beside the frozen weights) | full (all weights).", default="lora"
    )
    preset: Literal["paper"] | None = key(
        "paper: rank 128, alpha 256, targets q_proj and v_proj. Give these keys no other value then.",
        default=None,
        example="paper",
    )
    rank: int = key("LoRA rank r.", default=8, also=("r", "lora_r", "lora_rank"), ge=1)
    alpha: int = key("LoRA scale: the product is multiplied by alpha / rank.", default=16, also=("lora_alpha",), ge=1)
    targets: tuple[str, ...] | None = key(
        'Names of the modules that get an adapter, as a list; "auto" takes the choice PEFT makes for the architecture.',
        default=None,
        word="auto",
        also=("target_modules", "lora_target_modules"),
        min_length=1,
    )

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, given: Any) -> Any:
        if not isinstance(given, Mapping) or not isinstance(given.get("preset"), str):
            return given
        found = cls.canonical(given)
        meant = PRESETS.get(found["preset"], {})
        for name, value in meant.items():
            if name in found and cls._plain(name, found[name]) != value:
                raise ValueError(
                    f'adapter.{name} contradicts adapter.preset = "{found["preset"]}"; delete one of them.'
                )
        return found | dict(meant)


class Data(Section):
    """Where the records come from and how they become tokens. Give a path or a name, not both."""

    name: str | None = key(
        "A Hugging Face data set id, a preset (alpaca, dolly, gsm8k, code_alpaca) or builtin:skills, a generated "
        "corpus that needs no network (builtin:skills/NAME,NAME for some of its categories).",
        default="builtin:skills",
        also=("dataset", "dataset_name"),
        min_length=1,
    )
    path: str | None = key(
        "A local file (json, jsonl, csv, parquet; .gz too), a folder of them, or Natural-Instructions task files; "
        "$NAME is filled in from the environment.",
        default=None,
        also=("file", "data_path"),
        example="data/train.jsonl",
        min_length=1,
    )
    preset: str | None = key(
        "Column map of a well-known data set, for a local copy.", default=None, example="gsm8k", min_length=1
    )
    columns: dict[str, str] = key(
        "Which source column fills which of our fields (instruction, input, output, category), as a table: "
        '{ instruction = "question", output = "answer" }.',
        default={},
        also=("column_map",),
    )
    split: str = key("Split of a Hugging Face data set.", default="train", min_length=1)
    limit: int | None = key(
        'Records to use at most; "all" for no limit.', default=None, word="all", also=("max_samples",), ge=1
    )
    choices: tuple[str, ...] = key(
        "Candidate answers of a classification task, as a list, for records that bring none of their own.", default=()
    )
    objective: Literal["answer", "choices"] = key(
        "Loss over the answer's tokens (answer), or over the candidate answers (choices).", default="answer"
    )
    max_tokens: int = key(
        "Longest prompt with answer, in tokens; longer records are dropped and counted.",
        default=256,
        also=("max_length", "max_seq_length", "tok_len"),
        ge=2,
    )
    template: str = key(
        "Prompt: auto (the model's chat template if it has one) | a named template | your own text with "
        "{instruction}, {input} and the like.",
        default="auto",
        also=("prompt", "prompt_template"),
        min_length=1,
    )
    eval_fraction: float = key(
        "Share of the records kept back for evaluation, above 0 and below 1.", default=0.1, gt=0, lt=1
    )
    eval_examples: int | None = key(
        'Records kept back for evaluation, as a number; "auto" goes by eval_fraction.', default=None, word="auto", ge=1
    )
    eval_path: str | None = key(
        "A file of its own for evaluation; nothing is kept back then.",
        default=None,
        example="data/test.jsonl",
        min_length=1,
    )
    seed: int = key("Names the draw of records, the evaluation set and the split.", default=0, ge=0, le=MAX_SEED)

    @model_validator(mode="before")
    @classmethod
    def _one_source(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        found = {name: value for name, value in cls.canonical(given).items() if value is not None}
        if "path" in found and "name" in found:
            raise ValueError("data.path and data.name are both given; give one of them.")
        return found | {"name": None} if "path" in found else found

    @model_validator(mode="after")
    def _one_evaluation_set(self) -> "Data":
        if self.eval_path is not None and self.eval_examples is not None:
            raise ValueError("data.eval_path and data.eval_examples are both given; give one of them.")
        return self


class Split(Section):
    """How the records are dealt to the clients."""

    kind: Literal["iid", "lda", "meta"] = key(
        "iid (at random) | lda (label shares from a Dirichlet distribution) | meta (each client its own labels).",
        default="iid",
        also=("splitter",),
    )
    alpha: float = key(
        "Dirichlet concentration of lda; smaller means more unlike clients. The paper's alpha.",
        default=0.5,
        gt=0,
        also=("dirichlet_alpha",),
    )
    field: str = key(
        "Record field that holds the label for lda and meta.", default="category", also=("partition_by",), min_length=1
    )
