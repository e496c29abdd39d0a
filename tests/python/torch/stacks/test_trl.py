"""TRL's SFTTrainer. Its loss is its own: it calls the base model and makes log-probabilities of hidden states in tiles."""

import pytest
from datasets import Dataset
from peft import LoraConfig
from tests.python.torch.stacks.training import BF16, FP32, Doors, Recording, assert_same, operate, rows, tiny_llama
from tokenizers import Tokenizer, models
from transformers import BitsAndBytesConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer


def tokenizer():
    words = ["<pad>", "<bos>", "<eos>", *(f"w{i}" for i in range(3, 128))]
    vocabulary = {word: i for i, word in enumerate(words)}
    fast = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def four_bits(folder):
    """The tiny Llama as it comes from disk with NF4 weights."""
    tiny_llama().save_pretrained(folder)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    return LlamaForCausalLM.from_pretrained(folder, quantization_config=settings, device_map="cpu")


def train(folder, when=None, lora=False, packed_weights=False, **options):
    """Three steps of two batches each. `when` the surgery is done: before or after the trainer is made, or not at all."""
    model = four_bits(folder) if packed_weights else tiny_llama()
    settings = dict(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1.0,
        optim="sgd", max_length=32, logging_steps=1, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    if when == "before":
        operate(model)
    trainer = SFTTrainer(
        model,
        SFTConfig(**settings, **options),
        train_dataset=Dataset.from_list(rows()),
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1) if lora else None,
    )
    if when == "after":
        report = operate(trainer.model)
        assert sum(pattern == "lora" for _, pattern in report.patched) == (14 if lora else 0)
    with Recording(trainer.model) as recording:
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return recording.run(trainer.model, losses)


CASES = {
    "defaults": (dict(), BF16),  # bf16 autocast, checkpointing
    "fp32": (dict(bf16=False), FP32),
    "dft": (dict(bf16=False, loss_type="dft"), FP32),
    "packing": (dict(bf16=False, packing=True, gradient_checkpointing=False), FP32),
    "lora": (dict(bf16=False, lora=True), FP32),
    "lora and packing": (dict(bf16=False, lora=True, packing=True), FP32),
}


@pytest.mark.parametrize("case", CASES)
def test_sft(case, tmp_path, monkeypatch):
    options, tolerance = CASES[case]
    stock = train(tmp_path, **options)
    doors = Doors(monkeypatch.setattr)
    assert_same(train(tmp_path, "after", **options), stock, tolerance)
    assert doors.again > 0


def test_sft_on_four_bits(tmp_path, monkeypatch):
    """Losses alone: TRL makes such adapters bf16, which rounds them by as much as they move."""
    stock = train(tmp_path, lora=True, packed_weights=True)
    doors = Doors(monkeypatch.setattr)
    ours = train(tmp_path, "after", lora=True, packed_weights=True)
    assert ours.losses == pytest.approx(stock.losses, rel=1e-3) and ours.warnings <= stock.warnings
    assert doors.again > 0


def test_surgery_before_the_trainer_is_made_is_as_good_without_lora(tmp_path, monkeypatch):
    """TRL puts its forward over ours and calls the base model, which has a stash of its own."""
    doors = Doors(monkeypatch.setattr)
    after = train(tmp_path, "after", bf16=False)
    there, doors.again = doors.again, 0
    assert_same(train(tmp_path, "before", bf16=False), after, 0.0)
    assert doors.again == there > 0
