"""Every number that a layer, an operator or a command takes has a range, and what is not in it is said: all are tried."""

import inspect
import math

import pytest
import torch
from against_reference import class_of
from commands import TINY, invoke
from every_module import classes

import mann_kernels
from mann_kernels import _backend, compat
from mann_kernels.train import learners
from mann_kernels.train.__main__ import main

#: Arguments that a class needs beside the one that is tried.
NEEDED = {
    "MANN": {"input_size": 3}, "MANNCell": {"input_size": 3}, "LSTM": {"input_size": 3, "hidden_size": 5},
    "DNC": {"input_size": 3, "hidden_size": 5}, "AugmentedLinear": {"in_features": 3, "out_features": 5},
    "AugmentedConv2d": {"in_channels": 1, "out_channels": 2, "kernel_size": 3},
}  # fmt: skip
#: What a class hands on to MANN.
OF_MANN = ("MANN", "MANNCell", "LSTM", "DNC")
#: Classes of the training command, whose sizes are the command's.
COMMANDS = {kind for kind in vars(learners).values() if inspect.isclass(kind) and kind.__module__ == learners.__name__}
LAYERS = [kind for kind in classes() if kind not in COMMANDS]


def numbers(function):
    """name: annotation of what is a number."""
    kinds = {"int": int, "float": float, int: int, float: float}
    found = {name: p.annotation for name, p in inspect.signature(function).parameters.items()}
    return {name: kinds[kind] for name, kind in found.items() if kind in kinds}


def makers():
    for kind in sorted(LAYERS, key=lambda kind: kind.__name__):
        name, base = kind.__name__, mann_kernels.MANN if kind.__name__ in OF_MANN else kind
        given = numbers(kind.__init__) | (numbers(base.__mro__[1].__init__) if name in OF_MANN else {})
        if name == "DNC":  # its own names for these
            given = {n: k for n, k in given.items() if n not in ("num_slots", "slot_size", "num_heads", "num_layers")}
        if name == "MetaNet":
            continue
        yield from ((name, kind, argument, of) for argument, of in given.items() if argument not in ("gpu_id",))
    metanet = mann_kernels.MetaNet
    for make in (metanet.omniglot, metanet.mini_imagenet):
        given = numbers(make) | numbers(metanet.__init__)
        yield from ((make.__name__, make, argument, of) for argument, of in given.items())


MAKERS = list(makers())
#: Numbers that may be anything finite.
UNBOUNDED = ("memory_init",)
#: Numbers that may be zero.
MAY_BE_ZERO = ("eps", "decay", "margin", "padding", "proj_size", "dropout", "memory_init", "clip")


@pytest.mark.parametrize(("name", "make", "argument", "of"), MAKERS, ids=lambda v: v if isinstance(v, str) else "")
def test_arguments_of_layers(name, make, argument, of):
    wrong = [math.nan, math.inf, -math.inf, "3", None if of is int and name != "LSTM" else "x"]
    wrong += [] if argument in UNBOUNDED else [-1]
    wrong += [] if argument in MAY_BE_ZERO else [0]
    for value in wrong:
        with pytest.raises((ValueError, TypeError), match=argument):
            make(**{**NEEDED.get(name, {}), argument: value})


def test_what_was_taken_before():
    for options in ({"eps": -1}, {"memory_init": math.nan}, {"decay": 2}, {"decay": -0.1}, {"key_strength": "no"}):
        with pytest.raises((ValueError, TypeError), match=next(iter(options))):
            mann_kernels.MANN(3, **options)


@pytest.mark.parametrize("op", _backend.OPS)
def test_arguments_of_operators(op):
    function = getattr(mann_kernels, op)
    for argument in numbers(function):
        for value in (math.nan, math.inf, -1, "3", None, True):
            with pytest.raises((ValueError, TypeError), match=argument):
                function(**{**class_of(op).small, argument: value})


def options_of(command):
    """The options of a command that are numbers."""
    kinds = (int, float)
    found = {}
    for name, parameter in inspect.signature(command).parameters.items():
        args = getattr(parameter.annotation, "__origin__", parameter.annotation)
        if args in kinds or any(kind in kinds for kind in getattr(args, "__args__", ())):
            found[name] = f"--{name.replace('_', '-')}"
    return found


#: Options that take one of the values that are tried. Ways and points are those of other tasks.
TAKEN = {
    "minutes": {"inf", "18446744073709551616"}, "clip": {"inf", "18446744073709551616"},
    "forget_bias": {"-1", "0"}, "seed": {"0"}, "split_seed": {"0"}, "most_ways": {"0"},
}  # fmt: skip


@pytest.mark.parametrize(("name", "option"), options_of(main).items())
def test_options_of_training(name, option, tmp_path):
    sizes = [*TINY.split(), "--length", "3", "--updates", "1"]
    for value in ("nan", "inf", "-inf", "-1", "0", "1e999", "18446744073709551616"):
        before = [word for n, word in enumerate(sizes) if option not in (word, sizes[n - 1] if n else "")]
        result = invoke("copy", "--out", str(tmp_path / value), *before, option, value)
        if value in TAKEN.get(name, ()) or (value == "1e999" and "inf" in TAKEN.get(name, ())):
            assert result.exit_code == 0, result.output
            continue
        assert result.exit_code == 2, (value, result.output, result.exception)
        assert option in result.output
        assert not (tmp_path / value).exists()


@pytest.mark.parametrize("option", ["--tasks", "--seed", "--ways"])
def test_options_of_evaluation(option, tmp_path):
    from mann_kernels.evaluate import main as evaluate

    assert set(options_of(evaluate).values()) == {"--tasks", "--seed", "--ways"}
    for value in ("nan", "-1", "18446744073709551616"):
        result = invoke(str(tmp_path), option, value, command=evaluate)
        assert result.exit_code == 2
        assert option in result.output


def test_a_test_that_falls_on_no_row_of_the_log(tmp_path):
    more = ["--log-every", "3", "--test-every", "4"]
    result = invoke("copy", "--out", str(tmp_path / "run"), *TINY.split(), "--updates", "1", *more)
    assert result.exit_code == 2
    assert "--test-every: got 4, want a multiple of --log-every, 3" in " ".join(result.output.replace("│", " ").split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "sizes", [["--hidden-size", "2000000"], ["--num-slots", "2000000000"], ["--length", "2000000000"]]
)
def test_sizes_that_no_memory_has(sizes, tmp_path):
    result = invoke("copy", "--out", str(tmp_path / "run"), *TINY.split(), "--updates", "1", *sizes)
    assert result.exit_code in (1, 2)
    assert isinstance(result.exception, SystemExit)
    assert "no memory for sizes like these" in result.output


def test_proj_size_is_that_of_an_lstm():
    for size in (-1, 5, 6):
        with pytest.raises(ValueError, match="proj_size"):
            compat.LSTM(3, 5, proj_size=size)
        with pytest.raises(ValueError, match="proj_size"):
            torch.nn.LSTM(3, 5, proj_size=size)
