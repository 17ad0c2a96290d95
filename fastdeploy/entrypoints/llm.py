"""`LLM` under the name that FastDeploy publishes: `fastdeploy.entrypoints.llm.LLM`."""

from fastdeploy.llm import LLM

__all__ = ["LLM"]
