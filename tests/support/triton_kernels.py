"""Where Triton's kernels run: on a GPU, or in Triton's interpreter, chosen before Triton is imported."""

import importlib.util
import os

import numpy as np
import pytest
import torch

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"


def needs_triton() -> pytest.MarkDecorator:
    """Skips where Triton is not installed or cannot interpret, which on a CPU it is told to do."""
    reason = "" if importlib.util.find_spec("triton") else "triton is not installed"
    if not HAS_GPU:
        os.environ["TRITON_INTERPRET"] = "1"
        if np.lib.NumpyVersion(np.__version__) >= "2.4.0":  # which refuses int() of arrays of one number
            reason = reason or "no GPU, and Triton's interpreter (3.6) does not work with numpy 2.4"
    return pytest.mark.skipif(bool(reason), reason=reason)
