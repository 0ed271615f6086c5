"""The sentences of a model card: data, traffic, privacy, robust rules, evaluation."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from fedmezo.studies.config import Config
from fedmezo.studies.page import DASH, count, privacy_words
from fedmezo.studies.public import dataset_id
from fedmezo.studies.yamltext import code

__all__ = [
    "LOADING", "METRICS", "NAMES", "PLAIN", "PROMPTS", "amounts", "data_words", "figure", "judged_on",
    "privacy_sentences", "robust_words", "table",
]  # fmt: skip

NAMES = {
    "fedmezo": "FedMeZO ([arXiv:2402.05926](https://arxiv.org/abs/2402.05926))",
    "fedkseed": "FedKSeed ([arXiv:2312.06353](https://arxiv.org/abs/2312.06353))",
    "fedkseed-pro": "FedKSeed-Pro ([arXiv:2312.06353](https://arxiv.org/abs/2312.06353))",
    "fedavg": "FedAvg by backpropagation",
}
METRICS = {
    "loss": "Loss, nats per answer token",
    "accuracy": "Answers right",
    "token_accuracy": "Answer tokens right",
    "exact_match": "Written answers exactly right",
    "rouge_l": "Rouge-L of written answers",
}
PROMPTS = {
    "auto": "with the tokenizer's chat template if it has one, else with Alpaca's form",
    "chat": "with the tokenizer's chat template",
    "alpaca": "in Alpaca's form",
    "alpaca-input": "in Alpaca's form with an input",
    "plain": "as they are",
    "sst2": "as sentences followed by 'It was'",
}
_SPLITS = {
    "iid": "dealt at random",
    "lda": "dealt by label, shares from a Dirichlet distribution of concentration {alpha:g}",
    "meta": "dealt so that each client has labels of its own",
    "natural": "dealt so that each label is one client",
}
LOADING = (
    "```python",
    "import torch",
    "from peft import PeftModel",
    "from transformers import AutoModelForCausalLM, AutoTokenizer",
    "",
    "base = {base}",
    "model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.{dtype})",
    'model = PeftModel.from_pretrained(model, "path/to/this/folder")',
    "tokenizer = AutoTokenizer.from_pretrained(base)",
    "```",
)
PLAIN = (
    "```python",
    "import torch",
    "from transformers import AutoModelForCausalLM, AutoTokenizer",
    "",
    'folder = "path/to/this/folder"',
    "model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.{dtype})",
    "tokenizer = AutoTokenizer.from_pretrained(folder)",
    "```",
)


def figure(value: float | None) -> str:
    """Returns a number with four significant digits, whole from 1,000 on; a dash for None and what is not finite."""
    if value is None or not math.isfinite(value):
        return DASH
    return count(value) if abs(value) >= 1000 else f"{value:.4g}"


def data_words(config: Config) -> str:
    """Returns what the clients trained on, and how it was dealt."""
    known, name = dataset_id(config), config.data.name or ""
    if known:
        told = f"[{known}](https://huggingface.co/datasets/{known})"
    else:
        told = "fedmezo's generated corpus" if name.startswith("builtin:") else "the clients' own, not published"
    return f"{told}, {_SPLITS[config.split.kind].format(alpha=config.split.alpha)}"


def judged_on(config: Config) -> str:
    """Returns what the evaluation was measured on."""
    data = config.data
    if data.eval_path is not None:
        return "a separate evaluation file"
    if data.eval_categories:
        many = len(data.eval_categories)
        return f"records of {many} held-out categor{'y' if many == 1 else 'ies'}, on which no client trained"
    return "records held back from the same data, on whose prompts no client trained"


def amounts(sums: Mapping[str, int], *, dim: int) -> Iterator[str]:
    """Yields a table of forward passes, tokens and bytes."""
    walks = sums["walks"]
    rows = [("Forward passes", count(sums["forwards"]))]
    rows += [("Tokens they read", count(sums["tokens"]))] if sums["tokens"] else []
    if walks:
        rows += [
            ("Bytes up, per client and round", figure(sums["up"] / walks)),
            ("Bytes down, per client and round", figure(sums["down"] / walks)),
        ]
    rows += [
        ("Bytes up and down, in all", count(sums["up"] + sums["down"])),
        ("Bytes of the trained numbers themselves", count(4 * dim)),
    ]
    yield from ("| | |", "|---|---|", *[f"| {name} | {value} |" for name, value in rows])


def privacy_sentences(config: Config, spent: Mapping[str, Any]) -> Iterator[str]:
    """Yields what is protected, and how well."""
    privacy = config.privacy
    if privacy.mode == "none":
        yield "No differential privacy: what the clients sent was not hidden by noise"
        return
    told = privacy_words(spent) if spent else "nothing spent yet"
    yield f"Differential privacy of the scalars the clients sent, mode {privacy.mode}: {told}"
    sigma = figure(spent.get("sigma", privacy.sigma))
    yield f"Noise multiplier {sigma}, limit {privacy.clip}, counted by {privacy.accountant}"
    if privacy.noise_seed is not None:
        yield "The noise was made from a known seed, for a study, so it protects nobody"


def robust_words(config: Config) -> str:
    """Returns what stood against clients that lie."""
    rule = config.robust.rule
    return f"Robust rule: {rule}" if rule != "none" else "Robust rule: none, the clients' mean"


def table(before: Mapping[str, float], after: Mapping[str, float]) -> Iterator[str]:
    """Yields the metrics before and after training as a table."""
    yield from ("| | before | after |", "|---|---|---|")
    for name, title in METRICS.items():
        if name in after:
            yield f"| {title} ({code(name)}) | {figure(before.get(name))} | {figure(after[name])} |"
