"""An extension of griffe for the Python reference: the comment on a class's field is what it says of the field."""

from __future__ import annotations

import re
from typing import Any

import griffe


class FieldComments(griffe.Extension):
    """Makes a docstring of the comment beside a field, or of those right above it."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **kwargs: Any) -> None:
        """Look at the lines of a class's field that has no docstring."""
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
