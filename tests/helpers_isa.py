"""The instruction sets of this machine, each of which the kernels' tests run on."""

from __future__ import annotations

from ernie.kernels import dispatch
from ernie.kernels.cpu import build


def isas_found() -> list[str]:
    names = list(build.ISA_FLAGS)
    return names[: names.index(build.isa()) + 1]


def forget() -> None:
    """Forget the choices that are made once per process."""
    for cached in (build.isa, build.loaded_library, dispatch._chosen, dispatch._modules):
        cached.cache_clear()
