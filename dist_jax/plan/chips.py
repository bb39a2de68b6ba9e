"""What a chip can do. One device of a topology is one chip."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of one TPU chip.

    Attributes:
      name: the part of a topology name before the colon.
      peak_flops: bfloat16 floating-point operations a second.
      clock: cycles a second; published peak over operations of the matrix units in a cycle.
      hbm_bytes: what the compiler lets a program use, from its own out-of-memory message.
      hbm_bytes_per_second: bandwidth of the memory.
      ici_bytes_per_second: bandwidth of all links between chips, one direction.
      dimensions: of a slice: 3 for a torus, 2 for a grid.
      host_bounds: chips of one host along each dimension.
      config_name: how the two cores of a chip are joined into one device, if they have to be.
    """

    name: str
    peak_flops: float
    clock: float
    hbm_bytes: float
    hbm_bytes_per_second: float
    ici_bytes_per_second: float
    dimensions: int
    host_bounds: tuple[int, int, int]
    config_name: str = ''


# Source: Cloud TPU's system architecture pages, and the table of jax's Pallas (peak, bandwidth).
# Clock: peak_flops / (matrix units x side x side x 2): 8 of 128 (v4, v5p), 4 of 128 (v5e) and
# what amounts to 4 of 256 (v6e). A plain 8192^3 bfloat16 product then takes 93 % of the peak on v4,
# 88 % on v5e, 90 % on v5p and 70 % on v6e by the compiler's cycles (libtpu 0.0.51).
CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip('v4', 275e12, 1.05e9, 30.75 * 2**30, 1.228e12, 300e9, 3, (2, 2, 1), 'megacore'),
        Chip('v5e', 197e12, 1.5e9, 15.75 * 2**30, 0.819e12, 200e9, 2, (2, 2, 1)),
        Chip('v5p', 459e12, 1.75e9, 95.7 * 2**30, 2.765e12, 600e9, 3, (2, 2, 1)),
        Chip('v6e', 918e12, 1.75e9, 31.2 * 2**30, 1.64e12, 448e9, 2, (2, 2, 1)),
    )
}
