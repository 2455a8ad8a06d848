"""A raw row -> `Example`: which column holds what, and what a chat must look like."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fedit.data.reading import Row
from fedit.interfaces import DataError, Example, Turn

ALIASES: Mapping[str, tuple[str, ...]] = {
    "instruction": ("instruction", "prompt"),
    "context": ("context", "input"),
    "response": ("response", "output", "completion", "chosen"),
    "rejected": ("rejected",),
    "category": ("category",),
    "client": ("client",),
    "system": ("system",),
    "messages": ("messages", "conversations"),
    "checks": ("checks",),
}
"""Names understood without `[data] columns`: Dolly, Alpaca, prompt/completion, chat messages and ShareGPT."""

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


def make_examples(rows: Sequence[Row], columns: Mapping[str, str]) -> list[Example]:
    """Return one example per row; `columns` gives the column of each part that has another name than `ALIASES`.

    A row with messages is a chat, and its instruction, context and response columns are not read.

    Raises:
        DataError: a column is missing, or a row has no instruction or response; names the row's file and line.
    """
    found = dict.fromkeys(name for row in rows for name in row.values)
    for part, name in columns.items():
        if name not in found:
            raise DataError(
                f"{rows[0].source}: no column {name!r}, which [data] columns gives for {part}. "
                f"Columns found: {', '.join(found)}."
            )
    clash = {"instruction", "context", "response"} & columns.keys()
    if "messages" in columns and clash:
        raise DataError(f"[data] columns: messages hold the whole chat; remove {', '.join(sorted(clash))}.")
    names = {part: (columns[part],) if part in columns else ALIASES[part] for part in ALIASES}
    if "instruction" in columns:
        names["messages"] = ()
    return [_example(row, names) for row in rows]


def _example(row: Row, names: Mapping[str, tuple[str, ...]]) -> Example:
    found = {part: _value(row, candidates) for part, candidates in names.items()}
    client = found["client"]
    system = _text(row, "system", found["system"])
    if found["messages"] is not None:
        chat_system, turns = _chat(row, found["messages"])
        system = chat_system or system
    else:
        for part in ("instruction", "response"):
            if not any(name in row.values for name in names[part]):
                raise _missing(row, part, names[part])
        turn = Turn(
            instruction=_text(row, "instruction", found["instruction"], required=True),
            response=_text(row, "response", found["response"], required=True),
            context=_text(row, "context", found["context"]),
        )
        turns = (turn,)
    return Example(
        turns=turns,
        category=_label(row, "category", found["category"]) or "uncategorised",
        system=system,
        client=_label(row, "client", client) or row.client,
        # Other things go by this name, too, and only preferences need it: what is no text is none.
        rejected=_text(row, "rejected response", found["rejected"]).strip() and found["rejected"]
        if isinstance(found["rejected"], str)
        else None,
        checks=_checks(row, found["checks"]),
        source=row.source,
    )


def _value(row: Row, names: tuple[str, ...]) -> Any:
    return next((row.values[name] for name in names if row.values.get(name) is not None), None)


def _missing(row: Row, part: str, names: tuple[str, ...]) -> DataError:
    columns = list(row.values)
    nested = next((name for name, value in row.values.items() if value and _is_list_of_objects(value)), None)
    if nested is not None:
        return DataError(
            f"{row.source}: no column holds the {part}, but {nested!r} holds a list of objects. If these are the rows, "
            "save that list alone."
        )
    likely = columns[0] if columns else "..."
    return DataError(
        f"{row.source}: no column holds the {part} (looked for {', '.join(names)}). Columns found: "
        f'{", ".join(columns) or "none"}. Name it, e.g. [data] columns = {{ {part} = "{likely}" }}.'
    )


def _is_list_of_objects(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, Mapping) for item in value)


def _text(row: Row, part: str, value: object, required: bool = False) -> str:
    """Return the text of a cell as it is, spaces included; None is an empty one."""
    if value is not None and not isinstance(value, str):
        raise DataError(f"{row.source}: the {part} must be text, got {type(value).__name__} {str(value)[:60]!r}.")
    if required and (value is None or not value.strip()):
        raise DataError(f"{row.source}: the {part} is empty. Fill it in, or remove the row.")
    text = value or ""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{row.source}: the {part} has half a surrogate pair at character {error.start}.") from error
    return text


def _label(row: Row, part: str, value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _text(row, part, value).strip()


def _checks(row: Row, value: object) -> Mapping[str, Any] | None:
    if isinstance(value, str):
        value = _parse(row, "checks", value) if value.strip() else None
    if value is not None and not isinstance(value, Mapping):
        raise DataError(f"{row.source}: checks must be an object, got {type(value).__name__}.")
    return value


def _parse(row: Row, part: str, text: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{row.source}: the column {part} is text that is not JSON: {error.msg}.") from error


def _chat(row: Row, messages: object) -> tuple[str, tuple[Turn, ...]]:
    """Return the system prompt and the turns of ``[system] (user assistant)+``."""
    if isinstance(messages, str):  # CSV cells cannot hold a list
        messages = _parse(row, "messages", messages)
    if not isinstance(messages, Sequence) or not messages:
        raise DataError(f"{row.source}: messages must be a list of role and content, got {str(messages)[:60]!r}.")
    spoken = [_message(row, index, message) for index, message in enumerate(messages, start=1)]
    system = spoken.pop(0)[1] if spoken[0][0] == "system" else ""
    for index, (role, _) in enumerate(spoken):
        expected = ("user", "assistant")[index % 2]
        if role != expected:
            number = index + 1 + len(messages) - len(spoken)
            raise DataError(
                f"{row.source}: message {number} is from the {role}, expected the {expected}. A chat is an optional "
                "system message, then user and assistant in turn."
            )
    if not spoken or len(spoken) % 2:
        raise DataError(f"{row.source}: the chat does not end with the assistant, so there is no response to learn.")
    pairs = zip(spoken[::2], spoken[1::2], strict=True)
    return system, tuple(Turn(instruction=user, response=assistant) for (_, user), (_, assistant) in pairs)


def _message(row: Row, number: int, message: object) -> tuple[str, str]:
    if not isinstance(message, Mapping):
        raise DataError(f"{row.source}: message {number} must have role and content, got {str(message)[:60]!r}.")
    role, content = (message.get(key, message.get(other)) for key, other in (("role", "from"), ("content", "value")))
    if role not in ROLES:
        raise DataError(
            f"{row.source}: message {number} has role {role!r}; keys found: {', '.join(map(str, message))}. Expected "
            f"role (or from) to be one of {', '.join(ROLES)}."
        )
    known = ROLES[role]
    return known, _text(row, f"content of message {number} ({role})", content, required=known != "system")
