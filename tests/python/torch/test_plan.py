"""The planner: few layers stand for all, a step without data is the real one, the longest context is the longest that fits."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest
import torch
from small_models import tiny_llama

import unswag
from unswag import apply_unswag_surgery, sizes
from unswag.plans import MEMORIES, Plan
from unswag.torch.blueprint import blueprint
from unswag.torch.forecast import Forecast
from unswag.torch.plan import STEP
from unswag.torch.planned_step import planned_step
from unswag.torch.timeline import Timeline
from unswag.torch.ways import WAYS, checkpoint_layers, prepared

CONFIG = dict(model_type="llama", hidden_size=64, intermediate_size=176, num_hidden_layers=7, num_attention_heads=4,
              num_key_value_heads=2, vocab_size=1000)  # fmt: skip
KEEP, CHECKPOINT, DISK = (next(w for w in WAYS if w.name == n) for n in ("keep", "checkpointing", "checkpoints on disk"))


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("way", [KEEP, CHECKPOINT], ids=lambda way: way.name)
def test_few_layers_stand_for_all_to_the_byte(way):
    model = tiny_llama(layers=9, dtype=torch.bfloat16)
    steps = []
    for whole in (True, False):
        made = blueprint(model, whole=whole)
        prepared(made.model, way, None)
        steps.append(planned_step(made, 96))
        assert made.bytes_of_weights() == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert len(made.model.model.layers) == 4 and len(model.model.layers) == 9
    assert steps[0].peak == steps[1].peak and steps[0].at_end == steps[1].at_end
    assert steps[0].stored.max() == steps[1].stored.max()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_without_data_holds_what_a_real_one_holds(checkpointing):
    model = tiny_llama(layers=3, dtype=torch.bfloat16)
    made = blueprint(model)
    prepared(made.model, CHECKPOINT if checkpointing else KEEP, None)
    predicted = planned_step(made, 128).peak
    apply_unswag_surgery(model, verbose=False)
    checkpoint_layers(model, checkpointing)
    ids = torch.randint(0, 97, (1, 128))
    with Timeline(model, ids) as line:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    change = np.zeros(len(line.instants) + 1, np.int64)
    for thing in line.things:
        change[thing.born] += thing.bytes
        if thing.died is not None:
            change[thing.died] -= thing.bytes
    measured = int(np.cumsum(change).max())
    assert abs(measured - predicted) <= 0.002 * measured  # what real tensors have beside: numbers of a few bytes


def test_a_line_through_two_lengths_meets_a_third():
    made = blueprint(tiny_llama(layers=4, dtype=torch.bfloat16))
    prepared(made.model, CHECKPOINT, None)
    forecast = Forecast(made, CHECKPOINT, 1, "cpu", 256)
    exact = planned_step(made, 1024).peak
    assert exact <= forecast.peak(1024).held <= 1.01 * exact


def test_the_longest_context_is_the_longest_that_fits():
    found = unswag.plan(CONFIG, "100MiB", device="cpu")
    assert found.fits and found.context % STEP == 0 and found.way == "checkpointing"
    assert found.peak["device"] <= sizes.bytes_of("100MiB", "memory")
    longer = unswag.plan(CONFIG, "100MiB", found.context + STEP, device="cpu")
    assert not longer.fits and f"{found.context:,}" in longer.reason


def test_for_a_context_the_fastest_way_that_fits_is_chosen_and_exact_before_lossy():
    room = unswag.plan(CONFIG, "1GiB", 2048, device="cpu", lossy=True)
    assert room.way == "keep" and room.step_cost < 1 and room.fits
    of = {option.name: option.peak["device"] for option in room.options}
    tight = unswag.plan(CONFIG, of["keep"] - 1, 2048, device="cpu", lossy=True)
    assert tight.way == "checkpointing" and "keep" in tight.reason
    costs = [tight.step_cost, room.step_cost]
    assert costs == sorted(costs, reverse=True)


def test_a_store_takes_checkpoints_from_the_device_up_to_its_limit():
    plain = unswag.plan(CONFIG, "100MiB", device="cpu")
    disk = unswag.plan(CONFIG, "100MiB", device="cpu", disk="1GiB")
    assert disk.way == "checkpoints on disk" and disk.context > plain.context and 0 < disk.peak["disk"] <= 1 << 30
    small = unswag.plan(CONFIG, "100MiB", device="cpu", disk="1MiB")
    assert small.way == "checkpointing" and small.context == plain.context
    assert list(disk.peak) == list(MEMORIES)


def test_a_plan_is_applied():
    model = tiny_llama(layers=3)
    plan = unswag.plan(model, "1GiB", 256)
    assert plan.device == "cpu" and not any(p.grad is not None for p in model.parameters())
    apply_unswag_surgery(model, plan=plan, verbose=False)
    assert model.is_gradient_checkpointing is plan.checkpointing
    apply_unswag_surgery(tiny_llama(layers=3), memory="1GiB", context=256, verbose=False)
    with pytest.raises(ValueError, match="pass one of them"):
        apply_unswag_surgery(model, policy="int8", plan=plan, verbose=False)


def test_a_plan_that_does_not_fit_is_refused_with_what_would(monkeypatch):
    model = tiny_llama(layers=3)
    none = unswag.plan(model, "1MiB", 4096)
    assert not none.fits
    with pytest.raises(ValueError, match="does not fit"):
        apply_unswag_surgery(model, plan=none, verbose=False)
    plan = unswag.plan(model, "200MiB")
    monkeypatch.setattr("unswag.memory.of_process", lambda: 100 << 20)
    with pytest.raises(ValueError, match=r"this one has 100.0 MiB; about [\d,]+ tokens would fit"):
        apply_unswag_surgery(model, plan=plan, verbose=False)
    assert not model.is_gradient_checkpointing


def test_it_is_shown_and_survives_json():
    plan = unswag.plan(CONFIG, "100MiB", device="cpu", lora=4, compare=True)
    assert Plan.from_json(plan.to_json()) == plan
    text = str(plan)
    for words in ("LoRA of rank 4", "longest context", "stock, checkpointing", "reached in", "predicted", plan.instant):
        assert words in text
    assert plan._repr_html_().startswith("<table>")
    stock, best = (next(o.longest for o in plan.options if o.name == n) for n in ("stock, checkpointing", plan.way))
    assert best > stock


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"memory": "much"}, "memory='much'"),
        ({"optimizer": "adamwx"}, "'adamw', 'adamw_8bit', 'sgd'"),
        ({"device": "tpu"}, "device='tpu'"),
        ({"context": 0}, "context=0"),
        ({"weights": "nf4"}, "cannot be trained"),
        ({"weights": "int3", "lora": 4}, "weights='int3'"),
    ],
)
def test_wrong_arguments_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        unswag.plan(CONFIG, **options)


def test_4_bit_weights_and_8_bit_states_take_less():
    plans = [
        unswag.plan(CONFIG, "1GiB", 512, device="cpu", lora=4, **o) for o in ({}, {"weights": "nf4"}, {"optimizer": "sgd"})
    ]
    assert plans[1].weights < plans[0].weights and plans[2].states == 0 < plans[0].states


def test_every_way_has_its_own_name_and_costs_follow_the_products():
    assert len({way.name for way in WAYS}) == len(WAYS)
    for way, frozen in itertools.product(WAYS, (False, True)):
        assert (way.cost(not frozen) >= 1) == way.recompute
