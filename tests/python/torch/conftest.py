from __future__ import annotations

import os

import pytest
import torch

from unswag import _core


@pytest.fixture(autouse=True)
def _one_thread():
    """Small tensors, several test processes: one thread each, unless tools/isa_matrix.sh asks for more."""
    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("UNSWAG_TEST_THREADS", "1")))
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=_core.backend_names())
def backend(request):
    """The test runs once through every row of kernels that this processor has."""
    if not _core.backend_runs_here(request.param):
        pytest.skip(f"this processor lacks {request.param}")
    _core.use_backend(request.param)
    yield request.param
    _core.use_backend("")
