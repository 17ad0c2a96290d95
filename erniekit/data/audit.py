"""`erniekit data`: every record of a run's files read once, as training will read them.

Unusable records are named by file, line and column, and written to
`<output_dir>/data/<file>.bad.jsonl`; the files themselves are never touched. What became of all
tokens goes into `<output_dir>/data/ledger.json` (see `ledger`). Files are streamed; what is
remembered of a record are a few numbers.

Refused: a stage whose data is no dialogues or pairs of them, and, at the end, more unusable records
than `max_bad_data_share`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from ernie.settings import ConfigError
from erniekit import checkpoint
from erniekit.config import Run
from erniekit.data import ledger
from erniekit.data.columns import column_of
from erniekit.data.dialogue import CutAway
from erniekit.data.ledger import KINDS, Account, Samples
from erniekit.data.loader import Faults, Stream, kind_of, stream
from erniekit.data.readers import READERS, Reader
from erniekit.data.sources import DataError

log = logging.getLogger("erniekit")

FOLDER, LEDGER_FILE = "data", "ledger.json"
_SHOWN_FAULTS = 20  # of a file, on the terminal
_SHOWN_PLACES = 5  # examples of anything else there
_KEPT_PLACES = 1000  # examples in ledger.json


@dataclass
class Split:
    """What was found in the training or the evaluation files."""

    name: str
    stream: Stream
    samples: Samples = field(default_factory=Samples)
    accounts: list[Account] = field(default_factory=list)
    reasons: list[Counter[str]] = field(default_factory=list)
    cut_away: list[str] = field(default_factory=list)  # places
    faults: Faults = field(default_factory=lambda: Faults(0.0))

    def place(self, sample: int) -> str:
        """File and line of a sample."""
        source, record = (int(self.samples.column(c)[sample]) for c in ("source", "record"))
        return self.stream.sources[source].where(record)


def run_data(run: Run) -> int:
    """The verb. Returns 0; raises ConfigError, or DataError for too many unusable records."""
    if run.model.stage not in READERS:
        raise ConfigError(
            f"stage={run.model.stage} has data of another kind; use {' or '.join(READERS)}"
        )
    reader = READERS[run.model.stage]
    names = [s for s in ("train", "eval") if getattr(run.data, f"{s}_dataset_path")]
    if not names:
        raise ConfigError("train_dataset_path is not set; give a .jsonl file of dialogues")
    if run.view.show or run.view.sample:
        from erniekit.data import view

        return view.show(run, {name: stream(run, name) for name in names}, reader)
    folder = _made(run.output / FOLDER)
    taken: set[str] = set()
    splits = [
        _read_split(name, stream(run, name), reader, folder, taken, run.data.max_bad_data_share)
        for name in names
    ]
    found = _found(run, splits, with_rows=reader.is_packed)
    checkpoint.replace_text(folder / LEDGER_FILE, json.dumps(found, indent=1) + "\n")
    _tell(splits, found)
    log.info("all of this is in %s", folder / LEDGER_FILE)
    for split in splits:
        split.faults.judge(at_end=True)
    return 0


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output_dir {folder.parent} cannot be made: {error.strerror}") from None
    return folder


# --- reading ---


def _read_split(
    name: str, records: Stream, reader: Reader, folder: Path, taken: set[str], max_share: float
) -> Split:
    split = Split(name, records, faults=Faults(max_share))
    for number, source in enumerate(records.sources):
        bad = folder / f"{_unique(source.path.name, name, number, taken)}.bad.jsonl"
        with _Quarantine(bad) as quarantine:
            _read_file(split, number, reader, quarantine)
    ledger.close(split.accounts, split.samples)
    return split


def _unique(file: str, split: str, number: int, taken: set[str]) -> str:
    """The name of a data file, or a longer one where another file of the run has the same."""
    name = file if file not in taken else f"{split}-{number + 1}-{file}"
    taken.add(name)
    return name


def _read_file(split: Split, number: int, reader: Reader, quarantine: _Quarantine) -> None:
    records = split.stream
    source, kind = records.sources[number], records.kinds[number]
    account, reasons = Account(str(source.path), num_records=len(source)), Counter[str]()
    is_drawn = number in records.mix.drawn
    split.accounts.append(account)
    split.reasons.append(reasons)
    for index in range(len(source)):
        try:
            read = reader.read(records.encoder, source[index], kind)
        except DataError as error:
            account.num_unusable += 1
            reasons[kind_of(error)] += 1
            account.tokens["dropped"] += reader.size(records.encoder, source, index, kind)
            if isinstance(error, CutAway):
                split.cut_away.append(source.where(index))
            quarantine.add(source, index, error)
            continue
        account.tokens["dropped"] += read.num_left_out
        for sample in read.samples:
            if is_drawn:
                account.tokens["truncated"] += sample.num_cut
                split.samples.add(number, index, sample)
            else:
                account.tokens["dropped"] += len(sample) + 1 + sample.num_cut
    if is_drawn:
        split.faults.read += len(source)
        split.faults.by_reason.update(reasons)


class _Quarantine:
    """The unusable records of a file: the first are told, all are written. There is no file where
    there are none.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.count = path, 0
        self.file: TextIO | None = None

    def __enter__(self) -> _Quarantine:
        self.path.unlink(missing_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()
        if self.count > _SHOWN_FAULTS:
            log.info("... and %d more, all of them in %s", self.count - _SHOWN_FAULTS, self.path)

    def add(self, source: Any, index: int, error: DataError) -> None:
        text = source.text(index)
        column = error.column or column_of(text, error.at)
        if self.file is None:
            self.file = self.path.open("w", encoding="utf-8")
        record = {
            "line": source.number(index), "column": column, "reason": str(error), "record": text,
        }  # fmt: skip
        self.file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self.count += 1
        if self.count <= _SHOWN_FAULTS:
            place = source.where(index) + (f":{column}" if column else "")
            log.info("%s: %s", place, error)


# --- what was found ---


def _found(run: Run, splits: Sequence[Split], *, with_rows: bool) -> dict[str, Any]:
    """The content of ledger.json."""
    found: dict[str, Any] = {"max_seq_len": run.data.max_seq_len}
    for split in splits:
        files = [
            {**_as_dict(account), "unusable": dict(reasons.most_common())}
            for account, reasons in zip(split.accounts, split.reasons)
        ]
        near_empty = (split.samples.column("trained") <= ledger.NEAR_EMPTY).nonzero()[0]
        found[split.name] = {
            "files": files,
            "all": _as_dict(ledger.total(split.accounts)),
            "cut_away": split.cut_away[:_KEPT_PLACES],
            "near_empty": [split.place(i) for i in near_empty[:_KEPT_PLACES].tolist()],
        }
        if with_rows and len(split.samples):
            size = run.training.batch_size
            epoch = ledger.first_epoch(split.stream, split.samples, size)
            found[split.name]["epoch"] = dataclasses.asdict(epoch)
    if len(splits) == 2:
        train, held_out = splits
        both = ledger.in_both(train.samples, held_out.samples)
        found["overlap"] = {
            "count": len(both),
            "examples": [
                [held_out.place(mine), train.place(theirs)] for mine, theirs in both[:_KEPT_PLACES]
            ],
        }
    return found


def _as_dict(account: Account) -> dict[str, Any]:
    values = dataclasses.asdict(account)
    return {**values, "num_tokens": account.num_tokens, "tokens": values["tokens"]}


def _tell(splits: Sequence[Split], found: dict[str, Any]) -> None:
    for split in splits:
        log.info("\n%s", table(split.name, split.accounts))
        if epoch := found[split.name].get("epoch"):
            log.info("%s", _rows(epoch, found["max_seq_len"]))
        if epoch and epoch["num_never_drawn"]:
            log.warning(
                "%s: %d records are not drawn in the first epoch, by the weights of their files",
                split.name,
                epoch["num_never_drawn"],
            )
        _warn(split.name, split.cut_away, "samples have no trained token left after cutting; they "
              "are not trained")  # fmt: skip
        near_empty = found[split.name]["near_empty"]
        count = found[split.name]["all"]["num_near_empty"]
        _warn(split.name, near_empty, f"samples train at most {ledger.NEAR_EMPTY} tokens", count)
    overlap = found.get("overlap", {"count": 0, "examples": []})
    pairs = [f"{mine} = {theirs}" for mine, theirs in overlap["examples"]]
    _warn("eval", pairs, "samples are also in the training data: eval_loss will look too good",
          overlap["count"])  # fmt: skip


def _warn(split: str, places: Sequence[str], what: str, count: int | None = None) -> None:
    count = len(places) if count is None else count
    if count:
        more = ", ..." if count > _SHOWN_PLACES else ""
        log.warning("%s: %d %s (%s%s)", split, count, what, ", ".join(places[:_SHOWN_PLACES]), more)


def table(split: str, accounts: Sequence[Account]) -> str:
    """Records, samples and tokens of each file, their sum, and what share of all tokens that is."""
    everything = ledger.total(accounts)
    head = (split, "records", "unusable", "samples", "tokens", *KINDS)
    rows = [
        (a.path, *(f"{n:,}" for n in (
            a.num_records, a.num_unusable, a.num_samples, a.num_tokens, *a.tokens.values())))
        for a in (*accounts, everything)
    ]  # fmt: skip
    rows = rows[-1:] if len(accounts) == 1 else rows
    rows[-1] = ("all" if len(accounts) > 1 else accounts[0].path, *rows[-1][1:])
    shares = shares_of(list(everything.tokens.values()))
    rows.append(("", "", "", "", "100 %", *(f"{share / 10:.1f} %" for share in shares)))
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return "\n".join(
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths)))
        for row in (head, *rows)
    )


def shares_of(counts: Sequence[int]) -> list[int]:
    """Thousandths of the sum, rounded so that they add up to 1000 (by the largest remainders)."""
    total = sum(counts)
    if not total:
        return [0 for _ in counts]
    shares = [1000 * n // total for n in counts]
    left = sorted(range(len(counts)), key=lambda i: -(1000 * counts[i] % total))
    for i in left[: 1000 - sum(shares)]:
        shares[i] += 1
    return shares


def _rows(epoch: dict[str, Any], capacity: int) -> str:
    places = epoch["num_rows"] * capacity
    padding = f", {epoch['num_padding']:,} places of padding" if epoch["num_padding"] else ""
    return (
        f"an epoch: {epoch['num_drawn']:,} records in {epoch['num_rows']:,} rows of {capacity:,}, "
        f"{100 * epoch['num_tokens'] / places:.1f} % full, {epoch['num_free']:,} places free"
        f"{padding}"
    )
