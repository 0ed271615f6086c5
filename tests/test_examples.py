"""Every file of examples/ runs at its tiny scale and ends with what it promises; so do the cells of the notebook."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
PATIENCE = 600  # seconds; an example takes 5 to 20 on a machine that does nothing else
QUICK = {
    "custom_aggregation": "the careless client counted in no round: True",
    "custom_algorithm": "resumed with the bits of the whole run: True",
    "hf_trainer": "the loss fell: True",
    "interop": "the second run starts where the first ended: True",
    "know_before": "- ",
    "own_jsonl": "same bits: True",
    "own_loop": "round 30: loss",
    "own_network": "same bits as the simulation: True",
    "personal": "update-difference, shuffled",
    "watch_a_run": "live page:",
}
SLOW = {
    "family": "FedAvg, SGD: loss",
    "flower_run": "same bits as the simulation: True",
    "many_small_machines": "replay equal",
    "private": "each client, by the server: loss",
    "robust": "multi-Krum",
}
FALLING = ("family", "many_small_machines", "personal", "private")
NOTEBOOK = EXAMPLES / "tour.ipynb"


def ran(name: str, folder: Path) -> str:
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), str(folder)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def test_every_example_is_tried():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*QUICK, *SLOW}


def test_the_table_of_examples_names_each_once():
    text = (EXAMPLES / "README.md").read_text()
    named = re.findall(r"^\| \[`([^`]+)`\]\(([^)]+)\)", text, re.MULTILINE)
    assert sorted(path for _, path in named) == sorted(
        [*(f"{name}.py" for name in {*QUICK, *SLOW}), "flower_app", NOTEBOOK.name]
    )
    pages = re.findall(r"\((\.\./docs/[^)#]+)", text)
    assert pages and all((EXAMPLES / page).exists() for page in pages)


@pytest.mark.timeout(PATIENCE)
@pytest.mark.parametrize(
    "name", [*sorted(QUICK), *(pytest.param(name, marks=pytest.mark.slow) for name in sorted(SLOW))]
)
def test_an_example_ends_with_its_promise(name, tmp_path):
    said = ran(name, tmp_path)
    assert {**QUICK, **SLOW}[name] in said and "False" not in said and "DIFFERS" not in said
    if name in FALLING:
        pairs = re.findall(r"loss ([\d.]+) -> ([\d.]+)", said)
        assert len(pairs) >= 3 and all(float(end) < float(start) for start, end in pairs)
    if name == "own_loop":
        losses = [float(x) for x in re.findall(r"loss (\d+\.\d+)", said)]
        assert losses[1] < losses[0]
        assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_the_flower_app_holds_a_configuration_of_ours():
    from fedmezo.studies.appconfig import config_of

    told = tomllib.loads((EXAMPLES / "flower_app" / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    flat = {
        f"{section}.{key}": value
        for section, table in told["config"].items()
        if isinstance(table, dict)
        for key, value in table.items()
    }
    assert config_of(flat).federation.clients == 2
    for component in told["components"].values():
        module, _, name = component.partition(":")
        text = (EXAMPLES / "flower_app" / f"{module}.py").read_text()
        assert re.search(rf"\b{name}\b", text)


def test_the_notebook_opens_offline_and_its_outputs_are_those_of_its_cells():
    book = json.loads(NOTEBOOK.read_text())
    assert book["nbformat"] == 4 and book["nbformat_minor"] >= 5
    cells = book["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert any("image/svg+xml" in output.get("data", {}) for cell in code for output in cell["outputs"])
    assert not any(output["output_type"] == "error" for cell in code for output in cell["outputs"])
    text = NOTEBOOK.read_text().replace("http://www.w3.org/2000/svg", "")
    assert "http" not in text and "<script" not in text
    assert NOTEBOOK.stat().st_size < 200_000


@pytest.mark.timeout(PATIENCE)
def test_the_notebooks_cells_run_and_say_what_is_stored():
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "notebook.py"), "--check"],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
