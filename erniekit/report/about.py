"""What has to be known to repeat a run: command, versions, machine. Kept in `about.json`.

    {"num_steps", "model": {...}, "data": {...}, "starts": [{"time", "step", "command", ...}, ...]}

A run that is resumed has one entry in `starts` for each time it was started. Imports no torch.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

ABOUT_FILE = "about.json"


def version() -> str:
    """Of this project, as installed."""
    try:
        return version_of("ernie-open")
    except PackageNotFoundError:
        return "unknown (not installed)"


def command(verb: str, words: Sequence[str]) -> str:
    """The command line, to be pasted into a shell."""
    return shlex.join(["erniekit", verb, *words])


def start(step: int, verb: str, words: Sequence[str]) -> dict[str, Any]:
    """This start of a run, after `step` steps of earlier ones."""
    import torch

    return {
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "step": step,
        "command": command(verb, words),
        "folder": os.getcwd(),
        "versions": {
            "ernie-open": version(),
            "torch": torch.__version__,
            "Python": platform.python_version(),
        },
        "machine": machine(),
    }


def machine() -> dict[str, str]:
    """Processor, memory, GPUs and system, in words."""
    import torch

    found = {
        "processor": f"{_processor()}, {len(os.sched_getaffinity(0))} cores in use"
        if hasattr(os, "sched_getaffinity")
        else _processor(),
        "threads": str(torch.get_num_threads()),
        "system": f"{platform.system()} {platform.release()}",
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        num_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        found["memory"] = f"{num_bytes / 2**30:.1f} GiB"
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        found["GPU"] = ", ".join(names)
    return found


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def read(output: Path) -> dict[str, Any]:
    """`about.json` of a run; {} where there is none, or none that can be read."""
    try:
        found = json.loads((output / ABOUT_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
