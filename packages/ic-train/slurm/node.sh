# One node's launcher: starts a process per GPU. Arguments go to ic_train.sft, or what IC_MODULE names (ic_train.dpo).
set -euo pipefail

# USR1 is for the trainer, which listens. It would end this shell and accelerate's launcher; what is ignored here,
# they ignore, too
trap '' USR1

gpus=${SLURM_GPUS_ON_NODE:-${IC_PROCESSES_PER_NODE:-1}}
exec "${IC_PYTHON:-python}" -m accelerate.commands.launch \
  --config_file "$IC_LAUNCHER" \
  --num_machines "$SLURM_NNODES" --num_processes $((SLURM_NNODES * gpus)) --machine_rank "$SLURM_NODEID" \
  --main_process_ip "$IC_MASTER_ADDR" --main_process_port "$IC_MASTER_PORT" \
  -m "${IC_MODULE:-ic_train.sft}" "$@"
