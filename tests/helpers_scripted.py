"""A tiny thinking model that says what a script wants: trained on it until it does.

Tool calls and thoughts can then be tested through the whole server, whatever it is made of.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import helpers_tokenizer
import torch

import ernie
from ernie.attention import packed_causal
from ernie.chat import ChatTemplate
from ernie.model import ErnieModel
from ernie.models import TINY

MAX_STEPS = 600


@dataclass(frozen=True)
class Line:
    """What is asked, and what the model answers: text as it writes it, tags and all."""

    messages: list[dict[str, Any]]
    answer: str
    tools: list[dict[str, Any]] = field(default_factory=list)


def scripted_folder(path: Path, script: list[Line]) -> Path:
    """A model folder in float32 whose greedy answers are the script's, each ended by <|im_end|>.

    Some tags are special tokens, some ordinary ones, and those of calls are spelled in several.
    """
    helpers_tokenizer.sentencepiece_folder(path, thinking=True)
    config_path = path / "tokenizer_config.json"
    config = json.loads(config_path.read_text("utf-8"))
    config["additional_special_tokens"] += ["</think>", "<response>", "</response>"]
    helpers_tokenizer.write_json(config_path, config)
    (path / "chat_template.jinja").write_text(TEMPLATE, "utf-8")
    tokenizer = ernie.Tokenizer.from_folder(path)
    model = ErnieModel(
        dataclasses.replace(
            TINY["tiny-dense"], vocab_size=tokenizer.vocab_size, max_position_embeddings=1024
        ),
        dtype=torch.float32,
    )
    model.init_weights(seed=1)
    _train(model, [_ids(tokenizer, line) for line in script])
    ernie.save(model, path)
    return path


# Much like ERNIE-4.5-21B-A3B-Thinking's.
TEMPLATE = """<|im_start|>system
<global_setting>
think_mode=True
</global_setting>{% if tools %}


<tool_list>
[{{ tools | map("tojson") | join(", ") }}]
</tool_list>{% endif %}<|im_end|>

{% for m in messages %}<|im_start|>{{ "user" if m.role == "tool" else m.role }}
{% if m.role == "tool" %}<tool_response>
{{ m.content }}
</tool_response>{% elif m.role == "assistant" %}
{% if m.content %}<response>
{{ m.content }}
</response>
{% endif %}{% for call in m.tool_calls %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{% endfor %}{% else %}{{ m.content }}{% endif %}<|im_end|>

{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
<think>
{% endif %}"""


def _ids(tokenizer: ernie.Tokenizer, line: Line) -> tuple[list[int], list[int]]:
    template = ChatTemplate.for_folder(tokenizer.files[0].parent, tokenizer)
    prompt = template.encode(tokenizer, line.messages, tools=line.tools).token_ids
    return prompt, tokenizer.encode(line.answer + "<|im_end|>", allow_special=True)


def _train(model: ErnieModel, samples: list[tuple[list[int], list[int]]]) -> None:
    """Until every token of every answer is the likeliest one, with a margin."""
    rows = [prompt + answer for prompt, answer in samples]
    ids_T = torch.tensor([token for row in rows for token in row])
    positions_T = torch.cat([torch.arange(len(row)) for row in rows])
    ends = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
    wanted = torch.cat(
        [  # positions whose next token is the script's
            torch.arange(int(end) - len(answer) - 1, int(end) - 1)
            for end, (_, answer) in zip(ends[1:], samples)
        ]
    )
    attend = packed_causal(ends.int())
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(MAX_STEPS):
        logits = model.head(model.hidden(ids_T, positions_T, attend)[wanted])
        losses = torch.nn.functional.cross_entropy(logits, ids_T[wanted + 1], reduction="none")
        if losses.max() < 0.1:
            return
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
    raise AssertionError(f"the script is not learnt: largest loss {losses.max():.2f}")
