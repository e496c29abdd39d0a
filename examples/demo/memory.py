"""Peak memory of one training step against the length of the sequence, for one way of training, in a process of its own.

python -m examples.demo.memory '[way, lengths, length of the curve, budget in bytes]' RESULT
"""

from __future__ import annotations

import gc
import json
import os
import threading
import time
from collections.abc import Callable

from examples.demo.ways import Way, arguments, quiet, write
from examples.resident import forget_peak, resident

STEP = 64  # tokens: the longest length is found to this
TRIES = 2  # runs spent on finding it


class Curve(threading.Thread):
    """Samples the resident memory of this process every hundredth of a second."""

    POINTS = 300

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.samples: list[tuple[float, int]] = []
        self._ended = threading.Event()

    def run(self) -> None:
        page, start = os.sysconf("SC_PAGE_SIZE"), time.monotonic()
        ended = False
        while not ended:
            ended = self._ended.wait(0.01)
            with open("/proc/self/statm") as f:
                self.samples.append((time.monotonic() - start, int(f.read().split()[1]) * page))

    def end(self) -> None:
        self._ended.set()
        self.join()

    def above(self, idle: int) -> list[tuple[float, int]]:
        """At most `POINTS` pairs: the share of the time that had passed, and the most bytes above `idle` around then."""
        whole, width = self.samples[-1][0] or 1, -(-len(self.samples) // self.POINTS)
        groups = [self.samples[i : i + width] for i in range(0, len(self.samples), width)]
        return [(round(group[-1][0] / whole, 4), max(nbytes for _, nbytes in group) - idle) for group in groups]


def longest(peaks: dict[int, int], budget: int, measure: Callable[[int], int]) -> int:
    """The longest length, of those measured here or before, whose peak is within `budget` bytes; 0 if there is none.

    Lengths are tried where a straight line through the measured `peaks` (length → bytes) crosses the budget; they are added.
    """
    for _ in range(TRIES):
        fits = [n for n, peak in peaks.items() if peak <= budget]
        over = [n for n, peak in peaks.items() if peak > budget]
        low, high = max(fits, default=0), min(over, default=0)
        if high and high - low <= STEP:
            break
        one, two = (low, high) if low and high else sorted(peaks)[-2:] if low else sorted(peaks)[:2]
        slope = (peaks[two] - peaks[one]) / (two - one)
        guess = int(one + (budget - peaks[one]) / slope) // STEP * STEP if slope > 0 else 0
        guess = min(max(guess, low + STEP), high - STEP if high else 4 * low)
        if guess <= 0 or guess in peaks:
            break
        peaks[guess] = measure(guess)
    return max((n for n, peak in peaks.items() if peak <= budget), default=0)


def main() -> None:
    quiet()
    (way, lengths, length_of_curve, budget), result = arguments()
    from examples.smollm2 import text

    from unswag import audit

    model = Way(**way).load()
    curve: list[tuple[float, int]] = []

    def step(tokens: int) -> None:
        ids = text(tokens)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    def measure(tokens: int) -> int:
        model.zero_grad(set_to_none=True)
        gc.collect()
        forget_peak()
        sampled = Curve() if tokens == length_of_curve and not curve else None
        if sampled:
            sampled.start()
        step(tokens)
        if sampled:
            sampled.end()
            curve.extend(sampled.above(idle))
        return resident("VmHWM") - idle

    text(max(lengths))  # what the tokenizer needs is loaded before anything is measured
    ids = text(min(lengths))
    ledger = audit(model, input_ids=ids, labels=ids, use_cache=False)
    step(STEP)  # and so are the libraries
    model.zero_grad(set_to_none=True)
    gc.collect()
    idle = resident("VmRSS")
    peaks = {tokens: measure(tokens) for tokens in lengths}
    found = {
        "way": way,
        "idle_bytes": idle,
        "saved_bytes_per_token": (ledger.alive or 0) / ledger.tokens,
        "peaks_above_idle_bytes": dict(peaks),
        "longest": longest(peaks, budget, measure),
        "tried_bytes": peaks,
        "curve": curve,
    }
    write(result, json.dumps(found))


if __name__ == "__main__":
    main()
