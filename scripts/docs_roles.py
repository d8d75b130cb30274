"""A Griffe extension: reads the docstrings of this package as the documentation site needs them.

Roles such as ``:func:`transferops.otqms.allocate` `` become links, where the site has what they name. A function that
shares its name with the module it is from (``transferops.scores.h_score``) is found under its public name, and begins
with what the module says, such as its definition and source.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from typing import Any

import griffe

# "[paper: ...]: ..." at the start of a line would be a link definition, which is not shown.
_DEFINITION = re.compile(r"^( *)\[(?=[^\[\]]*\]:)", re.M)
_ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`(~?)([\w.]+)`")


class Roles(griffe.Extension):
    """See the module."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Called once with the whole package."""
        for module in _modules(pkg):
            for name in module.exports or ():
                _unshadow(module, str(name))
        for module in _modules(pkg):
            _link(module)


def _modules(module: griffe.Module) -> Iterator[griffe.Module]:
    yield module
    for member in list(module.members.values()):
        if not member.is_alias and member.is_module:
            yield from _modules(member)


def _unshadow(module: griffe.Module, name: str) -> None:
    """Let ``name`` stand for the function, as after ``import``, and not for the module it is from."""
    shadow = module.members.get(name)
    if shadow is None or shadow.is_alias or not shadow.is_module or name not in shadow.members:
        return
    for member in module.members.values():  # those from the same module, while its path still leads there
        if member.is_alias and member.target_path.startswith(f"{shadow.path}."):
            member.resolve_target()
    function = shadow.members[name]
    if shadow.docstring is not None and function.docstring is not None and "\n" in shadow.docstring.value:
        function.docstring.value = f"{shadow.docstring.value}\n\n{function.docstring.value}"
    _link(shadow)
    module.members[name] = griffe.Alias(name, function, parent=module)


def _link(owner: Any) -> None:
    """Turn the roles in the docstrings of an object and its members into links, and nothing else into one."""
    if owner.docstring is not None:
        text = _DEFINITION.sub(r"\1\[", owner.docstring.value)
        owner.docstring.value = _ROLE.sub(lambda found: _reference(owner, *found.groups()), text)
    for member in owner.members.values():
        if not member.is_alias and not member.is_module:
            _link(member)


def _reference(owner: Any, short: str, name: str) -> str:
    """A link that is plain text where the site has no such entry."""
    path, scope = name, owner
    while "." not in path and scope is not None:
        if path in scope.members:
            path = scope.members[path].path
        scope = scope.parent
    if "." not in path or not path.startswith("transferops."):
        try:
            path = owner.resolve(name)
        except griffe.NameResolutionError:
            path = name
    text = name.rpartition(".")[2] if short else name
    return f'<autoref identifier="{html.escape(path)}" optional><code>{html.escape(text)}</code></autoref>'
