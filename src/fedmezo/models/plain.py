"""Models as others run them, to compare with: plain Hugging Face, PEFT, and random weights in a known shape."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from fedmezo.errors import ModelError
from fedmezo.models.load import Loaded
from fedmezo.models.read import quiet, torch_dtype, window

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["SHAPES", "random_llama", "trained_names", "twin", "with_peft"]

# "3b" is OpenLLaMA-3B (3.43e9 parameters), "135m" SmolLM2-135M; "tiny" is for tests, the others complete the ladder.
SHAPES: dict[str, dict[str, int]] = {
    "3b": {"vocab_size": 32000, "hidden_size": 3200, "intermediate_size": 8640, "num_hidden_layers": 26,
           "num_attention_heads": 32, "max_position_embeddings": 2048},
    "tiny": {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
             "num_attention_heads": 4, "max_position_embeddings": 512},
    "30m": {"vocab_size": 16000, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 10,
            "num_attention_heads": 6, "max_position_embeddings": 2048},
    "60m": {"vocab_size": 16000, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 14,
            "num_attention_heads": 8, "max_position_embeddings": 2048},
    "135m": {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
             "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 2048},
    "300m": {"vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2752, "num_hidden_layers": 18,
             "num_attention_heads": 16, "max_position_embeddings": 2048},
    "1b": {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 19,
           "num_attention_heads": 16, "max_position_embeddings": 2048},
}  # fmt: skip


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """Returns a second model that shares the first one's weights and nothing else."""
    return copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})


def with_peft(model: PreTrainedModel, *, rank: int, alpha: int, targets: list[str]) -> nn.Module:
    """Returns `model` with peft's own LoRA layers in it, in eval mode; the matrices have the model's dtype.

    They alone want a gradient. B is zero as peft has it, so the model computes what it did.

    Raises:
      ModelError: the model has no such targets.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM")
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped = get_peft_model(model, config, autocast_adapter_dtype=False).eval()
    except ValueError as error:
        raise ModelError(f"PEFT cannot put LoRA into {type(model).__name__}: {error}") from error
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(model.dtype)
    return cast(nn.Module, wrapped)


def trained_names(wrapped: nn.Module) -> dict[str, str]:
    """Returns, for the LoRA matrices of a peft model, their name in it -> their name among our parameters."""
    names = (name for name, parameter in wrapped.named_parameters() if parameter.requires_grad)
    return {name: name.replace(".default.", ".") for name in names}


def random_llama(shape: str, *, dtype: str, device: str, copies: int = 1) -> Loaded:
    """Returns a model of random weights in a known shape, without a tokenizer; its losses mean nothing.

    Args:
      shape: one of `SHAPES`.
      dtype: as for `load_model`.
      device: a torch device; the weights are drawn there.
      copies: how many models of this size the caller will hold at once.

    Raises:
      ModelError: no such shape, or too little memory for so many copies and a fifth more.
    """
    if shape not in SHAPES:
        raise ModelError(f"model shape: expected one of {', '.join(SHAPES)}, got {shape!r}.")
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SHAPES[shape], tie_word_embeddings=False, bos_token_id=1, eos_token_id=2)
    with torch.device("meta"):
        numel = sum(weight.numel() for weight in LlamaForCausalLM(config).parameters())
    needed, free = 1.2 * copies * numel * torch_dtype(dtype).itemsize, _free_bytes(device)
    if needed > free:
        raise ModelError(
            f"Shape {shape!r} in {dtype} needs {needed / 1e9:.1f} GB on {device}, where {free / 1e9:.1f} GB are free; "
            "take a device with more memory or a shorter dtype."
        )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch_dtype(dtype))
    try:
        with torch.device(device), torch.random.fork_rng(devices=[device] if device.startswith("cuda") else []):
            torch.manual_seed(0)
            model: Any = LlamaForCausalLM(config).eval().requires_grad_(requires_grad=False)
    finally:
        torch.set_default_dtype(before)
    return Loaded(model, cast(Any, None), "", f"random {shape}", window(model))


def _free_bytes(device: str) -> float:
    if device.startswith("cuda"):
        return float(torch.cuda.mem_get_info(device)[0])
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    free = next((line for line in lines if line.startswith("MemAvailable")), "")
    return float(free.split()[1]) * 1024 if free else float("inf")
