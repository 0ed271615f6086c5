"""Patterns for module names that came with an adapter, which may be made to take for ever."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from fedmezo.errors import ModelError

if TYPE_CHECKING:
    from peft import LoraConfig

__all__ = ["refuse_endless"]

_LONGEST, _REPEATS = 500, 3  # bytes of a pattern, and repetitions in it: a name of 100 letters has 161,700 triples
_AGAIN, _NESTED = re.compile(r"[*+{]"), re.compile(r"\)\s*[*+{]")


def refuse_endless(config: LoraConfig) -> None:
    """Raises ModelError for names given by a pattern that may take for ever to match; PEFT takes any."""
    told: list[Any] = [config.target_modules, config.exclude_modules, config.layers_pattern]
    told += [*(config.rank_pattern or ()), *(config.alpha_pattern or ())]
    for pattern in [one for some in told for one in ([some] if isinstance(some, str) else some or ())]:
        again = len(_AGAIN.findall(str(pattern)))
        if len(str(pattern)) > _LONGEST or again > _REPEATS or _NESTED.search(str(pattern)):
            raise ModelError(
                f"LoRA setting: the pattern {str(pattern)[:40]!r} has {again} repetitions; {_REPEATS} may be, "
                "and none of a group. Name the modules instead."
            )
