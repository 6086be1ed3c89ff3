"""Tasks to train on: what draws them, seeded and vectorised."""

from mann_kernels.tasks.episodes import PRESENTATIONS, Episodes, OmniglotEpisodes
from mann_kernels.tasks.few_shot import FewShotTasks, Tasks
from mann_kernels.tasks.omniglot import SPLITS, load_omniglot, with_rotations

__all__ = [
    "PRESENTATIONS",
    "SPLITS",
    "Episodes",
    "FewShotTasks",
    "OmniglotEpisodes",
    "Tasks",
    "load_omniglot",
    "with_rotations",
]
