"""What a person hands over: configurations, data, what a client kept, adapters, certificates."""

import gzip
import io
import json
import shutil
import struct
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any

import torch

from fedmezo.data.records import DataSource, Record
from fedmezo.data.tasks import load_records
from fedmezo.errors import ConfigError, DataError, ModelError
from fedmezo.models.adapters import SETTINGS, WEIGHTS, load_adapter, make_adapter, save_adapter
from fedmezo.runtime.calls import Welcome, decode_answer, encode_answer
from fedmezo.runtime.flower.certs import make_certificates, server_names, server_tls
from fedmezo.studies.appconfig import app_config, config_of
from fedmezo.studies.config import load_config, parse_config, template_toml
from fedmezo.studies.kept import Held, keep, kept
from fedmezo.zo.params import Params
from fuzzing.course import Check, Target, same
from fuzzing.journals import TARGETS as JOURNALS
from fuzzing.mutation import gzipped, headed

__all__ = ["TARGETS"]

_ROWS = [
    {"instruction": "Which colour?", "input": "grass", "output": "green", "category": "a", "choices": ["green", "red"]},
    {"instruction": "Say zebra", "input": "", "output": "zebra", "category": "b", "choices": None},
]
_OTHERS = [
    [{"question": "1+1?", "answer": "#### 2"}], [{"sentence": "fine", "label": 1}, {"sentence": "bad", "label": 0}],
    [{"Definition": ["Do."], "Instances": [{"input": "x", "output": ["y", "z"]}], "Categories": ["c"]}],
    [{"instruction": "i", "context": "c", "response": "r", "category": "q"}],
    [{"prompt": "p", "canonical_solution": "s", "language": "python"}],
]  # fmt: skip


def _settings() -> list[bytes]:
    short = b'[federation]\nclients = 4\nrounds = 3\n[algorithm]\nname = "fedkseed"\nrate = 1e-3\n[data]\ncolumns = { output = "b" }\n'
    app = json.dumps(app_config(parse_config({}), folder="x")).encode()
    return [b"", template_toml().encode()[:4000], parse_config({}).to_toml().encode(), short, app]


def _config(folder: Path) -> Check:
    path = folder / "a.toml"

    def check(data: bytes) -> bool:
        path.write_bytes(data)
        try:
            config = config_of(told) if (told := _flat(data)) is not None else load_config(path)
        except ConfigError:
            return False
        path.write_text(config.to_toml(), encoding="utf-8")
        same(load_config(path), config)
        same(config_of(app_config(config, folder="x")), config)
        same(len(config.digest()), 64)
        return True

    return check


def _flat(data: bytes) -> dict[str, Any] | None:
    """Returns a flat run configuration as Flower would hand it over, if the bytes are one."""
    try:
        told = json.loads(data) if data[:1] == b"{" else None
    except (ValueError, RecursionError):
        return None
    plain = isinstance(told, dict) and all(isinstance(value, str | int | float | bool) for value in told.values())
    return told if plain else None


def _override(folder: Path) -> Check:
    def check(data: bytes) -> bool:
        try:
            load_config(None, data.decode("utf-8", "surrogateescape").split("\n")[:8])
        except ConfigError:
            return False
        return True

    return check


def _overrides() -> list[bytes]:
    told = (
        "federation.rounds=5",
        "algorithm.rate=1e-3",
        'eval.metrics=["loss"]',
        "data.name=builtin:skills",
        "a.b.c=1",
    )
    more = ('data.columns={output="x"}', "algorithm.lr=2e-3", "federation.seed=0xff", "output.folder=2020-01-01")
    return [one.encode() for one in (*told, *more)] + ["\n".join(told[:3]).encode()]


def _records(folder: Path, *, suffix: str) -> Check:
    path = folder / f"rows{suffix}"

    def check(data: bytes) -> bool:
        path.write_bytes(data)
        try:
            found = load_records(DataSource(path=str(path)))
        except DataError:
            return False
        for record in found:
            texts = (record.instruction, record.input, record.output, record.category, *record.choices)
            same((type(record), all(isinstance(text, str) for text in texts)), (Record, True))
        return True

    return check


def _lines() -> list[bytes]:
    return ["".join(json.dumps(row) + "\n" for row in rows).encode() for rows in (_ROWS, *_OTHERS)]


def _lists() -> list[bytes]:
    return [json.dumps(rows).encode() for rows in (_ROWS, *_OTHERS)] + [json.dumps(_ROWS[0]).encode()]


def _packed(text: Callable[[], list[bytes]]) -> list[bytes]:
    return [*text(), gzip.compress(text()[0], mtime=0), gzip.compress(b" " * 100_000, mtime=0)]


def _tables() -> list[bytes]:
    head = "instruction,input,output,category\n"
    return [(head + body).encode() for body in ("a,b,c,d\n", '"a ""q""","b,\nb",c,d\n1,2,3,4\n')] + [
        b"sentence,label\ngood,1\n"
    ]


@cache
def _parquets() -> list[bytes]:
    import datetime

    import pyarrow as pa
    import pyarrow.parquet

    dated = {"instruction": ["a"], "output": [datetime.datetime(2026, 1, 2)], "input": [1.5], "category": [b"x"]}
    nested = {"instruction": ["a"], "output": ["b"], "choices": [["b", "c"]], "input": [{"x": 1}]}
    found = []
    for rows in (
        {"instruction": ["a", "b"], "output": ["c", None]},
        {"sentence": ["x"] * 9, "label": [0] * 9},
        dated,
        nested,
    ):
        for packing in ("none", "snappy"):
            room = io.BytesIO()
            pyarrow.parquet.write_table(pa.table(rows), room, compression=packing)
            found.append(room.getvalue())
    return found


# --- what a client kept, adapters, certificates ------------------------------------------------------------------------


def _params() -> Params:
    return Params({"b": torch.arange(6.0).reshape(2, 3), "a": torch.zeros(4)})


_HELD = Held("ab" * 32, "0" * 32, 3)


@cache
def _keepings() -> list[bytes]:
    import tempfile

    found = []
    for held in (_HELD, Held("ab" * 32, "1" * 32, 0, exact=False), Held("cd" * 32, "0" * 32)):
        with tempfile.TemporaryDirectory() as folder:
            keep(Path(folder), _params(), held)
            found.append((Path(folder) / "model.safetensors").read_bytes())
    return found


def _kept(folder: Path) -> Check:
    digests = {_params().digest()}

    def check(data: bytes) -> bool:
        (folder / "model.safetensors").write_bytes(data)
        params = Params({name: torch.full_like(tensor, 7.0) for name, tensor in _params()})
        before = params.digest()
        held = kept(folder, params, wanted=_HELD)
        same(params.digest() in (digests if held is not None else {before}), True)  # noqa: FBT003
        if held is not None:
            welcome = Welcome(held.run, 0, held.instance, 1, held.rounds, held.exact)
            same(decode_answer(encode_answer(welcome)), welcome)
        return held is not None

    return check


@cache
def _model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))


@cache
def _adapters() -> list[bytes]:
    import tempfile

    adapter = make_adapter(_model(), kind="lora", rank=2)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(Path(folder), adapter.start(_model(), seed=1), adapter=adapter, base="tiny")
        settings, weights = ((Path(folder) / name).read_bytes() for name in (SETTINGS, WEIGHTS))
    told = json.loads(settings)
    others = [told | change for change in ({"target_modules": ".*proj"}, {"rank_pattern": {"q": 3}}, {"r": 4})]
    return [
        struct.pack("<I", len(text)) + text + weights for text in (settings, *(json.dumps(o).encode() for o in others))
    ]


def _adapter(folder: Path) -> Check:
    model = _model()

    def check(data: bytes) -> bool:
        size = int.from_bytes(data[:4], "little")
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / SETTINGS).write_bytes(data[4 : 4 + size])
        (folder / WEIGHTS).write_bytes(data[4 + size :])
        try:
            adapter, params = load_adapter(folder, model)
        except ModelError:
            return False
        adapter.check(params)
        return True

    return check


def _adapted(data: bytes, rng: Random) -> bytes:
    """Returns an adapter whose settings end where they say, with weights whose header does."""
    at = data.find(b'{"__metadata__"') - 8
    if at < 4:
        return data
    text = data[4:at]
    return struct.pack("<I", len(text)) + text + headed(data[at:], rng)


@cache
def _certificates() -> list[bytes]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        make_certificates(Path(folder) / "c", hosts=["h.example"], clients=1)
        return [(Path(folder) / "c" / name).read_bytes() for name in ("server.pem", "ca.crt")]


def _certificate(folder: Path) -> Check:
    for name in ("ca.crt", "server.key"):
        (folder / name).write_bytes(b"")
    path = folder / "server.pem"

    def check(data: bytes) -> bool:
        path.write_bytes(data)
        try:
            names = server_names(server_tls(folder))
        except ConfigError:
            return False
        return all(isinstance(name, str) for name in names)

    return check


def _rows(suffix: str, seeds: Callable[[], list[bytes]], **options: Any) -> Target:
    return Target(f"data {suffix}", seeds, partial(_records, suffix=suffix), most=1 << 14, **options)


TARGETS = (
    *JOURNALS,
    Target("configuration", _settings, _config, share=0.05, most=1 << 14, dear=True),
    Target("override", _overrides, _override, share=0.1, most=1 << 12),
    _rows(".jsonl", _lines, share=0.1),
    _rows(".json", _lists, share=0.1),
    _rows(".csv", _tables, share=0.1),
    _rows(".jsonl.gz", partial(_packed, _lines), share=0.1, mend=gzipped),
    _rows(".json.gz", partial(_packed, _lists), share=0.1, mend=gzipped),
    _rows(".parquet", _parquets, share=0.1),
    Target("kept state", _keepings, _kept, share=0.1, mend=headed, most=1 << 12),
    Target("adapter", _adapters, _adapter, share=0.03, mend=_adapted, most=1 << 15, dear=True, seconds=5.0),
    Target("certificate", _certificates, _certificate, share=0.1, most=1 << 12),
)
