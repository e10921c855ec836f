"""Configs without pydantic: what an exported folder has in the place of `llm.config` and `pydantic`.

A folder holds a config that was checked when it was exported, so here only its values are put in place: nested
sections, sections picked by `type`, defaults, and the validators that the sections declare. Ranges are not checked.
"""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

from llm.core.registry import Registry

_MISSING: Any = object()


class FieldInfo:
    """A field's default and the text of its annotation."""

    def __init__(self, default: Any = _MISSING, default_factory: Callable[[], Any] | None = None) -> None:
        self.default, self.default_factory = default, default_factory
        self.annotation: Any = Any
        self.module = ""

    def start(self) -> Any:
        """The default."""
        return self.default_factory() if self.default_factory is not None else self.default


def Field(default: Any = _MISSING, *, default_factory: Callable[[], Any] | None = None, **rules: Any) -> Any:
    """As pydantic's; `rules` are not checked."""
    return FieldInfo(_MISSING if default is ... else default, default_factory)


def model_validator(*, mode: str) -> Callable[[Any], Any]:
    """As pydantic's: `before` is given the values by name, `after` the finished section."""
    return lambda function: _Marked(function, (f"model_{mode}",))


def field_validator(*names: str, mode: str = "after") -> Callable[[Any], Any]:
    """As pydantic's."""
    return lambda function: _Marked(function, (f"field_{mode}", *names))


class _Marked:
    """A validator in a class body; the class keeps the function under its name."""

    def __init__(self, function: Any, mark: tuple[str, ...]) -> None:
        self.function, self.mark = function, mark

    def __set_name__(self, owner: type, name: str) -> None:
        owner.__dict__["_validators"][name] = self.mark
        setattr(owner, name, self.function)


class BeforeValidator:
    """As pydantic's."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function


class AfterValidator(BeforeValidator):
    """As pydantic's."""


class PydanticCustomError(ValueError):
    """As pydantic's."""

    def __init__(self, kind: str, message: str, context: Mapping[str, Any] | None = None) -> None:
        super().__init__(message.format(**context) if context else message)


Count = int
"""A whole number; in an export it is written out."""


class _Meta(type):
    @classmethod
    def __prepare__(mcs, name: str, bases: tuple[type, ...], /, **keys: Any) -> dict[str, Any]:
        return {"_validators": {}}

    def __init__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> None:
        super().__init__(name, bases, namespace)
        fields: dict[str, FieldInfo] = {}
        for base in reversed(cls.__mro__[1:]):
            fields.update(base.__dict__.get("model_fields", {}))
        for key, annotation in namespace.get("__annotations__", {}).items():
            if str(annotation).startswith(("ClassVar", "typing.ClassVar")):
                continue
            given = namespace.get(key, _MISSING)
            field = given if isinstance(given, FieldInfo) else FieldInfo(given)
            field.annotation, field.module = annotation, cls.__module__
            fields[key] = field
        for key, value in namespace.items():
            # A subclass may change a default without repeating the annotation.
            if key in fields and key not in namespace.get("__annotations__", {}) and not callable(value):
                known = fields[key]
                fields[key] = FieldInfo(value)
                fields[key].annotation, fields[key].module = known.annotation, known.module
        for key in fields:
            if key in namespace:
                delattr(cls, key)
        cls.model_fields = fields


class Config(metaclass=_Meta):
    """A frozen section of a config."""

    model_fields: ClassVar[dict[str, FieldInfo]] = {}

    def __init__(self, **values: Any) -> None:
        cls = type(self)
        values = cls._before(values)
        unknown = sorted(set(values) - set(cls.model_fields))
        if unknown:
            raise ValueError(f"{cls.__name__} has no {unknown[0]!r}; this folder's config does not fit its code")
        for name, field in cls.model_fields.items():
            if name in values:
                value = _convert(_resolved(field), values[name])
                for label, mark in cls._marked("field_after"):
                    value = getattr(cls, label)(value) if name in mark[1:] else value
            else:
                value = field.start()
                if value is _MISSING:
                    raise ValueError(f"{cls.__name__} needs {name!r}; this folder's config does not fit its code")
            object.__setattr__(self, name, value)
        self.model_post_init(None)
        for label, _ in cls._marked("model_after"):
            getattr(self, label)()

    @classmethod
    def _marked(cls, kind: str) -> list[tuple[str, tuple[str, ...]]]:
        found: dict[str, tuple[str, ...]] = {}
        for base in reversed(cls.__mro__):
            found.update(base.__dict__.get("_validators", {}))
        return [(label, mark) for label, mark in found.items() if mark[0] == kind]

    @classmethod
    def _before(cls, values: dict[str, Any]) -> dict[str, Any]:
        for label, _ in cls._marked("model_before"):
            values = getattr(cls, label)(values)
        return values

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{type(self).__name__} is frozen")

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((type(self), repr(self.to_dict())))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{key}={value!r}' for key, value in vars(self).items())})"

    def model_post_init(self, context: Any) -> None:
        """Called when all fields have their values."""

    @classmethod
    def model_validate(cls, value: Any) -> Any:
        """A section from plain data."""
        return value if isinstance(value, cls) else cls(**value)

    def replace(self, **changes: Any) -> Any:
        """A copy with some fields changed."""
        return type(self)(**({name: getattr(self, name) for name in type(self).model_fields} | changes))

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {name: _plain(getattr(self, name)) for name in type(self).model_fields}

    model_fields_set: ClassVar[frozenset[str]] = frozenset()
    """Which keys a user wrote: none is known here."""

    def model_copy(self, *, update: Mapping[str, Any]) -> Any:
        """As pydantic's."""
        return self.replace(**update)

    def model_dump(self, **options: Any) -> dict[str, Any]:
        """As pydantic's."""
        return self.to_dict()

    def model_dump_json(self) -> str:
        """As pydantic's, up to white space."""
        return json.dumps(self.to_dict())


class Tagged(Config):
    """A section whose class is picked from a registry by its field `type`."""

    registry: ClassVar[Registry[Any] | None] = None
    type_name: ClassVar[str] = ""
    type: str = ""

    @classmethod
    def _before(cls, values: dict[str, Any]) -> dict[str, Any]:
        return super()._before({**values, "type": cls.type_name} if cls.type_name else values)

    def model_post_init(self, context: Any) -> None:
        if self.type_name:
            object.__setattr__(self, "type", self.type_name)


def merge(below: Any, above: Any) -> Any:
    """Named variants are written out in an export."""
    raise ValueError("named variants are part of Manyformer, not of this folder")


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _resolved(field: FieldInfo) -> Any:
    if isinstance(field.annotation, str):
        field.annotation = eval(field.annotation, vars(sys.modules[field.module]))
    return field.annotation


def _convert(annotation: Any, value: Any) -> Any:
    """`value` as a field of this annotation holds it."""
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        for rule in inside[1:]:
            if type(rule) is BeforeValidator:
                value = rule.function(value)
        value = _convert(inside[0], value)
        for rule in inside[1:]:
            if isinstance(rule, AfterValidator):
                value = rule.function(value)
        return value
    if origin in (Union, types.UnionType):
        return _convert(next((choice for choice in inside if _fits(choice, value)), Any), value)
    if origin is list:
        return [_convert(inside[0], item) for item in value]
    if origin is tuple:
        kinds = [inside[0]] * len(value) if inside[-1] is Ellipsis else inside
        return tuple(_convert(kind, item) for kind, item in zip(kinds, value))
    if origin is dict:
        return {_convert(inside[0], key): _convert(inside[1], item) for key, item in value.items()}
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return value if isinstance(value, annotation) else _pick(annotation, value).model_validate(value)
    return float(value) if annotation is float and type(value) is int else value


def _pick(annotation: Any, value: Any) -> Any:
    registry = annotation.__dict__.get("registry")
    if registry is None:
        return annotation
    config = registry.get(value if isinstance(value, str) else value["type"])
    return _Bare(config) if isinstance(value, str) else config


class _Bare:
    """A section named by its `type` alone."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def model_validate(self, value: Any) -> Any:
        """The section with its defaults."""
        return self.config()


def _fits(annotation: Any, value: Any) -> bool:
    origin, inside = get_origin(annotation), get_args(annotation)
    if annotation is None or annotation is type(None):
        return value is None
    if origin is Annotated:
        return _fits(inside[0], value)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in inside)
    if origin in (Union, types.UnionType):
        return any(_fits(choice, value) for choice in inside)
    if origin is list or origin is tuple:
        if not isinstance(value, list | tuple):
            return False
        return all(_fits(inside[0], item) for item in value) if origin is list else True
    if origin is dict:
        return isinstance(value, Mapping)
    if annotation is Any:
        return True
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return isinstance(value, annotation | Mapping | str) if value is not None else False
    if annotation is float:
        return type(value) in (int, float)
    return type(value) is annotation
