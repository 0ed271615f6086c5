"""Cells that measure without training: signal and rounding, curvature, constants, heterogeneity, memory."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fedmezo.channels import plain
from fedmezo.errors import ModelError
from fedmezo.studies.suite.kind_run import config_of
from fedmezo.studies.suite.kinds import Found, Settings, probe_settings

__all__ = ["constants", "curvature", "heterogeneity", "memory", "signal"]


def signal(settings: Settings, seed: int) -> Found:
    """Returns how good a two-point slope is at one mu: error over signal, correlation, rounding, bend.

    Settings: probe.mu, probe.directions; the number format is model.dtype.
    """
    from fedmezo.studies.signal import signal_rows

    asked = probe_settings(settings, mu=1e-3, directions=16)
    config = config_of(settings, seed)
    model, many = config.model, asked["directions"]
    (row,) = signal_rows(
        config, dtypes=(model.dtype,), quantize=(model.quantize,), mus=(asked["mu"],), directions=many, spreads=(0.01,)
    )
    found = {name: value for name, value in asdict(row).items() if isinstance(value, int | float)}
    return [], found | {"error_over_signal": row.noise / row.signal if row.signal else None}


def curvature(settings: Settings, seed: int) -> Found:
    """Returns trace, norm and effective rank of the matrix that the run's loss bends by.

    Settings: probe.matrix (ggn: Gauss-Newton, which has no negative eigenvalues, by backpropagation | forward: the
    Hessian, by second differences), probe.directions, probe.lanczos, probe.after (rounds of training before),
    probe.spread.
    """
    from fedmezo.studies.rank import RankOptions, rank_rows

    asked = probe_settings(settings, matrix="ggn", directions=32, lanczos=16, after=0, spread=0.01)
    method = "forward" if asked["matrix"] == "forward" else "backprop"
    wanted = RankOptions(
        method, directions=asked["directions"], steps=asked["lanczos"], after=asked["after"], spread=asked["spread"]
    )
    rows = [row for row in rank_rows(config_of(settings, seed), wanted) if row.method == asked["matrix"]]
    known = {name: getattr(rows[-1], name) for name in ("loss", "trace", "norm", "rank", "dim", "lora_rank")}
    low, high = rows[-1].intervals.get("rank", (None, None))
    return [], known | {"rank_low": low, "rank_high": high}


def _measured(settings: Settings, seed: int) -> dict[str, Any]:
    from fedmezo.studies.heterogeneity import measure_heterogeneity
    from fedmezo.studies.sampling import SamplingOptions

    asked = probe_settings(settings, directions=16, batches=2, points=2, resamples=200)
    return measure_heterogeneity(config_of(settings, seed), asked=SamplingOptions(**asked)).as_dict()


def heterogeneity(settings: Settings, seed: int) -> Found:
    """Returns every index of how unlike the clients are, as the mean over clients, and their rank correlations.

    Settings: probe.directions, probe.batches, probe.points, probe.resamples.
    """
    found = _measured(settings, seed)
    clients = found["clients"]
    names = ("loss", "gradient2", "apart2", "cosine", "total_variation", "jensen_shannon")
    values: dict[str, Any] = {name: found[name] for name in ("gradient2", "apart2", "c_h", "sigma_h2")}
    for name in names:
        known = [client[name] for client in clients if client[name] is not None]
        values[f"mean_{name}"] = sum(known) / len(known) if known else None
        values[f"spread_{name}"] = max(known) - min(known) if known else None
    values["apart_over_gradient"] = found["apart2"] / found["gradient2"] if found["gradient2"] > 0 else None
    return [], values | {f"{one}~{other}": value for one, row in found["correlations"].items()
                         for other, value in row.items() if one < other}  # fmt: skip


def constants(settings: Settings, seed: int) -> Found:
    """Returns the theory's constants of a configuration, with the largest rate that each bound allows.

    Settings: probe.directions, probe.batches, probe.points, probe.resamples.
    """
    from fedmezo.studies.constants import measure_constants
    from fedmezo.studies.sampling import SamplingOptions
    from fedmezo.theory.caps import b1_caps, b2_caps, paper_caps

    asked = probe_settings(settings, directions=16, batches=2, points=2, resamples=200)
    config = config_of(settings, seed)
    found = measure_constants(config, asked=SamplingOptions(**asked)).constants
    clients, steps = config.federation.clients, config.federation.local_steps
    return [], asdict(found) | {
        "cap_paper": paper_caps(found, clients=clients, steps=steps).rate,
        "cap_b1": b1_caps(found, steps=steps).rate,
        "cap_b2": b2_caps(found, clients=clients).rate,
        "cap_rank": 2 / (found.smoothness * (found.effective_rank + 2)),
        "cap_root": found.dim**-0.5,
    }


def memory(settings: Settings, seed: int) -> Found:
    """Returns the peak memory of one mode in a process of its own, MB: start, peak, trained, model, extra and net.

    Extra is the peak over the start; net is weights and extra, without libraries.

    Settings: probe.mode (as in `fedmezo bench memory`), probe.shape or probe.model, probe.dtype, probe.tokens,
    probe.device. The seed only says which repetition it is.
    """
    from fedmezo.studies.bench.memory import probe
    from fedmezo.studies.bench.options import BenchOptions

    asked = probe_settings(
        settings, mode="forward", shape=None, model="smollm2-135m", dtype="float32", tokens=256, device="cpu", rank=8
    )
    wanted = BenchOptions(
        kinds=("memory",), model=asked["model"], shape=asked["shape"], device=asked["device"], rank=asked["rank"]
    )
    found = probe(asked["mode"], wanted, dtype=asked["dtype"], tokens=asked["tokens"])
    if "error" in found:
        raise ModelError(found["error"])
    extra = found["peak_mb"] - found["start_mb"]
    # Of adapters the weights are there before the work begins; of "full" they are the model's own.
    held = found["model_mb"] + (found["trained_mb"] if asked["mode"].endswith("lora") else 0.0)
    return [], plain(found | {"extra_mb": extra, "net_mb": held + extra})
