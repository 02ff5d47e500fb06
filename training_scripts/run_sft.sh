#!/usr/bin/env bash
# Supervised fine-tuning alone, with the same set-up and options as run_all.sh (see `run_all.sh --help`).
exec bash "$(dirname "${BASH_SOURCE[0]}")/run_all.sh" --stages sft "$@"
