"""Small JSON files of a model folder, read with the error of whoever asks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_object(path: Path, error: type[Exception]) -> dict[str, Any]:
    """The JSON object in a file, {} where there is no file; raises `error` for anything else."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as fault:
        raise error(f"{path} is not JSON: {fault}") from None
    if not isinstance(value, dict):
        raise error(f"{path} holds a JSON {type(value).__name__}; expected an object")
    return value
