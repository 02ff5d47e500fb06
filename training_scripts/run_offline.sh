#!/usr/bin/env bash
# Offline preference optimisation alone, with the same set-up and options as run_all.sh (see `run_all.sh --help`).
exec bash "$(dirname "${BASH_SOURCE[0]}")/run_all.sh" --stages offline "$@"
