"""A prompt as one vector: its hidden states after the final norm, averaged or the last one.

Such a request (`SamplingParams.pooling`) is scheduled like any other, in chunks and beside texts
that are generated; it only chooses no token. A mean needs the states of every position, so its
prompt is never taken from the prefix cache (see `Scheduler._admit`).

Legend: T tokens of the flat batch, t tokens of one part, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdeploy.engine.request import Request
from fastdeploy.engine.runner import Runner
from fastdeploy.engine.scheduler import ScheduledRequest


class Pooler:
    def __init__(self, runner: Runner) -> None:
        self.runner = runner

    @torch.inference_mode()
    def __call__(self, parts: Sequence[ScheduledRequest]) -> list[tuple[Request, list[float]]]:
        """Take the states of the step that has just run; the vectors `(D,)`, float32, of the
        requests whose prompt ends in it.
        """
        finished, first = [], 0
        for part in parts:
            rows = slice(first, first + part.num_tokens)
            first += part.num_tokens
            if part.request.params.pooling is None:
                continue
            ends = part.start + part.num_tokens == part.request.num_prompt
            if part.request.params.pooling == "mean":
                vector_D = self._mean(part, rows)
            elif ends:
                vector_D = self._states(slice(rows.stop - 1, rows.stop))[0]
            if ends:
                finished.append((part.request, vector_D.tolist()))
        return finished

    def _mean(self, part: ScheduledRequest, rows: slice) -> Tensor:
        """The sum over the prompt so far, divided by its length."""
        request = part.request
        sum_D = self._states(rows).sum(0)
        # A request that was preempted starts at position 0 again, and so does its sum.
        request.pooled_sum = sum_D if part.start == 0 else request.pooled_sum + sum_D
        return request.pooled_sum / request.num_prompt

    def _states(self, rows: slice) -> Tensor:
        """Normed hidden states `(t, D)` in float32: sums of thousands would drift in less."""
        assert self.runner.hidden_TD is not None, "a step goes before"
        return self.runner.model.model.norm(self.runner.hidden_TD[rows]).float()
