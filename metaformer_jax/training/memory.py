"""The memory that a compiled step takes on a device, and the largest batch that fits."""

import dataclasses
from collections.abc import Callable

import jax

# The batch found is smaller than the smallest that was tried in vain by at most this part of it.
_PRECISION = 0.03


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
    repeated halves that fits, and half of that. The batch found is itself compiled: far from both
    batches the line is off by a few per cent, and then smaller ones are tried.

    Args:
        needed: bytes for a batch; None if the compiler refused it.
        batch: where the search starts.
        unit: the answer is a multiple of this.
        limit: bytes.
        most: no larger batch is asked for.

    Returns:
        The batch; 0 if none fits; None if no two batches that the compiler takes could be found.
    """
    upper, need = batch, needed(batch)
    while need is None:
        upper = upper // 2 // unit * unit
        if upper == 0:
            return None
        need = needed(upper)
    fits = upper if need <= limit else 0
    other = upper // 2 // unit * unit or 2 * upper
    if other > most:
        return None
    other_need = needed(other)
    if other_need is None:
        # There is none between a single unit and its double, which the compiler refuses.
        return fits if other > upper else None
    if other_need <= limit:
        fits = max(fits, other)
    slope = max((other_need - need) / (other - upper), 1)
    tried = min(int(upper + (limit - need) / slope), most) // unit * unit
    return _search_from(tried, needed, fits=fits, unit=unit, limit=limit)


def _search_from(
    tried: int, needed: Callable[[int], int | None], *, fits: int, unit: int, limit: int
) -> int:
    """The largest batch up to `tried` that fits, when `fits` is known to."""
    refused, reduction = None, _PRECISION
    while tried > fits:
        need = needed(tried)
        if need is None or need > limit:
            refused = tried
        elif refused is None or refused - tried <= _PRECISION * refused:
            return tried
        else:
            fits, reduction = tried, 1.0
        # First a little less, then ever more; once one fits, those between.
        reduced = int((1 - reduction) * refused)
        tried = max(reduced, (fits + refused) // 2) // unit * unit
        reduction = min(2 * reduction, 1.0)
    return fits
