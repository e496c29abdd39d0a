# %% [markdown]
# # Fine-tuning with LoRA, UnSwag and the Hugging Face Trainer
#
# One complete script: load a model, add LoRA adapters, apply UnSwag's surgery, prepare instruction data, train, save, load the
# adapter into a fresh model, and ask it a question.
#
#     python -m examples.finetune --model MODEL --data train.jsonl --out finetuned
#
# `MODEL` is a folder, or a name on the Hugging Face Hub. `docs/data.md` lists the forms of data. Without the two arguments the
# script uses what the repository's `make setup` installs: SmolLM2-135M, and docstrings of Python's standard library; that takes
# a few minutes on two cores. The notebook then needs the root of the repository on its path: `PYTHONPATH=. jupyter lab`.

# %%
import argparse
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from unswag import apply_unswag_surgery, audit, prepare_data

parser = argparse.ArgumentParser(description="Fine-tunes a language model with LoRA and UnSwag.")
parser.add_argument("--model", help="folder or Hub name of a causal language model (default: SmolLM2-135M)")
parser.add_argument("--data", help="a .jsonl file (default: docstrings of Python's standard library)")
parser.add_argument("--out", type=Path, default=Path("finetuned"), help="folder for the adapter (default: finetuned)")
parser.add_argument("--max-length", type=int, default=512, help="tokens of a row of training data (default: 512)")
parser.add_argument("--epochs", type=float, default=3, help="passes over the data (default: 3)")
parser.add_argument("--policy", default="exact", help="what UnSwag keeps: exact, int8, int4, 2bit (default: exact)")
parser.add_argument("--question", default="What does `heapq.heappush(heap, item)` of Python's standard library do?")
args = parser.parse_args()

if args.model is None:
    from examples.smollm2 import directory

    args.model = directory()
if args.data is None:
    from examples.docstrings import documented, write_pairs

    args.data = args.out / "docstrings.jsonl"
    args.out.mkdir(parents=True, exist_ok=True)
    write_pairs(args.data, [item for item in documented() if item.name.startswith(("bisect.", "fnmatch.", "heapq."))])

# %% [markdown]
# ## Model
#
# The order matters: adapters first, surgery next, wrappers such as DDP or FSDP2 last (`docs/stacks.md`). The report lists what
# was patched, and what was left and why.

# %%
dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
apply_unswag_surgery(model, policy=args.policy)

# %% [markdown]
# ## Data
#
# Prompts are masked, sequences are packed into rows of at most `max_length` tokens, and a bad line is an error that names its
# place. `on_error="skip"` goes on without it.

# %%
data = prepare_data(args.data, tokenizer, max_length=args.max_length)

# %% [markdown]
# ## What one training step keeps
#
# `audit` runs one forward pass and lists what is kept for the backward pass.

# %%
print(audit(model.train(), use_cache=False, **data.collator([data[0]])))

# %% [markdown]
# ## Training
#
# Any trainer works. `activation_checkpointing` is called `gradient_checkpointing` in older releases of transformers.

# %%
arguments = TrainingArguments(
    output_dir=str(args.out / "checkpoints"),
    num_train_epochs=args.epochs,
    per_device_train_batch_size=1,
    learning_rate=1e-3,
    activation_checkpointing=True,
    dataloader_pin_memory=torch.cuda.is_available(),
    logging_steps=5,
    save_strategy="no",
    report_to=[],
)
Trainer(model, arguments, train_dataset=data, data_collator=data.collator).train()
model.save_pretrained(args.out)
tokenizer.save_pretrained(args.out)

# %% [markdown]
# ## Use
#
# What was saved is a plain PEFT adapter: it is loaded and used without UnSwag.


# %%
def answer(model, question):
    if tokenizer.chat_template is not None:
        messages = [{"role": "user", "content": question}]
        question = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    prompt = tokenizer(question, return_tensors="pt").to(model.device)
    out = model.eval().generate(**prompt, max_new_tokens=64, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip()


base = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
print("question         ", args.question)
print("before           ", answer(base, args.question))
reloaded = PeftModel.from_pretrained(base, args.out)
print("after, reloaded  ", answer(reloaded, args.question))
