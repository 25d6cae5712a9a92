"""The page of measured speeds: a section per machine, in it a part per command that was run."""

import os
import re
from pathlib import Path

import jax

from ccl_jax.atomic import write_atomically

HEAD = """# How fast it is

Each part was measured by the command in it, and is replaced when that runs again on such a machine.
"""


def machine() -> str:
    """What the devices of this process are, in words: the heading of their section."""
    devices = jax.devices()
    kind = devices[0].device_kind
    if devices[0].platform == "cpu":
        return f"CPU, {_cores()} cores ({_processor()})"
    return f"{len(devices)} x {kind}"


def replace_part(path: Path, section: str, title: str, body: str) -> None:
    """Puts `body` (Markdown without headings) under `title` in `section`, in place of what it was.

    Sections and parts that are new come last; the rest of the page stays as it is. Begins the page
    where there is none. Raises OSError where it cannot be read or written.
    """
    sections = _split(path.read_text(encoding="utf-8") if path.exists() else HEAD, "## ")
    parts = _split(sections.get(section, ""), "### ")
    parts[title] = body
    sections[section] = _join(parts, "### ")
    write_atomically(path, _join(sections, "## "))


def _split(text: str, mark: str) -> dict[str, str]:
    """Bodies by heading, in order; "" is what stands before the first."""
    pieces = re.split(rf"^{re.escape(mark)}(.*)\n", text, flags=re.MULTILINE)
    return {"": pieces[0]} | dict(zip(pieces[1::2], pieces[2::2], strict=True))


def _join(bodies: dict[str, str], mark: str) -> str:
    """The text of which `_split` makes these; a blank line between all pieces."""
    before, *rest = bodies.items()
    pieces = [before[1].strip(), *(f"{mark}{name}\n\n{body.strip()}" for name, body in rest)]
    return "\n\n".join(piece for piece in pieces if piece) + "\n"


def _cores() -> int:
    """The cores that this process may use, or where the system does not say which, all."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> str:
    """The processor's name as the system states it; its architecture where it does not."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    return found[1].strip() if found else os.uname().machine
