"""Files that are there complete or not at all, whoever reads them meanwhile."""

import os
import socket
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Puts a text, in UTF-8, in place of what the file was.

    What a killed process leaves is a hidden file beside it. Raises OSError where the disk refuses.
    """
    # Two hosts may write one folder from processes of the same number.
    draft = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    draft.write_text(text, encoding="utf-8", newline="")
    os.replace(draft, path)
