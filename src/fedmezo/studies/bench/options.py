"""What a benchmark is asked for, read from the command line and checked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from fedmezo.errors import ConfigError
from fedmezo.zo.noise import Law

__all__ = ["KINDS", "BenchOptions", "Kind", "Trained", "read_list"]

Kind = Literal["noise", "step", "simulate", "replay", "memory"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Trained = Literal["lora", "full"]
DTYPES = ("float32", "bfloat16", "float16")
SHAPED: tuple[Kind, ...] = ("step", "memory")


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """What to measure and on what.

    Attributes:
      kinds: which benchmarks.
      model: a name as for `load_model`.
      shape: random weights in this shape in place of a model; None for the model.
      device: a torch device.
      dtypes: dtypes of the model's weights; None for those that are usual on the device.
      tokens: tokens per batch; None for each benchmark's own.
      train: what is trained, "lora" and "full".
      law: law of z.
      rank: LoRA rank; alpha is twice that.
      threads: threads of torch and of our noise.
      repeats: turns counted.

    Raises:
      ConfigError: an option that is out of range or does not fit the others.
    """

    kinds: tuple[Kind, ...] = KINDS
    model: str = "smollm2-135m"
    shape: str | None = None
    device: str = "cpu"
    dtypes: tuple[str, ...] | None = None
    tokens: tuple[int, ...] | None = None
    train: tuple[Trained, ...] = ("lora", "full")
    law: Law = "gaussian"
    rank: int = 128
    threads: int = 1
    repeats: int = 5

    def __post_init__(self) -> None:
        """Checks what the types do not say."""
        for option, given, known in (("--dtype", self.dtypes or (), DTYPES), ("--train", self.train, ("lora", "full"))):
            odd = next((name for name in given if name not in known), None)
            if odd is not None:
                raise ConfigError(f"{option}: expected names out of {', '.join(known)}, got {odd!r}.")
        if any(count < 4 for count in self.tokens or ()):
            raise ConfigError(f"--tokens: a batch needs 4 tokens at least, got {min(self.tokens or ())}.")
        unshaped = [kind for kind in self.kinds if kind not in SHAPED]
        if self.shape is not None and unshaped:
            raise ConfigError(f"--shape is for {' and '.join(SHAPED)} only; {unshaped[0]} needs a model.")

    @property
    def lora(self) -> dict[str, Any]:
        """LoRA's settings: rank, alpha and targets."""
        return {"rank": self.rank, "alpha": 2 * self.rank, "targets": ["q_proj", "v_proj"]}

    def dtypes_or(self, *usual: str) -> tuple[str, ...]:
        """Returns the dtypes asked for, else the usual ones and on CUDA float16."""
        extra = ("float16",) if self.device.startswith("cuda") else ()
        return self.dtypes or tuple(dict.fromkeys((*usual, *extra)))

    def tokens_or(self, *usual: int) -> tuple[int, ...]:
        """Returns the token counts asked for, else the usual ones."""
        return self.tokens or usual

    def only(self, kind: Kind) -> BenchOptions:
        """Returns the same for one benchmark."""
        return replace(self, kinds=(kind,))


def read_list(text: str | None, *, option: str, of: type = str) -> tuple[Any, ...] | None:
    """Returns the parts of "a,b,c" as `of`; None for None.

    Raises:
      ConfigError: nothing in it, or a part that is no such thing.
    """
    if text is None:
        return None
    try:
        found = tuple(of(part.strip()) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise ConfigError(f"{option}: expected numbers with commas between them, got {text!r}.") from error
    if not found:
        raise ConfigError(f"{option}: expected something with commas between, got {text!r}.")
    return found
