"""Preference steps against transformers and plain torch, each answer a sequence of its own."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

import ernie
from ernie.chat import UNTRAINED
from ernie.model import ErnieModel
from ernie.models import TINY
from erniekit.config import Optimisation, Training
from erniekit.config.methods import LOSS_TYPES
from erniekit.data.batch import batch_of
from erniekit.data.pack import Cursor
from erniekit.data.preference import PairSample
from erniekit.device_batch import Pairs
from erniekit.gradients import Gradients, SummedEmbedding
from erniekit.loop import Parts, Progress, train
from erniekit.lora import LoRA, add_lora
from erniekit.optim import OPTIMIZERS, treatments
from erniekit.preference import ChunkedLogProbs, answer_lengths, preference, sequence_log_probs
from erniekit.preference_losses import FORMULAS, Objective, gains, odds_ratio
from tests.helpers import hf_dense, hf_moe, saved, some_ids

# Tokens of prompt, chosen and rejected answer of each pair.
SIZES = ((7, 5, 3), (1, 2, 9), (12, 1, 1), (4, 130, 6))


def sequences() -> list[tuple[list[int], ...]]:
    """Without id 0, whose embedding transformers takes to be padding and never trains."""
    return [
        tuple([1 + t for t in some_ids(n, 198, seed=10 * i + j)] for j, n in enumerate(sizes))
        for i, sizes in enumerate(SIZES)
    ]


def row(pairs: list) -> Pairs:
    """One row: all of the prompt but its last token, which both answers begin with."""
    ids, labels, positions, bounds = [], [], [], []
    for prompt, chosen, rejected in pairs:
        start, shared = len(ids), len(prompt) - 1
        ids += prompt[:-1]
        labels += [UNTRAINED] * shared
        positions += range(shared)
        bound = [start, len(ids)]
        for answer in (chosen, rejected):
            ids += [prompt[-1], *answer[:-1]]
            labels += answer
            positions += range(shared, shared + len(answer))
            bound.append(len(ids))
        bounds.append(bound)
    return Pairs(*(torch.tensor(values) for values in (ids, labels, positions, bounds)))


def plain_log_probs(model, pairs: list) -> torch.Tensor:
    """(P, 2) by transformers, one sequence at a time."""
    values = []
    for prompt, *answers in pairs:
        for answer in answers:
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            values.append(
                logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None]).double().sum()
            )
    return torch.stack(values).view(-1, 2)


def lengths_of(pairs: list) -> torch.Tensor:
    return torch.tensor([[len(chosen), len(rejected)] for _, chosen, rejected in pairs]).double()


def plain_loss(model, pairs: list, reference_P2: torch.Tensor, o: Objective) -> torch.Tensor:
    """Mean over the pairs, from the formulas of the papers, in probabilities where they have them.

    pc, pr: of the policy for chosen and rejected answers; rc, rr: of the reference.
    """
    policy_P2, lengths_P2 = plain_log_probs(model, pairs), lengths_of(pairs)
    if o.method in ("simpo", "or", "orpo"):
        reference_P2 = torch.zeros_like(reference_P2)
    factor_P2 = torch.ones_like(lengths_P2)
    if o.method in ("ipo", "simpo", "or", "orpo"):
        factor_P2 = 1 / lengths_P2
    elif o.normalises_lengths:
        factor_P2 = (lengths_P2[:, :1] + lengths_P2[:, 1:]) / 2 / lengths_P2
    (pc, pr), (rc, rr) = (policy_P2 * factor_P2).T, (reference_P2 * factor_P2).T
    probability = torch.sigmoid(o.beta * ((pc - pr) - (rc - rr)))
    e = o.label_smoothing
    if o.method == "sigmoid":
        losses = -(1 - e) * probability.log() - e * (1 - probability).log()
    elif o.method == "robust":
        losses = (-(1 - e) * probability.log() + e * (1 - probability).log()) / (1 - 2 * e)
    elif o.method == "hinge":
        losses = torch.clamp(1 - o.beta * (pc - rc) + o.beta * (pr - rr), min=0)
    elif o.method == "ipo":
        losses = (pc - rc - (pr - rr) - 1 / (2 * o.beta)) ** 2
    elif o.method == "simpo":
        wins = torch.sigmoid(o.beta * pc - o.beta * pr - o.simpo_gamma)
        losses = -(1 - e) * wins.log() - e * (1 - wins).log()
    elif o.method == "dpop":
        penalty = o.dpop_lambda * torch.clamp(rc - pc, min=0)
        losses = -torch.sigmoid(o.beta * (pc - rc - pr + rr - penalty)).log()
    elif o.method == "sppo_hard":
        losses = (pc - rc - 0.5 / o.beta) ** 2 + (pr - rr + 0.5 / o.beta) ** 2
    elif o.method == "nca_pair":
        c, r = o.beta * (pc - rc), o.beta * (pr - rr)
        terms = (torch.sigmoid(c), torch.sigmoid(-c).sqrt(), torch.sigmoid(-r).sqrt())
        losses = -sum(term.log() for term in terms)
    elif o.method == "kto_pair":
        above_c = (pc - rc).mean().clamp(min=0).detach()
        above_r = (pr - rr).mean().clamp(min=0).detach()
        losses = 1 - torch.cat(
            [
                torch.sigmoid(o.beta * (pc - rc - above_r)),
                torch.sigmoid(o.beta * (above_c - pr + rr)),
            ]
        )
    else:  # the odds of an answer by the mean probability of its tokens
        odds_c, odds_r = (p.exp() / (1 - p.exp()) for p in (pc, pr))
        losses = -torch.sigmoid((odds_c / odds_r).log()).log()
    supervised = -policy_P2[:, 0].sum() / lengths_P2[:, 0].sum()
    return o.preference_weight * losses.mean() + o.sft_weight * supervised


OBJECTIVES = {
    "sigmoid": Objective(),
    "sigmoid, smoothed": Objective(beta=0.3, label_smoothing=0.1),
    "sigmoid, normalised": Objective(beta=0.3, normalises_lengths=True),
    "sigmoid and SFT": Objective(preference_weight=0.7, sft_weight=0.4, normalises_lengths=True),
    "robust": Objective("robust", beta=0.3, label_smoothing=0.2),
    "hinge": Objective("hinge", beta=0.03),
    "ipo": Objective("ipo", beta=0.2),
    "simpo": Objective("simpo", beta=2.0, simpo_gamma=1.2, label_smoothing=0.1),
    "dpop": Objective("dpop", dpop_lambda=5.0, normalises_lengths=True),
    "sppo_hard": Objective("sppo_hard", normalises_lengths=True),
    "nca_pair": Objective("nca_pair"),
    "or": Objective("or", sft_weight=0.5),
    "orpo": Objective("orpo", preference_weight=0.3, sft_weight=1.0),
    "kto_pair": Objective("kto_pair", normalises_lengths=True),
}


def step_facts(model, batches: list[Pairs], references: list, o: Objective) -> dict:
    """What the recipe measures of a step before the loss."""
    found: dict = {}
    if o.sft_weight:
        found["sft_scale"] = 1 / sum(int(answer_lengths(b)[:, 0].sum()) for b in batches)
    if o.row.uses_baselines:
        with torch.no_grad():
            gained = [
                gains(sequence_log_probs(model, b), r, answer_lengths(b), o)
                for b, r in zip(batches, references)
            ]
        found["baseline_2"] = torch.cat(gained).mean(0).clamp(min=0)
    return found


def agree(theirs, ours, wanted: torch.Tensor, found: torch.Tensor) -> None:
    """Values, and gradients of every parameter that their model has."""
    difference = float((found - wanted).detach()) / float(wanted.detach())
    assert abs(difference) < 1e-5, difference
    gradients = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    expected = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected.keys()
    for name, want in expected.items():
        gap = (gradients[name] - want) / want.abs().max().clamp(min=1e-12)
        worst, bias = gap.abs().max().item(), gap.mean().item()
        assert worst < 1e-4, f"{name} is off by {worst:.2e}, relative to its largest value"
        assert abs(bias) < 1e-5, f"{name} is biased by {bias:.2e}"


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("make", [hf_dense, hf_moe])
def test_loss_and_gradients_equal_plain_ones_on_separate_sequences(
    make, name: str, tmp_path
) -> None:
    theirs, objective = make(), OBJECTIVES[name]
    ours = ernie.load(saved(theirs, tmp_path), dtype=torch.float32)
    pairs = sequences()
    # Gains of both signs: no term of any loss is all zero.
    reference_P2 = plain_log_probs(theirs, pairs).detach() + torch.linspace(-4, 4, 8).view(4, 2)
    reference_P2[:, 1] += torch.tensor([3.0, -6.0, 3.0, -6.0])
    wanted = plain_loss(theirs, pairs, reference_P2, objective)
    wanted.backward()
    if not objective.row.uses_reference:
        reference_P2 = torch.zeros_like(reference_P2)
    batch = row(pairs)
    measured = step_facts(ours, [batch], [reference_P2], objective)
    options = {"objective": objective, **measured}
    found = preference(ours, batch, reference_P2, scale=1 / 4, **options)
    found.total.backward()
    agree(theirs, ours, wanted, found.value)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_in_two_batches_is_the_step_in_one(name: str, tmp_path) -> None:
    model, objective = (
        ernie.load(saved(hf_dense(), tmp_path), dtype=torch.float32),
        OBJECTIVES[name],
    )
    pairs = sequences()
    with torch.no_grad():
        reference_P2 = sequence_log_probs(model, row(pairs)) + torch.linspace(-4, 4, 8).view(4, 2)
    sums = []
    for cut in ([0, 4], [0, 1, 4]):
        slices = [slice(a, b) for a, b in pairwise(cut)]
        batches, references = [row(pairs[s]) for s in slices], [reference_P2[s] for s in slices]
        measured = step_facts(model, batches, references, objective)
        model.zero_grad()
        values = []
        for batch, known in zip(batches, references):
            loss = preference(model, batch, known, scale=1 / 4, objective=objective, **measured)
            loss.total.backward()
            values.append(float(loss.value))
        sums.append((sum(values), {n: p.grad.clone() for n, p in model.named_parameters()}))
    (one, grads), (two, others) = sums
    assert two == pytest.approx(one, rel=1e-5)
    for key, want in grads.items():
        worst = float((others[key] - want).abs().max() / want.abs().max().clamp(min=1e-12))
        assert worst < 1e-4, f"{key} is off by {worst:.2e}"


def test_every_published_loss_is_compared() -> None:
    assert FORMULAS.keys() == LOSS_TYPES.keys()
    assert {o.method for o in OBJECTIVES.values()} == LOSS_TYPES.keys()


def test_an_answer_that_is_certain_has_finite_odds() -> None:
    gain_P2 = torch.tensor([[0.0, -1.0], [-1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    odds_ratio(gain_P2, Objective("or")).sum().backward()
    assert bool(gain_P2.grad.isfinite().all())  # type: ignore[union-attr]


def test_rewards_are_means_over_pairs_and_a_tie_counts_half(tmp_path) -> None:
    model = ernie.load(saved(hf_dense(), tmp_path), dtype=torch.float32)
    pairs = sequences()
    gains_P2 = torch.tensor([[3.0, 1.0], [1.0, 2.0], [0.5, 0.5], [2.0, -4.0]], dtype=torch.float64)
    with torch.no_grad():
        reference_P2 = sequence_log_probs(model, row(pairs)) - gains_P2
        parts = preference(model, row(pairs), reference_P2, scale=1 / 4).parts
    means = {"chosen": 6.5, "rejected": -0.5, "margin": 7.0}
    expected = {f"rewards_{name}": 0.1 * total / 4 for name, total in means.items()}
    expected["rewards_accuracy"] = 2.5 / 4
    assert {name: float(value) for name, value in parts.items()} == pytest.approx(expected)


@pytest.mark.parametrize("trained", ["head", "frozen head", "head into a sum"])
def test_chunked_log_probs_equal_autograd(trained: str) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(23, 16, requires_grad=True), torch.randn(50, 16)
    weight.requires_grad_(trained != "frozen head")
    targets, upstream = torch.randint(50, (23,)), torch.randn(23)
    plain = (hidden @ weight.T).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    inputs = (hidden, weight) if weight.requires_grad else (hidden,)
    wanted = torch.autograd.grad(plain, inputs, upstream)
    for chunk_size in (1, 7, 100):
        into = torch.ones(50, 16) if trained == "head into a sum" else None
        values = ChunkedLogProbs.apply(hidden, weight, targets, chunk_size, into)
        torch.testing.assert_close(values, plain, atol=1e-5, rtol=1e-5)
        if into is None:
            found = torch.autograd.grad(values, inputs, upstream)
        else:
            found = (*torch.autograd.grad(values, hidden, upstream), into - 1)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_a_row_of_pairs_equals_rows_of_one_pair(tmp_path) -> None:
    model = ernie.load(saved(hf_dense(), tmp_path), dtype=torch.float32)
    together = sequence_log_probs(model, row(sequences()))
    alone = torch.cat([sequence_log_probs(model, row([pair])) for pair in sequences()])
    assert float((together - alone).detach().abs().max()) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("make", [hf_dense, hf_moe])
def test_the_reference_of_lora_is_the_model_before_adapters(make, tmp_path) -> None:
    model = ernie.load(saved(make(), tmp_path), dtype=torch.float32)
    batch = row(sequences())
    before = sequence_log_probs(model, batch)
    add_lora(model, LoRA(rank=2, alpha=4), seed=1)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.fill_(0.05)
    changed = sequence_log_probs(model, batch)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.fill_(0.0)
    assert float((sequence_log_probs(model, batch) - before).abs().max()) == 0.0
    assert float((changed - before).abs().max()) > 1e-3


# --- whole steps of the loop ---


def samples() -> list[PairSample]:
    """The pairs above as the loader has them."""
    made = []
    for pair in sequences() * 2:
        r = row([pair])
        (_, chosen, rejected, _) = r.pairs_P4[0].tolist()
        columns = (r.token_ids_T.tolist(), r.labels_T.tolist())
        made.append(PairSample(*columns, chosen=chosen, rejected=rejected))
    return made


def trained(name: str, windows: list[list[PairSample]], per_step: int, **o) -> dict:
    """Weights and losses after 3 steps of the real loop over batches of the given pairs."""
    model = ErnieModel(TINY[name], dtype=torch.float32)
    model.init_weights(seed=2)
    if o.pop("lora", False):
        add_lora(model, LoRA(rank=2, alpha=4), seed=1)
    o = Optimisation(learning_rate=1e-2, lr_scheduler_type="constant", adam_epsilon=1e-3, **o)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    gradients = Gradients(parameters, torch.float32)
    if model.model.embed_tokens.weight.requires_grad:
        model.model.embed_tokens = SummedEmbedding(model.model.embed_tokens, gradients)
    rules = treatments(parameters, o, num_layers=model.config.num_hidden_layers)
    optimizer = OPTIMIZERS[o.optim](parameters, rules, o, seed=3)
    batches = [batch_of([rows], Cursor()) for rows in windows]
    reference = {sample.key: (-9.0 * i, -50.0) for i, sample in enumerate(samples())}

    def loss(model, batch, **options):
        reference_P2 = torch.tensor([reference[key] for key in batch.keys], dtype=torch.float64)
        return preference(model, batch, reference_P2, gradients=gradients, **options)

    parts = Parts(model, loss, optimizer, gradients, o, 3, per_step, 1, Training())
    records: list[dict] = []
    train(parts, iter(batches), Progress(), lambda record: bool(records.append(record)))
    told = {key: [r[key] for r in records] for key in ("loss", "rewards_margin", "num_pairs")}
    return {n: p.detach().clone() for n, p in parameters.items()} | {
        key: torch.tensor(values) for key, values in told.items()
    }


@pytest.mark.parametrize("lora", [False, True], ids=["Full", "LoRA"])
@pytest.mark.parametrize("name", ["tiny-dense", "tiny-moe"])
def test_one_batch_of_eight_equals_eight_batches_of_one(name: str, lora: bool) -> None:
    rows = samples()
    at_once = trained(name, [rows] * 3, 1, lora=lora)
    in_eight = trained(name, [[sample] for sample in rows] * 3, 8, lora=lora)
    assert at_once["num_pairs"].tolist() == in_eight["num_pairs"].tolist() == [8, 8, 8]
    assert at_once["loss"][2] < at_once["loss"][0]
    for key, value in at_once.items():
        worst = ((in_eight[key] - value).abs().max() / value.abs().max().clamp(min=1e-12)).item()
        assert worst < 1e-4, f"{key} is off by {worst:.2e}, relative to its largest value"


def test_updating_within_backward_changes_nothing() -> None:
    rows = [samples()] * 3
    usual = trained("tiny-moe", rows, 1, max_grad_norm=0.0)
    within = trained("tiny-moe", rows, 1, max_grad_norm=0.0, optimizer_in_backward=True)
    for key, value in usual.items():
        assert torch.equal(within[key], value), f"{key} differs"
