"""From .jsonl to packed rows: what is learnt, what is refused, and that nothing is lost on the way."""

import contextlib
import copy
import gc
import gzip
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import pickle
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

import unswag
from unswag.data import DataError, PackedDataset, lines, prepare_data, quarantine_path
from unswag.data import prepare as prepare_module
from unswag.data.dataset import pack
from unswag.data.disk import ARRAYS
from unswag.data.text import Encoder

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|im_start|>", "<|im_end|>", "<pad>", "<s>")


def tokenizer(template=None, merges=(), bos=False, pad="<pad>"):
    """A byte-level tokenizer: one token per byte, and the merges that are asked for."""
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate([*letters, *SPECIAL, *("".join(m) for m in merges)])}
    inner = Tokenizer(models.BPE(vocabulary, list(merges)))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    names = {"eos_token": "<|im_end|>", "pad_token": pad, "bos_token": "<s>" if bos else None}
    out = PreTrainedTokenizerFast(
        tokenizer_object=inner, additional_special_tokens=["<|im_start|>"], **{k: v for k, v in names.items() if v}
    )
    if bos:
        from tokenizers.processors import TemplateProcessing

        out.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", out.bos_token_id)])
    out.chat_template = template
    return out


def write(path: Path, *records, raw=None):
    if raw is not None:
        path.write_bytes(raw)
    else:
        path.write_bytes(b"".join(json.dumps(r, ensure_ascii=False).encode() + b"\n" for r in records))
    return path


def prepare(path, max_length=256, tok=None, **options):
    return prepare_data(path, tok or tokenizer(), max_length, **({"verbose": False} | options))


def rows_of(data):
    """(text, learnt text) of each sequence, in the order in which the rows hold them."""
    out = []
    tok = tokenizer(bos=True)  # has all the special tokens
    for row in data:
        for begin, n in zip(np.cumsum([0, *row["seq_lengths"]]), row["seq_lengths"], strict=False):
            ids, labels = row["input_ids"][begin : begin + n], row["labels"][begin : begin + n]
            out.append((tok.decode(ids), tok.decode(labels[labels != -100])))
    return out


ROW = {"instruction": "Add.", "input": "1 + 1", "output": "2"}


# ---- what is learnt ---------------------------------------------------------------------------------------------------------


def test_alpaca_form(tmp_path):
    data = prepare(write(tmp_path / "a.jsonl", ROW, {"instruction": "Say hello.", "output": "Hello!"}), 512)
    (first, learnt), (second, learnt_too) = rows_of(data)
    assert first.endswith("### Instruction:\nAdd.\n\n### Input:\n1 + 1\n\n### Response:\n2<|im_end|>")
    assert "further context" in first and "further context" not in second and "### Input" not in second
    assert (learnt, learnt_too) == ("2<|im_end|>", "Hello!<|im_end|>")


def test_chat_template_is_taken_if_there_is_one(tmp_path):
    path = write(tmp_path / "a.jsonl", ROW)
    ((text, learnt),) = rows_of(prepare(path, tok=tokenizer(CHATML)))
    assert text == "<|im_start|>user\nAdd.\n\n1 + 1<|im_end|>\n<|im_start|>assistant\n2<|im_end|>"
    assert learnt == "2<|im_end|>"
    ((text, _),) = rows_of(prepare(path, tok=tokenizer(CHATML), template="alpaca"))
    assert "### Response:" in text


def test_every_answer_of_a_conversation_is_learnt(tmp_path):
    messages = [
        {"role": r, "content": c}
        for r, c in (("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    ]
    ((text, learnt),) = rows_of(prepare(write(tmp_path / "m.jsonl", {"messages": messages}), tok=tokenizer(CHATML)))
    assert learnt == "b<|im_end|>\nd<|im_end|>"
    assert text.count("<|im_start|>") == 5


def test_prompt_and_completion(tmp_path):
    path = write(tmp_path / "p.jsonl", {"prompt": "1, 2,", "completion": " 3"})
    assert rows_of(prepare(path)) == [("1, 2, 3<|im_end|>", " 3<|im_end|>")]
    turns = {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}
    ((_, learnt),) = rows_of(prepare(write(tmp_path / "c.jsonl", turns), tok=tokenizer(CHATML)))
    assert learnt == "b<|im_end|>"


def test_columns(tmp_path):
    path = write(tmp_path / "q.jsonl", {"question": "Why?", "context": "So.", "answer": "Because."})
    data = prepare(path, columns={"instruction": "question", "input": "context", "output": "answer"})
    ((text, learnt),) = rows_of(data)
    assert "So." in text and learnt == "Because.<|im_end|>"
    with pytest.raises(DataError, match=r"the field 'answer' is missing"):
        prepare(
            write(tmp_path / "r.jsonl", {"question": "Why?", "answer": "x"}, {"question": "Why?"}),
            columns={"instruction": "question", "output": "answer"},
        )


def test_bos_starts_a_plain_text_but_not_a_chat(tmp_path):
    path = write(tmp_path / "p.jsonl", {"prompt": "a", "completion": "b"})
    assert rows_of(prepare(path, tok=tokenizer(bos=True))) == [("<s>ab<|im_end|>", "b<|im_end|>")]
    chat = write(tmp_path / "a.jsonl", ROW)
    assert not rows_of(prepare(chat, tok=tokenizer(CHATML, bos=True)))[0][0].startswith("<s>")
    tok = tokenizer()
    tok.bos_token = "<s>"  # has one, but does not put it there, as GPT-2's
    assert rows_of(prepare(path, tok=tok)) == [("ab<|im_end|>", "b<|im_end|>")]


def test_the_end_is_learnt_even_if_it_is_the_padding_token(tmp_path):
    tok = tokenizer(pad=None)
    tok.pad_token = tok.eos_token
    data = prepare(
        write(tmp_path / "p.jsonl", {"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "bcd"}),
        tok=tok,
        packing=False,
    )
    batch = data.collator([data[0], data[1]])
    assert batch["labels"].tolist() == [
        [-100, data[0]["input_ids"][1], tok.eos_token_id, -100, -100],
        data[1]["labels"].tolist(),
    ]
    assert batch["input_ids"][0, 3:].tolist() == [tok.eos_token_id] * 2


def test_a_token_across_the_border_is_learnt_and_counted(tmp_path):
    path = write(tmp_path / "p.jsonl", {"prompt": "xa", "completion": "by"}, {"prompt": "x", "completion": "y"})
    data = prepare(path, tok=tokenizer(merges=[("a", "b")]), packing=False)
    assert data.counts.merged == 1 and data.counts.kept == 2
    assert data[0]["labels"].tolist()[0] == -100 and (data[0]["labels"][1:] == data[0]["input_ids"][1:]).all()
    assert len(data[0]["input_ids"]) == 4  # x ab y EOS


def test_first_token_of_a_sequence_is_never_learnt(tmp_path):
    """In a row it would be predicted from the sequence before."""
    data = prepare(write(tmp_path / "p.jsonl", *[{"prompt": "", "completion": "abc"}] * 3))
    assert len(data) == 1
    starts = np.flatnonzero(data[0]["position_ids"] == 0)
    assert len(starts) == 3 and (data[0]["labels"][starts] == -100).all()
    assert (data[0]["labels"] != -100).sum() == 9


def test_a_template_that_rewrites_the_past_is_refused(tmp_path):
    template = CHATML.replace("m['content']", "(m['content'] if loop.last else '…')")
    turns = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))]
    with pytest.raises(DataError, match="writes message 1 differently when others follow"):
        prepare(write(tmp_path / "m.jsonl", {"messages": turns}), tok=tokenizer(template))
    thinking = CHATML.replace("m['content']", "(m['content'] if loop.last or m['role'] == 'user' else '…')")
    with pytest.raises(DataError, match="writes message 1 differently when others follow"):  # only the answer is rewritten
        prepare(write(tmp_path / "o.jsonl", {"messages": turns}), tok=tokenizer(thinking))
    with pytest.raises(DataError, match="template refuses it: roles must alternate"):
        prepare(
            write(tmp_path / "n.jsonl", {"messages": turns}), tok=tokenizer("{{ raise_exception('roles must alternate') }}")
        )


# ---- lengths and packing ----------------------------------------------------------------------------------------------------


def sized(tmp_path, *sizes):
    return write(tmp_path / "s.jsonl", *[{"prompt": "p", "completion": "x" * (n - 2)} for n in sizes])


def test_too_long(tmp_path):
    path = sized(tmp_path, 10, 11, 9)
    data = prepare(path, 10)
    assert sorted(data.lengths) == [9, 10] and data.counts.dropped == {"too long": 1}
    data = prepare(path, 10, too_long="truncate")
    assert sorted(data.lengths) == [9, 10, 10] and data.counts.truncated == 1
    path = write(tmp_path / "t.jsonl", {"prompt": "p" * 20, "completion": "x"}, {"prompt": "p", "completion": "x"})
    assert prepare(path, 10, too_long="truncate").counts.dropped == {"prompt too long": 1}
    with pytest.raises(ValueError, match=r"no usable line.*3 read.*'too long': 3.*larger max_length"):
        prepare(sized(tmp_path, 10, 11, 9), 8)


def test_best_fit_decreasing():
    order, packs = pack(np.array([2, 7, 5, 3, 4, 9]), 10)
    rows = [order[a:b].tolist() for a, b in itertools.pairwise(packs)]
    assert rows == [[0], [1, 3], [2, 4], [5]]  # 9 | 7 + 3 | 5 + 4 | 2: every row but the last is as full as it can be


@given(st.lists(st.integers(1, 50), min_size=1, max_size=200), st.integers(50, 120))
@settings(deadline=None)
def test_packing_keeps_every_sequence_once_and_is_tight(lengths, capacity):
    lengths = np.array(lengths)
    order, packs = pack(lengths, capacity)
    assert sorted(order) == list(range(len(lengths)))
    used = np.add.reduceat(lengths[order], packs[:-1])
    assert used.max() <= capacity and used.sum() == lengths.sum()
    assert sum(used) > capacity * (len(used) - 1) / 2  # two rows never fit into one
    rows = [order[a:b].tolist() for a, b in itertools.pairwise(packs)]
    assert rows == sorted(rows) and all(row == sorted(row) for row in rows)


def test_rows_say_where_sequences_begin(tmp_path):
    data = prepare(sized(tmp_path, 4, 6, 5, 3), 10)
    assert len(data) == 2
    for row in data:
        n = row["seq_lengths"]
        assert row["position_ids"].tolist() == [i for k in n for i in range(k)]
        assert len(row["input_ids"]) == len(row["labels"]) == n.sum() <= 10
    assert Counter(n for row in data for n in row["seq_lengths"]) == Counter([4, 6, 5, 3])
    with pytest.raises(IndexError):
        data[2]
    assert data[-1]["input_ids"].tolist() == data[1]["input_ids"].tolist()


def test_collator_pads_with_a_sequence_of_its_own(tmp_path):
    data = prepare(sized(tmp_path, 4, 6, 9), 10)
    batch = data.collator([data[0], data[1]])
    assert {k: tuple(v.shape) for k, v in batch.items()} == dict.fromkeys(("input_ids", "labels", "position_ids"), (2, 10))
    assert batch["position_ids"][1].tolist() == [*range(9), 0]
    assert batch["labels"][1, 9] == -100
    tok = tokenizer()
    assert data.pad == tok.pad_token_id != tok.eos_token_id and batch["input_ids"][1, 9] == data.pad
    alone = prepare(sized(tmp_path, 4, 9), 10, tok=tokenizer(pad=None), packing=False)
    batch = alone.collator([alone[0], alone[1]])
    assert batch["position_ids"][0].tolist() == [*range(4), *range(5)]
    assert batch["input_ids"][0, 4:].tolist() == [tok.eos_token_id] * 5 and (batch["labels"][0, 4:] == -100).all()


def test_same_bytes_whatever_the_batch_size(tmp_path, monkeypatch):
    path = sized(tmp_path, *range(3, 60))
    folders = []
    for batch in (1, 7, 1000):
        monkeypatch.setattr(prepare_module, "BATCH_ROWS", batch)
        folders.append(tmp_path / f"out{batch}")
        prepare(path, 100).save(folders[-1])
    first, *others = (
        [(f / name).read_bytes() for name in ("tokens.bin", "order.bin", "packs.bin", "manifest.json")] for f in folders
    )
    assert all(other == first for other in others)


def test_long_lines_make_small_batches(tmp_path, monkeypatch):
    sizes = []
    encode = Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda self, texts: (sizes.append(len(texts)), encode(self, texts))[1])
    monkeypatch.setattr(prepare_module, "BATCH_BYTES", 100)
    prepare(sized(tmp_path, 4, 4, 4, 4, 4, 200, 4))
    assert sizes == [3, 3, 1]


SAME_BYTES = """
import sys, unswag
class Letters:
    eos_token_id, bos_token_id, pad_token_id, chat_template = 0, None, None, None
    def __call__(self, texts, **options):
        return {"input_ids": [[ord(c) for c in t] for t in texts] if isinstance(texts, list) else []}
unswag.prepare_data(sys.argv[1], Letters(), 60, on_error="skip", verbose=False).save(sys.argv[2])
"""


def test_same_bytes_whatever_the_hash_seed(tmp_path):
    lines = [json.dumps({"prompt": f"p{i}", "completion": "x" * (i % 23)}).encode() for i in range(1, 200)]
    path = write(tmp_path / "p.jsonl", raw=b"\n".join([*lines, b"{", b"17", b'{"a": 1}', b'{"prompt": "p"}']))
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(unswag.__file__).parents[1])}
        subprocess.run([sys.executable, "-c", SAME_BYTES, path, tmp_path / seed], env=environment, check=True)
    names = sorted(p.name for p in (tmp_path / "1").iterdir())
    assert len(names) == 5 and json.loads((tmp_path / "1" / "manifest.json").read_bytes())["counts"]["dropped"]
    for name in names:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes(), name


@given(
    st.lists(
        st.fixed_dictionaries({"prompt": st.text(max_size=30), "completion": st.text(max_size=30)}),
        min_size=1,
        max_size=20,
    )
)
@settings(deadline=None, max_examples=40)
def test_nothing_is_lost_or_invented(tmp_path_factory, records):
    path = write(tmp_path_factory.mktemp("data") / "p.jsonl", *records)
    tok = tokenizer()
    want = Counter()
    for r in records:
        whole = tok(r["prompt"] + r["completion"], add_special_tokens=False)["input_ids"] + [tok.eos_token_id]
        if r["completion"].strip() and len(whole) <= 64:
            want[tuple(whole)] += 1
    if not want:
        with pytest.raises(ValueError, match="no usable line"):
            prepare(path, 64, on_error="skip")
        return
    data = prepare(path, 64, on_error="skip")
    got = Counter()
    for row in data:
        for part in np.split(row["input_ids"], np.cumsum(row["seq_lengths"])[:-1]):
            got[tuple(part.tolist())] += 1
    assert got == want
    assert data.counts.read == len(records) == data.counts.kept + sum(data.counts.dropped.values())


# ---- lines that are odd but good --------------------------------------------------------------------------------------------


def test_bom_crlf_blank_lines_and_no_last_newline(tmp_path):
    line = json.dumps(ROW).encode()
    raw = b"\xef\xbb\xbf" + line + b"\r\n\r\n  \t\n" + line + b"\n\n" + line
    data = prepare(write(tmp_path / "a.jsonl", raw=raw), packing=False)
    assert (data.counts.read, data.counts.kept, data.counts.blank) == (6, 3, 3)
    assert len({tuple(row["input_ids"]) for row in data}) == 1
    with pytest.raises(DataError, match=":2:1: not JSON"):  # a byte order mark belongs to the start of the file
        prepare(write(tmp_path / "b.jsonl", raw=line + b"\n\xef\xbb\xbf" + line))


def test_line_separators_inside_a_text_do_not_end_the_line(tmp_path):
    answer = "a\u2028b\u2029c\u0085d\x0be\x00f\ufffd"
    path = write(tmp_path / "p.jsonl", {"prompt": "p", "completion": answer})
    assert "\u2028".encode() in path.read_bytes()
    assert rows_of(prepare(path)) == [(f"p{answer}<|im_end|>", f"{answer}<|im_end|>")]


def test_gzip_is_known_by_its_bytes(tmp_path):
    raw = json.dumps(ROW).encode() + b"\n"
    for name in ("a.jsonl.gz", "a.jsonl"):
        data = prepare(write(tmp_path / name, raw=gzip.compress(raw * 5)))
        assert data.counts.kept == 5
    with pytest.raises(ValueError, match=r"cannot be read past line \d+"):
        prepare(write(tmp_path / "cut.gz", raw=gzip.compress(os.urandom(3000).hex().encode())[:-200]), on_error="skip")
    harmed = bytearray(gzip.compress(raw * 5))
    harmed[10] = 0xFF  # no such kind of block
    with pytest.raises(ValueError, match="cannot be read past line 0"):
        prepare(write(tmp_path / "harmed.gz", raw=bytes(harmed)), on_error="skip")


# ---- lines that are bad -----------------------------------------------------------------------------------------------------

GOOD = b'{"instruction": "a", "input": "", "output": "b"}'
BAD = {
    "trailing comma": (b'{"instruction": "a", "output": "b",}', 35, "invalid JSON", "trailing comma"),
    "cut short": (b'{"instruction": "a", "outp', None, "invalid JSON", "unexpected end|EOF"),
    "NaN": (b'{"instruction": "a", "output": NaN}', 32, "invalid JSON", "not JSON"),
    "invalid UTF-8": (b'{"instruction": "\xc3\xa9\xff", "output": "b"}', 19, "invalid UTF-8", "byte 0xff"),
    "overlong": (b'{"instruction": "\xc0\xaf", "output": "b"}', 18, "invalid UTF-8", "byte 0xc0"),
    "surrogate in UTF-8": (b'{"instruction": "\xed\xa0\x80", "output": "b"}', 18, "invalid UTF-8", "byte 0xed"),
    "lone surrogate": (rb'{"instruction": "\ud800", "output": "b"}', None, "invalid JSON", "surrogate"),
    "deep": (b'{"instruction": "a", "output": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", None, "invalid JSON", "not JSON"),
    "number": (b"17", 1, "not an object", "a number|int"),
    "array": (b'[{"instruction": "a", "output": "b"}]', 1, "not an object", "jq"),
    "missing field": (b'{"instruction": "a"}', 1, "missing field", "'output' is missing"),
    "null": (b'{"instruction": "a", "output": null}', 1, "wrong type", "'output' is null"),
    "list": (b'{"instruction": ["a"], "output": "b"}', 1, "wrong type", "'instruction' is a list"),
    "number as input": (b'{"instruction": "a", "input": 5, "output": "b"}', 1, "wrong type", "'input' is a number"),
    "empty output": (b'{"instruction": "a", "output": " \\n"}', 1, "empty output", "nothing to learn"),
    "empty instruction": (b'{"instruction": " ", "output": "b"}', 1, "empty instruction", "are blank"),
    "duplicate key": (b'{"instruction": "a", "output": "b", "output": "c"}', 37, "duplicate key", "'output' appears 2 times"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_line(name, tmp_path):
    line, column, kind, reason = BAD[name]
    path = write(tmp_path / "a.jsonl", raw=b"\n".join([GOOD, b"", line, GOOD]))
    with pytest.raises(DataError, match=reason) as caught:
        prepare(path)
    error = caught.value
    assert (error.path, error.line, error.kind) == (path, 3, kind)
    assert str(error).startswith(f"{path}:3:{error.column}: ") and "on_error" in str(error)
    assert column is None or error.column == column
    assert list(tmp_path.iterdir()) == [path]

    data = prepare(path, on_error="skip")
    assert data.counts.kept == 2 and data.counts.dropped == {kind: 1} and data.counts.blank == 1

    prepare(path, on_error="quarantine")
    (entry,) = [json.loads(x) for x in quarantine_path(path).read_bytes().splitlines()]
    assert (entry["line"], entry["column"]) == (3, error.column) and re.search(reason, entry["reason"])
    assert entry["text"] == line.decode(errors="backslashreplace")
    assert len(list(tmp_path.iterdir())) == 2


def test_keys_that_occur_as_values_are_no_duplicates(tmp_path):
    record = {"instruction": "output", "input": 'the "output"', "output": "instruction", "meta": [{"output": 1}, {"output": 2}]}
    assert prepare(write(tmp_path / "a.jsonl", record)).counts.kept == 1


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "not from the assistant"),
        ([{"role": "user", "content": "a"}], "not from the assistant"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}], "is empty"),
        ([{"role": "user"}], "'content' of message 0 is missing"),
        ([{"role": "user", "content": None}], "'content' of message 0 is null"),
        (["a"], "message 0 is text"),
        ({"role": "user"}, "'messages' is an object, where a list"),
    ],
    ids=str,
)
def test_bad_messages(messages, reason, tmp_path):
    with pytest.raises(DataError, match=reason):
        prepare(write(tmp_path / "m.jsonl", {"messages": messages}), tok=tokenizer(CHATML))


def test_a_list_before_a_text(tmp_path):
    turns = [{"role": "user", "content": "a"}]
    for prompt, completion in ((turns, "b"), ("a", [{"role": "assistant", "content": "b"}])):
        with pytest.raises(DataError, match="both be texts, or both lists"):
            prepare(write(tmp_path / "c.jsonl", {"prompt": prompt, "completion": completion}), tok=tokenizer(CHATML))


def test_duplicate_key_in_a_message(tmp_path):
    raw = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "content": "c"}]}'
    with pytest.raises(DataError, match="'content' appears 2 times"):
        prepare(write(tmp_path / "m.jsonl", raw=raw), tok=tokenizer(CHATML))


def test_a_line_longer_than_the_limit_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 100)
    long = json.dumps({"instruction": "a" * 1000, "output": "b"}).encode()
    path = write(tmp_path / "a.jsonl", raw=b"\n".join([GOOD, long, GOOD, long]))
    data = prepare(path, on_error="skip")
    assert data.counts.read == 4 and data.counts.dropped == {"line too long": 2} and data.counts.kept == 2


def test_files_that_are_none(tmp_path):
    empty = write(tmp_path / "empty.jsonl", raw=b"")
    utf16 = write(tmp_path / "wide.jsonl", raw=json.dumps(ROW).encode("utf-16"))
    blank = write(tmp_path / "blank.jsonl", raw=b"\n\n")
    os.mkfifo(tmp_path / "pipe")
    for path, message in (
        (tmp_path, "is a directory; pass the files"),
        (tmp_path / "no.jsonl", "cannot be read: No such file"),
        (tmp_path / "pipe", "not a regular file"),
        (empty, r"is empty \(0 bytes\)"),
        (utf16, "UTF-16; convert it"),
        (blank, r"no usable line.*2 read"),
        ([], "no files given"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare(path, on_error="skip")


def test_bad_arguments(tmp_path):
    path = write(tmp_path / "a.jsonl", ROW)
    for options, message in (
        ({"template": "vicuna"}, "template='vicuna'; choose 'auto', 'chat', 'alpaca'"),
        ({"too_long": "split"}, "too_long='split'"),
        ({"on_error": "ignore"}, "on_error='ignore'"),
        ({"max_length": 1}, "max_length=1"),
        ({"columns": {"answer": "x"}}, r"\['answer'\]"),
        ({"template": "chat"}, "no chat template"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare(path, **options)
    tok = tokenizer()
    tok.eos_token = None
    with pytest.raises(ValueError, match="no EOS token"):
        prepare(path, tok=tok)
    with pytest.raises(ValueError, match="messages need a chat template"):
        prepare(write(tmp_path / "m.jsonl", {"messages": [{"role": "assistant", "content": "a"}]}))


def test_nothing_is_left_behind_by_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "spool"))
    (tmp_path / "spool").mkdir()
    path = write(tmp_path / "a.jsonl", raw=GOOD + b"\n{\n" + GOOD)
    with pytest.raises(DataError):
        prepare(path)
    quarantined = tmp_path / "b.jsonl"
    quarantined.write_bytes(b"{\n" + GOOD)
    with pytest.raises(RuntimeError, match="disk"):
        tok = tokenizer()
        monkeypatch.setattr(
            type(tok),
            "__call__",
            lambda *a, **k: {"input_ids": []} if a[1] == "" else (_ for _ in ()).throw(RuntimeError("disk")),
        )
        prepare(quarantined, tok=tok, on_error="quarantine")
    assert not list((tmp_path / "spool").iterdir())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", "spool"]


def test_the_spool_goes_with_the_data_set(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "spool"))
    (tmp_path / "spool").mkdir()
    data = prepare(write(tmp_path / "a.jsonl", ROW))
    assert len(list((tmp_path / "spool").iterdir())) == 1
    del data
    assert not list((tmp_path / "spool").iterdir())


def test_a_forked_worker_does_not_take_the_spool_with_it(tmp_path):
    data = prepare(sized(tmp_path, 4, 6))
    child = os.fork()
    if child == 0:
        del data
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert len(data[0]["input_ids"]) == 10


# ---- save and load ----------------------------------------------------------------------------------------------------------


def test_save_and_load(tmp_path):
    data = prepare(sized(tmp_path, 4, 6, 5, 3, 300), 10)
    data.save(tmp_path / "deep" / "saved")
    again = PackedDataset.load(tmp_path / "deep" / "saved")
    assert len(again) == len(data) == 2 and again.counts == data.counts and again.max_length == 10
    for a, b in zip(data, again, strict=True):
        assert all(np.array_equal(a[k], b[k]) for k in a) and a.keys() == b.keys()
    assert again.collator == data.collator
    with pytest.raises(FileExistsError, match="already exists"):
        data.save(tmp_path / "deep" / "saved")
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["saved"]


@pytest.mark.parametrize("harm", ["cut", "changed", "missing", "no manifest", "newer", "not ours"])
def test_what_was_harmed_is_not_loaded(harm, tmp_path):
    folder = tmp_path / "saved"
    prepare(sized(tmp_path, 4, 6)).save(folder)
    tokens, manifest = folder / "tokens.bin", folder / "manifest.json"
    raw, about = bytearray(tokens.read_bytes()), json.loads(manifest.read_bytes())
    message = {
        "cut": "has 36 bytes, but the manifest says 40",
        "changed": "has changed since it was saved",
        "missing": "tokens.bin is missing",
        "no manifest": "manifest.json cannot be read",
        "newer": "version 2, but this is unswag-data version 1",
        "not ours": "format None",
    }[harm]
    raw[5] ^= 1
    {
        "cut": lambda: tokens.write_bytes(raw[:-4]),
        "changed": lambda: tokens.write_bytes(raw),
        "missing": tokens.unlink,
        "no manifest": manifest.unlink,
        "newer": lambda: manifest.write_text(json.dumps(about | {"version": 2})),
        "not ours": lambda: manifest.write_text("{}"),
    }[harm]()
    with pytest.raises(ValueError, match=message):
        PackedDataset.load(folder)


def test_a_save_that_fails_leaves_nothing(tmp_path, monkeypatch):
    data = prepare(sized(tmp_path, 4, 6))
    monkeypatch.setattr(os, "rename", lambda *a: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        data.save(tmp_path / "out" / "saved")
    assert not list((tmp_path / "out").iterdir())


def test_a_full_disk_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "spool"))
    (tmp_path / "spool").mkdir()
    monkeypatch.setattr(os.path, "getsize", lambda path: 12)
    with pytest.raises(OSError, match="shorter than what was written to it; is the disk full"):
        prepare(sized(tmp_path, 4, 6))
    assert not list((tmp_path / "spool").iterdir())


def test_what_gets_its_name_is_on_the_disk_by_then(tmp_path, monkeypatch):
    log = []
    for name in ("fsync", "replace", "rename"):
        call = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, call=call: (log.append(name), call(*a))[1])
    data = prepare(write(tmp_path / "a.jsonl", raw=GOOD + b"\n{"), on_error="quarantine")
    assert log == ["fsync", "replace"]
    log.clear()
    data.save(tmp_path / "saved")
    assert log == ["fsync"] * 6 + ["rename", "fsync"]  # five files and their folder; then the folder around it


def test_a_worker_opens_the_files_itself(tmp_path):
    data = prepare(sized(tmp_path, 4, 6))
    want = data[0]["input_ids"]
    copy = pickle.dumps(data)
    assert len(copy) < 2000
    assert np.array_equal(pickle.loads(copy)[0]["input_ids"], want)


# ---- what is shown ----------------------------------------------------------------------------------------------------------


def test_report(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", raw=b"\n".join([GOOD] * 3 + [b"{", b"", b'{"instruction": "a", "output": ""}']))
    data = prepare(path, on_error="skip", verbose=True)
    text = capsys.readouterr().err
    for line in (r"6 . lines read", r"3 . kept", r"1 . dropped: empty output", r"1 . dropped: invalid JSON", r"1 . blank"):
        assert re.search(line, text), text
    out = io.StringIO()
    Console(file=out, width=100).print(prepare(sized(tmp_path, *range(3, 60)), 100).report())
    numbers = [int(n) for n in re.findall(r"– \d+ +[█▏]+ (\d+)", out.getvalue())]
    assert sum(numbers) == 57
    data.report().plot(tmp_path / "lengths.png")
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_progress_of_what_takes_long(tmp_path, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now.__setitem__(0, now[0] + 0.1) or now[0])
    prepare(sized(tmp_path, *[5] * 300), verbose=True)
    assert len(re.findall(r"preparing: \d+%", capsys.readouterr().err)) == 3  # 30 seconds, as it thinks
    prepare(sized(tmp_path, *[5] * 300))
    assert "preparing" not in capsys.readouterr().err


# ---- training --------------------------------------------------------------------------------------------------------------


def tiny_llama():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().train()


@pytest.mark.parametrize("surgery", [False, pytest.param(True, marks=pytest.mark.native)])
def test_a_row_learns_what_its_sequences_learn(surgery, tmp_path):
    import torch

    path = write(tmp_path / "p.jsonl", *[{"prompt": f"{i} and", "completion": "x" * i + "y"} for i in range(2, 12)])
    model = tiny_llama()
    if surgery:
        unswag.apply_unswag_surgery(model)

    def total(data, rows):
        batch = data.collator(rows)
        model.zero_grad()
        loss = model(**batch, num_items_in_batch=1).loss
        loss.backward()
        return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])

    packed, apart = prepare(path, 64), prepare(path, 64, packing=False)
    assert 1 < len(packed) < len(apart) == 10
    one, gradient = total(packed, list(packed))
    each = [total(apart, [row]) for row in apart]
    assert one == pytest.approx(sum(loss for loss, _ in each), rel=1e-6)
    torch.testing.assert_close(gradient, sum(g for _, g in each), rtol=1e-6, atol=1e-7)


def test_trainer_takes_it(tmp_path):
    from torch.utils.data import DataLoader
    from transformers import Trainer, TrainingArguments

    data = prepare(sized(tmp_path, *range(3, 40)), 64)
    arguments = TrainingArguments(
        str(tmp_path / "out"), max_steps=3, per_device_train_batch_size=2, report_to=[], save_strategy="no", use_cpu=True,
        logging_steps=1, disable_tqdm=True, dataloader_num_workers=1,
    )  # fmt: skip
    trainer = Trainer(tiny_llama().float(), arguments, train_dataset=data, data_collator=data.collator)
    trainer.train()
    assert np.isfinite([e["loss"] for e in trainer.state.log_history if "loss" in e]).all()
    batches = list(DataLoader(data, batch_size=3, collate_fn=data.collator))
    assert sum(int((b["labels"] != -100).sum()) for b in batches) == data.counts.trained


# ---- what a line says is heeded, refused or reported ------------------------------------------------------------------------


def turns(*said, **last):
    """Messages from ("user", "…") pairs; keywords go into the last one."""
    messages = [{"role": role, "content": content} for role, content in said]
    messages[-1].update(last)
    return messages


def chat(tmp_path, *records, template=CHATML, **options):
    return prepare(write(tmp_path / "m.jsonl", *records), tok=tokenizer(template), **({"packing": False} | options))


@pytest.mark.parametrize("flag", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"loss": 0}, {"weight": 0, "loss": False}])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_an_answer_that_is_not_to_be_learnt_has_no_labels(flag, which, tmp_path):
    answers = ["one", "two", "three"]
    messages = turns(*[(role, text) for a in answers for role, text in (("user", "q"), ("assistant", a))])
    plain = chat(tmp_path, {"messages": messages})
    messages[2 * which + 1].update(flag)
    data = chat(tmp_path, {"messages": messages})
    ((text, learnt),) = rows_of(data)
    assert np.array_equal(data[0]["input_ids"], plain[0]["input_ids"]) and text.count("<|im_start|>") == 6
    rest = [a for i, a in enumerate(answers) if i != which]
    assert learnt == "\n".join(f"{a}<|im_end|>" for a in rest) + ("\n" if which == 2 else "")  # as between two answers
    assert not data.counts.noted


def test_an_end_that_is_put_there_is_not_learnt_after_an_answer_that_is_not(tmp_path):
    template = (
        "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    messages = turns(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), weight=0)
    ((text, learnt),) = rows_of(chat(tmp_path, {"messages": messages}, template=template))
    assert text.endswith("[assistant]d<|im_end|>") and learnt == "b"


@pytest.mark.parametrize(
    "flag",
    [
        {"weight": 0.5},
        {"weight": "0"},
        {"train": "no"},
        {"loss": 2},
        {"weight": -1},
        {"weight": [0]},
        {"weight": 1, "train": False},
    ],
)
def test_other_flags_are_refused(flag, tmp_path):
    messages = turns(("user", "q"), ("assistant", "a"), **flag)
    with pytest.raises(DataError, match=f"'{next(iter(flag))}'.* of message 1"):
        chat(tmp_path, {"messages": messages})


def test_a_line_of_which_nothing_is_to_be_learnt_is_no_error_but_counted(tmp_path):
    good = {"messages": turns(("user", "q"), ("assistant", "a"), weight=1, train=True, loss=None)}
    none = {"messages": turns(("user", "q"), ("assistant", "BAD"), weight=0)}
    line = {"prompt": "q", "completion": "BAD", "weight": 0}
    data = chat(tmp_path, good, none, line, {"prompt": "q", "completion": "c", "weight": 1})
    assert [learnt for _, learnt in rows_of(data)] == ["a<|im_end|>", "c<|im_end|>"]
    assert data.counts.dropped == {"not to be learnt": 2} and not data.counts.noted
    assert data.counts.where == {"not to be learnt": [f"{tmp_path / 'm.jsonl'}:{n}" for n in (2, 3)]}
    with pytest.raises(ValueError, match=r"no usable line.*'not to be learnt': 1"):
        chat(tmp_path, none)
    data = chat(tmp_path, {"prompt": "q", "completion": "c", "weight": 0.5})
    assert data.counts.noted == {"column 'weight' is not read": 1}


def test_a_flag_that_asks_for_a_question_to_be_learnt_is_noted(tmp_path):
    messages = turns(("user", "q"), ("assistant", "a"))
    messages[0]["weight"] = 1
    data = chat(tmp_path, {"messages": messages})
    assert data.counts.noted == {"'weight' of a user message is ignored: only answers are learnt": 1}
    messages[0]["weight"] = 0
    assert not chat(tmp_path, {"messages": messages}).counts.noted


def test_the_messages_of_a_prompt_are_not_learnt(tmp_path):
    prompt = turns(("user", "a"), ("assistant", "shown"), ("user", "b"))
    ((text, learnt),) = rows_of(chat(tmp_path, {"prompt": prompt, "completion": turns(("assistant", "said"))}))
    assert learnt == "said<|im_end|>" and "shown" in text


TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}}]
WITH_TOOLS = "{% if tools %}{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}" + CHATML


@pytest.mark.parametrize("given", [TOOLS, json.dumps(TOOLS)], ids=["list", "JSON"])
@pytest.mark.parametrize("form", ["messages", "conversations", "completion", "instruction"])
def test_tools_are_handed_to_the_template(given, form, tmp_path):
    record = {
        "messages": {"messages": turns(("user", "q"), ("assistant", "a"))},
        "conversations": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        "completion": {"prompt": turns(("user", "q")), "completion": turns(("assistant", "a"))},
        "instruction": {"instruction": "q", "output": "a"},
    }[form] | {"tools": given}
    data = chat(tmp_path, record, template=WITH_TOOLS)
    ((text, learnt),) = rows_of(data)
    assert text.startswith('{"type": "function"') and "get_weather" in text and learnt == "a<|im_end|>"
    assert not data.counts.noted
    data = chat(tmp_path, record)  # whose template does not write them
    assert data.counts.noted == {"tools are not written by the chat template": 1} and "get_weather" not in rows_of(data)[0][0]


@pytest.mark.parametrize("given", ["no JSON", '{"a": 1}', [1], ["x"], {"a": 1}, 5])
def test_tools_that_are_none(given, tmp_path):
    with pytest.raises(DataError, match="'tools'"):
        chat(tmp_path, {"messages": turns(("user", "q"), ("assistant", "a")), "tools": given})


@pytest.mark.parametrize("given", [None, [], "", "[]"])
def test_no_tools(given, tmp_path):
    data = chat(tmp_path, {"messages": turns(("user", "q"), ("assistant", "a")), "tools": given}, template=WITH_TOOLS)
    assert not data.counts.noted and "function" not in rows_of(data)[0][0]


def test_system_and_history_of_alpaca(tmp_path):
    record = ROW | {"system": "Be brief.", "history": [["One?", "1"], ["Two?", "2"]]}
    ((text, learnt),) = rows_of(chat(tmp_path, record))
    order = [
        text.index(piece) for piece in ("system\nBe brief.", "user\nOne?", "assistant\n1", "user\nTwo?", "user\nAdd.\n\n1 + 1")
    ]
    assert order == sorted(order) and learnt == "1<|im_end|>\n2<|im_end|>\n2<|im_end|>"
    path = write(tmp_path / "a.jsonl", ROW | {"system": "Be brief.", "history": []})
    ((text, _),) = rows_of(prepare(path, 512))
    assert text == "Be brief.\n\n### Instruction:\nAdd.\n\n### Input:\n1 + 1\n\n### Response:\n2<|im_end|>"
    with pytest.raises(DataError, match="has one turn, but the line has a history"):
        prepare(write(tmp_path / "b.jsonl", record))
    for history in ([["a"]], ["ab"], [["a", 5]], "text", [{"user": "a"}]):
        with pytest.raises(DataError, match="'history'"):
            chat(tmp_path, ROW | {"history": history})
    with pytest.raises(DataError, match="'system' is a list"):
        chat(tmp_path, ROW | {"system": ["a"]})


def test_a_system_prompt_beside_messages(tmp_path):
    messages = turns(("user", "q"), ("assistant", "a"))
    ((text, _),) = rows_of(chat(tmp_path, {"system": "Be brief.", "messages": messages}))
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>")
    own = turns(("system", "Be brief."), *[(m["role"], m["content"]) for m in messages])
    assert rows_of(chat(tmp_path, {"system": "Be brief.", "messages": own}))[0][0] == text
    with pytest.raises(DataError, match="different system prompts"):
        chat(tmp_path, {"system": "Be long.", "messages": own})


def test_a_file_may_mix_forms(tmp_path):
    conversation = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "shared"}]
    empty = {"messages": None, "text": None, "conversations": []}  # as tables with columns for every form write them
    records = [
        empty | {"instruction": "q", "output": "told"},
        {"messages": turns(("user", "q"), ("assistant", "said"))},
        {"conversations": conversation},
        {"prompt": "q", "completion": "written"},
        {"text": "all of it"},
    ]
    data = chat(tmp_path, *(records * 2))
    want = ["told<|im_end|>", "said<|im_end|>", "shared<|im_end|>", "written<|im_end|>", "ll of it<|im_end|>"]
    assert [learnt for _, learnt in rows_of(data)] == want * 2 and not data.counts.noted and not data.counts.dropped
    data = prepare(write(tmp_path / "t.jsonl", {"text": "abc"}), tok=tokenizer(bos=True))
    assert rows_of(data) == [("<s>abc<|im_end|>", "abc<|im_end|>")]


def test_what_a_line_without_a_form_lacks(tmp_path):
    for record, lacking in (
        ({"output": "a"}, "'instruction' is missing"),
        ({"prompt": "a", "chosen": "b"}, "'completion' is missing"),
        ({"a": 1}, r"none of the forms .*\['a'\]"),
        ({f"k{i}": i for i in range(1000)}, "and 980 more"),
        ({"text": 5}, "'text' is a number"),
        ({"text": " "}, "'text' is blank"),
        ({"conversations": [{"from": "elf", "value": "a"}]}, "'from' of message 0 is 'elf'; choose from"),
        ({"conversations": [{"from": "gpt", "value": 5}]}, "'value' of message 0 is a number"),
        ({"conversations": {"from": "gpt"}}, "'conversations' is an object"),
    ):
        with pytest.raises(DataError, match=lacking) as caught:
            chat(tmp_path, record)
        assert len(str(caught.value)) < 1000


def test_messages_without_a_template_are_bad_lines(tmp_path):
    records = [ROW, {"messages": turns(("user", "q"), ("assistant", "a"))}]
    with pytest.raises(DataError, match="messages need a chat template") as caught:
        chat(tmp_path, *records, template=None)
    assert caught.value.line == 2 and str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert chat(tmp_path, *records, template=None, on_error="skip").counts.dropped == {"chat template": 1}


def test_sharegpt_speaks_of_tools(tmp_path):
    calls = CHATML.replace(
        "m['content']", "m['content'] + (m.tool_calls | map(attribute='function') | list | tojson if m.tool_calls else '')"
    )
    conversation = [
        {"from": "human", "value": "Weather?"},
        {"from": "function_call", "value": '{"name": "get_weather", "arguments": {"city": "Rome"}}'},
        {"from": "observation", "value": "sun"},
        {"from": "gpt", "value": "Sunny", "weight": 0},
    ]
    data = chat(tmp_path, {"conversations": conversation, "tools": TOOLS}, template=WITH_TOOLS.replace(CHATML, calls))
    ((text, learnt),) = rows_of(data)
    assert "<|im_start|>tool\nsun<|im_end|>" in text and not data.counts.noted
    assert learnt == '[{"name": "get_weather", "arguments": {"city": "Rome"}}]<|im_end|>\n'
    conversation[1]["value"] = "<functioncall> no JSON"
    assert "no JSON" in rows_of(chat(tmp_path, {"conversations": conversation}, template=calls))[0][1]


def test_parts_of_a_content_are_joined_and_must_be_text(tmp_path):
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    ((text, learnt),) = rows_of(chat(tmp_path, {"messages": turns(("user", parts), ("assistant", parts))}))
    assert "user\na b<|im_end|>" in text and learnt == "a b<|im_end|>"
    for part, reason in (
        ({"type": "image_url", "image_url": {"url": "x"}}, "part 1 of the content of message 0 is 'image_url'"),
        ({"type": "image"}, "is 'image'"),
        ({"type": "text"}, "is 'text', where text"),
        ({"type": "thinking", "text": "x"}, "is 'thinking'"),
        (5, "is a number"),
    ):
        with pytest.raises(DataError, match=reason):
            chat(tmp_path, {"messages": turns(("user", [parts[0], part]), ("assistant", "a"))})


CALLS = [{"type": "function", "id": "1", "function": {"name": "get_weather", "arguments": {"city": "Rome"}}}]
WITH_CALLS = CHATML.replace("m['content']", "m['content'] + (m.tool_calls | tojson if m.tool_calls else '')")


@pytest.mark.parametrize("content", [None, "", [], "so", "missing"])
def test_tool_calls_need_no_content(content, tmp_path):
    message = {"role": "assistant", "content": content, "tool_calls": CALLS}
    if content == "missing":
        del message["content"]
    for messages in (
        [*turns(("user", "q")), message],
        [*turns(("user", "q")), message, *turns(("tool", "sun"), ("assistant", "a"))],
    ):
        ((text, learnt),) = rows_of(chat(tmp_path, {"messages": messages}, template=WITH_CALLS))
        assert learnt.startswith("so[{" if content == "so" else "[{") and "Rome" in learnt and "None" not in text
        with pytest.raises(DataError, match="leaves out the tool calls of message 1"):
            chat(tmp_path, {"messages": messages})


def test_function_call_of_old(tmp_path):
    old = {"role": "assistant", "content": None, "function_call": {"name": "get_weather", "arguments": "{}"}}
    ((_, learnt),) = rows_of(chat(tmp_path, {"messages": [*turns(("user", "q")), old]}, template=WITH_CALLS))
    assert "get_weather" in learnt
    with pytest.raises(DataError, match="'tool_calls' of message 1 must be a list of objects"):
        chat(tmp_path, {"messages": turns(("user", "q"), ("assistant", "a"), tool_calls="x")})


def test_other_keys_of_a_message_go_to_the_template_or_are_noted(tmp_path):
    messages = turns(("user", "q"), ("assistant", "a"), reasoning_content="think", name="Eve", tool_calls=None)
    data = chat(tmp_path, {"messages": messages})
    assert data.counts.noted == {
        f"{key!r} of a message is not written by the chat template": 1 for key in ("reasoning_content", "name")
    }
    template = CHATML.replace("(m['content']", "m['content']").replace(
        "m['content']", "(m.reasoning_content or '') + (m.name or '') + m['content']"
    )
    data = chat(tmp_path, {"messages": messages}, template=template)
    assert rows_of(data)[0][1] == "thinkEvea<|im_end|>" and not data.counts.noted


def test_many_keys_of_a_message_take_a_few_renderings(tmp_path, monkeypatch):
    counts = Counter()
    render = Encoder.render
    monkeypatch.setattr(Encoder, "render", lambda *a, **k: (counts.update(["render"]), render(*a, **k))[1])
    messages = turns(("user", "q"), ("assistant", "a"), **{f"k{i}": i for i in range(1000)})
    data = chat(tmp_path, {"messages": messages})
    assert data.counts.noted["other notes"] == 980 and counts["render"] < 10
    data = chat(tmp_path, {"messages": messages}, template=CHATML.replace("m['content']", "m['content'] + (m.k999 | string)"))
    assert counts["render"] < 50
    assert "only the first 20 keys of messages were looked for in the output of the chat template" in data.counts.noted


def test_a_long_conversation_is_not_rendered_for_each_message_if_it_is_dropped(tmp_path, monkeypatch):
    messages = turns(*[(role, f"{role} {i}") for i in range(50) for role in ("user", "assistant")])
    ((_, learnt),) = rows_of(chat(tmp_path, {"messages": messages}, max_length=4096))
    assert learnt == "\n".join(f"assistant {i}<|im_end|>" for i in range(50))
    counts = Counter()
    render = Encoder.render
    monkeypatch.setattr(Encoder, "render", lambda *a, **k: (counts.update(["render"]), render(*a, **k))[1])
    with pytest.raises(ValueError, match="'too long': 1"):
        chat(tmp_path, {"messages": messages}, max_length=256)
    assert counts["render"] == 1
    data = chat(tmp_path, {"messages": messages}, max_length=256, too_long="truncate")
    assert data.counts.truncated == 1 and rows_of(data)[0][1].startswith("assistant 0<|im_end|>\nassistant 1")


def test_columns_that_are_not_read_are_in_the_report_once_each(tmp_path, capsys):
    rest = {"id": 7, "label": False, "empty": "", "none": None, "list": []}
    path = write(tmp_path / "a.jsonl", *[ROW | rest] * 5, ROW | {"label": True}, ROW)
    data = prepare(path, 512, verbose=True)
    assert data.counts.noted == {"column 'id' is not read": 5, "column 'label' is not read": 6}
    for said in (capsys.readouterr().err, str(data.report())):
        assert re.search(r"6 . noted: column 'label' is not read", said) and said.count("noted: column 'id'") == 2
        assert f"  {path}:1\n  {path}:2\n  {path}:3\n  and 2 more\n" in said
    many = prepare(write(tmp_path / "b.jsonl", ROW | {f"k{i:03}": i for i in range(100)}))
    assert len(many.counts.noted) == 21 and many.counts.noted["other notes"] == 80
    data = prepare(
        write(tmp_path / "c.jsonl", {"prompt": "a", "completion": "b", "tools": TOOLS, "system": "s", "messages": []})
    )
    assert data.counts.noted == {"column 'tools' is not read": 1, "column 'system' is not read": 1}


# ---- chat templates ---------------------------------------------------------------------------------------------------------

DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}" + CHATML
)


@pytest.mark.parametrize("template", [CHATML, DEFAULT_SYSTEM], ids=["plain", "default system prompt"])
@pytest.mark.parametrize("greeting", ["Hello!", "You", "<|im_start|>", "  spaced"])
def test_what_the_template_adds_is_not_learnt_when_the_assistant_speaks_first(template, greeting, tmp_path):
    for rest in ([], [("user", "q"), ("assistant", "a")]):
        ((text, learnt),) = rows_of(chat(tmp_path, {"messages": turns(("assistant", greeting), *rest)}, template=template))
        assert text.count("assistant\n") == 1 + len(rest) // 2
        assert learnt == greeting + "<|im_end|>" + ("\na<|im_end|>" if rest else "")


def test_tool_calls_of_an_assistant_who_speaks_first(tmp_path):
    messages = [{"role": "assistant", "content": None, "tool_calls": CALLS}]
    assert rows_of(chat(tmp_path, {"messages": messages}, template=WITH_CALLS))[0][1].startswith('[{"type"')


@pytest.mark.parametrize(
    "raises",
    ["'x' + 1", "1 / 0", "messages[9].content", "messages | sum", "raise_exception('no')", "[1][5]()", "'a'.nothing()"],
)
def test_whatever_a_template_raises_is_a_bad_line(raises, tmp_path):
    template = "{% for m in messages %}{% if m.content == 'bad' %}{{ " + raises + " }}{% endif %}{% endfor %}" + CHATML
    good, bad = ({"messages": turns(("user", q), ("assistant", "a"))} for q in ("good", "bad"))
    with pytest.raises(DataError, match=r"the chat template (fails|refuses it)") as caught:
        chat(tmp_path, good, bad, good, template=template)
    assert (caught.value.line, caught.value.kind) == (2, "chat template")
    data = chat(tmp_path, good, bad, good, template=template, on_error="skip")
    assert data.counts.kept == 2 and data.counts.dropped == {"chat template": 1}
    assert data.counts.where["chat template"][0].startswith(f"{tmp_path / 'm.jsonl'}:2:1: the chat template ")


ROLES = (
    "{% for m in messages %}{% if m['role'] ROLE %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endif %}{% endfor %}"
)
GENERATION = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


@pytest.mark.parametrize("content", ["s", "user", "assistant", "Answer in the style of a pirate, always."])
def test_a_template_that_leaves_out_a_message_is_noticed(content, tmp_path):
    template = ROLES.replace("ROLE", "!= 'system'") + GENERATION
    messages = turns(("system", content), ("user", "Answer in the style of a pirate"), ("assistant", "a"))
    with pytest.raises(DataError, match="leaves out message 0, which is from the system"):
        chat(tmp_path, {"messages": messages}, template=template)
    messages[0]["content"] = " "
    assert chat(tmp_path, {"messages": messages}, template=template).counts.kept == 1  # nothing is lost
    with pytest.raises(DataError, match="leaves out message 0, which is from the system"):
        chat(tmp_path, ROW | {"system": content}, template=template)
    twice = turns(("user", content), ("assistant", "x"), ("user", content), ("assistant", "y"))
    first = ROLES.replace("ROLE", "!= 'user' or not loop.first") + GENERATION
    with pytest.raises(DataError, match="leaves out message 0, which is from the user"):
        chat(tmp_path, {"messages": twice}, template=first)


def test_a_template_that_moves_or_trims_messages_leaves_none_out(tmp_path):
    template = (
        "{% set s = messages[0]['content'] %}{% for m in messages[1:] %}{{ '<|im_start|>' + m['role'] + '\n' + "
        "(s + '\n' if loop.first else '') + (m['content'] | trim) + '<|im_end|>\n' }}{% endfor %}" + GENERATION
    )
    messages = turns(("system", "Be as brief as ever you can."), ("user", " q "), ("assistant", " a"))
    data = chat(tmp_path, {"messages": messages}, template=template)
    assert not data.counts.noted and "user\nBe as brief as ever you can.\nq<|im_end|>" in rows_of(data)[0][0]


def test_a_template_that_wants_parts_leaves_out_a_text(tmp_path):
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% for part in m['content'] %}{{ part['text'] }} "
        "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    ) + GENERATION
    with pytest.raises(DataError, match="leaves out message 0"):
        chat(tmp_path, ROW, template=template)


def test_reasoning_that_a_template_drops_is_noticed(tmp_path):
    drops = CHATML.replace("m['content']", "m['content'].split('</think>')[-1]")
    messages = turns(("user", "q"), ("assistant", "<think>because</think>a"))
    data = chat(tmp_path, {"messages": messages}, template=drops)
    assert data.counts.noted == {"what the assistant says is written differently by the chat template": 1}
    earlier = CHATML.replace("m['content']", "(m['content'] if loop.last else m['content'].split('</think>')[-1])")
    with pytest.raises(DataError, match="writes message 1 differently when others follow"):
        chat(tmp_path, {"messages": messages * 2}, template=earlier)


def test_a_template_that_gives_no_text(tmp_path, monkeypatch):
    tok = tokenizer(CHATML)
    monkeypatch.setattr(type(tok), "apply_chat_template", lambda *a, **k: [1, 2])
    with pytest.raises(ValueError, match=r"apply_chat_template.* returns list, where text was expected"):
        prepare(write(tmp_path / "a.jsonl", ROW), tok=tok, on_error="skip")


# ---- what is no line --------------------------------------------------------------------------------------------------------


def test_files_that_are_no_lines(tmp_path):
    records = [ROW, ROW]
    for raw, message in (
        (json.dumps(records, indent=2).encode(), r"is an array.*jq -c '.\[\]'"),
        (json.dumps(records, indent=2).encode("utf-8-sig"), "is an array"),
        (b"\n\n" + json.dumps(records).replace("}, {", "},\n{").encode(), "is an array"),
        (b"[\n" + GOOD + b",\n" + GOOD + b"\n]", "is an array"),
        (gzip.compress(json.dumps(records, indent=2).encode()), "is an array"),
        ("\n".join(json.dumps(r, indent=2) for r in records).encode(), r"objects that span several lines.*jq -c \."),
        (b" \n\t\n\r\n", r"no usable line in .*all its lines are blank \(3 read\)"),
        (b"\xef\xbb\xbf", "all its lines are blank"),
        (b"PAR1abc", "is Parquet"),
        (b"PK\x03\x04", "a zip archive"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
    ):
        path = write(tmp_path / "a.jsonl", raw=raw)
        with pytest.raises(ValueError, match=message) as caught:
            prepare([write(tmp_path / "good.jsonl", ROW), path], on_error="skip")
        assert str(path) in str(caught.value) and "good" not in str(caught.value)
    for raw in (
        b'[{"instruction": "a", "output": "b"}]\n' + GOOD,
        b"{\n" + GOOD,
        b"[\n" + GOOD,
    ):  # bad lines in a file of lines
        data = prepare(write(tmp_path / "a.jsonl", raw=raw), on_error="skip")
        assert data.counts.kept == 1 and sum(data.counts.dropped.values()) == 1


def test_the_error_about_no_usable_line_says_where_and_why(tmp_path):
    path = write(tmp_path / "a.jsonl", raw=b'{"a": 1}\n{\n')
    with pytest.raises(ValueError, match="no usable line") as caught:
        prepare(path, on_error="skip")
    assert "larger max_length" not in str(caught.value)
    assert f"{path}:1:1: none of the forms" in str(caught.value) and f"{path}:2:2: not JSON" in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_length": "512"}, TypeError, "max_length='512' is a str; pass an int"),
        ({"max_length": None}, TypeError, "max_length=None"),
        ({"max_length": 512.0}, TypeError, "max_length=512.0 is a float"),
        ({"max_length": True}, TypeError, "max_length=True"),
        ({"max_length": int(1e30)}, ValueError, "A tokenizer without a limit says 1e30"),
        ({"max_length": -5}, ValueError, "max_length=-5"),
        ({"tok": "gpt2"}, TypeError, r"tokenizer='gpt2' is a name; pass AutoTokenizer.from_pretrained\('gpt2'\)"),
        ({"tok": Path("gpt2")}, TypeError, "is a name"),
        ({"tok": 5}, TypeError, "tokenizer is a int; pass AutoTokenizer"),
        ({"tok": Tokenizer(models.BPE())}, TypeError, "pass transformers.PreTrainedTokenizerFast"),
        ({"tok": type("Processor", (), {"tokenizer": 1})()}, TypeError, "pass its .tokenizer"),
        ({"tok": print}, TypeError, "tokenizer is a builtin"),
        ({"packing": "no"}, TypeError, "packing='no'; pass True or False"),
        ({"packing": None}, TypeError, "packing=None"),
        ({"verbose": "yes"}, TypeError, "verbose='yes'"),
        ({"template": None}, ValueError, "template=None; choose"),
        ({"template": ["chat"]}, ValueError, r"template=\['chat'\]"),
        ({"too_long": None}, ValueError, "too_long=None"),
        ({"on_error": True}, ValueError, "on_error=True"),
        ({"columns": "output"}, TypeError, "columns='output'; pass a dict"),
        ({"columns": ["output"]}, TypeError, "columns="),
        ({"columns": {"output": 5}}, TypeError, r"columns\['output'\]=5"),
        ({"columns": {1: "a", "x": "b"}}, ValueError, r"\[1, 'x'\]"),
        ({"path": None}, TypeError, "path_or_paths=NoneType None; pass the path"),
        ({"path": 5}, TypeError, "path_or_paths=int 5"),
        ({"path": [None]}, TypeError, "path_or_paths: NoneType None is not a path"),
        ({"path": [ROW]}, TypeError, "a record, not a path; write records to a .jsonl file"),
        ({"path": {"train": "a"}}, TypeError, "path_or_paths=dict"),
        ({"path": {"a", "b"}}, TypeError, r"is a set, which has no order; pass sorted"),
        ({"path": io.BytesIO(b"x")}, TypeError, "path_or_paths=BytesIO"),
        ({"path": ""}, ValueError, "'' is not a path"),
        ({"path": "a\0b"}, ValueError, "is not a path"),
        ({"path": []}, ValueError, "no files given.*glob, nothing matched"),
        ({"path": iter(())}, ValueError, "no files given"),
        ({"path": "data/*.jsonl"}, ValueError, r"for a pattern, pass sorted\(glob.glob"),
    ],
)  # fmt: skip
def test_errors_name_the_argument_its_value_and_the_remedy(arguments, error, message, tmp_path):
    path = arguments.pop("path", None) if "path" in arguments else write(tmp_path / "a.jsonl", ROW)
    with pytest.raises(error, match=message) as caught:
        prepare(path, **arguments)
    assert str(caught.value).startswith("prepare_data: ")


def test_errors_of_what_the_data_set_offers(tmp_path):
    data = prepare(sized(tmp_path, 4, 6))
    for call, error, message in (
        (lambda: data.to_hf(packed="no"), TypeError, "to_hf: packed='no'; pass True or False"),
        (lambda: quarantine_path(None), TypeError, "quarantine_path: path: NoneType None is not a path"),
        (lambda: data.report().plot(5), TypeError, "plot: path: int 5 is not a path"),
    ):
        with pytest.raises(error, match=message):
            call()


def test_paths_of_every_kind(tmp_path):
    path = write(tmp_path / "ä b.jsonl", ROW)
    for one in (path, str(path), os.fsencode(path), [os.fsencode(path)], (path,), iter([path]), {path: 1}.keys()):
        assert prepare(one, np.int64(256), packing=np.bool_(True)).counts.kept == 1


@pytest.mark.parametrize("index", ["input_ids", None, 1.0, [0, 1], (0, 1), np.array([0, 1]), slice("a", None)], ids=str)
def test_odd_indices_are_refused(index, tmp_path):
    data = prepare(sized(tmp_path, 4, 6, 9), 10)
    with pytest.raises(TypeError, match=r"use an int or a slice|slice indices"):
        data[index]


def test_slices_are_lists_of_rows(tmp_path):
    data = prepare(sized(tmp_path, 4, 6, 9, 8), 10)
    rows = list(data)
    for part in (slice(2), slice(None), slice(None, None, -1), slice(1, 1), slice(-1, None), slice(0, 99)):
        got = data[part]
        assert isinstance(got, list) and [g["input_ids"].tolist() for g in got] == [r["input_ids"].tolist() for r in rows[part]]
    assert data.collator(data[:2])["input_ids"].shape == (2, 10)
    import torch

    assert (
        data[np.int32(1)]["input_ids"].tolist() == data[torch.tensor(1)]["input_ids"].tolist() == rows[1]["input_ids"].tolist()
    )
    for index in (3, -4, 10**30):
        with pytest.raises(IndexError, match=r"the data set has 3 rows"):
            data[index]


def test_the_collator_refuses_what_would_be_wrong(tmp_path):
    data = prepare(sized(tmp_path, 4, 6, 9), 10)
    row = data[0]
    made = data.collator([{k: v for k, v in row.items() if k != "position_ids"}])
    assert made["position_ids"].tolist() == [row["position_ids"].tolist()]
    listed = {k: v.tolist() for k, v in row.items()}
    assert all((data.collator([listed])[k] == v).all() for k, v in data.collator([row]).items())
    for rows, error, message in (
        ([], TypeError, "pass a list of rows"),
        (row, TypeError, "rows is dict"),
        ([1], TypeError, "pass a list of rows"),
        ([{k: row[k] for k in ("input_ids", "labels")}], ValueError, "row 0 has .*position_ids or seq_lengths"),
        ([row, {k: row[k] for k in ("input_ids", "position_ids")}], ValueError, "row 1 has"),
        ([row | {k: row[k][:5] for k in ("input_ids", "labels")}], ValueError, "has 5 tokens, 5 labels and 10 positions"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            data.collator(rows)


# ---- the quarantine ---------------------------------------------------------------------------------------------------------


def test_the_quarantine_is_no_data_and_goes_when_nothing_is_bad(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", raw=GOOD + b"\n{")
    data = prepare(path, on_error="quarantine", verbose=True)
    there = quarantine_path(path)
    assert data.counts.quarantine == [str(there)] and str(there) in capsys.readouterr().err
    assert list(tmp_path.glob("*.jsonl")) == [path] and there.exists()
    for paths in (there, [path, there], tmp_path / "b.jsonl.quarantine.jsonl"):  # by the name of former versions as well
        (tmp_path / "b.jsonl.quarantine.jsonl").write_bytes(there.read_bytes())
        with pytest.raises(ValueError, match='was written by on_error="quarantine"'):
            prepare(paths, on_error="skip")
    renamed = write(tmp_path / "c.jsonl", raw=there.read_bytes() + GOOD)
    with pytest.raises(DataError, match=r'c\.jsonl:1:1: this line was written by on_error="quarantine"'):
        prepare(renamed)
    prepare(write(path, raw=GOOD), on_error="skip")
    assert there.exists()
    prepare(path, on_error="quarantine")
    assert not there.exists()


def test_the_report_names_lines_reasons_and_paths(tmp_path, capsys):
    one = write(tmp_path / "[one].jsonl", raw=b"\n".join([GOOD, b"{", *[b'{"instruction": "a", "output": ""}'] * 5]))
    two = write(tmp_path / "two.jsonl", raw=GOOD.replace(b'"b"', b'"' + b"b" * 600 + b'"') + b"\n17\n" + GOOD)
    data = prepare([one, two], on_error="skip", verbose=True)
    data.save(tmp_path / "saved")
    for said in (capsys.readouterr().err, str(data.report()), str(PackedDataset.load(tmp_path / "saved").report())):
        for line in (
            f"  {one}:2:2: not JSON: ",
            f"  {one}:3:1: the field 'output' is empty: there is nothing to learn\n",
            "  and 2 more\n",
            f"  {two}:1: ",
            f"  {two}:2:1: a number, where an object was expected\n",
        ):
            assert line in said, (line, said)
    assert [len(v) for v in data.counts.where.values()] == [1, 3, 1, 1]


# ---- copies, pickles and other processes ------------------------------------------------------------------------------------


@pytest.fixture
def spool(tmp_path, monkeypatch):
    folder = tmp_path / "spool"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


HOW = {"copy": copy.copy, "deepcopy": copy.deepcopy, "pickle": lambda data: pickle.loads(pickle.dumps(data))}


@pytest.mark.parametrize("how", HOW)
def test_a_copy_has_its_rows_when_the_first_is_gone_and_leaves_nothing(how, tmp_path, spool):
    data = prepare(sized(tmp_path, 4, 6, 9), 10)
    want, counts = [row["input_ids"].tolist() for row in data], data.counts
    other = HOW[how](data)
    other.mine = 1  # nothing is shared that can be written to
    assert not hasattr(data, "mine")
    del data
    gc.collect()
    third = HOW[how](other)
    del other
    gc.collect()
    assert [row["input_ids"].tolist() for row in third] == want and third.counts == counts and third.mine == 1
    third.save(tmp_path / "saved")
    assert [row["input_ids"].tolist() for row in PackedDataset.load(tmp_path / "saved")] == want
    del third
    gc.collect()
    assert not list(spool.iterdir())


def test_a_pickle_may_be_loaded_twice_and_in_another_process(tmp_path, spool):
    data = prepare(sized(tmp_path, 4, 6, 9), 10)
    want, raw = data[1]["input_ids"].tolist(), pickle.dumps(data)
    del data
    assert not list(spool.iterdir())
    first, second = pickle.loads(raw), pickle.loads(raw)
    assert not list(spool.iterdir())  # what came in a pickle has files without a name
    del first
    assert second[1]["input_ids"].tolist() == want
    (tmp_path / "p").write_bytes(raw)
    code = "import pickle, sys; data = pickle.loads(open(sys.argv[1], 'rb').read()); print(data[1]['input_ids'].tolist())"
    environment = os.environ | {"PYTHONPATH": str(Path(unswag.__file__).parents[1]), "TMPDIR": str(spool)}
    run = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "p"], env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == str(want)
    assert not list(spool.iterdir())


def keep(data):
    kept.append(data)  # for as long as the worker is
    return len(data), os.getpid()


kept = []


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_pool_that_was_given_a_data_set_leaves_nothing(method, tmp_path, spool):
    data = prepare(sized(tmp_path, 4, 6, 9), 10)
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.map(keep, [data, copy.copy(data)])[0][0] == 2  # its workers are killed in the end
    pool.join()
    del data
    gc.collect()
    assert not list(spool.iterdir())


def test_a_pickle_of_a_loaded_data_set_is_the_name_of_its_folder(tmp_path):
    prepare(sized(tmp_path, *[50] * 500), 100).save(tmp_path / "saved")
    data = PackedDataset.load(tmp_path / "saved")
    raw = pickle.dumps(data)
    assert len(raw) < 2000 and len(pickle.loads(raw)) == len(data)
    with contextlib.chdir(tmp_path):
        beside = PackedDataset.load("saved")
    assert len(pickle.loads(pickle.dumps(beside))) == len(data)  # in another folder
    (tmp_path / "saved").rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match=r"tokens.bin no longer exists.*save\(folder\)"):
        pickle.loads(raw)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_read_the_files_of_the_parent(method, tmp_path, spool):
    from torch.utils.data import DataLoader

    data = prepare(sized(tmp_path, *range(3, 40)), 64)
    want = [row["input_ids"].tolist() for row in data]
    assert len(list(spool.iterdir())) == 1
    loader = DataLoader(data, batch_size=None, num_workers=1, multiprocessing_context=method, collate_fn=rows_as_lists)
    del data
    assert list(loader) == want
    assert len([p for p in spool.iterdir() if p.name.startswith("unswag-data-")]) == 1  # no worker made or took one
    del loader
    gc.collect()
    assert not [p for p in spool.iterdir() if p.name.startswith("unswag-data-")]


def rows_as_lists(row):
    return row["input_ids"].tolist()


SPAWNED = """
import multiprocessing, sys, unswag
from unswag.data import PackedDataset

def work(data, queue):
    queue.put([row["input_ids"].tolist() for row in data])

class Letters:
    eos_token_id, bos_token_id, pad_token_id, chat_template = 0, None, None, None
    def __call__(self, texts, **options):
        return {"input_ids": [[ord(c) for c in t] for t in texts] if isinstance(texts, list) else []}

if __name__ == "__main__":
    data = unswag.prepare_data(sys.argv[1], Letters(), 60, verbose=False)
    want = [row["input_ids"].tolist() for row in data]
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=work, args=(data, queue))
    process.start()
    del data  # the process may not have opened the files yet
    assert queue.get(timeout=60) == want
    process.join()
    kept = unswag.prepare_data(sys.argv[1], Letters(), 60, verbose=False)  # goes with the interpreter
"""


def test_a_process_that_was_started_keeps_the_files_and_nothing_is_left_at_exit(tmp_path, spool):
    (tmp_path / "main.py").write_text(SPAWNED)
    environment = os.environ | {"PYTHONPATH": str(Path(unswag.__file__).parents[1]), "TMPDIR": str(spool)}
    subprocess.run([sys.executable, tmp_path / "main.py", sized(tmp_path, 4, 6, 9)], env=environment, check=True)
    assert not list(spool.iterdir())


# ---- load -------------------------------------------------------------------------------------------------------------------


def saved(folder, arrays=None, **changes):
    """A folder as `save` writes it, whose hashes and sizes are right whatever its arrays hold."""
    tokens = np.arange(10, dtype=np.uint32)
    tokens[[1, 5]] |= 1 << 31
    arrays = {"tokens": tokens, "sequences": [0, 4, 10], "order": [0, 1], "packs": [0, 1, 2]} | (arrays or {})
    counts = {"read": 2, "kept": 2, "blank": 0, "dropped": {}, "truncated": 0, "merged": 0, "tokens": 10, "trained": 2}
    manifest = {"format": "unswag-data", "version": 1, "max_length": 8, "pad": 0, "counts": counts, "files": {}}
    folder.mkdir()
    for name, dtype in ARRAYS.items():
        raw = arrays[name] if isinstance(arrays[name], bytes) else np.asarray(arrays[name]).astype(dtype).tobytes()
        (folder / f"{name}.bin").write_bytes(raw)
        manifest["files"][f"{name}.bin"] = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    for path, value in changes.items():
        inner, names = manifest, path.split("__")
        for name in names[:-1]:
            inner = inner[name]
        if value is None:
            del inner[names[-1]]
        else:
            inner[names[-1]] = value
    (folder / "manifest.json").write_bytes(json.dumps(manifest).encode())
    return folder


def test_what_was_saved_without_notes_loads(tmp_path):
    data = PackedDataset.load(saved(tmp_path / "a"))
    assert [row["labels"].tolist() for row in data] == [[-100, 1, -100, -100], [-100, 5, -100, -100, -100, -100]]


@pytest.mark.parametrize(
    "changes",
    [
        {"files": None}, {"files": []}, {"files": {}}, {"files": 5}, {"files": {"tokens.bin": 5}},
        {"counts": None}, {"counts": []}, {"counts": {"evil": 1}}, {"counts__kept": "2"}, {"counts__kept": -2},
        {"counts__kept": 3}, {"counts__kept": True}, {"counts__dropped": 5}, {"counts__dropped": {"a": "b"}},
        {"counts__tokens": None},
        {"counts__trained": 1}, {"counts__read": 3}, {"counts__where": {"a": 5}}, {"counts__noted": [1]},
        {"counts__quarantine": "a"},
        {"max_length": None}, {"max_length": "8"}, {"max_length": 5}, {"max_length": 8.5},
        {"pad": None}, {"pad": -1}, {"pad": [0]},
    ],
    ids=str,
)  # fmt: skip
def test_a_manifest_that_save_did_not_write(changes, tmp_path):
    with pytest.raises(ValueError, match=r"is not a saved data set: .*; prepare the data again") as caught:
        PackedDataset.load(saved(tmp_path / "a", **changes))
    assert str(tmp_path / "a") in str(caught.value)


@pytest.mark.parametrize("raw", [b"", b"[]", b"5", b"null", b'"a"', b"{", b"\xff", b'{"format": 5}', b"[" * 5000])
def test_a_manifest_that_is_none(raw, tmp_path):
    (saved(tmp_path / "a") / "manifest.json").write_bytes(raw)
    with pytest.raises(ValueError, match="prepare the data again"):
        PackedDataset.load(tmp_path / "a")


@pytest.mark.parametrize(
    "arrays",
    [
        {"order": [10**6, 1]}, {"order": [-2, 1]}, {"order": [1, 1]}, {"order": [0]}, {"order": [0, 1, 2]},
        {"sequences": [0, 10**14, 10]}, {"sequences": [0, 4, 9]}, {"sequences": [1, 4, 10]}, {"sequences": [0, 10, 4]},
        {"sequences": [0, 4, 4, 10]}, {"sequences": [0]}, {"sequences": [-(2**63), 4, 10]}, {"packs": [0, 1]},
        {"packs": [0, 2, 1]}, {"packs": [0, 1, 1, 2]}, {"packs": [0]}, {"packs": [0, 2]}, {"packs": b""},
        {"tokens": b""}, {"tokens": b"abc"},
        {"order": b"1234567"}, {"tokens": [1]},
    ],
    ids=str,
)  # fmt: skip
def test_arrays_that_do_not_fit_each_other(arrays, tmp_path):
    with pytest.raises(ValueError, match="is not a saved data set: "):
        PackedDataset.load(saved(tmp_path / "a", arrays))


def test_folders_that_are_none(tmp_path):
    data = prepare(sized(tmp_path, 4, 6))
    for folder, error, message in (
        (None, TypeError, "folder: NoneType None is not a path"),
        (5, TypeError, "folder: int 5"),
        ("", ValueError, "'' is not a path"),
    ):
        for call in (data.save, PackedDataset.load):
            with pytest.raises(error, match=message):
                call(folder)
    for folder in (tmp_path / "no", tmp_path, tmp_path / "s.jsonl"):
        with pytest.raises(ValueError, match=r"is not a saved data set: manifest\.json cannot be read"):
            PackedDataset.load(folder)
    data.save(os.fsencode(tmp_path / "saved"))
    assert len(PackedDataset.load(os.fsencode(tmp_path / "saved"))) == 1


# ---- Hugging Face -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hf(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return datasets


def test_to_hf(tmp_path, hf):
    data = prepare(sized(tmp_path, *range(3, 40)), 64)
    rows, sequences = data.to_hf(packed=True), data.to_hf()
    assert isinstance(rows, hf.Dataset) and len(rows) == len(data) and len(sequences) == data.counts.kept
    for row, other in zip(data, rows, strict=True):
        assert all(np.array_equal(row[k], other[k]) for k in row) and row.keys() == other.keys()
    apart = prepare(tmp_path / "s.jsonl", 64, packing=False)
    for row, other in zip(apart, sequences, strict=True):
        assert all(np.array_equal(row[k], other[k]) for k in row)
    batch = data.collator(list(rows))
    assert all((batch[k] == v).all() for k, v in data.collator(list(data)).items())
    assert all(np.array_equal(a["labels"], b["labels"]) for a, b in zip(hf.Dataset.from_list(list(data)), data, strict=True))
    del data
    assert len(rows[0]["input_ids"]) and len(sequences[-1]["labels"])  # the cache of datasets has them


@pytest.mark.parametrize(
    ("packed", "ours", "options"),
    [
        (False, False, {}),
        (False, False, {"padding_free": True, "max_length": None}),
        (False, False, {"packing": True, "max_length": 64}),
        (False, True, {}),
        (True, True, {"max_length": None}),
        (True, False, {"padding_free": True, "max_length": None}),
    ],
    ids=str,
)
def test_trl_learns_what_the_sequences_say(packed, ours, options, tmp_path, hf):
    trl = pytest.importorskip("trl")
    import torch
    from torch.nn import functional as F

    path = write(tmp_path / "p.jsonl", *[{"prompt": f"{i} and", "completion": "x" * i + "y"} for i in range(2, 12)])
    data = prepare(path, 64)
    model, total = tiny_llama().float(), 0.0
    with torch.no_grad():
        for row in prepare(path, 64, packing=False):
            ids, labels = (torch.tensor(row[name])[None] for name in ("input_ids", "labels"))
            logits = model(input_ids=ids, use_cache=False).logits
            total += F.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100, reduction="sum").item()
    rows = data.to_hf(packed=packed)
    arguments = trl.SFTConfig(
        str(tmp_path / "out"), max_steps=1, per_device_train_batch_size=len(rows), report_to=[], save_strategy="no",
        use_cpu=True, bf16=False, logging_steps=1, disable_tqdm=True, gradient_checkpointing=False, **options,
    )  # fmt: skip
    ours = {"data_collator": data.collator} if ours else {}
    trainer = trl.SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer(), **ours)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(total / data.counts.trained, rel=1e-5)


def test_trl_that_cuts_packed_rows_is_refused(tmp_path, hf):
    trl = pytest.importorskip("trl")
    data = prepare(sized(tmp_path, *range(3, 20)), 64)
    arguments = trl.SFTConfig(
        str(tmp_path / "out"),
        max_steps=1,
        max_length=30,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    rows, ours = data.to_hf(packed=True), data.collator
    trainer = trl.SFTTrainer(
        tiny_llama().float(), arguments, train_dataset=rows, processing_class=tokenizer(), data_collator=ours
    )
    with pytest.raises(ValueError, match="was it cut"):
        trainer.train()


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_stock_model_separates_sequences_without_a_cache(mode, tmp_path):
    """What the documentation of the collator says, and that it must be said: with a cache the loss is another one."""
    import torch

    path = write(tmp_path / "p.jsonl", *[{"prompt": f"{i} and", "completion": "x" * i + "y"} for i in range(2, 12)])
    packed, apart = prepare(path, 64), prepare(path, 64, packing=False)
    model = tiny_llama()
    model.train(mode == "train")
    for parameter in model.parameters():
        parameter.data *= 3

    def loss(data, use_cache):
        rows = list(data)
        return model(**data.collator(rows), use_cache=use_cache, num_items_in_batch=packed.counts.trained).loss.item()

    with torch.no_grad():
        alone = loss(apart, False)
        assert loss(packed, False) == pytest.approx(alone, rel=1e-9)
        assert abs(loss(packed, True) - alone) > 1e-4 * alone


# ---- tokens and characters --------------------------------------------------------------------------------------------------


def fast(inner, template=None):
    from transformers import PreTrainedTokenizerFast

    out = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", additional_special_tokens=["<|im_start|>"])
    out.chat_template = template
    return out


def like_gpt2(trim=False):
    """Byte pairs over the words of GPT-2's pattern, as in SmolLM2: "\n\n" is a token, but not before a letter."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("Ġ", "Ġ"), ("Ġ", "P"), ("ð", "Ł"), ("ðŁ", "ĺ")]
    inner = Tokenizer(models.BPE({c: i for i, c in enumerate([*letters, *("".join(m) for m in merges)])}, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    if trim:  # as in Llama 3: the offsets of " Paris" are those of "Paris", and those of a space are empty
        inner.post_processor = processors.ByteLevel(trim_offsets=True)
    return fast(inner)


def like_llama():
    """Metaspace and bytes for what is not in the vocabulary, as sentencepiece has them: some of their offsets are empty."""
    tokens = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), *map(chr, range(33, 127)), "▁", "▁P", "\n"]
    inner = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [("▁", "P")], byte_fallback=True, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return fast(inner)


@pytest.mark.parametrize("make", [like_gpt2, lambda: like_gpt2(trim=True), like_llama], ids=["gpt2", "trimmed", "llama"])
@pytest.mark.parametrize("prompt", ["Answer:\n\n", "Answer: ", "Answer:\n\n\n", "né", "😀", "q  ", "x 日"])
@pytest.mark.parametrize("completion", ["Paris", " Paris", "\n\nParis", "  Paris", "é", "😀 ok", " \n x", "日本"])
def test_the_learnt_tokens_are_those_of_the_answer(make, prompt, completion, tmp_path):
    tok = make()
    data = prepare(write(tmp_path / "p.jsonl", {"prompt": prompt, "completion": completion}), tok=tok)
    labels = data[0]["labels"]
    learnt = labels[labels != -100]
    first = len(labels) - len(learnt)
    assert (labels[:first] == -100).all() and tok.decode(data[0]["input_ids"]).strip() == f"{prompt}{completion}</s>".strip()
    if data.counts.merged:  # one token brings along what it has of the prompt
        assert len(tok.decode(learnt[1:])) < len(f"{completion}</s>") < len(tok.decode(learnt))
    else:
        assert tok.decode(learnt) == f"{completion}</s>"


def test_a_prompt_has_no_labels_where_the_tokenizer_splits_it_otherwise_before_an_answer(tmp_path):
    tok = like_gpt2()
    rows = [{"prompt": "Answer:\n\n", "completion": "Paris"}, {"prompt": "Answer: ", "completion": "Paris"}]
    data = prepare(write(tmp_path / "p.jsonl", *rows), tok=tok, packing=False)
    assert [tok.decode(row["labels"][row["labels"] != -100]) for row in data] == ["Paris</s>", " Paris</s>"]
    assert data.counts.merged == 1  # " P" spans the border


def test_spaces_that_no_token_stands_for_do_not_carry_labels_over(tmp_path):
    words = ["[unk]", "q", "a", "b", ":", "user", "assistant"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[unk]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + ' \n ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    tok = fast(inner, template)
    messages = turns(("user", "q"), ("assistant", "a"), ("user", "q"), ("assistant", "b"))
    data = prepare(write(tmp_path / "m.jsonl", {"messages": messages}), tok=tok)
    labels = data[0]["labels"]
    assert tok.convert_ids_to_tokens(labels[labels != -100].tolist()) == ["a", "b", "</s>"] and not data.counts.merged


def test_a_tokenizer_without_offsets_is_asked_for_the_tokens_of_the_prefixes(tmp_path, monkeypatch):
    path = write(tmp_path / "p.jsonl", {"prompt": "xa", "completion": "by"}, {"prompt": "x", "completion": "y"})
    tok = tokenizer(merges=[("a", "b")])
    fast_rows = prepare(path, tok=tok)
    monkeypatch.setattr(type(tok), "is_fast", False)
    slow_rows = prepare(path, tok=tok)
    assert [rows_as_lists(row) for row in slow_rows] == [rows_as_lists(row) for row in fast_rows]
    assert slow_rows.counts == fast_rows.counts and slow_rows.counts.merged == 1


@pytest.mark.parametrize("answer", ["It ends with <|im_end|>!", "<|im_end|>.", "a<|im_end|>\n<|im_end|>x"])
def test_nothing_but_spaces_is_cut_off_behind_an_end(answer, tmp_path):
    template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\nassistant: ' }}{% endif %}"
    )
    ((text, learnt),) = rows_of(chat(tmp_path, {"messages": turns(("user", "q"), ("assistant", answer))}, template=template))
    assert text.endswith(answer + "<|im_end|>") and learnt == answer + "<|im_end|>"
    template = CHATML.replace("'<|im_end|>' + '\n'", "'<|im_end|>\n \n'")
    ((_, learnt),) = rows_of(chat(tmp_path, {"messages": turns(("user", "q"), ("assistant", "a"))}, template=template))
    assert learnt == "a<|im_end|>"


def test_a_text_that_ends_with_the_end_gets_no_second_one(tmp_path):
    rows = [
        {"prompt": "p", "completion": "abc<|im_end|>"},
        {"text": "abc<|im_end|>"},
        {"prompt": "p", "completion": "a<|im_end|>b"},
    ]
    data = prepare(write(tmp_path / "p.jsonl", *rows), packing=False)
    assert [text for text, _ in rows_of(data)] == ["pabc<|im_end|>", "abc<|im_end|>", "pa<|im_end|>b<|im_end|>"]
    assert [learnt for _, learnt in rows_of(data)] == ["abc<|im_end|>", "bc<|im_end|>", "a<|im_end|>b<|im_end|>"]


# ---- what a template writes -------------------------------------------------------------------------------------------------


@pytest.fixture
def renderings(monkeypatch):
    counts = Counter()
    render = Encoder.render
    monkeypatch.setattr(Encoder, "render", lambda *a, **k: (counts.update(["render"]), render(*a, **k))[1])
    return counts


def call(name="f", **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.mark.parametrize(
    ("written", "calls", "lost"),
    [
        ("m.tool_calls[0] | tojson", [call(city="Paris"), call(city="Rome")], "the name of tool call 1 of message 1"),
        ("m.tool_calls[0] | tojson", [call("f", a=1), call("g", a=1)], "the name of tool call 1 of message 1"),
        ("m.tool_calls[-1] | tojson", [call(city="Rome"), call(city="Rome")], "the name of tool call 0 of message 1"),
        (
            "m.tool_calls | map(attribute='function.name') | join",
            [call(city="Paris")],
            "the argument 'city' of tool call 0 of me",
        ),
        ("m.tool_calls | map(attribute='function.name') | join", [call(n=5)], "the argument 'n' of tool call 0 of message 1"),
        ("m.tool_calls | map(attribute='function.name') | join", [call(n=[{"a": 1}])], "the argument 'n' of tool call 0 of me"),
        ("m.tool_calls[0].function.arguments.city", [call(city="f")], "the name of tool call 0 of message 1"),
        ("m.tool_calls[0].function | tojson", [call(city="x")] * 2, "the name of tool call 1 of message 1"),
        (
            "m.tool_calls | map(attribute='function.name') | join",
            [{"function": {"name": "f", "arguments": '{"city": "Paris"}'}}],
            "the arguments of tool call 0 of message 1",
        ),
        (
            "m.tool_calls | map(attribute='name') | join",
            [{"name": "f", "arguments": {"a": 1}}],
            "the argument 'a' of tool call 0",
        ),
        ("'some'", [call(city="Paris")] * 2, "the name of tool call 0 of message 1"),
    ],
)
def test_each_tool_call_is_to_be_written_with_its_name_and_its_arguments(written, calls, lost, tmp_path):
    template = CHATML.replace("m['content']", "m['content'] + (" + written + " if m.tool_calls else '')")
    messages = turns(("user", "q"), ("assistant", "a"), tool_calls=calls)
    with pytest.raises(DataError, match=f"the chat template leaves out {re.escape(lost)}"):
        chat(tmp_path, {"messages": messages}, template=template)


def test_tool_calls_that_are_written_cost_one_rendering(tmp_path, renderings):
    calls = [call(city="Paris", days=3, units=None, exact=False, names=["a", "b"], empty={}), call("g"), call("f", city="Rome")]
    messages = turns(("user", "q"), ("assistant", ""), tool_calls=calls)
    assert not chat(tmp_path, {"messages": messages}, template=WITH_CALLS, max_length=1024).counts.noted
    assert renderings["render"] == 3  # the conversation, its prompt and what is marked


def test_each_tool_is_to_be_written(tmp_path):
    tools = [{"type": "function", "function": {"name": name}} for name in ("f", "g", "f")] + [{"name": "h"}, {"type": "search"}]
    record = {"messages": turns(("user", "q"), ("assistant", "f g h")), "tools": tools}
    template = "{% for t in tools or [] %}TEST{{ t | tojson }}{% endif %}{% endfor %}" + CHATML
    for test, lost in (
        ("{% if true %}", []),
        ("{% if loop.first %}", ["'g'", "'f'", "'h'", 4]),
        ("{% if loop.index0 not in (1, 3) %}", ["'g'", "'h'"]),
        ("{% if not loop.last %}", [4]),
    ):
        noted = chat(tmp_path, record, template=template.replace("TEST", test)).counts.noted
        assert noted == {
            f"{f'tool {name}' if name == 4 else f'the tool {name}'} is not written by the chat template": 1 for name in lost
        }
    assert chat(tmp_path, record).counts.noted == {"tools are not written by the chat template": 1}


USERS_BACK = (
    "{% for m in messages | selectattr('role', 'equalto', 'user') | list | reverse %}<u>{{ m.content }}{% endfor %}"
    "{% for m in messages if m.role == 'assistant' %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)
SYSTEM_FIRST = (
    "{% for m in messages if m.role == 'system' %}<|im_start|>system\n{{ m.content }}<|im_end|>\n{% endfor %}"
    + CHATML.replace("for m in messages", "for m in messages if m.role != 'system'")
)


@pytest.mark.parametrize("long", ["", " that says more than the template itself"])
def test_messages_in_another_order_are_noted(long, tmp_path):
    for template, said in (
        (USERS_BACK, [("user", "first"), ("user", "second"), ("assistant", "a")]),
        (SYSTEM_FIRST, [("user", "u"), ("system", "s"), ("assistant", "a")]),
    ):
        messages = turns(*((role, text + long) for role, text in said))
        data = chat(tmp_path, {"messages": messages}, template=template)
        assert data.counts.noted == {"messages are written in another order by the chat template": 1}
    messages = turns(("system", "s" + long), ("user", "u" + long), ("assistant", "a" + long))
    assert not chat(tmp_path, {"messages": messages}, template=SYSTEM_FIRST).counts.noted


@pytest.mark.parametrize("text", ["u", "What is the meaning of all that is?"])
def test_a_template_that_leaves_out_the_second_of_two_equal_messages_is_noticed(text, tmp_path):
    once = CHATML.replace(
        "%}{{ '<|im_start|>' +", "%}{% if loop.first or m.content != messages[0].content %}{{ '<|im_start|>' +"
    )
    once = once.replace("{% endfor %}", "{% endif %}{% endfor %}")
    messages = turns(("user", text), ("assistant", "a"), ("user", text), ("assistant", "b"))
    with pytest.raises(DataError, match="leaves out message 2, which is from the user"):
        chat(tmp_path, {"messages": messages}, template=once)
    assert not chat(tmp_path, {"messages": messages}).counts.noted


@pytest.mark.parametrize("content", ["x", "the same words in each of the messages", "\ue000" + "0\ue000"])
def test_many_short_messages_take_as_many_renderings_as_few(content, tmp_path, renderings):
    taken = []
    for n in (2, 200):
        renderings.clear()
        chat(tmp_path, {"messages": turns(*[("user", content)] * n, ("assistant", "a"))}, max_length=1 << 20)
        taken.append(renderings["render"])
    assert taken == [3, 3]


def test_answers_that_are_not_learnt_are_not_rendered_up_to(tmp_path, renderings):
    said = [(role, f"{role} {i}") for i in range(40) for role in ("user", "assistant")]
    chat(tmp_path, {"prompt": turns(*said, ("user", "q")), "completion": turns(("assistant", "a"))}, max_length=1 << 20)
    assert renderings["render"] == 3


def test_what_is_cut_off_is_not_rendered_answer_by_answer(tmp_path, renderings):
    messages = turns(*[(role, f"{role} {i}") for i in range(200) for role in ("user", "assistant")])
    data = chat(tmp_path, {"messages": messages}, max_length=256, too_long="truncate")
    few = renderings["render"]
    whole = chat(tmp_path, {"messages": messages[:20]}, max_length=256, too_long="truncate")
    assert few < 20 and [rows_as_lists(row) for row in data] == [rows_as_lists(row) for row in whole]


def test_a_template_that_writes_nothing_is_refused_whatever_the_length(tmp_path):
    for n in (1, 100):
        with pytest.raises(DataError, match="the chat template leaves out message 0"):
            messages = turns(*[("user", "q"), ("assistant", "a")] * n)
            chat(tmp_path, {"messages": messages}, template="{{ '' }}", too_long="truncate")


def test_flags_and_other_keys_of_a_part_are_not_passed_over(tmp_path):
    def said(**part):
        parts = [{"type": "text", "text": "secret", **part}, {"type": "text", "text": "said"}]
        return {"messages": turns(("user", [{"type": "text", "text": "q", "cache_control": {"a": 1}}]), ("assistant", parts))}

    data = chat(tmp_path, said(weight=1, train=True, loss=None, annotations=[]))
    assert data.counts.noted == {"'cache_control' of a content part is not read": 1}
    for key, value in (("weight", 0), ("train", False), ("loss", 0.5), ("weight", "1"), ("loss", [1])):
        with pytest.raises(DataError, match=rf"'{key}' of part 0 of the content of message 1 is {re.escape(repr(value))}"):
            chat(tmp_path, said(**{key: value}))


def test_a_template_that_goes_through_the_parts_gets_them(tmp_path):
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% for part in m['content'] %}{{ part['text'] }}"
        "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    ) + GENERATION
    parts = [{"type": "text", "text": "so "}, {"type": "output_text", "text": "said", "id": 5}]
    for first in ([], [("assistant", parts)]):
        messages = turns(*first, ("user", parts), ("assistant", parts))
        data = chat(tmp_path, {"messages": messages}, template=template)
        ((text, learnt),) = rows_of(data)
        assert learnt == "so said<|im_end|>" + "\nso said<|im_end|>" * len(first) and "user\nso said<|im_end|>" in text
        assert data.counts.noted == {"'id' of a content part is not read": 1}
        assert rows_of(chat(tmp_path, {"messages": messages})) == rows_of(data)  # joined for a template that takes texts
    with pytest.raises(DataError, match="leaves out message 0"):
        chat(tmp_path, {"messages": turns(("user", "q"), ("assistant", parts))}, template=template)


BLOCKS = (  # the header of an answer is in its block, so that no generation prompt begins it
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ '<A>' + m['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ '[' + m['role'] + ']' + m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<A>think' }}{% endif %}"
)
TALK = [("user", "q"), ("assistant", "one"), ("user", "r"), ("assistant", "two")]


def test_generation_blocks_say_what_is_learnt_where_prompts_do_not(tmp_path):
    ((text, learnt),) = rows_of(chat(tmp_path, {"messages": turns(*TALK)}, template=BLOCKS))
    assert text == "[user]q<A>one<|im_end|>[user]r<A>two<|im_end|>" and learnt == "<A>one<|im_end|><A>two<|im_end|>"
    ((_, learnt),) = rows_of(chat(tmp_path, {"messages": turns(*TALK, weight=0)}, template=BLOCKS))
    assert learnt == "<A>one<|im_end|>"
    plain = re.sub("{% (end)?generation %}", "", BLOCKS)
    with pytest.raises(DataError, match=r"with its generation prompt.*use a template with {% generation %} blocks"):
        chat(tmp_path, {"messages": turns(*TALK)}, template=plain)


def test_generation_blocks_that_are_not_one_for_each_answer_are_taken_only_if_all_is_learnt(tmp_path):
    template = BLOCKS + "{% generation %}!{% endgeneration %}"
    ((_, learnt),) = rows_of(chat(tmp_path, {"messages": turns(*TALK)}, template=template))
    assert learnt == "<A>one<|im_end|><A>two<|im_end|>!<|im_end|>"
    half = BLOCKS.replace("{% generation %}", "").replace("{% endgeneration %}", "") + "{% generation %}!{% endgeneration %}"
    moved = BLOCKS.replace("'<A>' + m['content']", "'<A>'").replace(
        "{% endgeneration %}", "{% endgeneration %}{{ m['content'] }}"
    )
    for record, bad in (
        ({"messages": turns(*TALK, weight=0)}, template),
        ({"messages": turns(*TALK)}, half),
        ({"messages": turns(*TALK)}, moved),
    ):
        with pytest.raises(DataError, match=r"block for each answer.*put each answer on a line of its own"):
            chat(tmp_path, record, template=bad)


def test_the_training_templates_of_trl_are_taken(tmp_path):
    trl = pytest.importorskip("trl")
    folder = Path(trl.__file__).parent / "chat_templates"
    messages = turns(*[(role, f"{text} said") for role, text in TALK])
    for name in ("deepseekv3", "gptoss", "nemotron_3_nano", "phi3", "qwen3"):
        path = folder / f"{name}_training.jinja"
        if not path.exists():
            continue
        tok = tokenizer(path.read_text(encoding="utf-8"), bos=True)
        data = prepare(write(tmp_path / "m.jsonl", {"messages": messages}), 1 << 20, tok=tok)
        labels = data[0]["labels"]
        learnt = tok.decode(labels[labels != -100])
        assert "one said" in learnt and "two said" in learnt and "q said" not in learnt and "r said" not in learnt, name


# ---- what is written on the disk --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("raw", [GOOD + b"\n{", GOOD], ids=["a bad line", "none"])
@pytest.mark.parametrize("there", ["notes", "corrected", "empty", "folder", "link", "pipe"])
def test_a_quarantine_that_no_earlier_run_wrote_is_left_alone(there, raw, tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", raw=GOOD + b"\n{")
    place = quarantine_path(path)
    prepare(path, on_error="quarantine")
    ours = place.read_bytes()
    place.unlink()
    message = {
        "notes": r"has a line that no earlier run wrote \(line 1\)",
        "corrected": r"has a line that no earlier run wrote \(line 2\)",
        "empty": "is empty, so no earlier run wrote it",
    }.get(there, "is not a regular file")
    {
        "notes": lambda: place.write_bytes(b"my own notes\n"),
        "corrected": lambda: place.write_bytes(ours + b'{"text": "corrected"}\n'),
        "empty": place.touch,
        "folder": place.mkdir,
        "link": lambda: place.symlink_to(tmp_path / "nothing"),
        "pipe": lambda: os.mkfifo(place),
    }[there]()
    path.write_bytes(raw)
    before = place.read_bytes() if place.is_file() else place.lstat()
    monkeypatch.setattr(prepare_module, "sequences", None)  # no work is done by then
    with pytest.raises(ValueError, match=f"{re.escape(str(place))} {message}, .*move it away"):
        prepare([path], on_error="quarantine")
    assert (place.read_bytes() if place.is_file() else place.lstat()) == before
    assert sorted(tmp_path.iterdir()) == [path, place]


def test_a_quarantine_of_an_earlier_run_is_replaced(tmp_path):
    path = write(tmp_path / "a.jsonl", raw=GOOD + b"\n{\n17\n")
    prepare(path, on_error="quarantine")
    path.write_bytes(GOOD + b"\n17\n")
    prepare(path, on_error="quarantine")
    (entry,) = map(json.loads, quarantine_path(path).read_bytes().splitlines())
    assert entry["text"] == "17"


def test_a_quarantine_that_cannot_get_its_name_leaves_nothing(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", raw=GOOD + b"\n{")

    def refuse(*names):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(PermissionError, match=f"Permission denied, while writing in {re.escape(str(tmp_path))}; free some"):
        prepare(path, on_error="quarantine")
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def little_room():
    """No file may have more than 100,000 bytes, as if the disk were full then."""
    import resource
    import signal

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_an_error_that_says_where_and_what_to_do(tmp_path, spool, little_room):
    path = write(tmp_path / "t.jsonl", *[{"text": "x" * 3000}] * 20)
    bad = write(tmp_path / "b.jsonl", raw=GOOD + b"\n" + b"\n".join([b"[" + b"x" * 3000] * 50))
    data = prepare(path, 4096)
    before = sorted(tmp_path.iterdir()), sorted(spool.iterdir())
    little_room()
    for call, where, remedy in (
        (lambda: prepare(path, 4096), spool / "unswag-data-", "set TMPDIR to a folder"),
        (lambda: data.save(tmp_path / "saved"), tmp_path, "save into another folder"),
        (lambda: prepare(bad, on_error="quarantine"), tmp_path, 'pass on_error="skip"'),
    ):
        with pytest.raises(OSError, match=f"while writing in {re.escape(str(where))}.*{remedy}") as caught:
            call()
        assert caught.value.errno == 27 and "File too large" in str(caught.value)
        assert (sorted(tmp_path.iterdir()), sorted(spool.iterdir())) == before


def test_of_many_that_save_to_one_folder_one_does_and_the_others_are_told(tmp_path, monkeypatch):
    data = prepare(sized(tmp_path, 4, 6))
    rename = os.rename

    def late(part, target):
        monkeypatch.setattr(os, "rename", rename)
        data.save(target)  # another process is faster
        rename(part, target)

    monkeypatch.setattr(os, "rename", late)
    with pytest.raises(FileExistsError, match="already exists; save into a new folder"):
        data.save(tmp_path / "out" / "saved")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["saved"]
    assert len(PackedDataset.load(tmp_path / "out" / "saved")) == 1


def test_blank_is_not_called_empty(tmp_path):
    for record, reason in (
        ({"instruction": "a", "output": " \n"}, "the field 'output' is blank"),
        ({"instruction": "a", "output": ""}, "the field 'output' is empty"),
        ({"instruction": " ", "output": "b"}, "both instruction and input are blank"),
        ({"instruction": "", "input": "", "output": "b"}, "both instruction and input are empty"),
        ({"messages": turns(("user", "q"), ("assistant", "\t"))}, "the last message is blank"),
        ({"messages": turns(("user", "q"), ("assistant", ""))}, "the last message is empty"),
    ):
        with pytest.raises(DataError, match=reason):
            chat(tmp_path, record)


def test_a_home_that_nobody_expanded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"~/train\.jsonl cannot be read: .*; ~ is .*os\.path\.expanduser"):
        prepare("~/train.jsonl")
    assert prepare(write(Path("~.jsonl"), ROW), 512).counts.kept == 1
