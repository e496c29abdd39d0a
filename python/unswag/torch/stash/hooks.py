"""The saved-tensor hooks that PyTorch has in place: which are innermost, and whether a stash may add its own.

PyTorch runs the innermost pair of hooks only, so a stash that enters inside another's hooks would switch those off. Whether
there are any is known to private functions of PyTorch alone. They are looked up once; without them the stash steps aside.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

# Private functions of PyTorch, None where this version lacks them.
torch_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
torch_hooks_enabled = getattr(torch._C._autograd, "_saved_tensors_hooks_is_enabled", None)
torch_interpreter = getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", None)

warned: set[str] = set()  # reasons that were given already


def top_hooks() -> Any:
    """The innermost (pack, unpack) of this thread; None if there are none, or if this PyTorch does not say."""
    return None if torch_top_hooks is None else torch_top_hooks(False)


def can_enter() -> bool:
    """Whether saved-tensor hooks work here. Warns, once for each reason, where they do not."""
    if torch_top_hooks is None or torch_hooks_enabled is None or torch_interpreter is None:
        warn_once(f"torch {torch.__version__} does not say which saved-tensor hooks are in place")
        return False
    if torch_interpreter() is not None:
        warn_once("torch.func transforms do not support saved-tensor hooks")
        return False
    return torch_hooks_enabled()


def warn_once(reason: str) -> None:
    """Warns that the stash is not used, once for each reason in a process."""
    if reason not in warned:
        warned.add(reason)
        warnings.warn(f"UnSwag's stash steps aside: {reason}. Ops and chunked loss still apply.", stacklevel=2)


@torch.compiler.assume_constant_result
def warn_compiled() -> None:
    """`warn_once`, callable from code that torch.compile traces."""
    warn_once("torch.compile decides itself what is saved, so a store and a sweep (store=..., sweep=...) do nothing")


def own(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy of it where a norm may not save x itself.

    Norms written in Python save a float32 copy of a 16-bit input; ours save x. The difference shows where PyTorch does not
    check whether x was overwritten afterwards: in the recompute of its own checkpoint. There, and for 16-bit inputs only, this
    copies.
    """
    if x.element_size() >= 4 or torch.compiler.is_compiling():
        return x
    hooks = top_hooks()
    pack = None if hooks is None else getattr(hooks[0], "__qualname__", "")
    return x.clone() if pack and pack.startswith("_recomputation_hook.") else x
