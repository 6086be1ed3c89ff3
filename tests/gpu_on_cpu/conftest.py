"""Which of these files run: Triton reads TRITON_INTERPRET when a kernel is defined, so its interpreter has a process of its own."""

import os
from pathlib import Path

INTERPRETED = ["test_interpreter.py", "test_guard.py"]
everything = [path.name for path in Path(__file__).parent.glob("test_*.py")]
collect_ignore = (
    [name for name in everything if name not in INTERPRETED]
    if os.environ.get("TRITON_INTERPRET") == "1"
    else INTERPRETED
)
