"""`erniekit data`: every record of a run's files read once, as training will read them.

Unusable records are named by file, line and column, and written to
`<output_dir>/data/<file>.bad.jsonl`; the files themselves are never touched. What became of all
tokens goes into `<output_dir>/data/ledger.json` (see `ledger`). Files are streamed; what is
remembered of a record are a few numbers.

Refused: a stage whose data is of another kind, and, at the end, more unusable records
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
from erniekit.config.stages import TRAINABLE
from erniekit.data import ledger
from erniekit.data.chunks import Chunks, Fault, read_chunk
from erniekit.data.ledger import KINDS, Account, Samples
from erniekit.data.sources import Source
from erniekit.data.stream import Faults, Stream, stream

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
    faults: Faults
    has_rewards: bool = False  # which may read any key of a record
    samples: Samples = field(default_factory=Samples)
    accounts: list[Account] = field(default_factory=list)
    reasons: list[Counter[str]] = field(default_factory=list)
    unread: list[Counter[str]] = field(default_factory=list)
    cut_away: list[str] = field(default_factory=list)  # places

    def place(self, sample: int) -> str:
        """File and line of a sample."""
        source, record = (int(self.samples.column(c)[sample]) for c in ("source", "record"))
        return self.stream.sources[source].where(record)


def run_data(run: Run) -> int:
    """The verb. Returns 0; raises ConfigError, or DataError for too many unusable records."""
    if run.stage.recipe is None:
        raise ConfigError(
            f"stage={run.model.stage} has data of another kind; use {', '.join(TRAINABLE)}"
        )
    names = [s for s in ("train", "eval") if run.data.files(s)]
    if not names:
        raise ConfigError("train_dataset_path is not set; give a .jsonl file of records")
    streams = {name: stream(run, name) for name in names}
    if run.audit.show or run.audit.sample:
        from erniekit.data import view

        return view.show(run.audit, streams)
    if run.audit.dataset_output_dir:
        from erniekit.data import offline

        folder = _made(Path(run.audit.dataset_output_dir))
        return offline.write(
            streams,
            folder,
            run.audit.preprocessing_num_workers,
            overwrite=run.training.overwrite_output_dir,
        )
    folder = _made(run.output / FOLDER)
    splits = [
        Split(name, s, Faults(s.faults.max_share, s.faults.size), run.stage.has_rollouts)
        for name, s in streams.items()
    ]
    with Chunks(streams, run.audit.preprocessing_num_workers) as chunks:
        taken: set[str] = set()
        for split in splits:
            _read(split, chunks, folder, taken)
    found = _found(run, splits)
    checkpoint.replace_text(folder / LEDGER_FILE, json.dumps(found, indent=1) + "\n")
    _tell(splits, found)
    log.info("\nall of this is in %s", folder / LEDGER_FILE)
    for split in splits:
        split.faults.judge(at_end=True)
    return 0


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"the folder {folder} cannot be made: {error.strerror}") from None
    return folder


# --- reading ---


def _read(split: Split, chunks: Chunks, folder: Path, taken: set[str]) -> None:
    """Go through the files of a split, and close its accounts."""
    for number, source in enumerate(split.stream.sources):
        bad = folder / f"{_unique(source.path.name, split.name, number, taken)}.bad.jsonl"
        account, reasons = Account(str(source.path), num_records=len(source)), Counter[str]()
        split.accounts.append(account)
        split.reasons.append(reasons)
        split.unread.append(unread := Counter[str]())
        with _Quarantine(bad, source) as quarantine:
            for chunk in chunks.of(split.name, number, read_chunk):
                split.samples.extend(chunk.samples)
                unread.update({} if split.has_rewards else chunk.unread)
                account.tokens["truncated"] += chunk.num_truncated
                account.tokens["dropped"] += chunk.num_dropped
                account.num_unusable += len(chunk.faults)
                reasons.update(fault.kind for fault in chunk.faults)
                split.cut_away += [source.where(f.index) for f in chunk.faults if f.is_cut_away]
                quarantine.add(chunk.faults)
        if number in split.stream.mix.drawn:
            split.faults.by_reason.update(reasons)
    ledger.close(split.accounts, split.samples)


def _unique(file: str, split: str, number: int, taken: set[str]) -> str:
    """The name of a data file, or a longer one where another file of the run has the same."""
    name = file if file not in taken else f"{split}-{number + 1}-{file}"
    taken.add(name)
    return name


class _Quarantine:
    """The unusable records of a file: the first are told, all are written. There is no file where
    there are none.
    """

    def __init__(self, path: Path, source: Source) -> None:
        self.path, self.source, self.count = path, source, 0
        self.file: TextIO | None = None

    def __enter__(self) -> _Quarantine:
        self.path.unlink(missing_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()
        if self.count > _SHOWN_FAULTS:
            log.info("... and %d more, all of them in %s", self.count - _SHOWN_FAULTS, self.path)

    def add(self, faults: Sequence[Fault]) -> None:
        for fault in faults:
            if self.file is None:
                self.file = self.path.open("w", encoding="utf-8")
            record = {
                "line": self.source.number(fault.index),
                "column": fault.column,
                "reason": fault.reason,
                "record": self.source.text(fault.index),
            }
            self.file.write(json.dumps(record, ensure_ascii=False) + "\n")
            self.count += 1
            if self.count <= _SHOWN_FAULTS:
                column = f":{fault.column}" if fault.column else ""
                log.info("%s%s: %s", self.source.where(fault.index), column, fault.reason)


# --- what was found ---


def _found(run: Run, splits: Sequence[Split]) -> dict[str, Any]:
    """The content of ledger.json."""
    found: dict[str, Any] = {"max_seq_len": run.data.max_seq_len}
    for split in splits:
        near_empty = (split.samples.column("trained") <= ledger.NEAR_EMPTY).nonzero()[0]
        found[split.name] = {
            "files": [
                {
                    **account.as_dict(),
                    "reasons": dict(reasons.most_common()),
                    "unread_keys": dict(unread.most_common()),
                }
                for account, reasons, unread in zip(split.accounts, split.reasons, split.unread)
            ],
            "all": ledger.total(split.accounts).as_dict(),
            "cut_away": split.cut_away[:_KEPT_PLACES],
            "near_empty": [split.place(i) for i in near_empty[:_KEPT_PLACES].tolist()],
        }
        if len(split.samples):
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


def _tell(splits: Sequence[Split], found: dict[str, Any]) -> None:
    for split in splits:
        its = found[split.name]
        log.info("\n%s", table(split.name, split.accounts))
        if epoch := its.get("epoch"):
            log.info("%s", _rows(epoch, found["max_seq_len"]))
            count = epoch["num_never_drawn"]
            _warn(
                split.name, count, "records are not drawn in the first epoch, by the file weights"
            )
        for account, kind, unread in zip(split.accounts, split.stream.kinds, split.unread):
            for key, count in unread.most_common(_SHOWN_PLACES):
                where = f"records of {account.path} have the key {key!r}"
                _warn(split.name, count, f"{where}, which the type {kind} does not read")
        what = "samples have no trained token left after cutting; they are not trained"
        _warn(split.name, len(split.cut_away), what, split.cut_away)
        what = f"samples train at most {ledger.NEAR_EMPTY} tokens"
        _warn(split.name, its["all"]["num_near_empty"], what, its["near_empty"])
    if overlap := found.get("overlap"):
        pairs = [f"{mine} = {theirs}" for mine, theirs in overlap["examples"]]
        what = "samples are also in the training data: eval_loss will look too good"
        _warn("eval", overlap["count"], what, pairs)


def _warn(split: str, count: int, what: str, places: Sequence[str] = ()) -> None:
    if not count:
        return
    shown = ", ".join(places[:_SHOWN_PLACES]) + ", ..." * (count > _SHOWN_PLACES)
    log.warning("%s: %d %s%s", split, count, what, f" ({shown})" if places else "")


def table(split: str, accounts: Sequence[Account]) -> str:
    """Records, samples and tokens of each file, their sum, and what share of all tokens that is."""
    everything = ledger.total(accounts)
    shown = [*accounts, everything] if len(accounts) > 1 else accounts
    shares = shares_of(list(everything.tokens.values()))
    rows = [
        (split, "records", "unusable", "samples", "tokens", *KINDS),
        *((a.path, *(f"{n:,}" for n in a.row())) for a in shown),
        ("", "", "", "", "100 %", *(f"{share / 10:.1f} %" for share in shares)),
    ]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths)))
        for row in rows
    )


def shares_of(counts: Sequence[int]) -> list[int]:
    """Thousandths of the sum, rounded so that they add up to 1000 (by the largest remainders)."""
    total = sum(counts)
    if not total:
        return [0 for _ in counts]
    shares = [1000 * n // total for n in counts]
    by_remainder = sorted(range(len(counts)), key=lambda i: -(1000 * counts[i] % total))
    for i in by_remainder[: 1000 - sum(shares)]:
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
