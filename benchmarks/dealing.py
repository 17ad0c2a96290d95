"""How evenly do ranks share the pictures of a step when batches are dealt by their patches, beside
every rank taking the next one?

    python benchmarks/dealing.py

Arithmetic alone: nothing is computed of the pictures. Records are drawn: a quarter of text alone,
else with one to four images, which are photos, screens, pages or thumbnails, each resized as the
released models resize them. A step is ACCUMULATION batches for each rank; a batch is one row of
8192 tokens, which holds one record (as the published files have it) or as many as greedy packing
puts there. All ranks wait for the one with the most patches, so the measure is the patches of that
rank over the mean, 1 where all have equally much.

The bound is what no dealing can beat: the largest batch, where that alone is above the mean.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from statistics import fmean

from harness import write_record

from ernie.vision.processor import target_size
from ernie.vision.settings import VisionSettings
from erniekit.data.dialogue import Sample
from erniekit.data.pack import Drawn, fill_rows
from erniekit.parallel.deal import deal

QUESTION = " ".join(__doc__.split("\n\n")[0].split())
RANKS, ACCUMULATION, STEPS, ROW = (2, 8, 64), 4, 50, 8192
PATCH, PATCHES_OF_TOKEN, BUFFER = 14, 4, 500
LIMITS = VisionSettings()
ONE, PACKED = "one record a row", "packed rows"

Record = tuple[int, int]  # tokens, patches
Dealer = Callable[[list[int], int], list[list[int]]]


def image_patches(rng: random.Random) -> int:
    kind = rng.choice(("photo", "screen", "page", "thumbnail"))
    if kind == "photo":
        pixels, ratio = rng.lognormvariate(13.1, 0.8), rng.choice((3 / 4, 4 / 3, 16 / 9, 1))
        height, width = (pixels / ratio) ** 0.5, (pixels * ratio) ** 0.5
    elif kind == "screen":
        height, width = rng.choice(((1080, 1920), (900, 1440), (2340, 1080)))
    elif kind == "page":
        height, width = rng.choice(((1754, 1240), (2200, 1700), (1123, 794)))
    else:
        height = width = rng.randint(64, 256)
    high, wide = target_size(
        round(height), round(width), LIMITS.image_min_pixels, LIMITS.image_max_pixels
    )
    return (high // PATCH) * (wide // PATCH)


def record(rng: random.Random) -> Record:
    """One that fits a row."""
    while True:
        has_pictures = rng.random() >= 0.25
        images = [image_patches(rng) for _ in range(rng.randint(1, 4) * has_pictures)]
        patches = sum(images)
        tokens = round(rng.lognormvariate(5.3, 0.7)) + patches // PATCHES_OF_TOKEN + 2 * len(images)
        if tokens <= ROW:
            return tokens, patches


def costs_of_rows(rng: random.Random, count: int, form: str) -> list[int]:
    """Patches of each of `count` rows."""
    rows: list[int] = []
    while len(rows) < count:
        records = [record(rng) for _ in range(BUFFER)]
        if form == ONE:
            rows += [patches for _, patches in records]
            continue
        drawn = [Drawn(i, 0, Sample(range(tokens), ())) for i, (tokens, _) in enumerate(records)]
        packed = fill_rows(drawn, ROW)
        rows += [sum(records[d.position][1] for d in row) for row in packed]
    return rows[:count]


def in_turn(costs: list[int], size: int) -> list[list[int]]:
    return [list(range(rank, len(costs), size)) for rank in range(size)]


def longest_over_mean(steps: Iterable[list[int]], size: int, dealer: Dealer) -> float:
    """Mean over the steps."""
    ratios = []
    for costs in steps:
        sums = [sum(costs[number] for number in hand) for hand in dealer(costs, size)]
        ratios.append(max(sums) / fmean(sums))
    return fmean(ratios)


def bound(steps: Iterable[list[int]], size: int) -> float:
    return fmean(max(1.0, max(costs) / (sum(costs) / size)) for costs in steps)


def main() -> None:
    results: dict[str, dict[str, float]] = {}
    table = [["rows", "ranks", "next one each", "dealt by patches", "bound"]]
    for form in (ONE, PACKED):
        for size in RANKS:
            count = size * ACCUMULATION
            rows = costs_of_rows(random.Random(size), count * STEPS, form)
            steps = [rows[i : i + count] for i in range(0, len(rows), count)]
            found = {
                "in_turn": longest_over_mean(steps, size, in_turn),
                "dealt": longest_over_mean(steps, size, deal),
                "bound": bound(steps, size),
            }
            results[f"{form}, {size} ranks"] = found
            table.append([form, str(size), *(f"{value:.2f}" for value in found.values())])
    waits = {name: n["in_turn"] / n["dealt"] for name, n in results.items()}
    most = f"{ONE}, {RANKS[-1]} ranks"
    reading = (
        f"Dealt by patches, the rank that all wait for has {results[most]['dealt']:.2f} times the "
        f"mean of {RANKS[-1]} ranks where a row is one record, "
        f"{results[most]['in_turn']:.2f} times where each takes the next one: tower and resampler "
        f"are done {waits[most]:.2f}x as soon. Over all cases it is {min(waits.values()):.2f}x to "
        f"{max(waits.values()):.2f}x."
    )
    write_record(
        "dealing", QUESTION, "python benchmarks/dealing.py",
        {"ranks": RANKS, "batches_of_a_rank_per_step": ACCUMULATION, "steps": STEPS,
         "row_tokens": ROW, "images": "photos, screens, pages, thumbnails; none in a quarter"},
        {"longest_over_mean": results, "in_turn_over_dealt": waits}, table, reading,
    )  # fmt: skip


if __name__ == "__main__":
    main()
