"""From YAML files and dotted overrides to a checked :class:`RunConfig`, and back.

A file may name others under ``defaults:`` (paths relative to itself); later ones win, the file itself
wins over them, command-line overrides over all. Mappings merge key by key, everything else replaces.
"""

import difflib
import re
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from skipmega.config.consistency import check_consistency
from skipmega.config.run import RunConfig
from skipmega.errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 with 1e-3 read as a number, as everybody means it."""


class _Dumper(yaml.SafeDumper):
    """Quotes every string that :class:`_Loader` would read as something else."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(?:\d[\d_]*)(?:\.\d*)?[eE][-+]?\d+$"),
        list("-+0123456789"),
    )


def load_config(path: str | Path | None, overrides: list[str] | None = None) -> RunConfig:
    """Read, merge and check a configuration.

    Args:
        path: a YAML file, or None for the defaults alone.
        overrides: ``section.field=value`` strings, values in YAML.

    Raises:
        ConfigError: missing file, unknown key, wrong type or impossible combination.
    """
    return build_config(*_read(path, overrides))


def load_model(model: type[Model], path: str | Path, overrides: list[str] | None = None) -> Model:
    """Read, merge and check a YAML file that describes something else than a run.

    Raises:
        ConfigError: missing file, unknown key or wrong type.
    """
    return _validate(model, *_read(path, overrides))


def build_config(values: dict[str, Any], source: str) -> RunConfig:
    """Validate nested plain values into a :class:`RunConfig`.

    Raises:
        ConfigError: every problem found, one a line, each with field, value, what is allowed, nearest name.
    """
    config = _validate(RunConfig, values, source)
    check_consistency(config)
    return config


def dump_config(config: RunConfig) -> str:
    """The configuration as YAML that :func:`load_config` reads back to an equal object."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False)


def parse_override(override: str) -> dict[str, Any]:
    """Turn ``a.b=1`` into ``{"a": {"b": 1}}``.

    Raises:
        ConfigError: no ``=``, an empty name, or a value that is not YAML.
    """
    name, separator, text = override.partition("=")
    parts = name.strip().split(".")
    if not separator or not all(parts):
        raise ConfigError(
            f"override {override!r} is not of the form section.field=value, e.g. model.num_layers=24"
        )
    try:
        value = yaml.load(text, Loader=_Loader) if text.strip() else None
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {error}") from None
    for part in reversed(parts):
        value = {part: value}
    assert isinstance(value, dict)
    return value


def _read(path: str | Path | None, overrides: list[str] | None) -> tuple[dict[str, Any], str]:
    """The values of a file and overrides, and what to call them in messages."""
    merged = _read_with_defaults(Path(path), ()) if path is not None else {}
    for override in overrides or []:
        _merge(merged, parse_override(override))
    return merged, str(path) if path is not None else "the list of overrides"


def _validate(model: type[Model], values: dict[str, Any], source: str) -> Model:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = [_explain(detail, model) for detail in error.errors()]
        raise ConfigError(f"{source} is not a valid configuration:\n  " + "\n  ".join(lines)) from None


def _read_with_defaults(path: Path, chain: tuple[Path, ...]) -> dict[str, Any]:
    path = path.resolve()
    if path in chain:
        circle = " -> ".join(str(p) for p in (*chain, path))
        raise ConfigError(f"defaults: go in a circle: {circle}")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        named = f" (named by {chain[-1]})" if chain else ""
        raise ConfigError(f"cannot read config file {path}{named}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of sections, found {type(values).__name__}")
    defaults = values.pop("defaults", None) or []
    if not isinstance(defaults, list) or not all(isinstance(item, str) for item in defaults):
        raise ConfigError(f"{path}: defaults must be a list of file names, found {defaults!r}")
    merged: dict[str, Any] = {}
    for name in defaults:
        _merge(merged, _read_with_defaults(path.parent / name, (*chain, path)))
    _merge(merged, values)
    return merged


def _merge(base: dict[str, Any], extra: dict[str, Any]) -> None:
    for key, value in extra.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = value


def _explain(detail: ErrorDetails, model: type[BaseModel]) -> str:
    """One pydantic error as: field, value, what is allowed, nearest right name."""
    location = list(detail["loc"])
    field = ".".join(str(part) for part in location)
    if detail["type"] == "extra_forbidden":
        known = _field_names(location[:-1], model)
        near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {'.'.join([*map(str, location[:-1]), near[0]])}? " if near else ""
        return f"{field}: no such field; {hint}known here: {', '.join(known)}"
    if detail["type"] == "value_error":
        context = detail.get("ctx", {})
        return f"{field}: {context.get('error', detail['msg'])}"
    return f"{field}={detail['input']!r}: {detail['msg'][0].lower()}{detail['msg'][1:]}"


def _field_names(location: list[str | int], model: type[BaseModel]) -> list[str]:
    inside_mapping = False
    for part in location:
        if isinstance(part, int) or inside_mapping:
            inside_mapping = False
            continue
        annotation = model.model_fields[part].annotation
        arguments = getattr(annotation, "__args__", None)
        inside_mapping = getattr(annotation, "__origin__", None) is dict
        candidate = (arguments[-1] if inside_mapping else arguments[0]) if arguments else annotation
        assert isinstance(candidate, type)
        assert issubclass(candidate, BaseModel)
        model = candidate
    return list(model.model_fields)
