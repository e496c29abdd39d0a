"""Instruction data: from .jsonl to packed token rows that a trainer takes.

    data = unswag.prepare_data("train.jsonl", tokenizer, max_length=2048)
    Trainer(model, args, train_dataset=data, data_collator=data.collator)

A line is one of (found out line by line, so that a file may mix them)
    {"instruction": …, "input": …, "output": …}     Alpaca; input may be missing, `system` and `history` may be there
    {"messages": [{"role": …, "content": …}, …]}    the last one from the assistant; `tools` and `system` may stand beside it
    {"conversations": [{"from": …, "value": …}, …]} ShareGPT, likewise
    {"prompt": …, "completion": …}                  texts, or lists of messages
    {"text": …}                                     all of it is learnt
What the model is to write has labels; everything else is masked with -100, and so is an answer whose message says
"weight": 0, "train": false or "loss": false.  Sequences are packed best fit decreasing into rows of at most `max_length`
tokens; position ids start at 0 with each sequence, so attention stays inside it (`Collator` says what that takes).
What of a line is neither used nor refused stands in the report, by name.  docs/data.md has all of this at length.

Memory is bounded by one batch of lines plus a few bytes per sequence: tokens go to a temporary file and are read through a
memory map.  The same input gives the same bytes.

On disk (a spool in the temporary folder, or what `save` writes), all little-endian:
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
