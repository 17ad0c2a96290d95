"""The error of everything that reads or writes checkpoints. Imports no torch."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: one sentence that names the file and the tensor."""
