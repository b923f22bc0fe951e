"""From a record of a file to a row of the run: which field is what, and what is wrong with it."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, NoReturn

from aspo_jax.errors import UserError
from aspo_jax.paths import shorten

WHOLE = "*"  # the name of a record as a whole
_ROLES = ("system", "user", "assistant")
_LONGEST_ID = 200  # characters: it names its row in transcripts and messages


class DataError(UserError):
    """A data file that cannot be used: file and line, found, expected, remedy."""


class Place(NamedTuple):
    """A row's place, ``where`` in words, for the error message; its ``number`` is its id without
    another."""

    where: str
    number: int

    def fail(self, found: str, expected: str, remedy: str) -> NoReturn:
        raise DataError(f"{self.where}: found {found}, expected {expected}; {remedy}")


# A record of a file with its place, or what is wrong with it.
Found = tuple[Place, "dict[str, Any] | DataError"]


@dataclasses.dataclass(frozen=True)
class Fields:
    r"""Which field of a record is what. A name may lead inside: 'reward_model.ground_truth', and
    'tests.0' to the first of a list.

    id: of the row's name; a row without it is named by its number.
    prompt: of the question, a text or a chat; None: 'prompt' or 'messages', whichever is there.
    answer: of what the grader needs; '*': the record as a whole, for tests in several fields.
    answer_pattern: a regular expression that is searched in the answer, of which the first group
        counts (without groups the whole match): GSM8K's is r'#### (.*)'.
    grader: judges every row; None: the row's field ``kind`` says which.
    template: the user's message around the question: '{prompt}' is the question, '{level}' another
        field, of a list of texts each on a line; a lone pair of braces stays as it is, '{{' and
        '}}' are single braces.
    system: a message of the system before the chat.
    kind: of what says which grader judges the row.
    graders: pattern of what ``kind`` holds -> the grader that it means, such as 'aime*' -> 'math';
        None: it holds graders.
    are_ids_loose: if two rows share an id, or one's is null, all rows are numbered; else an error.
    """

    id: str = "id"
    prompt: str | None = None
    answer: str = "answer"
    answer_pattern: str | None = None
    grader: str | None = None
    template: str | None = None
    system: str | None = None
    kind: str = "kind"
    graders: Mapping[str, str] | None = None
    are_ids_loose: bool = False


PLAIN = Fields()


def checked_row(
    place: Place, value: Any, kinds: Collection[str] | None = None, fields: Fields = PLAIN
) -> dict[str, Any]:
    """The row of a record that may be anything, or what was wrong with reading it.

    Raises:
        DataError: it cannot be used.
    """
    record = _record(place, value)
    _check_values(place, record.value)
    return _read_row(record, kinds, fields)


def question_of(place: Place, value: Any, prompt: str | None = None) -> str:
    """The question of a record, which need not have anything else.

    Raises:
        DataError: it has none.
    """
    record = _record(place, value)
    return _read_question(record, prompt or _prompt_or_messages(record))[-1]["content"]


def _record(place: Place, value: Any) -> Record:
    if isinstance(value, DataError):
        raise value
    if not isinstance(value, dict):
        place.fail(
            f"a {type(value).__name__}",
            "a dict",
            'make it {"prompt": ..., "answer": ..., "kind": ...}',
        )
    return Record(place, value)


def _check_values(place: Place, value: dict[str, Any]) -> None:
    """Refuse what does not reach a grader in another process as it is.

    Raises:
        DataError: half a surrogate pair, or something that JSON does not hold, by its field.
    """
    if _unsaid(value) is None:
        return
    problems = {name: _unsaid({name: inside}) for name, inside in value.items()}
    name, error = next((n, e) for n, e in problems.items() if e is not None)
    if isinstance(error, UnicodeEncodeError):
        field = "in a field's name" if _unsaid({name: 0}) else f"in {shorten(name)!r}"
        place.fail(f"half a surrogate pair {field}", "Unicode text", "write the character in full")
    place.fail(
        f"a value that JSON does not hold in {shorten(str(name))!r} ({error})",
        "strings, finite numbers, lists and dicts of them",
        "convert it",
    )


def _unsaid(value: dict[str, Any]) -> Exception | None:
    """Why an object cannot be written as JSON; None if it can."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        return error
    return None


def _read_row(record: Record, kinds: Collection[str] | None, fields: Fields) -> dict[str, Any]:
    """A row of plain values, as `aspo_jax.data.read_rows` gives it."""
    place = record.place
    kind = _read_kind(record, fields)
    if kinds is not None and kind not in kinds:
        place.fail(f"kind {shorten(kind)!r}", f"one of {sorted(kinds)}", "correct the name")
    used = {fields.id, "kind", "messages", fields.prompt or "prompt", fields.answer}
    question = _read_question(record, fields.prompt or _prompt_or_messages(record))
    return {
        "id": _read_id(record, fields),
        "question": question[-1]["content"],
        "messages": _dress(question, record, fields),
        "answer": _read_answer(record, fields),
        "kind": kind,
        "where": place.where,
        "columns": {name: x for name, x in record.value.items() if name not in used},
    }


class Record(NamedTuple):
    """The fields of one record, by names that may lead inside."""

    place: Place
    value: dict[str, Any]

    def has(self, name: str) -> bool:
        return _inside(self.value, name) is not _MISSING

    def get(self, name: str) -> Any:
        found = _inside(self.value, name)
        if found is _MISSING:
            self.place.fail(
                f"no field {name!r} ({_listed(_names(self.value))})",
                f"{name!r}",
                "add the field, or name the right one",
            )
        return found

    def text(self, name: str) -> str:
        """A field that must be a string with something in it."""
        text = self.get(name)
        if text is None:
            self.place.fail(f"null for {name!r}", "some text", "fill it in or drop the row")
        if not isinstance(text, str):
            found = f"{name!r} of type {type(text).__name__}"
            self.place.fail(found, "a string", "put it in quotes")
        if not text.strip():
            self.place.fail(f"an empty {name!r}", "some text", "fill it in or drop the row")
        return text


_MISSING = object()


def _inside(value: Any, name: str) -> Any:
    """The value of 'a', 'a.b' or 'a.0'; a field whose own name has the dots comes first."""
    if isinstance(value, list):
        value = {str(index): item for index, item in enumerate(value)}
    if not isinstance(value, dict):
        return _MISSING
    if name in value:
        return value[name]
    first, dot, rest = name.partition(".")
    return _inside(value.get(first, _MISSING), rest) if dot else _MISSING


def _names(value: dict[str, Any]) -> list[str]:
    """All names that lead to something, one level inside."""
    inner = [f"{k}.{n}" for k, inside in value.items() if isinstance(inside, dict) for n in inside]
    return [*value, *inner]


def _listed(names: Iterable[str]) -> str:
    """The fields of a record, in words that stay short."""
    listed = sorted(shorten(str(name), 40) for name in names)
    more = f" and {len(listed) - 20} more" if len(listed) > 20 else ""
    return f"there are {listed[:20]}{more}"


def _read_kind(record: Record, fields: Fields) -> str:
    """The grader of a row."""
    if fields.grader is not None:
        return fields.grader
    said = record.text(fields.kind)
    if fields.graders is None:
        return said
    kind = next((kind for name, kind in fields.graders.items() if fnmatchcase(said, name)), None)
    if kind is None:
        record.place.fail(
            f"{fields.kind} = {shorten(said)!r}, for which no grader is known",
            f"one of {list(fields.graders)}",
            "name the grader of all rows: Data.grader = '...'",
        )
    return kind


def _read_id(record: Record, fields: Fields) -> str:
    name = fields.id
    found = record.get(name) if record.has(name) else None
    if not record.has(name) or (found is None and fields.are_ids_loose):
        return str(record.place.number)
    if isinstance(found, int) and not isinstance(found, bool):
        found = str(found)
    elif found is None:
        record.place.fail(f"null for {name!r}", "a string", "fill it in or leave the field out")
    else:
        found = record.text(name)
    if len(found) > _LONGEST_ID:
        found = f"an id of {len(found):,} characters in {name!r}"
        record.place.fail(found, f"at most {_LONGEST_ID}", "shorten it, or name another field")
    return found


def _read_answer(record: Record, fields: Fields) -> Any:
    name, pattern = fields.answer, fields.answer_pattern
    answer = record.value if name == WHOLE else record.get(name)
    if pattern is not None:
        text = record.text(name)
        match = re.search(pattern, text)
        if match is None:
            record.place.fail(
                f"{name!r} = {shorten(text)!r}",
                f"something that the pattern {pattern!r} matches",
                "correct the pattern or drop the row",
            )
        answer = match[1 if match.re.groups else 0]
    if answer is None or (isinstance(answer, str) and not answer.strip()):
        found = "null" if answer is None else "an empty string"
        record.place.fail(
            f"{found} for {name!r}", "what the grader needs", "fill it in or drop the row"
        )
    return answer


def _read_question(record: Record, name: str) -> list[dict[str, str]]:
    """The chat; a plain prompt is one message of the user."""
    is_chat = name == "messages" or isinstance(record.get(name), list)
    return _read_chat(record, name) if is_chat else _ask(record.text(name))


def _dress(chat: list[dict[str, str]], record: Record, fields: Fields) -> list[dict[str, str]]:
    """The chat with the template around its last message and the system's message before it."""
    if fields.template is not None:
        chat = [*chat[:-1], *_ask(_fill(fields.template, chat[-1]["content"], record))]
    if fields.system is not None:
        if chat[0]["role"] == "system":
            remedy = "leave Data.system out or drop the row's"
            record.place.fail("a chat with a system message", "none beside Data.system", remedy)
        chat = [{"role": "system", "content": fields.system}, *chat]
    return chat


def _ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _prompt_or_messages(record: Record) -> str:
    found = [name for name in ("prompt", "messages") if record.has(name)]
    if len(found) != 1:
        record.place.fail(
            f"{'both' if found else 'neither'} of 'prompt' and 'messages' "
            f"({_listed(record.value)})",
            "one of them",
            "keep one" if found else "name the field of the question: Data.prompt = '...'",
        )
    return found[0]


_BRACES = re.compile(r"\{\{|\}\}|\{([A-Za-z_][\w.]*)\}")


def _fill(template: str, question: str, record: Record) -> str:
    """The template with the question and other fields in their places."""

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if name is None:
            return match[0][0]
        return question if name == "prompt" else _written(record, name)

    return _BRACES.sub(value, template)


def _written(record: Record, name: str) -> str:
    """A field inside a template."""
    value = record.get(name)
    if value is None:
        remedy = "fill it in, drop the row, or take the field out of the template"
        record.place.fail(f"null for {name!r}", "something to fill the template with", remedy)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return "\n".join(value)
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)


def _read_chat(record: Record, name: str) -> list[dict[str, str]]:
    messages = record.get(name)
    if not isinstance(messages, list) or not messages:
        record.place.fail(
            f"{name!r} = {messages!r:.60}",
            "a list with at least one message",
            'write [{"role": "user", "content": "..."}]',
        )
    chat = [_read_message(record.place, message) for message in messages]
    if chat[-1]["role"] != "user":
        record.place.fail(
            f"a last message of role {chat[-1]['role']!r}",
            "'user'",
            "end with what the model shall answer",
        )
    return chat


def _read_message(place: Place, message: Any) -> dict[str, str]:
    if not isinstance(message, dict):
        place.fail(
            f"a message {message!r:.60}", "an object", 'write {"role": "user", "content": "..."}'
        )
    inner = Record(place, message)
    role = inner.text("role")
    if role not in _ROLES:
        place.fail(f"role {shorten(role)!r}", f"one of {list(_ROLES)}", "correct the name")
    return {"role": role, "content": inner.text("content")}
