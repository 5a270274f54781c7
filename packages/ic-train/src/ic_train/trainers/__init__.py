"""Trainers: transformers' own, with this project's losses."""

from ic_train.trainers.muon import MuonWithAdamW
from ic_train.trainers.passkey import PasskeyTrainer

__all__ = ["MuonWithAdamW", "PasskeyTrainer"]
