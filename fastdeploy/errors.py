"""The errors a user of the engine or the server can cause."""

from __future__ import annotations


class RequestError(ValueError):
    """One request is wrong: the message says what, what was given and what would be right.

    `param` names the field at fault and `status` is the HTTP status that the server answers with.
    """

    def __init__(self, message: str, *, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param = param
        self.status = status
