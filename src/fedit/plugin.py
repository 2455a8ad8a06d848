"""Plug-ins: classes that a table of the recipe names and configures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer

from fedit.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from fedit.config import RunConfig

_registry: dict[str, dict[str, type[Plugin]]] = {}


class Plugin(BaseModel):
    """A plug-in is its configuration: the fields are its parameters, the docstring is its documentation.

    Defining a subclass that has a ``name`` registers it under the ``kind`` of its base class, so that the TOML table
    ``[<kind>] name = "<name>"`` selects it and the table's other keys are its fields.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: ClassVar[str]
    name: ClassVar[str]

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            return
        known = _registry.setdefault(cls.kind, {})
        other = known.get(cls.name)
        if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ConfigError(
                f"Two {cls.kind} plug-ins are named {cls.name!r}: {other.__module__}.{other.__qualname__} and "
                f"{cls.__module__}.{cls.__qualname__}. Rename one."
            )
        known[cls.name] = cls

    @classmethod
    def resolve(cls, value: object) -> Self:
        """Return the plug-in that a configuration value (a name, or a table with a name) describes.

        Raises:
            ConfigError: no name, or one that nobody registered.
        """
        if isinstance(value, cls):
            return value
        table = {"name": value} if isinstance(value, str) else dict(value) if isinstance(value, Mapping) else {}
        name = table.pop("name", None)
        if not isinstance(name, str):
            raise ConfigError(f"[{cls.kind}]: expected a name, got {value!r}. {did_you_mean('', plugins(cls.kind))}")
        chosen = plugins(cls.kind).get(name)
        if chosen is None:
            raise ConfigError(f"[{cls.kind}] name = {name!r} is unknown. {did_you_mean(name, plugins(cls.kind))}")
        return chosen.model_validate(table)  # type: ignore[return-value]

    @model_serializer(mode="wrap")
    def _with_name(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {"name": self.name, **handler(self)}

    def check(self, run: RunConfig) -> None:
        """Raise ConfigError if this plug-in cannot work in `run`. Called when the configuration loads."""


def plugins(kind: str) -> Mapping[str, type[Plugin]]:
    """Return the registered plug-ins of one kind by name."""
    return _registry.get(kind, {})


def plugin_kinds() -> list[str]:
    """Return every kind that has a registered plug-in."""
    return sorted(_registry)
