"""Reads a causal language model from disk with transformers: strict, quiet, no network, no foreign code."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fedmezo.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Configurations name their longest input differently; the first of these that is there counts.
_WINDOW_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")

# Models without position embeddings (ALiBi, state space) have no longest input.
UNLIMITED = 2**31 - 1


@contextmanager
def quiet() -> Iterator[None]:
    """Lends a scope in which transformers neither logs warnings nor draws progress bars.

    Acts on the whole process while it lasts, standard error included; what was set before is set again afterwards.
    """
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        # transformers' own switch would also switch the hub's bars off, and does not reach those of its GGUF reader.
        with redirect_stderr(StringIO()):
            yield
    finally:
        logging.set_verbosity(level)


def torch_dtype(name: str) -> torch.dtype:
    """Returns the torch type called `name`; `ModelError` when it is not one of `DTYPES`."""
    if name not in DTYPES:
        raise ModelError(f"model dtype: expected one of {', '.join(DTYPES)}, got {name!r}.")
    return DTYPES[name]


def read(folder: Path, *, gguf: str | None = None, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Returns the model and the tokenizer stored in `folder`.

    Args:
      folder: Hugging Face format with safetensors, or where the GGUF file is.
      gguf: name of a GGUF file in `folder`; its weights are dequantised (about 0.1 s per million weights).
      dtype: one of `DTYPES`.

    Raises:
      ModelError: not a causal language model, needs code of its own, holds pickled weights, is damaged,
        or lacks a tensor (transformers would fill it with random numbers).
    """
    where = folder / gguf if gguf else folder
    kind = torch_dtype(dtype)
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    options |= {"gguf_file": gguf} if gguf else {}
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, **options)
            model, report = AutoModelForCausalLM.from_pretrained(
                folder, dtype=kind, use_safetensors=True, output_loading_info=True, **options
            )
    except MemoryError:
        raise
    except Exception as error:  # transformers raises anything, from KeyError to ImportError
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ModelError(f"Cannot read a causal language model from {where}: {reason}") from error
    holes = sorted(str(key) for hole in ("missing_keys", "mismatched_keys") for key in report[hole])
    if holes:
        raise ModelError(f"{where} lacks {len(holes)} of the model's tensors (first: {holes[0]}); get a whole copy.")
    _forget_gguf(model)
    return model, tokenizer


def _forget_gguf(model: PreTrainedModel) -> None:
    # A dequantised model is an ordinary one; transformers refuses to save it while these marks are on it.
    quantised = getattr(model.config, "quantization_config", None)
    if getattr(quantised, "quant_method", None) != "gguf":
        return
    del model.config.quantization_config
    for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
        model.__dict__.pop(mark, None)


def fingerprint(model: PreTrainedModel) -> str:
    """Returns the sha256, in hex, of the parameters' names, types, shapes and bytes in name order.

    Parameters must be on the CPU; bytes are hashed where they lie. 135M float32 weights take 0.3 s.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.named_parameters(), key=lambda item: item[0]):
        shape = ",".join(map(str, tensor.shape))
        digest.update(f"{name}\0{str(tensor.dtype).removeprefix('torch.')}\0{shape}\0".encode())
        digest.update(memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def window(model: PreTrainedModel) -> int:
    """Returns the longest input in tokens that the model's positions allow; `UNLIMITED` when it has none."""
    config = model.config.get_text_config()
    sizes = (getattr(config, key, None) for key in _WINDOW_KEYS)
    return next((size for size in sizes if isinstance(size, int) and size > 0), UNLIMITED)
