"""bfloat16, a type that numpy has not: the upper half of a float32."""

import numpy as np

# Of an array that holds bfloat16 numbers; it cannot be taken for one of integers.
BFLOAT16 = np.dtype([("bfloat16", "<u2")])


def to_bfloat16(values):
    """Floating-point array -> BFLOAT16 array of the same shape, rounded to nearest, ties to even; NaN stays NaN."""
    shape = np.shape(values)
    values = np.ascontiguousarray(values, np.float32)  # of one dimension at least
    bits = values.view(np.uint32)
    rounded = np.where(np.isnan(values), bits | 0x400000, bits + (0x7FFF + (bits >> 16 & 1)))
    return (rounded >> 16).astype(np.uint16).view(BFLOAT16).reshape(shape)


def from_bfloat16(array):
    """BFLOAT16 array, or its bits in a 16-bit integer type -> float32, exactly."""
    wide = np.ascontiguousarray(array).view(np.uint16).astype(np.uint32) << 16
    return wide.view(np.float32).reshape(np.shape(array))
