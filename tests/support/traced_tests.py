"""Which tests execute a line of rlhf/, and one process that forks to run them (see `tests/mutations.py`)."""

from __future__ import annotations

import collections
import compileall
import contextlib
import hashlib
import json
import os
import py_compile
import re
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.mutants import ROOT, Mutant

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
MEMORY_BYTES = 16 * 2**30
STATIC = "tests/test_structure.py"
"""It reads every source and so may notice any mutant."""


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
        for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
            del sys.modules[name]  # the copy's own are imported
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
    stem = Path(mutant.file).stem
    mirror = "/".join(("tests", *Path(mutant.file).parts[1:-1], ""))
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
    """The files of tests/slow that name the mutant's module, or one that imports it, themselves or through what they
    use of tests/support."""
    folder, stem = Path(mutant.file).parent.name, Path(mutant.file).stem
    module = _module(Path(mutant.file))
    sources = [path.relative_to(ROOT) for path in (*(ROOT / "rlhf").rglob("*.py"), *ROOT.glob("step*/main.py"))]
    names = {module, *(_module(path) for path in sources if _names({module}, (ROOT / path).read_text("utf-8")))}
    found = []
    for path in sorted((ROOT / "tests" / "slow").glob("test_*.py")):
        text = "".join(part.read_text(encoding="utf-8") for part in [path, *support_of(path)])
        if path.stem.startswith(f"test_{folder}_{stem}") or _names(names, text):
            found.append(f"tests/slow/{path.name}")
    return found


def _module(path: Path) -> str:
    return str(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _names(modules: Iterable[str], text: str) -> bool:
    return any(re.search(rf"{re.escape(module)}\b(?!\.)", text) for module in modules)
