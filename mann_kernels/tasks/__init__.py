"""Tasks to train on: what draws them, seeded and vectorised."""

from mann_kernels.tasks.algorithmic import AssociativeRecall, Copy
from mann_kernels.tasks.episodes import COUNTS, LABELS, PRESENTATIONS, Episodes, OmniglotEpisodes
from mann_kernels.tasks.few_shot import FewShotTasks, Tasks
from mann_kernels.tasks.omniglot import LAKE_SPLITS, SPLITS, load_omniglot, with_rotations
from mann_kernels.tasks.regression import GPRegression, Sinusoids

__all__ = [
    "COUNTS",
    "LABELS",
    "LAKE_SPLITS",
    "PRESENTATIONS",
    "SPLITS",
    "AssociativeRecall",
    "Copy",
    "Episodes",
    "FewShotTasks",
    "GPRegression",
    "OmniglotEpisodes",
    "Sinusoids",
    "Tasks",
    "load_omniglot",
    "with_rotations",
]
