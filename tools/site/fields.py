"""Fields in the reference: the comment behind a field is what it means, as this project writes it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe

COMMENT = re.compile(r"#\s*+(?!type:|noqa|fmt:)([^#]+)")


class CommentedFields(griffe.Extension):
    """Give an attribute without docstring the comment at the end of its line."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Read the comment."""
        if attr.docstring or attr.lineno is None or not isinstance(attr.filepath, Path):
            return
        comment = COMMENT.search(attr.lines_collection[attr.filepath][attr.lineno - 1])
        if comment:
            attr.docstring = griffe.Docstring(comment[1].strip(), lineno=attr.lineno, parent=attr)
