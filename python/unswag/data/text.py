"""Turns a record into token ids: renders it by the chat template or as an Alpaca prompt, and marks what is learnt."""

from __future__ import annotations

import contextlib
import copy
import functools
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unswag.data import records
from unswag.data.disk import TRAINED
from unswag.data.records import Bad, Chat, Instruction, Plain
from unswag.data.report import NAMES

_SPACES = "Ġ \t\n\r\f\v"  # as tokens write them
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_MANY = 64  # messages: with more, one rendering for each of them is expensive
# The two prompts of Stanford Alpaca (Taori et al., 2023); a system prompt replaces their first paragraph.
_ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)


@dataclass
class Text:
    """Pieces of text, every other one trained: prompt, answer, prompt, answer … and perhaps a prompt at the end."""

    pieces: list[str]
    bos: bool  # whether BOS is put first, as for plain texts; a chat template writes its own
    notes: list[str]  # which parts of the line were ignored or changed
    place: str = ""  # path:line


class Encoder:
    """Text → token ids, with the trained ones marked."""

    def __init__(self, tokenizer: Any, template: str, max_length: int, too_long: str):
        self.tokenizer, self.max_length, self.too_long = tokenizer, max_length, too_long
        self.offsets = bool(getattr(tokenizer, "is_fast", False))  # whether it gives the characters of each token
        eos, bos, pad = tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id
        if eos is None:
            raise ValueError(
                "prepare_data: the tokenizer has no EOS token; set tokenizer.eos_token, or the model never learns to stop"
            )
        self.eos: int = eos
        self.pad: int = eos if pad is None else pad  # padding has no labels, so any token will do
        # Whether the tokenizer itself would start a plain text with BOS.
        self.bos = [bos] if bos is not None and tokenizer("")["input_ids"][:1] == [bos] else []
        has_template = getattr(tokenizer, "chat_template", None) is not None
        if template == "chat" and not has_template:
            raise ValueError(
                'prepare_data: template="chat", but the tokenizer has no chat template; set tokenizer.chat_template'
            )
        self.use_chat = template == "chat" or (template == "auto" and has_template)
        self.has_template = has_template

    def text(self, said: Chat | Instruction | Plain, notes: list[str]) -> Text:
        if isinstance(said, Plain):
            return Text([said.prompt, said.answer], True, notes)
        if isinstance(said, Instruction) and not self.use_chat:
            return self._alpaca(said, notes)
        return self._chat(said.chat() if isinstance(said, Instruction) else said, notes)

    def _alpaca(self, said: Instruction, notes: list[str]) -> Text:
        if said.history:
            raise Bad(
                "wrong type",
                'the Alpaca form has one turn, but the line has a history; use a chat template and template="chat"',
            )
        if said.tools:
            notes = [*notes, "tools are not written by the Alpaca form"]
        first = said.system or (_ALPACA_INPUT if said.input else _ALPACA)
        extra = f"\n\n### Input:\n{said.input}" if said.input else ""
        prompt = f"{first}\n\n### Instruction:\n{said.instruction}{extra}\n\n### Response:\n"
        return Text([prompt, said.output], True, notes)

    def _chat(self, chat: Chat, notes: list[str]) -> Text:
        if not self.has_template:
            raise Bad("chat template", "messages need a chat template, but the tokenizer has none; set tokenizer.chat_template")
        try:
            return self._turns(chat, notes)
        except Bad:
            if chat.parts:  # for a template that iterates over the parts of a content
                with contextlib.suppress(Bad):
                    return self._turns(chat.in_parts(), notes)
            raise

    def _turns(self, chat: Chat, notes: list[str]) -> Text:
        """The rendered conversation, cut where learnt answers begin and end.

        Quadratic in the messages: each learnt answer within max_length takes two renderings of the text before it. Everything
        else takes a fixed number of renderings, with the exceptions that `_unwritten` names.
        """
        whole = self.render(chat.messages, chat.tools)
        kept = len(whole)  # characters that are looked at
        if len(chat.messages) > _MANY and self.too_long == "drop":
            ids = self._ids([whole])[0]
            if (self._end(ids, True) or len(ids) + 1) > self.max_length:
                return Text([whole], False, notes)  # it will be dropped: no need to render more
        elif len(chat.messages) > _MANY and self.offsets:
            ((_, _, ends),) = map(self._spans, *self._tokens([whole]))
            kept = int(ends[: self.max_length + 1].max(initial=0))
        try:
            learnt = self._answers(chat, whole, kept)
        except Bad:
            marked = self._generated(chat, whole)
            if marked is None:
                raise
            learnt = marked
        pieces, done = list[str](), 0
        for begin, end in learnt:
            pieces += [whole[done:begin], whole[begin:end]]
            done = end
        return Text([*pieces, whole[done:]] if done < len(whole) else pieces, False, notes + self._unwritten(chat, whole))

    def _answers(self, chat: Chat, whole: str, kept: int) -> list[tuple[int, int]]:
        """Where the answers that are learnt begin and end in the text, by rendering the conversation up to there."""
        messages, tools, done = chat.messages, chat.tools, 0
        found = []
        for i, message in enumerate(messages):
            if not chat.learnt[i]:
                continue
            if done > kept:
                break
            told = whole if i == len(messages) - 1 else self.render(messages[: i + 1], tools)
            asked = self.render(messages[:i], tools, add_generation_prompt=True) if i else self._opening(message, told, tools)
            if len(asked) < done or not (told.startswith(asked) and whole.startswith(told)):
                raise Bad(
                    "chat template",
                    f"the chat template writes message {i} differently when others follow, or does not begin it with its "
                    "generation prompt, so the answer cannot be told from the prompt; put each answer on a line of its "
                    "own, or use a template with {% generation %} blocks "
                    "(trl.chat_template_utils.get_training_chat_template)",
                )
            done = len(told)
            found.append((len(asked), done))
        return found

    def _opening(self, message: dict[str, Any], told: str, tools: list[Any] | None) -> str:
        """What the template writes before the content of the first message: the prefix that no other content changes."""
        other = "\ue000" if isinstance(message["content"], str) else [{"type": "text", "text": "\ue000"}]
        return told[: _common(told, self.render([{**message, "content": other}], tools))]

    def _generated(self, chat: Chat, whole: str) -> list[tuple[int, int]] | None:
        """The same positions, from the {% generation %} blocks of the template; None if it has none."""
        try:
            from transformers.utils.chat_template_utils import render_jinja_template
        except ModuleNotFoundError:
            return None
        if not hasattr(self.tokenizer, "get_chat_template"):
            return None
        template = self.tokenizer.get_chat_template(tools=chat.tools)
        if not _GENERATION.search(template):
            return None
        texts: Sequence[str]
        blocks: Sequence[Sequence[tuple[int, int]]]
        texts, blocks = render_jinja_template(  # type: ignore[assignment,str-unpack]
            conversations=[chat.messages],
            tools=chat.tools or None,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        answers = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
        said = [[place.text for place in _places(chat.messages[i], i) if place.text in whole] for i in answers]
        parts = [whole[begin:end] for begin, end in blocks[0]]
        paired = len(parts) == len(answers)
        if not paired and all(chat.learnt[i] for i in answers):  # then it does not matter which block is whose
            parts = ["".join(parts)] * len(answers)
        fits = texts == [whole] and len(parts) == len(answers) <= len(blocks[0])
        if not fits or not all(text in part for part, texts in zip(parts, said, strict=True) for text in texts):
            raise Bad(
                "chat template",
                "the chat template does not have one {% generation %} block for each answer, and its generation prompt does "
                "not show where answers begin; put each answer on a line of its own",
            )
        learnt = [chat.learnt[i] for i in answers] if paired else [True] * len(blocks[0])
        return [block for block, wanted in zip(blocks[0], learnt, strict=True) if wanted]

    def _unwritten(self, chat: Chat, whole: str) -> list[str]:
        """Notes on what the template does not write. Raises Bad for a message or a part of a tool call that it leaves out.

        Contents that the text shows in their order were written, unless they are so short that the template itself may contain
        them. Otherwise each value gets a mark (equal values share one), and the values whose marks one rendering shows were
        written. Each of the others costs a rendering: if another value gives the same text, the template leaves it out.
        """
        messages, tools = chat.messages, chat.tools
        notes = list[str]()

        def changes(others: list[dict[str, Any]], tools: list[Any] | None = tools) -> bool:
            try:
                return self.render(others, tools) != whole
            except Bad:
                return True

        def without(keys: Collection[str]) -> list[dict[str, Any]]:
            return [{k: v for k, v in message.items() if k not in keys} for message in messages]

        def put(i: int, message: dict[str, Any] | None) -> list[dict[str, Any]]:
            return [*messages[:i], *([message] if message else []), *messages[i + 1 :]]

        def left_out(what: str) -> Bad:
            return Bad("chat template", f"the chat template leaves out {what}")

        places = [place for i, message in enumerate(messages) for place in _places(message, i)]
        given = tools or []
        names = [_name(tool, k) for k, tool in enumerate(given)]
        contents, at = [place for place in places if place.content], 0
        for place in contents:
            found = whole.find(place.text, at) if at >= 0 else -1
            at = found + len(place.text) if found >= 0 else -1
        marks = _Marks(whole, [*places, *filter(None, names)])
        asked = at < 0 or tools or len(contents) < len(places) or any(len(place.text) < 16 for place in contents)
        if asked:
            with contextlib.suppress(Bad):  # then each is tested alone
                marks.find(self.render(marks.on(messages, places), marks.on(given, filter(None, names))))
        for place in places if asked else []:
            i, message = place.at, messages[place.at]
            if not marks.written(place):
                if not changes(put(i, _with(message, {place.path: place.another()}))):
                    bare = {k: v for k, v in message.items() if k != "tool_calls"}
                    whole_call = not place.content and not changes(put(i, bare))
                    raise left_out(f"the tool calls of message {i}" if whole_call else place.what)
                if place.content and marks.times[place.key] and not changes(put(i, None)):  # an equal one was written
                    raise left_out(place.what)
            if place.content and (place.text not in whole or 0 < marks.times[place.key] < marks.wanted[place.key]):
                notes.append(f"what the {message['role']} says is written differently by the chat template")
        if asked and not marks.in_order(places):
            notes.append("messages are written in another order by the chat template")
        others = {key: None for message in messages for key in message if key not in ("role", "content", "tool_calls")}
        if others and changes(without(others)):  # then find which, of the first few only: a line should take linear time
            if len(others) > NAMES:
                notes.append(f"only the first {NAMES} keys of messages were looked for in the output of the chat template")
            others = {key: None for key in list(others)[:NAMES] if not changes(without([key]))}
        notes += [f"{key!r} of a message is not written by the chat template" for key in others]
        lost = list[str]()
        for k, (tool, name) in enumerate(zip(given, names, strict=True)):
            other = [_with(tool, {name.path: name.another()})] if name else []
            if not (name and marks.written(name)) and not changes(messages, [*given[:k], *other, *given[k + 1 :]]):
                lost.append(f"{name.what if name else f'tool {k}'} is not written by the chat template")
        return notes + (lost if len(lost) < len(names) else ["tools are not written by the chat template"] * bool(lost))

    def render(self, messages: list[dict[str, Any]], tools: list[Any] | None, **options: Any) -> str:
        if tools:
            options["tools"] = tools
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except Exception as e:  # templates are programs and may raise anything
            refused = type(e).__module__.startswith("jinja2")
            why = f"refuses it: {e}" if refused else f"fails: {type(e).__name__}: {e}"
            raise Bad("chat template", f"the chat template {why}") from None
        if not isinstance(text, str):
            raise ValueError(
                f"prepare_data: apply_chat_template(…, tokenize=False) of {type(self.tokenizer).__name__} returns "
                f"{type(text).__name__}, where text was expected"
            )
        return text

    def encode(self, texts: Sequence[Text]) -> list[tuple[np.ndarray, bool]]:
        """(ids with bit 31 on the trained ones, whether a token spans the end of a prompt) of each text."""
        if not texts:
            return []
        wholes = ["".join(text.pieces) for text in texts]
        if self.offsets:
            spans = map(self._spans, *self._tokens(wholes))
            return [
                self._marked(text, ids, *_covered(text.pieces, *span)) for text, (ids, *span) in zip(texts, spans, strict=True)
            ]
        prefixes = ["".join(text.pieces[: i + 1]) for text in texts for i in range(len(text.pieces) - 1)]
        ids = iter(self._ids(wholes + prefixes))
        whole_ids = [next(ids) for _ in wholes]
        return [
            self._marked(text, whole, *_after(whole, [next(ids) for _ in text.pieces[1:]]))
            for text, whole in zip(texts, whole_ids, strict=True)
        ]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]

    def _tokens(self, texts: list[str]) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
        """(ids, offsets) of each text."""
        found = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=True, verbose=False
        )
        return found["input_ids"], found["offset_mapping"]

    @functools.cached_property
    def _spaces(self) -> np.ndarray:
        """[ids, 2]: how many spaces each token begins and ends with, which `trim_offsets` removes from its offsets."""
        vocabulary = self.tokenizer.get_vocab()
        spaces = np.zeros((max(vocabulary.values()) + 1, 2), np.int64)
        for token, i in vocabulary.items():
            spaces[i] = [len(token) - len(bare) for bare in (token.lstrip(_SPACES), token.rstrip(_SPACES))]
        return spaces

    def _spans(self, ids: list[int], offsets: list[tuple[int, int]]) -> tuple[list[int], np.ndarray, np.ndarray]:
        """(ids, where each token begins and ends in the text), from offsets that may have been trimmed or be empty."""
        begin, end = np.asarray(offsets, np.int64).reshape(-1, 2).T
        reached = np.maximum.accumulate(np.concatenate([[0], end]))[:-1]
        if (begin > reached).any():  # a gap: spaces that were trimmed off a token, or characters that no token stands for
            before, after = self._spaces[ids].T
            follows = np.concatenate([begin[1:] - before[1:], end[-1:] + after[-1:]])
            begin = np.maximum(np.minimum(begin, reached), begin - before)
            end = np.maximum(end, np.minimum(follows, end + after))
        return ids, begin, np.maximum(end, begin + 1)  # an empty one is a byte of the character there

    def _end(self, ids: list[int], chat: bool) -> int | None:
        """The number of ids up to and including the final EOS; None if they do not end with one.

        A chat template may write a line break after the EOS. No model generates it, so it is not counted.
        """
        if self.eos not in ids:
            return None
        end = len(ids) - ids[::-1].index(self.eos)
        rest = ids[end:]
        return end if not rest or (chat and not self.tokenizer.decode(rest).strip()) else None

    def _marked(self, text: Text, ids: list[int], trained: np.ndarray, merged: bool) -> tuple[np.ndarray, bool]:
        end = self._end(ids, not text.bos)
        if end is None:
            ids = [*ids, self.eos]
            end = len(ids)
            trained = np.append(trained, len(text.pieces) % 2 == 0)  # not after an answer that is not learnt
        out = np.array([*(self.bos if text.bos else []), *ids[:end]], np.uint32)
        marks = np.concatenate([np.zeros(len(out) - end, bool), trained[:end]])
        marks[0] = False  # nothing comes before it: in a row it would be predicted from another sequence
        return out | marks * TRAINED, merged


def _covered(pieces: list[str], begin: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, bool]:
    """(tokens that stand for a character of an answer, whether one of them stands for one of a prompt as well)."""
    learnt = np.repeat(np.arange(len(pieces)) % 2, [len(piece) for piece in pieces])
    before = np.concatenate([[0], np.cumsum(learnt)])  # characters of answers before each character
    end = np.minimum(end, len(learnt))
    characters = before[end] - before[begin]
    return characters > 0, bool(((characters > 0) & (characters < end - begin)).any())


def _after(ids: list[int], prefixes: list[list[int]]) -> tuple[np.ndarray, bool]:
    """The same for a tokenizer without offsets, from the ids of the text up to each border."""
    borders = [_common(prefix, ids) for prefix in prefixes]
    # If it is shorter than the prefix, the tokenizer joined characters from both sides of the border.
    merged = any(same != len(prefix) for same, prefix in zip(borders, prefixes, strict=True))
    trained = np.zeros(len(ids), bool)
    for begin, end in zip(borders[::2], [*borders[1::2], len(ids)], strict=False):
        trained[begin:end] = True
    return trained, merged


@dataclass(frozen=True)
class _Place:
    """A value in a message or a tool that the template should write."""

    at: int  # index of the message or the tool
    path: tuple[Any, ...]  # the keys and indices that lead to the value
    value: Any
    what: str

    @property
    def content(self) -> bool:
        return self.path[0] == "content"

    @property
    def text(self) -> str:
        return self.value.strip() if isinstance(self.value, str) else repr(self.value)

    @property
    def key(self) -> tuple[str, str]:
        """The same for equal values."""
        return self.path[0], self.text

    def another(self) -> Any:
        return _another(self.value) if isinstance(self.value, str) else "x"


def _places(message: dict[str, Any], i: int) -> Iterator[_Place]:
    """The contents, and the names and arguments of tool calls, that are not empty."""
    content, who = message["content"], f"message {i}, which is from the {message['role']}"
    texts = (
        [(("content",), content)]
        if isinstance(content, str)
        else [(("content", k, "text"), part["text"]) for k, part in enumerate(content)]
    )
    found = [_Place(i, path, text, who) for path, text in texts]
    for k, call in enumerate(message.get("tool_calls", ())):
        path: tuple[Any, ...] = ("tool_calls", k)
        function = call
        if isinstance(call.get("function"), dict):
            path, function = (*path, "function"), call["function"]
        of = f"of tool call {k} of message {i}"
        given = function.get("arguments")
        found.append(_Place(i, (*path, "name"), function.get("name"), f"the name {of}"))
        if isinstance(given, dict):
            found += [_Place(i, (*path, "arguments", key), value, f"the argument {key!r} {of}") for key, value in given.items()]
        else:
            found.append(_Place(i, (*path, "arguments"), given, f"the arguments {of}"))
    return (
        place for place in found if not (records.says_nothing(place.value) or (isinstance(place.value, str) and not place.text))
    )


def _name(tool: dict[str, Any], k: int) -> _Place | None:
    """The name of a tool, or else its first text."""
    path, function = ((), tool) if not isinstance(tool.get("function"), dict) else (("function",), tool["function"])
    for key in ("name", *function):
        if isinstance(text := function.get(key), str) and text.strip():
            return _Place(k, (*path, key), text, f"the tool {text!r}" if key == "name" else f"tool {k}")
    return None


def _with(value: Any, others: Mapping[tuple[Any, ...], Any]) -> Any:
    """A copy of `value` with other values at these paths."""
    if () in others:
        return others[()]
    below: dict[Any, dict[tuple[Any, ...], Any]] = {}
    for (first, *rest), other in others.items():
        below.setdefault(first, {})[tuple(rest)] = other
    out = copy.copy(value)
    for key, inside in below.items():
        out[key] = _with(value[key], inside)
    return out


class _Marks:
    """A mark for each place, shared by places with equal values, and how often a rendering shows it."""

    def __init__(self, whole: str, places: Sequence[_Place]):
        self.letter = next(c for c in map(chr, range(0xE000, 0x110000)) if c not in whole)  # from Unicode's private use area
        self.wanted = Counter(place.key for place in places)
        self.numbers = {key: n for n, key in enumerate(self.wanted)}
        self.keys = list(self.wanted)
        self.found: list[tuple[str, str]] = []
        self.times: Counter[tuple[str, str]] = Counter()

    def on(self, values: Sequence[Any], places: Iterable[_Place]) -> list[Any]:
        """`values` with the marks at these places."""
        others: dict[int, dict[tuple[Any, ...], Any]] = {}
        for place in places:
            others.setdefault(place.at, {})[place.path] = self._marked(place)
        return [_with(value, others[i]) if i in others else value for i, value in enumerate(values)]

    def _marked(self, place: _Place) -> Any:
        """The value with its mark. A text gets it at its end: templates test how a text begins, and strip spaces."""
        mark, value = f"{self.letter}{self.numbers[place.key]}{self.letter}", place.value
        if isinstance(value, str):
            said = value.rstrip()
            return said + mark + value[len(said) :]
        return {mark: mark} if isinstance(value, dict) else [mark] if isinstance(value, list) else mark

    def find(self, text: str) -> None:
        self.found = [self.keys[int(n)] for n in re.findall(f"{self.letter}([0-9]+){self.letter}", text)]
        self.times = Counter(self.found)

    def written(self, place: _Place) -> bool:
        return self.times[place.key] >= self.wanted[place.key]

    def in_order(self, places: Iterable[_Place]) -> bool:
        """Whether the messages appear in the order of the line, judged by the first value of each."""
        firsts: dict[int, _Place] = {}
        for place in places:
            firsts.setdefault(place.at, place)
        found = iter(self.found)
        return all(place.key in found for place in firsts.values() if self.written(place))


def _another(text: str) -> str:
    """A text of the same length, with the same spaces and different letters."""
    return re.sub(r"\S", lambda letter: "y" if letter[0] == "x" else "x", text)


def _common(a: Sequence[Any], b: Sequence[Any]) -> int:
    """The length of the common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
