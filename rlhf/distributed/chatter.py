"""What libraries print although nobody asked."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def without_chatter() -> Iterator[None]:
    """Keep what libraries print on standard output out of the log, unless the body fails: it may then say why."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            yield
    except BaseException:
        sys.stdout.write(said.getvalue())
        raise
