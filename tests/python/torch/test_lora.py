"""add_lora by itself; tests/python/torch/patterns/test_lora.py holds it against PEFT's layers."""

from __future__ import annotations

import pytest
import torch

from unswag.torch.lora import TILE, TILE_ELEMENTS, Adapter, add_lora, tiles

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16


@pytest.mark.parametrize("p", [0.0, pytest.param(0.4, marks=pytest.mark.native)])
@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck(p, bias):
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, dtype=F64, generator=g, requires_grad=True)

    base, x, a, b = draw(5, 7), draw(5, 8), draw(3, 8), draw(7, 3)
    shift = draw(7) if bias else None
    assert torch.autograd.gradcheck(
        lambda *t: add_lora(t[0], t[1], [Adapter(t[2], t[3], t[4] if bias else None, 0.7, p, 11)]),
        (base, x, a, b, *([shift] if bias else [])),
    )


def test_mixed_dtypes_are_an_error():
    with pytest.raises(TypeError, match=r"torch\.bfloat16, torch\.float32; convert all"):
        add_lora(torch.zeros(2, 7), torch.zeros(2, 8), [Adapter(torch.zeros(3, 8), torch.zeros(7, 3, dtype=BF16), None, 1.0)])


@pytest.mark.parametrize("cols", [0, 1, 2048, 14336, 1 << 23])
def test_tiles_of_cuda_are_large_and_begin_on_a_block_of_draws(cols):
    for rows in (0, 3, 9_001):
        made = tiles(rows, cols, F32, cuda=True)
        assert [i for tile in made for i in range(tile.start, tile.stop)] == list(range(rows))
        assert all(tile.start % 4 == 0 and max(tile.stop - tile.start, 4) * cols <= TILE_ELEMENTS * 2 for tile in made)
        assert len(made) <= rows * cols // TILE_ELEMENTS * 2 + 1
        assert len(tiles(rows, cols, BF16, cuda=True)) == min(rows, 1)
        assert len(tiles(rows, cols, F32, cuda=False)) == -(-rows // TILE)
