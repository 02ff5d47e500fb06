"""What a user can mend in a configuration, and the checks that fields share."""

from __future__ import annotations

from typing import Any


class ConfigError(ValueError):
    """A configuration that cannot be used, with what was given, what is needed and what to do."""


def require_at_least(config: Any, least: float, *names: str) -> None:
    """ConfigError for a field of `config` below `least`."""
    for name in names:
        if getattr(config, name) < least:
            raise ConfigError(f"{name}={getattr(config, name)} must be at least {least}")
