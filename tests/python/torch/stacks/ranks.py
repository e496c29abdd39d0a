"""What test_distributed.py runs on two ranks (gloo, CPU): every case stock and with surgery, then compared. Each rank writes
what it found into the folder that is named.

python -m torch.distributed.run --nproc_per_node=2 tests/python/torch/stacks/ranks.py FOLDER
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tests.python.torch import families
from tests.python.torch.stacks import training
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

LENGTH = 24  # of every row, so that the mean over ranks is the mean over all tokens


def batch(step: int, rank: int | None) -> dict[str, torch.Tensor]:
    """Two rows for each rank; those of both for None."""
    ids = torch.randint(3, 128, (4, LENGTH), generator=torch.Generator().manual_seed(step))
    ids = ids if rank is None else ids[2 * rank : 2 * rank + 2]
    return {"input_ids": ids, "labels": ids}


def lora(model: nn.Module) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0)).train()


def alone(model: nn.Module) -> nn.Module:
    return model


def ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def fsdp(model: nn.Module, **options: object) -> nn.Module:
    mesh = init_device_mesh("cpu", (2,))
    llama = next(m for m in model.modules() if isinstance(getattr(m, "layers", None), nn.ModuleList))
    for layer in llama.layers:
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def fsdp_bf16(model: nn.Module) -> nn.Module:
    return fsdp(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))


def train(wrap, make, surgery: bool, checkpointing: bool, rank: int | None, store: str | None = None) -> training.Run:
    model = make(training.tiny_llama())
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if make is lora:
            model.enable_input_require_grads()
    recording = training.Recording(model)
    if surgery:
        training.operate(model, store=store)
    wrapped = wrap(model)
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=1.0)
    losses = []
    with recording:
        for step in range(2):
            loss = wrapped(**batch(step, rank)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            losses.append(mean.item() / dist.get_world_size())
    return recording.run(wrapped, losses)


CASES = {  # wrapper, adapters, checkpointing, where the checkpoints are
    "ddp": (ddp, alone, False, None),
    "ddp, lora, checkpointing": (ddp, lora, True, None),
    "ddp, lora, checkpointing, disk": (ddp, lora, True, "disk"),
    "fsdp2": (fsdp, alone, False, None),
    "fsdp2, lora, checkpointing": (fsdp, lora, True, None),
    "fsdp2, lora, checkpointing, host": (fsdp, lora, True, "host"),
    "fsdp2, bf16, checkpointing": (fsdp_bf16, alone, True, None),
    "fsdp2, bf16, checkpointing, disk": (fsdp_bf16, alone, True, "disk"),
}


def far(ours: training.Run, stock: training.Run) -> dict[str, object]:
    """How far apart two runs are at worst, relative: losses, what each parameter moved by; and warnings that stock lacks."""
    return {
        "loss": max(abs(a - b) / abs(b) for a, b in zip(ours.losses, stock.losses, strict=True)),
        "moved": max(families.distance(ours.moved[name], stock.moved[name]) for name in stock.moved | ours.moved),
        "warnings": sorted(ours.warnings - stock.warnings),
    }


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.set_num_threads(1)
    doors = training.Doors()
    found = {}
    with contextlib.redirect_stdout(None) if rank else contextlib.nullcontext():
        for name, (wrap, make, checkpointing, store) in CASES.items():
            stock = train(wrap, make, False, checkpointing, rank)
            doors.again = 0
            ours = train(wrap, make, True, checkpointing, rank, store)
            again = doors.again
            one = train(alone, make, True, checkpointing, None)  # one process with the rows of both
            found[name] = {"stock": far(ours, stock), "one process": far(ours, one), "recipes": again}
    Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
