"""A training loop of one's own with Accelerate: prepare, accumulate, mixed precision, unwrap."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from tests.python.torch.stacks.training import BF16, FP32, Doors, Recording, assert_same, collate, operate, rows, tiny_llama
from torch.utils.data import DataLoader

import unswag


@pytest.fixture(autouse=True)
def _fresh_state():
    """Accelerate keeps the precision of the first Accelerator for all others of the process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def train(when=None, precision="no", checkpointing=False):
    """Three steps of two batches each; surgery before or after `prepare`, or none. Returns the unwrapped model, too."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision=precision)
    model = tiny_llama()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    recording = Recording(model)
    if when == "before":
        operate(model)
    loader = DataLoader(rows(), batch_size=2, collate_fn=collate)
    with recording:
        model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0), loader)
        if when == "after":
            operate(model)
        losses = []
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
    return recording.run(model, losses), accelerator.unwrap_model(model, keep_fp32_wrapper=False)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("precision, tolerance", [("no", FP32), ("bf16", BF16)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_accelerate(precision, tolerance, checkpointing, when, monkeypatch):
    stock, _ = train(precision=precision, checkpointing=checkpointing)
    doors = Doors(monkeypatch.setattr)
    ours, _ = train(when, precision, checkpointing)
    assert_same(ours, stock, tolerance)
    assert doors.again > 0


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_an_unwrapped_model_can_be_taken_back(precision):
    _, model = train("before", precision)
    unswag.remove_unswag_surgery(model)
    assert not any("_unswag" in vars(m) for m in model.modules())
