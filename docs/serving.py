"""Fill the tables of docs/serving.md: flags from the config classes, metrics from the registry.

python docs/serving.py            write them
python docs/serving.py --check    exit with 1 when the page says something else
"""

from __future__ import annotations

import re
import sys
from dataclasses import fields
from pathlib import Path

from fastdeploy.cli import KINDS
from fastdeploy.config import EngineConfig
from fastdeploy.flags import ENVIRONMENT, REASONS, UNSUPPORTED, flags_of
from fastdeploy.metrics import Metrics
from fastdeploy.outputs import RequestMetrics, Stats
from fastdeploy.server.engine import Ended

BLOCK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.S)


def filled(text: str) -> str:
    """The text with every block between `<!-- table: name -->` and `<!-- end -->` made anew."""
    makers = {
        "flags": flags,
        "environment": environment,
        "refused": refused,
        "metrics": metrics,
    }
    return BLOCK.sub(lambda m: f"{m[1]}\n{makers[m[2]]()}\n\n{m[3]}", text)


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    cells = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in cells)


def flags() -> str:
    """A table for each group."""
    parts: dict[str, list[tuple[str, ...]]] = {}
    for flag in flags_of(KINDS):
        names = ", ".join(f"`{name}`" for name in flag.spellings)
        parts.setdefault(flag.group, []).append((names, f"`{flag.default_text}`", flag.help))
    return "\n\n".join(
        f"**{group}**\n\n{table(('flag', 'default', 'meaning'), rows)}"
        for group, rows in parts.items()
    )


def environment() -> str:
    rows = [(f"`{name}`", f"`--{key.replace('_', '-')}`") for name, key in ENVIRONMENT.items()]
    return table(("variable", "stands in for"), rows)


def refused() -> str:
    """A table of those with a reason, and a line of the others."""
    named = {
        name: (f"`--{name.replace('_', '-')}`", ", ".join(f"`{value}`" for value in neutral))
        for name, neutral in UNSUPPORTED.items()
    }
    rows = [(*named[name], reason.removeprefix("is ")) for name, reason in REASONS.items()]
    others = "; ".join(f"{f} {a}" for name, (f, a) in named.items() if name not in REASONS)
    head = ("flag", "accepted", "anything else")
    return f"{table(head, rows)}\n\nThe same, and not available: {others}."


def metrics() -> str:
    """Every metric of a server with speculation and pictures, after one request."""
    config = EngineConfig(model="m", speculative_config={"method": "ngram"})
    made = Metrics(config, has_vision=True)
    made.watch(lambda: Stats(**{field.name: 0 for field in fields(Stats)}))
    made.http("POST", "/v1/chat/completions", 200, 1)
    made.end(Ended(RequestMetrics(0, 1, 2, 3), 1, 2, "stop", 3, num_cached=0, origin=None))
    rows = []
    for family in sorted(made.registry.collect(), key=lambda family: family.name):
        labels = sorted({name for sample in family.samples for name in sample.labels} - {"le"})
        name = family.name + "_total" * (family.type == "counter")
        rows.append((f"`{name}`", family.type, ", ".join(labels), family.documentation))
    return table(("metric", "kind", "labels", "meaning"), rows)


def main() -> None:
    page = Path(__file__).with_suffix(".md")
    text = page.read_text(encoding="utf-8")
    new = filled(text)
    if "--check" in sys.argv[1:]:
        sys.exit("docs/serving.md is out of date; run python docs/serving.py" if new != text else 0)
    page.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
