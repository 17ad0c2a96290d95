"""The page of `report.html`: one file without scripts or addresses; pictures lie in it, small.

Whatever a run brings in (answers, paths, settings) is escaped where it enters, and the page forbids
itself to load or run anything. `PLOTS` is the table of what is drawn; numbers of a record that no
row names get a plot of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from erniekit.report import heat
from erniekit.report.bar import duration
from erniekit.report.markup import table, text
from erniekit.report.plots import Line, exact, plot, smoothed
from erniekit.report.style import STYLE
from erniekit.report.thumbnails import is_thumbnail

if TYPE_CHECKING:
    from erniekit.report.story import Story

# (title, [(key, name, look), ...]); keys without numbers are left out.
PLOTS = (
    ("Loss", [("loss", "training", "c0"), ("eval_loss", "evaluation", "c1 dots")]),
    ("Reward", [("reward", "training", "c0"), ("eval_reward", "evaluation", "c1 dots")]),
    ("Right answers", [("right", "training", "c0"), ("eval_right", "evaluation", "c1 dots")]),
    ("Tokens of an answer", [
        ("length", "training", "c0"), ("eval_length", "evaluation", "c1 dots"),
    ]),
    ("Entropy, nats a token", [("entropy", "", "c0")]),
    ("Divergence from the reference, nats a token", [("kl", "", "c0")]),
    ("Shares: clipped, prompts left out, answers cut", [
        ("clip_share", "clipped", "c0"), ("dropped_share", "left out", "c1"),
        ("cut_share", "cut", "c2"),
    ]),
    ("Parts of the loss", [("policy_loss", "policy", "c0"), ("pair_loss", "pairs", "c1")]),
    ("Pairs", [("pair_accuracy", "accuracy", "c0"), ("pair_margin", "margin", "c1")]),
    ("Preference accuracy", [
        ("rewards_accuracy", "training", "c0"), ("eval_rewards_accuracy", "evaluation", "c1 dots"),
    ]),
    ("Reward margin", [
        ("rewards_margin", "training", "c0"), ("eval_rewards_margin", "evaluation", "c1 dots"),
    ]),
    ("Rewards", [
        ("rewards_chosen", "chosen", "c0"), ("rewards_rejected", "rejected", "c1"),
        ("eval_rewards_chosen", "chosen, evaluation", "c2 dots"),
        ("eval_rewards_rejected", "rejected, evaluation", "c3 dots"),
    ]),
    ("Bits per byte", [("eval_bits_per_byte", "evaluation", "c1 dots")]),
    ("Token accuracy", [
        ("accuracy", "training", "c0"), ("eval_accuracy", "evaluation", "c1 dots"),
    ]),
    ("Learning rate", [("learning_rate", "", "c0")]),
    ("Gradient norm, before clipping", [("grad_norm", "", "c0")]),
    ("Tokens per second", [("tokens_per_second", "", "c2")]),
    ("Peak memory, GiB", [("peak_memory_gib", "", "c2")]),
    ("Router: busiest expert / mean", [("moe_max_over_mean", "", "c3")]),
    ("Router: entropy over its largest value", [("moe_entropy", "", "c2")]),
    ("Router: dead experts", [("moe_dead_experts", "", "c1")]),
    ("Router: share over capacity", [("moe_dropped", "", "c1")]),
    ("Router: weighted losses", [
        ("aux_loss", "load balance", "c0"), ("z_loss", "z", "c1"),
        ("orthogonal_loss", "orthogonal", "c2"),
    ]),
    ("Multi-token prediction loss", [("mtp_loss", "", "c3")]),
)  # fmt: skip
# Told elsewhere, or the same as another number.
_UNDRAWN = {
    "step", "seconds", "num_tokens", "num_trained_tokens", "total_tokens", "epoch",
    "eval_ppl", "eval_tokens", "eval_seconds", "num_pairs", "eval_pairs",
    "num_answers", "eval_answers", "eval_prompts",
}  # fmt: skip
_SMOOTH_FROM = 40  # points
_MOST_MAPS = 6  # of the experts of a layer
_SMOOTH_ALREADY = {"learning_rate", "peak_memory_gib", "moe_dead_experts"}


def page(story: Story) -> str:
    """The whole HTML document."""
    sections = (
        _numbers(story), _plots(story), _experts(story), _answers(story), _skipped(story),
        _results(story), _data(story), _settings(story), _starts(story),
    )  # fmt: skip
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        f"<title>{text(_title(story))}</title><style>{STYLE}</style></head><body>\n"
        f"{_header(story)}\n<main>{''.join(sections)}</main>\n</body></html>\n"
    )


def _title(story: Story) -> str:
    model = str(story.settings.get("model_name_or_path") or "model").rstrip("/")
    return f"{model.rpartition('/')[2]} · {_method(story)}"


def _method(story: Story) -> str:
    kind, stage = story.settings.get("fine_tuning", ""), story.settings.get("stage", "")
    return f"{stage} {'with LoRA' if kind == 'LoRA' else '(full)'}" if stage else "training"


def _header(story: Story) -> str:
    done = max((r["step"] for r in story.records), default=0)
    is_done = bool(story.num_steps) and done >= story.num_steps
    state = "finished" if is_done else "not finished"
    spent = sum(r.get("seconds") or 0 for r in story.steps)
    facts = [f"{done:,} of {story.num_steps:,} steps", f"{duration(spent)} of training"]
    if sizes := story.about.get("model"):
        facts.append(f"{sizes['trained']:,} of {sizes['parameters']:,} parameters trained")
    if starts := story.about.get("starts"):
        facts.append(f"started {starts[0]['time']}")
    filled = 100 * done / max(story.num_steps, 1)
    note = ""
    if story.num_unreadable:
        note = f'<p class="warn">Lines that cannot be read: {story.num_unreadable}.</p>'
    return (
        f"<header><h1>{text(_title(story))}"
        f'<span class="state {"done" if is_done else "open"}">{state}</span></h1>'
        f"<p>{text(' · '.join(facts))}</p>"
        f'<div class="progress"><i style="width:{filled:.1f}%"></i></div>{note}</header>'
    )


# --- numbers ---


def _numbers(story: Story) -> str:
    """The handful of numbers one looks for first."""
    cards = []
    for key, name, form in (
        ("eval_loss", "evaluation loss", "{:.4f}"),
        ("eval_ppl", "perplexity", "{:.2f}"),
        ("eval_bits_per_byte", "bits per byte", "{:.4f}"),
        ("eval_accuracy", "token accuracy", "{:.1%}"),
        ("eval_right", "right answers", "{:.1%}"),
        ("eval_reward", "reward", "{:.3f}"),
        ("eval_rewards_accuracy", "preference accuracy", "{:.1%}"),
        ("eval_rewards_margin", "reward margin", "{:.3f}"),
    ):
        if points := story.series(key):
            first, last = points[0][1], points[-1][1]
            before = f"from {form.format(first)}" if len(points) > 1 else ""
            cards.append((name, form.format(last), before))
    if losses := story.series("loss"):
        tail = losses[-max(len(losses) // 10, 1) :]
        mean = sum(y for _, y in tail) / len(tail)
        cards.append(
            (
                "training loss",
                f"{mean:.4f}",
                f"last {len(tail)} steps" if len(tail) > 1 else "last step",
            )
        )
    if speeds := sorted(y for _, y in story.series("tokens_per_second")):
        cards.append(("tokens/s", f"{speeds[len(speeds) // 2]:,.0f}", "median"))
    if peaks := story.series("peak_memory_gib"):
        cards.append(("peak memory", f"{max(y for _, y in peaks):.2f}", "GiB"))
    if totals := story.series("total_tokens"):
        trained = sum(y for _, y in story.series("num_trained_tokens"))
        cards.append(("tokens", f"{totals[-1][1]:,.0f}", f"{trained:,.0f} trained"))
    if story.steps:
        cards.append(("skipped steps", f"{len(story.skipped):,}", ""))
    shown = "".join(
        f"<div><span>{text(name)}</span><b>{text(value)}</b><small>{text(note)}</small></div>"
        for name, value, note in cards
    )
    # One row, or two that are equally full; on a phone as many as there is room for.
    rows = f"--all:{len(cards)};--half:{(len(cards) + 1) // 2}"
    return f'<section class="cards" style="{rows}">{shown}</section>' if cards else ""


def _plots(story: Story) -> str:
    rows = list(PLOTS)
    named = {key for _, lines in PLOTS for key, *_ in lines} | _UNDRAWN
    left = [key for key in story.numbers if key not in named]
    rows += [(key.replace("_", " "), [(key, "", "c3")]) for key in left]
    figures = [_figure(story, title, lines) for title, lines in rows]
    return f'<section class="plots">{"".join(figures)}</section>' if any(figures) else ""


def _figure(story: Story, title: str, wanted: list[tuple[str, str, str]]) -> str:
    """A plot with a heading that names its lines and their last values; "" without numbers."""
    lines, legend = [], []
    for key, name, look in wanted:
        points = story.series(key)
        if not points:
            continue
        is_noisy = len(points) > _SMOOTH_FROM and key not in _SMOOTH_ALREADY
        if is_noisy:
            lines.append(Line(key, points, f"{look} faint"))
            points = smoothed(points, max(len(points) / 40, 4))
        lines.append(Line(f"{key}, smoothed" if is_noisy else key, points, look))
        last = exact(points[-1][1])
        legend.append(f'<span class="{look.split()[0]}">{text(name)} <b>{last}</b></span>')
    if not lines:
        return ""
    marks = (
        [float(r["step"]) for r in story.skipped] if wanted[0][0] in ("loss", "grad_norm") else []
    )
    return (
        f"<figure><figcaption><h3>{text(title)}</h3>{''.join(legend)}</figcaption>"
        f"{plot(lines, marks)}</figure>"
    )


def _experts(story: Story) -> str:
    """Heat maps of the load, of both banks where a model has experts for vision too."""
    seen = _bank(story, "moe_vision_loads", "Vision experts", "vision experts")
    return _bank(story, "moe_loads", "Text experts" if seen else "Experts", "experts") + seen


def _bank(story: Story, key: str, heading: str, name: str) -> str:
    """Busiest expert by layer, and the experts of the most uneven layers; "" without loads.

    Steps without a token for the bank, as of text alone for vision, say nothing of its balance.
    """
    found = [r for r in story.steps if _are_loads(r.get(key)) and any(map(any, r[key]))]
    shape = [len(layer) for layer in found[-1][key]] if found else []
    found = [r for r in found if [len(layer) for layer in r[key]] == shape]
    if not found:
        return ""
    shown = heat.thinned(found)
    steps = [record["step"] for record in shown]
    # By layer, expert and column: load over the mean of the layer at that step.
    ratios = [
        [[r[key][n][e] * size / max(sum(r[key][n]), 1) for r in shown] for e in range(size)]
        for n, size in enumerate(shape)
    ]
    busiest = [[max(column) for column in zip(*layer)] for layer in ratios]
    order = sorted(range(len(shape)), key=lambda n: -busiest[n][-1])[:_MOST_MAPS]
    maps = [("Busiest expert of each layer", f"layer of {name}", busiest)] * (len(shape) > 1)
    maps += [(f"Layer of {name} {n}", "expert", ratios[n]) for n in order]
    figures = "".join(
        f"<figure><figcaption><h3>{title}</h3></figcaption>{heat.heat(rows, steps, row)}</figure>"
        for title, row, rows in maps
    )
    legend = "".join(f'<span class="l{i}">{text(name)}</span>' for i, name in enumerate(heat.NAMES))
    left = (
        f", the {len(order)} most uneven of {len(shape)} layers" if len(order) < len(shape) else ""
    )
    told = f"Load of an expert over the mean of its layer, at single steps{left}."
    return (
        f'<section><h2>{heading}</h2><p>{told}</p><p class="levels">{legend}</p>'
        f'<div class="maps">{figures}</div></section>'
    )


def _are_loads(value: Any) -> bool:
    """Lists of counts, as training writes them; a file may hold anything."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(layer, list) and layer for layer in value)
        and all(isinstance(n, int) and n >= 0 for layer in value for n in layer)
    )


# --- words ---


def _answers(story: Story) -> str:
    """Each prompt with the reference, the first and the last answer; those between folded."""
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for record in story.answers:
        by_prompt.setdefault(str(record.get("where")), []).append(record)
    cards = []
    for where, given in by_prompt.items():
        first, last = given[0], given[-1]
        question = "\n".join(str(m.get("content")) for m in first.get("messages", [])[-1:])
        columns = [("reference", first.get("reference"), "")]
        columns += [_column(r) for r in ([first, last] if len(given) > 1 else [first])]
        cells = "".join(
            f"<div><h4>{text(head)}<small>{text(note)}</small></h4><p>{text(said)}</p></div>"
            for head, said, note in columns
        )
        between = "".join(
            f"<h4>{text(head)}<small>{text(note)}</small></h4><p>{text(said)}</p>"
            for head, said, note in map(_column, given[1:-1])
        )
        folded = f"<details><summary>{len(given) - 2} between</summary>{between}</details>"
        cards.append(
            f'<article>{_pictures(first)}<p class="question">{text(question)}</p>'
            f'<small class="where">{text(where)}'
            f'</small><div class="answers">{cells}</div>{folded if between else ""}</article>'
        )
    return f"<section><h2>Answers</h2>{''.join(cards)}</section>" if cards else ""


def _pictures(record: Mapping[str, Any]) -> str:
    """Those of a prompt, small; what does not lie in the record itself is not shown."""
    found = record.get("pictures")
    found = [p for p in found if isinstance(p, dict)] if isinstance(found, list) else []
    shown = [
        f'<img alt="{text(p.get("type"))}" title="{text(p.get("type"))}" src="{p["thumbnail"]}">'
        for p in found
        if is_thumbnail(p.get("thumbnail"))
    ]
    count = record.get("num_pictures")
    left = count - len(shown) if isinstance(count, int) else 0
    more = f"<small>and {left:,} more</small>" if shown and left > 0 else ""
    return f'<p class="pictures">{"".join(shown)}{more}</p>' if shown else ""


def _column(record: Mapping[str, Any]) -> tuple[str, Any, str]:
    cut = ", cut at max_answer_tokens" if record.get("is_cut") else ""
    head = "before training" if record["step"] == 0 else f"after step {record['step']:,}"
    return head, record.get("answer"), f"f1 {record.get('f1', 0):.2f}{cut}"


def _skipped(story: Story) -> str:
    if not story.skipped:
        return ""
    keys = ("loss", "grad_norm", "learning_rate")
    rows = [
        (
            r["step"],
            *(exact(r[k]) if r.get(k) is not None else "not finite" for k in keys),
            r.get("skipped_because", ""),
        )
        for r in story.skipped
    ]
    head = ("step", "loss", "gradient norm", "learning rate", "why")
    told = "<p>The weights were left as they were.</p>"
    return f"<section><h2>Skipped steps</h2>{told}{table(rows, head)}</section>"


def _results(story: Story) -> str:
    """What `erniekit eval` found."""
    rows = []
    for key, value in story.results.items():
        inner = value if isinstance(value, dict) else {"": value}
        for name, number in inner.items():
            numbers = number if isinstance(number, dict) else {"": number}
            for metric, found in numbers.items():
                words = " ".join(w for w in (key, name, metric) if w).replace("_", " ")
                rows.append((words, exact(found) if isinstance(found, float) else found))
    return f"<section><h2>Evaluation</h2>{table(rows)}</section>" if rows else ""


def _data(story: Story) -> str:
    parts = []
    for split, found in story.about.get("data", {}).items():
        rows = [(f["path"], f["format"], f"{f['records']:,} records") for f in found["files"]]
        met = [f"{n:,} {what}" for what, n in (found.get("cut") or {}).items() if n]
        met += [f"{n:,} left out: {why}" for why, n in (found.get("left_out") or {}).items()]
        told = "".join(f"<li>{text(line)}</li>" for line in met)
        name = {"train": "Training", "eval": "Evaluation"}.get(split, split)
        again = "<small>Met while reading, counted again in every pass:</small>" if told else ""
        parts.append(f"<h3>{text(name)}</h3>{table(rows)}{again}<ul>{told}</ul>")
    return f"<section><h2>Data</h2>{''.join(parts)}</section>" if parts else ""


def _settings(story: Story) -> str:
    changed = story.changed
    if not story.settings:
        return ""
    rest = [(k, v) for k, v in story.settings.items() if k not in changed]
    return (
        f"<section><h2>Settings</h2>{table(changed.items())}"
        f"<details><summary>{len(rest)} at their defaults</summary>{table(rest)}</details>"
        "</section>"
    )


def _starts(story: Story) -> str:
    """Each start: the command, and what it ran on where that differs from the start before."""
    parts, before = [], None
    for start in story.about.get("starts", []):
        ran_on = {**start.get("versions", {}), **start.get("machine", {})}
        rows = ran_on.items() if ran_on != before else ()
        before = ran_on
        folder, command = text(start.get("folder", ".")), text(start["command"])
        parts.append(
            f"<h3>{text(start['time'])}, after step {text(start['step'])}</h3>"
            f"<pre>cd {folder}\n{command}</pre>{table(rows)}"
        )
    return f"<section><h2>How it was run</h2>{''.join(parts)}</section>" if parts else ""
