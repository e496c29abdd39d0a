"""What `unswag.plan` says of known models on cards of 8 to 80 GB: predicted from shapes, nothing of it was measured on a GPU.

A card of 16 GB is taken to have 16,000,000,000 bytes; the context of CUDA and what the allocator holds are in them.
"""

from __future__ import annotations

import time

from bench.smollm2 import say, table, write

LLAMA = dict(model_type="llama", max_position_embeddings=131072)
MODELS = {
    "Llama-3.1-8B, QLoRA r = 32": (
        dict(LLAMA, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
             num_key_value_heads=8, vocab_size=128256),
        dict(lora=32, weights="nf4", optimizer="adamw_8bit"),
    ),
    "Llama-3.3-70B, QLoRA r = 32": (
        dict(LLAMA, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
             num_key_value_heads=8, vocab_size=128256),
        dict(lora=32, weights="nf4", optimizer="adamw_8bit"),
    ),
    "TinyLlama-1.1B, LoRA r = 16": (
        dict(LLAMA, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
             num_key_value_heads=4, vocab_size=32000),
        dict(lora=16, weights=None, optimizer="adamw"),
    ),
}  # fmt: skip
MEMORIES = ("8GB", "16GB", "24GB", "80GB")
HOST = "128GiB"


def main() -> None:
    from unswag import sizes
    from unswag.torch.blueprint import blueprint, model_of
    from unswag.torch.plan import Case, forecasts_of, plan_of

    rows, seconds = [], {}
    for name, (config, how) in MODELS.items():
        begin = time.process_time()
        made = blueprint(model_of(config), how["lora"], how["weights"])
        limits = {"device": 1, "pinned": None, "host": sizes.bytes_of(HOST, "host"), "disk": None}
        case = Case(made, 1, "cuda", how["optimizer"], limits)
        forecasts = list(forecasts_of(case, lossy=True, context=None, compare=True))
        seconds[name] = round(time.process_time() - begin, 1)
        for memory in MEMORIES:
            limits["device"] = sizes.bytes_of(memory, "memory")
            found = plan_of(case, forecasts, None, name)
            longest = {option.name: option.longest for option in found.options}
            rows.append(
                {"model": name, "memory": memory, "weights_bytes": case.weights, "longest": longest, "exact_way": found.way}
            )
            say(name, memory, longest)
    write("plan_table", {"predicted": True, "host_memory": HOST, "cpu_seconds": seconds, "rows": rows})
    ways = list(rows[0]["longest"])
    table("Longest context, predicted", ("model", "memory", *ways),
          [(r["model"], r["memory"], *(f"{r['longest'][way]:,}" for way in ways)) for r in rows])  # fmt: skip


if __name__ == "__main__":
    main()
