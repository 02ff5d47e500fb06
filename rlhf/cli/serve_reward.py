"""`rlhf serve-reward REWARD`: a reward behind HTTP, for `rewards: [http://...]` of a run elsewhere."""

from __future__ import annotations

import argparse
import os
import sys

from rlhf.config import ConfigError
from rlhf.data.spec import DataError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `rlhf serve-reward`."""
    parser.description = (
        "Serve a reward over the protocol of docs/reward_sources.md until interrupted: POST / scores responses, GET "
        "/health tells what is served. Exit status: 0 interrupted, 2 a wrong command line, or a reward or an address "
        "that cannot be used."
    )
    parser.add_argument(
        "reward",
        metavar="REWARD",
        help="a directory of step 2, of a sequence classifier, or any entry of `rewards`: file.py:function, a rule's "
        "name, a mapping as JSON",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1: this machine)")
    parser.add_argument("--port", type=int, default=8765, help="port to listen at (default 8765)")
    parser.add_argument("--tokenizer", metavar="DIR", help="the actor's directory, for rules that count tokens")
    parser.add_argument(
        "--template", help="renders prompts for a reward model where a request brings no rendered_prompts (kullm, chat)"
    )
    parser.add_argument(
        "--token_variable", metavar="NAME", help="environment variable with the bearer token that requests need"
    )


def run(arguments: argparse.Namespace) -> int:
    """Serve until interrupted; the exit status."""
    from rlhf.serving.reward_server import ServedReward, create_app

    token = None if arguments.token_variable is None else os.environ.get(arguments.token_variable, "")
    try:
        if token == "":
            raise ConfigError(f"--token_variable {arguments.token_variable}: it is not set, or empty")
        served = ServedReward.load(arguments.reward, tokenizer=arguments.tokenizer, template=arguments.template)
        app = create_app(served, token=token)
        import uvicorn
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ImportError:
        print("error: serve-reward needs uvicorn: pip install 'rlhf[serve]'", file=sys.stderr)
        return 2
    print(f"serving {served.name} at http://{arguments.host}:{arguments.port}", flush=True)
    server = uvicorn.Server(uvicorn.Config(app, host=arguments.host, port=arguments.port, log_level="warning"))
    try:
        server.run()
    except KeyboardInterrupt:
        pass
    except SystemExit:  # uvicorn has told why it cannot listen there
        return 2
    return 0
