"""The model card of a tuned model: README.md as model hubs have it, written from the run's journal and configuration.

It names no path of this machine, no record and nobody's data; what came from a configuration is told as quoted text.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from fedmezo import __version__
from fedmezo.fl.spending import SPENT
from fedmezo.runtime.journal import Journal
from fedmezo.runtime.simulate import START
from fedmezo.studies.build import Tuned
from fedmezo.studies.card_words import (
    LOADING,
    METRICS,
    NAMES,
    PLAIN,
    PROMPTS,
    amounts,
    data_words,
    figure,
    judged_on,
    privacy_sentences,
    robust_words,
    table,
)
from fedmezo.studies.config import Config
from fedmezo.studies.connect import NETWORK
from fedmezo.studies.page import count
from fedmezo.studies.public import base_id, dataset_id, start_id
from fedmezo.studies.yamltext import code, harmless, yaml_lines

__all__ = ["CARD", "Card", "card_of"]

CARD = "README.md"
_KNOWN_METRICS = {"accuracy": "accuracy", "exact_match": "exact_match", "rouge_l": "rouge"}  # ours -> the hub's


@dataclass(frozen=True)
class Card:
    """What a card says; `text` is the card.

    Attributes:
      config: the resolved configuration.
      kind: how the clients ran, as the journal's header has it.
      package: version of fedmezo that began the run.
      noise: version of the directions' noise.
      source: where the base model came from.
      fingerprint: sha256 of its weights.
      digest: `Params.digest()` of the trained parameters.
      dim: trained numbers.
      merged: whether the folder holds a whole model.
      rounds: complete rounds the model has behind it.
      sums: of these rounds: forwards, tokens, up, down (wire bytes), walks (clients times rounds).
      rates: mean rate of the first and of the last of them; empty before the first.
      before: metrics of the untrained model; empty when it was not judged.
      after: metrics of this model; empty when it was not judged.
      privacy: what had been spent of whose privacy; empty where none is kept.
    """

    config: Config
    kind: str
    package: str
    noise: int
    source: str
    fingerprint: str
    digest: str
    dim: int
    merged: bool
    rounds: int
    sums: Mapping[str, int]
    rates: tuple[float, ...]
    before: Mapping[str, float]
    after: Mapping[str, float]
    privacy: Mapping[str, Any]

    @property
    def base(self) -> str | None:
        """The hub id of the base model, if it has one."""
        return base_id(self.config.model.name, self.source)

    @property
    def title(self) -> str:
        """What the model is called."""
        made = "model" if self.merged else "LoRA adapter"
        return f"fedmezo {made} for {self.base.rpartition('/')[2]}" if self.base else f"fedmezo {made}"

    def text(self, *, weights: str = "") -> str:
        """Returns the card.

        Args:
          weights: sha256 of the adapter's file of weights, if it is one.
        """
        head = ["---", *yaml_lines(self._data()), "---"]
        return "\n".join([*head, "", *_body(self, weights=weights)]) + "\n"

    def _data(self) -> dict[str, Any]:
        library = "transformers" if self.merged else "peft"
        base, data = self.base, dataset_id(self.config)
        tags = ["fedmezo", "federated-learning", "zeroth-order", *([] if self.merged else ["lora"])]
        if base:
            tags.append(f"base_model:{'finetune' if self.merged else 'adapter'}:{base}")
        known = [theirs for ours, theirs in _KNOWN_METRICS.items() if ours in self.after]
        return {
            **({"base_model": base, "base_model_relation": "finetune" if self.merged else "adapter"} if base else {}),
            "library_name": library,
            "pipeline_tag": "text-generation",
            "tags": tags,
            **({"datasets": [data]} if data else {}),
            **({"metrics": known} if known else {}),
            **({"model-index": [self._results()]} if self._measured() else {}),
        }

    def _measured(self) -> dict[str, float]:
        return {name: float(self.after[name]) for name in METRICS if name in self.after}

    def _results(self) -> dict[str, Any]:
        data = dataset_id(self.config)
        held = {
            "name": f"{judged_on(self.config)}, {count(self.after['examples'])} examples",
            "type": data or "private",
        }
        metrics = [{"type": name, "name": METRICS[name], "value": value} for name, value in self._measured().items()]
        task = {"type": "text-generation", "name": "Text Generation"}
        return {"name": self.title, "results": [{"task": task, "dataset": held, "metrics": metrics}]}


def card_of(journal: Journal, tuned: Tuned, *, upto: int, merged: bool) -> Card:
    """Returns the card of the model after `upto` rounds.

    Args:
      journal: the run's.
      tuned: the model as it is then.
      upto: complete rounds it has behind it.
      merged: whether it is written as a whole model.
    """
    sums: Counter[str] = Counter(forwards=0, tokens=0, up=0, down=0, walks=0)
    rates, spent = [], {}
    for place in range(upto):
        done = journal.round(place)
        sums.update(forwards=done.forwards, tokens=done.tokens)
        for entry in done.entries:
            sums.update(up=entry.bytes_up, down=entry.bytes_down, walks=entry.walks)
        rates.append(done.rate)
        spent = next((json.loads(told) for kind, told in reversed(done.events) if kind == SPENT), spent)
    judged = {place: metrics for place, split, metrics in journal.evaluations() if split == "eval"}
    header, params = journal.header, tuned.bench.params
    return Card(
        tuned.config, header.kind, header.package, header.noise_version, tuned.loaded.source, tuned.loaded.fingerprint,
        params.digest(), params.dim, merged, upto, dict(sums), tuple(rates[:1] + rates[-1:]), judged.get(START, {}),
        judged.get(upto - 1 if upto else START, {}), spent,
    )  # fmt: skip


def _body(card: Card, *, weights: str) -> Iterator[str]:
    yield from (f"# {harmless(card.title)}", "", *_opening(card), "")
    yield from ("## Training", "", *[f"- {line}" for line in _training(card)], "")
    yield from ("## What travelled", "", *amounts(card.sums, dim=card.dim), "")
    yield from ("## Privacy and trust", "", *[f"- {line}" for line in _trust(card)], "")
    yield from ("## Evaluation", "", *_evaluation(card), "")
    yield from ("## How to use it", "", *_use(card), "")
    yield from ("## How to check it", "", *_checks(card, weights=weights), "")
    yield from ("## Versions", "", _versions(card))


def _opening(card: Card) -> Iterator[str]:
    config = card.config
    base = f"[{card.base}](https://huggingface.co/{card.base})" if card.base else "a base model that has no public name"
    what = "All parameters" if config.adapter.kind == "full" else "A LoRA adapter"
    many = count(config.federation.clients)
    clients = f"{many} clients on machines of their own" if card.kind == NETWORK else f"{many} simulated clients"
    yield (
        f"{what} of {base}, tuned by {NAMES[config.algorithm.name]} over {clients}. fedmezo wrote this card from the "
        "run's journal."
    )
    if card.source.startswith("smollm2-135m "):
        yield f"\nIt was tuned on a 4-bit copy of that model ({code(card.source)}), so its losses are of that copy."


def _training(card: Card) -> Iterator[str]:
    config, federation, algorithm = card.config, card.config.federation, card.config.algorithm
    cohort = "all of them" if federation.cohort is None else f"{count(federation.cohort)} drawn for each"
    yield f"Rounds: {count(card.rounds)}, with {count(federation.clients)} clients, {cohort}"
    steps, examples = federation.local_steps, federation.batch_size
    each = f"{count(examples)} example{'s' * (examples > 1)}"
    yield f"A client's round: {count(steps)} step{'s' * (steps > 1)} of {each}"
    yield f"Data: {data_words(config)}"
    if card.rates:
        yield f"Rate: {figure(card.rates[0])} in the first round, {figure(card.rates[-1])} in the last"
    if algorithm.name == "fedavg":
        yield f"Gradients by backpropagation, optimiser {algorithm.optimizer}"
    else:
        yield (
            f"Forward passes only: two losses at a distance of mu = {figure(algorithm.mu)}, {algorithm.directions} "
            f"{algorithm.law} direction{'s' * (algorithm.directions > 1)} per step"
        )
    yield f"Trained numbers: {count(card.dim)}{_lora_words(config)}"
    yield f"Base model in {config.model.dtype}{'' if config.model.quantize == 'none' else ', ' + config.model.quantize}"
    if config.adapter.start is not None:
        known = start_id(config)
        told = f"the adapter {code(known)}" if known else "an adapter that was there before"
        yield f"Started from {told}, digest {code((config.adapter.start_digest or '')[:12])}"
    if card.kind == "python":
        yield "Begun by a Python program, whose data, model or algorithm may be its own"


def _lora_words(config: Config) -> str:
    adapter = config.adapter
    if adapter.kind == "full":
        return ""
    targets = "PEFT's choice of modules" if adapter.targets is None else " ".join(map(code, adapter.targets))
    alpha = "as it started" if adapter.alpha is None else adapter.alpha
    return f"; LoRA rank {adapter.rank}, alpha {alpha}, on {targets}"


def _trust(card: Card) -> Iterator[str]:
    yield from privacy_sentences(card.config, card.privacy)
    yield robust_words(card.config)
    if card.config.network.secure:
        yield "Secure aggregation: the server saw a round's sum only"


def _evaluation(card: Card) -> Iterator[str]:
    if not card.after:
        yield f"The model was not judged after round {card.rounds}."
        return
    yield f"Measured by the run on: {judged_on(card.config)}, {count(card.after['examples'])} examples."
    yield from ("", *table(card.before, card.after))


def _use(card: Card) -> Iterator[str]:
    name = json.dumps(card.base or "path/to/the/base/model", ensure_ascii=False)
    lines = PLAIN if card.merged else LOADING
    yield from (line.format(base=name, dtype=card.config.model.dtype) for line in lines)
    if card.base is None and not card.merged:
        known = card.config.model.name.startswith("builtin:")
        yield from ("", "The base model comes with fedmezo." if known else "The base model is not public.")
        yield f"Its weights have the fingerprint {code(card.fingerprint)}."
    template = card.config.data.template
    yield from ("", f"Prompts were written {PROMPTS.get(template, 'with a template of the run')}.")
    yield '`fedmezo ask FOLDER "PROMPT"` writes them so, and prints the answer.'


def _checks(card: Card, *, weights: str) -> Iterator[str]:
    yield "`fedmezo verify FOLDER` compares every byte of this folder, this card too, with `MANIFEST.json`."
    yield ""
    yield f"- Digest of the trained numbers: {code(card.digest)}"
    if weights:
        yield f"- sha256 of `adapter_model.safetensors`: {code(weights)}"


def _versions(card: Card) -> str:
    parts = [f"{name} {version(name)}" for name in ("torch", "transformers", "peft")]
    return f"Run: fedmezo {code(card.package)}, noise {card.noise}. Card: fedmezo {__version__}, {', '.join(parts)}."
