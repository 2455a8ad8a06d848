"""What is wrong with a run description, in lines that name the key, what was got and what was expected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ValidationError

from fedit.interfaces import did_you_mean


def explain(error: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """Return one line per wrong key: where, what was expected, what was got."""
    lines = []
    problems = error.errors()
    told = {_place(problem["loc"]) for problem in problems if not problem["type"].endswith("_type")}
    for problem in problems:
        # Of a value that may be of two types, what is wrong with the type that it has says it all.
        if problem["type"].endswith("_type") and _place(problem["loc"]) in told:
            continue
        if problem["type"] == "extra_forbidden":
            where = [str(part) for part in problem["loc"]]
            fields = _fields_at(model, where[:-1])
            lines.append(f"unknown key {'.'.join(where)!r}. {did_you_mean(where[-1], fields)}")
            continue
        where = _place(problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "model_type":
            message = "expected a table"
        # A rule about a whole table has said what is wrong; to repeat the table would bury it.
        if problem["type"] != "value_error" or not isinstance(problem["input"], Mapping):
            message += f", got {problem['input']!r}"
        lines.append(f"{'.'.join(where) or 'configuration'}: {message}")
    return "\n".join(prefix + line for line in dict.fromkeys(lines))


def _place(location: Sequence[str | int]) -> tuple[str, ...]:
    return tuple(str(part) for part in location if not _is_union_branch(part))


def _is_union_branch(part: str | int) -> bool:
    return isinstance(part, str) and ("[" in part or part in {"int", "float", "constrained-int", "RankRange"})


def _fields_at(model: type[BaseModel], path: Sequence[str]) -> list[str]:
    for part in path:
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)
