#!/usr/bin/env bash
# The tests in an environment made like run_all.sh's; see --help.
set -euo pipefail

usage="Usage: bash training_scripts/run_tests.sh [--fast] [PYTEST ARGUMENTS]

With no argument every test, 16 to 21 minutes on two cores.
--fast leaves out tests/slow (what starts a launcher, kills processes or trains): about 5 minutes.
Other arguments go to pytest: run_tests.sh --fast -k gae, run_tests.sh tests/slow/test_restarts.py"

chosen=()
case "${1:-}" in
    -h | --help)
        echo "$usage"
        exit 0
        ;;
    --fast)
        chosen=(--ignore=tests/slow)
        shift
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
# In the order of tests/conftest.py, long files first: xdist would begin with the files of many tests.
exec "$RLHF_PYTHON" -m pytest -n "${RLHF_TEST_WORKERS:-2}" --dist loadfile --no-loadscope-reorder ${chosen[@]+"${chosen[@]}"} "$@"
