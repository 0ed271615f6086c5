"""The sections that say how a run goes: who takes part, the descent, judging, guarding, output, machine."""

import math
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from fedmezo.studies.keys import MAX_SEED, Section, key

__all__ = [
    "ALGORITHMS", "BUDGETS", "POOLED", "Algorithm", "Eval", "Federation", "Guard", "Output", "Runtime",
]  # fmt: skip

ALGORITHMS = ("fedmezo", "fedavg", "fedkseed", "fedkseed-pro")
POOLED = ("fedkseed", "fedkseed-pro")
BUDGETS = ("rounds", "forwards", "tokens", "seconds", "bytes")


class Federation(Section):
    """Who takes part, and for how long."""

    clients: int = key("Number of clients; the paper's N.", default=3, also=("num_clients", "client_num"), ge=1)
    cohort: int | None = key(
        'Clients drawn for each round; "all" for everyone.',
        default=None,
        word="all",
        also=("clients_per_round", "sample_client_num"),
        ge=1,
    )
    rounds: int = key("Number of rounds; the paper's T.", default=20, also=("num_rounds", "total_round_num"), ge=1)
    local_steps: int = key(
        "Steps a client takes in a round; the paper's H.", default=30, also=("steps", "local_update_steps"), ge=1
    )
    batch_size: int = key("Examples per step.", default=1, also=("batch", "per_device_train_batch_size"), ge=1)
    seed: int = key("Names every direction, batch and cohort of the run.", default=0, ge=0, le=MAX_SEED)
    weighting: Literal["uniform", "samples", "dataset"] = key(
        "Weight of a client in the mean: uniform | samples (examples used this round) | dataset (examples it owns).",
        default="uniform",
    )
    transport: Literal["scalars", "dense"] = key(
        "What travels up: scalars (4 bytes a step) | dense (every trained parameter). The model is the same.",
        default="scalars",
    )
    pull: Literal["auto", "pairs", "sums", "dense"] = key(
        "How a client gets the model: pairs (the steps it missed) | sums (one number per seed of the pool, for the "
        "fedkseed family) | dense (every trained parameter) | auto (whichever is cheapest at this bandwidth).",
        default="auto",
    )
    sums_coding: Literal["float32", "float16", "bfloat16"] = key(
        "Number format of the pool's sums on their way to a client; the 16-bit ones halve the bytes and change where "
        "its walk starts by their rounding.",
        default="float32",
    )
    bandwidth: float = key("A client's download in MB/s, to choose what to pull.", default=1.25, gt=0)
    budget: dict[str, float] = key(
        "End the run after the first round at which one of these is spent, as a table: { forwards = 2000 }. A backward "
        "pass counts as two forwards; bytes go both ways.",
        default={},
    )

    @model_validator(mode="after")
    def _cohort_fits(self) -> "Federation":
        if self.cohort is not None and self.cohort > self.clients:
            raise ValueError(
                f"federation.cohort: expected at most federation.clients = {self.clients}, got {self.cohort}."
            )
        for name, amount in self.budget.items():
            if name not in BUDGETS:
                raise ValueError(f"federation.budget: expected one of {', '.join(BUDGETS)}, got {name!r}.")
            if amount <= 0:
                raise ValueError(f"federation.budget: expected more than 0 {name}, got {amount}.")
        return self


class Algorithm(Section):
    """The descent every client does."""

    name: Literal["fedmezo", "fedavg", "fedkseed", "fedkseed-pro"] = key(
        "fedmezo (a fresh direction every step) | fedkseed (directions from a pool of seeds) | fedkseed-pro (seeds "
        "that mattered are drawn more often) | fedavg (backpropagation, the baseline).",
        default="fedmezo",
    )
    rate: float | None = key(
        'Learning rate, in parameter units per unit of slope; the paper\'s eta. "auto" starts at 0.3 / sqrt(d) and is '
        "adapted; for fedavg it is 0.05 (sgd) or 5e-4 (adamw).",
        default=None,
        word="auto",
        also=("lr", "learning_rate"),
        gt=0,
    )
    adapt: bool | None = key(
        "Set the rate by line searches on a few fixed batches in the first third of the run; not for fedavg. "
        '"auto" is true where the rate is "auto".',
        default=None,
        word="auto",
    )
    mu: float | None = key(
        "How far from the current weights the two losses are taken, in parameter units; the paper's mu. "
        '"auto" is 1e-3 for a float32 model and 1e-2 for 16-bit ones, or what a short measurement finds where that is '
        "not usable.",
        default=None,
        word="auto",
        also=("eps", "epsilon", "zo_eps"),
        gt=0,
    )
    directions: int = key(
        "Directions averaged in each step, n; each costs two forward passes.", default=1, also=("num_directions",), ge=1
    )
    law: Literal["gaussian", "rademacher"] = key(
        "Law of a direction's entries: gaussian | rademacher.", default="gaussian"
    )
    estimator: Literal["two-point", "forward"] = key(
        "Slope from the losses on both sides (two-point), or from one side and the middle (forward).",
        default="two-point",
    )
    paper_eq2_scale: bool = key(
        "With estimator = forward only: the factor 1/(2 mu) as the paper's Eq. 2 prints it.", default=False
    )
    clip: Annotated[float, Field(gt=0)] | Literal["none"] = key(
        'Slopes are limited to this many of their running scale; "none" is the paper\'s plain method.',
        default=3.0,
        also=("clip_slope",),
    )
    clip_at: float | None = key(
        "A limit on |slope| itself, in nats per unit of the parameters, in place of clip; the same in every round, and "
        "in force from the first.",
        default=None,
        example=50.0,
        gt=0,
    )
    clip_quantile: float = key(
        "The running scale of the slopes is this quantile of a round's |slope|, as a normal deviation; 0.5 is the "
        "median. A lower one holds against more clients that send huge slopes, and fewer that send none.",
        default=0.5,
        ge=0.05,
        le=0.95,
    )
    decay: Literal["constant", "linear", "cosine", "wsd"] | None = key(
        "How the rate falls over the rounds: constant | linear | cosine | wsd (constant for the first half, then "
        'linear); "auto" is wsd where the rate is adapted, else constant.',
        default=None,
        word="auto",
        also=("schedule", "lr_scheduler_type"),
    )
    normalise: bool = key(
        "Divide the slopes of a step by their deviation, so that the rate is a step length, as FZOO; needs "
        "directions of at least 2.",
        default=False,
        also=("normalize",),
    )
    momentum: float = key(
        "Share of the last step that is repeated, kept as (seed, coefficient) pairs; starts anew every round.",
        default=0.0,
        ge=0,
        lt=1,
    )
    shared: bool = key(
        "All clients of a round walk along the same directions, so that their slopes can be compared one by one, as "
        "[robust] and central [privacy] need; a round then tries as many directions as one client.",
        default=False,
        also=("shared_directions",),
    )
    coding: Literal["float32", "float16", "bfloat16", "float8", "sign"] = key(
        "Number format of the slopes on the wire: float32 | float16 | bfloat16 | float8 (e5m2) | sign (1 bit, as "
        "FeedSign). Clients walk by the rounded slopes, so the model is what the bytes say.",
        default="float32",
    )
    pool: int = key(
        "Seeds to draw directions from, for the fedkseed family; the paper's K.",
        default=4096,
        also=("pool_size",),
        ge=1,
        le=2**20,
    )
    temperature: float = key(
        "fedkseed-pro: what the scores are divided by before the softmax; lower prefers the best seeds more.",
        default=1.0,
        gt=0,
    )
    importance: bool = key(
        "fedkseed-pro: weight every step by 1 / (K p), so that its mean is that of a uniform draw.", default=False
    )
    score_clip: float = key(
        "fedkseed-pro: |slope| counts at most this much in a seed's score; the paper's C.",
        default=1000.0,
        also=("bias_loss_clip",),
        gt=0,
    )
    score_prior: bool = key(
        "fedkseed-pro: every seed's history begins with one slope of 0, as in the paper's code; without it, seeds "
        "never drawn score the mean.",
        default=True,
    )
    optimizer: Literal["sgd", "adamw"] = key(
        "fedavg: sgd (the papers' baseline) | adamw; its state starts anew every round.",
        default="sgd",
        also=("optim",),
    )
    weight_decay: float = key("fedavg: share of the parameters taken off per unit of rate.", default=0.0, ge=0)
    gradient_checkpointing: bool = key(
        "fedavg: compute activations twice instead of keeping them; less memory, a third more time.", default=False
    )

    @field_validator("weight_decay")
    @classmethod
    def _decays_gradients_only(cls, decay: float, info: ValidationInfo) -> float:
        name = info.data.get("name")
        if decay and name != "fedavg":
            raise ValueError(
                f"algorithm.weight_decay is for fedavg only, got {decay} with {name}: a decay is a multiple of the "
                "parameters, which no sum of named directions can express, so scalars could not carry it. Set it to 0."
            )
        return decay

    @field_validator("clip", mode="before")
    @classmethod
    def _no_clip(cls, value: Any) -> Any:
        return "none" if value == math.inf else value

    @model_validator(mode="after")
    def _scale_needs_forward(self) -> "Algorithm":
        if self.paper_eq2_scale and self.estimator != "forward":
            raise ValueError('algorithm.paper_eq2_scale needs algorithm.estimator = "forward".')
        if self.normalise and self.directions < 2:
            raise ValueError(
                f"algorithm.normalise divides by the deviation of a step's slopes: algorithm.directions must be at "
                f"least 2, got {self.directions}."
            )
        if self.name == "fedavg" and self.clip_at is not None:
            raise ValueError("algorithm.clip_at is a limit on slopes, and fedavg has none; leave it out.")
        if self.name == "fedavg" and self.shared:
            raise ValueError("algorithm.shared is about directions, and fedavg has none; set it to false.")
        if self.name == "fedavg" and self.optimizer == "adamw" and self.momentum:
            raise ValueError(
                f"algorithm.momentum is for sgd, got {self.momentum} with adamw, which keeps means of its own; set it "
                "to 0."
            )
        return self

    @property
    def clip_multiple(self) -> float:
        """The clip as a number: inf for "none"."""
        return math.inf if self.clip == "none" else float(self.clip)


class Eval(Section):
    """When and how the model is judged."""

    every: int = key(
        "Rounds between evaluations; the last round is always evaluated.", default=5, also=("freq", "eval_freq"), ge=1
    )
    examples: int = key("Examples per evaluation at most.", default=200, also=("num_examples",), ge=1)
    metrics: tuple[Literal["loss", "accuracy", "rouge_l", "exact_match"], ...] = key(
        "Any of loss | accuracy | rouge_l | exact_match, as a list; the last two write answers, which takes longer.",
        default=("loss", "accuracy"),
        min_length=1,
    )
    per_client: bool = key("Also judge on each client's own evaluation examples.", default=False)
    max_new_tokens: int = key("Tokens written at most per answer, for rouge_l and exact_match.", default=64, ge=1)


class Guard(Section):
    """What happens when the loss goes up instead of down."""

    on_surge: Literal["warn", "halve", "rollback"] = key(
        "warn | halve (the rate, from then on) | rollback (to the best round, then half of the rate).",
        default="rollback",
    )
    batches: int | None = key(
        "Training batches that are judged again and again, a dozen times in a run: when their loss rises, the run has "
        'surged; 0 for none. "auto" is 32 examples, or 2 % of the run\'s forward passes if that is more; 15 % at '
        "most, or 25 % where the rate is adapted, but 6 batches at least.",
        default=None,
        word="auto",
        ge=0,
        le=1024,
    )


class Output(Section):
    """What is kept, and where."""

    dir: str | None = key(
        "Folder of the run; made from the configuration's name and the time when left out.",
        default=None,
        also=("out", "outdir", "output_dir"),
        example="runs/mine",
        min_length=1,
    )
    export: bool = key("Write the tuned adapter (or model) at the end.", default=True)
    report: bool = key("Write report.html at the end.", default=True)
    tensorboard: bool = key("Write TensorBoard curves.", default=True)
    wandb: bool = key(
        "Write the curves and settings for Weights & Biases, on this machine; `wandb sync` sends them, or "
        "WANDB_MODE=online at once.",
        default=False,
    )


class Runtime(Section):
    """The machine. These keys change speed and last bits of losses; at set lanes and threads, workers change no bit."""

    device: Literal["cpu", "cuda", "auto"] = key("cpu | cuda | auto (cuda when there is one).", default="cpu")
    workers: int = key(
        "Processes that walk, each with a model of its own, on a GPU of its own where there are several; 1 is this "
        "process. Clients are dealt to them in turn, and they walk on while a round is judged.",
        default=1,
        also=("num_workers", "processes"),
        ge=1,
        le=1024,
    )
    threads: int | None = key(
        'CPU threads of a process; "auto" leaves the choice to torch, or shares the cores among the workers.',
        default=None,
        word="auto",
        also=("num_threads",),
        ge=1,
    )
    lanes: int | None = key(
        'Settings of the adapter evaluated in one forward pass; "auto" goes by memory.', default=None, word="auto", ge=1
    )
