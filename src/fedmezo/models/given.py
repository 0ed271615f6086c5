"""What a caller brings as objects: a model of transformers, a LoraConfig of PEFT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedmezo.errors import ModelError
from fedmezo.models.adapters import Adapter, lora_adapter, make_adapter
from fedmezo.models.load import Loaded
from fedmezo.models.read import DTYPES, fingerprint, window

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel

__all__ = ["adopt", "dtype_of", "lora_settings"]


def adopt(model: PreTrainedModel, tokenizer: Any, *, device: str = "cpu") -> Loaded:
    """Returns a model that is in memory already as a frozen base model; it is put into eval mode.

    Args:
      model: a causal language model of transformers, without adapters in it.
      tokenizer: its tokenizer; None where rows are tokenised already and nothing is written.
      device: where it shall be.

    Raises:
      ModelError: it is no such model, or its weights have a type we do not train over.
    """
    if not hasattr(model, "get_output_embeddings") or not hasattr(model, "config"):
        raise ModelError(
            f"model: expected the name of a model or a causal language model of transformers, got a "
            f"{type(model).__name__}."
        )
    if hasattr(model, "peft_config"):
        raise ModelError("model: this one has adapters of PEFT in it; give the base model, and what to train apart.")
    dtype_of(model)
    model.eval().requires_grad_(requires_grad=False)
    mark = fingerprint(model.to("cpu"))  # type: ignore[arg-type]
    name = str(getattr(model.config, "_name_or_path", "") or "")
    return Loaded(model.to(device), tokenizer, mark, f"python:{name}", window(model))  # type: ignore[arg-type]


def dtype_of(model: PreTrainedModel) -> str:
    """Returns the name of the type of a model's weights; raises ModelError when there is none, or it is another."""
    kinds = {tensor.dtype for tensor in model.parameters()}
    names = [name for name, kind in DTYPES.items() if kinds == {kind}]
    if not names:
        found = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds)) or "no weight"
        raise ModelError(f"model: expected all weights in one of {', '.join(DTYPES)}, got {found}.")
    return names[0]


def lora_settings(model: PreTrainedModel, config: LoraConfig) -> dict[str, Any]:
    """Returns the rank, the alpha and the targets that give the adapter PEFT would make of `config`.

    Args:
      model: the frozen base model; not touched.
      config: PEFT's settings.

    Raises:
      ModelError: a setting we do not honour, or one by which modules have ranks or scales of their own.
    """
    adapter = lora_adapter(model, config)
    names = tuple(sorted({site.module.rpartition(".")[2] for site in adapter.sites}))
    paths = tuple(sorted(site.module for site in adapter.sites))
    for targets in (names, paths):
        told = {"rank": int(config.r), "alpha": int(config.lora_alpha), "targets": targets}
        if _same(adapter, make_adapter(model, kind="lora", **told)):
            return told
    raise ModelError(
        "peft_config: one rank and one alpha for all modules are honoured here, and scale alpha / rank; leave "
        "rank_pattern, alpha_pattern and use_rslora out."
    )


def _same(one: Adapter, other: Adapter) -> bool:
    return dict(one.shapes) == dict(other.shapes) and set(one.sites) == set(other.sites)
