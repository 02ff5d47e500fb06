"""Which mutations of single lines do the tests notice? Run by hand: `python -m tests.mutations --help`.

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
import collections
import importlib
import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.support.mutants import ROOT, Mutant, difference, drawn
from tests.support.traced_tests import Chosen, in_child, make_copy, slow_files, tests_for, traced_tests, waited

PRELOADED = ("torch", "transformers", "deepspeed", "peft", "hypothesis", "numpy", "safetensors", "tokenizers", "yaml")


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
