"""Training a student: the trainer, its parts, and whole runs that save a stock model."""

from st_kdmcse.training.callbacks import Interrupted
from st_kdmcse.training.methods import METHODS
from st_kdmcse.training.options import TrainingOptions
from st_kdmcse.training.run import train

__all__ = ["METHODS", "Interrupted", "TrainingOptions", "train"]
