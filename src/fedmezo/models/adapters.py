"""What is trained: LoRA matrices with PEFT's own names and scaling, or every parameter of the model."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from fedmezo.errors import ModelError
from fedmezo.models.patterns import refuse_endless
from fedmezo.models.read import quiet
from fedmezo.zo.noise import derive_seed, uniform
from fedmezo.zo.params import Params

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel

__all__ = [
    "Adapter",
    "Site",
    "full_adapter",
    "load_adapter",
    "lora_adapter",
    "make_adapter",
    "merge",
    "save_adapter",
    "save_merged",
]

Kind = Literal["lora", "full"]
WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."

# What a LoraConfig may say; any other field must keep PEFT's default, because we would not honour it.
_HONOURED = {
    "r", "lora_alpha", "target_modules", "exclude_modules", "use_rslora", "rank_pattern", "alpha_pattern",
    "layers_to_transform", "layers_pattern", "fan_in_fan_out", "task_type", "peft_type", "auto_mapping",
    "peft_version", "base_model_name_or_path", "revision", "inference_mode", "runtime_config",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Site:
    """One LoRA pair: W x becomes W x + scale * B (A x).

    Attributes:
      module: path of the linear module in the base model.
      a: name of A, (rank, in).
      b: name of B, (out, rank).
      scale: PEFT's scaling, alpha / rank or alpha / sqrt(rank).
    """

    module: str
    a: str
    b: str
    scale: float


@dataclass(frozen=True, eq=False)
class Adapter:
    """What is trained and how the model uses it.

    Attributes:
      kind: "lora" or "full".
      shapes: parameter name -> shape, in name order.
      sites: where the LoRA pairs act; empty for "full".
      config: PEFT's settings with the target modules resolved; None for "full".
    """

    kind: Kind
    shapes: Mapping[str, tuple[int, ...]]
    sites: tuple[Site, ...] = ()
    config: LoraConfig | None = None

    def start(self, model: PreTrainedModel, *, seed: int) -> Params:
        """Returns the parameters before training.

        LoRA: B is zero and A uniform in +-1/sqrt(in), PEFT's law, drawn from our noise so that every machine draws the
        same. Full: the model's own tensors, not a copy: who writes them writes the model.
        """
        if self.kind == "full":
            return Params({name: tensor.detach() for name, tensor in model.named_parameters()})
        root, device = derive_seed("lora", seed), next(model.parameters()).device
        tensors = {site.b: torch.zeros(self.shapes[site.b], device=device) for site in self.sites}
        for site in self.sites:
            shape = self.shapes[site.a]
            values = uniform(root, site.a, size=math.prod(shape)).mul_(1 / math.sqrt(shape[1]))
            tensors[site.a] = values.view(shape).to(device)
        return Params(tensors)

    def check(self, params: Params) -> None:
        """Raises ModelError when `params` are not this adapter's."""
        got = {name: tuple(tensor.shape) for name, tensor in params}
        if got == dict(self.shapes):
            return
        name = min(got.items() ^ dict(self.shapes).items())[0]
        raise ModelError(
            f"These parameters belong to another adapter: '{name}' has shape {got.get(name)}, "
            f"expected {self.shapes.get(name)}; use the settings they were trained with."
        )


def full_adapter(model: PreTrainedModel) -> Adapter:
    """Returns the adapter that trains every parameter, in the model's own type; tied weights count once.

    Raises:
      ModelError: the weights are held in fewer than 16 bits.
    """
    from fedmezo.models.quantize import require_unquantised

    require_unquantised(model, what="Training all parameters")
    return Adapter("full", {name: tuple(tensor.shape) for name, tensor in sorted(model.named_parameters())})


def lora_adapter(model: PreTrainedModel, config: LoraConfig) -> Adapter:
    """Returns the LoRA adapter that PEFT would put into `model`.

    PEFT itself resolves targets, shapes, names and scaling on a copy of the model without storage.

    Args:
      model: the frozen base model; not touched.
      config: rank, alpha, targets (None: PEFT's choice for the architecture), patterns, rsLoRA.

    Raises:
      ModelError: a setting we do not honour, no target found, or a target that is no linear module.
    """
    _refuse_unknown(config)
    refuse_endless(config)
    from peft import get_peft_model, get_peft_model_state_dict
    from peft.tuners.lora import LoraLayer

    try:
        with torch.device("meta"), quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            twin = get_peft_model(type(model)(copy.deepcopy(model.config)), copy.deepcopy(config))  # type: ignore[arg-type]
    except Exception as error:
        raise ModelError(f"PEFT cannot put LoRA into {type(model).__name__}: {error}") from error
    layers = {name: module for name, module in twin.named_modules() if isinstance(module, LoraLayer)}
    sites, shapes = [], {}
    for name, layer in layers.items():
        path, scale = name.removeprefix(_PREFIX), layer.scaling["default"]
        site = Site(path, f"{name}.lora_A.weight", f"{name}.lora_B.weight", scale)
        _check_target(site.module, model.get_submodule(site.module))
        sites.append(site)
        shapes[site.a], shapes[site.b] = (tuple(m["default"].weight.shape) for m in (layer.lora_A, layer.lora_B))
    expected = {
        key: tuple(value.shape) for key, value in get_peft_model_state_dict(twin, save_embedding_layers=False).items()
    }
    if expected != shapes:
        odd = min(expected.keys() ^ shapes.keys())
        raise ModelError(
            f"PEFT would train '{odd}', which is no LoRA matrix of a linear module; change the LoRA settings."
        )
    resolved = twin.peft_config["default"]
    resolved.fan_in_fan_out = any(not isinstance(model.get_submodule(site.module), nn.Linear) for site in sites)
    return Adapter("lora", dict(sorted(shapes.items())), tuple(sites), resolved)


def make_adapter(
    model: PreTrainedModel, *, kind: Kind, rank: int = 8, alpha: int = 16, targets: Sequence[str] | None = None
) -> Adapter:
    """Returns the adapter that plain settings ask for; `rank`, `alpha` and `targets` matter to "lora" only.

    Args:
      model: the frozen base model.
      kind: "lora" or "full".
      rank: LoRA rank r.
      alpha: LoRA alpha; the product is scaled by alpha / rank.
      targets: names of the modules that get a pair; None for PEFT's choice for the architecture.
    """
    if kind == "full":
        return full_adapter(model)
    from peft import LoraConfig

    named = list(targets) if targets is not None else None
    return lora_adapter(model, LoraConfig(r=rank, lora_alpha=alpha, target_modules=named, task_type="CAUSAL_LM"))


def _refuse_unknown(config: LoraConfig) -> None:
    plain = type(config)()
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name not in _HONOURED and value != getattr(plain, field.name):
            raise ModelError(
                f"LoRA setting {field.name}={value!r} is not supported: training by forward passes honours rank, "
                "alpha, targets, patterns and rsLoRA only. Leave it out."
            )


def _check_target(path: str, module: nn.Module) -> None:
    from transformers.pytorch_utils import Conv1D

    if not isinstance(module, nn.Linear | Conv1D):
        raise ModelError(f"LoRA target '{path}' is a {type(module).__name__}; only linear modules can be targets.")


def save_adapter(folder: Path, params: Params, *, adapter: Adapter, base: str) -> None:
    """Writes a PEFT adapter folder that plain `PeftModel.from_pretrained` loads.

    Args:
      folder: made when missing.
      params: the LoRA matrices.
      adapter: their adapter.
      base: name or path of the base model, for PEFT's records.

    Raises:
      ModelError: the adapter is not LoRA, or `params` are not its parameters.
    """
    if adapter.config is None:
        raise ModelError("Training all parameters gives a model, not an adapter; export the merged model.")
    adapter.check(params)
    from safetensors.torch import save_file

    config = copy.deepcopy(adapter.config)
    config.base_model_name_or_path, config.inference_mode = base, True
    folder.mkdir(parents=True, exist_ok=True)
    for name in (WEIGHTS, SETTINGS):
        if (folder / name).is_symlink():
            (folder / name).unlink()  # what it leads to is not ours to write
    config.save_pretrained(str(folder))
    save_file({name: tensor.detach().cpu() for name, tensor in params}, folder / WEIGHTS, metadata={"format": "pt"})


def save_merged(folder: Path, model: PreTrainedModel, *, adapter: Adapter, params: Params, tokenizer: Any) -> None:
    """Writes a whole model folder that plain `AutoModelForCausalLM.from_pretrained` loads; `tokenizer` may be None."""
    folder.mkdir(parents=True, exist_ok=True)
    with quiet():
        model.save_pretrained(folder, state_dict=merge(model, adapter, params=params))
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


def load_adapter(folder: Path, model: PreTrainedModel) -> tuple[Adapter, Params]:
    """Returns the LoRA adapter stored in a PEFT folder, and its float32 values.

    Raises:
      ModelError: the folder holds no such adapter, or one for another model.
    """
    from peft import LoraConfig
    from safetensors.torch import load_file

    if not (folder / SETTINGS).is_file() or not (folder / WEIGHTS).is_file():
        raise ModelError(f"{folder} is no PEFT adapter folder: it needs {SETTINGS} and {WEIGHTS}.")
    try:
        config: Any = LoraConfig.from_pretrained(str(folder))
        tensors = load_file(folder / WEIGHTS)
    except Exception as error:  # PEFT believes what it reads, so it raises anything
        raise ModelError(f"Cannot read the adapter in {folder}: {error}") from error
    # How it was initialised and its dropout no longer matter: the values are here and nothing is in training mode.
    config.lora_dropout, config.init_lora_weights, config.inference_mode = 0.0, True, False
    adapter, device = lora_adapter(model, config), next(model.parameters()).device
    params = Params({name: tensor.to(device, torch.float32).contiguous() for name, tensor in tensors.items()})
    adapter.check(params)
    return adapter, params


def merge(model: PreTrainedModel, adapter: Adapter, *, params: Params) -> dict[str, Tensor]:
    """Returns the state dict of `model` with `params` merged in, in the model's own dtype.

    LoRA: W + scale * B A, computed in float32, rounded once. Names of tied weights share one tensor. Tensors that were
    not trained are the model's own, not copies.

    Raises:
      ModelError: `params` are not the adapter's, a LoRA target shares its weight with another module, or the weights
        are held in fewer than 16 bits.
    """
    from fedmezo.models.quantize import require_unquantised

    require_unquantised(model, what="Merging an adapter")
    adapter.check(params)
    state: dict[str, Tensor] = dict(model.state_dict())
    changed = dict(_merged_weights(model, adapter, params))
    by_address = {tensor.data_ptr(): changed[name] for name, tensor in state.items() if name in changed}
    if adapter.kind == "lora":
        for name, tensor in state.items():
            if tensor.data_ptr() in by_address and name not in changed:
                raise ModelError(
                    f"'{name}' shares its weight with a LoRA target, so it cannot be merged; export the adapter."
                )
    return {name: by_address.get(tensor.data_ptr(), tensor) for name, tensor in state.items()}


def _merged_weights(model: PreTrainedModel, adapter: Adapter, params: Params) -> Iterator[tuple[str, Tensor]]:
    if adapter.kind == "full":
        yield from params
        return
    for site in adapter.sites:
        module = model.get_submodule(site.module)
        weight = module.weight.detach()  # type: ignore[union-attr, operator]
        delta = site.scale * (params[site.b] @ params[site.a])
        total = weight.float() + (delta if isinstance(module, nn.Linear) else delta.T)
        yield f"{site.module}.weight", total.to(weight.dtype)
