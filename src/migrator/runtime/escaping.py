"""Show characters that control a terminal: names from databases, buckets and files may hold any character.

An escape sequence in a table's name can recolour, overwrite or hide lines of a log. A line feed can
forge one. A right-to-left override shows a command as another one. Characters that are not printable
(categories Cc, Cf, Zl, Zp, Cs) are therefore shown by their number: ``\\x1b``, ``\\u202e``.
"""

from __future__ import annotations

import json
import re
from typing import Any

# In JSON's text these only occur within strings; json.dumps() has escaped all below U+0020.
_IN_JSON = re.compile("[\x7f-\x9f\xad\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]")


def visible(text: str) -> str:
    """Return one line of text in which every character is visible; a line feed is shown as ``\\n``."""
    if text.isprintable():
        return text
    return "".join(item if item.isprintable() else ascii(item)[1:-1] for item in text)


def visible_lines(text: str) -> str:
    """Return text in which every character is visible, with its line feeds and tabs."""
    if text.isprintable():
        return text
    return "".join(item if item in "\n\t" or item.isprintable() else ascii(item)[1:-1] for item in text)


def json_text(value: Any, *, indent: int | None = None) -> str:
    """Return JSON that is readable (no ``\\u`` for letters of any language) and cannot control a terminal."""
    return visible_json(json.dumps(value, indent=indent, ensure_ascii=False, default=str))


def visible_json(text: str) -> str:
    return _IN_JSON.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
