"""From .jsonl to packed rows: what is learnt, what is refused, and that nothing is lost on the way."""

import gzip
import io
import itertools
import json
import os
import pickle
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import unswag
from unswag import data as data_module
from unswag.data import DataError, PackedDataset, _pack, prepare_data, quarantine_path

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


def test_form_is_found_for_each_file(tmp_path):
    paths = [write(tmp_path / "a.jsonl", ROW), write(tmp_path / "b.jsonl", {"prompt": "a", "completion": "b"})]
    assert [learnt for _, learnt in rows_of(prepare(paths, packing=False))] == ["2<|im_end|>", "b<|im_end|>"]
    with pytest.raises(DataError, match="'instruction' is missing"):  # and is that of its first line
        prepare(write(tmp_path / "c.jsonl", ROW, {"prompt": "a", "completion": "b"}))


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
    with pytest.raises(DataError, match="writes message 1 otherwise when others follow"):
        prepare(write(tmp_path / "m.jsonl", {"messages": turns}), tok=tokenizer(template))
    thinking = CHATML.replace("m['content']", "(m['content'] if loop.last or m['role'] == 'user' else '…')")
    with pytest.raises(DataError, match="writes message 1 otherwise when others follow"):  # only the answer is rewritten
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
    order, packs = _pack(np.array([2, 7, 5, 3, 4, 9]), 10)
    rows = [order[a:b].tolist() for a, b in itertools.pairwise(packs)]
    assert rows == [[0], [1, 3], [2, 4], [5]]  # 9 | 7 + 3 | 5 + 4 | 2: every row but the last is as full as it can be


@given(st.lists(st.integers(1, 50), min_size=1, max_size=200), st.integers(50, 120))
@settings(deadline=None)
def test_packing_keeps_every_sequence_once_and_is_tight(lengths, capacity):
    lengths = np.array(lengths)
    order, packs = _pack(lengths, capacity)
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
        monkeypatch.setattr(data_module, "BATCH_ROWS", batch)
        folders.append(tmp_path / f"out{batch}")
        prepare(path, 100).save(folders[-1])
    first, *others = (
        [(f / name).read_bytes() for name in ("tokens.bin", "order.bin", "packs.bin", "manifest.json")] for f in folders
    )
    assert all(other == first for other in others)


def test_long_lines_make_small_batches(tmp_path, monkeypatch):
    sizes = []
    encode = data_module._Encoder.encode
    monkeypatch.setattr(data_module._Encoder, "encode", lambda self, texts: (sizes.append(len(texts)), encode(self, texts))[1])
    monkeypatch.setattr(data_module, "BATCH_BYTES", 100)
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
    "empty instruction": (b'{"instruction": " ", "output": "b"}', 1, "empty instruction", "empty"),
    "duplicate key": (b'{"instruction": "a", "output": "b", "output": "c"}', 37, "duplicate key", "'output' is there 2 times"),
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
    with pytest.raises(DataError, match="'content' is there 2 times"):
        prepare(write(tmp_path / "m.jsonl", raw=raw), tok=tokenizer(CHATML))


def test_a_line_longer_than_the_limit_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(data_module, "MAX_LINE_BYTES", 100)
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
        ({"columns": {"text": "x"}}, r"\['text'\]"),
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
    with pytest.raises(FileExistsError, match="there already"):
        data.save(tmp_path / "deep" / "saved")
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["saved"]


@pytest.mark.parametrize("harm", ["cut", "changed", "missing", "no manifest", "newer", "not ours"])
def test_what_was_harmed_is_not_loaded(harm, tmp_path):
    folder = tmp_path / "saved"
    prepare(sized(tmp_path, 4, 6)).save(folder)
    tokens, manifest = folder / "tokens.bin", folder / "manifest.json"
    raw, about = bytearray(tokens.read_bytes()), json.loads(manifest.read_bytes())
    message = {
        "cut": "has 36 bytes, where the manifest has 40",
        "changed": "has changed since it was saved",
        "missing": "has None bytes",
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
    monkeypatch.setattr(data_module.os, "rename", lambda *a: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        data.save(tmp_path / "out" / "saved")
    assert not list((tmp_path / "out").iterdir())


def test_a_full_disk_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "spool"))
    (tmp_path / "spool").mkdir()
    monkeypatch.setattr(data_module.os.path, "getsize", lambda path: 12)
    with pytest.raises(OSError, match="shorter than what was written to it; is the disk full"):
        prepare(sized(tmp_path, 4, 6))
    assert not list((tmp_path / "spool").iterdir())


def test_what_gets_its_name_is_on_the_disk_by_then(tmp_path, monkeypatch):
    log = []
    for name in ("fsync", "replace", "rename"):
        call = getattr(os, name)
        monkeypatch.setattr(data_module.os, name, lambda *a, name=name, call=call: (log.append(name), call(*a))[1])
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
    monkeypatch.setattr(data_module.time, "monotonic", lambda: now.__setitem__(0, now[0] + 0.1) or now[0])
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
