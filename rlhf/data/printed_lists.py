"""Lists and objects that a text table holds as text: JSON, or as Python and numpy print them.

`DataFrame.to_csv` writes a column of lists as `[{'role': 'user', 'content': "it's"}]`, and one that came from parquet
as numpy prints an array, without commas: `[{'role': 'user', ...}\\n {'role': 'assistant', ...}]`.
"""

from __future__ import annotations

import ast
import re
import warnings
from typing import Any

from rlhf.data.json_text import JsonError, parse_json

_PIECES = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|\s+|[^\s'"]+""", re.DOTALL)
"""Quoted texts, white space between values, and all else."""


def parse_printed(text: str) -> Any:
    """The list or object that `text` prints; None where it is not certain that it prints one.

    What numpy shortens with `...`, or prints with its type (`array([...], dtype=object)`), is not certain.
    """
    text = text.strip()
    if (text[:1], text[-1:]) not in (("[", "]"), ("{", "}")):
        return None
    try:
        return parse_json(text)
    except JsonError:
        pass
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # an escape that Python does not know: nothing printed it
            value = ast.literal_eval(_with_commas(text))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError, Warning):
        return None
    return value if isinstance(value, list | dict) and not _is_shortened(value) else None


def _with_commas(text: str) -> str:
    """`text` with a comma where nothing but white space parts two values, as numpy prints the elements of an array.

    In a list that Python prints, white space outside quotes follows a comma or a colon and nothing else.
    """
    pieces = _PIECES.findall(text)
    if "".join(pieces) != text:  # a quotation mark without its other half
        return text
    for index in range(1, len(pieces) - 1):
        before, after = pieces[index - 1][-1], pieces[index + 1][0]
        if pieces[index].isspace() and before not in ",:[{(" and after not in ",:]})":
            pieces[index] = ", "
    return "".join(pieces)


def _is_shortened(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_is_shortened(inner) for inner in value.values())
    if isinstance(value, list | tuple):
        return any(_is_shortened(inner) for inner in value)
    return value is ...
