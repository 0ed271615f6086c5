"""One question to a tuned model, written as the run writes its prompts.

print(fedmezo.ask("runs/mine", "Which colour has a lamp?"))
"""

from pathlib import Path
from typing import Any

from fedmezo.data.records import Record
from fedmezo.data.templates import resolve
from fedmezo.errors import ConfigError
from fedmezo.models.adapters import SETTINGS as ADAPTER
from fedmezo.models.read import quiet
from fedmezo.models.starts import base_named_in
from fedmezo.runtime.journal import replay
from fedmezo.studies.build import Tuned, build_model, load_base
from fedmezo.studies.config import Config, load_config, parse_config
from fedmezo.studies.files import JOURNAL
from fedmezo.studies.folder import base_of, is_run, opened, rounds_upto
from fedmezo.studies.origin import from_folder, from_model
from fedmezo.studies.seal import check
from fedmezo.studies.uses import SETTINGS

__all__ = ["ask"]


def ask(
    target: Path | str, prompt: str, *, given: str = "", round: int | None = None, max_tokens: int | None = None
) -> str:
    """Returns the model's answer to a prompt, by greedy decoding; needs no training data.

    Args:
      target: a run's folder, an adapter's (of fedmezo or of PEFT alone), or a merged model's.
      prompt: the instruction.
      given: the input that goes with it, for templates that have a place for one.
      round: number of complete rounds, for a run; the last by default.
      max_tokens: tokens of the answer at most; eval.max_new_tokens by default.

    Raises:
      ConfigError: nothing there, no such round, or an empty prompt.
      DataError: the prompt is longer than the model's window.
      SealError: a byte of the folder has changed since it was sealed.
    """
    if not (prompt.strip() or given.strip()):
        raise ConfigError("The prompt is empty; give a question or an instruction.")
    if max_tokens is not None and max_tokens < 1:
        raise ConfigError(f"--max-tokens: expected at least 1, got {max_tokens}.")
    tuned = _tuned(Path(target), round)
    tokenizer: Any = tuned.loaded.tokenizer
    record = Record(instruction=prompt, input=given, output="")
    with quiet():  # transformers warns of texts beyond the model's window; generate refuses them
        form = resolve(tuned.config.data.template, tokenizer, records=[record])
        ids = tokenizer([form.render(record)[0]], add_special_tokens=False)["input_ids"][0]
    most = tuned.config.eval.max_new_tokens if max_tokens is None else max_tokens
    made = tuned.bench.generate((*form.prefix, *ids), max_new_tokens=most)
    return str(tokenizer.decode(made, skip_special_tokens=True)).strip()


def _tuned(target: Path, number: int | None) -> Tuned:
    if is_run(target):
        with opened(target, readonly=True) as journal:
            upto = rounds_upto(journal, number)
            tuned = build_model(*base_of(journal))
            replay(tuned.bench.params, journal, upto=upto)
            return tuned
    if number is not None:
        raise ConfigError(f"--round: {target} is no run, so it holds one model only; leave it out.")
    config = _config_of(target)
    return build_model(config, load_base(config))


def _config_of(folder: Path) -> Config:
    """Returns the configuration with which an exported folder, or one that PEFT or transformers wrote, is loaded."""
    adapter = (folder / ADAPTER).exists()
    if not adapter and not (folder / "config.json").exists():
        raise ConfigError(
            f"{folder} is neither a run (no {JOURNAL}) nor an adapter (no {ADAPTER}) nor a model (no config.json)."
        )
    check(folder, in_part=True)
    known = (folder / SETTINGS).exists()
    config = load_config(folder / SETTINGS) if known else parse_config({})
    if not adapter:
        alone = from_model(config, folder)
        whole = alone.model.model_copy(update={"quantize": "none"})
        kept = alone.adapter.model_copy(update={"kind": "full"})  # no adapter beside the weights
        return alone.model_copy(update={"model": whole, "adapter": kept})
    if not known:
        named = base_named_in(folder)
        if not named:
            raise ConfigError(f"{folder} does not name its base model; its {ADAPTER} should.")
        config = config.model_copy(update={"model": config.model.model_copy(update={"name": named})})
    return from_folder(config, folder)
