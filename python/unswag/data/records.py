"""Reads a line of an instruction file: its form, its messages or texts, and the names of the fields that are ignored.

No tokenizer is needed here. A line that cannot be used raises Bad with the reason; ignored fields become notes in the report.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

# Form → its required fields. If two forms fit, the first is taken.
FORMS = {
    "messages": ("messages",),
    "completion": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "conversations": ("conversations",),
    "text": ("text",),
}
OPTIONAL = ("input", "system", "history", "tools", "weight")
FLAGS = ("weight", "train", "loss")  # of a message: with 0 or false it is not learnt

# Speakers in ShareGPT's "from" → roles of chat templates.
_SPEAKERS = (
    {role: role for role in ("system", "developer", "user", "assistant", "tool")}
    | dict.fromkeys(("human",), "user")
    | dict.fromkeys(("gpt", "chatgpt", "bard", "bing", "claude", "model", "bot", "function_call"), "assistant")
    | dict.fromkeys(("observation", "function", "function_response"), "tool")
)
_TEXT_PARTS = ("text", "input_text", "output_text")
_QUARANTINED = {"line", "column", "reason", "text"}


class Bad(Exception):
    """A line that cannot be used; the caller knows its file and number."""

    def __init__(self, kind: str, reason: str, column: int = 1):
        self.kind, self.reason, self.column = kind, reason, column


class NotLearnt(Exception):
    """A valid line whose flags say that nothing in it is to be learnt."""


@dataclass
class Chat:
    """Messages as chat templates take them, and which of them are learnt."""

    messages: list[dict[str, Any]]
    learnt: list[bool]
    tools: list[Any] | None = None
    parts: dict[int, list[str]] = field(default_factory=dict)  # message → its content, if that came in parts

    def in_parts(self) -> Chat:
        """The same with such contents in parts again; `messages` has them joined."""
        given = {i: [{"type": "text", "text": text} for text in texts] for i, texts in self.parts.items()}
        messages = [{**m, "content": given[i]} if i in given else m for i, m in enumerate(self.messages)]
        return Chat(messages, self.learnt, self.tools)


@dataclass
class Instruction:
    """A record of Stanford Alpaca; `history` has the earlier turns, each (user, assistant)."""

    instruction: str
    input: str
    output: str
    system: str = ""
    history: list[tuple[str, str]] = field(default_factory=list)
    tools: list[Any] | None = None

    def chat(self) -> Chat:
        asked = f"{self.instruction}\n\n{self.input}" if self.input else self.instruction
        turns = [("system", self.system)] if self.system else []
        for user, assistant in (*self.history, (asked, self.output)):
            turns += [("user", user), ("assistant", assistant)]
        messages = [{"role": role, "content": content} for role, content in turns]
        return Chat(messages, [role == "assistant" for role, _ in turns], self.tools)


@dataclass
class Plain:
    """Text to be learnt, after text that is not."""

    prompt: str
    answer: str


# ---- the object of a line --------------------------------------------------------------------------------------------

# In valid JSON: a string (then a colon, if it is a key), or the beginning or end of an object. Possessive: never backtracks.
_TOKEN = re.compile(rb'"([^"\\]*+(?:\\.[^"\\]*+)*+)"[ \t\r\n]*+(:?)|[{}]')


def parse(line: bytes) -> dict[str, Any]:
    """The object in `line`.  Raises Bad for anything else, and for an object with duplicate keys."""
    try:
        text = line.decode()
    except UnicodeDecodeError as e:
        column = len(line[: e.start].decode()) + 1
        raise Bad("invalid UTF-8", f"byte {line[e.start]:#04x} is not UTF-8 ({e.reason})", column) from None
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as e:
        over = line.strip().startswith(b"[") or line.rstrip().endswith((b",", b"{", b"["))
        hint = "; an object over several lines, or an array? Write one object per line: jq -c . or jq -c '.[]'" if over else ""
        raise Bad("invalid JSON", f"not JSON: {e.msg}{hint}", min(max(e.pos, 0), len(text)) + 1) from None
    if isinstance(record, list):
        raise Bad("not an object", "an array, where an object was expected; write one object per line: jq -c '.[]'")
    if not isinstance(record, dict):
        raise Bad("not an object", f"{json_type(record)}, where an object was expected")
    _refuse_equal_keys(line)
    return record


def _refuse_equal_keys(line: bytes) -> None:
    """Raises Bad for duplicate keys at any depth, of which JSON parsers silently keep the last. One pass over the tokens."""
    objects: list[dict[bytes, int]] = []  # for each open object: how often each key was seen
    again: list[tuple[bytes, int] | None] = []  # and the first duplicate key, with its position
    for token in _TOKEN.finditer(line):
        if token[0] == b"{":
            objects.append({})
            again.append(None)
        elif token[0] == b"}":
            seen, found = objects.pop(), again.pop()
            if found:
                key, at = found
                raise Bad(
                    "duplicate key",
                    f"the key {key.decode()!r} appears {seen[key]} times",
                    len(line[:at].decode()) + 1,
                )
        elif token[2]:
            key = token[1]
            if b"\\" in key:
                key = orjson.loads(b'"' + key + b'"').encode()
            seen = objects[-1]
            seen[key] = seen.get(key, 0) + 1
            if seen[key] > 1 and (again[-1] is None or again[-1][0] == key):
                again[-1] = (key, token.start())


def is_quarantined(line: bytes) -> bool:
    """Whether on_error="quarantine" wrote the line."""
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        return False
    return isinstance(record, dict) and record.keys() == _QUARANTINED


def json_type(value: Any) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return "a number"
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def empty(text: str) -> str:
    """The word for a text without content."""
    return "blank" if text else "empty"


def some(names: Iterable[str], most: int = 20) -> str:
    """The names for a message: sorted, and at most `most` of them."""
    found = sorted(names)
    return str(found[:most]) + (f" and {len(found) - most} more" if len(found) > most else "")


# ---- what it says ----------------------------------------------------------------------------------------------------


def read(record: dict[str, Any], columns: Mapping[str, str]) -> tuple[Chat | Instruction | Plain, list[str]]:
    """The content of the record, in its form, and notes on the fields that are ignored."""
    if record.keys() == _QUARANTINED:
        raise Bad("quarantined", 'this line was written by on_error="quarantine"; replace it by its corrected text')
    fields = _Fields(record, columns)
    form = fields.form()
    notes: list[str] = []
    said: Chat | Instruction | Plain
    if form in ("messages", "conversations"):
        said = _chat(fields, fields.get(form, list), 0, notes)
    elif form == "completion":
        said = _completion(fields, notes)
    elif form == "text":
        said = Plain("", fields.answer("text"))
    else:
        said = _instruction(fields)
    weight = fields.peek("weight")
    if isinstance(weight, (int, float)) and weight in (0, 1):
        fields.read.add(fields.column("weight"))
        if not weight:
            raise NotLearnt
    if isinstance(said, Chat) and not any(said.learnt):
        raise NotLearnt
    return said, notes + fields.unread()


class _Fields:
    """The fields of a record, looked up through `columns`; remembers which were read."""

    def __init__(self, record: dict[str, Any], columns: Mapping[str, str]):
        self.record, self.columns = record, columns
        self.read: set[str] = set()

    def column(self, name: str) -> str:
        return self.columns.get(name, name)

    def peek(self, name: str) -> Any:
        return self.record.get(self.column(name))

    def form(self) -> str:
        """The first form whose fields are all present; if there is none, the closest one, for the error message."""
        for form, names in FORMS.items():
            if all(self.peek(name) not in (None, []) for name in names):
                return form
        there = {form: sum(self.column(n) in self.record for n in names) / len(names) for form, names in FORMS.items()}
        nearest = max(there, key=lambda form: there[form])
        if not there[nearest]:
            wanted = ", ".join(" and ".join(map(self.column, names)) for names in FORMS.values())
            raise Bad("missing field", f"none of the forms ({wanted}), but {some(self.record)}; map other names with `columns`")
        return nearest

    def get(self, name: str, *types: type) -> Any:
        column = self.column(name)
        if column not in self.record:
            raise Bad("missing field", f"the field {column!r} is missing; the line has {some(self.record)}")
        self.read.add(column)
        value = self.record[column]
        if not isinstance(value, types):
            names = " or ".join("text" if t is str else "a list" for t in types)
            raise Bad("wrong type", f"the field {column!r} is {json_type(value)}, where {names} was expected")
        return value

    def maybe(self, name: str, *types: type) -> Any:
        """None if the field is missing, null or empty."""
        self.read.add(self.column(name))
        return None if says_nothing(self.peek(name)) else self.get(name, *types)

    def answer(self, name: str) -> str:
        value = self.get(name, str)
        if not value.strip():
            raise Bad("empty output", f"the field {self.column(name)!r} is {empty(value)}: there is nothing to learn")
        return value

    def tools(self) -> list[Any] | None:
        """A list, or the JSON text of one."""
        tools, column = self.maybe("tools", list, str), self.column("tools")
        if isinstance(tools, str):
            try:
                tools = orjson.loads(tools) or None
            except orjson.JSONDecodeError as e:
                raise Bad("wrong type", f"the field {column!r} is text, but not JSON: {e.msg}") from None
        if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
            raise Bad("wrong type", f"the field {column!r} must be a list of objects, one per tool")
        return tools

    def unread(self) -> list[str]:
        rest = [name for name, value in self.record.items() if name not in self.read and not says_nothing(value)]
        return [f"column {name!r} is not read" for name in rest]


def says_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, (str, list, dict)) and not value)


def _completion(fields: _Fields, notes: list[str]) -> Chat | Plain:
    prompt, completion = fields.get("prompt", str, list), fields.get("completion", str, list)
    if isinstance(prompt, list) != isinstance(completion, list):
        raise Bad("wrong type", "prompt and completion must both be texts, or both lists of messages")
    if isinstance(prompt, list):
        return _chat(fields, prompt + completion, len(prompt), notes)
    return Plain(prompt, fields.answer("completion"))


def _instruction(fields: _Fields) -> Instruction:
    instruction, output = fields.get("instruction", str), fields.answer("output")
    extra = fields.maybe("input", str) or ""
    if not instruction.strip() and not extra.strip():
        raise Bad("empty instruction", f"both instruction and input are {empty(instruction + extra)}")
    history = fields.maybe("history", list) or []
    for i, turn in enumerate(history):
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(said, str) for said in turn)):
            what = f"{i} of {fields.column('history')!r}"
            raise Bad("wrong type", f"turn {what} must be a list of two texts, the question and the answer")
    pairs = [(asked, answered) for asked, answered in history]
    return Instruction(instruction, extra, output, fields.maybe("system", str) or "", pairs, fields.tools())


# ---- messages --------------------------------------------------------------------------------------------------------


def _chat(fields: _Fields, given: list[Any], prompt: int, notes: list[str]) -> Chat:
    """`given` with the system prompt and the tools of the record; its first `prompt` messages are not learnt."""
    found = [_message(i, message, notes) for i, message in enumerate(given)]
    messages = [message for message, _, _ in found]
    if not messages or messages[-1]["role"] != "assistant":
        raise Bad("no answer", "the last message is not from the assistant: there is nothing to learn")
    if not messages[-1]["content"].strip() and "tool_calls" not in messages[-1]:
        raise Bad("empty output", f"the last message is {empty(messages[-1]['content'])}: there is nothing to learn")
    learnt = [learnt and i >= prompt for i, (_, learnt, _) in enumerate(found)]
    parts = {i: texts for i, (_, _, texts) in enumerate(found) if texts}
    system = fields.maybe("system", str)
    if system and messages[0]["role"] != "system":
        messages, learnt = [{"role": "system", "content": system}, *messages], [False, *learnt]
        parts = {i + 1: texts for i, texts in parts.items()}
    elif system and messages[0]["content"] != system:
        column = fields.column("system")
        raise Bad("two system prompts", f"the field {column!r} and the first message are different system prompts; keep one")
    return Chat(messages, learnt, fields.tools(), parts)


def _message(i: int, given: Any, notes: list[str]) -> tuple[dict[str, Any], bool, list[str]]:
    """(the message as a template takes it, whether it is learnt, the parts of its content).

    Null values are treated as missing.
    """
    if not isinstance(given, dict):
        raise Bad("wrong type", f"message {i} is {json_type(given)}, where an object was expected")
    rest = {key: value for key, value in given.items() if value is not None}
    who, what = ("role" if "role" in given else "from" if "from" in given else "role"), "content"
    if "content" not in given and "value" in given:
        what = "value"

    def wrong(key: str) -> Bad:
        found = json_type(given[key]) if key in given else "missing"
        return Bad("wrong type", f"{key!r} of message {i} is {found}, where text was expected")

    role = rest.pop(who, None)
    if not isinstance(role, str):
        raise wrong(who)
    called = who == "from" and role == "function_call"
    if who == "from":
        if role not in _SPEAKERS:
            raise Bad("wrong type", f"'from' of message {i} is {role!r}; choose from {', '.join(_SPEAKERS)}")
        role = _SPEAKERS[role]

    calls = rest.pop("tool_calls", None) or None
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise Bad("wrong type", f"'tool_calls' of message {i} must be a list of objects")
    if role == "assistant" and calls is None and isinstance(rest.get("function_call"), dict):
        calls = [{"type": "function", "function": rest.pop("function_call")}]

    content, parts = rest.pop(what, None), list[str]()
    if isinstance(content, list):
        parts = _parts(i, content, notes)
        content = "".join(parts)
    elif not isinstance(content, str):
        content = None
    if content is None and calls is not None:
        content = ""
    if content is None:
        raise wrong(what)
    if called and (made := _calls(content)):
        content, calls = "", made

    learnt = _learnt(i, role, rest, notes)
    message = {"role": role, "content": content, **({"tool_calls": calls} if calls else {}), **rest}
    return message, role == "assistant" and learnt, parts


def _parts(i: int, content: list[Any], notes: list[str]) -> list[str]:
    """The texts of a content in parts."""
    texts = []
    for k, part in enumerate(content):
        text = part.get("text") if isinstance(part, dict) and part.get("type", "text") in _TEXT_PARTS else part
        if not isinstance(text, str):
            kind = repr(part["type"]) if isinstance(part, dict) and "type" in part else json_type(part)
            raise Bad(
                "not text", f"part {k} of the content of message {i} is {kind}, where text was expected: tokenizers take text"
            )
        for key, value in part.items() if isinstance(part, dict) else ():
            if key in ("type", "text") or says_nothing(value):
                continue
            if key not in FLAGS:
                notes.append(f"{key!r} of a content part is not read")
            elif not isinstance(value, (int, float)) or value != 1:
                raise Bad(
                    "wrong type",
                    f"{key!r} of part {k} of the content of message {i} is {value!r}, but a part is learnt if its message is; "
                    "put the flag on the message, or split it",
                )
        texts.append(text)
    return texts


def _calls(content: str) -> list[dict[str, Any]] | None:
    """The tool calls that ShareGPT's "function_call" writes as JSON; None for anything else, which is kept as text."""
    try:
        found = orjson.loads(content)
    except orjson.JSONDecodeError:
        return None
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(call, dict) and "name" in call for call in calls):
        return None
    return [{"type": "function", "function": call} for call in calls]


def _learnt(i: int, role: str, message: dict[str, Any], notes: list[str]) -> bool:
    """Removes the flags from the message; returns whether it is to be learnt."""
    flags = {key: message.pop(key) for key in FLAGS if key in message}
    for key, value in flags.items():
        if not isinstance(value, (int, float)) or value not in (0, 1):
            raise Bad("wrong type", f"{key!r} of message {i} is {value!r}, where 0 or 1 (false or true) was expected")
    if len({bool(value) for value in flags.values()}) > 1:
        raise Bad("wrong type", f"{' and '.join(map(repr, flags))} of message {i} contradict each other")
    if role != "assistant":
        asked = [key for key, value in flags.items() if value]
        notes += [f"{key!r} of a {role} message is ignored: only answers are learnt" for key in asked]
    return all(flags.values())
