"""Where Triton's kernels run: on a GPU, or in Triton's interpreter."""

import importlib.util
import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"


def needs_triton() -> pytest.MarkDecorator:
    """Skips where Triton is not installed, or has neither a GPU nor been told to interpret."""
    reason = "" if importlib.util.find_spec("triton") else "triton is not installed"
    if not HAS_GPU and os.environ.get("TRITON_INTERPRET") != "1":
        reason = reason or "no GPU, and TRITON_INTERPRET=1 is not set"
    return pytest.mark.skipif(bool(reason), reason=reason)
