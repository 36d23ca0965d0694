"""Frozen dataclass trees: to and from TOML, overridden by dotted name, compared, strict about every key."""

import dataclasses
import difflib
import os
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

Tree = TypeVar("Tree")


def nearest(word: str, known: typing.Iterable[str]) -> str:
    """A hint for a misspelt word: "; did you mean 'lr'?", or the list of what there is."""
    names = list(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; there are: {', '.join(names)}"


def to_dict(tree: Any) -> dict[str, Any]:
    """Nested plain values. None is left out, as TOML has none, and comes back as the field's default."""
    plain: dict[str, Any] = {}
    for field in dataclasses.fields(tree):
        value = getattr(tree, field.name)
        if dataclasses.is_dataclass(value):
            plain[field.name] = to_dict(value)
        elif value is not None:
            plain[field.name] = list(value) if isinstance(value, tuple) else value
    return plain


def from_dict(cls: type[Tree], data: Mapping[str, Any], where: str = "") -> Tree:
    """Build `cls` from nested plain values. Raises ValueError for unknown keys, missing keys and wrong types."""
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            raise ValueError(f"unknown setting {where + key!r}{nearest(key, fields)}")
    missing = [name for name, field in fields.items() if name not in data and _required(field)]
    if missing:
        raise ValueError(f"the setting {where + missing[0]!r} is missing")
    return cls(**{key: _value(hints[key], value, where + key) for key, value in data.items()})


def _required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _value(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type `hint` asks for, strictly: an int may stand for a float, a list for a tuple, nothing else."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _value(next(a for a in args if a is not type(None)), value, where)
    if origin is typing.Literal:
        if value not in args:
            raise ValueError(f"{where} = {value!r} is unknown{nearest(str(value), map(str, args))}")
        return value
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_value(args[0], item, where) for item in value)
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return from_dict(typing.cast(type, hint), value, where + ".")
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise ValueError(f"{where} wants {getattr(hint, '__name__', hint)}, got {value!r}")
    return value


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"optim.lr": 0.001, ...} for every leaf."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(tree):
        value = getattr(tree, field.name)
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, f"{prefix}{field.name}.")
        else:
            flat[prefix + field.name] = value
    return flat


def override(tree: Tree, changes: Mapping[str, Any]) -> Tree:
    """A copy with fields replaced by dotted name. Raises ValueError that names the nearest key for an unknown one."""
    for dotted, value in changes.items():
        tree = _replace(tree, dotted.split("."), value, dotted)
    return tree


def _replace(tree: Any, path: list[str], value: Any, dotted: str) -> Any:
    hints = typing.get_type_hints(type(tree))
    if path[0] not in hints:
        above = dotted[: -len(".".join(path))]
        raise ValueError(f"unknown setting {dotted!r}{nearest(dotted, flatten(tree, above))}")
    if len(path) == 1:
        return dataclasses.replace(tree, **{path[0]: _value(hints[path[0]], value, dotted)})
    return dataclasses.replace(tree, **{path[0]: _replace(getattr(tree, path[0]), path[1:], value, dotted)})


def diff(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """{dotted name: (old value, new value)} of every leaf that differs."""
    a, b = flatten(old), flatten(new)
    return {key: (a.get(key), b.get(key)) for key in a | b if a.get(key) != b.get(key)}


def save(tree: Any, path: Path) -> None:
    """Write as TOML, whole or not at all."""
    import tomli_w

    aside = path.with_name(path.name + ".tmp")
    aside.write_text(tomli_w.dumps(to_dict(tree)))
    os.replace(aside, path)


def load(cls: type[Tree], path: Path) -> Tree:
    """Read what `save` wrote. Raises ValueError naming the file when it is no TOML or does not fit `cls`."""
    try:
        return from_dict(cls, tomllib.loads(path.read_text()))
    except (tomllib.TOMLDecodeError, ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}") from error
