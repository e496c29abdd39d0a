"""The peak of a step of a model whose head and embedding share a weight."""

from bench.live import LiveStorages
from tests.python.torch.small_models import batch, tiny_llama


def test_the_sum_of_the_gradients_of_a_shared_weight_is_its_gradient():
    peaks = []
    for tie in (False, True):
        model = tiny_llama(layers=1)
        model.resize_token_embeddings(1000)  # so that these gradients are the largest of all
        if tie:
            model.lm_head.weight = model.model.embed_tokens.weight
        data = batch(8)
        with LiveStorages(model, list(data.values())) as live:
            live.forward(lambda m=model, d=data: m(**d).loss).backward()
        peaks.append(live.peak)
    assert peaks[0] == peaks[1] > 0
