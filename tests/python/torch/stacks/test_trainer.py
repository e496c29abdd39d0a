"""The HF Trainer, with its own options for checkpointing, precision, accumulation and label smoothing."""

import pytest
from peft import LoraConfig, get_peft_model
from tests.python.torch.stacks.training import BF16, FP32, Doors, Recording, assert_same, collate, operate, rows, tiny_llama
from transformers import Trainer, TrainingArguments


def train(folder, surgery=False, lora=False, **options):
    """Three steps."""
    model = tiny_llama()
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0))
    report = operate(model) if surgery else None
    settings = dict(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=2, learning_rate=1.0, optim="sgd", logging_steps=1,
        use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    with Recording(model) as recording:
        trainer = Trainer(model, TrainingArguments(**settings, **options), collate, train_dataset=rows())
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return recording.run(model, losses), report


CASES = {
    "fp32": (dict(), FP32),
    "accumulation": (dict(gradient_accumulation_steps=2), FP32),
    "checkpointing": (dict(activation_checkpointing=True), FP32),
    "checkpointing by its old name": (dict(gradient_checkpointing=True), FP32),
    "reentrant": (dict(activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": True}), FP32),
    "bf16": (dict(bf16=True, activation_checkpointing=True), BF16),
    "lora": (dict(lora=True), FP32),
}


@pytest.mark.parametrize("case", CASES)
def test_trainer(case, tmp_path, monkeypatch):
    options, tolerance = CASES[case]
    stock, _ = train(tmp_path, **options)
    doors = Doors(monkeypatch.setattr)
    ours, report = train(tmp_path, surgery=True, **options)
    assert_same(ours, stock, tolerance)
    assert doors.again > 0 and not report.logits_made


def test_label_smoothing_makes_the_logits_and_says_so(tmp_path, monkeypatch):
    """It works outside the model, on logits; all other savings stay."""
    stock, _ = train(tmp_path, label_smoothing_factor=0.1)
    doors = Doors(monkeypatch.setattr)
    ours, report = train(tmp_path, surgery=True, label_smoothing_factor=0.1)
    assert report.logits_made == {"a forward without labels": 3}
    assert_same(ours, stock)
    assert doors.again > 0
