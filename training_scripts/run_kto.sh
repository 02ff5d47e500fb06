#!/usr/bin/env bash
# KTO on responses that are there, with the same set-up and options as run_all.sh (see `run_all.sh --help`; docs/offline.md).
exec bash "$(dirname "${BASH_SOURCE[0]}")/run_all.sh" --stages offline --algorithm kto "$@"
