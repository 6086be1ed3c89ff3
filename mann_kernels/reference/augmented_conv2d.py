"""Layer augmentation of a convolution, and the max-pooling that follows it in MetaNet (Munkhdalai & Yu 2017, section 3.3)."""

import torch
import torch.nn.functional as F

from mann_kernels.reference.augmented_linear import activated_sum, fast_weights


def picked(z, pixel):
    """z [n,O,H,W] at one pixel of each window 2 x 2 in steps of 2, ceil mode; pixel int [n,O,h,w]: 2 * down + right.

    In a window of one column 1 is the lower pixel too.
    """
    width = z.shape[-1]
    h, w = (torch.arange(size, device=z.device) for size in pixel.shape[-2:])
    down, right, alone = pixel // 2, pixel % 2, 2 * w + 1 == width
    down, right = torch.where(alone, torch.maximum(down, right), down), right.masked_fill(alone, 0)
    at = (2 * h[:, None] + down) * width + 2 * w + right
    return z.flatten(-2).gather(-1, at.flatten(-2)).view(pixel.shape)


def augmented_conv2d(
    x, weight, fast, mix=None, bias=None, *,
    padding=1, form="hidden", activation="relu", pool=False, pixel=None, sides=None,
):  # fmt: skip
    """x [L,C,H,W] or [G,L,C,H,W], weight [O,C,k,k], bias [O]?
    fast and mix as in augmented_linear, with [O,C,k,k] in place of [O,I]
    -> [L,O,H',W'] or [G,L,O,H',W'], H' = H + 2*padding - k + 1; pool halves H' and W', rounding up.
    pixel, sides: of an earlier run, int [of the output] as in `picked` and bool [2, of the output] as in augmented_linear.
    """
    tasks, kernel = x.dim() == 5, weight.shape[-1]
    images = x.flatten(0, 1) if tasks else x
    slow = F.conv2d(images, weight, bias, padding=padding)
    # a convolution is linear in its weight: a product [O,C*k*k] @ [C*k*k,H'*W'] with the unfolded image
    per_example = fast_weights(tasks, tasks and fast.dim() == 5, fast, mix).flatten(-3)
    patches = F.unfold(images, kernel, padding=padding).unflatten(0, x.shape[:-3])
    by_fast = (per_example @ patches).reshape(slow.shape)
    if pixel is not None:
        pixel = pixel.reshape(-1, *pixel.shape[-3:])
        slow, by_fast = picked(slow, pixel), picked(by_fast, pixel)
    if sides is not None:
        sides = sides.reshape(2, *slow.shape)
    y = activated_sum(slow, by_fast, "identity" if form == "output" else activation, sides)
    if pool and pixel is None:  # after the sum; ceil mode takes 28 to 14, 7, 4, 2, 1
        y = F.max_pool2d(y, 2, 2, ceil_mode=True)
    return y.unflatten(0, x.shape[:2]) if tasks else y
