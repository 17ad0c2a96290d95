"""What must stand before any test module is imported."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    # Read by Triton when it is imported, which other packages do too: kernels run interpreted.
    os.environ["TRITON_INTERPRET"] = "1"
