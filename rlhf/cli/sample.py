"""`rlhf sample MODEL...`: a data set of models' own responses, the best of N, pairs or all with scores."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `rlhf sample`."""
    parser.description = (
        "Sample N responses to each prompt with every MODEL, score them with any rewards, and write the best of each "
        "(SFT reads it), pairs of the best and the worst (DPO, the reward model), or all with scores (RRHF, the reward "
        "model). On several devices: deepspeed --module rlhf.cli.sample MODEL ... Interrupted, the same command goes "
        "on. Exit status: 0 written, 2 a mistake on the command line or in the data, 130 interrupted."
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="directories of the models that answer")
    parser.add_argument(
        "--prompts", nargs="+", required=True, metavar="DATA", help="data sets, as prompt_data has them"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the .jsonl that is written")
    parser.add_argument("--form", choices=("best", "pairs", "all"), default="best", help="what is written (best)")
    parser.add_argument("--samples", type=int, default=4, help="responses of a model to each prompt (4)")
    parser.add_argument("--rewards", nargs="+", default=["reward_model"], help="as in a configuration (reward_model)")
    parser.add_argument("--reward_model", metavar="DIR", help="of step 2, for the reward reward_model")
    parser.add_argument("--template", default="kullm", help="prompt template (kullm)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of sampling (1)")
    parser.add_argument(
        "--diversity",
        type=float,
        metavar="PENALTY",
        help="diverse beam search in place of sampling, SAMPLES groups of one beam (RRHF: 1.0)",
    )
    parser.add_argument("--max_prompt_tokens", type=int, default=256, help="longer prompts lose their beginning (256)")
    parser.add_argument("--max_response_tokens", type=int, default=256, help="of a response (256)")
    parser.add_argument("--rows", type=int, default=64, help="responses sampled side by side on a device (64)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the models (fp32)")
    parser.add_argument("--seed", type=int, default=1, help="of the random numbers (1)")
    parser.add_argument("--cache_dir", type=Path, default=Path("runs/.cache"), help="where tokens are kept")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the launcher's


def run(arguments: argparse.Namespace) -> int:
    """Sample, score and write; the exit status."""
    from rlhf.config import ConfigError
    from rlhf.data.spec import DataError
    from rlhf.distributed.log import setup_logging
    from rlhf.distributed.place import is_main, world_size
    from rlhf.distributed.world import close_world
    from rlhf.pipeline.sampling import SamplingJob, sample_dataset
    from rlhf.rewards.reward import RewardError

    setup_logging()
    options = {name: value for name, value in vars(arguments).items() if name not in ("subcommand", "local_rank")}
    try:
        report = sample_dataset(SamplingJob(**options))
    except (ConfigError, DataError, RewardError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on", file=sys.stderr)
        return 130
    finally:
        if world_size() > 1:  # or gloo's threads may end the process with an abort
            close_world()
    if is_main():
        print(
            f"{arguments.output}: {report['written']:.0f} rows of {report['prompts']:.0f} prompts; score "
            f"{report['mean_score']:+.3f} on average, {report['mean_best_score']:+.3f} of the best of "
            f"{arguments.samples * len(arguments.models)}; {report['eos_rate']:.0%} of the responses end"
        )
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command as a module of its own, for the launcher; its exit status."""
    parser = argparse.ArgumentParser(prog="rlhf.cli.sample")
    add_arguments(parser)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
