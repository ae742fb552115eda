"""An extension of griffe for the Python reference: comments of fields are shown, and names in docstrings are links."""

from __future__ import annotations

import re
from typing import Any

import griffe

_NAME = re.compile(r"(?<!`)`([A-Za-z_][\w.]*)`(?!`)")


class Reference(griffe.Extension):
    """Makes a docstring of a field's comment, and of `names` in docstrings links to their place in the reference."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **kwargs: Any) -> None:
        """Take the comment beside a class's field that has no docstring, or those right above it."""
        of_class = attr.parent is not None and attr.parent.is_class
        if of_class and attr.docstring is None and attr.lineno and attr.endlineno:
            lines = attr.lines_collection[attr.filepath]
            beside = re.search(r"  # (.*)$", lines[attr.endlineno - 1])
            found = [beside[1]] if beside else []
            above = attr.lineno - 2
            while not beside and lines[above].strip().startswith("# "):
                found.insert(0, lines[above].strip()[2:])
                above -= 1
            if found:
                attr.docstring = griffe.Docstring(" ".join(found), parent=attr)

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Look names up as Python would where the docstring stands; what the reference lacks is no link."""
        todo: list[griffe.Object] = [pkg]
        while todo:
            here = todo.pop()
            todo += [member for member in here.members.values() if not member.is_alias]
            if here.docstring is not None:
                here.docstring.value = _NAME.sub(lambda name, here=here: _link(here, name[1]), here.docstring.value)


def _link(here: griffe.Object, name: str) -> str:
    first, _, rest = name.partition(".")
    try:
        target = name if first == "lexiseg" else ".".join(filter(None, (here.resolve(first), rest)))
    except griffe.NameResolutionError:
        return f"`{name}`"
    return f'<autoref identifier="{target}" optional><code>{name}</code></autoref>'
