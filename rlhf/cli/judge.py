"""`rlhf judge ANSWERS [--against OTHERS]`: a language model scores answers, or says which of two are better."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `rlhf judge`."""
    parser.description = (
        "Ask any server of OpenAI's chat protocol about answers: scores by criteria, each answer in a call of its own "
        "(G-Eval, as KULLM and KULLM-RLHF did), or with --against which of two answers is better, in both orders. "
        "Every answer of the judge is kept, so that a judgement that was stopped goes on, and costs nothing twice. "
        "Exit status: 0 judged, 1 the judge failed, 2 a mistake on the command line or in the data."
    )
    parser.add_argument(
        "answers",
        metavar="ANSWERS",
        help="a data set of prompts and responses, what `rlhf eval --prompts --output` wrote, or the output_dir of a "
        "run: its held-out answers, after against before",
    )
    parser.add_argument("--against", metavar="ANSWERS", help="answers to the same prompts")
    parser.add_argument("--url", required=True, help="of the server, up to /v1")
    parser.add_argument("--judge", required=True, metavar="MODEL", help="the model that judges")
    parser.add_argument("--criteria", default="kullm_rlhf", help="kullm, kullm_rlhf (default) or kullm_rlhf_facts")
    parser.add_argument("--limit", type=int, default=0, help="so many answers, drawn with --seed; 0 takes all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write everything as JSON")
    parser.add_argument("--cache", type=Path, default=Path("runs/.cache/judge.sqlite"), help="where answers are kept")
    parser.add_argument("--key_variable", default="OPENAI_API_KEY", help="environment variable with the key")
    parser.add_argument("--temperature", type=float, default=0.0, help="of the judge (0)")
    parser.add_argument("--max_tokens", type=int, default=1024, help="of an answer of the judge (1024)")
    parser.add_argument("--concurrency", type=int, default=4, help="questions at a time (4)")
    parser.add_argument("--request_seconds", type=float, default=120.0, help="a question without answer so long (120)")
    parser.add_argument("--retries", type=int, default=5, help="of a failed request (5)")
    parser.add_argument("--prices", type=float, nargs=2, metavar=("IN", "OUT"), help="per million tokens, for the cost")


def run(arguments: argparse.Namespace) -> int:
    """Judge and print; the exit status."""
    from rlhf.checkpoint.atomic import write_json
    from rlhf.config import ConfigError
    from rlhf.data.spec import DataError
    from rlhf.distributed.log import setup_logging
    from rlhf.evaluation.judge.answers import answered, compared
    from rlhf.evaluation.judge.client import JudgeClient, JudgeError, JudgeSettings
    from rlhf.evaluation.judge.criteria import CRITERIA
    from rlhf.evaluation.judge.verdicts import score_answers, win_rate

    setup_logging()
    shared = ("cache", "key_variable", "temperature", "max_tokens", "concurrency", "request_seconds", "retries")
    client = None
    try:
        if arguments.criteria not in CRITERIA:
            raise ConfigError(f"--criteria {arguments.criteria}: choose from {', '.join(CRITERIA)}")
        settings = {name: getattr(arguments, name) for name in shared}
        client = JudgeClient(JudgeSettings(url=arguments.url, model=arguments.judge, **settings))
        if arguments.against is None and not Path(arguments.answers).is_dir():
            rows = answered(arguments.answers, limit=arguments.limit, seed=arguments.seed)
            found = score_answers(client, rows, CRITERIA[arguments.criteria])
        else:
            pairs = compared(arguments.answers, arguments.against, limit=arguments.limit, seed=arguments.seed)
            found = win_rate(client, pairs)
        found = {"judge": arguments.judge, **found, "usage": client.usage.content()}
        if arguments.prices:
            tokens = (found["usage"]["prompt_tokens"], found["usage"]["completion_tokens"])
            found["cost"] = sum(count * price for count, price in zip(tokens, arguments.prices, strict=True)) / 1e6
        if arguments.output is not None:
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            write_json(arguments.output, found)
    except (ConfigError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except JudgeError as error:
        print(f"error: {error}\nwhat it has answered is kept: the same command goes on", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: what was answered is kept, the same command goes on", file=sys.stderr)
        return 130
    finally:
        if client is not None:
            client.close()
    print("\n".join(lines(found)))
    if arguments.output is not None:
        print(f"written to {arguments.output}")
    return 0


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """What was judged, for reading."""
    if "win_rate" in found:
        yield _figure("win rate", found["win_rate"], _interval(found, f"of {found['pairs']} pairs in both orders"))
        yield _figure("  length-controlled", found["length_controlled"])
        yield f"  wins {found['wins']}, ties {found['ties']}, losses {found['losses']}"
        yield _figure("  verdicts that turn with the order", found["order_decides"], "of the pairs")
        yield _figure("  the first one is chosen", found["first_chosen"], "0.5: no position bias")
        yield _figure("  the answer is the longer one", found["longer"])
    else:
        yield _figure("score, 0 to 100", found["score"], _interval(found, f"of {found['answers']} answers"))
        for name, value in found["by_criterion"].items():
            yield _figure(f"  {name}", value)
    for name, value in found["by_category"].items():
        yield _figure(f"  {name or '(none)'}", value)
    usage = found["usage"]
    yield (
        f"judge {found['judge']}: {usage['calls']} calls, {usage['cached']} from the cache, {usage['prompt_tokens']} + "
        f"{usage['completion_tokens']} tokens" + (f", cost {found['cost']:.4f}" if "cost" in found else "")
    )
    if usage["asked_again"]:
        yield f"answers that could not be read: {usage['asked_again']} at first, {usage['unreadable']} to the last"


def _interval(found: Mapping[str, Any], note: str) -> str:
    return note if found["low"] is None else f"95% {found['low']:.3f} to {found['high']:.3f}, {note}"


def _figure(label: str, value: float | None, note: str = "") -> str:
    return f"{label:<36}{'-' if value is None else f'{value:.3f}':>9}  {note}".rstrip()
