"""linear_cross_entropy against float64, and what it may and may not keep, write and accept."""

import math

import pytest
import torch
from near import SEED, assert_as_near
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn import functional as F

from unswag.torch import loss as loss_module
from unswag.torch.loss import LossOptions, check_labels, head_cross_entropy, linear_cross_entropy

ROWS, HIDDEN, CLASSES = 37, 24, 101


def sample(dtype=torch.float32, rows=ROWS, seed=0, ignored=5):
    g = torch.Generator().manual_seed(seed + SEED)
    hidden = (2 * torch.randn(rows, HIDDEN, generator=g)).to(dtype).requires_grad_()
    weight = torch.randn(CLASSES, HIDDEN, generator=g).to(dtype).requires_grad_()
    bias = torch.randn(CLASSES, generator=g).to(dtype).requires_grad_()
    labels = torch.randint(0, CLASSES, (rows,), generator=g)
    labels[:ignored] = -100
    return hidden, weight, bias, labels


def stock(hidden, weight, labels, bias=None, class_weight=None, softcap=0.0, logit_scale=1.0, **options):
    z = F.linear(hidden, weight, bias) * logit_scale
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    return F.cross_entropy(z, labels, weight=class_weight, **options)


def in_float64(hidden, weight, labels, bias=None, class_weight=None, **options):
    """(loss, gradients) of the formula itself, from the same numbers in float64."""
    leaves = [None if t is None else t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
    weights = None if class_weight is None else class_weight.double()
    loss = stock(leaves[0], leaves[1], labels, leaves[2], weights, **options)
    loss.sum().backward()
    return loss.detach(), [t.grad for t in leaves if t is not None]


def error(ours, truth):
    return ((ours.double() - truth).norm() / truth.norm()).item()


OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "smoothing": {"label_smoothing": 0.1},
    "softcap": {"softcap": 5.0},
    "scale": {"logit_scale": 0.3},
    "class weights": {"class_weight": True, "label_smoothing": 0.2, "softcap": 4.0, "logit_scale": 1.7, "bias": True},
}


@pytest.mark.native
@pytest.mark.parametrize("chunk_rows", [1, 5, 32, 1000])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", OPTIONS)
def test_float64_equals_the_formula(name, reduction, chunk_rows):
    options = dict(OPTIONS[name])
    hidden, weight, bias, labels = sample(torch.float64)
    bias = bias if options.pop("bias", None) else None
    weights = torch.rand(CLASSES, dtype=torch.float64) + 0.1 if options.pop("class_weight", None) else None
    truth, gradients = in_float64(hidden, weight, labels, bias, weights, reduction=reduction, **options)
    ours = linear_cross_entropy(
        hidden, weight, labels, bias=bias, class_weight=weights, reduction=reduction, chunk_rows=chunk_rows, **options
    )
    assert ours.dtype == torch.float64 and ours.shape == truth.shape
    torch.testing.assert_close(ours, truth, rtol=1e-13, atol=1e-13)
    for got, want in zip(
        torch.autograd.grad(ours.sum(), [t for t in (hidden, weight, bias) if t is not None]), gradients, strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)


@pytest.mark.native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_further_from_float64_than_stock(dtype):
    """With many classes stock's float32 softmax loses digits; in 16 bits both round the logits and their gradient."""
    g = torch.Generator().manual_seed(1 + SEED)
    hidden = torch.randn(257, 64, generator=g).to(dtype).requires_grad_()
    weight = (0.5 * torch.randn(8192, 64, generator=g)).to(dtype).requires_grad_()
    labels = torch.randint(0, 8192, (257,), generator=g)
    truth, gradients = in_float64(hidden, weight, labels)
    plain = F.cross_entropy(F.linear(hidden, weight).float(), labels)
    ours = linear_cross_entropy(hidden, weight, labels, chunk_rows=64)
    results = [[loss.detach(), *torch.autograd.grad(loss, (hidden, weight))] for loss in (ours, plain)]
    assert results[0][1].dtype == results[0][2].dtype == dtype
    draw = [[x.double() for x in each] for each in (*results, (truth, *gradients))]
    assert_as_near([draw], 8192, torch.finfo(dtype).eps / 2 if dtype != torch.float32 else 0)


@pytest.mark.native
@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_only_what_is_asked_for_is_made(frozen, monkeypatch):
    leaves = dict(zip(("hidden", "weight", "bias", "labels"), sample(), strict=True))
    labels = leaves.pop("labels")
    _, gradients = in_float64(leaves["hidden"], leaves["weight"], labels, leaves["bias"])
    leaves[frozen].requires_grad_(False)
    kept = []
    monkeypatch.setattr(loss_module.loss_buffers, "mark_loss_buffer", kept.append)
    loss = linear_cross_entropy(leaves["hidden"], leaves["weight"], labels, bias=leaves["bias"])
    assert [t.shape for t in kept] == [t.shape for name, t in leaves.items() if name != frozen]
    loss.backward()
    for (name, leaf), want in zip(leaves.items(), gradients, strict=True):
        if name == frozen:
            assert leaf.grad is None
        else:
            assert error(leaf.grad, want) < 1e-6


@pytest.mark.native
def test_without_gradients_only_the_loss_is_made(monkeypatch):
    hidden, weight, _, labels = sample()
    truth, _ = in_float64(hidden, weight, labels)
    calls = []
    op = loss_module.ops.cross_entropy_
    monkeypatch.setattr(loss_module.ops, "cross_entropy_", lambda *a: (calls.append(a[-1]), op(*a))[1])
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, labels)
    assert calls == [False] and not loss.requires_grad
    assert abs(loss - truth) < 1e-5
    assert not linear_cross_entropy(hidden.detach(), weight.detach(), labels).requires_grad


@pytest.mark.native
def test_what_is_saved_is_dhidden_and_dweight():
    hidden, weight, bias, labels = sample(torch.bfloat16)
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (held.append(t.detach()), t.detach())[1], lambda t: t):
        linear_cross_entropy(hidden, weight, labels, bias=bias, chunk_rows=3)
    assert sorted(t.nbytes for t in held) == sorted(2 * t.numel() for t in (hidden, weight, bias))


@pytest.mark.native
def test_logits_are_never_made_in_full():
    """The largest tensor that any operation makes is a chunk of logits or dweight."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in torch.utils._pytree.tree_leaves(out):
                if isinstance(t, torch.Tensor) and t is not weight:
                    self.size = max(self.size, t.numel())
            return out

    hidden = torch.randn(512, HIDDEN, requires_grad=True)
    weight = torch.randn(CLASSES, HIDDEN, requires_grad=True)
    labels = torch.randint(0, CLASSES, (512,))
    with Largest() as largest:
        linear_cross_entropy(hidden, weight, labels, chunk_rows=16).backward()
    assert largest.size == 512 * HIDDEN  # hidden itself; logits would be 512 * CLASSES


@pytest.mark.native
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_linear_in_the_cotangent(reduction):
    hidden, weight, _, labels = sample(torch.float64)
    cotangent = torch.rand(ROWS, dtype=torch.float64) - 0.5 if reduction == "none" else torch.tensor(1 / 3, dtype=torch.float64)
    want = torch.autograd.grad(stock(hidden, weight, labels, reduction=reduction), (hidden, weight), cotangent)
    got = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels, reduction=reduction), (hidden, weight), cotangent)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)


@pytest.mark.native
def test_a_bf16_gradient_is_scaled_by_the_cotangent_and_not_by_its_rounding():
    hidden, weight, _, labels = sample(torch.bfloat16)
    once = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), weight)[0]
    third = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels) / 3, weight)[0]
    assert torch.equal(third, (once.double() * torch.tensor(1 / 3).double()).bfloat16())


@pytest.mark.native
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_twice_with_retain_graph(scale, reduction):
    """A leaf keeps the tensor it is given as its .grad and adds to it in place: it must not be the saved one."""
    hidden, weight, _, labels = sample(torch.float64)
    truth = torch.autograd.grad(stock(hidden, weight, labels, reduction=reduction).sum() * scale, (hidden, weight))
    loss = linear_cross_entropy(hidden, weight, labels, reduction=reduction).sum() * scale
    loss.backward(retain_graph=True)
    loss.backward(retain_graph=True)
    hidden.grad.zero_()
    loss.backward()
    torch.testing.assert_close(hidden.grad, truth[0])
    torch.testing.assert_close(weight.grad, 3 * truth[1])
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.native
def test_the_last_backward_copies_nothing():
    hidden, weight, _, labels = sample()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.data_ptr()), t.detach())[1], lambda t: t):
        loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward()
    assert [hidden.grad.data_ptr(), weight.grad.data_ptr()] == saved[:2]


@pytest.mark.native
def test_double_backward_is_refused():
    """For a sum or mean at once: hidden and weight are not saved, so a penalty's gradient would vanish without a word."""
    hidden, weight, _, labels = sample(torch.float64)
    for reduction in ("mean", "sum"):
        loss = linear_cross_entropy(hidden, weight, labels, reduction=reduction)
        with pytest.raises(NotImplementedError, match="differentiated once"):
            torch.autograd.grad(loss, hidden, create_graph=True)
    losses = linear_cross_entropy(hidden, weight, labels, reduction="none")
    (dhidden,) = torch.autograd.grad(losses.sum(), hidden, create_graph=True)
    for leaf in (hidden, weight):
        with pytest.raises(NotImplementedError, match="differentiated once"):
            torch.autograd.grad(dhidden.pow(2).sum(), leaf, retain_graph=True)


@pytest.mark.native
def test_arguments_are_not_written_to():
    hidden, weight, bias, labels = sample()
    weights = torch.rand(CLASSES)
    arguments = (hidden, weight, bias, labels, weights)
    before = [(t.detach().clone(), t._version) for t in arguments]
    cotangent = torch.rand(ROWS)
    loss = linear_cross_entropy(hidden, weight, labels, bias=bias, class_weight=weights, reduction="none")
    loss.backward(cotangent.clone())
    linear_cross_entropy(hidden, weight, labels, bias=bias, class_weight=weights).backward()
    for t, (was, version) in zip(arguments, before, strict=True):
        assert torch.equal(t, was) and t._version == version


@pytest.mark.native
def test_accumulation_over_an_uneven_window_equals_one_batch():
    hidden, weight, _, labels = sample(torch.float64, ignored=3)
    items = (labels != -100).sum()
    want = torch.autograd.grad(stock(hidden, weight, labels), weight)[0]
    total = 0.0
    for part in (slice(0, 16), slice(16, 32), slice(32, 37)):
        loss = linear_cross_entropy(hidden[part], weight, labels[part], num_items=items)
        loss.backward()
        total += loss.item()
    torch.testing.assert_close(weight.grad, want)
    assert math.isclose(total, stock(hidden, weight, labels).item(), rel_tol=1e-12)


@pytest.mark.native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_all_labels_ignored(dtype):
    hidden, weight, _, labels = sample(dtype)
    labels.fill_(-100)
    loss = linear_cross_entropy(hidden, weight, labels)
    assert loss.isnan() and stock(hidden, weight, labels).isnan()
    for gradient in torch.autograd.grad(loss, (hidden, weight)):
        assert not gradient.any() and gradient.isfinite().all()
    loss = linear_cross_entropy(hidden, weight, labels, num_items=7)
    assert loss == 0
    assert not any(g.any() for g in torch.autograd.grad(loss, (hidden, weight)))
    assert linear_cross_entropy(hidden[:0], weight, labels[:0], reduction="sum") == 0


@pytest.mark.native
def test_no_items_at_all_is_no_gradient_of_zero():
    """Losses divided by 0 items, as in PyTorch: nobody may take that for a step."""
    hidden, weight, _, labels = sample()
    loss = linear_cross_entropy(hidden, weight, labels, num_items=0)
    assert loss == math.inf and not torch.autograd.grad(loss, hidden)[0][5:].isfinite().any()


def test_losses_are_summed_in_float64():
    losses = torch.tensor([2.0**24, 1, 1, 1, 1])
    assert loss_module.reduced(losses, 1.0) == 2.0**24 + 4


@pytest.mark.native
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_labels_of_any_integer_type(dtype):
    hidden, weight, _, labels = sample(torch.float64, ignored=0)
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels.to(dtype)), stock(hidden, weight, labels))


@pytest.mark.native
def test_float64_is_not_narrowed_by_autocast():
    hidden, weight, _, labels = sample(torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels)
    torch.testing.assert_close(loss, stock(hidden, weight, labels))


@pytest.mark.native
@pytest.mark.parametrize("ignore_index", [-100, CLASSES])
def test_ignored_rows_do_not_reach_the_head(ignore_index):
    hidden, weight, _, labels = sample()
    labels = labels.where(labels != -100, ignore_index)
    with torch.no_grad():
        hidden[:5] = math.nan
    loss = linear_cross_entropy(hidden, weight, labels, ignore_index=ignore_index)
    loss.backward()
    assert loss.isfinite() and weight.grad.isfinite().all() and not hidden.grad[:5].any()


@pytest.mark.native
@pytest.mark.parametrize("ignore_index", [-100, 7, -1])
def test_ignore_index(ignore_index):
    hidden, weight, _, labels = sample(torch.float64)
    labels = labels.where(labels != -100, ignore_index)
    torch.testing.assert_close(
        linear_cross_entropy(hidden, weight, labels, ignore_index=ignore_index),
        stock(hidden, weight, labels, ignore_index=ignore_index),
    )


@pytest.mark.native
def test_float16_gradients_do_not_vanish_in_the_division_by_the_rows():
    """softmax / rows is 2e-10 here; float16 ends at 6e-8."""
    items, classes = 2**22, 1024
    hidden = torch.zeros(4, 8, dtype=torch.float16, requires_grad=True)
    weight = torch.zeros(classes, 8, dtype=torch.float16)
    weight[1:, 0] = 1
    loss = linear_cross_entropy(hidden, weight, torch.zeros(4, dtype=torch.int64), num_items=items)
    (dhidden,) = torch.autograd.grad(loss, hidden, torch.tensor(65536.0))
    want = 65536 / items * (classes - 1) / classes
    assert abs(dhidden[:, 0].double() - want).max() < 1e-2 * want


@pytest.mark.native
def test_dweight_of_16_bit_products_is_summed_in_float32():
    """3 (1 + 2^-7) / 8, the sum of a chunk, is no bfloat16: 341 of them rounded alike would be 0.26 % off."""
    hidden = torch.full((1023, 4), 1 + 2**-7)
    weight, bias = torch.zeros(8, 4, requires_grad=True), torch.zeros(8, requires_grad=True)
    labels = torch.zeros(1023, dtype=torch.int64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels, bias=bias, reduction="sum", chunk_rows=341)
        (got,) = torch.autograd.grad(loss, bias)
        torch.testing.assert_close(got, torch.tensor([-7.0] + [1.0] * 7) * (1023 / 8), rtol=1e-6, atol=0)
        loss = linear_cross_entropy(hidden, weight, labels, reduction="sum", chunk_rows=3)
    (got,) = torch.autograd.grad(loss, weight)
    want = torch.full_like(got, 1023 * (1 + 2**-7) / 8)
    want[0] *= -7
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


@pytest.mark.native
@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
def test_under_autocast(hidden_dtype):
    hidden, weight, bias, labels = sample()
    hidden = hidden.detach().to(hidden_dtype).requires_grad_()
    _, gradients = in_float64(hidden, weight, labels, bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = F.cross_entropy(F.linear(hidden, weight, bias).float(), labels)
        ours = linear_cross_entropy(hidden, weight, labels, bias=bias, chunk_rows=8)
    theirs = torch.autograd.grad(plain, (hidden, weight, bias))
    mine = torch.autograd.grad(ours, (hidden, weight, bias))
    assert ours.dtype == torch.float32 and abs(ours - plain) < 1e-2
    assert all(a.dtype == b.dtype for a, b in zip(mine, theirs, strict=True))
    assert_as_near([[[x.double() for x in each] for each in (mine, theirs, gradients)]], 100, 2**-8)


@pytest.mark.native
def test_autocast_leaves_no_copy_of_the_weight_without_a_graph():
    """A weight cast under no_grad would stay in autocast's cache and cut the gradient of a later use."""
    hidden, weight, _, labels = sample()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        linear_cross_entropy(hidden, weight, labels)
        assert F.linear(hidden.detach(), weight).requires_grad


@pytest.mark.native
def test_tied_weight_gets_the_sum():
    torch.manual_seed(0)
    table = torch.randn(CLASSES, HIDDEN, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(0, CLASSES, (ROWS,))
    mix = torch.randn(HIDDEN, HIDDEN, dtype=torch.float64)
    want = torch.autograd.grad(stock(F.embedding(tokens, table) @ mix, table, tokens), table)
    got = torch.autograd.grad(linear_cross_entropy(F.embedding(tokens, table) @ mix, table, tokens), table)
    torch.testing.assert_close(got, want)


@pytest.mark.native
def test_strided_hidden_of_any_rank():
    hidden = torch.randn(3, HIDDEN, 9, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(HIDDEN, CLASSES, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, CLASSES, (9, 3)).T
    want = torch.autograd.grad(stock(hidden.mT.reshape(-1, HIDDEN), weight.T, labels.reshape(-1)), (hidden, weight))
    got = torch.autograd.grad(linear_cross_entropy(hidden.mT, weight.T, labels, chunk_rows=4), (hidden, weight))
    torch.testing.assert_close(got, want)


@pytest.mark.native
def test_chunks_hold_at_most_the_limit(monkeypatch):
    hidden, weight, _, labels = sample(ignored=0)
    sizes = []
    op = loss_module.ops.cross_entropy_
    monkeypatch.setattr(loss_module.ops, "cross_entropy_", lambda *a: (sizes.append(a[0].numel()), op(*a))[1])
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 10 * CLASSES + 50)
    linear_cross_entropy(hidden, weight, labels)
    assert sum(sizes) == ROWS * CLASSES and max(sizes) <= 10 * CLASSES and len(sizes) == 4


def test_chunks_of_a_gpu_are_larger():
    assert [loss_module.rows_of_chunk(128256, cuda) for cuda in (False, True)] == [130, 1024]
    assert [loss_module.rows_of_chunk(1000, cuda) for cuda in (False, True)] == [16777, 16777]


def test_sums_of_16_bit_products_take_no_float32_copies_on_a_gpu(monkeypatch):
    """On tensors that say they are on a GPU; that the call works there is for `make gpu-check`."""
    calls = []
    monkeypatch.setattr(torch, "addmm", lambda *args, **options: calls.append((args, options)))
    with FakeTensorMode():
        a, b = (torch.zeros(3, n, dtype=torch.bfloat16, device="cuda") for n in (5, 4))
        total = torch.zeros(5, 4, device="cuda")
        loss_module._add_product(total, a.T, b)
    ((args, options),) = calls
    assert args[0] is total and options["out"] is total and options["out_dtype"] == torch.float32
    assert all(tensor.dtype == torch.bfloat16 for tensor in args[1:])


# ---- a head that is called -------------------------------------------------------------------------------------------------


class Adapter(torch.nn.Module):
    """A frozen Linear with a trained rank-2 update, and a tanh that keeps its own output."""

    def __init__(self, dtype):
        super().__init__()
        self.base = torch.nn.Linear(HIDDEN, CLASSES, bias=False, dtype=dtype).requires_grad_(False)
        self.a = torch.nn.Linear(HIDDEN, 2, bias=False, dtype=dtype)
        self.b = torch.nn.Linear(2, CLASSES, bias=False, dtype=dtype)
        self.unused = torch.nn.Parameter(torch.ones(3, dtype=dtype))

    def forward(self, x):
        return torch.tanh(self.base(x) + self.b(self.a(x)))


@pytest.mark.native
@pytest.mark.parametrize(
    "options", [{}, {"reduction": "sum"}, {"num_items": 11}, {"softcap": 0.5, "logit_scale": 2.0}], ids=str
)
def test_head_that_is_called(options):
    torch.manual_seed(0)
    head = Adapter(torch.float64)
    hidden, _, _, labels = sample(torch.float64)
    trained = [p for p in head.parameters() if p.requires_grad]
    z = head(hidden) * options.get("logit_scale", 1)
    if "softcap" in options:
        z = options["softcap"] * torch.tanh(z / options["softcap"])
    sums = options.get("reduction") == "sum" or "num_items" in options
    want = F.cross_entropy(z, labels, reduction="sum" if sums else "mean") / options.get("num_items", 1)
    got = head_cross_entropy(head, trained, CLASSES, hidden, labels, options=loss_module.LossOptions(chunk_rows=7, **options))
    torch.testing.assert_close(got, want)
    mine = torch.autograd.grad(got, [hidden, *trained])
    theirs = torch.autograd.grad(want, [hidden, *trained], materialize_grads=True, allow_unused=True)
    torch.testing.assert_close(mine, theirs)
    assert all(p.grad is None for p in head.parameters())


@pytest.mark.native
def test_gradients_of_a_16_bit_head_are_summed_in_float32():
    """1000 chunks of one row, each with 1/2 for every class but the label's: in bfloat16 the sum would stop at 128."""
    bias = torch.zeros(2, dtype=torch.bfloat16, requires_grad=True)
    hidden = torch.zeros(1000, 2, dtype=torch.bfloat16)
    options = loss_module.LossOptions(reduction="sum", chunk_rows=1)
    loss = head_cross_entropy(lambda x: x + bias, (bias,), 2, hidden, torch.zeros(1000, dtype=torch.int64), options=options)
    assert torch.autograd.grad(loss, bias)[0].tolist() == [-500, 500]


@pytest.mark.native
def test_head_saves_pass_no_hooks():
    head = Adapter(torch.float32)
    hidden, _, _, labels = sample()
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (held.append(t.detach()), t.detach())[1], lambda t: t):
        head_cross_entropy(head, (head.a.weight,), CLASSES, hidden, labels)
    assert [t.shape for t in held] == [hidden.shape, head.a.weight.shape]


@pytest.mark.native
def test_head_of_another_width_is_an_error():
    hidden, _, _, labels = sample()
    with pytest.raises(ValueError, match=r"expected \(32, 101\)"):
        head_cross_entropy(lambda x: x, (), CLASSES, hidden, labels)
    with pytest.raises(ValueError, match='"none" is not supported'):
        head_cross_entropy(
            Adapter(torch.float32), (), CLASSES, hidden, labels, options=loss_module.LossOptions(reduction="none")
        )


# ---- errors ----------------------------------------------------------------------------------------------------------------


def test_label_out_of_range_is_named():
    hidden, weight, _, labels = sample()
    for bad in (CLASSES, -1, -101, 2**40):
        wrong = labels.clone()
        wrong[9] = bad
        with pytest.raises(ValueError, match=rf"labels\[9\] is {bad}, outside \[0, {CLASSES}\).*-100.*tokenizer"):
            linear_cross_entropy(hidden, weight, wrong)
    with pytest.raises(ValueError, match=r"labels\[1, 3\] is 5"):
        check_labels(torch.tensor([[0, 0, 0], [0, 0, 5]]), 5, shifted=1)
    check_labels(torch.tensor(3), 5)


@pytest.mark.parametrize(
    ("change", "error_type", "message"),
    [
        ({"weight": torch.zeros(CLASSES, 3)}, ValueError, r"hidden \(37, 24\) and weight \(101, 3\)"),
        ({"weight": torch.zeros(CLASSES, HIDDEN, dtype=torch.float64)}, TypeError, "torch.float32 but weight torch.float64"),
        ({"weight": torch.zeros(CLASSES, HIDDEN, dtype=torch.int32)}, TypeError, "weight has dtype torch.int32"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, ValueError, r"labels \(3,\) do not fit hidden \(37, 24\)"),
        ({"labels": torch.zeros(ROWS)}, TypeError, "labels have dtype torch.float32"),
        ({"labels": torch.zeros(ROWS, dtype=torch.bool)}, TypeError, "labels have dtype torch.bool"),
        (
            {"hidden": torch.zeros(4, 9, HIDDEN), "labels": torch.zeros(9, 4, dtype=torch.int64)},
            ValueError,
            r"labels \(9, 4\) do not fit hidden \(4, 9, 24\)",
        ),
        ({"bias": torch.zeros(3)}, ValueError, "bias has shape"),
        ({"class_weight": torch.zeros(3)}, ValueError, "class_weight has shape"),
        ({"reduction": "average"}, ValueError, "'average'"),
        ({"reduction": "sum", "num_items": 3}, ValueError, "num_items"),
        ({"chunk_rows": 0}, ValueError, "chunk_rows is 0; pass a positive number of rows"),
        ({"chunk_rows": 1.5}, TypeError, "chunk_rows is 1.5; pass a positive number of rows"),
        ({"labels": [1]}, TypeError, "labels are a list; pass a torch.Tensor"),
        (
            {"num_items": torch.tensor([5, 6])},
            ValueError,
            r"num_items is tensor.*of shape \[2\]; pass a number, or a tensor",
        ),
        ({"num_items": torch.tensor(1j)}, TypeError, "num_items is tensor"),
        ({"label_smoothing": 2}, ValueError, "label_smoothing is 2"),
        ({"softcap": -1}, ValueError, "softcap is -1"),
    ],
    ids=lambda x: ",".join(x) if isinstance(x, dict) else None,
)
def test_bad_arguments(change, error_type, message):
    hidden, weight, _, labels = sample()
    arguments = {"hidden": hidden, "weight": weight, "labels": labels} | change
    with pytest.raises(error_type, match=message):
        linear_cross_entropy(arguments.pop("hidden"), arguments.pop("weight"), arguments.pop("labels"), **arguments)


@pytest.mark.parametrize("num_items", [0, -2, 2.5, torch.tensor(0), torch.tensor([4])], ids=str)
def test_any_number_of_items_divides_as_in_transformers(num_items):
    """That of a batch without labels is 0, and transformers divides by it."""
    hidden, weight, _, some = sample()
    for labels in (some, torch.full_like(some, -100)):
        want = F.cross_entropy(F.linear(hidden, weight), labels, reduction="sum") / num_items
        torch.testing.assert_close(
            linear_cross_entropy(hidden, weight, labels, num_items=num_items), want.squeeze(), equal_nan=True
        )


def test_the_value_of_num_items_is_not_looked_at_by_the_checks():
    loss_module.check_inputs(torch.ones(2, 3), torch.tensor([0, 1]), 2, LossOptions(num_items=torch.ones(1, device="meta")))


def test_tensor_subclass_is_refused():
    class Sharded(torch.Tensor):
        pass

    hidden, weight, _, labels = sample()
    with pytest.raises(NotImplementedError, match="weight is a Sharded"):
        linear_cross_entropy(hidden, weight.detach().as_subclass(Sharded), labels)


# ---- transforms of torch.func, forward mode, constants -----------------------------------------------------------------------


def by_head(hidden, weight, labels, bias, **options):
    return head_cross_entropy(
        lambda x: F.linear(x, weight, bias), (weight, bias), CLASSES, hidden, labels, options=LossOptions(**options)
    )


def by_weight(hidden, weight, labels, bias, **options):
    return linear_cross_entropy(hidden, weight, labels, bias=bias, **options)


TRANSFORMED = [{}, {"softcap": 4.0, "logit_scale": 0.5}, {"label_smoothing": 0.1}, {"reduction": "sum"}, {"num_items": 7.0}]


@pytest.mark.parametrize("ours", [by_weight, by_head])
@pytest.mark.parametrize("options", TRANSFORMED, ids=str)
def test_transforms(options, ours):
    """Gradient, tangent, batch and second derivative are the formula's, and so is forward mode outside torch.func."""
    hidden, weight, bias, labels = (t.detach() for t in sample(torch.float64))
    tangents = tuple(torch.randn_like(t) for t in (hidden, weight, bias))
    shared = options.get("num_items")
    plain = {k: v for k, v in options.items() if k != "num_items"} | ({"reduction": "sum"} if shared else {})

    def mine(*leaves):
        return ours(*leaves[:2], labels, leaves[2], **options)

    def truth(*leaves):
        return stock(*leaves[:2], labels, leaves[2], **plain) / (shared or 1)

    def forward_mode(f):
        with forward_ad.dual_level():
            made = f(*map(forward_ad.make_dual, (hidden, weight, bias), tangents))
            return forward_ad.unpack_dual(made).tangent

    transforms = {
        "grad": lambda f: torch.func.grad(f, (0, 1, 2))(hidden, weight, bias),
        "jvp": lambda f: torch.func.jvp(f, (hidden, weight, bias), tangents),
        "vmap": lambda f: torch.func.vmap(lambda w: f(hidden, w, bias))(torch.stack([weight, 2 * weight])),
        "hvp": lambda f: torch.func.jvp(torch.func.grad(f, 1), (hidden, weight, bias), tangents),
        "forward mode": forward_mode,
    }
    for transform in transforms.values():
        torch.testing.assert_close(transform(mine), transform(truth))


def test_gradients_of_each_sample():
    hidden, weight, _, labels = (t.detach() for t in sample())
    labels[:5] = 3
    each = torch.func.vmap(torch.func.grad(lambda w, x, y: linear_cross_entropy(x[None], w, y[None])), (None, 0, 0))
    want = torch.func.vmap(torch.func.grad(lambda w, x, y: F.cross_entropy(F.linear(x[None], w), y[None])), (None, 0, 0))
    torch.testing.assert_close(each(weight, hidden, labels), want(weight, hidden, labels))


@pytest.mark.parametrize("tangent", ["hidden", "weight", "bias"])
def test_the_tangent_of_each_argument_counts(tangent):
    given = dict(zip(("hidden", "weight", "bias"), (t.detach().double() for t in sample()[:3]), strict=True))
    labels = sample()[3]
    with forward_ad.dual_level():
        given[tangent] = forward_ad.make_dual(given[tangent], torch.ones_like(given[tangent]))
        got = forward_ad.unpack_dual(by_weight(labels=labels, **given)).tangent
        want = forward_ad.unpack_dual(stock(labels=labels, **given)).tangent
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", ["class_weight", "num_items"])
def test_a_constant_that_requires_grad_is_refused(name):
    hidden, weight, _, labels = sample()
    constant = (torch.rand(CLASSES) + 1 if name == "class_weight" else torch.tensor(5.0)).requires_grad_()
    for loss in (
        lambda: linear_cross_entropy(hidden, weight, labels, **{name: constant}),
        lambda: head_cross_entropy(
            lambda x: F.linear(x, weight), (weight,), CLASSES, hidden, labels, options=LossOptions(**{name: constant})
        ),
    ):
        with pytest.raises(ValueError, match=rf"{name} requires grad.*{name}\.detach\(\)"):
            loss()
    with torch.no_grad():
        linear_cross_entropy(hidden, weight, labels, **{name: constant})
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(constant.detach(), torch.ones_like(constant))
        with pytest.raises(ValueError, match="requires grad"):
            linear_cross_entropy(hidden, weight, labels, **{name: dual})


def test_beside_swept_layers_chunks_are_small():
    from unswag.torch import loss

    classes = 49_152
    assert loss.rows_of_chunk(classes, False) == 341
    with loss.beside_swept_layers():
        assert loss.rows_of_chunk(classes, False) == 256
        assert loss.rows_of_chunk(1 << 20, False) == 16
        assert loss.rows_of_chunk(classes, True) == 1024
    assert loss.rows_of_chunk(classes, False) == 341
