"""Meta-training: tasks are drawn, a learner adapts to one half of each and is updated from its loss on the other.

`python -m mann_kernels.train --help` is the command.
"""
