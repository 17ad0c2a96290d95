"""Answers drawn by a running server with the policy's weights are those of our own generator."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import pytest
import torch

import ernie
from ernie.rollout import Sampling
from erniekit.config import run_from
from erniekit.samplers import Own, Served
from tests.helpers_server import start_server, stop_server
from tests.helpers_tokenizer import random_model_folder

GREEDY = Sampling(max_tokens=12, temperature=0.0)
PROMPTS = [[5, 6, 7, 8], [9, 10, 11]]
SEEDS = [[1, 2], [3]]


@pytest.mark.timeout(240)
def test_a_server_answers_with_the_weights_it_was_given_last(tmp_path: Path) -> None:
    folder = random_model_folder(tmp_path / "model")
    server = start_server(folder, "--enable-logprob", "--enable-control-api")
    try:
        run = run_from(
            {
                "stage": "UPO",
                "fine_tuning": "Full",
                "model_name_or_path": str(folder),
                "output_dir": str(tmp_path / "out"),
                "rollout_server": server.url,
            }
        )
        # What a server is given is bfloat16, so that is what the policy's numbers are here.
        model = ernie.load(folder, dtype=torch.bfloat16).float()
        own, served = Own(run, "cpu"), Served(run, "cpu")
        seen = []
        for round_number in range(2):
            expected = own(model, PROMPTS, SEEDS, GREEDY)
            found = served(model, PROMPTS, SEEDS, GREEDY)
            answers = list(chain.from_iterable(found))
            for ours, theirs in zip(chain.from_iterable(expected), answers, strict=True):
                assert theirs.token_ids == ours.token_ids, round_number
                assert theirs.is_cut == ours.is_cut
                torch.testing.assert_close(theirs.log_probs, ours.log_probs, atol=1e-4, rtol=0)
            seen.append([answer.token_ids for answer in answers])
            _move(model)
        assert seen[0] != seen[1], "other weights give the same answers: the test shows nothing"
    finally:
        assert stop_server(server) == 0


@torch.no_grad()
def _move(model: ernie.ErnieModel) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            noise = torch.empty(parameter.shape).normal_(0, 0.1, generator=generator)
            parameter.copy_((parameter + noise).bfloat16().float())
