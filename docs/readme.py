"""Fill the generated parts of README.md and docs: tables of the newest records, the trees.

    python docs/readme.py            write them
    python docs/readme.py --check    exit with 1 when a page says something else

So no number there is typed by hand, and the tree is the real one: an entry's words are the
first sentence of its module. A test runs the check.
"""

from __future__ import annotations

import ast
import itertools
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("ernie", "erniekit", "fastdeploy")
BLOCK = re.compile(r"(<!-- (results|tree): (\S+) -->\n).*?(<!-- end -->)", re.S)
WIDTH = 110


def filled(text: str) -> str:
    """The text with every block between `<!-- kind: name -->` and `<!-- end -->` made anew."""
    makers = {"results": results, "tree": tree}
    return BLOCK.sub(lambda m: f"{m[1]}\n{makers[m[2]](m[3])}\n{m[4]}", text)


def results(what: str) -> str:
    """First table, reading and origin of the newest record of a benchmark."""
    records = {p: json.loads(p.read_text()) for p in RESULTS.glob(f"{what}_*.json")}
    if not records:
        raise SystemExit(f"no record {what}_*.json in {RESULTS}; run the benchmark first")
    path, record = max(records.items(), key=lambda item: (item[1]["date"], item[0].name))
    lines = path.with_suffix(".md").read_text().splitlines()
    below = itertools.dropwhile(lambda line: not line.startswith("|"), lines)
    table = "\n".join(itertools.takewhile(lambda line: line.startswith("|"), below))
    origin = f"{machine(record['machine'])}; {record['date']}; `{record['command']}`"
    return f"{table}\n\n{record['reading']}  \n_{origin}_\n"


def machine(where: dict) -> str:
    if "gpu" in where:
        return (
            f"{where['gpu']}, {where['copied_gb_per_s']} GB/s copied, "
            f"{where['bfloat16_tflop_per_s']} TFLOP/s bfloat16"
        )
    threads = "1 thread" if where["threads"] == 1 else f"{where['threads']} threads"
    return (
        f"{where['cpu']}, {threads}, {where['read_gb_per_s']} GB/s read, "
        f"{where['float32_gflop_per_s']} GFLOP/s float32"
    )


def tree(package: str) -> str:
    """A package's files, each with the first sentence of its docstring."""
    lines = [f"{package}/"]
    for path in sorted((ROOT / package).rglob("*"), key=_order):
        depth = len(path.relative_to(ROOT).parts) - 1
        if path.is_dir() and any(p.name != "__init__.py" for p in path.rglob("*.py")):
            lines.append(f"{'  ' * depth}{path.name}/")
        elif path.suffix == ".py" and path.name != "__init__.py":
            lines.append(f"{'  ' * depth}{path.name:<{28 - 2 * depth}}{sentence(path)}")
    body = "\n".join(map(shortened, lines))
    return f"```text\n{body}\n```\n"


def shortened(line: str) -> str:
    """At most WIDTH characters, cut where the sentence has a joint, which dots tell."""
    if len(line) <= WIDTH:
        return line
    joint = max(line.rfind(mark, 40, WIDTH) for mark in (", ", ": "))
    return line[: joint if joint > 0 else line.rfind(" ", 0, WIDTH)] + " ..."


def _order(path: Path) -> tuple:
    """Files of a folder before its subfolders, both by name."""
    parts = path.relative_to(ROOT).parts
    if path.is_dir():
        return tuple((1, part) for part in parts)
    return (*((1, part) for part in parts[:-1]), (0, parts[-1]))


def sentence(path: Path) -> str:
    text = " ".join((ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").split())
    return re.split(r"(?<=[\w`)])[.;](?: |$)", text, maxsplit=1)[0]


def main() -> None:
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        text = path.read_text(encoding="utf-8")
        new = filled(text)
        if "--check" in sys.argv[1:] and new != text:
            sys.exit(f"{path.relative_to(ROOT)} is out of date; run python docs/readme.py")
        path.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
