"""Reading of a run's settings: a YAML file, ``key=value`` on top, each checked for its name and type."""

import ast
import dataclasses
import difflib
import inspect
import itertools
import math
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from engine.training.config import ConfigError, TrainConfig, plain


def read_config(path: str | None, overrides: Sequence[str] = ()) -> TrainConfig:
    """The settings of a YAML file, those given as ``key=value`` on top. Raises ConfigError, OSError."""
    values: dict[str, Any] = {}
    if path is not None:
        values.update(_read_yaml(path))
    for text in overrides:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ConfigError(f"expected key=value behind the config file, got {text!r}")
        values[name] = _yaml(value, f"{name}=")
    return make_config(values)


def make_config(values: dict[str, Any]) -> TrainConfig:
    """The settings of these names, each checked for its type. Raises ConfigError."""
    hints = get_type_hints(TrainConfig)
    for name in values:
        if name not in hints:
            close = difflib.get_close_matches(str(name), hints, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "--help lists all"
            raise ConfigError(f"there is no setting {name!r}; {hint}")
    missing = [f.name for f in dataclasses.fields(TrainConfig) if _required(f) and values.get(f.name) is None]
    if missing:
        raise ConfigError(f"{missing[0]} is missing: set it in the file, or as {missing[0]}=..")
    return TrainConfig(**{name: _typed(name, value, hints[name]) for name, value in values.items()})


def describe() -> str:
    """Every setting with its type, default and docstring."""
    hints, docs = get_type_hints(TrainConfig), _docs()
    parts = []
    for f in dataclasses.fields(TrainConfig):
        default = "required" if _required(f) else f"default: {yaml_text(f.default)}"
        parts.append(f"  {f.name} ({_type_name(hints[f.name])}; {default})\n      {docs[f.name]}")
    return "\n".join(parts)


def yaml_text(value: Any) -> str:
    """A value as it stands in a config file."""
    text: str = yaml.safe_dump(plain(value), default_flow_style=True, width=math.inf)
    return text.removesuffix("\n...\n").strip()


def _required(f: "dataclasses.Field[Any]") -> bool:
    return f.default is dataclasses.MISSING


def _docs() -> dict[str, str]:
    """The docstrings below the fields, which Python itself does not keep."""
    body = ast.parse(inspect.getsource(TrainConfig)).body[0].body  # type: ignore[attr-defined]
    docs: dict[str, str] = {}
    for entry, following in itertools.pairwise(body):
        if isinstance(entry, ast.AnnAssign) and isinstance(entry.target, ast.Name) and isinstance(following, ast.Expr):
            docs[entry.target.id] = " ".join(ast.literal_eval(following.value).split())
    return docs


def _read_yaml(path: str) -> dict[str, Any]:
    values = _yaml(Path(path).read_text(encoding="utf-8"), path)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold settings as 'key: value' lines, got a {type(values).__name__}")
    return values


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, where YAML would let the last one win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError(f"{key} is set twice: keep one of them")
        return super().construct_mapping(node, deep)


def _yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{where} is not YAML: {' '.join(str(error).split())}") from None


def _typed(name: str, value: Any, hint: Any) -> Any:
    """The value as the type of its field. Raises ConfigError."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    kind = next(option for option in options if option is not type(None))
    if get_origin(kind) is Literal and value in get_args(kind) and isinstance(value, str):
        return value
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 2e-5, without a point, as a text
        value = _number(value)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return _as_float(value)
    if get_origin(kind) is tuple:
        items = [value] if isinstance(value, str) else value
        if isinstance(items, list | tuple) and all(isinstance(item, str) for item in items):
            return tuple(items)
    elif kind in (bool, str, int) and type(value) is kind:
        return value
    raise ConfigError(f"{name} must be {_type_name(hint)}, got {value!r:.80} ({type(value).__name__})")


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def _as_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf  # the check of ranges refuses it by name


def _type_name(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_type_name(option) for option in get_args(hint))
    if get_origin(hint) is Literal:
        return " or ".join(get_args(hint))
    if get_origin(hint) is tuple:
        return "list of texts"
    names = {str: "text", int: "integer", float: "number", bool: "true or false", type(None): "null"}
    return names[hint]
