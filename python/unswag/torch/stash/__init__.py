"""The stash: decides in which form each tensor that autograd saves is kept until the backward pass.

    with Stash("exact"):
        loss = model(**batch).loss
    loss.backward()

Words
-----
stash      one forward's worth of kept tensors; a context manager around the model's forward (`Stash`)
door       the stash's pack hook (`Stash.door`): PyTorch calls it with every tensor that is saved inside the block
handle     what the door returns and autograd keeps in the tensor's place until the backward (`handles.Handle`)
by reference   the handle holds the tensor itself, and the version it had (`handles.ByReference`)
recomputed     the handle holds a recipe: a function, its constants, and handles of its inputs (`handles.Recomputed`)
stored     in a store, in host memory or on a disk (`handles.Stored`); an input of the recipe that reads or decodes it
recipe     belongs to all handles on its tensor and holds the result between two readers (`handles.Recipe`)
lease      what all handles by reference on one storage share, and so what says how long it is held (`handles.Lease`)
remembered output   an op's output with a recipe, in the stash's registry while the forward runs
                    (`outputs.RememberedOutput`); pending while the recipe cannot rely on its inputs (`outputs.PendingOutput`)
role       what a tensor is used for (`policy.ROLES`), by which the policy chooses a codec

What becomes of a saved tensor
------------------------------
The first of these that applies:

1. a parameter, a view of one, or autocast's copy of one: held by reference;
2. held already: another tensor of the same storage is held by reference, so this one costs nothing;
3. the output of an op with a recipe (`remember`), or a dtype cast of one: not held, but recomputed from the recipe's inputs, if
   no program that PyTorch accepts can change those before the backward (see `outputs.UnsavedInput`);
4. marked by an op as playing a role (`plays`) for which the policy has a codec or a tier: encoded or stored once, for all ops
   that save it;
5. held by reference.

A tensor that was overwritten after it was saved by reference is an error in the backward, as in plain PyTorch (a plain hook
would lose that check). A recomputed tensor serves several readers only as long as none of them writes into it; the next reader
then gets one of its own.

Ownership
---------
Autograd owns the handles, handles own their recipe, a recipe owns the handles of its inputs. So the graph frees everything
layer by layer, as without a stash, and nothing waits for the garbage collector. The registries hold weak references to
storages; an entry keeps its recipe only while the output's storage lives, and all of them end with the `with` block. Identity
is the storage (`_cdata`, with a weak reference beside it so that the address is not used again), never a data pointer, never
`id()` of a tensor.

On CUDA a recipe runs in the stream of its reader, and one result serves several readers. So it is for readers in the stream in
which the output was remembered (autograd runs a backward where its forward ran); others hold the tensor by reference.

Writes that PyTorch itself cannot see (through `.data`, a raw pointer, numpy) are not seen here either.

Modules
-------
layout     sizes, strides, views, casts, storages      handles    what autograd keeps
outputs    what the registries know                    door       `Stash`, `remember`, `plays`
thread     what a thread has entered                   hooks      PyTorch's saved-tensor hooks of others
rectified  forms of a ReLU's output                    codecs     forms in fewer bits, which a policy chooses
"""

from __future__ import annotations

from unswag.torch.stash.door import Entries, Stash, leave, plays, remember, step_aside, unpack
from unswag.torch.stash.handles import ByReference, Handle, Leases, Recomputed
from unswag.torch.stash.hooks import own, top_hooks
from unswag.torch.stash.layout import PLAIN, dense_stride, is_plain, storages
from unswag.torch.stash.thread import Recorder, collecting_references, current_role, recording, role

__all__ = [
    "PLAIN",
    "ByReference",
    "Entries",
    "Handle",
    "Leases",
    "Recomputed",
    "Recorder",
    "Stash",
    "collecting_references",
    "current_role",
    "dense_stride",
    "is_plain",
    "leave",
    "own",
    "plays",
    "recording",
    "remember",
    "role",
    "step_aside",
    "storages",
    "top_hooks",
    "unpack",
]
