"""The configuration of a run: one frozen value, read from TOML and `--set a.b=c`, checked before any work begins.

config = load_config("demo.toml", ["federation.rounds=5"])
config = parse_config({"federation": {"clients": 4}})
"""

import hashlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field, ValidationError, model_validator

from fedmezo.errors import ConfigError
from fedmezo.studies.complaints import sentences
from fedmezo.studies.keys import Section
from fedmezo.studies.material import Adapter, Data, Model, Split
from fedmezo.studies.network import Network
from fedmezo.studies.network import complaint as insecure
from fedmezo.studies.personal import Personal, complaint
from fedmezo.studies.privacy import Privacy
from fedmezo.studies.privacy import complaint as unprivate
from fedmezo.studies.robust import Robust
from fedmezo.studies.robust import complaint as unguarded
from fedmezo.studies.settings import POOLED, Algorithm, Eval, Federation, Guard, Output, Runtime
from fedmezo.studies.tomltext import key_lines, value_text

__all__ = [
    "Adapter",
    "Algorithm",
    "Config",
    "Data",
    "Eval",
    "Federation",
    "Guard",
    "Model",
    "Network",
    "Output",
    "Personal",
    "Privacy",
    "Robust",
    "Runtime",
    "Split",
    "changed",
    "keys_called",
    "load_config",
    "parse_config",
    "schema",
    "template_toml",
    "with_changes",
]

# Of two keys that exclude each other, the one given by --set replaces the other one of the file.
_RIVALS = {("data", "path"): "name", ("data", "name"): "path"}


class Config(Section):
    """Everything a run is told. Frozen; `parse_config` and `load_config` give errors in plain sentences."""

    model_config = ConfigDict(title="fedmezo configuration")

    model: Model = Field(default_factory=Model)
    adapter: Adapter = Field(default_factory=Adapter)
    data: Data = Field(default_factory=Data)
    split: Split = Field(default_factory=Split)
    federation: Federation = Field(default_factory=Federation)
    algorithm: Algorithm = Field(default_factory=Algorithm)
    personal: Personal = Field(default_factory=Personal)
    robust: Robust = Field(default_factory=Robust)
    privacy: Privacy = Field(default_factory=Privacy)
    eval: Eval = Field(default_factory=Eval)
    guard: Guard = Field(default_factory=Guard)
    network: Network = Field(default_factory=Network)
    output: Output = Field(default_factory=Output)
    runtime: Runtime = Field(default_factory=Runtime)

    @model_validator(mode="after")
    def _sums_need_a_pool(self) -> "Config":
        federation, name = self.federation, self.algorithm.name
        if (federation.pull == "sums" or federation.sums_coding != "float32") and name not in POOLED:
            asked = 'pull = "sums"' if federation.pull == "sums" else f'sums_coding = "{federation.sums_coding}"'
            raise ValueError(
                f'federation.{asked} needs a pool of seeds: algorithm.name "fedkseed" or "fedkseed-pro", got "{name}".'
            )
        return self

    @model_validator(mode="after")
    def _signals_are_there(self) -> "Config":
        if said := complaint(self.personal, self.algorithm.name):
            raise ValueError(said)
        return self

    @model_validator(mode="after")
    def _sums_can_be_secret(self) -> "Config":
        if said := insecure(self.network, self.algorithm, self.federation, self.personal):
            raise ValueError(said)
        return self

    @model_validator(mode="after")
    def _liars_can_be_outvoted(self) -> "Config":
        if said := unguarded(self.robust, self.algorithm, self.federation, self.network):
            raise ValueError(said)
        return self

    @model_validator(mode="after")
    def _secrets_can_be_kept(self) -> "Config":
        if said := unprivate(self):
            raise ValueError(said)
        return self

    @model_validator(mode="after")
    def _codes_stay_frozen(self) -> "Config":
        if self.adapter.kind == "full" and self.model.quantize != "none":
            raise ValueError(
                f'adapter.kind = "full" trains the weights themselves, which model.quantize = "{self.model.quantize}" '
                'keeps as frozen codes; set model.quantize = "none", or adapter.kind = "lora".'
            )
        return self

    @model_validator(mode="after")
    def _sixteen_bits_round_every_round(self) -> "Config":
        kind = self.model.dtype
        if not self.rounds_weights:
            return self
        if self.algorithm.name == "fedavg":
            raise ValueError(
                f'algorithm.name = "fedavg" trains all parameters in float32 only, got model.dtype = "{kind}"; '
                'use float32, or adapter.kind = "lora".'
            )
        if self.federation.pull == "sums" or self.federation.sums_coding != "float32":
            raise ValueError(
                f'federation.pull = "sums" cannot give the bits of {kind} weights, which round every round; '
                'set pull = "pairs" and sums_coding = "float32", or model.dtype = "float32".'
            )
        return self

    @property
    def rounds_weights(self) -> bool:
        """Whether the trained parameters are 16-bit weights, so that the path to them matters, not only the sum."""
        return self.adapter.kind == "full" and self.model.dtype != "float32"

    def to_toml(self) -> str:
        """Returns the resolved configuration as a TOML file; `load_config` of it is equal to this one."""
        return "\n".join(f"[{name}]\n" + _table(getattr(self, name)) for name in _sections())

    def digest(self) -> str:
        """Returns the sha256, in hex, of what decides the result.

        All sections but network (of which only a secure run's limit decides anything), output and runtime.
        """
        told = self.model_dump(mode="json", exclude={"network", "output", "runtime"})
        if self.network.secure:
            told["network"] = {"secure_clip": self.network.secure_clip}
        return hashlib.sha256(json.dumps(told, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _sections() -> dict[str, type[Section]]:
    """Returns the sections by name, in the file's order."""
    kinds = {name: field.annotation for name, field in Config.model_fields.items()}
    return {name: kind for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, Section)}


def _table(section: Section) -> str:
    values = {name: value_text(section, name) for name in type(section).model_fields}
    return "".join(f"{name} = {text}\n" for name, text in values.items() if text is not None)


def parse_config(given: Mapping[str, Any]) -> Config:
    """Returns the configuration that nested mappings stand for; what is left out has its default.

    Raises:
      ConfigError: something is unknown or impossible; one line per problem, each naming its key.
    """
    try:
        return Config.model_validate(given)
    except ValidationError as error:
        raise ConfigError("\n".join(sentences(error.errors(), _sections()))) from None
    except UnicodeEncodeError as error:  # JSON can name halves of letters
        raise ConfigError(f"The configuration holds text that is none: {ascii(error.object)[:60]}.") from None


def changed(config: Config, changes: Mapping[str, Mapping[str, Any]]) -> Config:
    """Returns the configuration with other values for some keys, checked again.

    Args:
      config: what it is but for the changes.
      changes: section -> key -> value.

    Raises:
      ConfigError: as `parse_config`.
    """
    told = config.model_dump(mode="json")
    return parse_config({name: section | dict(changes.get(name, {})) for name, section in told.items()})


def load_config(path: Path | str | None = None, overrides: Sequence[str] = ()) -> Config:
    """Returns the configuration of a TOML file (None for the defaults) with `a.b=c` overrides laid over it.

    The text after "=" is read as a TOML value, and as plain text when it is none.

    Raises:
      ConfigError: no such file, not TOML (the line is named), a malformed override, or as `parse_config`.
    """
    given = {} if path is None else _read(Path(path))
    _canonical_(given)
    for override in overrides:
        _lay_over_(given, override)
    return parse_config(given)


def with_changes(config: Config, overrides: Sequence[str]) -> Config:
    """Returns a configuration with `a.b=c` overrides laid over it; raises as `load_config`."""
    given = config.model_dump(mode="json")
    for override in overrides:
        _lay_over_(given, override)
    return parse_config(given)


def keys_called(name: str) -> list[str]:
    """Returns the dotted keys that are called `name`, by our word for them or a customary one; often none."""
    ours = {section: next(iter(kind.canonical({name: None}))) for section, kind in _sections().items()}
    return [f"{section}.{key}" for section, key in ours.items() if key in _sections()[section].model_fields]


def _read(path: Path) -> dict[str, Any]:
    if path.is_dir():
        raise ConfigError(f"The configuration {path} is a folder, not a file; name the file.")
    if not path.exists():
        raise ConfigError(
            f"The configuration {path} does not exist; `fedmezo config init {path.name}` writes a new one."
        )
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path} cannot be read as text: {error}.") from None
    # A number of more than 4,300 digits and lists within lists within lists are no errors of TOML's own.
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}.") from None


def _canonical_(given: dict[str, Any]) -> None:
    """Renames customary names to ours, so that an override meets the key it is meant for."""
    for name, section in _sections().items():
        if isinstance(given.get(name), dict):
            try:
                given[name] = section.canonical(given[name])
            except ValueError as error:
                raise ConfigError(f"[{name}]: {error}") from None


def _lay_over_(given: dict[str, Any], override: str) -> None:
    override = override.encode("utf-8", "backslashreplace").decode()  # bytes of a command line need not be text
    dotted, equals, text = override.partition("=")
    parts = [part.strip() for part in dotted.split(".")]
    if not equals or len(parts) < 2 or not all(parts):
        raise ConfigError(
            f"--set {override}: expected section.key=value, as in --set federation.rounds=5; got no "
            f"{'value' if not equals else 'section and key'}."
        )
    section = _sections().get(parts[0])
    if section is not None:
        parts[1] = next(iter(section.canonical({parts[1]: None})))
    table = given
    for part in parts[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {override}: {part} is a value, not a table of keys.")
    table.pop(_RIVALS.get((parts[0], parts[-1]), ""), None)
    table[parts[-1]] = _value(text.lstrip())  # a template may end in a space


def _value(text: str) -> Any:
    try:
        found = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return found["value"] if len(found) == 1 else text


def template_toml() -> str:
    """Returns a configuration file with every key, what it means and its default; loading it gives the defaults."""
    head = "# fedmezo configuration. Every key is shown with its default: delete what you leave as it is.\n"
    blocks = []
    for name, section in _sections().items():
        lines = [f"# {section.__doc__}", f"[{name}]", *key_lines(section())]
        blocks.append("\n".join(lines) + "\n")
    return "\n".join([head, *blocks])


def schema() -> dict[str, Any]:
    """Returns the JSON schema of a configuration file, for editors; the words for None are in it as constants."""
    found = Config.model_json_schema(mode="validation")
    for section in found["$defs"].values():
        for field in section["properties"].values():
            if word := field.get("x-word"):
                field["anyOf"] = [{"const": word} if kind == {"type": "null"} else kind for kind in field["anyOf"]]
                field["default"] = word
    return found
