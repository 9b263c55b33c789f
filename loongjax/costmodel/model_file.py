"""Fitted models as JSON files: versioned, with their provenance and errors, and read with suspicion."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import types
import typing
from collections.abc import Mapping
from typing import Any

from loongjax.costmodel.measurement import Provenance
from loongjax.costmodel.migration_time import MigrationTime
from loongjax.costmodel.model import FittedModel, StrategyTimes
from loongjax.costmodel.relative_error import FitErrors
from loongjax.costmodel.work import Strategy
from loongjax.errors import ConfigError

FORMAT = "loongjax cost model"
VERSION = 3
"""Version 2, which is read as well, had a key's time in extends apart from the prefill's form, for decodes alone."""


def save(model: FittedModel, path: pathlib.Path) -> None:
    """Writes the model, all of it or nothing.

    Raises:
        ConfigError: the file cannot be written.
    """
    content = {
        "format": FORMAT,
        "version": VERSION,
        "provenance": dataclasses.asdict(model.provenance),
        "strategies": [
            dataclasses.asdict(strategy) | dataclasses.asdict(model.strategies[strategy])
            for strategy in sorted(model.strategies)
        ],
        "migration": model.migration and dataclasses.asdict(model.migration),
        "migration_errors": model.migration_errors and dataclasses.asdict(model.migration_errors),
    }
    unfinished = path.with_name(path.name + ".part")
    try:
        unfinished.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(unfinished, path)
    except OSError as error:
        raise ConfigError(f"the cost model cannot be written to {path}: {error}") from None


def load(path: pathlib.Path) -> FittedModel:
    """Reads what `save` wrote.

    Raises:
        ConfigError: no such file, no JSON, another format or version, or a field that is missing, unknown, of the wrong
            type or out of its range; the message names the file and the field.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"the cost model {path} cannot be read: {error}; `loongjax fit` writes one") from None
    try:
        return _model(raw)
    except ConfigError as error:
        raise ConfigError(f"the cost model {path} is not valid: {error}") from None


def _model(raw: Any) -> FittedModel:
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise ConfigError(f'it has no "format": "{FORMAT}"; `loongjax fit` writes files that have')
    version = raw.get("version")
    if version not in (2, VERSION) or isinstance(version, bool):
        raise ConfigError(f"its version is {version!r}, and this program reads {VERSION}: fit again")
    expected = {"format", "version", "provenance", "strategies", "migration", "migration_errors"}
    _check_names(raw, expected, "the file")
    if not isinstance(raw["strategies"], list):
        raise ConfigError(f"strategies must be a list, got {_shown(raw['strategies'])}")
    strategies: dict[Strategy, StrategyTimes] = {}
    for index, entry in enumerate(raw["strategies"]):
        where = f"strategies[{index}]"
        if not isinstance(entry, dict):
            raise ConfigError(f"{where} must be an object, got {_shown(entry)}")
        if version == 2:
            entry = _from_version_2(entry)
        names = {field.name for field in dataclasses.fields(Strategy)}
        strategy = _read(Strategy, {name: entry[name] for name in names & entry.keys()}, where)
        times = _read(StrategyTimes, {name: value for name, value in entry.items() if name not in names}, where)
        if strategy in strategies:
            raise ConfigError(f"{where} is {strategy}, which is there already")
        for form in (times.decode, times.refined_prefill):
            if form is not None and form.sp != strategy.sp:
                raise ConfigError(f"{where} is {strategy}, and its {type(form).__name__} is for sp{form.sp}")
        strategies[strategy] = times
    return FittedModel(
        provenance=_read(Provenance, raw["provenance"], "provenance"),
        strategies=strategies,
        migration=_read(MigrationTime | None, raw["migration"], "migration"),
        migration_errors=_read(FitErrors | None, raw["migration_errors"], "migration_errors"),
    )


def _from_version_2(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The same strategy with `per_extend_key_s`, or without it what a key takes in a decode step, of all past tokens.

    What is missing or of the wrong type is left for the reader of the current version to name.
    """
    entry = dict(entry)
    key_s = entry.pop("per_extend_key_s", None)
    refined, decode = entry.get("refined_prefill"), entry.get("decode")
    if key_s is None and isinstance(decode, dict):
        key_s = decode.get("per_key_s")
    if isinstance(refined, dict):
        entry["refined_prefill"] = refined | {"extend_constant_s": 0.0, "per_past_key_s": key_s}
    return entry


def _read(kind: Any, raw: Any, where: str) -> Any:
    """A value of this type (int, float, str, tuple[int, ...], a dataclass of these, or one of them or None)."""
    if isinstance(kind, types.UnionType):
        (present,) = (option for option in typing.get_args(kind) if option is not type(None))
        return None if raw is None else _read(present, raw, where)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(raw, dict):
            raise ConfigError(f"{where} must be an object, got {_shown(raw)}")
        hints = typing.get_type_hints(kind)
        _check_names(raw, hints.keys(), where)
        fields = {name: _read(hint, raw[name], f"{where}.{name}") for name, hint in hints.items()}
        try:
            return kind(**fields)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
    if typing.get_origin(kind) is tuple:
        if not isinstance(raw, list):
            raise ConfigError(f"{where} must be a list, got {_shown(raw)}")
        element = typing.get_args(kind)[0]
        return tuple(_read(element, value, f"{where}[{index}]") for index, value in enumerate(raw))
    return _read_scalar(kind, raw, where)


def _read_scalar(kind: Any, raw: Any, where: str) -> int | float | str:
    accepted = (int, float) if kind is float else kind
    if isinstance(raw, bool) or not isinstance(raw, accepted):
        raise ConfigError(f"{where} must be of type {kind.__name__}, got {_shown(raw)}")
    try:
        value = kind(raw)
    except OverflowError:
        value = math.inf
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where} is too large for a float: {_shown(raw)}")
    return value


def _check_names(raw: Mapping[str, Any], expected: typing.Collection[str], where: str) -> None:
    missing, unknown = sorted(set(expected) - set(raw)), sorted(set(raw) - set(expected))
    if missing or unknown:
        raise ConfigError(f"{where} lacks {missing or 'nothing'} and has {unknown or 'nothing'} that is not known")


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not a number that a cost model may hold")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
