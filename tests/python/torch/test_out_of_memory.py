"""Out-of-memory errors of a patched model: the same error, with where, what and what next."""

from __future__ import annotations

import pytest
import torch
from small_models import batch, tiny_llama

from unswag import Policy, apply_unswag_surgery
from unswag.torch.out_of_memory import explain

CPU = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."


class Fails(torch.nn.Module):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, *args, **kwargs):
        raise self.error


@pytest.mark.parametrize(
    ("kind", "said", "memory"),
    [
        (RuntimeError, CPU, "memory of this process"),
        (torch.OutOfMemoryError, "CUDA out of memory.", "memory of the device"),
    ],
)
def test_it_says_which_memory_where_what_and_what_next(kind, said, memory):
    error = kind(said)
    model = tiny_llama(layers=3)
    apply_unswag_surgery(model, verbose=False)
    model.model.layers[1].self_attn.forward = Fails(error).forward
    with pytest.raises(kind) as raised:
        model(**batch())
    text = str(raised.value)
    assert raised.value is error and text.count("UnSwag:") == 1
    for words in (memory, "ran out in the forward of model.layers.1.self_attn", "activation_checkpointing_enable"):
        assert words in text, words


def test_what_is_alive_is_told_with_module_and_role():
    model = tiny_llama(layers=3)
    apply_unswag_surgery(model, verbose=False)
    error = RuntimeError(CPU)
    explain(model, Policy.named("exact"), error, (), batch(tokens=512))
    assert str(error).count(" of model.") >= 3 and "mlp of model.layers" in str(error)


def test_other_errors_are_as_they_were():
    model = tiny_llama()
    apply_unswag_surgery(model, verbose=False)
    model.lm_head.forward = Fails(RuntimeError("something else")).forward
    with pytest.raises(RuntimeError, match=r"^something else$"):
        model(**batch())
