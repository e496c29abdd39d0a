"""Instruction data: from .jsonl files to packed rows of tokens, ready for a trainer.

    data = unswag.prepare_data("train.jsonl", tokenizer, max_length=2048)
    Trainer(model, args, train_dataset=data, data_collator=data.collator)

A line has one of these forms. The form is recognised line by line, so a file may mix them:
    {"instruction": …, "input": …, "output": …}     Alpaca; `input`, `system` and `history` are optional
    {"messages": [{"role": …, "content": …}, …]}    the last one is the assistant's; `tools` and `system` are optional
    {"conversations": [{"from": …, "value": …}, …]} ShareGPT, likewise
    {"prompt": …, "completion": …}                  texts, or lists of messages
    {"text": …}                                     the model is trained on all of it
The answers have labels. Everything else is masked with -100, and so is an answer whose message says "weight": 0,
"train": false or "loss": false. Sequences are packed, best fit decreasing, into rows of at most `max_length` tokens. Position
ids start at 0 in each sequence, so attention stays inside it (`Collator` says what this requires). The report names every part
of a line that was ignored. docs/data.md describes all of this in detail.

Memory is bounded by one batch of lines plus a few bytes per sequence: tokens are written to a temporary file and read through
a memory map. The same input gives the same bytes.

Files on disk (in the temporary folder, or written by `save`), all little-endian:
    tokens.bin     uint32 per token: the id in bits 0 to 30, bit 31 set if the token has a label
    sequences.bin  int64, n + 1 values: where sequence i starts in tokens.bin
    order.bin      int64, n values: the sequences in the order in which they are packed
    packs.bin      int64, rows + 1 values: where row i starts in order.bin
    manifest.json  written last: version, size and SHA-256 of each file, counts, max_length, pad id
"""

from unswag.extras import missing

try:
    import orjson  # noqa: F401
except ModuleNotFoundError as error:
    missing("unswag.data", error, "torch")

from unswag.data.dataset import IGNORE, Collator, PackedDataset
from unswag.data.lines import DataError, quarantine_path
from unswag.data.prepare import prepare_data
from unswag.data.report import Counts, Report

__all__ = ["IGNORE", "Collator", "Counts", "DataError", "PackedDataset", "Report", "prepare_data", "quarantine_path"]
