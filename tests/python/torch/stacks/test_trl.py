"""TRL's trainers. Their losses are their own: most call the base model and make log-probabilities of hidden states in tiles."""

from collections import Counter

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tests.python.torch import families
from tests.python.torch.stacks.training import BF16, FP32, Doors, Recording, assert_same, operate, rows, tiny_llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BitsAndBytesConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

import unswag


def tokenizer():
    words = ["<pad>", "<bos>", "<eos>", *(f"w{i}" for i in range(3, 128))]
    vocabulary = {word: i for i, word in enumerate(words)}
    fast = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
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


# ---- every trainer: five steps from the same seed


def words(n: int, seed: int) -> list[str]:
    """Texts of 3 to 12 words."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 13, (n,), generator=generator).tolist()
    return [" ".join(f"w{i}" for i in torch.randint(3, 128, (length,), generator=generator).tolist()) for length in lengths]


def preferences(prompt: bool = True) -> Dataset:
    """Pairs; `prompt`: beside them rather than in them."""
    columns = zip(words(20, 11), words(20, 12), words(20, 13), strict=True)
    if prompt:
        return Dataset.from_list([{"prompt": p, "chosen": f" {c}", "rejected": f" {r}"} for p, c, r in columns])
    return Dataset.from_list([{"chosen": f"{p} {c}", "rejected": f"{p} {r}"} for p, c, r in columns])


def judged() -> Dataset:
    columns = enumerate(zip(words(20, 11), words(20, 12), strict=True))
    return Dataset.from_list([{"prompt": p, "completion": f" {c}", "label": i % 3 > 0} for i, (p, c) in columns])


def prompts() -> Dataset:
    return Dataset.from_list([{"prompt": text} for text in words(20, 11)])


def early_words(completions, **_):
    """A reward: how many words of the first half of the vocabulary a completion has."""
    return [sum(int(word[1:]) < 64 for word in text.split() if word[0] == "w") / 8 for text in completions]


TRAINERS = {
    "sft": (SFTTrainer, SFTConfig, lambda: Dataset.from_list(rows()), dict(max_length=32)),
    "dpo": (DPOTrainer, DPOConfig, preferences, dict(max_length=32)),
    "dpo, precomputed": (DPOTrainer, DPOConfig, preferences, dict(max_length=32, precompute_ref_log_probs=True)),
    "kto": (KTOTrainer, KTOConfig, judged, dict(max_length=32)),
    "reward": (RewardTrainer, RewardConfig, lambda: preferences(prompt=False), dict(max_length=32)),
    "grpo": (GRPOTrainer, GRPOConfig, prompts, dict(num_generations=2, max_completion_length=8, beta=0.04)),
    "orpo": (ORPOTrainer, ORPOConfig, preferences, dict(max_length=32)),
}
# Drawn, not zero: where B is zero, A moves by little more than roundings. DPO's reference is the model without the adapters, or
# a second one, which TRL loads.
ADAPTERS = {
    "full": None,
    "lora": dict(lora_dropout=0.0, init_lora_weights=False),
    "lora with dropout": dict(lora_dropout=0.1, init_lora_weights=False),
}


def policy(name, folder):
    if name == "reward":
        return families.redraw(LlamaForSequenceClassification(tiny_llama(num_labels=1).config))
    tiny_llama().save_pretrained(folder / "model")
    return LlamaForCausalLM.from_pretrained(folder / "model")


def five_steps(folder, name, adapters, surgery):
    trainer_class, config_class, data, options = TRAINERS[name]
    model = policy(name, folder)
    settings = dict(
        output_dir=str(folder), max_steps=5, per_device_train_batch_size=2, learning_rate=0.1 if ADAPTERS[adapters] else 1.0,
        optim="sgd", logging_steps=1, use_cpu=True, bf16=False, report_to=[], save_strategy="no", disable_tqdm=True, seed=3,
    )  # fmt: skip
    if name != "sft":  # which has no such switch and leaves dropout alone
        settings["disable_dropout"] = False
    lora = ADAPTERS[adapters]
    if lora is not None:
        task = "SEQ_CLS" if name == "reward" else "CAUSAL_LM"
        torch.manual_seed(4)
        lora = LoraConfig(r=4, target_modules="all-linear", task_type=task, **lora)
    trainer = trainer_class(
        model=model,
        args=config_class(**settings, **options),
        train_dataset=data(),
        processing_class=tokenizer(),
        peft_config=lora,
        **(dict(reward_funcs=early_words) if name == "grpo" else {}),
    )
    if surgery:
        report = unswag.apply_unswag_surgery(trainer.model)
        counts = Counter(pattern for _, pattern in report.patched)
        assert (counts["rms_norm"], counts["gated_mlp"], counts["attention"]) == (5, 2, 1) and not report.skipped
        assert counts["lora"] == (14 if lora else 0)
    with Recording(trainer.model) as recording:
        trainer.train()
    # GRPO's loss is a mean of advantages, which are about one and cancel
    losses = [entry["loss"] + (name == "grpo") for entry in trainer.state.log_history if "loss" in entry]
    return recording.run(trainer.model, losses)


@pytest.mark.parametrize("adapters", ADAPTERS)
@pytest.mark.parametrize("name", [n if n in ("sft", "dpo") else pytest.param(n, marks=pytest.mark.slow) for n in TRAINERS])
def test_five_steps(name, adapters, tmp_path, monkeypatch):
    stock = five_steps(tmp_path, name, adapters, surgery=False)
    doors = Doors(monkeypatch.setattr)
    ours = five_steps(tmp_path, name, adapters, surgery=True)
    if name == "orpo":  # it asks for the logits, and is told
        assert all("logits" in warning for warning in ours.warnings - stock.warnings)
        ours = ours._replace(warnings=stock.warnings)
    assert_same(ours, stock)
    assert doors.again > 0
