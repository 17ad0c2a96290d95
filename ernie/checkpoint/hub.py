"""Names on the hub, `baidu/ERNIE-4.5-0.3B-PT`, turned into a folder on this machine.

Only weights in safetensors, JSON, tokenizers, templates and fonts are fetched: never code, never
pickles.
"""

from __future__ import annotations

import re
from pathlib import Path

from ernie.checkpoint.errors import CheckpointError

PATTERNS = ("*.safetensors", "*.json", "tokenizer.model", "*.jinja", "*.txt", "*.ttf")
NOT_SET = "model_name_or_path is not set; give the folder of a model or its name on the hub"
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve(path_or_name: str | Path) -> Path:
    """The folder itself, or the local snapshot of a hub repository, fetched if needed.

    Raises CheckpointError when there is neither, and where none is named.
    """
    if path_or_name == "":
        raise CheckpointError(NOT_SET)
    folder = Path(path_or_name)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(
            f"{folder} is a file; give the folder that holds config.json and the weights"
        )
    if not isinstance(path_or_name, str) or not _NAME.fullmatch(path_or_name):
        raise CheckpointError(
            f"there is no folder {folder}; give the folder of a saved model, or a name on the hub "
            "such as baidu/ERNIE-4.5-0.3B-PT"
        )
    return _fetch(path_or_name)


def already_here(name: str) -> Path | None:
    """The local snapshot of a hub repository that was fetched before; nothing is fetched."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json") if _NAME.fullmatch(name) else None
    return Path(found).parent if isinstance(found, str) else None


def _fetch(name: str) -> Path:
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(name, allow_patterns=list(PATTERNS)))
    except (RepositoryNotFoundError, HFValidationError) as error:
        reason = f"the hub has no such public repository ({type(error).__name__})"
    except (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        httpx.HTTPError,
        ConnectionError,
        TimeoutError,
    ) as error:
        reason = f"the hub cannot be reached from here ({type(error).__name__})"
    raise CheckpointError(
        f"{name} is neither a folder here nor could it be fetched: {reason}; download it on a "
        f"machine with network (`hf download {name}`) and pass that folder, or set HF_ENDPOINT to "
        "a mirror, or HF_HUB_OFFLINE=1 with a filled cache"
    )
