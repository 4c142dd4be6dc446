"""The memory that a compiled step takes on a device, and the largest batch that it has room for."""

import dataclasses
from collections.abc import Callable

import jax

# Of a batch that does not fit, what is tried next.
_LESS = 0.97


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device.

    Attributes:
        arguments: state and batch.
        outputs: state and metrics, of which `aliased` lie where arguments were.
        temporaries: activations, gradients and what else lives within the step.
        code: the program itself.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int

    @property
    def total(self) -> int:
        """All of it; what is aliased counts once."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


def memory_of(compiled: jax.stages.Compiled) -> Memory | None:
    """What the compiler planned; None where it does not tell."""
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
    needed: Callable[[int], int | None], batch: int, *, unit: int, limit: int
) -> int | None:
    """The largest batch per device, a multiple of `unit`, whose need stays within `limit`.

    Where to look is told by a line through two batches that were compiled: this one, or the largest
    of its halves that fits, and half of that. What is found there is compiled as well, and as long
    as it does not fit, a little less: far from both, the line is off by some per cent.

    Args:
        needed: bytes for a batch; None where the compiler refused it.
        batch: where the search starts.
        unit: of the answer.
        limit: bytes.

    Returns:
        The batch; 0 where none fits; None where two that fit could not be had.
    """
    upper, need = batch, needed(batch)
    while need is None:
        upper = upper // 2 // unit * unit
        if upper == 0:
            return None
        need = needed(upper)
    other = upper // 2 // unit * unit or 2 * upper
    other_need = needed(other)
    if other_need is None:
        return None
    slope = max((other_need - need) / (other - upper), 1)
    largest = int(upper + (limit - need) / slope) // unit * unit
    while largest > 0:
        need = needed(largest)
        if need is not None and need <= limit:
            return largest
        largest = int(_LESS * largest) // unit * unit
    return 0
