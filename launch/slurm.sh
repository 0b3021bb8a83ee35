#!/usr/bin/env bash
# One rank a slurm task; saves and queues itself again before its time is up.
#
#   CONFIG=configs/gpt2-124m.yaml sbatch --nodes=4 launch/slurm.sh strategy.name=fsdp
#
# Words after the script go to `launch/train.py`. Give the options below to sbatch, or edit them.
#SBATCH --job-name=scalellm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
# The batch script alone hears of it, so many seconds before the end: time enough to save.
#SBATCH --signal=B:USR1@300
set -euo pipefail

# sbatch runs a copy of this file from elsewhere; the job was submitted from the repository.
REPOSITORY=${REPOSITORY:-$SLURM_SUBMIT_DIR}
PYTHON=${PYTHON:-$REPOSITORY/.venv/bin/python}
CONFIG=${CONFIG:-configs/ddp.yaml}
# Seconds that ranks may go on after the first has left (rank 0 finishes the checkpoint and a plot).
LAST_RANK_S=${LAST_RANK_S:-300}
# If the hosts have several networks, name the fast one: NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME.

cd "$REPOSITORY"
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${MASTER_ADDR:-${hosts%%$'\n'*}}
# Another one for every job, in case two share a host; below the ports that systems hand out.
export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}

heard=false
requeue=false

# shellcheck disable=SC2329  # the trap calls it
time_is_up() {
  heard=true
  requeue=true
  # Signals the ranks, not this script; srun itself would end them at once on SIGTERM.
  scancel --signal=TERM "$SLURM_JOB_ID"
}
trap time_is_up USR1
# scancel and preemption tell the ranks themselves; wait for them to save. What was cancelled stays
# so, and what was preempted slurm queues again.
trap 'heard=true' TERM

# srun does not inherit --cpus-per-task. A rank that has saved leaves with code 3, which must not
# end the others, so a bad exit kills nobody before LAST_RANK_S.
srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=0 --wait="$LAST_RANK_S" \
  "$PYTHON" launch/train.py --config "$CONFIG" --resume auto "$@" &
ranks=$!

while true; do
  heard=false
  code=0
  wait "$ranks" || code=$?
  # A signal interrupts `wait`: then the code is not that of the ranks.
  [[ $heard == true ]] || break
done

# 3: stopped by a signal after saving.
if [[ $code -eq 3 && $requeue == true ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
