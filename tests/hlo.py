"""Reads what a compiled program does from its HLO text."""

import re
from collections import Counter

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


class Program:
    """The computations of a compiled program, by name."""

    def __init__(self, text: str):
        """Splits `Compiled.as_text()` into its computations."""
        self.computations: dict[str, list[str]] = {}
        self.entry = ""
        name = None
        for line in text.splitlines():
            head = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
            if head and not line.startswith(" "):
                name = head[2]
                self.computations[name] = []
                self.entry = name if head[1] else self.entry
            elif name and line.startswith("  "):
                self.computations[name].append(line)

    def branches(self) -> list[list[str]]:
        """Returns the branch computations of every conditional with more than two of them."""
        found = []
        for lines in self.computations.values():
            for line in lines:
                names = _branches(line)
                if len(names) > 2:
                    found.append(names)
        return found

    def loops(self) -> list[str]:
        """Returns the bodies of all loops."""
        text = "\n".join(line for lines in self.computations.values() for line in lines)
        return re.findall(r" while\(.*body=%?([\w.\-]+)", text)

    def collectives(self, name: str) -> Counter:
        """Counts collectives in a computation and in what it calls.

        A loop counts as one turn, a conditional as the most that any branch has of each kind.
        """
        total = Counter()
        for line in self.computations[name]:
            for kind in COLLECTIVES:
                if re.search(rf" {kind}(-start)?\(", line):
                    total[kind] += 1
            branches = _branches(line)
            if branches:
                counts = [self.collectives(branch) for branch in branches]
                for kind in COLLECTIVES:
                    total[kind] += max(count[kind] for count in counts)
                continue
            for called in re.findall(r"(?:calls|body|to_apply)=%?([\w.\-]+)", line):
                total += self.collectives(called)
        return +total


def _branches(line: str) -> list[str]:
    listed = re.search(r"branch_computations=\{([^}]*)\}", line)
    if listed:
        return [name.strip().lstrip("%") for name in listed[1].split(",")]
    return re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", line)
