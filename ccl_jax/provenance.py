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
        "versions": versions | {name: metadata.version(name) for name in PACKAGES},
        "commit": commit(),
        "command": " ".join(sys.argv),
        "device": jax.devices()[0].device_kind,
    }


def commit() -> str | None:
    """The git commit of the source tree, with "+" where it was changed; None outside git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True)
    except OSError:  # no git on this machine
        return None
    if head.returncode or changed.returncode:
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
