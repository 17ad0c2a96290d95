"""Put the newest records' tables into the README, between `<!-- results: NAME -->` and `<!-- end
-->`.

    python benchmarks/tables.py            write them
    python benchmarks/tables.py --check    exit with 1 when the README says something else

So no number in the README is typed by hand; a test runs the check.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from harness import RESULTS, ROOT, markdown

BLOCK = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end -->)", re.S)


def newest(what: str) -> dict:
    """The newest record of a benchmark: the README shows the machine that was measured last."""
    records = [json.loads(path.read_text()) for path in RESULTS.glob(f"{what}_*.json")]
    if not records:
        raise SystemExit(f"no record {what}_*.json in {RESULTS}; run the benchmark first")
    return max(records, key=lambda record: record["date"])


def rendered(text: str) -> str:
    def block(match: re.Match) -> str:
        record = newest(match[2])
        machine = record["machine"]
        source = (
            f"{machine['cpu']}, {machine['threads']} threads, "
            f"{machine['read_gb_per_s']} GB/s read, "
            f"{machine['float32_gflop_per_s']} GFLOP/s float32; "
            f"{record['date']}; `{record['command']}`"
        )
        table = markdown(record["table"])
        return f"{match[1]}\n{table}\n\n{record['reading']}  \n_{source}_\n{match[3]}"

    return BLOCK.sub(block, text)


def main() -> None:
    readme: Path = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    new = rendered(text)
    if "--check" in sys.argv[1:]:
        sys.exit(
            "README.md differs from the records; run benchmarks/tables.py" if new != text else 0
        )
    readme.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
