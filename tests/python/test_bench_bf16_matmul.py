"""The benches' bf16 products: fp32 sums of the same numbers, rounded once, in any shape and with any strides."""

import pytest
import torch
from bench import bf16_matmul

SHAPES = [(1, 1, 1), (6, 16, 384), (7, 17, 385), (200, 600, 50), (800, 530, 3), (5, 3, 0), (16, 576, 1000)]


def laid_out(rows, cols, how):
    whole = torch.randn(2 * rows, 2 * cols).bfloat16()
    if how == "rows":
        return whole[:rows, :cols]
    return whole[::2, ::2] if how == "apart" else torch.randn(cols, rows).bfloat16().t()


def close(out, exact):
    """To one rounding: the sums differ in their order only."""
    torch.testing.assert_close(
        out.float(), exact, rtol=2**-8, atol=1e-5 * max(1.0, exact.abs().max().item() if exact.numel() else 1.0)
    )
    assert (out != exact.bfloat16()).float().mean().item() < 0.02 if out.numel() > 1000 else True


@pytest.mark.parametrize("layout", ["rows", "apart", "transposed"])
@pytest.mark.parametrize("m, n, k", SHAPES)
def test_product(m, n, k, layout):
    torch.manual_seed(0)
    a, b = laid_out(m, k, layout), laid_out(k, n, layout)
    out = laid_out(m, n, layout)
    bias = torch.randn(n).bfloat16().expand(m, n)
    close(bf16_matmul._product(a, b, torch.empty(m, n, dtype=torch.bfloat16)), a.float() @ b.float())
    exact = 0.5 * bias.float() + 2 * (a.float() @ b.float())
    assert bf16_matmul._product(a, b, out, bias=bias, beta=0.5, alpha=2.0) is out
    close(out, exact)


def test_a_result_may_be_its_own_bias_and_keeps_nan_unless_beta_is_zero():
    a = torch.randn(40, 30).bfloat16()
    out = torch.ones(40, 40, dtype=torch.bfloat16)
    close(bf16_matmul._addmm_(out, a, a.t()), a.float() @ a.float().t() + 1)
    out[3, 4] = float("nan")
    bf16_matmul._addmm_(out, a, a.t())
    assert out.isnan().sum() == 1 and out[3, 4].isnan()
    close(bf16_matmul._addmm_(out, a, a.t(), beta=0), a.float() @ a.float().t())


def test_rounds_to_nearest_even():
    halfway = torch.tensor([[1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8), 2.0**-133 * 1.5]])
    parts = torch.stack([halfway.bfloat16()[0], (halfway - halfway.bfloat16().float()).bfloat16()[0]])  # their sum is exact
    ones = torch.ones(1, 2, dtype=torch.bfloat16)
    out = bf16_matmul._product(ones, parts, torch.empty(1, 4, dtype=torch.bfloat16))
    assert torch.equal(out, halfway.bfloat16())


@pytest.mark.parametrize("tokens, keys, kv_heads, width, causal", [
    (1, 1, 1, 16, True), (97, 97, 4, 64, True), (250, 250, 2, 64, True), (250, 250, 4, 32, False), (100, 130, 2, 64, False),
])  # fmt: skip
def test_attention_backward(tokens, keys, kv_heads, width, causal):
    torch.manual_seed(0)
    q, dy = (torch.randn(2, tokens, 4, width).bfloat16().transpose(1, 2) for _ in range(2))
    k, v = (torch.randn(2, keys, kv_heads, width).bfloat16().transpose(1, 2) for _ in range(2))
    y, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
    inputs = dy, q, k, v, y
    exact = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*(x.float() for x in inputs), lse, 0.0, causal)
    for out, right in zip(bf16_matmul._attention_backward(*inputs, lse, 0.0, causal), exact, strict=True):
        assert (out.shape, out.dtype, out.stride()) == (right.shape, torch.bfloat16, right.bfloat16().stride())
        close(out, right)


def test_attention_that_it_cannot_do_is_an_error():
    x = torch.ones(1, 1, 4, 24, dtype=torch.bfloat16)
    with pytest.raises(NotImplementedError, match="multiple of 16"):
        bf16_matmul._attention_backward(x, x, x, x, x, torch.ones(1, 1, 4), 0.0, True)
