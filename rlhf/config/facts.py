"""Facts about a configuration field that stand at the field itself."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

_KEY = "rlhf"


@dataclass(frozen=True)
class FieldFacts:
    """What the rest of the library must know of a field beside its type and default.

    `may_change_on_resume`: a run may be resumed with another value, because what is learnt does not depend on it, or
    because its content is compared instead (models and data, which may have been moved).
    `path`: it names files, which exist already ("read") or are made ("written").
    `may_be_infinite`: infinity means something, as for a clip range that clips nothing.
    `names_model`: giving it says that this run is not the embedded default, whose configuration then does not apply.
    """

    may_change_on_resume: bool = False
    path: Literal["read", "written"] | None = None
    names_model: bool = False
    may_be_infinite: bool = False


def setting(default: Any, **facts: Any) -> Any:
    """A dataclass field with a default (a list is copied for every instance) and `FieldFacts`."""
    metadata = {_KEY: FieldFacts(**facts)}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def facts_of(item: dataclasses.Field[Any]) -> FieldFacts:
    """The facts of a dataclass field; none of them holds where it was not made by `setting`."""
    facts: FieldFacts = item.metadata.get(_KEY, FieldFacts())
    return facts
