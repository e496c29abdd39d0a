"""The benches' own counter of live bytes, their text, and the table and picture of the demo."""

import json

import pytest
import torch
from bench.docstrings import documented
from bench.live import LiveStorages
from examples.demo import report
from examples.demo.train import Run
from tests.python.torch.small_models import batch, tiny_llama

from unswag.torch.audit import LiveStorages as Audited


class Hoarding(torch.autograd.Function):
    """Keeps a copy where no saved-tensor hook sees it."""

    @staticmethod
    def forward(ctx, x):
        ctx.hidden = x + 1
        return x * 2

    @staticmethod
    def backward(ctx, dy):
        return dy * 2


def test_counts_what_hides_on_a_context_and_forgets_what_dies():
    model, data = tiny_llama(), batch()
    with LiveStorages(model, list(data.values())) as live:
        x = torch.ones(1000, requires_grad=True) * 1
        assert live.bytes == 4000 + 4000  # the leaf and the product
        y = Hoarding.apply(x)
        assert live.bytes == 4 * 4000  # and y, and the copy
        del y
        assert live.bytes == 2 * 4000
        assert live.peak == 4 * 4000


@pytest.mark.parametrize("checkpointing", [False, True])
def test_agrees_with_the_audit(checkpointing):
    model, data = tiny_llama(layers=4), batch(64)
    if checkpointing:
        model.gradient_checkpointing_enable()
    counts = []
    for kind in (LiveStorages, Audited):
        model.zero_grad()
        with kind(model, list(data.values())) as live:
            forward = live.forward if kind is LiveStorages else lambda run: run()
            loss = forward(lambda: model(**data).loss)
            counts.append(live.bytes if kind is LiveStorages else live.bytes())
            loss.backward()
            if kind is LiveStorages:
                curve = live.backward_curve
        del loss
    assert counts[0] == counts[1] > 0
    assert len(curve) == 4 and curve == sorted(curve, reverse=True)  # layer by layer


def test_the_loss_is_no_part_of_the_peak():
    model, data = tiny_llama(layers=1), batch(64)
    with LiveStorages(model, list(data.values())) as live:
        live.forward(lambda: model(**data).loss).backward()
        without = live.peak
    with LiveStorages(model, list(data.values())) as live:
        model(**data).loss.backward()  # not told that this is the forward: the loss counts
    assert live.peak > without


def test_docstrings_are_many_and_always_the_same():
    found = list(documented())
    assert len(found) > 2000 and found == list(documented())
    dumps = next(item for item in found if item.name == "json.dumps")
    assert dumps.signature.startswith("json.dumps(obj, ") and "Serialize" in dumps.text


def result(side, losses):
    run = Run(side, "lora", True, rows=2, tokens=512, epochs=len(losses) // 2)
    return {
        **run.__dict__, "way": run.way, "idle_bytes": 600 << 20, "peak_bytes": (900 if side == "stock" else 700) << 20,
        "saved_bytes_per_token": 1000.0, "ledger_bytes_per_token": 1000.0, "seconds_per_step": 2.0, "losses": losses,
        "step_ends": [2.0 * i for i in range(len(losses))], "memory": [(0.0, 600 << 20), (1.0, 700 << 20)],
    }  # fmt: skip


def test_demo_writes_table_and_picture(tmp_path, capsys):
    stock, ours = [3.0, 2.5, 2.0, 1.5, 1.2, 1.0], [3.0, 2.5, 2.0, 1.5, 1.2, 1.25]
    settings = {"rows": 2, "tokens": 512, "epochs": 3, "dtype": "float32"}
    report.write(tmp_path, settings, [result("stock", stock), result("unswag", ours)])
    (way,) = json.loads((tmp_path / "table.json").read_text())["ways"]
    assert way["largest_loss_difference"] == 0.25
    assert (way["stock"]["loss_at_start"], way["unswag"]["loss_at_end"]) == (2.75, 1.225)
    assert (way["stock"]["peak_mib"], way["unswag"]["peak_above_idle_mib"]) == (900, 100)
    assert "LoRA, checkpointing" in (tmp_path / "table.txt").read_text() and "unswag" in capsys.readouterr().out
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["picture.png", "table.json", "table.txt"]
