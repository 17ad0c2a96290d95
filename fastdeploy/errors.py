"""The errors of the engine: what a user can cause, and the loss of a process."""

from __future__ import annotations


class RequestError(ValueError):
    """One request is wrong: the message says what, what was given and what would be right.

    `param` names the field at fault and `status` is the HTTP status that the server answers with.
    """

    def __init__(self, message: str, *, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param = param
        self.status = status


class RankError(RuntimeError):
    """A process that holds a slice of the model is lost, and with it the engine."""
