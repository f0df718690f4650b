"""Dropout whose mask is a function of a seed: a resumed run repeats it without saved state."""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

# Multipliers of a 32-bit integer hash with little bias (C. Wellons, "Prospecting for hash functions", 2018).
_FIRST, _SECOND = (np.array([0x7FEB352D, 0x846CA68B], np.uint32).view(np.int32)).tolist()
# 2^32 divided by the golden ratio, odd: spreads neighbouring places over all integers before they are mixed.
_STRIDE = int(np.array([0x9E3779B9], np.uint32).view(np.int32)[0])


class SeededDropout(nn.Cell):
    """Zeroes elements with probability p and scales the others by 1 / (1 - p).

    Whether an element stays depends only on the seed of its row, on `stream` and on its place in the row, not on the
    batch or the number of devices. After the counter-based generators of Salmon et al. 2011, "Parallel random numbers:
    as easy as 1, 2, 3".

    Args:
        p: probability of zero, in (0, 1).
        stream: number of this dropout in its network, so that no two dropouts have equal masks.
    """

    def __init__(self, p: float, stream: int) -> None:
        super().__init__()
        self.p, self.stream = p, stream
        self.scale = 1.0 / (1.0 - p)
        self.threshold = round(p * 2.0**32) - 2**31  # of 32 random bits, read as int32
        self.offset = int(np.array([stream * 0x85EBCA6B % 2**32], np.uint32).view(np.int32)[0])
        self.xor, self.bits, self.shift = ops.BitwiseXor(), ops.BitwiseAnd(), ops.RightShift()
        self.add_stream, self.add_place, self.mul = ops.Add(), ops.Add(), ops.Mul()
        self.keep, self.apply, self.rescale = ops.GreaterEqual(), ops.Mul(), ops.Mul()
        self.cast, self.reshape = ops.Cast(), ops.Reshape()

    def fold(self, h: Tensor, distance: int) -> Tensor:
        """h ^ (h >> distance) with zeros shifted in: int32 shifts copy the sign."""
        moved = self.bits(self.shift(h, Tensor(distance, ms.int32)), (1 << (32 - distance)) - 1)
        return self.xor(h, moved)

    def mix(self, h: Tensor) -> Tensor:
        """Scatters int32 values evenly over all int32 values."""
        h = self.mul(self.fold(h, 16), _FIRST)
        h = self.mul(self.fold(h, 15), _SECOND)
        return self.fold(h, 16)

    def construct(self, x: Tensor, seeds: Tensor) -> Tensor:
        """x [B, ...] of at least two axes, seeds int32 [B] -> [B, ...], type of x."""
        shape = ops.shape(x)
        h = self.add_stream(self.reshape(seeds, (shape[0],) + (1,) * (len(shape) - 1)), self.offset)
        h = self.mix(h)
        for axis in range(1, len(shape)):
            # One axis at a time: the places along it are a short constant, and the hash grows by broadcasting.
            places = np.arange(1, shape[axis] + 1, dtype=np.int64) * _STRIDE
            tail = (1,) * (len(shape) - 1 - axis)
            places = Tensor(places.astype(np.int32).reshape((1,) * axis + (shape[axis],) + tail))
            h = self.mix(self.add_place(h, places))
        keep = self.keep(h, self.threshold)
        return self.rescale(self.apply(x, self.cast(keep, x.dtype)), self.cast(self.scale, x.dtype))
