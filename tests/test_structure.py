"""The house plan: imports run downward by floor, and one place names what belongs there."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {
    "rlhf": 0,  # the package's own __init__, which may import nothing of ours
    "rlhf.ops": 0,
    "rlhf.types": 0,
    "rlhf.linear": 0,
    "rlhf.head": 0,
    "rlhf.yaml_file": 0,
    "rlhf.config": 1,
    "rlhf.distributed": 1,
    "rlhf.metrics": 1,
    "rlhf.packing": 1,
    "rlhf.forward": 1,
    "rlhf.side_by_side": 1,
    "rlhf.manifest": 1,
    "rlhf.rng_state": 1,
    "rlhf.identity": 1,
    "rlhf.run_lock": 1,
    "rlhf.failures": 1,
    "rlhf.rank_board": 1,
    "rlhf.rank_watch": 1,
    "rlhf.job_end": 1,
    "rlhf.data": 2,
    "rlhf.models": 2,
    "rlhf.engine": 2,
    "rlhf.engine.rlhf_engine": 3,  # puts the four models into their engines
    "rlhf.generation": 2,
    "rlhf.checkpoint": 2,
    "rlhf.doctor": 2,
    "rlhf.training_state": 2,
    "rlhf.resume": 3,
    "rlhf.loop": 3,
    "rlhf.trainer": 3,
    "rlhf.scoring": 3,
    "rlhf.nonfinite": 3,
    "rlhf.rollouts": 3,
    "rlhf.algorithms": 4,
    "rlhf.evaluation": 4,
    "rlhf.cli": 5,
    "rlhf.stages": 5,
    "rlhf.stage_main": 5,
    "step1_sft": 6,
    "step2_reward": 6,
    "step3_ppo": 6,
}
SEPARATE_SIBLINGS = (2, 4)
"""Floors whose rooms must not know one another."""


def source_files():
    for folder in ("rlhf", "step1_sft", "step2_reward", "step3_ppo"):
        yield from sorted((ROOT / folder).rglob("*.py"))


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module):
    """The floor table's entry that `module` lives in; each algorithm file is a room of its own."""
    parts = module.split(".")
    name = parts[0] if parts[0].startswith("step") else ".".join(parts[:2])
    nested = ".".join(parts[:3])
    if nested in FLOORS or (name in ("rlhf.algorithms", "rlhf.evaluation") and len(parts) > 2):
        return nested
    return name


def floor_entry(room_name):
    return room_name if room_name in FLOORS else ".".join(room_name.split(".")[:2])


def floor(room_name):
    return FLOORS[floor_entry(room_name)]


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
    """Sentences about the imports of `source` that go up, or sideways where that is not allowed."""
    here = room(module)
    found = []
    for name, line in imported_modules(ast.parse(source), module, is_package):
        there = room(name) if floor_entry(room(name)) in FLOORS else "rlhf"  # `from rlhf import __version__`
        if (
            floor_entry(here) not in FLOORS
            or there == here
            or here.startswith(there + ".")
            or there.startswith(here + ".")
        ):
            continue
        if floor(there) > floor(here):
            found.append(f"{module}:{line} imports {name} from a higher floor ({floor(there)} > {floor(here)})")
        elif floor(there) == floor(here) and floor(here) in SEPARATE_SIBLINGS:
            found.append(f"{module}:{line} imports its sibling {name}; siblings meet in rlhf.types")
    return found


def test_every_module_has_a_floor():
    names = (module_name(path) for path in source_files())
    unknown = {name for name in names if floor_entry(room(name)) not in FLOORS}
    assert not unknown, f"name the floor of {sorted(unknown)} in FLOORS"


def test_imports_run_downward():
    found = []
    for path in source_files():
        is_package = path.name == "__init__.py"
        found += violations(path.read_text(encoding="utf-8"), module_name(path), is_package)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("rlhf.ops", "import rlhf.config", True),
        ("rlhf.trainer", "from rlhf.algorithms.ppo import gae", True),
        ("rlhf.config", "def f():\n    from rlhf import trainer", True),
        ("rlhf.models.lora", "from rlhf.engine import make_engine", True),
        ("rlhf.generation", "from rlhf.models.loading import load", True),
        ("rlhf.algorithms.ppo", "from rlhf.algorithms.sft import SFTConfig", True),
        ("rlhf.algorithms.ppo", "from .sft import SFTConfig", True),
        ("rlhf.cli.summary", "from step1_sft.main import main", True),
        ("rlhf.algorithms.ppo", "from rlhf.trainer import OnPolicyTrainer\nfrom rlhf import ops", False),
        ("rlhf.models.lora", "from .loading import load\nfrom rlhf.types import TokenBatch", False),
        ("step3_ppo.main", "from rlhf.stages import parse_stage\nfrom rlhf import __version__", False),
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
    ["rlhf.ops", "rlhf.types", "rlhf.algorithms.sft", "rlhf.algorithms.reward", "rlhf.algorithms.ppo"],
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


def test_top_level_is_the_plan():
    git = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if git.returncode != 0 or not git.stdout:
        pytest.skip("not a git checkout: what belongs to the project is not known")
    names = {line.split("/")[0] for line in git.stdout.splitlines()}
    files = "setup.cfg pyproject.toml README.md CONTRIBUTING.md LICENSE .pre-commit-config.yaml .gitignore .ci"
    folders = "rlhf step1_sft step2_reward step3_ppo training_scripts tests benchmarks docs"
    assert names <= set(f"{files} {folders}".split()), f"not in the plan: {names - set(f'{files} {folders}'.split())}"
