"""Reading pickled numeric arrays without trusting the pickle.

A pickle may name any callable. This unpickler admits only what numeric numpy arrays, scalars and object
arrays of them are made of, and even these names lead to small stand-ins that check the state before numpy
sees it: no code of the pickle's choosing runs, and all arrays together are no larger than the pickle.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

_NUMERIC = frozenset(("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"))


class UnsafePickleError(pickle.UnpicklingError, ValueError):
    """The pickle asks for something other than numeric arrays."""


class _Dtype:
    """Stand-in for numpy.dtype: a numeric code or object."""

    def __init__(self, code: Any, *_flags: Any) -> None:
        code = code.decode("ascii", "replace") if isinstance(code, bytes) else code
        if not isinstance(code, str):  # hash and repr of nested tuples could take for ever
            raise UnsafePickleError("pickle holds a dtype that is not named by a code")
        if code not in _NUMERIC and code not in ("O8", "O4", "O"):
            raise UnsafePickleError(f"pickle holds an array of dtype {code!r}, only numeric ones are read")
        self.code: str = code
        self.order = "="

    def __setstate__(self, state: Any) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
        order = order.decode("ascii", "replace") if isinstance(order, bytes) else order
        if order not in ("<", ">", "=", "|"):
            raise UnsafePickleError("pickle holds a dtype of unknown byte order")
        self.order = order

    @property
    def is_object(self) -> bool:
        return self.code.startswith("O")

    def numpy(self) -> np.dtype[Any]:
        return np.dtype(self.code).newbyteorder(self.order)  # type: ignore[arg-type]


class _Array:
    """Stand-in for numpy.ndarray: checks shape against data when its state arrives.

    flat: the values, a view of the pickle's bytes, or a list of objects still to be resolved.
    """

    def __init__(self, *_args: Any) -> None:
        self.flat: NDArray[Any] | list[Any] = np.zeros(0)
        self.shape: tuple[int, ...] = (0,)
        self.fortran = False

    def __setstate__(self, state: Any) -> None:
        if not (isinstance(state, tuple) and len(state) == 5):
            raise UnsafePickleError("pickle holds an array with an unknown state")
        _version, shape, dtype, fortran, data = state
        if not (isinstance(shape, tuple) and len(shape) <= 8 and all(type(n) is int for n in shape)):
            raise UnsafePickleError("pickle holds an array whose shape is no tuple of at most 8 integers")
        if min(shape, default=0) < 0:
            raise UnsafePickleError(f"pickle holds an array of shape {shape}")
        if not isinstance(dtype, _Dtype):
            raise UnsafePickleError("pickle holds an array without a dtype")
        if dtype.is_object:
            if not isinstance(data, list):
                raise UnsafePickleError("pickle holds an object array without a list of objects")
            self.flat = data
        else:
            self.flat = np.frombuffer(_as_bytes(data), dtype=dtype.numpy())
        if len(self.flat) != math.prod(shape):
            raise UnsafePickleError(f"pickle holds {len(self.flat)} values for an array of shape {shape}")
        self.shape, self.fortran = shape, bool(fortran)


def _as_bytes(data: Any) -> bytes:
    """Array bytes; a Python 2 pickle read as latin1 holds them as text."""
    try:
        return data.encode("latin1") if isinstance(data, str) else bytes(memoryview(data))
    except (TypeError, UnicodeEncodeError):
        raise UnsafePickleError("pickle holds an array whose data are not bytes") from None


class _Resolver:
    """Turns what was unpickled into plain values: each object once, however often the pickle refers to it."""

    def __init__(self, size: int) -> None:
        self._left = size  # array bytes (or objects) that a pickle of `size` bytes may still hold
        self._resolved: dict[int, Any] = {}  # by id: the unpickled value keeps every object alive meanwhile

    def resolve(self, item: Any) -> Any:
        if item is None or isinstance(item, (bool, int, float, str, bytes, np.generic)):
            return item
        if id(item) not in self._resolved:
            self._resolved[id(item)] = self._resolve_container(item)
        return self._resolved[id(item)]

    def _resolve_container(self, item: Any) -> Any:
        if isinstance(item, _Array):
            return self._array(item)
        if isinstance(item, (list, tuple)):
            return type(item)(self.resolve(i) for i in item)
        if isinstance(item, dict):
            return {self.resolve(k): self.resolve(v) for k, v in item.items()}
        raise UnsafePickleError(f"pickle holds a {type(item).__name__}, only numeric arrays are read")

    def _array(self, array: _Array) -> NDArray[Any]:
        values = array.flat
        self._left -= len(values) if isinstance(values, list) else values.nbytes
        if self._left < 0:
            raise UnsafePickleError("pickle holds arrays that are larger than itself")
        if isinstance(values, list):
            flat: NDArray[Any] = np.empty(math.prod(array.shape), dtype=object)
            for i, item in enumerate(values):
                flat[i] = self.resolve(item)
        else:
            flat = values.copy()
        return flat.reshape(array.shape, order="F" if array.fortran else "C")


def _scalar(dtype: Any, data: Any = b"") -> np.generic:
    """Stand-in for numpy's scalar constructor."""
    if not isinstance(dtype, _Dtype) or dtype.is_object:
        raise UnsafePickleError("pickle holds a scalar that is not numeric")
    values = np.frombuffer(_as_bytes(data), dtype=dtype.numpy())
    if len(values) != 1:
        raise UnsafePickleError(f"pickle holds {len(values)} values for a scalar")
    return values[0]


def _reconstruct(*_args: Any) -> _Array:
    return _Array()


def _latin1(text: Any, encoding: Any = None) -> bytes:
    """Stand-in for _codecs.encode, which protocol 2 uses for bytes."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise UnsafePickleError("pickle holds text in an encoding other than latin1")
    return text.encode("latin1")


def _empty_bytes(*args: Any) -> bytes:
    """Stand-in for bytes, which old protocols call for an empty array's data."""
    if args:
        raise UnsafePickleError("pickle calls bytes with arguments")
    return b""


class _Function:
    """A stand-in function that a pickle can call but not set attributes of, as BUILD may on a plain one."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any) -> None:
        raise UnsafePickleError("pickle sets the state of a function")


_ADMITTED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _Function(_latin1),
    ("builtins", "bytes"): _Function(_empty_bytes),
    ("__builtin__", "bytes"): _Function(_empty_bytes),
}
for _module in ("numpy.core.multiarray", "numpy._core.multiarray"):
    _ADMITTED[_module, "_reconstruct"] = _Function(_reconstruct)
    _ADMITTED[_module, "scalar"] = _Function(_scalar)


_USUAL: dict[int, Callable[..., None]] = {**pickle._Unpickler.dispatch}


class _ArrayUnpickler(pickle._Unpickler):
    """The unpickler in Python: that in C hashes a key before anyone can look at it.

    A tuple that holds a smaller one twice, and so on, is two bytes a level and takes twice as long to hash.
    """

    stack: list[Any]
    dispatch: ClassVar[dict[int, Callable[..., None]]] = {**_USUAL}

    def _set_item(self) -> None:
        _check_keys(self.stack[-2:-1])
        _USUAL[pickle.SETITEM[0]](self)

    def _set_items(self) -> None:
        _check_keys(self.stack[::2])  # what came after the mark
        _USUAL[pickle.SETITEMS[0]](self)

    def _make_dict(self) -> None:
        _check_keys(self.stack[::2])
        _USUAL[pickle.DICT[0]](self)

    def _refuse_set(self) -> None:
        raise UnsafePickleError("pickle holds a set, only numeric arrays are read")

    dispatch[pickle.SETITEM[0]] = _set_item
    dispatch[pickle.SETITEMS[0]] = _set_items
    dispatch[pickle.DICT[0]] = _make_dict
    dispatch[pickle.EMPTY_SET[0]] = dispatch[pickle.FROZENSET[0]] = _refuse_set

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise UnsafePickleError(f"pickle asks for {module}.{name}, only numeric numpy arrays are read")
        return _ADMITTED[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise UnsafePickleError("pickle refers to a persistent object")


def _check_keys(keys: list[Any]) -> None:
    for key in keys:
        if not (key is None or isinstance(key, (str, bytes, int, float, np.generic))):
            raise UnsafePickleError(f"pickle holds a dict with a {type(key).__name__} as key")


def _check_memo(data: bytes) -> None:
    """The unpickler takes memory for as many memo entries as the largest index says, before any is used."""
    for opcode, index, _ in pickletools.genops(data):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and (index or 0) > len(data):
            raise UnsafePickleError(f"pickle of {len(data)} bytes asks for memo entry {index}")


def load_arrays(data: bytes) -> Any:
    """What the pickle `data` holds: numeric arrays and scalars, plain values, and containers of these.

    Raises UnsafePickleError where it asks for anything else, pickle.UnpicklingError where it is broken.
    """
    try:
        _check_memo(data)
        return _Resolver(len(data)).resolve(_ArrayUnpickler(io.BytesIO(data), encoding="latin1").load())
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # a broken pickle may raise anything from its stack machine
        raise pickle.UnpicklingError(f"pickle is broken: {type(error).__name__}: {error}") from error


def _read_npy_header(stream: io.BytesIO) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype; leaves the stream where the data begin."""
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(stream)
    if version not in read_header:
        raise ValueError(f"npy version {version} is not read")
    try:
        shape, _fortran, dtype = read_header[version](stream)
    except Exception as error:  # numpy parses the header as Python: a broken one may raise anything
        raise ValueError(f"npy header is broken: {type(error).__name__}: {error}") from error
    return shape, dtype


def load_npy(data: bytes) -> NDArray[Any]:
    """The array of an `.npy` file's bytes; object arrays through `load_arrays`.

    Raises UnsafePickleError as `load_arrays`, ValueError for a broken file.
    """
    stream = io.BytesIO(data)
    shape, dtype = _read_npy_header(stream)
    if not dtype.hasobject:
        # Before numpy allocates by the header's word.
        expected, present = math.prod(shape) * dtype.itemsize, len(data) - stream.tell()
        if dtype.itemsize == 0 or expected != present:
            raise ValueError(f"npy holds {present} bytes, its header calls for {expected} of dtype {dtype}")
        stream.seek(0)
        return np.lib.format.read_array(stream, allow_pickle=False)
    try:
        value = load_arrays(data[stream.tell() :])
    except UnsafePickleError:
        raise
    except pickle.UnpicklingError as error:
        raise ValueError(str(error)) from error
    if not isinstance(value, np.ndarray):
        raise UnsafePickleError(f"npy holds a pickled {type(value).__name__}, not an array")
    return value
