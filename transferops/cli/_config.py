"""Configuration files: TOML or YAML, whose every wrong key and value is pointed at.

A file holds settings of all commands that have them, and a section for each command with settings of its own::

    target = "usps"

    [otqms]
    shots = 5
"""

from __future__ import annotations

import difflib
import json
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import click

from transferops.cli._settings import BadInput, Failure, Option, Setting, parameters_of

_KINDS: dict[type, str] = {bool: "true or false", int: "an integer", float: "a number", str: "a text"}
_GOT: dict[type, str] = {list: "an array", dict: "a table", type(None): "nothing"}


@dataclass(frozen=True)
class _File:
    """What a file says, and the lines of its sections ``(section,)`` and keys ``(section, key)``; "" is no section."""

    path: Path
    content: dict[str, Any]
    lines: dict[tuple[str, ...], int]

    def fail(self, place: tuple[str, ...], expected: str, got: str) -> NoReturn:
        """Refuse what stands at ``place``."""
        line = f":{self.lines[place]}" if place in self.lines else ""
        name = ".".join(part for part in place if part)
        raise BadInput(f"{self.path}{line}: {name}: expected {expected}, got {got}")


def read(path: Path, command: click.Command, commands: Iterable[click.Command]) -> dict[str, Any]:
    """The settings that a file has for a command.

    Args:
        path: Of a .toml, .yaml or .yml file.
        command: Whose settings are wanted. Its own section goes before what stands above all sections.
        commands: All that may have a section. Sections of others are checked all the same.

    Returns:
        Values by parameter name.

    Raises:
        BadInput: The file cannot be read, or says something that no command or option takes.
    """
    file = _load(path)
    known = {each.name or "": parameters_of(each) for each in (*commands, command) if parameters_of(each)}
    own = known[command.name or ""]
    keys = sorted({key for parameters in known.values() for key in parameters})
    common, section = {}, {}
    for key, value in file.content.items():
        if isinstance(value, dict):
            if key not in known:
                file.fail((key,), f"one of {', '.join(sorted(known))}", _suggest(key, known))
            checked = {name: _check(file, key, name, each, known) for name, each in value.items()}
            if key == command.name:
                section = checked
        elif key not in keys:
            file.fail(("", key), "an option of a command", _suggest(key, keys))
        elif key in own:
            common[key] = _check(file, "", key, value, {"": own})
    return {own[key].name or "": value for key, value in {**common, **section}.items()}


def to_toml(command: str, settings: Mapping[str, Setting]) -> str:
    """Settings as a configuration file that says where each comes from."""
    lines = [f"[{command}]"]
    for key, setting in settings.items():
        if setting.value is None:
            lines.append(f"# {key}: not set")
        else:
            origin = "" if setting.origin == "default" else f"  # {setting.origin}"
            lines.append(f"{key} = {_literal(setting.value)}{origin}")
    return "\n".join(lines) + "\n"


def _literal(value: Any) -> str:
    """A value in TOML."""
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, float):
        return repr(value)  # inf and nan, too
    # JSON's texts, integers and truth values are TOML's, but for one character that TOML wants escaped
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _check(file: _File, section: str, key: str, value: Any, known: Mapping[str, Mapping[str, click.Parameter]]) -> Any:
    """``value`` as the option takes it."""
    place = (section, key)
    if key not in known[section]:
        others = ", ".join(name for name, parameters in known.items() if key in parameters)
        got = _suggest(key, known[section]) + (f", an option of {others}" if others else "")
        file.fail(place, f"an option of {section}", got)
    parameter = known[section][key]
    kinds = _kinds(parameter)
    listed = isinstance(parameter, Option) and parameter.listed
    several = listed or parameter.multiple
    for each in value if several and isinstance(value, list) else [value]:
        if type(each) not in kinds:
            expected = " or ".join(_KINDS[kind] for kind in kinds if (kind, float) != (int, kinds[0]))
            file.fail(place, expected + (", or an array of such" if several else ""), _describe(each, kinds))
    if listed and isinstance(value, list):
        return ",".join(map(str, value))
    if parameter.multiple:
        return value if isinstance(value, list) else [value]
    if str in kinds:
        value = str(value)
    if isinstance(parameter.type, click.Choice) and value not in parameter.type.choices:
        file.fail(place, f"one of {', '.join(parameter.type.choices)}", _suggest(value, parameter.type.choices))
    return value


def _kinds(parameter: click.Parameter) -> list[type]:
    """The types that a file may give for a parameter."""
    if isinstance(parameter, Option) and parameter.accepts:
        return list(parameter.accepts)
    types = click.types
    known: dict[type, list[type]] = {types.BoolParamType: [bool], types.IntParamType: [int]}
    known[types.FloatParamType] = [float, int]
    return next((kinds for kind, kinds in known.items() if isinstance(parameter.type, kind)), [str])


def _describe(value: Any, kinds: list[type]) -> str:
    if type(value) in _GOT:
        return _GOT[type(value)]
    if isinstance(value, str) and float in kinds and re.fullmatch(r"[-+]?\d+e[-+]?\d+", value):
        mantissa, exponent = value.split("e")
        return f"the text {value!r} (a number of YAML has a point: {mantissa}.0e{int(exponent):+})"
    return f"the text {value!r}" if isinstance(value, str) else json.dumps(value, default=str)


def _suggest(key: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(key.replace("_", "-"), list(known), n=1)
    return repr(key) + (f" (did you mean {near[0]!r}?)" if near else "")


def _load(path: Path) -> _File:
    loaders = {".toml": _toml, ".yaml": _yaml, ".yml": _yaml}
    if path.suffix not in loaders:
        raise BadInput(f"config: expected a .toml, .yaml or .yml file, got {path}")
    try:
        return loaders[path.suffix](path, path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"config: expected a file that can be read, got {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise BadInput(f"config: expected UTF-8 text, got {path}") from None


def _toml(path: Path, text: str) -> _File:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BadInput(f"{path}: expected TOML, got an error: {error}") from None
    lines: dict[tuple[str, ...], int] = {}
    section = ""
    for number, line in enumerate(text.split("\n"), 1):
        if header := re.match(r"\s*\[\s*[\"']?([^][\"']+?)[\"']?\s*\]", line):
            section = header[1]
            lines.setdefault(tuple(section.split(".")), number)
        elif entry := re.match(r"\s*[\"']?([^\"'=#]+?)[\"']?\s*=", line):
            lines.setdefault((section, entry[1]), number)
    return _File(path, content, lines)


def _yaml(path: Path, text: str) -> _File:
    try:
        import yaml
    except ImportError:
        raise Failure("config: expected PyYAML for a YAML file, got none: pip install pyyaml") from None
    lines: dict[tuple[str, ...], int] = {}

    def note(mapping: Any, section: str) -> None:
        for key, value in mapping.value:
            line = key.start_mark.line + 1
            heads = not section and isinstance(value, yaml.MappingNode)
            place = (str(key.value),) if heads else (section, str(key.value))
            if place in lines:  # YAML itself takes the last
                raise BadInput(f"{path}:{line}: {key.value}: expected once, got again after line {lines[place]}")
            lines[place] = line
            if heads:
                note(value, str(key.value))

    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        content = {} if root is None else loader.construct_document(root)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise BadInput(f"{path}{line}: expected YAML, got an error: {getattr(error, 'problem', error)}") from None
    if not isinstance(content, dict):
        raise BadInput(f"{path}: expected settings by name, got {_describe(content, [])}")
    if root is not None:
        note(root, "")
    return _File(path, {str(key): value for key, value in content.items()}, lines)
