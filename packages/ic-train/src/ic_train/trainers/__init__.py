"""Trainers: transformers' own, with this project's losses."""

from ic_train.trainers.passkey import PasskeyTrainer

__all__ = ["PasskeyTrainer"]
