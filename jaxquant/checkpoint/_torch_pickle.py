"""What the pickle inside a PyTorch file says, without running it.

A pickle is a program for a stack machine whose instructions can call any function. `pickletools`
only cuts it into instructions; here a machine of our own follows the few that files of tensors are
made of, and knows three callables, none of which it calls: each becomes a record. Whatever else
stands there is an error that names it.

The instructions: https://docs.python.org/3/library/pickletools.html
"""

import dataclasses
import mmap
import pickletools
from collections.abc import Callable
from typing import Any, cast

import ml_dtypes
import numpy as np

from ._errors import CheckpointError

# A model of 100,000 tensors takes some 4 million instructions, of a few bytes each.
_MOST_INSTRUCTIONS = 1 << 24
_LONGEST_STRING = 1 << 24

_DTYPES: dict[str, np.dtype[Any]] = {
    "torch.DoubleStorage": np.dtype("<f8"),
    "torch.FloatStorage": np.dtype("<f4"),
    "torch.HalfStorage": np.dtype("<f2"),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.LongStorage": np.dtype("<i8"),
    "torch.IntStorage": np.dtype("<i4"),
    "torch.ShortStorage": np.dtype("<i2"),
    "torch.CharStorage": np.dtype("i1"),
    "torch.ByteStorage": np.dtype("u1"),
    "torch.BoolStorage": np.dtype("?"),
}
_DICT = "collections.OrderedDict"
_TENSOR = "torch._utils._rebuild_tensor_v2"
_PARAMETER = "torch._utils._rebuild_parameter"
_KNOWN = frozenset({*_DTYPES, _DICT, _TENSOR, _PARAMETER})


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Storage:
    """A run of numbers that tensors are views of."""

    key: str
    dtype: np.dtype[Any]
    count: Any  # As the file says it: an int, which the reader of the file checks.


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class View:
    """A tensor: elements of a storage. Nothing but the types is checked yet."""

    storage: Storage
    offset: int  # In elements, like the strides.
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class _Known:
    """One of the globals that files of tensors mention."""

    name: str


class _Mark:
    """Where a tuple or a run of items begins on the stack."""


class _Bytes:
    """Part of a mapped file, as the file that `pickletools` reads; never gives much at once."""

    def __init__(self, data: mmap.mmap, start: int, end: int):
        self._data = data
        self.at, self._end = start, end

    def read(self, count: int) -> bytes:
        # Short or empty, which `pickletools` takes for the end of the file.
        count = min(count, self._end - self.at) if count <= _LONGEST_STRING else 0
        self.at += count
        return self._data[self.at - count : self.at]

    def readline(self) -> bytes:
        end = min(self._end, self.at + 4096)
        found = self._data.find(b"\n", self.at, end)
        return self.read((end if found < 0 else found + 1) - self.at)

    def tell(self) -> int:
        return self.at


def read_pickle(data: mmap.mmap, start: int, end: int, path: str) -> tuple[Any, int]:
    """The value of the pickle that begins at byte `start` of `data`, and the byte after it.

    Dicts, lists, tuples and scalars come as such, tensors as `View`. Nothing is executed.

    Raises:
      CheckpointError: it is damaged, runs past `end`, or asks for anything that a file of tensors
        has no use for; the message names it and its byte.
    """
    source = _Bytes(data, start, end)
    machine = _Machine(path)
    try:
        for number, (instruction, argument, at) in enumerate(pickletools.genops(cast(Any, source))):
            machine.at, machine.instruction = start if at is None else at, instruction.name
            if instruction.name == "STOP":
                return machine.pop(), source.at
            if number == _MOST_INSTRUCTIONS:
                raise machine.fail(f"there are more than {_MOST_INSTRUCTIONS} instructions")
            action = _ACTIONS.get(instruction.name)
            if action is None:
                named = f" ({argument!r:.80})" if isinstance(argument, str) else ""
                raise machine.refuse(f"the instruction {instruction.name}{named}")
            action(machine, argument)
    # pickletools has this one error for every instruction that is cut short or malformed.
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{path}: the pickle at byte {start} breaks off or is damaged at byte {source.at} "
            f"({str(error).splitlines()[0]:.120}). Fetch the file again."
        ) from None
    raise AssertionError("pickletools.genops ends with STOP or an error.")


class _Machine:
    """A stack and a memo, both of values that nobody has called."""

    def __init__(self, path: str):
        self.path = path
        self.at = 0
        self.instruction = ""
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def fail(self, problem: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: at byte {self.at} ({self.instruction}), {problem}. The file is damaged: "
            f"fetch it again."
        )

    def refuse(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: the pickle asks at byte {self.at} for {what}, which a file of tensors "
            f"does not need. Nothing was executed. Save tensors alone, as with "
            f"torch.save(model.state_dict(), ...), and do not trust a file that should hold that."
        )

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is _Mark:
            raise self.fail("the stack is empty")
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        for index in range(len(self.stack) - 1, -1, -1):
            if self.stack[index] is _Mark:
                items = self.stack[index + 1 :]
                del self.stack[index:]
                return items
        raise self.fail("there is no mark on the stack")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def push_long(self, number: int) -> None:
        # Larger ones cannot even be printed; the largest that is meant is the magic number of 80.
        if number.bit_length() > 127:
            raise self.fail(f"a number has {number.bit_length()} bits")
        self.push(number)

    def take(self, count: int) -> list[Any]:
        return [self.pop() for _ in range(count)][::-1]

    def top(self, kind: type, wanted: str) -> Any:
        if not self.stack or type(self.stack[-1]) is not kind:
            raise self.fail(f"{wanted} was wanted on the stack")
        return self.stack[-1]

    def find(self, name: str) -> None:
        if name not in _KNOWN:
            raise self.refuse(f"the global {name!r:.120}")
        self.push(_Known(name))

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise self.fail(f"nothing was put under {index}")
        self.push(self.memo[index])

    def put(self, index: int) -> None:
        if not self.stack or self.stack[-1] is _Mark:
            raise self.fail("the stack is empty")
        self.memo[index] = self.stack[-1]

    def append(self, items: list[Any]) -> None:
        self.top(list, "a list").extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.top(dict, "a dict")
        if len(items) % 2:
            raise self.fail("a key has no value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, int):
                raise self.fail(f"a key is a {type(key).__name__}, and a str or int was wanted")
            target[key] = value

    def global_by_names(self) -> None:
        module, name = self.take(2)
        if type(module) is not str or type(name) is not str:
            raise self.fail("a global has no name")
        self.find(f"{module}.{name}")

    def reduce(self) -> None:
        function, arguments = self.take(2)
        if type(function) is not _Known or type(arguments) is not tuple:
            raise self.refuse(f"a call of a {type(function).__name__}")
        if function.name == _DICT and not arguments:
            self.push({})
        elif function.name == _TENSOR and len(arguments) >= 6:
            self.push(self.view(*arguments[:4]))
        elif function.name == _PARAMETER and arguments and type(arguments[0]) is View:
            self.push(arguments[0])
        else:
            raise self.refuse(f"a call of {function.name} with {len(arguments)} arguments")

    def view(self, storage: Any, offset: Any, shape: Any, strides: Any) -> View:
        if type(storage) is not Storage or type(offset) is not int:
            raise self.fail("a tensor has no storage or no offset")
        for numbers in (shape, strides):
            if type(numbers) is not tuple or any(type(number) is not int for number in numbers):
                raise self.fail("a tensor's shape or strides are no tuple of integers")
        return View(storage=storage, offset=offset, shape=shape, strides=strides)

    def persistent(self) -> None:
        """`("storage", type, key, device, count)`; old files add a view, which must be None."""
        identity = self.pop()
        if type(identity) is not tuple or len(identity) not in (5, 6) or identity[0] != "storage":
            raise self.refuse("a persistent object that is no storage")
        _, kind, key, _, count, *view = identity
        if type(kind) is not _Known or kind.name not in _DTYPES:
            raise self.refuse("a storage of unknown type")
        if type(key) is not str or view not in ([], [None]):
            raise self.refuse("a storage that is part of another")
        self.push(Storage(key=key, dtype=_DTYPES[kind.name], count=count))

    def build(self) -> None:
        """`state_dict()` hangs its `_metadata` (versions of modules) on its dict; nobody here
        reads it. Everything else that is built would be an object of some class.
        """
        state = self.pop()
        if type(state) is not dict or not self.stack or type(self.stack[-1]) is not dict:
            raise self.refuse("the state of an object to be set (BUILD)")


def _push(machine: _Machine, argument: Any) -> None:
    machine.push(argument)


def _tuple_of(count: int) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.push(tuple(machine.take(count)))


_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda machine, _: None,
    "FRAME": lambda machine, _: None,
    "MARK": lambda machine, _: machine.push(_Mark),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "BINFLOAT"), _push),
    **dict.fromkeys(("LONG1", "LONG4"), lambda machine, number: machine.push_long(number)),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE"), _push),
    **dict.fromkeys(("BINSTRING", "SHORT_BINSTRING"), _push),  # Keys from Python 2.
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "TUPLE1": _tuple_of(1),
    "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.pop_to_mark())),
    "APPEND": lambda machine, _: machine.append(machine.take(1)),
    "APPENDS": lambda machine, _: machine.append(machine.pop_to_mark()),
    "SETITEM": lambda machine, _: machine.set_items(machine.take(2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_to_mark()),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda machine, index: machine.get(index)),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), lambda machine, index: machine.put(index)),
    "MEMOIZE": lambda machine, _: machine.put(len(machine.memo)),
    # pickletools joins module and name by a blank.
    "GLOBAL": lambda machine, name: machine.find(".".join(name.split(" "))),
    "STACK_GLOBAL": lambda machine, _: machine.global_by_names(),
    "REDUCE": lambda machine, _: machine.reduce(),
    "BINPERSID": lambda machine, _: machine.persistent(),
    "BUILD": lambda machine, _: machine.build(),
}
