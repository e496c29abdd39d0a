import gc

import pytest
import torch
from small_models import made
from tests.python.torch.stash.small_programs import HEADS, W, X

from unswag.torch import stash
from unswag.torch.stash import hooks, thread


@pytest.fixture(autouse=True)
def no_help_from_gc():
    """Nothing may wait for the garbage collector, depend on which tests ran before, or leave a stash entered."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    hooks.warned.clear()
    made.clear()
    for t in (X, W, *HEADS):
        t.grad = None
    gc.disable()
    yield
    gc.enable()
    assert thread.idle()
    assert stash.top_hooks() is None
