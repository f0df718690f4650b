"""Which part of a tensor a rank has: device matrix, tensor map and the split of the parallel optimizer.

The terms are those of MindSpore's parallel layouts: the ranks of a stage form an array of shape `device_matrix`, in C
order; a tensor map lists the axes that split each dimension of a tensor, counted from the right. The parallel optimizer
splits dimension 0 again between ranks that would have the same part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Shape = tuple[int, ...]
Region = tuple[slice, ...]
_MOST_AXES, _MOST_RANKS = 32, np.iinfo(np.int64).max  # of an array of NumPy


class LayoutError(ValueError):
    """A layout is inconsistent, or a tensor does not fit it; the message has no file and no name."""


@dataclass(frozen=True)
class Layout:
    """How one tensor is split over the ranks of one pipeline stage.

    Attributes:
        device_matrix: shape of the array of ranks.
        tensor_map: per dimension of the tensor the axes that split it, slowest first, as indices into
            `device_matrix`; an empty tuple if the dimension is whole.
        optimizer_pieces: further pieces of dimension 0, 1 without parallel optimizer.
        full_shape: shape of the whole tensor, if the strategy file has it.

    Raises LayoutError if an axis does not exist or splits twice, or the optimizer's pieces do not fit the ranks.
    """

    device_matrix: Shape
    tensor_map: tuple[tuple[int, ...], ...]
    optimizer_pieces: int = 1
    full_shape: Shape | None = None

    def __post_init__(self) -> None:
        used = [axis for axes in self.tensor_map for axis in axes]
        if any(size < 1 for size in self.device_matrix):
            raise LayoutError(f"device matrix {list(self.device_matrix)} has an empty axis")
        if len(self.device_matrix) > _MOST_AXES or self.devices > _MOST_RANKS:
            raise LayoutError(f"{len(self.device_matrix)} axes with {self.devices} ranks are too many")
        if any(not 0 <= axis < len(self.device_matrix) for axis in used):
            raise LayoutError(f"tensor map names an axis that device matrix {list(self.device_matrix)} lacks")
        if len(set(used)) != len(used):
            raise LayoutError("tensor map uses one axis of the device matrix twice")
        if self.optimizer_pieces > 1 and not self.tensor_map:
            raise LayoutError("the parallel optimizer cannot split a scalar")
        copies = math.prod(self.device_matrix[axis] for axis in self.repeated_axes)
        if self.optimizer_pieces < 1 or copies % self.optimizer_pieces:
            raise LayoutError(
                f"{copies} ranks have the same part; the parallel optimizer cannot split it in {self.optimizer_pieces}"
            )

    @property
    def devices(self) -> int:
        """Number of ranks."""
        return math.prod(self.device_matrix)

    @property
    def repeated_axes(self) -> tuple[int, ...]:
        """Axes along which ranks have the same part, except for the split of the optimizer."""
        used = {axis for axes in self.tensor_map for axis in axes}
        return tuple(axis for axis, size in enumerate(self.device_matrix) if axis not in used and size > 1)

    @property
    def pieces(self) -> Shape:
        """Number of parts in each dimension, including those of the optimizer."""
        counts = [math.prod(self.device_matrix[axis] for axis in axes) for axes in self.tensor_map]
        if counts:
            counts[0] *= self.optimizer_pieces
        return tuple(counts)

    def position(self, rank: int) -> Shape:
        """Index of the part of a rank (counted within its stage) in each dimension."""
        coordinates = [int(place) for place in np.unravel_index(rank % self.devices, self.device_matrix)]
        numbers = [self._number(axes, coordinates) for axes in self.tensor_map]
        if numbers:
            copy = self._number(self.repeated_axes, coordinates)
            numbers[0] = numbers[0] * self.optimizer_pieces + copy % self.optimizer_pieces
        return tuple(numbers)

    def neighbours(self) -> dict[str, list[int]]:
        """Description of each split -> the ranks (counted within the stage) whose parts differ from that of rank 0 in
        this split alone."""
        matrix, ranks = list(self.device_matrix), np.arange(self.devices).reshape(self.device_matrix)
        found = {}
        for axis in (axis for axes in self.tensor_map for axis in axes if matrix[axis] > 1):
            line = ranks.swapaxes(0, axis).reshape(matrix[axis], -1)[1:, 0]
            found[f"along axis {axis} of {matrix}"] = line.tolist()
        if self.optimizer_pieces > 1:
            split = {axis for axes in self.tensor_map for axis in axes}
            copies = ranks[tuple(0 if axis in split else slice(None) for axis in range(len(matrix)))]
            found[f"by the parallel optimizer on {matrix}"] = copies.reshape(-1)[1 : self.optimizer_pieces].tolist()
        return found

    def whole_shape(self, part: Shape) -> Shape:
        """Shape of the whole tensor, from that of a part; LayoutError if it differs from the strategy."""
        self._check_dimensions(part)
        whole = tuple(size * count for size, count in zip(part, self.pieces))
        if self.full_shape is not None and self.full_shape != whole:
            raise LayoutError(f"all parts together are {list(whole)}, the strategy has {list(self.full_shape)}")
        return whole

    def part_shape(self, whole: Shape) -> Shape:
        """Shape of a part of a tensor; LayoutError if a dimension is not divisible by its parts."""
        self._check_dimensions(whole)
        for dimension, (size, count) in enumerate(zip(whole, self.pieces)):
            if size % count:
                raise LayoutError(f"dimension {dimension} of {list(whole)} is {size}, not divisible by {count} parts")
        return tuple(size // count for size, count in zip(whole, self.pieces))

    def region(self, whole: Shape, rank: int) -> Region:
        """The part of a rank (counted within its stage) in the whole tensor, as slices of every dimension."""
        sizes = self.part_shape(whole)
        return tuple(slice(number * size, (number + 1) * size) for number, size in zip(self.position(rank), sizes))

    def _number(self, axes: tuple[int, ...], coordinates: Sequence[int]) -> int:
        number = 0
        for axis in axes:
            number = number * self.device_matrix[axis] + coordinates[axis]
        return number

    def _check_dimensions(self, shape: Shape) -> None:
        if len(shape) != len(self.tensor_map):
            raise LayoutError(
                f"shape {list(shape)} has {len(shape)} dimensions, the strategy splits {len(self.tensor_map)}"
            )
