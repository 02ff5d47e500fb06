"""Mutants of single lines of rlhf/, drawn by a seed (see `tests/mutations.py`)."""

from __future__ import annotations

import ast
import hashlib
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("operator", "comparison", "constant", "slice", "keyword", "statement")
OPERATORS = {
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*"), ast.FloorDiv: ("//", "/"),
    ast.Mod: ("%", "*"), ast.Pow: ("**", "*"), ast.BitAnd: ("&", "|"), ast.BitOr: ("|", "&"),
    ast.And: ("and", "or"), ast.Or: ("or", "and"),
}  # fmt: skip
COMPARISONS = {
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"), ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="), ast.In: ("in", "not in"), ast.NotIn: (r"not\s+in", "in"), ast.Is: ("is", "is not"),
    ast.IsNot: (r"is\s+not", "is"),
}  # fmt: skip
SHOWN = re.compile(r"(logger|logging|warnings)\.|.*\.set_postfix$|(tqdm|cast|TypeVar|ParamSpec)$|.*Error$")
"""Calls whose arguments are for people or for the type checker."""
SHOWN_KEYWORDS = {"help", "description", "epilog", "metavar", "desc", "unit", "usage", "stacklevel"}
MODE_NAME = re.compile(r"[A-Za-z_][\w./-]+")


@dataclass(frozen=True)
class Mutant:
    """Bytes `start` to `end` of `file` become `text`; the statement is on the lines `first` to `last`."""

    file: str
    kind: str
    line: int
    first: int
    last: int
    start: int
    end: int
    text: str
    at_import: bool
    name: str


class Finder(ast.NodeVisitor):
    """Collects the mutants of one file."""

    def __init__(self, file: str, source: bytes) -> None:
        self.file, self.source = file, source
        self.digest = hashlib.sha256(source).hexdigest()[:8]
        self.starts = [0]
        for line in source.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.found: list[Mutant] = []
        self.statement, self.in_function = (1, 1), False

    def span(self, node: Any) -> tuple[int, int]:
        begin = self.starts[node.lineno - 1] + node.col_offset
        return begin, self.starts[node.end_lineno - 1] + node.end_col_offset

    def add(self, kind: str, node: Any, start: int, end: int, text: str) -> None:
        mutated = self.source[:start] + text.encode() + self.source[end:]
        try:
            compile(mutated, self.file, "exec", dont_inherit=True)
        except SyntaxError:
            return
        line = self.source.count(b"\n", 0, start) + 1
        name = f"{self.file}@{self.digest}:{start}-{end}:{text}"
        mutant = Mutant(self.file, kind, line, *self.statement, start, end, text, not self.in_function, name)
        self.found.append(mutant)

    def between(self, kind: str, node: Any, left: ast.AST, right: ast.AST, old: str, new: str) -> None:
        start, end = self.span(left)[1], self.span(right)[0]
        place = re.search(rb"(?<![\w*/<>=!])" + (old if kind == "comparison" else re.escape(old)).encode()
                          + rb"(?![\w*/<>=])", self.source[start:end])  # fmt: skip
        if place:
            self.add(kind, node, start + place.start(), start + place.end(), new)

    # -- what is walked through

    def visit(self, node: ast.AST) -> None:
        if not isinstance(node, ast.stmt):
            return super().visit(node)
        outside = self.statement
        body = getattr(node, "body", None)
        self.statement = (node.lineno, max(node.lineno, body[0].lineno - 1) if body else node.end_lineno or node.lineno)
        super().visit(node)
        self.statement = outside

    def visit_Import(self, node: ast.Import) -> None: ...

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None: ...

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None: ...  # its parts have no exact places before Python 3.12

    def visit_If(self, node: ast.If) -> None:
        if not re.search(r"TYPE_CHECKING|__main__", ast.unparse(node.test)):
            self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for default in [*node.args.defaults, *node.args.kw_defaults]:
            if default is not None:
                self.visit(default)
        outside, self.in_function = self.in_function, True
        for child in node.body:
            self.visit(child)
        self.in_function = outside

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for child in node.body:
            self.visit(child)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    # -- what is mutated

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Constant):  # a docstring
            return
        if isinstance(node.value, ast.Call) and not SHOWN.match(ast.unparse(node.value.func)):
            self.add("statement", node, *self.span(node), "pass")
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        names = [ast.unparse(target) for target in node.targets]
        if "__all__" in names or re.match(r"(Literal|Callable|dict|list|tuple)\[|TypeVar", ast.unparse(node.value)):
            return
        if any(isinstance(target, (ast.Attribute, ast.Subscript)) for target in node.targets):
            self.add("statement", node, *self.span(node), "pass")
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.add("statement", node, *self.span(node), "pass")
        if type(node.op) in OPERATORS:
            old, new = OPERATORS[type(node.op)]
            self.between("operator", node, node.target, node.value, old + "=", new + "=")
        self.generic_visit(node)

    def visit_Return(self, node: ast.Return) -> None:
        if node.value is not None and not (isinstance(node.value, ast.Constant) and node.value.value is None):
            self.add("statement", node, *self.span(node), "return None")
        self.generic_visit(node)

    def visit_Break(self, node: ast.stmt) -> None:
        self.add("statement", node, *self.span(node), "pass")

    visit_Continue = visit_Break
    visit_Raise = visit_Break  # whose message stays as it is

    def visit_BinOp(self, node: ast.BinOp) -> None:
        texts = any(isinstance(part, ast.JoinedStr) or isinstance(getattr(part, "value", 0), str)
                    for part in ast.walk(node))  # fmt: skip
        if type(node.op) in OPERATORS and not texts:
            self.between("operator", node, node.left, node.right, *OPERATORS[type(node.op)])
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        for left, right in zip(node.values, node.values[1:], strict=False):
            self.between("operator", node, left, right, *OPERATORS[type(node.op)])
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, (ast.Not, ast.USub)):
            start = self.span(node)[0]
            self.add("operator", node, start, start + (4 if isinstance(node.op, ast.Not) else 1), "")
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        operands = [node.left, *node.comparators]
        for operation, left, right in zip(node.ops, operands, node.comparators, strict=False):
            self.between("comparison", node, left, right, *COMPARISONS[type(operation)])
        for operand in operands:
            if not (isinstance(operand, ast.Constant) and operand.value is None):
                self.visit(operand)

    def visit_Slice(self, node: ast.Slice) -> None:
        for bound, change in ((node.lower, "+ 1"), (node.upper, "- 1")):
            if bound is not None and not isinstance(bound, ast.Constant):
                start, end = self.span(bound)
                self.add("slice", node, start, end, f"({self.source[start:end].decode()}) {change}")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if SHOWN.match(ast.unparse(node.func)):
            return
        self.visit(node.func)
        for argument in node.args:
            self.visit(argument)
        for keyword in node.keywords:
            if keyword.arg in SHOWN_KEYWORDS:
                continue
            if keyword.arg is not None:
                start, end = self.span(keyword)
                comma = re.match(rb"\s*,\s*", self.source[end:])
                self.add("keyword", keyword, start, end + (comma.end() if comma else 0), "")
            if keyword.arg == "dim" and isinstance(keyword.value, ast.Constant):
                self.add("slice", keyword, *self.span(keyword.value), "0" if keyword.value.value else "1")
            else:
                self.visit(keyword.value)

    def visit_Constant(self, node: ast.Constant) -> None:
        value, (start, end) = node.value, self.span(node)
        if value is None or isinstance(value, bool):
            self.add("constant", node, start, end, "0" if value is None else str(not value))
        elif isinstance(value, (int, float)):
            step = random.Random(f"{self.file}{start}").choice((1, -1))
            self.add("constant", node, start, end, f"({value + step!r})" if value + step < 0 else repr(value + step))
        elif isinstance(value, str) and MODE_NAME.fullmatch(value) and self.source[end - 1 : end] in b"\"'":
            self.add("constant", node, end - 1, end - 1, "_")


def drawn(seed: int, count: int, folder: str) -> list[Mutant]:
    """`count` mutants: the kind by lot, then one of that kind; at most one a line."""
    by_kind: dict[str, list[Mutant]] = {kind: [] for kind in KINDS}
    for path in sorted((ROOT / folder).rglob("*.py")):
        finder = Finder(str(path.relative_to(ROOT)), path.read_bytes())
        finder.visit(ast.parse(finder.source))
        for mutant in finder.found:
            by_kind[mutant.kind].append(mutant)
    chance, lines, chosen = random.Random(seed), set(), []
    while len(chosen) < count and any(by_kind.values()):
        mutants = by_kind[chance.choice([kind for kind in KINDS if by_kind[kind]])]
        mutant = mutants.pop(chance.randrange(len(mutants)))
        if (mutant.file, mutant.line) not in lines:
            lines.add((mutant.file, mutant.line))
            chosen.append(mutant)
    return chosen


def difference(mutant: Mutant) -> str:
    """The mutant's line before and after."""
    source = (ROOT / mutant.file).read_bytes()
    begin = source.rfind(b"\n", 0, mutant.start) + 1
    rest = source.find(b"\n", mutant.end)
    before, after = source[begin:rest], source[begin : mutant.start] + mutant.text.encode() + source[mutant.end : rest]
    squeezed = [" ".join(text.decode().split()) for text in (before, after)]
    return f"- {squeezed[0]}\n      + {squeezed[1]}"
