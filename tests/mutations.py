"""Which mutations of single lines do the tests notice? Run by hand: `python tests/mutations.py --help`.

A seed draws mutants of rlhf/: operators, comparisons, constants, slices, dropped keyword arguments, removed statements.
Messages, log calls, annotations, imports and decorators are left alone. Each mutant is written into a copy of the tree
and gets the fast tests that execute its statement (traced once, test by test), nearest and fastest first, until one
fails; `--slow` then gives the survivors the files of tests/slow that name their module. One process imports torch and
the like once and forks for every mutant. A test that takes three times as long as it did, and 30 s more, is given four
times that once more, and then counts as one that failed. Everything is kept in `--directory`; the same command goes on
where it was stopped.
"""

from __future__ import annotations

import argparse
import ast
import collections
import compileall
import contextlib
import hashlib
import importlib
import json
import os
import py_compile
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
COPIED = (
    "rlhf",
    "tests",
    "step1_sft",
    "step2_reward",
    "step3_ppo",
    "training_scripts",
    "examples",
    "benchmarks",
    "docs",
)
PRELOADED = ("torch", "transformers", "deepspeed", "peft", "hypothesis", "numpy", "safetensors", "tokenizers", "yaml")
MEMORY_BYTES = 16 * 2**30
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
STATIC = "tests/test_structure.py"
"""It reads every source and so may notice any mutant."""
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


# ---------------------------------------------------------------------------------------------------- mutants


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


# --------------------------------------------------------------------------------------- tests and what they execute


class Tracing:
    """A pytest plugin that notes, test by test, seconds, outcome and the executed lines of rlhf."""

    def __init__(self, tree: Path) -> None:
        self.prefix = f"{tree}/rlhf/"
        self.lines: set[tuple[str, int]] = set()
        self.of_fixture: dict[tuple[str, str], set[tuple[str, int]]] = {}
        self.tests: dict[str, dict[str, Any]] = {}

    def enter(self, frame: Any, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(self.prefix):
            return None
        self.note(frame, event, argument)
        return self.note

    def note(self, frame: Any, event: str, argument: Any) -> Any:
        self.lines.add((frame.f_code.co_filename, frame.f_lineno))
        return self.note

    @pytest.hookimpl(hookwrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[None]:
        """What a shared fixture executes counts for every test that uses it."""
        outside, self.lines = self.lines, set()
        yield
        self.of_fixture.setdefault((fixturedef.baseid, fixturedef.argname), set()).update(self.lines)
        self.lines |= outside

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Iterator[None]:
        self.lines, started = set(), time.perf_counter()
        test = self.tests[item.nodeid] = {"passed": True}
        sys.settrace(self.enter)
        threading.settrace(self.enter)
        yield
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]
        for (_, name), lines in self.of_fixture.items():
            if name in item.fixturenames:
                self.lines |= lines
        by_file = collections.defaultdict(list)
        for file, line in sorted(self.lines):
            by_file["rlhf/" + file.removeprefix(self.prefix)].append(line)
        test.update(seconds=time.perf_counter() - started, lines=by_file)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed or report.skipped:
            self.tests[report.nodeid]["passed"] = False


class Chosen:
    """A pytest plugin that runs the chosen tests in their order and says which one failed."""

    def __init__(self, limits: dict[str, float] | None, said: Path, patience: int) -> None:
        self.limits, self.said, self.patience = limits, said, patience

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        if self.limits is not None:
            place = {name: index for index, name in enumerate(self.limits)}
            items[:] = sorted((item for item in items if item.nodeid in place), key=lambda item: place[item.nodeid])

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Iterator[None]:
        limit = self.patience * (900.0 if self.limits is None else 3 * self.limits[item.nodeid] + 30)
        self.said.write_text(f"{item.nodeid} (time limit)")
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, also inside a loop of C
        signal.setitimer(signal.ITIMER_REAL, limit)
        yield
        signal.setitimer(signal.ITIMER_REAL, 0)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.said.write_text(report.nodeid)


def make_copy(tree: Path) -> None:
    """The tree as it is, compiled so that Python looks at a source's contents and not at its time."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, tree)
    compileall.compile_dir(tree / "rlhf", quiet=2, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH)


def in_child(tree: Path, files: Iterable[str], plugin: Any, after: Callable[[], None] = lambda: None) -> int:
    """Fork; the child imports rlhf from `tree` and runs pytest there. Its process id."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        os.setsid()
        output = os.open(tree.with_name(f"{tree.name}.log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(output, stream)
        os.chdir(tree)
        os.environ.update(PYTHONPATH=str(tree), PYTHONDONTWRITEBYTECODE="1")
        sys.dont_write_bytecode = isinstance(plugin, Chosen)
        sys.path[:] = [str(tree), *(entry for entry in sys.path if entry not in ("", str(ROOT), str(ROOT / "tests")))]
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        try:
            import rlhf

            assert Path(str(rlhf.__file__)).parent == tree / "rlhf", rlhf.__file__
        except AssertionError:
            raise
        except BaseException:  # a mutant that cannot even be imported
            os._exit(2)
        options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", str(tree)]
        if isinstance(plugin, Tracing):
            options.remove("-x")
        code = int(pytest.main([*options, "--basetemp", f"{tree}.tmp", *files], plugins=[plugin]))
        after()
    finally:
        os._exit(code)


def waited(children: dict[int, Any]) -> tuple[Any, int]:
    """Wait for one child; what it stood for and its exit code, negative for a signal. Its processes are ended."""
    child, status = os.wait()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    return children.pop(child), os.waitstatus_to_exitcode(status)


def digests_of(files: Iterable[str]) -> dict[str, str]:
    return {file: hashlib.sha256((ROOT / file).read_bytes()).hexdigest() for file in sorted(files)
            if (ROOT / file).exists()}  # fmt: skip


def support_of(path: Path) -> list[Path]:
    """The files of tests/support that a test file names."""
    text = path.read_text(encoding="utf-8")
    supports = sorted((ROOT / "tests" / "support").glob("*.py"))
    return [support for support in supports if re.search(rf"\b{support.stem}\b", text)]


def save_trace(target: Path, file: str, tests: dict[str, dict[str, Any]]) -> None:
    """What the tests of `file` execute, with digests of everything that this depends on."""
    support = {str(path.relative_to(ROOT)) for path in support_of(ROOT / file)}
    executed = {name for test in tests.values() for name in test["lines"]}
    digests = digests_of({file, "tests/conftest.py", *support, *executed})
    imported = {str(module.__file__) for module in list(sys.modules.values()) if getattr(module, "__file__", None)}
    inside = sorted(
        f"rlhf/{name.rpartition('/rlhf/')[2]}" for name in imported if name.startswith(f"{os.getcwd()}/rlhf/")
    )
    target.write_text(json.dumps({"digests": digests, "imported": inside, "tests": tests}))


def traced_tests(directory: Path, trees: list[Path]) -> dict[str, dict[str, Any]]:
    """What every fast test executes; a test file is not run again while it and all it executes are as they were."""
    waiting, targets = [], []
    (directory / "traces").mkdir(exist_ok=True)
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        if "slow" in path.parts:
            continue
        file = str(path.relative_to(ROOT))
        target = directory / "traces" / (file.replace("/", "-") + ".json")
        targets.append(target)
        digests = json.loads(target.read_text())["digests"] if target.exists() else {}
        if not digests or digests_of(digests) != digests:
            waiting.append((file, target))
    children: dict[int, Any] = {}
    free, total = list(trees), len(waiting)
    while waiting or children:
        if waiting and free:
            (file, target), tree = waiting.pop(0), free.pop()
            plugin = Tracing(tree)
            child = in_child(tree, [file], plugin, lambda t=target, f=file, p=plugin: save_trace(t, f, p.tests))
            children[child] = tree
            print(f"tracing {file} ({total - len(waiting)} of {total})", flush=True)
        else:
            free.append(waited(children)[0])
    traces = [json.loads(target.read_text()) for target in targets]
    tests = {name: {**test, "imported": trace["imported"]} for trace in traces for name, test in trace["tests"].items()}
    bad = [name for name, test in tests.items() if not test["passed"]]
    print(f"{len(tests)} tests, {len(bad)} of them skipped or failing without a mutation: not used")
    return {name: {**test, "lines": {file: set(lines) for file, lines in test["lines"].items()}}
            for name, test in tests.items() if test["passed"]}  # fmt: skip


def tests_for(mutant: Mutant, tests: dict[str, dict[str, Any]], budget: float) -> tuple[dict[str, float], bool]:
    """Seconds of the tests that execute the mutant, nearest and fastest first, up to `budget` seconds; whether all."""
    folder, stem = Path(mutant.file).parent.name, Path(mutant.file).stem
    mirror = f"tests/{folder}/" if folder != "rlhf" else "tests/"
    wanted = set(range(mutant.first, mutant.last + 1))
    found = [
        name
        for name, test in tests.items()
        if (mutant.file in test["imported"] if mutant.at_import else test["lines"].get(mutant.file, set()) & wanted)
    ]
    found = found or [name for name in tests if name.startswith(mirror)]  # what runs in other processes leaves no trace
    found += [name for name in tests if name.startswith(STATIC) and name not in found]

    def rank(name: str) -> tuple[int, float]:
        file = name.partition("::")[0]
        near = stem in Path(file).stem or (file == STATIC and tests[name]["seconds"] < 2)
        return (0 if near else 1 if file.startswith(mirror) else 2), tests[name]["seconds"]

    chosen: dict[str, float] = {}
    for name in sorted(found, key=rank):
        if sum(chosen.values()) > budget:
            return chosen, False
        chosen[name] = tests[name]["seconds"]
    return chosen, True


def slow_files(mutant: Mutant) -> list[str]:
    """The files of tests/slow that name the mutant's module, themselves or through what they use of tests/support."""
    folder, stem = Path(mutant.file).parent.name, Path(mutant.file).stem
    module = mutant.file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    found = []
    for path in sorted((ROOT / "tests" / "slow").glob("test_*.py")):
        text = "".join(part.read_text(encoding="utf-8") for part in [path, *support_of(path)])
        if path.stem.startswith(f"test_{folder}_{stem}") or re.search(rf"{re.escape(module)}\b(?!\.)", text):
            found.append(f"tests/slow/{path.name}")
    return found


# ------------------------------------------------------------------------------------------------------- running


def preload(names: Iterable[str]) -> None:
    for name in names:
        importlib.import_module(name)
    mine = [name for name in sys.modules if name.split(".")[0] in ("rlhf", "step1_sft", "step2_reward", "step3_ppo")]
    assert not mine, f"{mine} must be imported from the mutated copy"


def run(mutants: list[Mutant], arguments: argparse.Namespace, trees: list[Path], results: Path) -> None:
    """Give every mutant its tests and append what became of it to `results`."""
    tests = {} if arguments.slow else traced_tests(arguments.directory, trees)
    waiting, free, children = [(mutant, 1) for mutant in mutants], list(trees), {}
    while waiting or children:
        if not (waiting and free):
            (mutant, tree, plugin, complete, started), code = waited(children)
            shutil.copy(ROOT / mutant.file, tree / mutant.file)
            free.append(tree)
            if code == -signal.SIGALRM and plugin.patience == 1:  # an endless loop, or a busy machine
                waiting.append((mutant, 4))
                continue
            said = plugin.said.read_text() if plugin.said.exists() else "import"
            outcome = "survived" if code in (0, 5) else "killed" if code in (1, 2, -signal.SIGALRM) else f"error {code}"
            line = {
                **asdict(mutant), "outcome": outcome, "test": said if outcome != "survived" else "",
                "complete": complete, "slow": arguments.slow, "seconds": round(time.perf_counter() - started, 1),
            }  # fmt: skip
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(
                f"{len(waiting) + len(children)} left  {outcome}  {mutant.file}:{mutant.line}  {line['test']}",
                flush=True,
            )
            continue
        (mutant, patience), tree = waiting.pop(0), free.pop()
        limits, complete = (None, True) if arguments.slow else tests_for(mutant, tests, arguments.budget)
        files = slow_files(mutant) if limits is None else list(dict.fromkeys(n.partition("::")[0] for n in limits))
        if not files:
            free.append(tree)
            continue
        source = (ROOT / mutant.file).read_bytes()
        mutated = source[: mutant.start] + mutant.text.encode() + source[mutant.end :]
        (tree / mutant.file).write_bytes(source if arguments.control else mutated)
        said = tree.with_name(f"{tree.name}.said")
        said.unlink(missing_ok=True)
        plugin = Chosen(limits, said, patience)
        children[in_child(tree, files, plugin)] = (mutant, tree, plugin, complete, time.perf_counter())


def read_results(results: Path) -> dict[str, dict[str, Any]]:
    """The last word on every mutant."""
    lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
    return {line["name"]: line for line in map(json.loads, lines) if not line["outcome"].startswith("error")}


def report(mutants: list[Mutant], done: dict[str, dict[str, Any]]) -> None:
    """Rates by folder and kind, and the survivors."""
    for title, key in (("folder", lambda m: "/".join(m.file.split("/")[:2])), ("kind", lambda m: m.kind)):
        table = collections.defaultdict(list)
        for mutant in mutants:
            if mutant.name in done:
                table[key(mutant)].append(done[mutant.name]["outcome"] == "killed")
        print(f"\n{title:24} mutants  killed   rate")
        for name, killed in [*sorted(table.items()), ("all", sum(table.values(), []))]:
            print(f"{name:24} {len(killed):7} {sum(killed):7} {sum(killed) / max(1, len(killed)):6.0%}")
    print("\nsurvivors")
    for mutant in mutants:
        if done.get(mutant.name, {}).get("outcome") == "survived":
            more = "" if done[mutant.name]["complete"] else "  (its tests were cut at --budget)"
            print(f"  {mutant.file}:{mutant.line}{more}\n      {difference(mutant)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=150, help="mutants to draw (default 150)")
    parser.add_argument("--folder", default="rlhf", help="draw from this folder only, such as rlhf/data")
    parser.add_argument("--budget", type=float, default=90, help="seconds of tests that one mutant gets at most")
    parser.add_argument("--workers", type=int, default=1, help="mutants at the same time")
    parser.add_argument("--slow", action="store_true", help="give the survivors the slow tests of their module")
    parser.add_argument("--again", action="store_true", help="run the survivors again, after tests were added")
    parser.add_argument("--control", action="store_true", help="leave the mutations out: now no test may fail")
    parser.add_argument("--list", action="store_true", help="show the mutants and run nothing")
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()) / "rlhf-mutations")
    arguments = parser.parse_args()
    mutants = drawn(arguments.seed, arguments.count, arguments.folder)
    if arguments.list:
        for mutant in mutants:
            print(f"{mutant.kind:10} {mutant.file}:{mutant.line}\n      {difference(mutant)}")
        return
    arguments.directory.mkdir(parents=True, exist_ok=True)
    results = arguments.directory / f"{'control' if arguments.control else 'seed'}-{arguments.seed}.jsonl"
    done = read_results(results)
    survived = [mutant for mutant in mutants if done.get(mutant.name, {}).get("outcome") == "survived"]
    to_run = [mutant for mutant in mutants if mutant.name not in done] + survived * arguments.again
    if arguments.slow:
        to_run = [mutant for mutant in survived if not done[mutant.name]["slow"]]
    if to_run:
        preload(PRELOADED)
        with tempfile.TemporaryDirectory(dir=arguments.directory, prefix="trees-") as root:
            trees = [Path(root).resolve() / f"tree{number}" for number in range(arguments.workers)]
            for tree in trees:
                make_copy(tree)
            run(to_run, arguments, trees, results)
    report(mutants, read_results(results))


if __name__ == "__main__":
    main()
