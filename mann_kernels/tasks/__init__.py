"""Tasks to train on: what draws them, seeded and vectorised."""

from mann_kernels.tasks.few_shot import FewShotTasks, Tasks
from mann_kernels.tasks.omniglot import SPLITS, load_omniglot, with_rotations

__all__ = ["SPLITS", "FewShotTasks", "Tasks", "load_omniglot", "with_rotations"]
