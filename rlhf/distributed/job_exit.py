"""How a stage ends: in good order, or with one sentence that says whose fault it is and what to do."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from tqdm import tqdm

from rlhf.distributed.exit_codes import EXIT_BUG, EXIT_INTERRUPTED, EXIT_RANK_LOST, EXIT_USER
from rlhf.distributed.failures import is_consequence, memory_failure, place_of, storage_failure, summary_of
from rlhf.distributed.place import is_main, world_size
from rlhf.distributed.rank_watch import Stopped, current_watch
from rlhf.distributed.verdict import exit_now, say

BEFORE_WATCH_SECONDS = 5.0


def run_to_end(main: Callable[[], Any], user_errors: tuple[type[Exception], ...]) -> None:
    """Run `main`; however it ends, one rank says it in one sentence, with one of `exit_codes`.

    `user_errors` are those whose message is all that a user needs. A bug shows its traceback too, once.
    """
    try:
        main()
    except Stopped as stop:
        if is_main():
            tqdm.write(str(stop), file=sys.stdout)  # above the progress bar of the interrupted loop
            sys.stdout.flush()
    except user_errors as error:
        _fail(str(error), EXIT_USER)
    except KeyboardInterrupt:
        watch = current_watch()
        if watch is None:
            raise
        _fail(f"interrupted {watch.where()}.{watch.where_to_resume()}", EXIT_INTERRUPTED)
    except Exception as error:
        _fail_unexpectedly(error)


def _fail_unexpectedly(error: Exception) -> NoReturn:
    watch = current_watch()
    resume = watch.where_to_resume() if watch is not None else ""
    storage = storage_failure(error)
    if storage is not None:
        _fail(f"{storage}.{resume}", EXIT_USER)
    if watch is None:
        if world_size() > 1 and is_consequence(error):
            time.sleep(BEFORE_WATCH_SECONDS)  # the rank that failed has said so; its end makes the launcher end us
        raise error
    here = f"{watch.where()}, in {place_of(error)}"
    memory = memory_failure(error)
    if memory is not None:
        _fail(f"{watch.record.name} {memory}; this was {here}.{resume}", EXIT_RANK_LOST)
    if world_size() > 1 and is_consequence(error):
        watch.wait_for_cause()
        _fail(
            f"{watch.record.name} lost its connection to the other ranks {here}, and none of them says why: "
            f"{summary_of(error)}.{resume}",
            EXIT_RANK_LOST,
        )
    trace = "".join(traceback.format_exception(error))
    _fail(f"{watch.record.name} failed {here}: {summary_of(error)} (traceback above).{resume}", EXIT_BUG, trace)


def _fail(sentence: str, code: int, error_trace: str = "") -> NoReturn:
    watch = current_watch()
    if watch is not None:
        watch.fail(sentence, code, error_trace)
    if os.environ.get("LOCAL_RANK", "0") == "0":  # once a machine: a file may be missing on one of them only
        say(f"error: {sentence}")
    if world_size() > 1:
        exit_now(code)  # a rank that leaves an open world in another way may end with the library's abort instead
    sys.exit(code)
