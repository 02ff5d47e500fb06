#!/usr/bin/env bash
# The whole pipeline: supervised fine-tuning -> reward model -> PPO, and a table of what came out.
set -euo pipefail

usage() {
    cat <<'HELP'
Usage: bash training_scripts/run_all.sh [OPTIONS]

Runs supervised fine-tuning, reward model and PPO through the `deepspeed` launcher, each on the result of the one
before, and ends with a table and OUTPUT_DIR/summary.json. With no option it aligns the embedded tiny Korean model.
An environment is made in .venv first if the running Python lacks something (a few minutes, once).

What to train
  --config FILE            YAML with shared fields and sections sft:, reward:, ppo: (presets: training_scripts/configs/)
  --base_model NAME        model directory or hub name
  --sft_data PATH...       instruction data        --preference_data PATH...  pairs or rankings
  --prompt_data PATH...    prompts for PPO         --output_dir DIR           default runs/default
  --zero_stage 0|1|2|3     --seed N                --max_steps N
  --FIELD VALUE            any field of docs/configuration.md; it goes to every stage that has it
  --STAGE.FIELD VALUE      the same for one stage: --reward.learning_rate 5e-5

How to run
  --num_devices N          processes on this machine (default: every GPU; 1 without a GPU)
  --hostfile FILE          several machines (see training_scripts/hostfile.example); --num_nodes N, --master_addr ADDRESS
  --master_port PORT       default: a free one
  --stages sft,reward,ppo  only some of the stages
  --short                  a few steps of each stage, to see that everything runs
  --help                   this text

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

# Importing libraries may print; the assignments are the last lines.
settings="$("$RLHF_PYTHON" -m rlhf.cli.pipeline_args "$@" | sed -n '/^STAGES=/,$p')"
eval "$settings"  # STAGES OUTPUT_DIR LAUNCHER_ARGS SFT_ARGS REWARD_ARGS PPO_ARGS

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

run_stage() {
    local stage="$1" title="$2" script="$3" result="$OUTPUT_DIR/$1/result.json" status=0
    shift 3
    case " ${STAGES[*]} " in *" $stage "*) ;; *) return 0 ;; esac
    echo
    echo "=== $title"
    rm -f "$result"
    deepspeed --log_level error "${LAUNCHER_ARGS[@]}" "$script" "$@" || status=$?
    # The launcher returns 0 when a signal kills its child (out of memory, for one), so look for the result too.
    if [ "$status" -ne 0 ] || [ ! -f "$result" ]; then
        echo "error: stage $stage ($script) failed with status $status; its messages are above. Stopped." >&2
        exit "$((status > 0 ? status : 1))"
    fi
}

run_stage sft "1/3 supervised fine-tuning" step1_sft/main.py "${SFT_ARGS[@]}"
run_stage reward "2/3 reward model" step2_reward/main.py "${REWARD_ARGS[@]}"
run_stage ppo "3/3 PPO" step3_ppo/main.py "${PPO_ARGS[@]}"

if [ "${#STAGES[@]}" -eq 3 ]; then
    echo
    echo "=== what came out"
    "$RLHF_PYTHON" -m rlhf.cli.summary "$OUTPUT_DIR"
fi
