#!/usr/bin/env bash
# An environment in which this project runs. Run it once to prepare, or source it to use:
#
#   source training_scripts/setup_env.sh [--dev]
#
# The running python3 is used when it has everything; otherwise `.venv` in the project root is made (a few
# minutes, once) and reused as long as setup.cfg and constraints.txt do not change. --dev adds the tools for tests.
#
# Variables:
#   RLHF_PYTHON   the Python to use, or to make the environment from   (default: python3, else python3.1x on PATH)
#   RLHF_VENV     where the environment is made                        (default: <project>/.venv)
# After sourcing: PATH has the environment's programs, RLHF_PYTHON is its interpreter, PYTHONPATH has the project.

_rlhf_say() { echo "[setup] $*"; }
_rlhf_fail() { echo "[setup] error: $*" >&2; return 1; }

_rlhf_has_gpu() {
    # Any accelerator DeepSpeed may detect: NVIDIA, AMD (kfd), Intel (render node driver), Ascend, Gaudi.
    { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; } ||
        [ -e /dev/kfd ] || [ -e /dev/davinci0 ] || [ -e /dev/accel/accel0 ] || command -v xpu-smi >/dev/null 2>&1
}

_rlhf_find_python() {
    # The first Python of at least 3.11 that runs; a pyenv shim may exist for a version that does not.
    local candidate
    for candidate in ${RLHF_PYTHON:+"$RLHF_PYTHON"} python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            echo "$candidate"
            return 0
        fi
        [ "$candidate" = "${RLHF_PYTHON:-}" ] && break
    done
    if [ -n "${RLHF_PYTHON:-}" ]; then
        _rlhf_fail "RLHF_PYTHON=$RLHF_PYTHON is not a Python of version 3.11 or newer"
    else
        _rlhf_fail "Python 3.11 or newer is needed; python3 is $(python3 --version 2>&1 || true)." \
            "Install it, or name one: RLHF_PYTHON=/path/to/python3.11"
    fi
}

_rlhf_pip() {
    # $1 the environment; pip's progress bars go to a terminal, everything goes into install.log otherwise
    local venv="$1"
    shift
    if [ -t 1 ]; then
        "$venv/bin/python" -m pip install --disable-pip-version-check "$@" -c "$_rlhf_constraints"
    else
        "$venv/bin/python" -m pip install --disable-pip-version-check "$@" -c "$_rlhf_constraints" \
            >>"$venv/install.log" 2>&1 || {
            tail -n 15 "$venv/install.log" >&2
            _rlhf_fail "pip install $* failed; the whole log is $venv/install.log"
        }
    fi
}

_rlhf_install() {
    # $1 base Python, $2 environment, $3 extras
    local base="$1" venv="$2" extras="$3" started=$SECONDS
    command -v g++ >/dev/null 2>&1 || {
        _rlhf_fail "no C++ compiler: DeepSpeed compiles its operators with g++." \
            "Install it (Debian, Ubuntu: apt-get install build-essential) and run this again"
        return 1
    }
    "$base" -c 'import venv, ensurepip' >/dev/null 2>&1 || {
        _rlhf_fail "$base has no venv module. Install it (Debian, Ubuntu: apt-get install python3-venv)"
        return 1
    }
    _rlhf_say "making or updating the environment in $venv with $("$base" --version) (a few minutes, once)"
    [ -x "$venv/bin/python" ] || "$base" -m venv "$venv" || return 1
    if ! _rlhf_has_gpu; then
        _rlhf_say "no GPU found; PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu gets the smaller CPU build of torch"
    fi
    # torch comes first: DeepSpeed's build looks for it.
    _rlhf_say "1/2 torch"
    _rlhf_pip "$venv" "$(grep '^torch==' "$_rlhf_constraints")" || return 1
    _rlhf_say "2/2 deepspeed, transformers and the rest"
    _rlhf_pip "$venv" -e "$_rlhf_root[$extras]" || return 1
    # shellcheck disable=SC2086
    "$venv/bin/python" "$_rlhf_root/training_scripts/check_environment.py" ${extras//,/ } ||
        { _rlhf_fail "the new environment is incomplete; delete $venv and run this again"; return 1; }
    _rlhf_say "done in $((SECONDS - started)) s"
}

_rlhf_setup() {
    local extras=quantization venv="${RLHF_VENV:-$_rlhf_root/.venv}" base key stamp lacks argument scripts
    for argument in "$@"; do
        case "$argument" in
            --dev) extras=quantization,dev ;;
            --) ;;  # lets a script source this file without handing on its own arguments
            *) _rlhf_fail "unknown option $argument; setup_env.sh takes --dev only"; return 1 ;;
        esac
    done
    base="$(_rlhf_find_python)" || return 1
    # shellcheck disable=SC2086
    if lacks="$("$base" "$_rlhf_root/training_scripts/check_environment.py" ${extras//,/ })"; then
        RLHF_PYTHON="$("$base" -c 'import sys; print(sys.executable)')"
        _rlhf_say "using $RLHF_PYTHON, which has everything"
    else
        key="$(cat "$_rlhf_root/setup.cfg" "$_rlhf_constraints" | sha256sum | cut -c1-16)"
        stamp="$venv/rlhf.stamp"
        # An environment with the development tools serves a plain run too, hence the match by beginning.
        if [ -x "$venv/bin/python" ] && grep -q "^$key $extras" "$stamp" 2>/dev/null; then
            _rlhf_say "using $venv"
        else
            _rlhf_say "$base lacks: $(head -n 3 <<<"$lacks" | paste -sd ';')"
            grep -q "^[0-9a-f]* quantization,dev$" "$stamp" 2>/dev/null && extras=quantization,dev
            _rlhf_install "$base" "$venv" "$extras" || return 1
            echo "$key $extras" >"$stamp"
        fi
        RLHF_PYTHON="$venv/bin/python"
    fi
    scripts="$("$RLHF_PYTHON" -c 'import sysconfig; print(sysconfig.get_path("scripts"))')" || return 1
    export RLHF_PYTHON
    case "$PATH" in "$scripts:"*) ;; *) export PATH="$scripts:$PATH" ;; esac
    case ":${PYTHONPATH:-}:" in
        *":$_rlhf_root:"*) ;;
        *) export PYTHONPATH="$_rlhf_root${PYTHONPATH:+:$PYTHONPATH}" ;;
    esac
    if [ -z "${DS_ACCELERATOR:-}" ] && ! _rlhf_has_gpu; then
        export DS_ACCELERATOR=cpu  # DeepSpeed would find out too, with a warning from every process
    fi
    export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"  # its threads and forked workers do not mix
    if [ "$RLHF_PYTHON" = "$venv/bin/python" ]; then
        # DeepSpeed compiles operators on first use; environments that shared them would rebuild each other's every time.
        export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$venv/torch_extensions}"
    fi
    export PYTHONUNBUFFERED=1
}

_rlhf_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
_rlhf_constraints="$_rlhf_root/training_scripts/constraints.txt"
_rlhf_setup "$@"
