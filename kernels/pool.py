"""Synthesised images on their device, as bytes: what a student draws from, in step with what is still being made."""

import torch
import torch.nn as nn

from kernels.contract import fail, one_line
from kernels.data import pixel_range


class Pool(nn.Module):
    """Room for n uint8 images, filled batch by batch; images are drawn without the host, so in a CUDA graph too.

    Args:
        info: of load_network, the teacher: shape, mean, std and device of the images.
        n: how many there will be.
    """

    def __init__(self, info, n):
        super().__init__()
        if not n:
            fail("the student has no images: raise --num-images or --batches-per-epoch, or pass --images")
        self.n_images, self.n_newest, self.drawn_from = 0, 0, None
        self.low, self.high = pixel_range(info, info.device)
        with one_line(f"{n} images of {info.image_size} pixels do not fit", "take fewer, or another --device"):
            shape = n, info.shape[0], info.image_size, info.image_size
            images = torch.zeros(shape, dtype=torch.uint8, device=info.device)
        self.register_buffer("images", images, persistent=False)  # checkpoints leave them out: they lie in files
        window = torch.zeros(2, dtype=torch.long, device=info.device)  # first image, how many
        self.register_buffer("window", window, persistent=False)

    def add(self, images):
        """Merge a batch, uint8 (N, C, H, W), for which there is room."""
        self.images[self.n_images : self.n_images + len(images)] = images.to(self.images.device)
        self.n_images, self.n_newest = self.n_images + len(images), len(images)

    def draw_from(self, newest):
        """Let what is drawn from now on be of the newest batch, or of all images."""
        count = self.n_newest if newest else self.n_images
        if self.drawn_from != (self.n_images, count):  # most steps draw from what the one before drew from
            self.window[0].fill_(self.n_images - count)  # a launch each: nothing is copied from the host
            self.window[1].fill_(count)
            self.drawn_from = self.n_images, count

    def draw(self, n):
        """n images drawn with replacement, (n, C, H, W) fp32 in the network's normalised units."""
        draws = torch.rand(n, dtype=torch.double, device=self.window.device)  # fp32 could round up to 1 image too far
        x = self.images[(self.window[0] + draws * self.window[1]).long()]
        return torch.lerp(self.low, self.high, x.float() / 255)
