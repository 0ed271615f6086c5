"""Where the secret lies that a private run's noise is made of: one file, for its owner's eyes only, never exported."""

from __future__ import annotations

import hmac
import os
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from fedmezo.errors import ConfigError

if TYPE_CHECKING:
    from fedmezo.studies.privacy import Privacy

__all__ = ["SECRET", "kept_secret", "key_for", "new_secret", "write_secret"]

SECRET = "privacy.key"
_BYTES = 32


def new_secret(privacy: Privacy) -> bytes:
    """Returns 32 bytes: random ones, or those of `noise_seed`."""
    if privacy.noise_seed is None:
        return os.urandom(_BYTES)
    return sha256(f"fedmezo noise seed {privacy.noise_seed}".encode()).digest()


def kept_secret(folder: Path, privacy: Privacy, *, make: bool) -> bytes:
    """Returns the secret that lies in a folder, for its owner's eyes only.

    Args:
      folder: a run's, or the one where a client keeps its state.
      privacy: the section.
      make: write a new one where there is none.

    Raises:
      ConfigError: there is none, or it is damaged.
    """
    if privacy.mode == "none" or privacy.noise_seed is not None:
        return new_secret(privacy)
    path = folder / SECRET
    if make and not path.exists():
        write_secret(folder, new_secret(privacy))
    try:
        secret = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{path}: the secret that this run's noise is made of cannot be read ({error.strerror}); restore it, for "
            "other noise on the same answers would give them away."
        ) from error
    if len(secret) != _BYTES:
        raise ConfigError(f"{path}: expected {_BYTES} bytes, got {len(secret)}; restore it from a copy.")
    return secret


def write_secret(folder: Path, secret: bytes) -> None:
    """Writes a secret into a folder where there is none yet, readable by its owner only."""
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / f"{SECRET}.new"
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(secret)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, folder / SECRET)


def key_for(secret: bytes, *names: str) -> bytes:
    """Returns the secret for one use, such as one run on certain data; from it no other one can be told."""
    return hmac.digest(secret, repr(names).encode(), "sha256")
