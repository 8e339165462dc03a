"""What a compiled kernel reads and writes between its barriers."""

import inspect
import re
from dataclasses import dataclass, field

from triton.runtime.jit import JITFunction


@dataclass
class Phase:
    """From one ``tl.debug_barrier`` to the next: the kernel's pointers that are read and that are written."""

    loads: set[str] = field(default_factory=set)
    stores: set[str] = field(default_factory=set)


def phases(ttgir: str) -> list[Phase]:
    """Of Triton's GPU IR, where the kernel's helpers stand in their place and no barrier but its own is there yet."""
    found, came_from = [Phase()], {}
    for line in ttgir.splitlines():
        if re.match(r"\s*(?:ttg|gpu)\.barrier\b", line):  # its name in Triton 3.9, in 3.6
            found.append(Phase())
        elif start := re.match(r"\s*tt\.func public @\w+\((.*)", line):
            came_from = {name: name for name in re.findall(r"%(\w+): !tt\.ptr", start[1])}
        elif access := re.search(r"\b(?:(tt\.store)|tt\.load|ttg\.async_copy_global_to_local) %([\w#]+)", line):
            (found[-1].stores if access[1] else found[-1].loads).add(came_from[access[2]])
        elif made := re.match(r"\s*%(\w+) = [\w.]+ %([\w#]+)", line):
            if made[2] in came_from and "!tt.ptr" in line:
                came_from[made[1]] = came_from[made[2]]
            else:
                came_from.pop(made[1], None)  # the name stood for a pointer in a block before
    return found


def barriers_in(ptx: str, kernel: JITFunction) -> int:
    """How many of the lines of ``kernel`` that ask for a barrier have one."""
    lines, first = inspect.getsourcelines(kernel.fn)
    asking = [first + i for i, line in enumerate(lines) if line.lstrip().startswith("tl.debug_barrier()")]
    return sum(bool(re.search(rf"\.loc\s+\d+ {line} \d+[^\n]*\n\s*bar\.sync\b", ptx)) for line in asking)
