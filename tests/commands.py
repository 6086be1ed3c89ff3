"""Runs a command of the package in this process, and options that make a run small."""

import torch
import typer
from typer.testing import CliRunner

TINY = "--hidden-size 8 --num-slots 8 --slot-size 4 --num-heads 1 --tasks-per-update 2 --interim-tasks 2 --test-tasks 2"


def invoke(*args, command=None):
    from mann_kernels.train.__main__ import main

    app = typer.Typer()
    app.command()(command or main)
    threads = torch.get_num_threads()
    try:
        return CliRunner().invoke(app, list(args), env={"COLUMNS": "200"})
    finally:
        torch.set_num_threads(threads)
