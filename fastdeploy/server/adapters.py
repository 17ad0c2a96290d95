"""Adapters over HTTP: `/v1/load_lora_adapter`, `/v1/unload_lora_adapter`, and those of the start.

A folder that a client names has to lie under `lora_root`, also behind links.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from ernie.settings import ConfigError
from fastdeploy.config import ServerConfig
from fastdeploy.errors import RequestError
from fastdeploy.server.engine import ServerEngine


class LoadRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    lora_name: str
    lora_path: str


class UnloadRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    lora_name: str


async def load(engine: ServerEngine, body: LoadRequest, root: str | None) -> None:
    """Raises RequestError, also for files that are not an adapter of this model."""
    folder = folder_under(root, body.lora_path)
    try:
        await engine.load_adapter(body.lora_name, folder)
    except RequestError as error:
        if error.param is None and error.status == 400:
            error.param = "lora_path"  # the files are wrong
        raise


def folder_under(root: str | None, path: str) -> Path:
    """`path`, which may be relative to `root`, if it is inside. Raises RequestError."""
    if root is None:
        raise RequestError(
            "adapters may not be loaded by HTTP; start with lora_root (--lora-root FOLDER)",
            param="lora_path",
            status=403,
        )
    if "\0" in path:
        raise RequestError("lora_path has a zero character", param="lora_path")
    base = Path(root).resolve()
    folder = (base / path).resolve()
    if not folder.is_relative_to(base):
        raise RequestError(
            "lora_path leads out of lora_root; give a folder inside", param="lora_path", status=403
        )
    if not os.path.isdir(folder):  # False also for a path that no system has
        raise RequestError("there is no such folder in lora_root", param="lora_path", status=404)
    return folder


def folder_by_name(config: ServerConfig, names: Sequence[str], *, enabled: bool) -> dict[str, str]:
    """What `lora_modules` lists; the engine reads it. Raises ConfigError."""
    folders: dict[str, str] = {}
    for entry in config.lora_modules or ():
        name, equals, folder = entry.partition("=")
        if not equals or not name or not folder:
            raise ConfigError(f"lora_modules has {entry!r}; write NAME=FOLDER")
        if not enabled:
            raise ConfigError("lora_modules needs enable_lora; start with --enable-lora")
        if name in folders:
            raise ConfigError(f"lora_modules names {name!r} twice; choose another name")
        check_is_not_the_model(name, names)
        folders[name] = folder
    return folders


def check_is_not_the_model(name: str, names: Sequence[str]) -> None:
    """Raise RequestError for one of the `names` of the model."""
    if name in (*names, "default"):
        raise RequestError(
            f"{name!r} is the model itself; choose another name for the adapter", param="lora_name"
        )
