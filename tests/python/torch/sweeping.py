"""Models whose layers are swept, for the tests of torch/checkpoint."""

import torch
from families import build, ids, redraw

from unswag import apply_unswag_surgery
from unswag.torch.operation import SWEEP

TILE = 32


def batch(tokens=70, rows=2):
    return {"input_ids": ids(rows, tokens), "labels": ids(rows, tokens), "use_cache": False}


def checkpointed(family="llama", dtype=torch.float64, reentrant=False, **settings):
    model = build(family, dtype, **settings)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model


def with_lora(model, **settings):
    from peft import LoraConfig, get_peft_model

    dtype = model.dtype
    model = redraw(get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", **settings)))
    return model.to(dtype)


def swept(model, sweep=TILE, **options):
    return apply_unswag_surgery(model, sweep=sweep, verbose=False, **{"loss": "stock"} | options)


def plan(model):
    return vars(model)[SWEEP]


def assert_close(ours, stock, tolerance=2e-6):
    assert ours[1].keys() == stock[1].keys()
    assert abs(ours[0] - stock[0]) <= tolerance * abs(stock[0])
    largest = max(g.double().norm() for g in stock[1].values())
    for name, g in stock[1].items():
        apart = (ours[1][name].double() - g.double()).norm() / g.double().norm().clamp_min(1e-4 * largest)
        assert apart <= tolerance, f"{name}: {apart:.1e}"
