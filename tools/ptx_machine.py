"""A GPU played by NumPy: runs PTX, the assembly that Triton makes for NVIDIA's GPUs, on tensors of the CPU.

Triton's own interpreter runs a kernel's source. This runs what the compiler made of it: its threads, their shuffles
and votes, their shared memory and their barriers, as the PTX ISA defines them
(https://docs.nvidia.com/cuda/parallel-thread-execution). It refuses what a GPU would answer with a fault or, worse,
with other bits from run to run:

* an access outside of the tensors that the kernel was given, or at an address that is no multiple of its width;
* a race: bytes that one thread writes and another reads or writes without a barrier, or an atomic operation, between;
* a shuffle or a vote in which threads that are named do not take part;
* an instruction that is not known here, or that may round otherwise than IEEE 754 says (no ``.rn``).

Registers hold noise until they are written. A float that is not a number is the one NaN that GPUs make.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hvd_qsgd.kernels.triton.launch import EXACT, warps_for

WARP = 32
SECTOR = 32
#: Threads that are played at a time, whole programs.
AT_A_TIME = 1 << 14
KINDS = {"b": "u", "u": "u", "s": "i", "f": "f"}
NAN = {2: 0x7FFF, 4: 0x7FFFFFFF, 8: 0x7FFFFFFFFFFFFFFF}
REGISTERS = {"pred": np.dtype(bool), "b16": np.dtype("u2"), "b32": np.dtype("u4"), "b64": np.dtype("u8")}
#: Instead of a thread's number: none yet, more than one, and any number of atomic operations.
NOBODY, SEVERAL, ATOMIC = -1, -2, -3


class FaultError(Exception):
    """What a GPU would not do, or not always in the same way."""


def dtype_of(name: str) -> np.dtype:
    """NumPy's name of a type of PTX: "s32" is int32."""
    return np.dtype(f"{KINDS[name[0]]}{int(name[1:]) // 8}")


@dataclass(frozen=True)
class Instruction:
    """One line: ``@%p1 ld.global.v4.b32 {%r1, ...}, [%rd1+16];``"""

    text: str
    name: tuple[str, ...]
    operands: tuple[Any, ...]
    guard: str = ""
    negated: bool = False


@dataclass
class Program:
    """A kernel: its instructions, where its labels stand, and the names of its parameters."""

    instructions: list[Instruction]
    labels: dict[str, int]
    parameters: list[str]
    registers: dict[str, np.dtype]
    threads: int


@functools.lru_cache(maxsize=256)
def parse(text: str) -> Program:
    """Read the PTX of one kernel."""
    text = re.sub(r"//.*", "", text)
    parameters = re.findall(r"\.param \.[^,)]*?(\w+)[,\n]", text)
    registers = {prefix: REGISTERS[kind] for kind, prefix in re.findall(r"\.reg \.(\w+)\s+(%[a-z]+)<", text)}
    threads = int(re.search(r"\.reqntid (\d+)", text)[1])  # type: ignore[index]
    body = text[text.index("{") + 1 : text.index("\n}")]
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in re.findall(r"(?m)^\s*(\$\w+:|@?[!%\w]+ ?[^;\n]*;|[a-z][^;\n]*;)", body):
        if line.endswith(":"):
            labels[line[:-1]] = len(instructions)
        else:
            instructions.append(read_instruction(line.rstrip(";")))
    return Program(instructions, labels, parameters, registers, threads)


def read_instruction(text: str) -> Instruction:
    found = re.match(r"(?:@(!?)(%\w+)\s+)?([\w.:]+)\s*(.*)", text)
    if found is None:
        raise FaultError(f"not an instruction: {text}")
    negated, guard, name, rest = found.groups()
    operands = tuple(read_operand(part) for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s|]+", rest))
    return Instruction(text, tuple(name.split(".")), operands, guard or "", bool(negated))


def read_operand(text: str) -> Any:
    """A register's name, a number, a tuple of operands, or ``(base, offset)`` in a list for an address."""
    if text[0] == "{":
        return tuple(read_operand(part.strip()) for part in text[1:-1].split(","))
    if text[0] == "[":
        base, _, offset = text[1:-1].replace(" ", "").partition("+")
        return [base, int(offset or 0)]
    if text[:2] in ("0f", "0d"):
        return int(text[2:], 16)
    if re.match(r"-?\d", text):
        return int(text.rstrip("U"), 0)
    return text


class Visits:
    """Who was last at each byte: which thread, of which program, and behind how many of its barriers."""

    def __init__(self, size: int) -> None:
        self.thread = np.full(size, NOBODY, np.int64)
        self.program = np.full(size, NOBODY, np.int32)
        self.time = np.zeros(size, np.int32)

    def past(self, at: np.ndarray, who: Who) -> np.ndarray:
        """Whether a barrier lies between."""
        return (self.program[at] == who.program[:, None]) & (self.time[at] < who.time[:, None])

    def disturb(self, at: np.ndarray, who: Who) -> np.ndarray:
        """Whether somebody else was there, and nothing says in which order."""
        thread = self.thread[at]
        return (thread != NOBODY) & (thread != who.thread[:, None]) & ~self.past(at, who)

    def note(self, at: np.ndarray, who: Who) -> None:
        past = self.past(at, who)
        for memory, mine in ((self.thread, who.thread), (self.program, who.program)):
            before, wide = memory[at], np.broadcast_to(mine[:, None], at.shape)
            memory[at] = wide
            several = (memory[at] != wide) | ((before != NOBODY) & (before != wide) & ~past)
            memory[at[several]] = SEVERAL
        self.time[at] = np.broadcast_to(who.time[:, None], at.shape)


class Memory:
    """Bytes at addresses, and who read and wrote them."""

    def __init__(self, start: int, data: np.ndarray, allowed: np.ndarray) -> None:
        self.start, self.data, self.allowed = start, data, allowed
        self.reads, self.writes = Visits(len(data)), Visits(len(data))

    def holds(self, addresses: np.ndarray, width: int) -> np.ndarray:
        return (addresses >= self.start) & (addresses + width <= self.start + len(self.data))

    def read(self, at: np.ndarray, who: Who, text: str) -> np.ndarray:
        """Bytes ``at``, one row for each thread."""
        if self.writes.disturb(at, who).any():
            raise FaultError(f"race with a write: {text}")
        self.reads.note(at, who.as_warps())
        return self.data[at]

    def write(self, at: np.ndarray, values: np.ndarray, who: Who, text: str, atomic: bool = False) -> None:
        """Put bytes, a row for each thread; what was there already, anyone may write again."""
        before = self.data[at]
        self.data[at] = values
        if (self.data[at] != values).any():
            raise FaultError(f"race of several writes: {text}")
        disturbed = self.writes.disturb(at, who)
        # Atomic operations are ordered among themselves.
        disturbed &= self.writes.thread[at] != ATOMIC if atomic else before != values
        if disturbed.any():
            raise FaultError(f"race with a write: {text}")
        if self.reads.disturb(at, who.as_warps()).any():
            raise FaultError(f"race with a read: {text}")
        self.writes.note(at, who)
        if atomic:
            self.writes.thread[at] = ATOMIC


@dataclass(frozen=True)
class Who:
    """Threads that do something: their numbers, their programs, and how many barriers they have passed."""

    thread: np.ndarray
    program: np.ndarray
    time: np.ndarray

    def of(self, chosen: np.ndarray) -> Who:
        return Who(self.thread[chosen], self.program[chosen], self.time[chosen])

    def as_warps(self) -> Who:
        """What threads of one warp read is read before what any of them writes later: a warp issues in order."""
        return Who(self.thread // WARP, self.program, self.time)


class Traffic:
    """What loads, stores and atomic operations of each program touched in global memory."""

    def __init__(self) -> None:
        self._touched: list[tuple[np.ndarray, int]] = []

    def note(self, programs: np.ndarray, addresses: np.ndarray, width: int) -> None:
        self._touched.append((programs.astype(np.int64) << 48 | addresses, width))

    def used(self) -> float:
        """Of the sectors of 32 bytes that each program touched, the bytes that it touched."""
        bytes_ = np.unique(
            np.concatenate([(keys[:, None] + np.arange(width)).ravel() for keys, width in self._touched])
        )
        return len(bytes_) / (SECTOR * len(np.unique(bytes_ // SECTOR)))


def launch(
    kernel: Any, grid: tuple[int, ...], tensors: tuple[torch.Tensor, ...], *numbers: Any, **constants: Any
) -> Traffic:
    """For :func:`hvd_qsgd.kernels.triton.launch.launch`: compile for the GPU that Triton believes in, and play it."""
    compiled = kernel.warmup(*tensors, *numbers, grid=grid, num_warps=warps_for(constants), **EXACT, **constants)
    return play(kernel, compiled, grid, (*tensors, *numbers))


def play(kernel: Any, compiled: Any, grid: tuple[int, ...], values: tuple[Any, ...]) -> Traffic:
    """Run what Triton compiled, with the arguments of the kernel that are no constants."""
    # What Triton takes for constant, such as a number that is 1, is not handed over.
    given = zip(kernel.arg_names, values)
    arguments = [value for name, value in given if compiled.src.signature[name] != "constexpr"]
    return run(compiled.asm["ptx"], grid, arguments, compiled.metadata.shared)


def run(text: str, grid: tuple[int, ...], arguments: list[torch.Tensor | int | float], shared: int) -> Traffic:
    """Run a kernel over a grid of programs on tensors of the CPU.

    ``arguments`` are those of the PTX, in order; scratch memory that the kernel may ask for is not there. ``shared``
    is the number of bytes of shared memory.

    Raises:
        FaultError: the kernel does what a GPU would not do, or not always in the same way.
    """
    program = parse(text)
    memories = memories_of([argument for argument in arguments if isinstance(argument, torch.Tensor)])
    values = [as_bits(argument) for argument in arguments]
    values += [0] * (len(program.parameters) - len(values))
    sizes = (*grid, 1, 1)[:3]
    programs = np.arange(int(np.prod(sizes)))
    step = max(AT_A_TIME // program.threads, 1)
    traffic = Traffic()
    for start in range(0, len(programs), step):
        Machine(program, programs[start : start + step], sizes, values, memories, shared, traffic).run()
    return traffic


def memories_of(tensors: list[torch.Tensor]) -> list[Memory]:
    """One for each storage; only the bytes of the tensors may be touched."""
    found: dict[int, Memory] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        start = storage.data_ptr()
        if start not in found:
            data = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
            found[start] = Memory(start, data, np.zeros(len(data), bool))
        first = tensor.data_ptr() - start
        found[start].allowed[first : first + tensor.numel() * tensor.element_size()] = True
    return list(found.values())


def as_bits(argument: torch.Tensor | int | float) -> int:
    if isinstance(argument, torch.Tensor):
        return argument.data_ptr()
    return int(np.float32(argument).view(np.uint32)) if isinstance(argument, float) else int(argument)


class Machine:
    """Some programs of a grid, all their threads side by side: registers are arrays over threads.

    Each step runs the earliest instruction at which a thread stands, for all threads that stand there.
    """

    def __init__(
        self,
        program: Program,
        programs: np.ndarray,
        grid: tuple[int, ...],
        values: list[int],
        memories: list[Memory],
        shared: int,
        traffic: Traffic,
    ) -> None:
        self.program, self.memories, self.traffic = program, memories, traffic
        size = program.threads
        number = len(programs) * size
        self.values = dict(zip(program.parameters, values))
        tid = np.tile(np.arange(size), len(programs))
        place = np.repeat(programs, size)
        self.special = {
            "%tid.x": tid,
            "%laneid": tid % WARP,
            "%ctaid.x": place % grid[0],
            "%ctaid.y": place // grid[0] % grid[1],
            "%ctaid.z": place // (grid[0] * grid[1]),
        }
        self.place = place.astype(np.int32)
        self.thread = place.astype(np.int64) * size + tid
        self.slot = np.repeat(np.arange(len(programs)), size)
        self.shared_size = shared
        self.shared = Memory(0, np.zeros(len(programs) * shared, np.uint8), np.ones(len(programs) * shared, bool))
        self.time = np.zeros(number, np.int32)
        self.at = np.zeros(number, np.int64)
        self.waiting = np.zeros(number, bool)
        self.rng = np.random.default_rng(0)
        self.registers: dict[str, np.ndarray] = {}
        self.active = np.arange(number)

    def run(self) -> None:
        end = len(self.program.instructions)
        while True:
            ready = (self.at < end) & ~self.waiting
            if not ready.any():
                if not self.waiting.any():
                    return
                self._pass_barrier()
                continue
            now = int(self.at[ready].min())
            self.active = np.flatnonzero(ready & (self.at == now))
            self.at[self.active] = now + 1
            self._step(self.program.instructions[now])

    def _pass_barrier(self) -> None:
        """All threads that have not ended wait: each program goes on if all of its threads wait at one place."""
        for slot in np.unique(self.slot[self.waiting]):
            here = self.waiting & (self.slot == slot)
            if len(set(self.at[here])) > 1 or here.sum() != self.program.threads:
                raise FaultError("threads of a program wait at different barriers, or have ended before one")
        self.time[self.waiting] += 1
        self.waiting[:] = False

    def _step(self, instruction: Instruction) -> None:
        if instruction.guard:
            chosen = self.registers[instruction.guard][self.active] != instruction.negated
            self.active = self.active[chosen]
            if not len(self.active):
                return
        operation = OPERATIONS.get(instruction.name[0])
        if operation is None:
            raise FaultError(f"not known here: {instruction.text}")
        try:
            with np.errstate(all="ignore"):
                operation(self, instruction)
        except KeyError as error:
            raise FaultError(f"not known here ({error}): {instruction.text}") from None

    # -- registers --------------------------------------------------------------------------------

    def get(self, operand: Any, dtype: np.dtype) -> np.ndarray:
        """Values of an operand, one for each active thread."""
        if isinstance(operand, int):
            bits = np.array([operand & (2 ** (8 * dtype.itemsize) - 1)], f"u{dtype.itemsize}")
            return np.broadcast_to(bits.view(dtype), len(self.active))
        if operand in self.special:
            return self.special[operand][self.active].astype(dtype)
        if operand == "global_smem":
            return np.zeros(len(self.active), dtype)
        held = self._register(operand)[self.active]
        if held.dtype.kind == "b":
            return held
        return np.ascontiguousarray(held.astype(f"u{dtype.itemsize}")).view(dtype)

    def put(self, operand: str, values: np.ndarray) -> None:
        """Set a register of the active threads; ``_`` is none."""
        if operand == "_":
            return
        register = self._register(operand)
        if values.dtype.kind == "f":
            bits = values.view(f"u{values.dtype.itemsize}")
            values = np.where(np.isnan(values), np.array(NAN[values.dtype.itemsize], bits.dtype), bits)
        elif values.dtype.kind == "i":
            # A wider register takes the sign along.
            values = values.astype(f"i{register.dtype.itemsize}").view(register.dtype)
        register[self.active] = values

    def _register(self, name: str) -> np.ndarray:
        if name not in self.registers:
            dtype = self.program.registers[name.rstrip("0123456789")]
            noise = self.rng.integers(0, 256, len(self.at) * dtype.itemsize, np.uint8)
            self.registers[name] = (noise & 1).astype(bool) if dtype.kind == "b" else noise.view(dtype)
        return self.registers[name]

    # -- memory -----------------------------------------------------------------------------------

    def addresses(self, operand: list[Any]) -> np.ndarray:
        base, offset = operand
        if base.startswith("%"):
            return self.get(base, self._register(base).dtype).astype(np.int64) + offset
        return np.full(len(self.active), offset, np.int64)

    def reach(
        self, space: str, operand: list[Any], width: int, text: str
    ) -> list[tuple[Memory, np.ndarray, np.ndarray]]:
        """Memory, which of the active threads go there, and the places of their bytes."""
        addresses = self.addresses(operand)
        if (addresses % width).any():
            raise FaultError(f"not at a multiple of {width} bytes: {text}")
        everyone = np.ones(len(addresses), bool)
        if space == "shared":
            if ((addresses < 0) | (addresses + width > self.shared_size)).any():
                raise FaultError(f"outside of shared memory: {text}")
            found = [(self.shared, everyone, addresses + self.slot[self.active] * self.shared_size)]
        else:
            self.traffic.note(self.place[self.active], addresses, width)
            held = [(memory, memory.holds(addresses, width)) for memory in self.memories]
            if not np.logical_or.reduce([inside for _, inside in held], initial=False).all():
                raise FaultError(f"outside of what the kernel was given: {text}")
            found = [(memory, inside, addresses[inside] - memory.start) for memory, inside in held if inside.any()]
        places = [(memory, inside, starts[:, None] + np.arange(width)) for memory, inside, starts in found]
        if not all(memory.allowed[at].all() for memory, _, at in places):
            raise FaultError(f"outside of what the kernel was given: {text}")
        return places

    def who(self, inside: np.ndarray) -> Who:
        threads = self.active[inside]
        return Who(self.thread[threads], self.place[threads], self.time[threads])

    # -- warps ------------------------------------------------------------------------------------

    def by_warp(self, mask: Any, text: str) -> np.ndarray:
        """Active threads as a matrix with a row for each warp; all must be there, and all be named."""
        if (self.get(mask, np.dtype("u4")) != 0xFFFFFFFF).any():
            raise FaultError(f"not for whole warps: {text}")
        if len(self.active) % WARP or (self.thread[self.active].reshape(-1, WARP) % WARP != np.arange(WARP)).any():
            raise FaultError(f"threads that are named do not take part: {text}")
        return self.active.reshape(-1, WARP)


# -- operations -----------------------------------------------------------------------------------


def kind_of(instruction: Instruction) -> np.dtype:
    return np.dtype(bool) if instruction.name[-1] == "pred" else dtype_of(instruction.name[-1])


def elementwise(function: Callable[..., np.ndarray]) -> Callable[[Machine, Instruction], None]:
    """An operation on operands of one type. On floats it must say that it rounds to the nearest."""

    def operation(machine: Machine, instruction: Instruction) -> None:
        name, dtype = instruction.name, kind_of(instruction)
        allowed = {"lo", "rn"} if dtype.kind != "f" or name[0] in EXACT else {"rn"}
        if set(name[1:-1]) - allowed or (dtype.kind == "f" and name[0] not in UNROUNDED and "rn" not in name):
            raise FaultError(f"may round otherwise: {instruction.text}")
        result, *sources = instruction.operands
        machine.put(result, function(*(machine.get(source, dtype) for source in sources)))

    return operation


#: Operations on floats that do not round.
UNROUNDED = {"abs", "neg"}


def multiply(machine: Machine, instruction: Instruction) -> None:
    """``mul`` and ``mad``: the low or the high half of a product, or all of it."""
    name, (result, *sources) = instruction.name, instruction.operands
    dtype = kind_of(instruction)
    if dtype.kind == "f":
        return elementwise(np.multiply)(machine, instruction)
    a, b = (machine.get(source, dtype) for source in sources[:2])
    if name[1] == "lo":
        found = a * b
    else:
        wide = np.dtype(f"{dtype.kind}{2 * dtype.itemsize}")
        found = a.astype(wide) * b.astype(wide)
        if name[1] == "hi":
            found = (found >> (8 * dtype.itemsize)).astype(dtype)
        elif name[1] != "wide":
            raise KeyError(name[1])
    if name[0] == "mad":
        found = found + machine.get(sources[2], found.dtype)
    machine.put(result, found)


def shift(machine: Machine, instruction: Instruction) -> None:
    """Shifts by the width of the register or more leave nothing, or the sign."""
    dtype = kind_of(instruction)
    result, source, count = instruction.operands
    values, steps = machine.get(source, dtype), machine.get(count, np.dtype("u4")).astype(np.int64)
    width = 8 * dtype.itemsize
    near = np.minimum(steps, width - 1).astype(dtype)
    found = values << near if instruction.name[0] == "shl" else values >> near
    if dtype.kind != "i":
        found = np.where(steps < width, found, np.zeros_like(found))
    machine.put(result, found)


def funnel(machine: Machine, instruction: Instruction) -> None:
    """``shf``: 32 of the 64 bits of two registers, shifted by less than 32."""
    name, (result, *sources) = instruction.name, instruction.operands
    low, high, count = (machine.get(source, np.dtype("u4")).astype(np.uint64) for source in sources)
    if name[2] != "wrap":
        raise KeyError(name[2])
    both, count = high << np.uint64(32) | low, count & np.uint64(31)
    found = {"l": (both << count) >> np.uint64(32), "r": both >> count}[name[1]]
    machine.put(result, found.astype(np.uint32))


def extract_bits(machine: Machine, instruction: Instruction) -> None:
    """``bfe``: some bits of a register, with their sign."""
    dtype = kind_of(instruction)
    result, *sources = instruction.operands
    values, first, count = (machine.get(source, np.dtype("u4")).astype(np.int64) for source in sources)
    found = (values >> first) & ((1 << count) - 1)
    if dtype.kind == "i":
        found = np.where((count > 0) & ((found >> np.maximum(count - 1, 0)) & 1 > 0), found - (1 << count), found)
    machine.put(result, found.astype(dtype))


def permute(machine: Machine, instruction: Instruction) -> None:
    """``prmt``: each byte of the result is one of eight, or that one's sign."""
    result, *sources = instruction.operands
    low, high, selection = (machine.get(source, np.dtype("u4")) for source in sources)
    pool = np.stack([low, high], axis=1).view(np.uint8)
    found = np.zeros((len(low), 4), np.uint8)
    for place in range(4):
        chosen = (selection >> np.uint32(4 * place)) & np.uint32(15)
        byte = pool[np.arange(len(low)), chosen & 7]
        found[:, place] = np.where(chosen & 8, np.where(byte & 128, 255, 0), byte)
    machine.put(result, found.view(np.uint32)[:, 0])


def convert(machine: Machine, instruction: Instruction) -> None:
    """``cvt``: to a type from another."""
    name, (result, *sources) = instruction.name, instruction.operands
    before = dtype_of(name[-1])
    if name[-2] == "f16x2":
        high, low = (machine.get(source, before).astype(np.float16).view(np.uint16) for source in sources)
        high, low = (np.where((half & 0x7FFF) > 0x7C00, 0x7FFF, half).astype(np.uint32) for half in (high, low))
        machine.put(result, (high << 16 | low).astype(np.uint32))
        return
    after = dtype_of(name[-2])
    narrows = after.kind == "f" and (before.kind != "f" or before.itemsize > after.itemsize)
    if before.kind == "f" and after.kind != "f":
        raise FaultError(f"not known here: {instruction.text}")
    if set(name[1:-2]) != ({"rn"} if narrows else set()):
        raise FaultError(f"may round otherwise: {instruction.text}")
    machine.put(result, machine.get(sources[0], before).astype(after))


COMPARISONS: dict[str, Callable[..., np.ndarray]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


def compare(machine: Machine, instruction: Instruction) -> None:
    """``setp``; of floats, nothing is true of NaN."""
    dtype, (result, first, second) = kind_of(instruction), instruction.operands
    a, b = machine.get(first, dtype), machine.get(second, dtype)
    found = COMPARISONS[instruction.name[1]](a, b)
    if dtype.kind == "f":
        found = found & ~np.isnan(a) & ~np.isnan(b)
    machine.put(result, found)


def choose(machine: Machine, instruction: Instruction) -> None:
    """``selp``: the first where the predicate is true."""
    result, first, second, predicate = instruction.operands
    dtype = np.dtype(f"u{kind_of(instruction).itemsize}")
    chosen = machine.get(predicate, np.dtype(bool))
    machine.put(result, np.where(chosen, machine.get(first, dtype), machine.get(second, dtype)))


def move(machine: Machine, instruction: Instruction) -> None:
    """``mov``; with braces, parts of a register or a register of parts."""
    result, source = instruction.operands
    dtype = kind_of(instruction)
    if dtype.kind != "b":
        dtype = np.dtype(f"u{dtype.itemsize}")
    if isinstance(source, tuple):
        part = np.dtype(f"u{dtype.itemsize // len(source)}")
        machine.put(result, np.stack([machine.get(each, part) for each in source], axis=1).view(dtype)[:, 0])
    elif isinstance(result, tuple):
        parts = machine.get(source, dtype)[:, None].view(f"u{dtype.itemsize // len(result)}")
        for number, each in enumerate(result):
            machine.put(each, parts[:, number].copy())
    else:
        machine.put(result, machine.get(source, dtype))


def load(machine: Machine, instruction: Instruction) -> None:
    name, (results, address) = instruction.name, instruction.operands
    dtype = kind_of(instruction)
    if name[1] == "param":
        bits = machine.values[address[0]] & (2 ** (8 * dtype.itemsize) - 1)
        value = np.array([bits], f"u{dtype.itemsize}").view(dtype)
        machine.put(results, np.broadcast_to(value, len(machine.active)).copy())
        return
    results = results if isinstance(results, tuple) else (results,)
    count = vector_of(instruction)
    bytes_ = np.zeros((len(machine.active), count * dtype.itemsize), np.uint8)
    for memory, inside, at in machine.reach(name[1], address, bytes_.shape[1], instruction.text):
        bytes_[inside] = memory.read(at, machine.who(inside), instruction.text)
    for number, result in enumerate(results):
        machine.put(result, bytes_.view(dtype)[:, number].copy())


def store(machine: Machine, instruction: Instruction) -> None:
    name, (address, sources) = instruction.name, instruction.operands
    dtype = np.dtype(f"u{kind_of(instruction).itemsize}")
    sources = sources if isinstance(sources, tuple) else (sources,)
    vector_of(instruction)
    bytes_ = np.stack([machine.get(source, dtype) for source in sources], axis=1).view(np.uint8)
    for memory, inside, at in machine.reach(name[1], address, bytes_.shape[1], instruction.text):
        memory.write(at, bytes_[inside], machine.who(inside), instruction.text)


def vector_of(instruction: Instruction) -> int:
    """Values a thread that a load or store moves at once."""
    extra = instruction.name[2:-1]
    if not extra:
        return 1
    if len(extra) > 1 or extra[0] not in ("v2", "v4"):
        raise KeyError(".".join(extra))
    return int(extra[0][1])


def add_atomically(machine: Machine, instruction: Instruction) -> None:
    """``atom.add``: threads that meet come one after the other, in their order."""
    name, (result, address, source) = instruction.name, instruction.operands
    if name[-2:] != ("add", "u32"):
        raise KeyError(".".join(name))
    values = machine.get(source, np.dtype("u4"))
    for memory, inside, at in machine.reach(name[1], address, 4, instruction.text):
        added = values[inside]
        order = np.argsort(at[:, 0], kind="stable")
        starts = np.flatnonzero(np.diff(at[order, 0], prepend=-1))
        sums = np.cumsum(added[order], dtype=np.uint32)
        before = sums - added[order]
        before -= np.repeat(before[starts], np.diff(np.append(starts, len(order))))
        held = memory.data[at].view(np.uint32)[:, 0]
        old = np.empty_like(added)
        old[order] = held[order] + before
        totals = np.add.reduceat(added[order], starts, dtype=np.uint32) + held[order[starts]]
        first = order[starts]
        everyone = machine.who(inside)
        memory.write(at[first], totals[:, None].view(np.uint8), everyone.of(first), instruction.text, atomic=True)
        full = np.empty(len(machine.active), np.uint32)
        full[inside] = old
        here, machine.active = machine.active, machine.active[inside]
        machine.put(result, full[inside])
        machine.active = here


def shuffle(machine: Machine, instruction: Instruction) -> None:
    """``shfl``: the value of another thread of the warp, or one's own where there is none."""
    name, (result, source, distance, clamp, mask) = instruction.name, instruction.operands
    lanes = np.arange(WARP)
    machine.by_warp(mask, instruction.text)
    values = machine.get(source, np.dtype("u4")).reshape(-1, WARP)
    if name[2] == "bfly" and clamp == 31:
        partner = lanes ^ distance
    elif name[2] == "up" and clamp == 0:
        partner = np.where(lanes >= distance, lanes - distance, lanes)
    elif name[2] == "idx" and clamp == 31:
        partner = machine.get(distance, np.dtype("u4")).reshape(-1, WARP) % WARP
    else:
        raise KeyError(".".join(name))
    machine.put(result, np.take_along_axis(values, np.broadcast_to(partner, values.shape), axis=1).ravel())


def vote(machine: Machine, instruction: Instruction) -> None:
    """``vote.ballot``: a bit for each thread of the warp."""
    result, predicate, mask = instruction.operands
    if instruction.name[2] != "ballot":
        raise KeyError(instruction.name[2])
    machine.by_warp(mask, instruction.text)
    votes = machine.get(predicate, np.dtype(bool)).reshape(-1, WARP)
    words = np.packbits(votes, axis=1, bitorder="little").view(np.uint32)
    machine.put(result, np.repeat(words[:, 0], WARP))


def reduce_warp(machine: Machine, instruction: Instruction) -> None:
    """``redux``: the sum or maximum over a warp."""
    result, source, mask = instruction.operands
    machine.by_warp(mask, instruction.text)
    values = machine.get(source, kind_of(instruction)).reshape(-1, WARP)
    found = {"add": np.add, "max": np.maximum}[instruction.name[2]].reduce(values, axis=1)
    machine.put(result, np.repeat(found.astype(values.dtype), WARP))


MATRICES = ("sync", "aligned", "m8n8", "x4", "shared", "b16")


def move_matrices(machine: Machine, instruction: Instruction) -> None:
    """``ldmatrix``, ``stmatrix``: four of 8 rows of 16 bytes; a thread names a row, and holds a word of each matrix."""
    if instruction.name[1:] != MATRICES:
        raise KeyError(".".join(instruction.name))
    loads = instruction.name[0] == "ldmatrix"
    registers, address = instruction.operands if loads else instruction.operands[::-1]
    number = len(machine.by_warp(-1, instruction.text))
    [(memory, everyone, at)] = machine.reach("shared", address, 16, instruction.text)
    if loads:
        words = memory.read(at, machine.who(everyone), instruction.text).view(np.uint32).reshape(number, 4, WARP)
        for matrix, register in enumerate(registers):
            machine.put(register, words[:, matrix].ravel())
    else:
        held = [machine.get(register, np.dtype("u4")).reshape(number, WARP) for register in registers]
        rows = np.stack(held, axis=1).reshape(-1, 4).view(np.uint8)
        memory.write(at, rows, machine.who(everyone), instruction.text)


def wait_for_all(machine: Machine, instruction: Instruction) -> None:
    if instruction.operands != (0,):
        raise KeyError(instruction.operands)
    machine.waiting[machine.active] = True


def jump(machine: Machine, instruction: Instruction) -> None:
    machine.at[machine.active] = machine.program.labels[instruction.operands[-1]]


def end(machine: Machine, instruction: Instruction) -> None:
    machine.at[machine.active] = len(machine.program.instructions)


def divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of whole numbers, what is left of the point: towards zero."""
    if a.dtype.kind == "f":
        return a / b
    return np.where(b == 0, -1, np.sign(a) * np.sign(b) * (abs(a) // np.maximum(abs(b), 1))).astype(a.dtype)


def count_ones(values: np.ndarray) -> np.ndarray:
    return np.unpackbits(np.ascontiguousarray(values)[:, None].view(np.uint8), axis=1).sum(axis=1).astype(values.dtype)


def magnitude(machine: Machine, instruction: Instruction) -> None:
    """``abs``, also of two float16 in a register."""
    if instruction.name[-1] == "f16x2":
        result, source = instruction.operands
        machine.put(result, machine.get(source, np.dtype("u4")) & np.uint32(0x7FFF7FFF))
    else:
        elementwise(np.abs)(machine, instruction)


OPERATIONS: dict[str, Callable[[Machine, Instruction], None]] = {
    "abs": magnitude,
    "add": elementwise(np.add),
    "and": elementwise(np.bitwise_and),
    "atom": add_atomically,
    "bar": wait_for_all,
    "bfe": extract_bits,
    "bra": jump,
    "cvt": convert,
    "div": elementwise(divide),
    "ld": load,
    "ldmatrix": move_matrices,
    "mad": multiply,
    "max": elementwise(np.maximum),
    "min": elementwise(np.minimum),
    "mov": move,
    "mul": multiply,
    "neg": elementwise(np.negative),
    "not": elementwise(np.invert),
    "or": elementwise(np.bitwise_or),
    "popc": elementwise(count_ones),
    "prmt": permute,
    "redux": reduce_warp,
    "ret": end,
    "selp": choose,
    "setp": compare,
    "shf": funnel,
    "shfl": shuffle,
    "shl": shift,
    "shr": shift,
    "sqrt": elementwise(np.sqrt),
    "st": store,
    "stmatrix": move_matrices,
    "sub": elementwise(np.subtract),
    "vote": vote,
    "xor": elementwise(np.bitwise_xor),
}
