"""The object in a line: what is none, equal keys however they are written, and that it takes linear time."""

import re
import time

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unswag.data import records
from unswag.data.records import Bad


@pytest.mark.parametrize(
    ("line", "key", "times"),
    [
        (b'{"a": 1, "a": 2}', "a", 2),
        (b'{"a": 1, "a": 2, "a": 3}', "a", 3),
        (rb'{"a": 1, "\u0061": 2}', "a", 2),
        (rb'{"\u00e9": 1, "' + "é".encode() + b'": 2}', "é", 2),
        (rb'{"\ud83d\ude00": 1, "' + "😀".encode() + b'": 2}', "😀", 2),
        (rb'{"a\/b": 1, "a/b": 2}', "a/b", 2),
        (rb'{"\n": 1, "\u000a": 2}', "\n", 2),
        (b'{"": 1, "": 2}', "", 2),
        (b'{"a" : 1 , "a"\t:2}', "a", 2),
        (b'{"x": {"a": 1, "a": 2}}', "a", 2),
        (b'{"x": [[{"y": "\\\\", "a": {"a": 1}, "a": 2}]]}', "a", 2),
        (b'{"a": 1, "x": ' + b"[" * 1000 + b"]" * 1000 + b', "a": 2}', "a", 2),
        (b'{"x":' * 1000 + b'{"a": 1, "a": 2}' + b"}" * 1000, "a", 2),
    ],
    ids=lambda v: str(v)[:40],
)
def test_equal_keys(line, key, times):
    orjson.loads(line)  # which takes the last in silence
    with pytest.raises(Bad) as caught:
        records.parse(line)
    assert (caught.value.kind, caught.value.reason) == ("duplicate key", f"the key {key!r} appears {times} times")
    at = line.decode()[caught.value.column - 1 :]
    assert orjson.loads(at[: at.index('"', 1) + 1]) == key


@pytest.mark.parametrize(
    "line",
    [
        rb'{"a": "say \"a\": 1, {\"a\": 2}", "b": "a"}',
        b'{"a": {"a": {"a": 1}}, "b": [{"a": 1}, {"a": 2}]}',
        b'{"a": "b", "b": "a", "c": ":"}',
        rb'{"a": "\\", "b": "\\\"", "c": "}"}',
        b"{}",
    ],
    ids=str,
)
def test_keys_that_are_not_equal(line):
    assert records.parse(line) == orjson.loads(line)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text(max_size=3), JSON, max_size=5))
def test_objects_without_equal_keys_are_read_as_they_are(record):
    assert records.parse(orjson.dumps(record)) == record


@given(st.dictionaries(st.text(max_size=3), JSON, min_size=1, max_size=5), st.data())
def test_one_key_more_is_always_found(record, data):
    key = data.draw(st.sampled_from(sorted(record)))
    spelled = "".join(f"\\u{unit:04x}" for unit in memoryview(key.encode("utf-16-le")).cast("H"))
    line = orjson.dumps(record)[:-1] + f', "{spelled}": 1}}'.encode()
    with pytest.raises(Bad) as caught:
        records.parse(line)
    assert caught.value.kind == "duplicate key" and repr(key) in caught.value.reason


@pytest.mark.parametrize("key", ['"k%d"', r'"\u006b%d"'])
def test_many_keys_take_linear_time(key):
    def seconds(n):
        line = b"{" + b",".join((key % i).encode() + b":1" for i in range(n)) + b"}"
        taken = []
        for _ in range(3):
            begin = time.process_time()
            records.parse(line)
            taken.append(time.process_time() - begin)
        return min(taken)

    assert seconds(160_000) < 80 * seconds(10_000)  # linear: 16, quadratic: 256


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"17", "a number, where an object was expected"),
        (b'"a"', "text, where"),
        (b"null", "null, where"),
        (b"[1]", r"jq -c '\.\[\]'"),
        (b"[", "an object over several lines, or an array"),
        (b'{"a": 1},', "an object over several lines, or an array"),
        (b'  "a": {', "an object over several lines, or an array"),
        (b'{"a": 1', "not JSON: [^;]*$"),
    ],
)
def test_what_is_no_object(line, reason):
    with pytest.raises(Bad) as caught:
        records.parse(line)
    assert re.search(reason, caught.value.reason)
