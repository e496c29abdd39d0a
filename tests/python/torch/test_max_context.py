"""The search for the longest context that trains."""

from __future__ import annotations

import pytest

from unswag.torch.max_context import _search, find_max_context

CONFIG = dict(model_type="llama", hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4,
              num_key_value_heads=2, vocab_size=500)  # fmt: skip


@pytest.mark.parametrize("limit", [900, 1024, 1090, 1500])
def test_it_ends_at_a_context_that_was_tried_and_trains(limit):
    tried = []
    found = _search(lambda n: tried.append(n) or n <= limit, 1024, 12)
    assert found in tried and found <= limit and limit - found < 2 * 64 + 0.05 * limit


def test_nothing_trains():
    assert _search(lambda n: False, 1024, 3) == 0


@pytest.mark.slow
def test_steps_in_processes_of_their_own():
    found = find_max_context(CONFIG, "60MiB", most_tries=3, verbose=False)
    assert found.context and any(t.trains and t.peak for t in found.tries)
    assert "predicted" in str(found) and found.to_json()
