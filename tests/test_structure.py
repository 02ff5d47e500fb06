"""The house plan: imports run downward by floor, and one place names what belongs there."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = (
    "rlhf.types",
    "rlhf.numerics",
    "rlhf.config",
    "rlhf.distributed",
    "rlhf.checkpoint",
    "rlhf.data",
    "rlhf.models",
    "rlhf.engine",
    "rlhf.generation",
    "rlhf.rewards",
    "rlhf.doctor",
    "rlhf.training",
    "rlhf.algorithms",
    "rlhf.evaluation",
    "rlhf.report",
    "rlhf.serving",
    "rlhf.pipeline",
    "rlhf.cli",
    "step",
)
"""The rooms from the ground up: each may import those before it in this list and no other."""
ALTERNATIVES = {
    "rlhf.algorithms": {"sft", "reward", "ppo", "preference", "kto", "dpo", "orpo", "rrhf", "simpo"},
    "rlhf.rewards": {"reward_model", "classifier", "function", "http", "rules"},
    "rlhf.generation": {"actor_backend", "deepspeed_backend"},
}
"""Files of which no one may import another of the same room."""


def source_files():
    for folder in ("rlhf", "step1_sft", "step2_reward", "step3_ppo"):
        yield from sorted((ROOT / folder).rglob("*.py"))


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module):
    """The entry of FLOORS that `module` lives in; None for the package itself."""
    parts = module.split(".")
    if parts[0].startswith("step"):
        return "step"
    return ".".join(parts[:2]) if len(parts) > 1 and ".".join(parts[:2]) in FLOORS else None


def imported_modules(tree, module, is_package):
    """Every module of this project that `tree` imports, also inside functions, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                package = package[: len(package) - node.level + 1]
                base = ".".join([*package, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] in ("rlhf", "step1_sft", "step2_reward", "step3_ppo"):
                yield name, node.lineno


def violations(source, module, is_package=False):
    """Sentences about the imports of `source` that go up, or from one alternative to another."""
    here, own_file = room(module), module.split(".")[2:3]
    found = []
    for name, line in imported_modules(ast.parse(source), module, is_package):
        there = room(name)
        if there is None:  # `from rlhf import __version__`
            if name.split(".")[1:2] == ["*"]:
                found.append(f"{module}:{line} imports everything")
            continue
        if here is None or FLOORS.index(there) > FLOORS.index(here):
            found.append(f"{module}:{line} imports {name} from a higher floor")
        elif there == here and here in ALTERNATIVES and own_file:
            other = name.split(".")[2]
            if {other, own_file[0]} <= ALTERNATIVES[here] and other != own_file[0]:
                found.append(f"{module}:{line} imports its alternative {name}; they meet in what both stand on")
    return found


def import_circles(edges):
    """Modules that can be reached from themselves along `edges` (module -> modules it imports)."""
    reached = {}

    def walk(module, seen):
        for following in edges.get(module, ()):
            if following not in seen:
                seen.add(following)
                walk(following, seen)
        return seen

    for module in edges:
        reached[module] = walk(module, set())
    return sorted(module for module, found in reached.items() if module in found)


def test_every_module_has_a_floor():
    loose = sorted(name for name in map(module_name, source_files()) if room(name) is None and name != "rlhf")
    assert not loose, f"name the floor of {loose} in FLOORS"


def test_the_floor_plan_is_folders_and_types():
    loose = {path.name for path in (ROOT / "rlhf").iterdir() if path.suffix == ".py"}
    assert loose == {"__init__.py", "types.py"}


def test_imports_run_downward():
    found = []
    for path in source_files():
        is_package = path.name == "__init__.py"
        found += violations(path.read_text(encoding="utf-8"), module_name(path), is_package)
    assert not found, "\n".join(found)


def test_no_module_imports_itself_in_a_circle():
    modules = {module_name(path): path for path in source_files()}
    edges = {}
    for module, path in modules.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        targets = set()
        for name, _ in imported_modules(tree, module, path.name == "__init__.py"):
            inside = name if name in modules else name.rpartition(".")[0]
            if inside in modules and inside != module and not module.startswith(inside + "."):
                targets.add(inside)
        edges[module] = targets
    assert not import_circles(edges)


def test_import_circles_finds_exactly_the_circle():
    assert import_circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == ["b", "c"]
    assert import_circles({"a": {"b", "c"}, "b": {"c"}}) == []


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("rlhf.numerics.cpu", "import rlhf.config", True),
        ("rlhf.training.loop", "from rlhf.algorithms.ppo import gae", True),
        ("rlhf.config.settings", "def f():\n    from rlhf import training", True),
        ("rlhf.models.lora", "from rlhf.engine import make_engine", True),
        ("rlhf.generation.backend", "from rlhf.models.loading import load", False),
        ("rlhf.algorithms.ppo", "from rlhf.algorithms.sft import SFTConfig", True),
        ("rlhf.algorithms.ppo", "from .sft import SFTConfig", True),
        ("rlhf.algorithms.ppo", "from rlhf.algorithms.advantages import gae", False),
        ("rlhf.cli.doctor", "from step1_sft.main import main", True),
        ("rlhf.algorithms.ppo", "from rlhf.training import OnPolicyTrainer\nfrom rlhf import numerics", False),
        ("rlhf.models.lora", "from .loading import load\nfrom rlhf.types import TokenBatch", False),
        ("step3_ppo.main", "from rlhf.pipeline import stage_main\nfrom rlhf import __version__", False),
    ],
)
def test_violations_finds_exactly_the_wrong_ones(module, source, wrong):
    assert bool(violations(source, module)) == wrong


def test_only_the_engine_calls_deepspeed_initialize():
    named = []
    for path in source_files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            attribute = (
                isinstance(node, ast.Attribute)
                and node.attr == "initialize"
                and isinstance(node.value, ast.Name)
                and node.value.id == "deepspeed"
            )
            imported = (
                isinstance(node, ast.ImportFrom)
                and node.module == "deepspeed"
                and any(alias.name == "initialize" for alias in node.names)
            )
            if attribute or imported:
                named.append(path.relative_to(ROOT).parts[:2])
    assert named, "nobody calls deepspeed.initialize any more: this test looks for the wrong thing"
    assert set(named) == {("rlhf", "engine")}


@pytest.mark.parametrize(
    "module",
    ["rlhf.types", "rlhf.numerics", "rlhf.algorithms.sft", "rlhf.algorithms.reward", "rlhf.algorithms.ppo"],
)
def test_mathematics_loads_neither_deepspeed_nor_transformers(module):
    code = (
        f"import sys, {module}\n"
        "heavy = sorted({name.split('.')[0] for name in sys.modules} & {'deepspeed', 'transformers'})\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"import {module}: {done.stderr}"


def test_a_stage_reads_top_to_bottom_in_under_120_lines():
    mains = sorted(ROOT.glob("step*/main.py"))
    assert [path.parent.name for path in mains] == ["step1_sft", "step2_reward", "step3_ppo"]
    for path in mains:
        source = path.read_text(encoding="utf-8")
        assert len(source.splitlines()) < 120, f"{path} is too long for a stage script"
        loops = [node.lineno for node in ast.walk(ast.parse(source)) if isinstance(node, ast.For | ast.While)]
        assert not loops, f"{path}: loops at lines {loops} belong into the library"


def test_no_catch_all_module_names():
    vague = {"utils", "util", "helpers", "common", "manager", "misc"}
    assert not [path for path in source_files() if path.stem in vague or vague & set(path.parent.parts)]


def test_no_bare_except():
    bare = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in source_files()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ExceptHandler) and node.type is None
    ]
    assert not bare


def test_files_of_users_are_utf_8_whatever_the_locale():
    """All but the ranks' own short-lived notes in ASCII (rlhf/distributed)."""
    place_of_encoding = {"open": 2, "read_text": 0, "write_text": 1, "fdopen": 2}
    bare, seen = [], 0
    for path in source_files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", None))
            if name not in place_of_encoding or "distributed" in path.parts:
                continue
            call = ast.unparse(node)
            binary = re.search(r"'[rwax]?\+?b\+?'", call) or call.startswith("os.open(")
            named = "encoding=" in call or len(node.args) > place_of_encoding[name]
            no_file = call.startswith(("self.writer.open(", "self._lines.open(", "self.kept_responses.open("))
            seen += 1
            if not (named or binary or no_file):
                bare.append(f"{path.relative_to(ROOT)}:{node.lineno}: {call}")
    assert seen > 20, "nobody reads a file any more: this test looks for the wrong thing"
    assert bare == []


def test_top_level_is_the_plan():
    git = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if git.returncode != 0 or not git.stdout:
        pytest.skip("not a git checkout: what belongs to the project is not known")
    names = {line.split("/")[0] for line in git.stdout.splitlines()}
    files = (
        "setup.cfg pyproject.toml README.md README.ko.md CONTRIBUTING.md LICENSE .pre-commit-config.yaml .gitignore .ci"
    )
    folders = "rlhf step1_sft step2_reward step3_ppo training_scripts tests benchmarks docs"
    assert names <= set(f"{files} {folders}".split()), f"not in the plan: {names - set(f'{files} {folders}'.split())}"


def test_only_slow_tests_start_a_launcher():
    """`run_tests.sh --fast` leaves tests/slow out and must stay the inner loop."""
    launching = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Name) and node.id in ("run_ranks", "start_ranks")
    }
    assert launching, "nobody starts ranks any more: this test looks for the wrong thing"
    assert {name for name in launching if not name.startswith("tests/slow/")} == set()
