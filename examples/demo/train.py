"""One fine-tuning run of the demo, in a process of its own.

python -m examples.demo.train '[way, folder of the prepared rows, epochs, question]' RESULT
"""

from __future__ import annotations

import json
import time

from examples.demo.ways import Way, arguments, quiet, write

LEARNING_RATE = {"lora": 1e-3, "full": 5e-5}
ANSWER = 48  # tokens at most


def answer(model, tokenizer, question: str) -> str:
    """What the model says, greedily; it is left in the mode that it was in."""
    import torch

    training = model.training
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        out = model.eval().generate(**prompt, max_new_tokens=ANSWER, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    model.train(training)
    return tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def main() -> None:
    quiet()
    import transformers
    from examples.smollm2 import tokenizer
    from transformers import TrainingArguments, set_seed

    from unswag.data import PackedDataset

    class Trainer(transformers.Trainer):
        """Notes the loss of every step, unrounded, and when it ended."""

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            losses.append(loss.item())
            ends.append(time.monotonic())
            return loss

        def log(self, *args, **kwargs) -> None:  # the demo prints one table at the end
            pass

    losses: list[float] = []
    ends: list[float] = []
    (way, rows, epochs, question), result = arguments()
    way, data, tok = Way(**way), PackedDataset.load(rows), tokenizer()
    model = way.load()
    before = answer(model, tok, question)
    set_seed(0)  # both sides see the same rows in the same order
    settings = TrainingArguments(
        output_dir=str(result.with_suffix("")), num_train_epochs=epochs, per_device_train_batch_size=1, use_cpu=True,
        learning_rate=LEARNING_RATE[way.training], warmup_steps=3, lr_scheduler_type="constant_with_warmup",
        save_strategy="no", report_to=[], disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    Trainer(model, settings, train_dataset=data, data_collator=data.collator).train()
    found = {
        "seconds_per_step": (ends[-1] - ends[0]) / (len(ends) - 1),
        "losses": losses,
        "before": before,
        "after": answer(model, tok, question),
    }
    write(result, json.dumps(found))


if __name__ == "__main__":
    main()
