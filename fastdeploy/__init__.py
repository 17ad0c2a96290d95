"""Inference for the ERNIE 4.5 family: `LLM` in a program, an OpenAI-compatible HTTP server."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdeploy.llm import LLM
    from fastdeploy.sampling import GuidedDecodingParams, SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "GuidedDecodingParams", "SamplingParams"]

_HOMES = {
    "LLM": "fastdeploy.llm",
    "SamplingParams": "fastdeploy.sampling",
    "GuidedDecodingParams": "fastdeploy.sampling",
}


def __getattr__(name: str) -> Any:
    # Names are fetched on first use, so that `--help` does not import torch.
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'fastdeploy' has no attribute {name!r}")
