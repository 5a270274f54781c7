# What the batch scripts share; bash, to be sourced.
#
# A run ends in one of four ways:
#   it is done                      the job is COMPLETED
#   USR1 came (the time limit)      every rank saves and ends without an error, the first writes OUTPUT/requeue, and
#                                   the job is requeued here; it waits its turn again and goes on by --resume auto.
#                                   Where it could not save it has failed.
#   a node fails                    SLURM requeues the job (--requeue), which goes on from the last whole checkpoint
#   a process fails                 requeued only if the run has saved since it began: what fails before that, as a
#                                   wrong argument does, would fail again. Else the job is FAILED.

# the value after --output_dir in the arguments, with the array task's subfolder
output_folder() {
  while [ $# -gt 0 ]; do
    case $1 in
      --output_dir) printf '%s%s\n' "$2" "${IC_SUBFOLDER:+/$IC_SUBFOLDER}" && return ;;
      --output_dir=*) printf '%s%s\n' "${1#*=}" "${IC_SUBFOLDER:+/$IC_SUBFOLDER}" && return ;;
    esac
    shift
  done
  echo "error: --output_dir is missing; give a folder that all nodes share" >&2
  return 2
}

last_checkpoint() {
  find "$1" -maxdepth 2 -path '*/checkpoint-*/complete.json' 2>/dev/null | sort -V | tail -n 1
}

# when the folder's newest checkpoint was saved, whatever its number and name are
last_save() {
  find "$1" -mindepth 2 -maxdepth 2 -name complete.json -printf '%T@\n' 2>/dev/null | sort -n | tail -n 1
}

# does not return
requeue() {
  echo "$1: requeueing job $SLURM_JOB_ID"
  # SLURM ends this script
  scontrol requeue "$SLURM_JOB_ID" && sleep 60
  # half a run is not to look like a whole one to the jobs that wait for it
  echo "error: job $SLURM_JOB_ID was not requeued; submit it again, with --resume auto" >&2
  exit 1
}

run_job() {
  local recipe=$1 output before status again=()
  shift
  output=$(output_folder "$@") || exit 2
  before=$(last_save "$output")
  echo "job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}, nodes $SLURM_JOB_NODELIST, output $output"
  # a checkpoint that the arguments name is for the first start; the trainer writes OUTPUT/resumed when it has gone on
  # from it
  if [ "${SLURM_RESTART_COUNT:-0}" -eq 0 ]; then
    rm -f "$output/resumed"
  elif [ -f "$output/resumed" ] && [ -n "$(last_checkpoint "$output")" ]; then
    again=(--resume auto)
  fi
  export IC_MASTER_ADDR=${IC_MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
  # two jobs on a node need two ports; a requeued job keeps its number. Linux gives ports from 32768 on to whoever
  # connects, so that those below are free
  export IC_MASTER_PORT=${IC_MASTER_PORT:-$((15000 + SLURM_JOB_ID % 15000))}
  # a rank whose neighbour is gone would wait for it until the time limit
  srun --kill-on-bad-exit=1 --export=ALL bash "${IC_SLURM:-packages/ic-train/slurm}/node.sh" \
    --config "$recipe" --resume auto "$@" --output_dir "$output" "${again[@]}"
  status=$?
  if [ -f "$output/requeue" ]; then
    rm -f "$output/requeue"
    requeue "the run has saved $(last_checkpoint "$output")"
  elif [ $status -ne 0 ] && [ "$(last_save "$output")" != "$before" ]; then
    requeue "status $status, but the run has saved"
  fi
  exit $status
}
