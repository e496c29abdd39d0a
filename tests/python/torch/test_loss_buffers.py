"""Which storages are the gradient buffers of a loss, for the audit."""

import torch

from unswag.torch import loss_buffers


def test_loss_buffers_are_known_while_they_live():
    buffer = torch.zeros(4)
    key = buffer.untyped_storage()._cdata
    assert not loss_buffers.is_loss_buffer(key)
    loss_buffers.mark_loss_buffer(buffer[1:])
    assert loss_buffers.is_loss_buffer(key)
    registered = loss_buffers.entries()
    del buffer
    assert not loss_buffers.is_loss_buffer(key)
    loss_buffers.mark_loss_buffer(torch.zeros(2))
    assert loss_buffers.entries() <= registered  # the dead one is forgotten: a later storage there is not taken for it
