"""Reads communication and the compiler's estimate of cycles from a compiled program's text."""

import dataclasses
import math
import re

_COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*->.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
# What the kernels of `models` say of themselves. Copies of their results repeat it.
_KERNEL_CYCLES = re.compile(r'"kernel_cycles":"(\d+)"')
_OF_KERNELS = re.compile(r"kernel_metadata=\{[^}]*\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_GROUPS = re.compile(r"replica_groups=(\{\{[\d,]*\}|\[\d+,\d+\])")
# The same by the axes of a mesh along which a group lies, or parts of them: "{'x','y':(1)2}".
_GROUPS_OF_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One operation that communicates between devices.

    Attributes:
        kind: "all-reduce", "all-gather", ...
        num_bytes: of a device's input or output, whichever is larger.
        group_size: number of devices that communicate with each other.
        times: how often a step runs it.
        op_name: its origin in the traced program.
    """

    kind: str
    num_bytes: int
    group_size: int
    times: int
    op_name: str

    @property
    def sent_bytes(self) -> float:
        """The bytes that a device sends, at least, over all `times`."""
        if self.kind == "collective-permute":
            return float(self.num_bytes * self.times)
        passes = 2 if self.kind == "all-reduce" else 1
        return passes * self.num_bytes * (self.group_size - 1) / self.group_size * self.times


@dataclasses.dataclass(frozen=True)
class Program:
    """The figures in the text of a compiled program.

    Attributes:
        cycles: the compiler's estimate for all fusions together, and the estimates that kernels
            bring along, counted as often as their loops run; None if the compiler gives no
            estimates, like those for CPUs and GPUs.
        kernel_cycles: those of the kernels.
        collectives: the communication between devices.
        num_unknown_loops: loops with an unknown number of iterations, which count as one.
    """

    cycles: int | None
    kernel_cycles: int
    collectives: tuple[Collective, ...]
    num_unknown_loops: int


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    arguments: str
    rest: str

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.arguments)

    def named(self, attribute: str) -> list[str]:
        match = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.rest)
        return re.findall(r"[\w.\-]+", match[1]) if match else []


def read_program(text: str, *, num_devices: int = 1) -> Program:
    """Reads the text of a compiled program (`jax.stages.Compiled.as_text()`).

    Args:
        text: of the optimised HLO module.
        num_devices: on which the program runs; a collective without groups is among all of them.

    Raises:
        ValueError: it is not the text of an HLO module.
    """
    computations, entry = _computations(text)
    all_cycles: list[int] = []
    collectives: list[Collective] = []
    unknown: set[str] = set()
    kernel_cycles = 0

    def run(computation: str, times: int) -> None:
        nonlocal kernel_cycles
        instructions = computations[computation]
        num_bytes = {one.name: _num_bytes(one.shape) for one in instructions}
        for one in instructions:
            if cycles := _own_cycles(one):
                all_cycles.append(cycles * times)
                kernel_cycles += cycles * times if one.opcode == "custom-call" else 0
            if (collective := _collective(one, num_bytes, num_devices, times)) is not None:
                collectives.append(collective)
            if one.opcode == "while":
                rounds = _rounds(one, instructions, computations)
                if rounds is None:
                    unknown.add(one.name)
                for part in one.named("body") + one.named("condition"):
                    run(part, times * (1 if rounds is None else rounds))
            elif one.opcode == "conditional":
                # One branch runs: the estimate assumes the longest.
                branches = one.named("branch_computations") or (
                    one.named("true_computation") + one.named("false_computation")
                )
                run(
                    max(branches, key=lambda name: sum(map(_own_cycles, computations[name]))), times
                )
            elif one.opcode in ("call", "async-start"):
                for part in one.named("to_apply") + one.named("calls"):
                    run(part, times)

    run(entry, 1)
    return Program(
        cycles=sum(all_cycles) if all_cycles else None,
        kernel_cycles=kernel_cycles,
        collectives=tuple(collectives),
        num_unknown_loops=len(unknown),
    )


def _computations(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    computations: dict[str, list[_Instruction]] = {}
    entry = ""
    current: list[_Instruction] = []
    # What a kernel says of itself is printed in several lines, all else of an instruction in one.
    text = _OF_KERNELS.sub(lambda match: match[0].replace("\n", ""), text)
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations[header[2]] = []
            entry = header[2] if header[1] else entry
        elif instruction := _INSTRUCTION.match(line):
            current.append(_parsed(instruction[1], instruction[2]))
    if not entry:
        raise ValueError(
            "`text` must be that of a compiled HLO module, which has an ENTRY, got "
            f"{text[:40]!r}. Use `compiled.as_text()`."
        )
    return computations, entry


def _parsed(name: str, text: str) -> _Instruction:
    # A shape is that of an array, without spaces, or a tuple in parentheses, which may have spaces.
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    shape, text = text[:end], text[end:].lstrip()
    opcode, _, _ = text.partition("(")
    end = _closing(text, len(opcode))
    return _Instruction(name, shape, opcode.strip(), text[len(opcode) + 1 : end], text[end + 1 :])


def _closing(text: str, start: int) -> int:
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    return len(text)


def _rounds(
    loop: _Instruction,
    around: list[_Instruction],
    computations: dict[str, list[_Instruction]],
) -> int | None:
    """The iterations of a loop that counts by one between two constants; None for other loops."""
    if known := _TRIPS.search(loop.rest):
        return int(known[1])
    condition = {one.name: one for one in computations[loop.named("condition")[0]]}
    root = list(condition.values())[-1]
    if root.opcode != "compare" or "direction=LT" not in root.rest:
        return None
    counter, end = (condition.get(name) for name in root.operands)
    if counter is None or end is None or counter.opcode != "get-tuple-element":
        return None
    index = re.search(r"index=(\d+)", counter.rest)
    names = {one.name: one for one in around}
    start = names.get(loop.operands[0])
    while start is not None and start.opcode != "constant":
        if start.opcode == "tuple" and index is not None:
            start = names.get(start.operands[int(index[1])])
        elif start.opcode in ("copy", "bitcast"):
            start = names.get(start.operands[0])
        else:
            return None
    values = [_whole_number(one) for one in (start, end)]
    if values[0] is None or values[1] is None:
        return None
    return max(0, values[1] - values[0])


def _whole_number(constant: _Instruction | None) -> int | None:
    is_whole = constant is not None and re.fullmatch(r"-?\d+", constant.arguments)
    return int(constant.arguments) if constant is not None and is_whole else None


def _own_cycles(instruction: _Instruction) -> int:
    """The cycles of an instruction, without those of the computations that it calls."""
    pattern = _KERNEL_CYCLES if instruction.opcode == "custom-call" else _CYCLES
    match = pattern.search(instruction.rest)
    return int(match[1]) if match else 0


def _op_name(instruction: _Instruction) -> str:
    match = _OP_NAME.search(instruction.rest)
    return match[1] if match else instruction.opcode


def _collective(
    instruction: _Instruction, num_bytes: dict[str, int], num_devices: int, times: int
) -> Collective | None:
    kind = instruction.opcode.removesuffix("-start")
    if kind not in _COLLECTIVES:
        return None
    taken = sum(num_bytes.get(operand, 0) for operand in instruction.operands)
    given = num_bytes[instruction.name]
    # The "-start" operation of all kinds but one returns its input beside its output.
    if instruction.opcode != kind and kind != "all-reduce":
        given -= taken
    group_size = _group_size(instruction.rest, num_devices)
    return Collective(kind, max(taken, given), group_size, times, _op_name(instruction))


def _group_size(rest: str, num_devices: int) -> int:
    if of_mesh := _GROUPS_OF_MESH.search(rest):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", of_mesh[1]))
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", of_mesh[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    groups = _GROUPS.search(rest)
    numbers = re.findall(r"\d+", groups[1]) if groups else []
    if not groups or not numbers:
        return num_devices
    return int(numbers[1]) if groups[1].startswith("[") else len(numbers)


def _num_bytes(shape: str) -> int:
    total = 0
    for dtype, sizes in _ARRAY.findall(shape):
        # "bf16", "f8e4m3fn", "s32": the first number is the number of bits.
        bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
        count = math.prod(int(size) for size in sizes.split(",") if size)
        total += math.ceil(count * bits / 8)
    return total
