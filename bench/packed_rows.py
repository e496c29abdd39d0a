"""Packed rows through stock models: do the sequences of a row see each other? Every causal type that bench/small.py builds.

Five random sequences of 4 to 10 tokens through `Collator`, as two rows and as a row each, against each sequence alone without a
cache: the largest difference of a logit, by the largest logit of the sequence. Below 1e-3 they are apart (rounding is 1e-6,
another sequence in sight 0.1 and more). Weights are doubled and dropout is off.

python -m bench.packed_rows    writes bench/results/packed_rows.json
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch

from bench.architectures import NOT_BUILT, build, cases
from bench.smollm2 import say, table, write
from unswag.data import Collator

APART = 1e-3
GROUPS = ((0, 1, 2), (3, 4))  # the sequences of each packed row


def _row(sequences: list[torch.Tensor]) -> dict[str, Any]:
    ids = torch.cat(sequences).numpy()
    return {"input_ids": ids, "labels": ids, "position_ids": torch.cat([torch.arange(len(s)) for s in sequences]).numpy()}


def _differences(model: Any, sequences: list[torch.Tensor]) -> Iterator[tuple[str, float | str]]:
    alone = [model(input_ids=s[None], use_cache=False).logits[0].float() for s in sequences]
    for rows, groups in (("packed", GROUPS), ("one sequence per row", tuple((i,) for i in range(len(sequences))))):
        batch = Collator(0)([_row([sequences[i] for i in group]) for group in groups])
        for cache, options in (("no cache", {"use_cache": False}), ("default", {})):
            try:
                logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], **options).logits.float()
            except Exception as error:  # of transformers, which the result names
                yield f"{rows}, {cache}", f"{type(error).__name__}: {error}"
                continue
            worst = 0.0
            for row, group in zip(logits, groups, strict=True):
                at = 0
                for i in group:
                    part = row[at : at + len(sequences[i])]
                    worst = max(worst, ((part - alone[i]).abs().max() / alone[i].abs().max()).item())
                    at += len(part)
            yield f"{rows}, {cache}", float(f"{worst:.1e}")


@torch.no_grad()
def examine(name: str) -> dict[str, Any]:
    try:
        model, batch = build(name, 0)
        for parameter in model.parameters():
            parameter *= 2
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        draw = torch.Generator().manual_seed(1)
        words = int(batch["input_ids"].max())
        sequences = [torch.randint(3, words, (n,), generator=draw) for n in (5, 9, 7, 10, 4)]
        modes = {mode: dict(_differences(model.train(mode == "train"), sequences)) for mode in ("train", "eval")}
        return {"name": name, **modes}
    except Exception as error:
        return {"name": name, "not built": f"{type(error).__name__}: {error}".strip().split("\n")[0]}


def _apart(case: dict[str, Any], what: str) -> bool:
    found = [case[mode][what] for mode in ("train", "eval")]
    return all(isinstance(value, float) and value < APART for value in found)


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    results = []
    for name in cases():
        if "," not in name and name not in NOT_BUILT:
            results.append(examine(name))
            say(results[-1])
    write("packed_rows", {"cases": results})
    ran = [case for case in results if "train" in case]
    ways = list(ran[0]["train"])
    table("types whose sequences are apart, in training and in evaluation", ["rows", "of", "types"], [
        [what, len(ran), sum(_apart(case, what) for case in ran)] for what in ways
    ])  # fmt: skip
    print("packed, no cache, not apart:", ", ".join(c["name"] for c in ran if not _apart(c, "packed, no cache")))
    print(
        "one sequence per row, not apart:", ", ".join(c["name"] for c in ran if not _apart(c, "one sequence per row, default"))
    )


if __name__ == "__main__":
    main()
