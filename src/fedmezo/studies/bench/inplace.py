"""The widespread in-place scheme, made anew to be measured against: nothing else in fedmezo uses it.

Each step perturbs every trained tensor by +1, -2 and +1 times mu z, draws z anew each time as a whole tensor in the
parameter's own dtype, writes every result to a new tensor, runs two ordinary forwards that keep the logits of all
positions, fetches the slope to the host, and draws z a fourth time for an update that also reckons weight decay.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["InPlace", "fresh", "perturb_", "update_"]


def fresh(parameters: Mapping[str, nn.Parameter], seed: int) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
    """Yields (name, parameter, new Gaussian tensor of its shape and dtype); the same tensors for the same seed."""
    generators: dict[torch.device, torch.Generator] = {}
    for name, parameter in parameters.items():
        place = parameter.device
        generator = generators.setdefault(place, torch.Generator(place).manual_seed(seed))
        yield (
            name,
            parameter,
            torch.normal(0.0, 1.0, parameter.shape, generator=generator, dtype=parameter.dtype, device=place),
        )


def perturb_(parameters: Mapping[str, nn.Parameter], seed: int, *, sign: float, mu: float) -> None:
    """Replaces every tensor by a new one, sign * mu * z(seed) further."""
    for _, parameter, z in fresh(parameters, seed):
        parameter.data = parameter.data + sign * z * mu


def update_(
    parameters: Mapping[str, nn.Parameter], seed: int, *, slope: float, rate: float, weight_decay: float
) -> None:
    """Replaces every tensor by a new one, rate * (slope * z(seed) + weight_decay * tensor) back; no decay of biases."""
    for name, parameter, z in fresh(parameters, seed):
        if "bias" in name or "norm" in name:
            parameter.data = parameter.data - rate * (slope * z)
        else:
            parameter.data = parameter.data - rate * (slope * z + weight_decay * parameter.data)


@dataclass
class InPlace:
    """A model under the in-place scheme.

    Attributes:
      model: called as Hugging Face models are; its weights move.
      parameters: those trained, name -> parameter.
      mu: perturbation scale.
      rate: learning rate; small, so that a benchmark of many steps does not wreck the model.
      weight_decay: share of the parameters taken off per unit of rate.
      logits: of the last forward, all positions: the scheme keeps them.
    """

    model: nn.Module
    parameters: Mapping[str, nn.Parameter]
    mu: float = 1e-3
    rate: float = 1e-7
    weight_decay: float = 0.0
    logits: Tensor | None = None

    def step(self, batch: Mapping[str, Tensor], *, seed: int) -> float:
        """Takes one step on a batch (input_ids, labels) and returns the slope."""
        perturb_(self.parameters, seed, sign=1.0, mu=self.mu)
        above = self._loss(batch)
        perturb_(self.parameters, seed, sign=-2.0, mu=self.mu)
        below = self._loss(batch)
        slope = float(((above - below) / (2 * self.mu)).item())
        perturb_(self.parameters, seed, sign=1.0, mu=self.mu)
        update_(self.parameters, seed, slope=slope, rate=self.rate, weight_decay=self.weight_decay)
        return slope

    def _loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        with torch.inference_mode():
            out = self.model(**batch)
        self.logits = out.logits
        loss: Tensor = out.loss
        return loss
