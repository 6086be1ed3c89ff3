"""Layer augmentation of a convolution, and the max-pooling that follows it in MetaNet (Munkhdalai & Yu 2017, section 3.3)."""

import torch.nn.functional as F

from mann_kernels.reference.augmented_linear import ACTIVATIONS, fast_weights


def augmented_conv2d(x, weight, fast, mix=None, bias=None, *, padding=1, form="hidden", activation="relu", pool=False):
    """x [L,C,H,W] or [G,L,C,H,W], weight [O,C,k,k], bias [O]?
    fast and mix as in augmented_linear, with [O,C,k,k] in place of [O,I]
    -> [L,O,H',W'] or [G,L,O,H',W'], H' = H + 2*padding - k + 1; pool halves H' and W', rounding up.
    """
    act = ACTIVATIONS["identity" if form == "output" else activation]
    tasks, kernel = x.dim() == 5, weight.shape[-1]
    images = x.flatten(0, 1) if tasks else x
    slow = F.conv2d(images, weight, bias, padding=padding)
    # a convolution is linear in its weight: a product [O,C*k*k] @ [C*k*k,H'*W'] with the unfolded image
    per_example = fast_weights(tasks, tasks and fast.dim() == 5, fast, mix).flatten(-3)
    patches = F.unfold(images, kernel, padding=padding).unflatten(0, x.shape[:-3])
    y = act(slow) + act((per_example @ patches).reshape(slow.shape))
    if pool:  # after the sum; ceil mode takes 28 to 14, 7, 4, 2, 1
        y = F.max_pool2d(y, 2, 2, ceil_mode=True)
    return y.unflatten(0, x.shape[:2]) if tasks else y
