"""The memory that a compiled step takes on a device, and the largest batch that fits."""

import dataclasses
from collections.abc import Callable

import jax

# If a batch does not fit, this fraction of it is tried next.
_LESS = 0.97


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device.

    Attributes:
        arguments: state and batch.
        outputs: state and metrics.
        aliased: outputs that reuse the memory of arguments.
        temporaries: activations, gradients and everything else that lives within the step.
        code: the program itself.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int

    @property
    def total(self) -> int:
        """All of it; aliased memory counts once."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


def memory_of(compiled: jax.stages.Compiled) -> Memory | None:
    """The memory that the compiler planned; None if it does not report it."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    return Memory(
        arguments=analysis.argument_size_in_bytes,
        outputs=analysis.output_size_in_bytes,
        aliased=analysis.alias_size_in_bytes,
        temporaries=analysis.temp_size_in_bytes,
        code=analysis.generated_code_size_in_bytes,
    )


def largest_that_fits(
    needed: Callable[[int], int | None], batch: int, *, unit: int, limit: int, most: int
) -> int | None:
    """The largest batch per device, a multiple of `unit`, that needs at most `limit` bytes.

    The memory is extrapolated linearly from two compiled batches: `batch`, or the first of its
    repeated halves that fits, and half of that. The batch found is itself compiled, and reduced a
    little as long as it does not fit: far from both batches the line is off by a few per cent.

    Args:
        needed: bytes for a batch; None if the compiler refused it.
        batch: where the search starts.
        unit: the answer is a multiple of this.
        limit: bytes.
        most: no larger batch is asked for.

    Returns:
        The batch; 0 if none fits; None if no two batches that fit could be found.
    """
    upper, need = batch, needed(batch)
    while need is None:
        upper = upper // 2 // unit * unit
        if upper == 0:
            return None
        need = needed(upper)
    other = upper // 2 // unit * unit or 2 * upper
    other_need = needed(other) if other <= most else None
    if other_need is None:
        return None
    slope = max((other_need - need) / (other - upper), 1)
    largest = min(int(upper + (limit - need) / slope), most) // unit * unit
    while largest > 0:
        need = needed(largest)
        if need is not None and need <= limit:
            return largest
        largest = int(_LESS * largest) // unit * unit
    return 0
