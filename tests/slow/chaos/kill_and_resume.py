"""Kill a run over and over, let it go on, and compare what comes out with a run that was never killed.

python -m tests.slow.chaos.kill_and_resume [--kills 20] [--ranks 2] [--zero_stage 2] [--FIELD VALUE ...]

A run is every stage on a tiny model under the real launcher, its state saved after every step. It is killed with
SIGKILL, launcher and ranks at once, at random moments: shortly after a state was written, while one is being written,
at any time since its start. `--one_rank` kills a single rank instead and lets the run end by itself. What must be
equal, byte for byte, are all exported weights, `metrics.jsonl` and `result.json` (but for seconds).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf.models.tiny_base import TinyRecipe, build_tiny_base
from rlhf.training.rollout_samples import ROLLOUTS_FILE
from tests.support.launch import start_ranks
from tests.support.samples import sample_lines, write_sample

ROOT = Path(__file__).resolve().parents[3]
WORKER = ROOT / "tests" / "support" / "pipeline_worker.py"
STAGES = ("sft", "reward", "ppo", "offline")


@dataclass(frozen=True)
class Setting:
    """What is run: `base` and `data` as `make_inputs` makes them, `extra` command-line fields of every stage."""

    base: Path
    data: Path
    ranks: int = 1
    zero_stage: int = 0
    extra: tuple[str, ...] = ()

    def start(self, output: Path, *resume: str) -> subprocess.Popen[str]:
        arguments = [str(self.base), str(self.data), str(output), str(self.zero_stage)]
        return start_ranks(WORKER, self.ranks, output, [*arguments, "--save_every_steps", "1", *self.extra, *resume])


def make_inputs(directory: Path) -> tuple[Path, Path]:
    """A causal LM that has seen a little Korean, and data of its three stages, in `directory`."""
    recipe = TinyRecipe(vocabulary_size=400, hidden_size=32, layers=2, heads=2, intermediate_size=64, steps=40)
    texts = sample_lines("sft_train", 200)
    base = build_tiny_base(texts, directory / "base", progress=False, recipe=recipe)
    write_data(directory)
    return base, directory


def write_data(directory: Path) -> None:
    """Some rows of the embedded world for each stage, to train on and held out."""
    for name in ("sft", "preference", "prompts"):
        for part, suffix, rows in (("train", "", 33), ("heldout", "_eval", 11)):
            # 2 ranks x micro-batches of 2 do not divide 11: the last evaluation batches are ragged
            write_sample(f"{name}_{part}", directory / f"{name}{suffix}.jsonl", rows)


def finish(process: subprocess.Popen[str], timeout: float = 600.0) -> str:
    """The output of a run that must end well. Raises AssertionError with it otherwise."""
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"no end after {timeout} s:\n{process.communicate()[0][-6000:]}") from None
    assert process.returncode == 0, output[-6000:]
    return output


def kill_and_resume(
    setting: Setting, output: Path, *, kills: int, chance: random.Random, one_rank: bool = False
) -> list[str]:
    """Kill the run `kills` times and let it end; a sentence about each kill."""
    said = []
    while len(said) < kills:
        process = setting.start(output, "--resume", "auto")
        drained: list[str] = []
        reader = threading.Thread(target=lambda: drained.append(process.stdout.read()))  # noqa: B023
        reader.start()
        manner = _wait(process, output, chance)
        if process.poll() is not None:
            reader.join()
            assert process.returncode == 0, drained[0][-6000:]
            break  # finished before it could be killed
        where = _newest(output)
        if one_rank:
            os.kill(chance.choice(_ranks(process.pid)), signal.SIGKILL)
            ended = process.wait(timeout=300)
            assert ended != 0, "a run whose rank was killed ended as if nothing had been"
        else:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        reader.join()
        said.append(f"kill {len(said) + 1}: {manner}; newest state {where}")
    finish(setting.start(output, "--resume", "auto"))
    return said


def differences(first: Path, second: Path, stages: Sequence[str] = STAGES) -> list[str]:
    """What two finished runs wrote that is not the same."""
    found = []
    for stage in stages:
        weights = sorted(path.relative_to(first) for path in (first / stage).glob("*/*.safetensors"))
        others = sorted(path.relative_to(second) for path in (second / stage).glob("*/*.safetensors"))
        if weights != others:
            found.append(f"{stage}: {weights} and {others}")
        found += [
            f"{name} differs"
            for name in weights
            if name in others and (first / name).read_bytes() != (second / name).read_bytes()
        ]
        lines, other_lines = metrics(first / stage), metrics(second / stage)
        if lines != other_lines:
            wrong = [(a, b) for a, b in zip(lines, other_lines, strict=False) if a != b][:1]
            found.append(f"{stage}/metrics.jsonl: {len(lines)} and {len(other_lines)} lines; {wrong}")
        kept = [run / stage / ROLLOUTS_FILE for run in (first, second)]
        if kept[0].is_file() and kept[0].read_bytes() != kept[1].read_bytes():
            found.append(f"{stage}/{ROLLOUTS_FILE} differs")
        results = [_without_seconds(json.loads((run / stage / "result.json").read_text())) for run in (first, second)]
        if results[0] != results[1]:
            found.append(f"{stage}/result.json: {results[0]} and {results[1]}")
    return found


def metrics(directory: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl, less the seconds that anything took."""
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [_without_seconds(json.loads(line)) for line in lines]


def _without_seconds(row: dict) -> dict:
    """Without what tells of the machine and not of what was learnt."""
    return {name: value for name, value in row.items() if not name.startswith(("seconds", "peak_memory"))}


def _newest(output: Path) -> str:
    found = sorted((path for path in output.glob("*/states/step-*")), key=lambda path: path.stat().st_mtime)
    return str(found[-1].relative_to(output)) if found else "none"


def _wait(process: subprocess.Popen[str], output: Path, chance: random.Random) -> str:
    """Wait for a moment to kill; what it was."""
    kind = chance.choice(("after a state", "after a state", "while saving", "at any time"))
    seconds = chance.uniform(0, 25) if kind == "at any time" else chance.uniform(0, 1.5)
    started, before = time.monotonic(), {str(path) for path in output.glob("*/states/step-*")}
    while process.poll() is None:
        if kind == "at any time":
            if time.monotonic() - started > seconds:
                return f"{seconds:.1f} s after its start"
        elif {str(path) for path in output.glob("*/states/step-*")} - before:
            if kind == "after a state":
                time.sleep(seconds)
                return f"{seconds:.2f} s after a new state"
            if list(output.glob("*/states/.*")):
                return "while a state was being written"
        time.sleep(0.001)
    return "finished"


def _ranks(launcher: int) -> list[int]:
    """Process ids of the ranks under the launcher."""
    listed = subprocess.run(["ps", "-eo", "pid,pgid,args"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in listed.splitlines()[1:]]
    return [int(pid) for pid, group, args in rows if int(group) == launcher and "--local_rank" in args]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--zero_stage", type=int, default=0)
    parser.add_argument("--seed_of_kills", type=int, default=1)
    parser.add_argument("--one_rank", action="store_true", help="kill one rank, not all of them")
    options, extra = parser.parse_known_args(argv)
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        base, data = make_inputs(root / "inputs")
        setting = Setting(base, data, options.ranks, options.zero_stage, tuple(extra))
        started = time.monotonic()
        finish(setting.start(root / "whole"))
        print(f"the run that is not killed: {time.monotonic() - started:.0f} s", flush=True)
        said = kill_and_resume(
            setting,
            root / "killed",
            kills=options.kills,
            chance=random.Random(options.seed_of_kills),
            one_rank=options.one_rank,
        )
        print("\n".join(said))
        found = differences(root / "whole", root / "killed")
    print(f"{len(said)} kills, {time.monotonic() - started:.0f} s: " + ("\n".join(found) or "the same bytes"))
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
