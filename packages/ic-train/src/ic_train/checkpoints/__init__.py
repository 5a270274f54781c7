"""Checkpoints of training runs: sharded, written in the background, whole or not there."""

from ic_train.checkpoints.folders import COMPLETE, latest_checkpoint, resolve_resume
from ic_train.checkpoints.saving import CheckpointWriter, load_checkpoint

__all__ = ["COMPLETE", "CheckpointWriter", "latest_checkpoint", "load_checkpoint", "resolve_resume"]
