"""Can one tenant learn, from the prefix cache or from its timing, what another one has asked?

python benchmarks/faults/tenants.py [--probes 500]

Tenant A warms a prompt. Tenant B then times that prompt and one that nobody has sent: if the two
sets of times can be told apart (area under the ROC curve above one half), the cache leaks. A itself
must hit, or the test would prove nothing.
"""

from __future__ import annotations

import random
import tempfile
import time
from pathlib import Path

import httpx
import rig
from servers import serving

LENGTH = 512


def _ask(http: httpx.Client, key: str, prompt: list[int]) -> tuple[float, int]:
    """Seconds to the whole answer of one token, and prompt tokens that were cached."""
    body = {"prompt": prompt, "max_tokens": 1, "temperature": 0}
    began = time.perf_counter()
    answer = http.post("/v1/completions", json=body, headers={"authorization": f"Bearer {key}"})
    seconds = time.perf_counter() - began
    return seconds, answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


def _area(above: list[float], below: list[float]) -> float:
    """The chance that one of `above` is more than one of `below`, and no less than one half."""
    wins = sum((a > b) + (a == b) / 2 for a in above for b in below) / (len(above) * len(below))
    return max(wins, 1 - wins)


def run(probes: int) -> list[rig.Claim]:
    numbers = random.Random(5)
    warm_s, cold_s, own_s, foreign_hits, own_misses = [], [], [], 0, 0
    with tempfile.TemporaryDirectory() as folder:
        model = rig.tiny_model(Path(folder) / "tiny")
        flags = (*rig.FLAGS, "--api-key", "tenant-a", "--api-key", "tenant-b")
        with serving(model, *flags) as server:
            url = f"http://{server.host}:{server.port}"
            with httpx.Client(base_url=url, timeout=60) as http:
                for _ in range(probes):
                    warmed, fresh = ([numbers.randrange(256) for _ in range(LENGTH)] for _ in "ab")
                    _ask(http, "tenant-a", warmed)
                    pair = [(warmed, warm_s), (fresh, cold_s)]
                    numbers.shuffle(pair)
                    for prompt, times in pair:
                        seconds, cached = _ask(http, "tenant-b", prompt)
                        times.append(seconds)
                        foreign_hits += cached > 0
                    seconds, cached = _ask(http, "tenant-a", warmed)
                    own_s.append(seconds)
                    own_misses += cached == 0
    print(f"a hit of its own is told from a miss with an area of {_area(cold_s, own_s):.3f}")
    return [
        rig.Claim("hits of another tenant's text", foreign_hits, 0),
        rig.Claim("misses of the tenant's own text", own_misses, 0),
        rig.Claim("area under the ROC curve of another's times", _area(cold_s, warm_s), 0.55),
    ]


if __name__ == "__main__":
    raise SystemExit(rig.script("tenants", __doc__, {"probes": 500}, run))
