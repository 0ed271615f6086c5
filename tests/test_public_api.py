"""What a user imports and copies: exported names, the README's Python, the committed configurations."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import fedmezo
from fedmezo.errors import FedMeZOError
from fedmezo.studies.config import load_config

ROOT = Path(__file__).parent.parent


def test_exported_names_are_complete_sorted_and_there():
    assert fedmezo.__all__ == sorted(fedmezo.__all__)
    assert set(fedmezo._HOMES) | {"FedMeZOError", "__version__"} == set(fedmezo.__all__)
    for name in fedmezo.__all__:
        assert getattr(fedmezo, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fedmezo.nothing


def test_every_algorithm_and_what_wraps_one_can_be_imported_from_the_package():
    for name in ("fedmezo", "fedkseed", "fedavg", "with_personal_rates"):
        home = ROOT / "src" / Path(*fedmezo._HOMES[name].split("."))
        assert home.parent.name == "fl" and f"def {name}(" in home.with_suffix(".py").read_text()
        assert name in fedmezo.__all__ and callable(getattr(fedmezo, name))


def test_every_public_name_says_what_it_is():
    for name in set(fedmezo.__all__) - {"__version__"}:
        assert getattr(fedmezo, name).__doc__


def test_importing_the_package_loads_nothing_heavy():
    heavy = ("torch", "transformers", "peft", "datasets", "numba")
    code = f"import sys, fedmezo; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.stem)
def test_every_committed_configuration_loads_and_round_trips(path, tmp_path):
    config = load_config(path)
    (tmp_path / "again.toml").write_text(config.to_toml())
    assert load_config(tmp_path / "again.toml").digest() == config.digest()


def test_only_the_writers_of_weights_write_tensors_in_place():
    writers = {"zo/perturb.py", "zo/params.py", "zo/kernels/torch_ops.py", "zo/kernels/numba_ops.py"}
    # Lane weights, activations, logits, decoded frozen weights; a worker takes over the model whole.
    scratch = {f"models/{name}.py" for name in ("scratch", "segments", "loss", "linear", "quantize")}
    scratch.add("runtime/worker.py")
    source = ROOT / "src" / "fedmezo"
    found = {
        path.relative_to(source).as_posix()
        for path in source.rglob("*.py")
        if re.search(r"(?<!params)\.(add_|sub_|copy_)\(", path.read_text())
    }
    assert found >= {"zo/params.py", "models/linear.py"}
    baseline = {"fl/fedavg.py"}  # a client's own end minus its start
    assert found <= writers | scratch | baseline


def test_every_error_has_an_exit_code_of_one_or_two():
    def below(kind):
        return [kind, *(deeper for child in kind.__subclasses__() for deeper in below(child))]

    ours = [kind for kind in below(FedMeZOError) if kind.__module__.startswith("fedmezo")]
    assert {kind.exit_code for kind in ours if kind.__name__ != "StoppedError"} == {1, 2}


def test_the_readmes_tables_are_those_of_the_raw_results():
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "results.py"), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
