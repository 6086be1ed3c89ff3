"""From settings to tasks and a learner."""

from pathlib import Path

from torch import nn

from mann_kernels import MetaNet
from mann_kernels.tasks import FewShotTasks, OmniglotEpisodes, load_omniglot, with_rotations
from mann_kernels.train import learners
from mann_kernels.train.settings import Settings

TASKS = ("omniglot", "few-shot")
LEARNERS = ("mann", "mann-feedforward", "lstm", "metanet", "metanet-", "metanet+")


def tasks(settings: Settings, data: Path):
    """Training and test tasks, of different classes."""
    if settings.task == "omniglot":
        sizes = {"ways": settings.ways, "length": settings.length, "labels": settings.labels, "counts": settings.counts}
        train, test = (load_omniglot(data, split) for split in ("background", "test"))
        return OmniglotEpisodes(train, **sizes, augment=True, turns=True), OmniglotEpisodes(test, **sizes)
    sizes = settings.ways, settings.shots, settings.queries
    # The quarter turns of a class are classes of their own.
    return [FewShotTasks(with_rotations(load_omniglot(data, split)), *sizes) for split in ("train", "test")]


def learner(settings: Settings, task) -> nn.Module:
    """A learner of the sizes of the settings for a task."""
    if settings.learner.startswith("metanet"):
        return MetaNet.omniglot(settings.ways, variant=settings.learner)
    sizes = task.input_size, task.output_size
    if settings.learner == "lstm":
        made = learners.lstm(*sizes, settings.hidden_size)
    else:
        names = ("hidden_size", "num_slots", "slot_size", "num_heads", "write", "key_strength")
        made = learners.mann(
            *sizes,
            controller="feedforward" if settings.learner == "mann-feedforward" else "lstm",
            **{name: getattr(settings, name) for name in names},
        )
    if settings.forget_bias:
        learners.set_forget_bias(made.core, settings.forget_bias)
    return made
