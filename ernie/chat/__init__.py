"""Chat messages to token ids, for a server's prompts and for training samples alike.

`template` is the front; `messages` checks what comes in, `builtin` holds the family's own,
`folder` finds those of a model folder and `sandbox` runs them; `lock` tells whether they are those
that a model was trained with; `calls` reads the calls of an answer.
"""

from ernie.chat.lock import LOCK_FILE, changes, write_lock
from ernie.chat.messages import ChatError, NoTemplate, Segment
from ernie.chat.template import (
    LLM,
    THINKING,
    UNTRAINED,
    VL,
    VL_THINKING,
    ChatTemplate,
    Encoded,
    one_answer_each,
    stop_ids,
)

__all__ = [
    "LLM",
    "LOCK_FILE",
    "THINKING",
    "UNTRAINED",
    "VL",
    "VL_THINKING",
    "ChatError",
    "ChatTemplate",
    "Encoded",
    "NoTemplate",
    "Segment",
    "changes",
    "one_answer_each",
    "stop_ids",
    "write_lock",
]
