"""Base classes of every config: closed (an unknown key is an error that names the nearest valid one) and frozen."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, GetCoreSchemaHandler, ValidationError, model_validator
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from llm.core.errors import unknown_name
from llm.core.registry import Registry

_SUFFIX = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


def parse_count(value: Any) -> Any:
    """Read a count such as 4096, "10M", "1.5B" or 2e9; whatever is not a whole number is left for the validator."""
    if isinstance(value, bool):
        raise PydanticCustomError("count", "expected a whole number such as 4096 or '10M'")
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?(?:e[0-9]+)?)\s*([kmbt]?)\s*", value.lower())
        if match is None:
            raise PydanticCustomError("count", "expected a whole number such as 4096 or '10M'")
        number = float(match[1].replace("_", "")) * _SUFFIX[match[2]]
        if not number.is_integer():
            raise PydanticCustomError("count", "expected a whole number such as 4096 or '10M'")
        return int(number)
    return value


Count = Annotated[int, BeforeValidator(parse_count)]
"""A whole number (of tokens, steps, ...) that may be written with a suffix: "10M" is ten million."""


class Config(BaseModel):
    """A frozen config section. Unknown keys and wrong types are errors which name the key and what is allowed."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=False, arbitrary_types_allowed=True)

    @model_validator(mode="before")
    @classmethod
    def _closed(cls, value: Any) -> Any:
        if isinstance(value, dict):
            fields = set(cls.model_fields)
            for key in value:
                if key not in fields:
                    message = unknown_name("key", str(key), fields).replace("{", "(").replace("}", ")")
                    raise PydanticCustomError("unknown_key", message, {"key": str(key)})
        return value

    def replace(self, **changes: Any) -> Self:
        """A validated copy with some fields changed."""
        return type(self).model_validate({name: getattr(self, name) for name in type(self).model_fields} | changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for YAML or JSON; `type(self).model_validate` reads it back."""
        return self.model_dump(mode="json", serialize_as_any=True)


class Tagged(Config):
    """A config whose class is picked from a registry by its field `type`.

    A base class sets `registry`; a field annotated with that base accepts {"type": name, ...}, the bare name,
    or an instance. The look-up happens at validation, hence a part registered later is found too.
    """

    registry: ClassVar[Registry[Any] | None] = None
    type_name: ClassVar[str] = ""
    type: str = ""

    @model_validator(mode="before")
    @classmethod
    def _fill_type(cls, value: Any) -> Any:
        if isinstance(value, dict) and cls.type_name:
            return {**value, "type": cls.type_name}
        return value

    def model_post_init(self, context: Any) -> None:
        if self.type_name and self.type != self.type_name:
            object.__setattr__(self, "type", self.type_name)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        if "registry" not in cls.__dict__ or cls.registry is None:
            return handler(source)

        def pick(value: Any) -> Any:
            if isinstance(value, cls):
                return value
            if isinstance(value, str):
                value = {"type": value}
            registry = cls.registry
            assert registry is not None
            if not isinstance(value, dict) or not isinstance(value.get("type"), str):
                allowed = ", ".join(registry.names())
                raise PydanticCustomError(
                    "tag", f"expected a {registry.kind}: its name, or a mapping with 'type' (allowed: {allowed})"
                )
            config = registry.get(value["type"])
            try:
                return config.model_validate(value)
            except ValidationError as error:
                raise PydanticCustomError(
                    "nested", "invalid {kind}", {"kind": registry.kind, "inner": error}
                ) from error

        return core_schema.no_info_plain_validator_function(
            pick, serialization=core_schema.plain_serializer_function_ser_schema(lambda config: config.to_dict())
        )
