#!/usr/bin/env bash
# The whole pipeline: supervised fine-tuning -> reward model -> PPO, and a table of what came out.
set -euo pipefail

usage() {
    cat <<'HELP'
Usage: bash training_scripts/run_all.sh [OPTIONS]

Supervised fine-tuning, reward model and PPO, each on the result of the one before; at the end a table and
OUTPUT_DIR/summary.json. With no option it aligns the embedded tiny Korean model. Everything is checked first.

  --config FILE            YAML with shared fields and sections sft:, reward:, ppo: (presets: training_scripts/configs/)
  --base_model NAME        model directory or hub name
  --sft_data PATH...       instruction data        --preference_data PATH...  pairs or rankings
  --prompt_data PATH...    prompts for PPO         --output_dir DIR           default runs/default
  --FIELD VALUE            any field, for every stage that has it; --STAGE.FIELD VALUE for one stage
  --align dpo              after supervised fine-tuning dpo, ipo, kto, rrhf, orpo or simpo, in place of reward model and PPO
  --stages sft,reward,ppo  only some of the stages; --short: a few steps of each, in a directory of its own

  --num_devices N          processes on this machine (default: every GPU; 1 without a GPU); --master_port PORT
  --hostfile FILE          several machines (see training_scripts/hostfile.example); --num_nodes N, --master_addr ADDRESS

  Ctrl-C, SIGTERM, SIGHUP  the stage finishes its step, saves its training state and stops, status 0; twice kills it
  --resume auto            go on where the last run stopped or died; finished stages are skipped
  --resume never           start anew although an unfinished run lies in OUTPUT_DIR
  --overwrite              start anew although a finished run lies there; it is removed whole
  --max_restarts N         start a stage that died again with --resume auto, at most N times in all (default 0)

  --help-all               every field with its value and where it comes from (add --config FILE to see its values)

Relative paths on the command line are taken from where you are; those in a configuration file from the project's root.
Variables: RLHF_PYTHON (Python to use), RLHF_VENV (where the environment is made), OMP_NUM_THREADS (per process).
HELP
}

for argument in "$@"; do
    case "$argument" in -h | --help) usage; exit 0 ;; esac
done

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=setup_env.sh
source "$here/setup_env.sh" --

case " $* " in
    *" --help-all "*) exec "$RLHF_PYTHON" -m rlhf.pipeline.arguments "$@" ;;
esac

# Importing libraries may print; the assignments are the last lines.
settings="$("$RLHF_PYTHON" -m rlhf.pipeline.arguments "$@" | sed -n '/^STAGES=/,$p')"
# STAGES RESUME_STAGES OVERWRITE_STAGES SUMMARISED OUTPUT_DIR MAX_RESTARTS SINGLE_PROCESS LAUNCHER_ARGS;
# SCRIPT_x TITLE_x ARGS_x of stage x
eval "$settings"

user_dir="$PWD"
cd "$here/.."
if [ -z "${OMP_NUM_THREADS:-}" ]; then
    ranks=1
    for ((i = 0; i + 1 < ${#LAUNCHER_ARGS[@]}; i++)); do
        [ "${LAUNCHER_ARGS[i]}" = --num_gpus ] && ranks="${LAUNCHER_ARGS[i + 1]}"
    done
    if [ "${DS_ACCELERATOR:-}" = cpu ]; then
        threads=$(($(nproc) / ranks))
        export OMP_NUM_THREADS=$((threads > 1 ? threads : 1))
    fi
fi
# A thread that waits for the others sleeps: on cores that other work wants too, spinning costs ten times the time.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"

stop_signal=""  # the first signal this script got: the stage is asked to stop
launcher=""     # process and process group of the running stage; empty between stages
restarts=0
ran=""          # whether a stage has run: what later ones left is then of an earlier run

say() { echo "run_all.sh: $*" >&2; }

alive() { kill -0 "$@" 2>/dev/null; }

on_signal() {
    if [ -z "$stop_signal" ]; then
        stop_signal="$1"
        [ -z "$launcher" ] || say "$1: the stage finishes its step, saves its training state and stops; once more kills it"
        return 0
    fi
    if [ -n "$launcher" ]; then
        kill -TERM -- "-$launcher" 2>/dev/null || true  # the launcher of several machines ends those of the others
        sleep 1 || true
        kill -KILL -- "-$launcher" 2>/dev/null || true
    fi
    say "$1 again: killed; go on with --resume auto"
    exit "$2"
}
trap 'on_signal SIGINT 130' INT
trap 'on_signal SIGTERM 143' TERM
trap 'on_signal SIGHUP 129' HUP

launch() {
    # Run the launcher in a session of its own, so that a Ctrl-C in the terminal does not reach it: it would kill the
    # ranks. Ranks are asked to stop through a file instead (rlhf/distributed/rank_board.py), on every machine. Sets `status`.
    local board="$1/.ranks" waited=0
    shift
    local command=(deepspeed --log_level critical "${LAUNCHER_ARGS[@]}")
    # One process needs no launcher, which loads torch twice before the stage does.
    [ -z "$SINGLE_PROCESS" ] || command=(env -u RANK -u LOCAL_RANK -u WORLD_SIZE "$RLHF_PYTHON")
    setsid "${command[@]}" "$@" 9>&- &
    launcher=$!
    while alive "$launcher"; do
        # Again and again: ranks that only start clear away what they find.
        [ -z "$stop_signal" ] || [ ! -d "$board" ] || echo "$stop_signal" 2>/dev/null >"$board/stop" || true
        sleep 0.5 || true
    done
    status=0
    wait "$launcher" || status=$?
    # A launcher that was itself killed leaves its ranks behind: they would hold the port and the directory.
    while [ "$status" -ne 0 ] && alive -- "-$launcher"; do
        [ "$waited" -gt 0 ] || kill -TERM -- "-$launcher" 2>/dev/null || true
        [ "$waited" -lt 35 ] || kill -KILL -- "-$launcher" 2>/dev/null || true
        [ "$waited" -lt 40 ] || break
        sleep 1 || true
        waited=$((waited + 1))
    done
    launcher=""
}

is_json() { "$RLHF_PYTHON" -c 'import json, sys; json.load(open(sys.argv[1], encoding="utf-8"))' "$1" 2>/dev/null; }

cause() {
    # What a status says: the launcher gives 256 - N for a rank killed by signal N, bash 128 + N for a killed launcher.
    case "$1" in
        137 | 247) echo "status $1: killed, often because memory ran out; see dmesg" ;;
        *) echo "status $1" ;;
    esac
}

run_stage() {
    local number="$1" stage="$2" directory="$OUTPUT_DIR/$2" result="$OUTPUT_DIR/$2/result.json" status=0
    local again=()
    local -n script="SCRIPT_$stage" title="TITLE_$stage" arguments="ARGS_$stage"
    if [ -n "$stop_signal" ]; then
        say "stopped by $stop_signal before stage $stage; go on with --resume auto"
        exit 0
    fi
    echo
    echo "=== $number/${#STAGES[@]} $title"
    case " ${RESUME_STAGES[*]} " in
        *" $stage "*)
            if [ -z "$ran" ] && is_json "$result"; then
                echo "stage $stage is finished ($result): skipped"
                return 0
            fi
            ;;
    esac
    ran=1
    local started
    started="$(mktemp)"
    while :; do
        rm -f "$directory/stopped.json" "$directory/.cleared"
        # The stage removes an earlier run's result itself, once it has agreed to start; with `auto` it would stop there.
        # What the summary says is then no longer so.
        case " ${RESUME_STAGES[*]} ${again[*]} " in
            *" $stage "* | *" auto "*) [ ! -e "$result" ] || rm -f "$OUTPUT_DIR/summary.json" "$OUTPUT_DIR/report.html" "$result" ;;
        esac
        launch "$directory" "$script" "${arguments[@]}" "${again[@]}"
        # The launcher may return 0 when a signal killed it, so look for a new result too.
        if [ "$status" -eq 0 ] && [ "$result" -nt "$started" ]; then
            rm -f "$started"
            return 0
        fi
        if [ -f "$directory/stopped.json" ] && [ "$status" -ne 137 ]; then  # 137: the launcher was killed
            say "stage $stage has stopped in good order; go on with --resume auto"
            exit 0
        fi
        if [ "$status" -eq 2 ] || [ -n "$stop_signal" ] || [ "$restarts" -ge "$MAX_RESTARTS" ]; then
            break
        fi
        restarts=$((restarts + 1))
        # Before the stage had cleared its directory, what lies there is not this run's: --resume never must stay that.
        if [ -e "$directory/.cleared" ]; then
            again=(--resume auto)
            case " ${OVERWRITE_STAGES[*]} " in *" $stage "*) again+=(--overwrite false) ;; esac  # it has done so
        fi
        say "stage $stage ($script) failed ($(cause "$status")): restart $restarts of $MAX_RESTARTS${again[*]:+, with ${again[*]}}"
    done
    echo "error: stage $stage ($script) failed with $(cause "$status"); its messages are above. Stopped." >&2
    exit "$((status > 0 ? status : 1))"
}

remove_earlier_run() {
    # What is to be overwritten goes at once and whole: models of an earlier run must not lie beside those of this one,
    # and least of all the summary and the results that describe them.
    local stage directory old=()
    for stage in "${OVERWRITE_STAGES[@]}"; do
        directory="$OUTPUT_DIR/$stage"
        [ -n "$(ls -A -I .lock "$directory" 2>/dev/null)" ] || continue
        if [ -e "$directory/.lock" ] && command -v flock >/dev/null && ! flock -w 1 "$directory/.lock" true; then
            say "error: $directory is in use by another run; wait until it ends, or choose another --output_dir"
            exit 2
        fi
        old+=("$directory")
    done
    [ ${#old[@]} -gt 0 ] || return 0
    say "removing the earlier run in ${old[*]}"
    # The content and not the directory, which may be a link to another disk; locks stay, as they do after a run.
    rm -f "$OUTPUT_DIR/summary.json" "$OUTPUT_DIR/report.html" "${old[@]/%//result.json}" && find -H "${old[@]}" -mindepth 1 ! -name .lock -delete || {
        say "error: the earlier run could not be removed; mend that, or choose another --output_dir"
        exit 2
    }
}

export RLHF_PIPELINE=1  # the report is written here, once
mkdir -p "$OUTPUT_DIR"
if command -v flock >/dev/null; then
    pipeline_lock="$OUTPUT_DIR/.pipeline.lock"
    exec 9<>"$pipeline_lock"
    flock -w 1 9 || {  # the doctor looks by a lock of an instant
        say "error: $OUTPUT_DIR is in use by another run_all.sh; wait until it ends, or choose another --output_dir"
        exit 2
    }
    # As rlhf/checkpoint/run_lock.py reads it, where a disk keeps locks to each machine; empty after an end that is told.
    printf '{"host": "%s", "pid": %d, "started": "%s", "command": "run_all.sh", "birth": null}' \
        "$(uname -n)" "$$" "$(date -u +%FT%T+00:00)" >"$pipeline_lock"
    trap '{ : >"$pipeline_lock"; } 2>/dev/null || true' EXIT
fi

check_all() {
    # In a session of its own like the stages: a signal reaches this script, which ends the check and changes nothing.
    local process
    (cd "$user_dir" && exec setsid "$RLHF_PYTHON" -m rlhf.pipeline.preflight "$@") 9>&- &
    process=$!
    while [ -z "$stop_signal" ] && alive "$process"; do
        sleep 0.2 || true
    done
    if [ -n "$stop_signal" ]; then
        kill -KILL "$process" 2>/dev/null || true
        wait "$process" 2>/dev/null || true  # or bash would tell of it
        say "stopped by $stop_signal before anything was changed"
        exit 0
    fi
    wait "$process" || exit "$?"
}

echo
echo "=== checking every stage"
check_all "$@"
remove_earlier_run
# What was asked for: the doctor tells a run that was cut short from one of some stages only.
printf '%s\n' "${STAGES[@]}" >"$OUTPUT_DIR/.pipeline.stages"

for index in "${!STAGES[@]}"; do
    run_stage "$((index + 1))" "${STAGES[index]}"
done

if [ -n "$SUMMARISED" ]; then
    echo
    echo "=== what came out"
    "$RLHF_PYTHON" -m rlhf.cli.summary "$OUTPUT_DIR" --stages "$(IFS=,; echo "${STAGES[*]}")"
fi
echo
"$RLHF_PYTHON" -m rlhf.cli.report "$OUTPUT_DIR" || say "the run is finished; its report could not be written"
