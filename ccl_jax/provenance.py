"""Where a number came from: settings, seed, versions, commit, command and device."""

import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

PACKAGES = ("ccl_jax", "jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "pillow")


def provenance(config: dict[str, Any]) -> dict[str, Any]:
    """What it takes to compute a number again; `config` is the resolved one, as plain dicts."""
    versions = {"python": platform.python_version()}
    return {
        "config": config,
        "seed": config["seed"],
        "versions": versions | {name: version(name) for name in PACKAGES},
        "commit": commit(),
        "command": " ".join(sys.argv),
        "device": jax.devices()[0].device_kind,
    }


def version(package: str) -> str:
    """The installed version, or "not installed" (a source tree on the path)."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def commit() -> str | None:
    """The git commit of this source tree, with "+" where it was changed; None outside git.

    Installed inside somebody else's repository, such as a virtual environment there, also None.
    """
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        ours = subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True)
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True)
    except OSError:  # no git on this machine
        return None
    if ours.returncode or head.returncode or changed.returncode:
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
