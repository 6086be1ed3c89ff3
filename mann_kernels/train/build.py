"""From settings to tasks and a learner."""

from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from mann_kernels.modules import MetaNet
from mann_kernels.modules.metanet import MetaNetOptions
from mann_kernels.tasks import (
    COUNTS,
    LABELS,
    AssociativeRecall,
    Copy,
    FewShotTasks,
    GPRegression,
    OmniglotEpisodes,
    Sinusoids,
    load_omniglot,
    omniglot,
    with_rotations,
)
from mann_kernels.train import learners
from mann_kernels.train.settings import CLASS_SPLITS, OPTIMIZERS, ROTATIONS, SCHEDULES, TRAIN_SPLITS, Settings

EPISODES = ("copy", "associative-recall", "gp-regression", "omniglot")
HALVES = ("sinusoid", "few-shot")
OnDevice = TypeVar("OnDevice", nn.Module, torch.Tensor)
#: What is made of Omniglot, and the side of its images.
OF_OMNIGLOT = {"omniglot": 20, "few-shot": 28}
TASKS = EPISODES + HALVES
RECURRENT = ("mann", "mann-feedforward", "lstm")
#: With the options that each has.
METANETS: dict[str, MetaNetOptions] = {
    "metanet": {},
    "metanet-": {"variant": "metanet-"},
    "metanet+": {"variant": "metanet+"},
    "metanet-mean": {"summarizer": "mean"},
    "metanet-fast-only": {"fast_only": True},
}
CONTEXTS = ("context-mean", "context-recurrent")
#: The learners of each task.
FITTING: dict[str, tuple[str, ...]] = dict.fromkeys(EPISODES, (*RECURRENT, "feedforward"))
FITTING |= {"sinusoid": (*RECURRENT, *CONTEXTS, "multi-task"), "few-shot": (*METANETS, *RECURRENT, *CONTEXTS)}
LEARNERS = (*RECURRENT, "feedforward", *METANETS, *CONTEXTS, "multi-task")


def tasks(settings: Settings, data: Path | None) -> tuple:
    """Training and test tasks; where there are classes, of different ones. What is made of images is on the settings' device.

    Raises:
        ValueError: data that is not given, or a device that is not there.
    """
    s = settings
    if s.most_ways and (s.task, s.labels, s.length) != ("omniglot", "string", 10 * s.ways):
        raise ValueError(
            f"--most-ways: got {s.most_ways}, want it for omniglot with --labels string and without --length"
        )
    if s.task == "copy":
        return Copy(s.length, s.bits, shorter=True), Copy(s.length, s.bits)
    if s.task not in OF_OMNIGLOT:
        made = {
            "associative-recall": lambda: AssociativeRecall(s.length, s.bits),
            "gp-regression": lambda: GPRegression(s.dimensions, s.length),
            "sinusoid": lambda: Sinusoids(s.shots, s.queries),
        }[s.task]()
        return made, made
    if data is None:
        free = ", ".join(name for name in TASKS if name not in OF_OMNIGLOT)
        raise ValueError(f"--data: got none, and {s.task} is made of Omniglot, {omniglot.WANT}; without data: {free}")

    def images(split: str):
        return on_device(load_omniglot(data, split, OF_OMNIGLOT[s.task], s.split_seed), s.device)

    train_split = "background" if s.task == "omniglot" else s.train_split
    splits = tuple(omniglot.LAKE_SPLITS) if s.class_split == "lake" else (train_split, "test")
    train, test = (images(split) for split in splits)
    if s.task == "omniglot":
        sizes: dict[str, Any] = {"ways": s.ways, "length": s.length, "labels": s.labels, "counts": s.counts}
        source = OmniglotEpisodes(train, **sizes, augment=True, turns=True, warps=s.warps)
        if s.most_ways:
            source.resize(s.most_ways)  # which may be too many
        return source, OmniglotEpisodes(test, **sizes)
    numbers = s.ways, s.shots, s.queries
    if s.rotations == "tasks":
        return FewShotTasks(train, *numbers, turns=True), FewShotTasks(test, *numbers)
    return tuple(FewShotTasks(with_rotations(half), *numbers) for half in (train, test))


def check_choices(settings: Settings) -> None:
    """Every word of the settings is one that is known here.

    Raises:
        ValueError: naming the option, what it got and what it wants.
    """
    known = {"task": TASKS, "learner": LEARNERS, "labels": LABELS, "counts": COUNTS}
    known |= {"optimizer": tuple(OPTIMIZERS), "schedule": SCHEDULES}
    known |= {"class_split": CLASS_SPLITS, "train_split": TRAIN_SPLITS, "rotations": ROTATIONS}
    for name, words in known.items():
        if (got := getattr(settings, name)) not in words:
            raise ValueError(f"--{name.replace('_', '-')}: got {got!r}, want one of {', '.join(words)}")


def on_device(what: OnDevice, device: str) -> OnDevice:
    """The module or tensor moved there; ValueError where there is no such device."""
    try:
        return what.to(device)
    except (AssertionError, RuntimeError) as error:  # a torch without CUDA asserts
        raise ValueError(f"--device: got {device!r}: {str(error).splitlines()[0]}") from None


def learner(settings: Settings, task) -> nn.Module:
    """A learner of the sizes of the settings for a task.

    Raises:
        ValueError: for one that does not fit the task.
    """
    s = settings
    if s.learner not in FITTING[s.task]:
        raise ValueError(f"--learner: got {s.learner!r}, want for {s.task} one of {', '.join(FITTING[s.task])}")
    if s.keep_memory and (s.task not in EPISODES or not s.learner.startswith("mann")):
        raise ValueError(f"--keep-memory: got {s.learner} for {s.task}, want it for mann and tasks of episodes")
    if s.learner in METANETS:
        return MetaNet.omniglot(s.ways, **METANETS[s.learner])
    if s.learner == "multi-task":
        return learners.Decoder(task.input_size, task.descriptor_size, task.output_size, s.hidden_size)
    if s.learner in CONTEXTS:
        aggregate = s.learner.removeprefix("context-")
        return learners.ContextVector(task.input_size, task.output_size, aggregate, s.hidden_size)
    sizes = task.input_size + task.output_size * (s.task in HALVES), task.output_size
    if s.learner == "feedforward":
        return learners.FeedForward(*sizes, s.hidden_size)
    if s.learner == "lstm":
        made = learners.lstm(*sizes, s.hidden_size)
    else:
        names = ("hidden_size", "num_slots", "slot_size", "num_heads", "write", "key_strength")
        controller = "feedforward" if s.learner == "mann-feedforward" else "lstm"
        keep = s.tasks_per_update * s.keep_memory
        made = learners.mann(*sizes, keep, controller=controller, **{name: getattr(s, name) for name in names})
    if s.forget_bias and s.learner != "mann-feedforward":
        learners.set_forget_bias(made.core, s.forget_bias)
    return made
