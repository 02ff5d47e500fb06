"""YAML text -> plain values: nothing is executed, nothing multiplies, and what was written is what comes back.

The loader underneath keeps the last value of a repeated key, lets a few lines of aliases stand for gigabytes, reads
`010` as 8, `1:30` as 90 and a date as an object, and leaves with whatever Python raises on values it cannot make.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

MAX_NODES = 10_000
"""Values of a document, counting what an alias stands for each time it is used."""
MAX_DEPTH = 50

_YAML = "tag:yaml.org,2002:"


class WrittenInt(int):
    """An integer that keeps how it was written, because a name may look like one (`2024_10`)."""

    text: str


class WrittenFloat(float):
    """A number that keeps how it was written, because a name may look like one (`1.10`)."""

    text: str


def read_yaml(text: str) -> Any:
    """The one document in `text`, made of mappings, lists, texts, decimal numbers, true, false and null.

    Other notations of numbers (octal, hexadecimal, `1:30`) and dates stay texts. Raises yaml.YAMLError for anything
    wrong: bad syntax, another tag, a repeated key, more than MAX_NODES or MAX_DEPTH, an alias of what it stands in.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check(node, {}, 0)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError as error:
        raise yaml.YAMLError(f"nested deeper than {MAX_DEPTH} levels") from error
    except ValueError as error:  # an escape above U+10FFFF, a directive with thousands of digits
        raise yaml.YAMLError(f"a value that cannot be read: {error}") from error


def _check(node: yaml.Node, sizes: dict[int, int | None], depth: int) -> int:
    """How many values the node stands for."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    known = sizes.get(id(node), 0)
    if known:
        return known
    if known is None:
        raise _wrong(node, "an alias of the value that it stands in")
    if depth == MAX_DEPTH:
        raise _wrong(node, f"nested deeper than {MAX_DEPTH} levels")
    sizes[id(node)] = None
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise _wrong(key, f"the key {key.value[:60]!r} is there twice")
                seen.add((key.tag, key.value))
    children = [part for pair in node.value for part in (pair if isinstance(pair, tuple) else (pair,))]
    size = 1
    for child in children:
        size += _check(child, sizes, depth + 1)
        if size > MAX_NODES:
            raise _wrong(node, f"more than {MAX_NODES} values")
    sizes[id(node)] = size
    return size


def _wrong(node: yaml.Node, reason: str) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, reason, node.start_mark)


def write_yaml(values: Any) -> str:
    """YAML that `read_yaml` reads back as it was, in the order given."""
    return yaml.dump(values, Dumper=_Dumper, allow_unicode=True, sort_keys=False)


class _Dumper(yaml.SafeDumper):
    def represent_str(self, text: str) -> yaml.ScalarNode:
        style = None if text.isprintable() else '"'  # a bare U+0085 or U+2028 would be read as the end of a line
        return self.represent_scalar(f"{_YAML}str", text, style)


_Dumper.add_representer(str, _Dumper.represent_str)


class _Loader(yaml.SafeLoader):
    def fetch_flow_collection_start(self, TokenClass: Any) -> None:
        if self.flow_level == MAX_DEPTH:  # the scanner's time grows with the square of the depth
            raise yaml.scanner.ScannerError(None, None, f"nested deeper than {MAX_DEPTH} levels", self.get_mark())
        super().fetch_flow_collection_start(TokenClass)

    def make_int(self, node: yaml.Node) -> int | str:
        text = str(self.construct_scalar(node))  # type: ignore[arg-type]
        if not re.fullmatch(r"[-+]?(0|[1-9][0-9]*(_[0-9]+)*)", text):
            return text
        if len(text) > 1000:
            raise _wrong(node, "an integer of more than 1000 digits")
        value = WrittenInt(text.replace("_", ""))
        value.text = text
        return value

    def make_float(self, node: yaml.Node) -> float | str:
        text = str(self.construct_scalar(node))  # type: ignore[arg-type]
        if re.fullmatch(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", text):
            value = WrittenFloat(text.replace(".", ""))
        else:
            try:
                value = WrittenFloat(text)
            except ValueError:
                return text
        value.text = text
        return value

    def make_str(self, node: yaml.Node) -> str:
        text = str(self.construct_scalar(node))  # type: ignore[arg-type]
        if text.isprintable():
            return text
        # "\\ud83d\\ude00", as JSON escapes a character above U+FFFF, comes as two halves
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")

    def make_bool(self, node: yaml.Node) -> bool:
        value = self.bool_values.get(str(self.construct_scalar(node)).lower())  # type: ignore[arg-type]
        if value is None:
            raise _wrong(node, "neither true nor false")
        return value


_Loader.yaml_constructors = {
    f"{_YAML}null": yaml.SafeLoader.construct_yaml_null,
    f"{_YAML}bool": _Loader.make_bool,
    f"{_YAML}int": _Loader.make_int,
    f"{_YAML}float": _Loader.make_float,
    f"{_YAML}timestamp": _Loader.make_str,
    f"{_YAML}str": _Loader.make_str,
    f"{_YAML}seq": yaml.SafeLoader.construct_yaml_seq,
    f"{_YAML}map": yaml.SafeLoader.construct_yaml_map,
    None: yaml.SafeLoader.construct_undefined,
}
