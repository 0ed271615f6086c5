"""Hugging Face's Trainer on one machine, without gradients: a federation of one client behind its names."""

from fedmezo.studies.trainer.arguments import ZOTrainingArguments
from fedmezo.studies.trainer.state import TrainerState
from fedmezo.studies.trainer.trainer import TrainOutput, ZOTrainer

__all__ = ["TrainOutput", "TrainerState", "ZOTrainer", "ZOTrainingArguments"]
