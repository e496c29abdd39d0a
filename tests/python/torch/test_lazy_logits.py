"""Deferred logits: one value at any moment, however they are used, or an error that says what to do."""

from __future__ import annotations

import contextlib
import copy
import gc
import inspect
import io
import os
import pickle
import types
import warnings

import pytest
import torch
from tests.python.torch.patterns.test_loss import assert_close, batch, lazy, make, patch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForCausalLM

from unswag.torch.lazy_logits import LazyLogits, frames
from unswag.torch.patterns.loss import materialised

pytestmark = pytest.mark.native
V = 99
IDS, LABELS = batch()["input_ids"], batch()["labels"]


def ce(logits):
    return F.cross_entropy(logits[:, :-1].reshape(-1, V), LABELS[:, 1:].reshape(-1))


class Twice(torch.autograd.Function):
    """Sees a tensor past __torch_function__, and keeps nothing of it."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, dy):
        return dy * 2


class Squared(torch.autograd.Function):
    """And keeps it."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return 2 * x * dy


class Same(torch.autograd.Function):
    """And gives it back."""

    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, dy):
        return -dy


def edited(how):
    """A loss of logits that `how` edited before it was made."""

    def use(logits):
        how(logits)
        return ce(logits)

    return use


def no_grad_edit(logits):
    before = ce(logits) * 0
    with torch.no_grad():
        logits.clamp_(max=0.1)
    return ce(logits) + before


def view_first(logits):
    view = logits[:, :-1]
    logits.mul_(3)
    return F.cross_entropy(view.reshape(-1, V), LABELS[:, 1:].reshape(-1))


def view_edited(logits):
    view = logits[:, :-1]
    view.mul_(3)
    return ce(logits)


def rows_edited(logits):
    rows = logits.view(-1, V)
    rows[:, 40:] = -1e4
    return ce(logits)


def copy_first(logits):
    copied, scaled = logits.double(), logits * 2
    logits.mul_(3)
    return ce(copied) + ce(scaled) + ce(logits)


def copy_of_a_copy(logits):
    scaled = logits * 2
    view = scaled[:, :-1]
    scaled.add_(torch.arange(float(V)))
    return F.cross_entropy(view.reshape(-1, V), LABELS[:, 1:].reshape(-1)) + ce(logits)


def rows_are_a_copy(logits):
    rows = logits[:, :-1].contiguous()
    logits.mul_(3.0)
    return F.cross_entropy(rows.view(-1, V), LABELS[:, 1:].reshape(-1))


def after_the_loss(logits):
    loss = ce(logits)
    logits.mul_(3.0)
    return loss + logits.logsumexp(-1).mean()


def after_a_function(logits):
    doubled = Twice.apply(logits)
    logits.mul_(3.0)
    return ce(doubled) + ce(logits)


def after_a_function_that_keeps(logits):
    squared = Squared.apply(logits)
    logits.mul_(3.0)
    return ce(squared)


def before_a_function(logits):
    logits.mul_(3.0)
    return ce(Squared.apply(logits))


def view_after_an_edit_in_a_function(logits):
    view = logits[:, 1:]
    logits.mul_(3.0)
    return Squared.apply(view).mean()


def outside(logits):
    """Not what was asked for by __torch_function__."""
    return ce(Same.apply(logits)) + Squared.apply(Twice.apply(logits)).mean() + checkpoint(ce, logits, use_reentrant=True)


def hooked(logits):
    logits.register_hook(lambda g: g * 2)
    return ce(logits)


def retained(logits):
    logits.retain_grad()
    loss = ce(logits)
    loss.backward(retain_graph=True)
    return loss + (logits.grad * logits.detach()).sum() * logits.sum()


def gradient_penalty(logits):
    (g,) = torch.autograd.grad(ce(logits), logits, create_graph=True)
    return g.square().sum()


def penalised_rows(logits):
    rows = logits.view(-1, V)
    (g,) = torch.autograd.grad(logits.logsumexp(-1).sum(), logits)
    return F.cross_entropy(rows, LABELS.reshape(-1)) + (g * logits).sum()


def set_data(logits):
    logits.data = logits.data * 2
    return ce(logits)


def write_data(logits):
    logits.data.mul_(2)
    return ce(logits)


def out_argument(logits):
    with torch.no_grad():
        torch.mul(logits.detach(), 2, out=logits.data)
    return ce(logits)


def tempered(logits):
    logits /= 0.7
    return ce(logits)


def reversed_gradient(logits):
    return 0.5 * ce(Same.apply(logits[:, :].contiguous()))


def read_without_gradients(logits):
    with torch.no_grad():
        best = logits.argmax(-1)
    return F.cross_entropy(logits.reshape(-1, V), best.reshape(-1))


def pickled(logits):
    return ce(logits) + pickle.loads(pickle.dumps(logits.detach())).sum() * logits.mean()


def shown(logits):
    return ce(logits) * (len(repr(logits)) > 60)


USES = {
    "item": edited(lambda z: z.__setitem__((..., slice(40, None)), -1e4)),
    "method": edited(lambda z: z.div_(0.5)),
    "masked_fill_": edited(lambda z: z.masked_fill_(torch.arange(V) >= 40, -1e4)),
    "relu_": edited(lambda z: F.relu(z, inplace=True)),
    "index_add_": edited(lambda z: z.index_add_(2, torch.tensor([1, 5]), torch.ones(2, 17, 2))),
    "edit of a slice": edited(lambda z: z[:, :-1].mul_(3)),
    "edit of a column": edited(lambda z: z[..., 3].mul_(3)),
    "foreach": edited(lambda z: torch._foreach_mul_([z], 2.0)),
} | {
    use.__name__: use
    for use in (
        no_grad_edit, view_first, view_edited, rows_edited, copy_first, copy_of_a_copy, rows_are_a_copy, after_the_loss,
        after_a_function, after_a_function_that_keeps, before_a_function, view_after_an_edit_in_a_function, outside, hooked,
        retained, gradient_penalty, penalised_rows, set_data, write_data, out_argument, tempered, reversed_gradient,
        read_without_gradients, pickled, shown,
    )
}  # fmt: skip


def of_a_forward(use, where, model):
    """The loss that `use` makes of logits: of a forward without labels, beside the loss of one with labels, or inside one."""
    if where == "without labels":
        return use(model(input_ids=IDS).logits)
    if where == "beside the loss":
        out = model(input_ids=IDS, labels=LABELS)
        return out.loss + use(out.logits)
    with pytest.MonkeyPatch.context() as own_loss:
        own_loss.setitem(vars(model), "_loss_function", lambda logits, labels, vocab_size, **kwargs: use(logits))
        return model(input_ids=IDS, labels=LABELS).loss


def result(use, where, model):
    """(loss, gradients by name), or the error."""
    model.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            loss = of_a_forward(use, where, model)
            loss.backward()
        except RuntimeError as error:
            return error
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def models():
    model = make()
    ours = copy.deepcopy(model)
    patch(ours)
    return model, ours


@pytest.mark.parametrize("where", ["without labels", "beside the loss", "inside"])
@pytest.mark.parametrize("use", USES)
def test_there_is_one_value(use, where, models):
    stock, ours = (result(USES[use], where, model) for model in models)
    if isinstance(ours, RuntimeError):
        assert isinstance(stock, RuntimeError) or (where != "without labels" and "keep_logits" in str(ours)), ours
        return
    assert not isinstance(stock, RuntimeError), stock
    torch.testing.assert_close(ours[0], stock[0], rtol=1e-5, atol=1e-5)
    assert_close(ours[1], stock[1], 1e-5)


def test_what_is_an_error(models):
    """All else in the table above is right. A loss that was made in chunks has no gradient for the logits, and a function that
    passes by __torch_function__ has no place in the graph of an edit."""
    places = ("beside the loss", "inside")
    errors = {(use, where) for use in USES for where in places if isinstance(result(USES[use], where, models[1]), RuntimeError)}
    waiting = {
        (use, "beside the loss") for use in ("hooked", "retained", "gradient_penalty", "penalised_rows", "before_a_function")
    }
    stocks = {(use, where) for use in ("after_a_function_that_keeps", "gradient_penalty") for where in places}
    assert errors == waiting | stocks | {("after_a_function", where) for where in places}


# ---- what it is to others -------------------------------------------------------------------------------------------------


def returned(model=None, **changes):
    """(model, outputs) of a training step whose loss was made in chunks."""
    model = model or make(**changes)
    patch(model)
    out = model(input_ids=IDS, labels=LABELS)
    assert isinstance(out.logits, LazyLogits) and not materialised(model)
    return model, out


def test_a_tensor_to_everybody_without_being_made():
    model, out = returned()
    logits = out.logits
    assert isinstance(logits, torch.Tensor) and torch.is_tensor(logits) and logits.shape == (2, 17, V) and len(logits) == 2
    assert logits.requires_grad and not logits.is_leaf and logits.grad_fn is not None and logits.is_contiguous()
    assert (logits.dtype, logits.device, logits.ndim, logits.numel()) == (torch.float32, torch.device("cpu"), 3, 2 * 17 * V)
    assert logits.to("cpu") is logits and torch.is_floating_point(logits) and hash(logits) == id(logits)
    assert not materialised(model)


@pytest.mark.filterwarnings("ignore:unswag")
@pytest.mark.parametrize("how", ["pickle", "save", "numpy", "as_tensor", "dlpack", "list", "cpu", "stack", "tree", "deepcopy"])
def test_consumers(how):
    model, out = returned()
    with torch.no_grad():
        want = model(input_ids=IDS).logits

    def saved():
        file = io.BytesIO()
        torch.save(out.logits, file)
        file.seek(0)
        return torch.load(file)

    got = {
        "pickle": lambda: pickle.loads(pickle.dumps(dict(out)))["logits"],
        "save": saved,
        "numpy": lambda: torch.from_numpy(out.logits.detach().numpy()),
        "as_tensor": lambda: torch.as_tensor(out.logits) * 1,
        "dlpack": lambda: torch.from_dlpack(out.logits.detach()),
        "list": lambda: torch.tensor(out.logits.tolist()),
        "cpu": lambda: {k: v.detach().cpu() for k, v in out.items() if k != "past_key_values"}["logits"],
        "stack": lambda: torch.stack([out.logits, out.logits])[1],
        "tree": lambda: torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t + 0, out)["logits"],
        "deepcopy": lambda: copy.deepcopy(out.logits.detach()),
    }[how]()
    assert type(got) is torch.Tensor
    torch.testing.assert_close(got.detach(), want)
    if how == "deepcopy":
        with pytest.raises(RuntimeError, match="deepcopy"):  # as stock: it has a graph
            copy.deepcopy(out.logits)


@pytest.mark.filterwarnings("ignore:unswag")
def test_two_forwards_and_what_is_between_their_logits(models):
    """R-drop, and distillation from a teacher: losses of the model, and of its logits."""

    def run(model):
        model.zero_grad()
        one, other = (model(input_ids=IDS, labels=LABELS) for _ in range(2))
        with torch.no_grad():
            teacher = model(input_ids=IDS, labels=LABELS).logits + torch.arange(V) / V
        loss = one.loss + other.loss
        for mine, theirs in ((one.logits, other.logits), (other.logits / 2, teacher)):
            loss = loss + F.kl_div(mine.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="batchmean")
        loss.backward()
        return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}

    stock, ours = map(run, models)
    torch.testing.assert_close(ours[0], stock[0])
    assert_close(ours[1], stock[1], 1e-5)


@pytest.mark.parametrize("wait", ["register_hook", "retain_grad", "grad", "autograd.grad"])
def test_what_would_wait_for_the_losss_gradient_is_an_error(wait):
    _, out = returned()
    logits = out.logits
    waits = {
        "register_hook": lambda: logits.register_hook(print),
        "retain_grad": lambda: logits.retain_grad(),
        "grad": lambda: logits.grad,
        "autograd.grad": lambda: torch.autograd.grad(out.loss, logits),
    }[wait]
    for _ in range(2):  # before they are made, and after
        with pytest.raises(RuntimeError, match="keep_logits"):
            waits()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logits.argmax(-1)


def test_hidden_states_are_freed_with_the_outputs():
    model, hidden = make(), []
    watch = model.model.register_forward_hook(lambda *a: hidden.append(StorageWeakRef(a[-1][0].untyped_storage())))
    _, out = returned(model)
    watch.remove()
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert out.logits[0].sum() and not hidden[0].expired()
        out.loss.backward()
        del out
        assert hidden[0].expired()
    finally:
        gc.enable()


def test_an_error_inside_a_forward_leaves_no_frame():
    model = make()
    patch(model)
    with pytest.raises(ValueError, match="outside"):
        model(input_ids=IDS, labels=LABELS + V)
    assert frames() == [] and isinstance(returned(model)[1].logits, LazyLogits)


def test_logits_of_a_forward_that_made_no_loss_of_them_are_real():
    model = make()
    patch(model)
    vars(model)["_loss_function"] = lambda logits, labels, vocab_size, **kwargs: model.lm_head.weight.sum()
    with pytest.warns(UserWarning, match="made in full"):
        assert type(model(input_ids=IDS, labels=LABELS).logits) is torch.Tensor


# ---- the head as it was ---------------------------------------------------------------------------------------------------


def test_functional_call():
    model, _ = returned()
    other = {n: p + 0.1 * torch.randn_like(p) for n, p in model.named_parameters()}
    out = torch.func.functional_call(model, other, (), dict(input_ids=IDS, labels=LABELS))
    want = torch.func.functional_call(model, other, (), dict(input_ids=IDS)).logits
    with pytest.warns(UserWarning, match="made in full"):
        assert isinstance(out.logits, LazyLogits) and torch.equal(out.logits, want)


def change(model, how):
    weight = model.lm_head.weight
    if how == "optimiser":
        torch.optim.SGD([weight], 1.0).step()
    elif how == "data":
        weight.data = weight.data + 1
    elif how == "data edited":
        weight.data.mul_(2)
    elif how == "no grad":
        with torch.no_grad():
            weight.mul_(2)


@pytest.mark.parametrize("how", ["optimiser", "data", "data edited", "no grad"])
def test_another_weight_is_an_error(how):
    model, out = returned()
    out.loss.backward()
    change(model, how)
    with pytest.raises(RuntimeError, match=r"output embedding's weights have been changed.*keep_logits"):
        out.logits.argmax(-1)
    with pytest.raises(RuntimeError, match="keep_logits"):
        Twice.apply(out.logits)


def test_another_parameter_in_its_place_is_none():
    model, out = returned()
    with torch.no_grad():
        want = model(input_ids=IDS).logits
    model.lm_head.weight = nn.Parameter(torch.zeros(V, 32))
    with pytest.warns(UserWarning, match="made in full"):
        assert torch.equal(out.logits, want)


def lora(**settings):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make(), LoraConfig(r=4, target_modules=["q_proj", "lm_head"], **settings))
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    return model.train()


ADAPTERS = {
    "disabled": lambda model: model.base_model.disable_adapter_layers(),
    "another": lambda model: (model.add_adapter("other", copy.copy(model.peft_config["default"])), model.set_adapter("other")),
    "merged": lambda model: model.merge_adapter(),
    "scaled": lambda model: model.base_model.model.lm_head.scaling.update(default=3.0),
    "evaluating": lambda model: model.eval(),
}


@pytest.mark.parametrize("how", ADAPTERS)
def test_a_head_in_another_state_is_an_error(how):
    model, out = returned(lora())
    ADAPTERS[how](model)
    with pytest.raises(RuntimeError, match=r"no longer what it was|have been changed in place.*keep_logits"):
        out.logits.argmax(-1)


def test_a_head_with_dropout_is_left():
    """Chunks would draw in another order."""
    model = lora(lora_dropout=0.1)
    assert patch(model) == ["it has dropout, and chunks would draw in another order"]
    model = lora(lora_dropout=0.0)
    model.base_model.model.lm_head.lora_dropout["default"] = nn.Dropout(0.0)
    assert patch(model) == []
    model.base_model.model.lm_head.lora_dropout["default"].p = 0.5
    assert type(model(input_ids=IDS, labels=LABELS).logits) is torch.Tensor


class Strange(nn.Module):
    """A head that does something else beside."""

    def __init__(self, inner, how):
        super().__init__()
        self.inner, self.out_features, self.how = inner, inner.out_features, how
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        y = self.inner(x)
        if self.how == "draws":
            y = y + torch.rand(())
        elif self.how == "counts":
            self.calls += 1
        elif self.how == "mixes":
            y = y - y.mean(0)
        elif self.how == "raises" and x.ndim == 2:
            raise KeyError("two rows")
        return y


REASONS = {
    "draws": "draws random",
    "counts": "changes its buffers",
    "mixes": "other rows",
    "raises": "cannot be tried (KeyError",
}


@pytest.mark.parametrize("how", REASONS)
def test_a_head_that_is_another_on_chunks_is_left(how):
    model = make()
    model.lm_head = Strange(model.lm_head, how)
    state = torch.get_rng_state()
    (left,) = patch(model)
    assert REASONS[how] in left and model.lm_head.calls == 0 and torch.equal(torch.get_rng_state(), state)


# ---- where the logits are real --------------------------------------------------------------------------------------------


class Doubling(TorchFunctionMode):
    """Another product for every head."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return out * 2 if func is F.linear and out.shape[-1] == V else out


def hooks(model, listen):
    head = model.lm_head
    return {
        "forward hook": lambda: head.register_forward_hook(lambda *a: None),
        "pre-hook": lambda: head.register_forward_pre_hook(lambda *a: None),
        "backward hook": lambda: head.register_full_backward_hook(lambda *a: None),
        "backward pre-hook": lambda: head.register_full_backward_pre_hook(lambda *a: None),
        "global hook": lambda: nn.modules.module.register_module_forward_hook(lambda *a: None),
        "anomaly mode": lambda: torch.autograd.detect_anomaly(check_nan=False),
        "function mode": lambda: Doubling(),
    }[listen]()


LISTENERS = ["forward hook", "pre-hook", "backward hook", "backward pre-hook", "global hook", "anomaly mode", "function mode"]


@pytest.mark.filterwarnings("ignore:Anomaly", "ignore:unswag")
@pytest.mark.parametrize("listen", LISTENERS)
def test_where_somebody_listens(listen):
    model, _ = returned()
    with contextlib.ExitStack() as stack:
        listener = hooks(model, listen)
        stack.callback(listener.remove) if hasattr(listener, "remove") else stack.enter_context(listener)
        out = model(input_ids=IDS, labels=LABELS)
    assert type(out.logits) is torch.Tensor and materialised(model).total() == 1
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits[:, :-1].flatten(0, 1), LABELS[:, 1:].flatten()))
    assert isinstance(model(input_ids=IDS, labels=LABELS).logits, LazyLogits)


@pytest.mark.parametrize("what", ["forward of the instance", "class", "forward of the class"])
def test_a_head_that_was_changed_since_runs_as_it_is(what, monkeypatch):
    model = make()

    class Mine(nn.Linear):
        pass

    model.lm_head.__class__ = Mine
    patch(model)
    plain = model(input_ids=IDS, labels=LABELS).loss

    def forward(self, x):
        return 2 * F.linear(x, self.weight)

    if what == "forward of the instance":
        model.lm_head.forward = types.MethodType(forward, model.lm_head)
    elif what == "class":
        model.lm_head.__class__ = type("New", (type(model.lm_head),), {"forward": forward})
    else:
        monkeypatch.setattr(Mine, "forward", forward)
    out = model(input_ids=IDS, labels=LABELS)
    assert type(out.logits) is torch.Tensor and abs(out.loss - plain) > 1e-4


def test_labels_by_position_and_none():
    model, _ = returned()
    names = list(inspect.signature(model.forward).parameters)
    arguments = [None] * names.index("labels")
    arguments[names.index("input_ids")] = IDS
    assert isinstance(model(*arguments, LABELS).logits, LazyLogits)
    assert type(model(*arguments, None).logits) is torch.Tensor and type(model(IDS, labels=None).logits) is torch.Tensor
    assert materialised(model) == {"a forward without labels": 2}


def test_a_model_inside_a_model_has_a_forward_of_its_own():
    """Labels of the outer one are no labels of another head's."""
    outer, inner = make(), make()
    patch(outer), patch(inner)
    seen = []
    outer.model.register_forward_hook(lambda *a: seen.append(inner(input_ids=IDS).logits))
    assert isinstance(outer(input_ids=IDS, labels=LABELS).logits, LazyLogits)
    assert [type(z) for z in seen] == [torch.Tensor]


def test_without_gradients_the_loss_has_none():
    model, _ = returned()
    with lazy(model) as logits, torch.no_grad():
        assert not model.loss_function(logits, LABELS, V).requires_grad


# ---- with others ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path_factory.mktemp('gloo')}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


OF_OUTPUTS = {
    "loss": lambda out: out.loss,
    "both": lambda out: out.loss + out.logits.logsumexp(-1).mean(),
    "logits": lambda out: out.logits.logsumexp(-1).mean(),
    "edited": lambda out: out.loss + ce(out.logits.mul_(2)),
}


@pytest.mark.skipif(os.name != "posix", reason="gloo with a file store")
@pytest.mark.filterwarnings("ignore:unswag")
@pytest.mark.parametrize("cast", [False, True], ids=["", "cast to float32"])
@pytest.mark.parametrize("use", OF_OUTPUTS)
@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}, {"static_graph": True}], ids=str)
def test_distributed_data_parallel(options, use, cast, models, one_rank):
    """Its reducer looks for parameters in the graph of the outputs, and its sink, a function, passes them on."""

    def run(model):
        wrapped = nn.parallel.DistributedDataParallel(model, **options)
        if cast:
            forward = wrapped.module.forward
            vars(model)["forward"] = lambda **inputs: type(out := forward(**inputs))(loss=out.loss, logits=out.logits.double())
        try:
            for _ in range(2):
                wrapped.zero_grad()
                out = wrapped(input_ids=IDS, labels=LABELS)
                OF_OUTPUTS[use](out).backward()
        finally:
            vars(model).pop("forward", None)
        return {n: p.grad.clone() for n, p in model.named_parameters()}, out.logits

    made = materialised(models[1]).total()
    (want, theirs), (got, mine) = map(run, models)
    assert_close(got, want, 1e-5)
    torch.testing.assert_close(mine.detach().clone(), theirs.detach())
    assert use != "loss" or materialised(models[1]).total() == made + 1  # by the comparison


@pytest.mark.filterwarnings("ignore:unswag")
def test_accelerates_operations():
    from accelerate import Accelerator
    from accelerate.utils import convert_outputs_to_fp32
    from accelerate.utils.operations import concatenate, pad_across_processes, recursively_apply

    model, out = returned()
    with torch.no_grad():
        want = model(input_ids=IDS).logits
    accelerator = Accelerator(cpu=True)
    logits = pad_across_processes(accelerator.gather_for_metrics({"logits": out.logits.detach()}), dim=1)["logits"]
    assert torch.equal(logits, want) and torch.equal(concatenate([out.logits, out.logits]).detach(), torch.cat([want, want]))
    assert torch.equal(recursively_apply(lambda t: t.detach() * 1, {"logits": out.logits})["logits"], want)
    before = materialised(model).total()
    with torch.autocast("cpu", torch.bfloat16):
        out = convert_outputs_to_fp32(model.forward)(input_ids=IDS, labels=LABELS)
    assert isinstance(out.logits, LazyLogits) and out.logits.dtype == torch.float32 and materialised(model).total() == before


@pytest.mark.skipif(os.name != "posix", reason="gloo with a file store")
@pytest.mark.filterwarnings("ignore:unswag")
@pytest.mark.parametrize("use", ["loss", "both", "logits"])
def test_fully_sharded(use, one_rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = make()
    OF_OUTPUTS[use](model(input_ids=IDS, labels=LABELS)).backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    patch(model)
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    out = model(input_ids=IDS, labels=LABELS)
    assert isinstance(out.logits, LazyLogits)
    OF_OUTPUTS[use](out).backward()
    assert_close({n: p.grad.full_tensor() for n, p in model.named_parameters()}, want, 1e-5)


@pytest.mark.parametrize("saved", [["embed_tokens"], ["embed_tokens", "lm_head"], ["lm_head"]], ids=str)
def test_a_tied_head_that_peft_saves(saved):
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], modules_to_save=saved, ensure_weight_tying=True
    )
    model = get_peft_model(make("llama tied"), settings).train()
    model(input_ids=IDS, labels=LABELS).loss.backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    _, out = returned(model)
    out.loss.backward()
    assert_close({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, want, 1e-5)


def test_prompt_tuning_lengthens_the_labels():
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(make(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)).train()
    model(input_ids=IDS, labels=LABELS).loss.backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    _, out = returned(model)
    assert out.logits.shape == (2, 22, V)
    out.loss.backward()
    assert_close({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, want, 1e-5)


@pytest.mark.parametrize("name", ["spectral_norm", "weight_norm"])
def test_surgery_does_not_read_a_parametrized_head(name):
    model = make()
    getattr(nn.utils.parametrizations, name)(model.lm_head)
    before = {k: b.clone() for k, b in model.named_buffers()}
    left = patch(model)
    assert len(left) == 1 and "parametrized" in left[0]
    assert all(torch.equal(b, before[k]) for k, b in model.named_buffers())


# ---- models with a forward of their own -----------------------------------------------------------------------------------


def own(use):
    """A Llama whose forward makes its loss of logits by `use(head, hidden, labels)`."""

    class Own(LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None, **kwargs):
            hidden = self.model(input_ids).last_hidden_state
            return types.SimpleNamespace(loss=use(self.lm_head, hidden, labels))

    model = make()
    model.__class__ = Own
    return model


def rows_loss(logits, labels):
    return F.cross_entropy(logits.view(-1, V), labels.reshape(-1))


OWN = {
    "checkpointed head": lambda head, x, y: rows_loss(checkpoint(head, x, use_reentrant=False), y),
    "checkpointed loss": lambda head, x, y: checkpoint(rows_loss, head(x), y, use_reentrant=False),
    "checkpointed both": lambda head, x, y: checkpoint(lambda x: rows_loss(head(x), y), x, use_reentrant=False),
    "reentrant both": lambda head, x, y: checkpoint(lambda x: rows_loss(head(x), y), x, use_reentrant=True),
    "reentrant loss": lambda head, x, y: checkpoint(rows_loss, head(x), y, use_reentrant=True),
    "offloaded": lambda head, x, y: offloaded(lambda: rows_loss(head(x), y)),
    "row by row": lambda head, x, y: sum(F.cross_entropy(z.float(), row) for z, row in zip(head(x), y, strict=True)),
    "twice": lambda head, x, y: rows_loss(head(x), y) + head(x / 2).logsumexp(-1).mean(),
    "masked": lambda head, x, y: rows_loss(head(x).float().masked_fill(torch.arange(V) > 60, -1e4), y),
    "penalised": lambda head, x, y: (lambda z: rows_loss(z, y) + z.logsumexp(-1).square().mean())(head(x)),
    "transposed": lambda head, x, y: rows_loss(head(x.transpose(0, 1))[1:].reshape(-1, V), y.t()[1:]),
    "transposed logits": lambda head, x, y: F.cross_entropy(head(x).transpose(1, 2), y),
    "without gradients": lambda head, x, y: rows_loss(head(x), head(x).argmax(-1)),
}


def offloaded(run):
    with torch.autograd.graph.save_on_cpu():
        return run()


@pytest.mark.filterwarnings("ignore:unswag")
@pytest.mark.parametrize("name", OWN)
def test_a_forward_of_its_own(name):
    model = own(OWN[name])
    labels = LABELS.clamp_min(0)
    results = []
    for surgery in (lambda model: None, patch):
        surgery(model)
        model.zero_grad()
        loss = model(input_ids=IDS, labels=labels).loss
        loss.backward()
        results.append((loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}))
    (theirs, want), (mine, got) = results
    torch.testing.assert_close(mine, theirs)
    assert_close(got, want, 1e-5)


@pytest.mark.filterwarnings("ignore:unswag")
def test_metrics_under_inference_mode():
    _, out = returned()
    with torch.inference_mode():
        best = out.logits.argmax(-1)
    (out.loss + out.logits.logsumexp(-1).mean()).backward()
    assert best.shape == (2, 17)


@pytest.mark.filterwarnings("ignore:unswag")
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_over_what_was_returned(reentrant):
    model, out = returned()
    (out.loss + checkpoint(ce, out.logits, use_reentrant=reentrant)).backward()
    got = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    (2 * ce(model(input_ids=IDS).logits)).backward()
    assert_close(got, {n: p.grad.clone() for n, p in model.named_parameters()}, 1e-5)
