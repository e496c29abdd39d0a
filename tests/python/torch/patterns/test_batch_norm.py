"""What follows BatchNorm is made again from its input: the same bits, statistics counted once, and less kept."""

from __future__ import annotations

import copy

import matrix
import pytest
import torch
from alone import Alone
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from unswag.torch import apply_unswag_surgery, audit
from unswag.torch.patterns.batch_norm import BatchNorm, batch_norm_again, recipe_of
from unswag.torch.patterns.relu import KEPT
from unswag.torch.stash import Stash

alone = Alone(BatchNorm())
DTYPES = (torch.float32, torch.bfloat16)


def same_bits(a, b):
    return torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))


def drawn(module):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for t in (*module.parameters(), *module.buffers()):
            if t.is_floating_point():
                t.copy_(torch.rand(t.shape, generator=generator) + 0.1)
    return module


def examples():
    def build():
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3)).train()

    return {"of images": matrix.Example(build, lambda dtype: {"input": torch.randn(4, 3, 9, 9).to(dtype)}, "1", apart=0)}


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("settings", [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}], ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 7), (3, 5, 4, 9), (1, 5, 2, 3, 4)], ids=str)
def test_the_output_made_again_has_its_bits(shape, settings, training, dtype):
    module = drawn((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[len(shape) - 3](5, **settings).to(dtype)).train(training)
    assert alone.probe(alone.candidate(module)) is None
    x = torch.randn(shape).to(dtype)
    x.view(-1)[:2] = torch.tensor([float("inf"), -0.0])
    recipe = recipe_of(module, x)
    buffers = copy.deepcopy(list(module.buffers()))
    y = module(x)
    changed = not all(same_bits(a, b) for a, b in zip(buffers, module.buffers(), strict=True))
    assert changed == (training and settings != {"track_running_stats": False})
    after = copy.deepcopy(list(module.buffers()))
    assert same_bits(batch_norm_again(x, *recipe[0], **recipe[1]), y)
    assert all(same_bits(a, b) for a, b in zip(after, module.buffers(), strict=True))


@pytest.mark.parametrize("training", [True, False])
def test_the_number_of_threads_does_not_matter(training):
    module, x = drawn(nn.BatchNorm2d(64)).train(training), torch.randn(8, 64, 14, 14)
    recipe, y = recipe_of(module, x), module(x)
    torch.set_num_threads(2)  # the fixture takes it back
    assert same_bits(batch_norm_again(x, *recipe[0], **recipe[1]), y)


def test_no_recipe_where_sums_depend_on_threads():
    module = nn.BatchNorm2d(8)
    x = torch.randn(2, 8, 5, 5)
    assert recipe_of(module, x) is not None
    for other in (x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3), torch.randn(2, 8, 1, 1)):
        assert recipe_of(module, other) is None
    assert recipe_of(nn.BatchNorm1d(8), torch.randn(9, 8)) is None
    assert recipe_of(module.eval(), x.contiguous(memory_format=torch.channels_last)) is not None


def test_others_are_left():
    class Own(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) + 1

    assert not list(BatchNorm().find(nn.Sequential(Own(3), nn.SyncBatchNorm(3), nn.GroupNorm(1, 3), nn.InstanceNorm2d(3))))


class Block(nn.Module):
    """The basic block of torchvision, with one ReLU in place for both."""

    def __init__(self, width, inplace):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=inplace)

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


class Net(nn.Module):
    def __init__(self, inplace=True, checkpointed=None, width=16):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(inplace), nn.MaxPool2d(2))
        self.blocks = nn.ModuleList(Block(width, inplace) for _ in range(3))
        self.head = nn.Linear(width, 4)
        self.gradient_checkpointing = checkpointed is not None
        if checkpointed is not None:
            import functools

            self._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=checkpointed)

    def forward(self, images, labels):
        x = self.stem(images)
        for block in self.blocks:
            x = self._gradient_checkpointing_func(block.__call__, x) if self.gradient_checkpointing else block(x)
        return F.cross_entropy(self.head(x.mean((2, 3))).float(), labels)


def data(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4, 3, 18, 18, generator=generator).to(dtype)
    return {"images": images, "labels": torch.tensor([0, 1, 2, 3])}


def step(model, batch):
    model.zero_grad()
    loss = model(**batch)
    loss.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [loss.detach(), *gradients, *(b.clone() for b in model.buffers())]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("mode", ["train", "eval", "frozen", "channels_last"])
def test_resnet_blocks_keep_less_and_count_statistics_once(mode, inplace, dtype):
    stock = Net(inplace).to(dtype)
    batch = data(dtype)
    if mode == "eval":
        stock.eval()
    elif mode == "frozen":
        stock.requires_grad_(False)
        stock.blocks[2].requires_grad_(True)
    elif mode == "channels_last":
        stock.to(memory_format=torch.channels_last)
        batch["images"] = batch["images"].contiguous(memory_format=torch.channels_last)
    ours = copy.deepcopy(stock)
    apply_unswag_surgery(ours)
    before, after = audit(stock, **batch), audit(ours, **batch)
    assert all(torch.equal(a, b) for a, b in zip(step(ours, batch), step(stock, batch), strict=True))
    assert after.alive <= 0.85 * before.alive and after.total <= after.alive <= after.total + 4
    assert all(torch.equal(a, b) for a, b in zip(step(ours, batch), step(stock, batch), strict=True))


def test_every_other_sum_of_a_residual_chain_is_made_again():
    ours = Net()
    apply_unswag_surgery(ours)
    step(ours, data())
    kept = [dict(+vars(block.relu)[KEPT]) for block in ours.blocks]
    # the ReLU after bn1 always; that after the sum where the block's input is kept, and is itself no such sum
    assert kept == [{"recipe": 1, "bitmap + non-zeros": 1}, {"recipe": 2}, {"recipe": 1, "mask": 1}]


class Odd(nn.Module):
    """A block whose sum is not what the graph says, or is another."""

    def __init__(self, way):
        super().__init__()
        torch.manual_seed(0)
        self.block, self.way = Block(8, False), way

    def forward(self, x):
        block = self.block
        x = block.relu(block.bn1(block.conv1(x)))
        out = total = block.bn2(block.conv2(x))
        if self.way == "in place":
            total += x
        elif self.way == "before":
            out.detach().mul_(2)
            total += x
        elif self.way == "apart":
            total = out + x
        elif self.way == "after":
            total = out + x
            total.detach().mul_(2)
        elif self.way == "operand":
            x.detach().mul_(2)
            total = out + x
        elif self.way == "alpha":
            total = torch.add(out, x, alpha=2)
        elif self.way == "broadcast":
            one = block.bn2(block.conv2(x)[:1])
            total = out + one
        elif self.way == "twice":
            total = out + out
        return F.conv2d(block.relu(total), block.conv1.weight).square().sum()


@pytest.mark.parametrize("way", ["in place", "apart", "twice", "before", "after", "operand", "alpha", "broadcast"])
def test_a_sum_is_made_again_only_from_what_it_was_made_of(way):
    x = torch.randn(2, 8, 6, 6)
    stock, ours = Odd(way), Odd(way)
    apply_unswag_surgery(ours)
    loss = ours(x)
    recipes = vars(ours.block.relu)[KEPT]["recipe"]
    assert recipes == (2 if way in ("in place", "apart", "twice") else 1)
    if way == "operand":  # stock refuses: the ReLU's own result was changed
        with pytest.raises(RuntimeError, match="inplace"):
            stock(x).backward()
        return
    loss.backward()
    stock(x).backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(ours.parameters(), stock.parameters(), strict=True))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("inplace", [True, False])
def test_checkpointed_blocks(inplace, reentrant):
    stock = Net(inplace, reentrant)
    ours = copy.deepcopy(stock)
    apply_unswag_surgery(ours)
    assert all(torch.equal(a, b) for a, b in zip(step(ours, data()), step(stock, data()), strict=True))


def test_statistics_changed_before_the_backward_change_no_gradient():
    """torch bumps no version when a training step writes to running statistics."""
    ours = Net().eval()
    apply_unswag_surgery(ours)
    block, x, w = ours.blocks[0], torch.randn(2, 16, 8, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    want = torch.autograd.grad((F.relu(block.bn1(x)) * w).sum(), w)[0]
    with Stash():
        loss = (block.relu(block.bn1(x)) * w).sum()
    assert vars(block.relu)[KEPT] == {"recipe": 1}
    before = block.bn1.running_mean.clone()
    block.bn1.train()(torch.randn(2, 16, 8, 8) + 9)
    assert not torch.equal(before, block.bn1.running_mean)
    assert torch.equal(torch.autograd.grad(loss, w)[0], want)


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("frozen", [False, True])
def test_resnet_of_transformers(frozen, dtype, kind):
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[2, 2], layer_type=kind, num_labels=4)
    stock = ResNetForImageClassification(config).to(dtype).train()
    if frozen:
        stock.resnet.requires_grad_(False)
        stock.resnet.encoder.stages[1].requires_grad_(True)
    ours = copy.deepcopy(stock)
    batch = {"pixel_values": torch.randn(2, 3, 48, 48).to(dtype), "labels": torch.tensor([1, 2])}
    report = apply_unswag_surgery(ours)
    before, after = audit(stock, **batch), audit(ours, **batch)
    assert after.alive <= 0.75 * before.alive and after.total <= after.alive <= after.total + 4
    results = []
    for model in (ours, stock):
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        results.append([loss, *gradients, *model.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert report.relus_kept["recipe"] and report.relus_kept["mask"]
