"""Reading XLA's text of a compiled program: its computations, how often each runs, in what memory its arrays lie.

XLA's own cost analysis counts the body of a loop once, and the text has no more to say on TPUs: how often a loop runs
is read here from its condition, which compares a counter with a bound, both carried in the loop's tuple. What depends
on data (how many tokens a mask leaves, when the last row ends) is not in the program; the caller is asked for it.

The text is that of `compiled.as_text()`, or a file of `--xla_dump_to` with `--xla_dump_hlo_as_text`. Its grammar:
https://openxla.org/xla/operation_semantics and https://openxla.org/xla/hlo_dumps
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator

BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16, "c64": 64, "c128": 128}


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array of a program on one device."""

    dtype: str
    dims: tuple[int, ...]
    memory: int = 0  # 0: the device's main memory; 1: a TPU's vector memory; 5: the host's; others: small

    @property
    def size(self) -> int:
        """How many numbers."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Its bytes, without the padding of a layout."""
        found = re.search(r"\d+", self.dtype)
        bits = BITS[self.dtype] if self.dtype in BITS else int(found.group()) if found else 0
        return self.size * bits // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    op: str
    text: str  # of its shape
    operands: tuple[str, ...]
    line: str  # all of it
    root: bool

    @functools.cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """What it gives: one array, or those of a tuple."""
        return tuple(_shapes(self.text))

    @property
    def bytes(self) -> int:
        """Of all that it gives."""
        return sum(shape.bytes for shape in self.shapes)

    def attribute(self, name: str) -> str | None:
        """The value of `name=`, without its per cent sign; braces with all that is in them."""
        found = re.search(rf"[ ,]{name}=(\{{[^}}]*\}}|[^,\s]+)", self.line)
        return found.group(1).lstrip("%") if found else None

    @property
    def called(self) -> tuple[str, ...]:
        """The computations that it runs as part of itself or, for a loop, again and again."""
        names = [self.attribute(key) for key in ("calls", "body", "condition", "true_computation", "false_computation")]
        if self.op in ("call", "async-start"):
            names.append(self.attribute("to_apply") or self.attribute("called_computation"))
        branches = re.findall(r"%([\w.\-]+)", self.attribute("branch_computations") or "")
        return tuple(dict.fromkeys([name for name in names if name] + branches))


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in order."""

    name: str
    instructions: dict[str, Instruction]

    @property
    def root(self) -> Instruction:
        """What it gives."""
        return next(x for x in self.instructions.values() if x.root)

    @functools.cached_property
    def parameters(self) -> tuple[Instruction, ...]:
        """What it is given, in order."""
        found = [x for x in self.instructions.values() if x.op == "parameter"]
        return tuple(sorted(found, key=lambda x: int(_inside(x.line, " parameter("))))

    def inputs(self, instruction: Instruction) -> list[Instruction]:
        """What an instruction reads."""
        return [self.instructions[name] for name in instruction.operands if name in self.instructions]


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program."""

    computations: dict[str, Computation]
    entry: str
    frames: dict[int, tuple[str, ...]]  # source files of a stack frame, innermost first

    def files(self, instruction: Instruction) -> tuple[str, ...]:
        """The source files whose lines made an instruction, innermost first; none where the text does not say."""
        found = re.search(r"stack_frame_id=(\d+)", instruction.line)
        if found:
            return self.frames.get(int(found.group(1)), ())
        return tuple(re.findall(r'source_file="([^"]*)"', instruction.line))


Unknown = Callable[[Module, Instruction], float]  # how often a loop runs whose bound the program does not hold


def parse(text: str) -> Module:
    """The computations of a program's text.

    Raises:
      ValueError: for a text without an entry computation.
    """
    computations, entry, name, lines = {}, None, None, {}
    for line in re.sub(r"\n(?=\"|\}\})", " ", text).splitlines():  # a kernel's own attributes go over several lines
        head = re.match(r"(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .* )?\{$", line)
        if head and not line.startswith("HloModule"):
            name, lines = head.group(2), {}
            entry = name if head.group(1) else entry
        elif re.match(r"\}($|, execution_thread)", line) and name is not None:
            computations[name], name = Computation(name, lines), None
        elif name is not None and (instruction := _instruction(line)):
            lines[instruction.name] = instruction
    if entry is None:
        raise ValueError(f"hlo.parse: a text of {len(text)} characters without an ENTRY computation")
    return Module(computations, entry, _frames(text))


def executions(module: Module, unknown: Unknown) -> dict[str, float]:
    """How often each computation runs; fused ones with what fuses them, branches as if each were always taken."""
    counts: dict[str, float] = {module.entry: 1.0}
    for computation in reversed(_callees_first(module)):  # callers before what they call
        for instruction in computation.instructions.values():
            times = 1.0
            if instruction.op == "while":
                times = trips(module, computation, instruction, unknown)
            for name in instruction.called:
                counts[name] = counts.get(name, 0.0) + counts.get(computation.name, 0.0) * times
    return counts


def fused(module: Module) -> set[str]:
    """Computations that are one kernel with others: their inner arrays are in no memory."""
    called = (x.called for c in module.computations.values() for x in c.instructions.values() if x.op == "fusion")
    return {name for names in called for name in names}


def trips(module: Module, computation: Computation, loop: Instruction, unknown: Unknown) -> float:
    """How often the body of a loop runs: as the text says it, as its condition does, or as the caller knows."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.line)
    if known:
        return float(known.group(1))
    bounds = _bounds(module, computation, loop)
    rounds = (math.ceil((stop - start) / step) for _, start, stop, step in bounds)
    return max(0.0, min(rounds)) if bounds else unknown(module, loop)


def _bounds(module: Module, computation: Computation, loop: Instruction) -> list[tuple[int, float, float, float]]:
    """(place of the counter, its first value, bound, step) of every comparison that ends a loop which counts."""
    condition = module.computations[loop.attribute("condition") or ""]
    body = module.computations[loop.attribute("body") or ""]
    found = []
    for compared in _comparisons(module, condition, condition.root):
        where, (left, right) = compared
        place = _carried(where, left)
        if place is None or (step := _step(module, body, place)) is None:
            continue
        start = _initial(module, computation, loop, place)
        bound = _number(where, right)
        if bound is None and (other := _carried(where, right)) is not None and _kept(body, other):
            bound = _initial(module, computation, loop, other)
        if start is not None and bound is not None:
            found.append((place, start, bound, step))
    return found


def _comparisons(module: Module, where: Computation, x: Instruction) -> Iterator[tuple[Computation, list[Instruction]]]:
    """The `a < b` that must all hold."""
    if x.op == "fusion":
        inner = module.computations[x.called[0]]
        if len(where.parameters) == 1 and all(_carried(where, y) is None for y in where.inputs(x)):
            yield from _comparisons(module, inner, inner.root)
    elif x.op == "and":
        for y in where.inputs(x):
            yield from _comparisons(module, where, y)
    elif x.op in ("bitcast", "copy"):
        yield from _comparisons(module, where, where.inputs(x)[0])
    elif x.op == "compare" and x.attribute("direction") in ("LT", "GT"):
        sides = where.inputs(x)
        yield where, sides if x.attribute("direction") == "LT" else sides[::-1]


def _carried(where: Computation, x: Instruction) -> int | None:
    """Which part of the loop's tuple an instruction takes, if that is all it does."""
    while x.op in ("bitcast", "copy", "convert", "reshape") and where.inputs(x):
        x = where.inputs(x)[0]
    if x.op == "get-tuple-element" and where.inputs(x)[0].op == "parameter":
        return int(x.attribute("index") or 0)
    return None


def _number(where: Computation, x: Instruction) -> float | None:
    while x.op in ("bitcast", "copy", "convert", "reshape") and where.inputs(x):
        x = where.inputs(x)[0]
    if x.op == "constant" and re.fullmatch(r"-?\d+", value := _inside(x.line, " constant(")):
        return float(value)
    return None


def _initial(module: Module, computation: Computation, loop: Instruction, place: int) -> float | None:
    """A part of a loop's tuple before its first round: a number, or where another loop's counter ended."""
    start = computation.inputs(loop)[0]
    if start.op != "tuple":
        return None
    x = computation.instructions[start.operands[place]]
    if (value := _number(computation, x)) is not None:
        return value
    if x.op == "get-tuple-element" and (before := computation.inputs(x)[0]).op == "while":
        other = int(x.attribute("index") or 0)
        stops = [stop for at, _, stop, _ in _bounds(module, computation, before) if at == other]
        return min(stops) if stops else None
    return None


def _step(module: Module, body: Computation, place: int) -> float | None:
    """The number above 0 that a loop's body adds to a part of its tuple; a fused addition is taken for that."""
    if body.root.op != "tuple":
        return None
    x = body.instructions[body.root.operands[place]]
    while x.op in ("bitcast", "copy") and body.inputs(x):
        x = body.inputs(x)[0]
    if x.op == "fusion":
        inner = module.computations[x.called[0]]
        x, body = inner.root, inner
    numbers = [_number(body, y) for y in body.inputs(x)] if x.op == "add" else []
    return next((number for number in numbers if number is not None and number > 0), None)


def _kept(body: Computation, place: int) -> bool:
    return body.root.op == "tuple" and _carried(body, body.instructions[body.root.operands[place]]) == place


def _callees_first(module: Module) -> list[Computation]:
    order: dict[str, Computation] = {}

    def visit(name: str) -> None:
        if name in order or name not in module.computations:
            return
        for instruction in module.computations[name].instructions.values():
            for other in instruction.called:
                visit(other)
        order[name] = module.computations[name]

    visit(module.entry)
    return list(order.values())


def _instruction(line: str) -> Instruction | None:
    found = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if not found:
        return None
    rest = line[found.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    op = re.match(r"\s*([\w\-]+)\(", rest[end:])
    if not op:
        return None
    first = end + op.end() - 1
    inside = re.sub(r"/\*.*?\*/", "", rest[first + 1 : _closing(rest, first)])
    # older texts repeat the shape before each operand's name
    names = tuple(re.findall(r"%([\w.\-]+)", inside)) or tuple(re.findall(r"(?:^|[ ,])([A-Za-z_][\w.\-]*)", inside))
    return Instruction(found.group(2), op.group(1), rest[:end], names, line, bool(found.group(1)))


def _closing(text: str, start: int) -> int:
    """Where the bracket at `start` is closed."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match.group() == "(" else -1
        if not depth:
            return match.start()
    return len(text)


def _inside(line: str, before: str) -> str:
    start = line.index(before) + len(before)
    return line[start : line.index(")", start)]


def _shapes(text: str) -> Iterator[Shape]:
    for dtype, dims, layout in re.findall(r"\b([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?", text):
        memory = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(size.lstrip("<=")) for size in dims.split(",") if size)
        yield Shape(dtype, sizes, int(memory.group(1)) if memory else 0)


def _frames(text: str) -> dict[int, tuple[str, ...]]:
    """The stack frames of a text's head: the files of each and of what called it."""
    tables: dict[str, dict[int, str]] = {}
    for title, block in re.findall(r"^(FileNames|FileLocations|StackFrames)\n((?:\d+ .*\n)+)", text, re.MULTILINE):
        tables[title] = {int(line.split(" ", 1)[0]): line.split(" ", 1)[1] for line in block.splitlines()}
    if len(tables) < 3:
        return {}

    def field(line: str, name: str) -> int:
        found = re.search(rf"\b{name}=(\d+)", line)
        return int(found.group(1)) if found else 0

    frames: dict[int, tuple[str, ...]] = {}
    for frame, line in sorted(tables["StackFrames"].items()):
        location = tables["FileLocations"][field(line, "file_location_id")]
        file = tables["FileNames"][field(location, "file_name_id")].strip('"')
        parent = field(line, "parent_frame_id") - 1  # 0 is none: they are counted from one, and one ahead
        frames[frame] = (file, *frames.get(parent, ()))
    return frames
