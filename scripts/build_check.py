"""What a compiled kernel must fulfil: no spills, no stack frame, 16-byte accesses where it is a 16-byte path, and all
loads of a thread in flight before its first store where the source is written so."""

from dataclasses import dataclass

from sass import Kernel


@dataclass(frozen=True)
class Built:
    """One kernel as compiled for one architecture."""

    backend: str  # cuda, triton
    name: str
    dtype: str
    architecture: int
    kernel: Kernel
    wide: bool  # must load and store 16 bytes at a time
    grouped: bool = False  # must make all its 16-byte loads before its first 16-byte store

    def violations(self) -> list[str]:
        """What is wrong with it; empty if nothing is."""
        found = []
        if self.kernel.spills:
            found.append(f"{self.kernel.spills} accesses to local memory (spills)")
        if self.kernel.stack:
            found.append(f"a stack frame of {self.kernel.stack} bytes")
        if self.wide and not self.kernel.wide_loads:
            found.append("no 16-byte load")
        if self.wide and not self.kernel.wide_stores:
            found.append("no 16-byte store")
        if self.grouped and self.kernel.late_loads:
            found.append(
                f"{self.kernel.late_loads} 16-byte loads behind the first store, where all should be in flight"
            )
        return found


def table(builds: list[Built]) -> str:
    """One line per kernel."""
    lines = [f"{'kernel':<52} {'dtype':<14} {'arch':<7} {'regs':>4} {'spills':>6} {'128-bit loads/stores':>20}"]
    for built in builds:
        kernel = built.kernel
        accesses = f"{kernel.wide_loads}/{kernel.wide_stores}" + ("" if built.wide else " (none asked)")
        lines.append(
            f"{built.backend + ' ' + built.name:<52} {built.dtype:<14} {'sm_' + str(built.architecture):<7} "
            f"{kernel.registers:>4} {kernel.spills:>6} {accesses:>20}"
        )
    return "\n".join(lines)
