"""The sections that say what a run is made of: model, adapter, data and how the data is dealt."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

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
    quantize: Literal["none", "int8", "int4"] = key(
        "Holds the frozen linear layers in 8 or about 5 bits per weight: none | int8 | int4. Arithmetic stays in dtype "
        "and slopes as exact. For lora only; embeddings are kept whole.",
        default="none",
        also=("quantization", "load_in"),
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
    start: str | None = key(
        "A LoRA adapter to begin with: a PEFT folder, or a Hugging Face id (owner/name, or owner/name@commit). It says "
        "rank, alpha and targets itself, so leave these out.",
        default=None,
        also=("adapter_name_or_path", "init_from"),
        example="runs/first/adapter",
        min_length=1,
    )
    start_digest: str | None = key(
        "The sha256 of that adapter's numbers and scales, or its first 12 digits at least; any other adapter is "
        "refused. A run writes it here when it begins.",
        default=None,
        example="0123456789ab",
        min_length=1,
    )
    rank: int | None = key("LoRA rank r.", default=8, also=("r", "lora_r", "lora_rank"), ge=1)
    alpha: int | None = key(
        "LoRA scale: the product is multiplied by alpha / rank.", default=16, also=("lora_alpha",), ge=1
    )
    targets: tuple[str, ...] | None = key(
        'Names of the modules that get an adapter, as a list; "auto" takes the choice PEFT makes for the architecture.',
        default=None,
        word="auto",
        also=("target_modules", "lora_target_modules"),
        min_length=1,
    )

    @model_validator(mode="before")
    @classmethod
    def _left_to_the_start(cls, given: Any) -> Any:
        """Leaves rank and alpha to the adapter that the run starts from, unless they are given."""
        if not isinstance(given, Mapping):
            return given
        found = cls.canonical(given)
        if found.get("start") is None or found.get("preset") is not None:
            return found
        return {"rank": None, "alpha": None} | found

    @field_validator("start_digest")
    @classmethod
    def _is_a_digest(cls, digest: str | None) -> str | None:
        if digest is not None and not re.fullmatch("[0-9a-f]{12,64}", digest):
            raise ValueError(f'adapter.start_digest: expected 12 to 64 digits of 0-9a-f, got "{digest[:70]}".')
        return digest

    @model_validator(mode="after")
    def _start_fits(self) -> "Adapter":
        if self.start is None:
            if self.rank is None or self.alpha is None:
                raise ValueError("adapter.rank and adapter.alpha must be numbers where there is no adapter.start.")
        elif self.kind == "full":
            raise ValueError(
                'adapter.start is a LoRA adapter and adapter.kind = "full" trains the weights; delete one of them.'
            )
        return self

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
        'Records to use at most, drawn before any other choice; "all" for no limit.',
        default=None,
        word="all",
        also=("max_samples",),
        ge=1,
    )
    categories: Annotated[tuple[str, ...], Field(min_length=1)] | Annotated[int, Field(ge=1)] | None = key(
        "Values of split.field whose records are used, as a list, or how many of them to draw among those with usable "
        'records; "all" for every one.',
        default=None,
        word="all",
        also=("tasks",),
    )
    per_category: int | None = key(
        'Usable records kept of each value of split.field at most, drawn by data.seed; "all" for no limit.',
        default=None,
        word="all",
        ge=1,
    )
    min_per_category: int = key(
        "Values of split.field with fewer usable records are left out and counted.", default=1, ge=1
    )
    max_input: int | None = key(
        'Longest input field in characters; records with a longer one are dropped and counted; "any" for no limit.',
        default=None,
        word="any",
        ge=0,
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
        "Prompt: auto (the model's chat template if it has one) | chat | alpaca | alpaca-input (alpaca's form with an "
        "input for every record) | plain | sst2 | your own text with {instruction} and {input}.",
        default="auto",
        also=("prompt", "prompt_template"),
        min_length=1,
    )
    eval_fraction: float = key(
        "Share of the records kept back for evaluation, above 0 and below 1.", default=0.1, gt=0, lt=1
    )
    eval_examples: int | None = key(
        'Records kept back for evaluation, as a number; "auto" goes by eval_fraction, and is all of eval_categories.',
        default=None,
        word="auto",
        ge=1,
    )
    eval_categories: tuple[str, ...] = key(
        "Held-out task: values of split.field, as a list. The evaluation set is made of their records, and no client "
        "trains on any of them.",
        default=(),
        also=("held_out",),
    )
    eval_path: str | None = key(
        "A file of its own for evaluation; nothing is kept back then.",
        default=None,
        example="data/test.jsonl",
        min_length=1,
    )
    compat: tuple[Literal["none-input"], ...] = key(
        'Quirks of the official code to repeat, as a list. none-input: a missing input is the text "None", and so '
        "every GSM8K prompt takes the form with an input.",
        default=(),
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
        if self.eval_path is not None and self.eval_categories:
            raise ValueError("data.eval_path and data.eval_categories are both given; give one of them.")
        both = set(self.eval_categories) & set(self.categories if isinstance(self.categories, tuple) else ())
        if both:
            raise ValueError(
                f'data.categories and data.eval_categories both name "{min(both)}"; held-out records are never trained '
                "on, so take it out of one of them."
            )
        return self


class Split(Section):
    """How the records are dealt to the clients."""

    kind: Literal["iid", "lda", "meta", "natural"] = key(
        "iid (at random) | lda (label shares from a Dirichlet distribution) | meta (each client its own labels) | "
        "natural (each label is one client; federation.clients must be their number).",
        default="iid",
        also=("splitter",),
    )
    alpha: float = key(
        "Dirichlet concentration of lda; smaller means more unlike clients. The paper's alpha.",
        default=0.5,
        gt=0,
        also=("dirichlet_alpha",),
    )
    balanced: bool = key(
        "lda: a client that holds the mean number of records gets none of the labels still to be shared out, as in "
        "FedKSeed.",
        default=False,
    )
    min_examples: int = key(
        "lda: shares are drawn afresh until every client has this many records; 10 in FedKSeed.", default=1, ge=1
    )
    field: str = key(
        "Record field that holds the label: what lda, meta and natural deal by, and what data.categories and "
        "data.eval_categories name.",
        default="category",
        also=("partition_by",),
        min_length=1,
    )
