"""Triton kernels, one module per operator, for NVIDIA and AMD GPUs; under TRITON_INTERPRET=1 they run on CPU tensors.

Imported at the first call that needs them. Each module has `forward` and `backward`, with the arguments and results of the
operators of the same name.
"""
