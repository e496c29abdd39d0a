"""The ledger: what was kept for the backward pass, row by row, to the byte. Framework-neutral."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Row:
    """One tensor saved for backward.

    module  dotted name of the module that ran when it was saved ("" for the model itself)
    role    mlp, residual, attention, checkpoint, logits, …
    shape   of the saved tensor;  dtype  its name without the framework: "bfloat16"
    bits    kept per element: 16.0 for a bfloat16 kept as it is, 0.0 when it is made again or shared with another row
    tier    where it is: "device", or how it costs nothing: "recipe" (made again), "shared" (same storage as another row)
    bytes   kept for this row; a storage is counted once, at its full size, however many tensors see it
    """

    module: str
    role: str
    shape: tuple[int, ...]
    dtype: str
    bits: float
    tier: str
    bytes: int


@dataclass
class Ledger:
    """The rows, and beside them what was counted without the door.

    tokens        tokens of the batch, for `bytes_per_token`
    alive         bytes of the storages really alive after the forward (counted by weak references), if counted
    loss_buffers  bytes of the loss's own gradient buffers, not in `total` and not in `alive`
    weight_copies bytes of autocast's copies of weights, not in `total` and not in `alive`
    """

    rows: list[Row] = field(default_factory=list)
    tokens: int = 0
    alive: int | None = None
    loss_buffers: int = 0
    weight_copies: int = 0

    @property
    def total(self) -> int:
        """Bytes kept by all rows."""
        return sum(row.bytes for row in self.rows)
