"""Reads what a compiled program sends between devices from its HLO text.

Compilers write one thing in several ways. A TPU's writes the reduce-scatter of a gradient as an
all-reduce whose users take a slice each, and on some topologies an all-gather as an all-reduce of
arrays that are zero but for one slice. It splits one asynchronous collective over several fusions,
which bear the same channel. Between slices it hands arrays to the hosts, by a send that names the
collective. What is read here is what happens: a kind by its purpose, once.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# What only hands a value on.
_PASS_ON = ("get-tuple-element", "bitcast", "copy", "copy-start", "copy-done", "convert", "reshape")
_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64}
_TRANSFER = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_CONSTANT = re.compile(r" constant\((\d+)\)")
_LINE = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z\-]*)\((.*)$")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One array that devices exchange.

    Attributes:
      kind: one of `KINDS`, by what it is for.
      written: the kind that the compiler wrote it as.
      shape: the whole array's on one device, after a gather or before a scatter.
      size: its bytes.
      group: partitions that exchange it, the first of all such groups.
      turns: how often a step does so.
      source: name of the operation that asked for it.
      between_slices: whether slices exchange it, by way of their hosts; `group` is then empty.
    """

    kind: str
    written: str
    shape: tuple[int, ...]
    size: int
    group: tuple[int, ...]
    turns: float
    source: str
    between_slices: bool = False


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    text: str

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """Names of the computations that it calls, branches and conditions apart."""
        return tuple(re.findall(r"(?:calls|body)=%?([\w.\-]+)", self.text))

    @functools.cached_property
    def branches(self) -> tuple[str, ...]:
        """Names of the branches of a conditional."""
        listed = re.search(r"branch_computations=\{([^}]*)\}", self.text)
        if listed:
            return tuple(name.strip().lstrip("%") for name in listed[1].split(","))
        return tuple(re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", self.text))


class Program:
    """The computations of a compiled program, by name."""

    def __init__(self, text: str, unknown_turns: float = 1.0):
        """Splits `Compiled.as_text()` into its computations.

        Args:
          text: the program.
          unknown_turns: turns of a loop whose number is known only when it runs.
        """
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        self._unknown_turns = float(unknown_turns)
        name = None
        for line in text.splitlines():
            head = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
            if head and not line.startswith(" "):
                name = head[2]
                self.computations[name] = []
                self.entry = name if head[1] else self.entry
            elif name and (found := _LINE.match(line)):
                operands = tuple(re.findall(r"%([\w.\-]+)", _until_closed(found[4])))
                self.computations[name].append(
                    Instruction(found[1], found[2], found[3], operands, line)
                )

    def branches(self) -> list[tuple[str, ...]]:
        """Returns the branch computations of every conditional with more than two of them."""
        every = itertools.chain.from_iterable(self.computations.values())
        return [line.branches for line in every if len(line.branches) > 2]

    def loops(self) -> list[str]:
        """Returns the bodies of all loops."""
        every = itertools.chain.from_iterable(self.computations.values())
        return [name for line in every if line.op == "while" for name in line.called]

    def turns(self, loop: Instruction) -> float:
        """Returns how often a loop's body runs, if it counts up from 0 to a constant."""
        known = re.search(r'known_trip_count.*?"n":"?(\d+)', loop.text)
        if known:
            return float(known[1])
        condition = re.search(r"condition=%?([\w.\-]+)", loop.text)[1]
        for line in self.computations[condition]:
            if line.op == "compare" and "direction=LT" in line.text:
                counter, bound = (self._origin(condition, operand) for operand in line.operands)
                constant = re.search(r"constant\((\d+)\)", bound.text)
                if constant and (index := re.search(r"index=(\d+)", counter.text)):
                    step = self._step(loop.called[0], int(index[1]))
                    return float(-(-int(constant[1]) // step))
        return self._unknown_turns

    def _origin(self, name: str, operand: str) -> Instruction:
        """Follows copies and conversions back to what they hand on."""
        line = self._lines[name][operand]
        while line.op in _PASS_ON and line.op != "get-tuple-element" and line.operands:
            line = self._lines[name][line.operands[0]]
        return line

    def _step(self, body: str, index: int) -> int:
        """Returns what a loop's body adds to its counter: more than 1 where it is unrolled."""
        root = next(line for line in self.computations[body] if "ROOT " in line.text)
        step, line = 0, self._origin(body, root.operands[index])
        while line.op == "add":
            ends = [self._origin(body, operand) for operand in line.operands]
            constants = [int(found[1]) for end in ends if (found := _CONSTANT.search(end.text))]
            if len(constants) != 1:
                break
            step += constants[0]
            line = next(end for end in ends if not _CONSTANT.search(end.text))
        return max(step, 1)

    def counts(self, name: str) -> Counter:
        """Counts the collectives of a computation by kind, as written, a loop as one turn."""
        found = Counter()
        for collective in self.collectives(name, once=True):
            found[collective.written] += 1
        return found

    def collectives(self, name: str | None = None, once: bool = False) -> list[Collective]:
        """Returns all collectives of a computation and of what it calls.

        Of a conditional's branches the one that moves most counts.

        Args:
          name: the computation; None takes the program's entry.
          once: counts every loop as one turn.
        """
        return list(self._collect(name or self.entry, 1.0, once).values())

    def _collect(self, name: str, turns: float, once: bool) -> dict[tuple, Collective]:
        found: dict[tuple, Collective] = {}
        for line in self.computations[name]:
            if line.branches:
                each = [self._collect(branch, turns, once) for branch in line.branches]
                found.update(max(each, key=lambda one: (_moved(one.values()), len(one))))
                continue
            for called in line.called:
                more = turns if once or line.op != "while" else turns * self.turns(line)
                found.update(self._collect(called, more, once))
            written = line.op.removesuffix("-start")
            transfer = _TRANSFER.search(line.text) if written == "send" else None
            if transfer:
                kind, shape = transfer[1].lower().replace("_", "-"), _arrays(line.shape)[0]
                found[f"{name} {line.name}", 0] = Collective(
                    kind, kind, _sizes(shape), _bytes(shape), (), turns, "", between_slices=True
                )
            elif written in KINDS:
                channel = re.search(r"channel_id=(\d+)", line.text)
                for number, collective in enumerate(self._read(name, line, written, turns)):
                    key = (channel[1] if channel else f"{name} {line.name}", number)
                    found.setdefault(key, collective)
        return found

    def _read(
        self, name: str, line: Instruction, written: str, turns: float
    ) -> Iterator[Collective]:
        shapes = _arrays(line.shape)
        if line.op.endswith("-start"):
            # Operands, results, and the compiler's own scalars.
            shapes = [max(shapes, key=_bytes)]
        source = re.search(r'op_name="([^"]*)"', line.text)
        for number, shape in enumerate(shapes):
            kind = written
            if written == "all-reduce":
                kind = self._purpose(name, line, number, len(shapes))
            yield Collective(
                kind, written, _sizes(shape), _bytes(shape), _first_group(line.text), turns,
                source[1] if source else "",
            )  # fmt: skip

    def _purpose(self, name: str, line: Instruction, number: int, count: int) -> str:
        """Tells the gathers and scatters among all-reduces, by the number of their array."""
        if self._makes(name, line.operands[number], "dynamic-update-slice"):
            return "all-gather"
        users = self._users[name].get(line.name, [])
        if count > 1:
            users = [
                after
                for user in users
                if user.op == "get-tuple-element" and f"index={number}" in user.text
                for after in self._users[name].get(user.name, [])
            ]
        return "reduce-scatter" if self._is_sliced(name, users) else "all-reduce"

    def _is_sliced(self, name: str, users: list[Instruction]) -> bool:
        """Whether some user takes only a slice."""
        for user in users:
            if user.op == "dynamic-slice":
                return True
            if user.op in _PASS_ON and self._is_sliced(name, self._users[name].get(user.name, [])):
                return True
            for called in user.called if user.op == "fusion" else ():
                if any(line.op == "dynamic-slice" for line in self.computations[called]):
                    return True
        return False

    def _makes(self, name: str, operand: str, op: str) -> bool:
        """Whether a value comes from such an operation, alone or in a fusion."""
        line = self._lines[name].get(operand)
        while line is not None and line.op in _PASS_ON and line.operands:
            line = self._lines[name].get(line.operands[0])
        if line is None:
            return False
        called = line.called if line.op == "fusion" else ()
        return line.op == op or any(
            inner.op == op for one in called for inner in self.computations[one]
        )

    @functools.cached_property
    def _lines(self) -> dict[str, dict[str, Instruction]]:
        return {
            name: {line.name: line for line in lines} for name, lines in self.computations.items()
        }

    @functools.cached_property
    def _users(self) -> dict[str, dict[str, list[Instruction]]]:
        users: dict[str, dict[str, list[Instruction]]] = {}
        for name, lines in self.computations.items():
            mine = users[name] = {}
            for line in lines:
                for operand in line.operands:
                    mine.setdefault(operand, []).append(line)
        return users


def _until_closed(text: str) -> str:
    """Returns what stands before the parenthesis that closes an open one."""
    depth = 1
    for position, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[:position]
    return text


def _arrays(shape: str) -> list[str]:
    return re.findall(r"[a-z]+\d*\w*\[[\d,]*\]", shape)


def _sizes(array: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", array[array.index("[") :])))


def _bytes(array: str) -> int:
    kind = re.match(r"\w+", array)[0]
    bits = _BITS.get(kind) or int(re.search(r"\d+", kind)[0])
    return math.prod(_sizes(array)) * bits // 8


def _moved(collectives) -> float:
    return sum((collective.size * collective.turns for collective in collectives), 0.0)


def _first_group(text: str) -> tuple[int, ...]:
    """Returns the partitions of a collective's first group, whatever way the groups are written."""
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*(\([\d,]*\))?\s*\{([^}]*)\}", text)
    if mesh:
        sizes = [int(size) for size in re.findall(r"=(\d+)", mesh[1])]
        names = re.findall(r"'(\w+)'=", mesh[1])
        chosen = re.findall(r"'(\w+)'", mesh[3])
        ranges = [
            range(size if name in chosen else 1) for name, size in zip(names, sizes, strict=True)
        ]
        strides = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
        return tuple(
            sum(i * stride for i, stride in zip(index, strides, strict=True))
            for index in itertools.product(*ranges)
        )
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if iota:
        groups, sizes = (tuple(map(int, iota[n].split(","))) for n in (1, 2))
        order = tuple(map(int, iota[3].split(","))) if iota[3] else tuple(range(len(sizes)))
        strides = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
        every = itertools.product(*(range(sizes[axis]) for axis in order))
        numbers = (
            sum(i * strides[a] for i, a in zip(index, order, strict=True)) for index in every
        )
        return tuple(itertools.islice(numbers, groups[-1]))
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]*)\}", text)
    return tuple(map(int, listed[1].split(","))) if listed and listed[1] else ()
