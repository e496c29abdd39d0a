"""What is counted of a step, and that counting changes nothing."""

from bench.live import LiveStorages
from tests.python.torch.small_models import batch, tiny_llama

from unswag import apply_unswag_surgery, audit


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


def test_the_count_of_an_operated_model_is_that_of_its_audit():
    model = tiny_llama(layers=2)
    report = apply_unswag_surgery(model, verbose=False)
    data = batch(64)
    with LiveStorages(model, list(data.values())) as live:
        live.forward(lambda: model(**data).loss).backward()
        assert live.loss_buffers == 0 and live.peak > 0
    with LiveStorages(model, list(data.values())) as live:
        loss = live.forward(lambda: model(**data).loss)
        kept, buffers = live.bytes, live.loss_buffers
    ledger = audit(model, **data)
    assert not report.logits_made and buffers == ledger.loss_buffers > 0
    assert abs(kept - ledger.alive) <= 0.02 * ledger.alive
    assert loss.requires_grad
