#!/usr/bin/env bash
# Best-of-N: draws responses, scores them and writes a data set, on every GPU (docs/offline.md; --help for its options).
set -euo pipefail
# shellcheck source=setup_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" --
if [ "$(nvidia-smi -L 2>/dev/null | wc -l)" -gt 1 ]; then
    exec deepspeed --log_level critical --module rlhf.cli.sample "$@"
fi
exec "$RLHF_PYTHON" -m rlhf.cli sample "$@"
