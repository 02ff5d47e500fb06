#!/usr/bin/env bash
# The whole test suite in an environment made like run_all.sh's; arguments go to pytest: run_tests.sh -k gae
set -euo pipefail

case "${1:-}" in
    -h | --help)
        echo "Usage: bash training_scripts/run_tests.sh [PYTEST ARGUMENTS]   (with none: every test, about 15 minutes)"
        exit 0
        ;;
esac
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=setup_env.sh
source "$here/setup_env.sh" --dev

# Tests start processes of their own: one thread each keeps the small models from fighting over the cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"  # no test needs the network; without it a wrong name would wait for one
cd "$here/.."
# Two files at a time: half of a test is waiting for processes to start. RLHF_TEST_WORKERS=0 runs one after the other.
exec "$RLHF_PYTHON" -m pytest -n "${RLHF_TEST_WORKERS:-2}" --dist loadfile "$@"
