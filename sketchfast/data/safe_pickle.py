"""Reading pickled numeric arrays without trusting the pickle.

A pickle may name any callable. This unpickler admits only what numeric numpy arrays, scalars and object
arrays of them are made of, and even these names lead to small stand-ins that check the state before numpy
sees it: no code of the pickle's choosing runs, and no array is larger than the bytes that came with it.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

_NUMERIC = frozenset(("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"))


class UnsafePickleError(pickle.UnpicklingError, ValueError):
    """The pickle asks for something other than numeric arrays."""


class _Dtype:
    """Stand-in for numpy.dtype: a numeric code or object."""

    def __init__(self, code: Any, *_flags: Any) -> None:
        code = code.decode("ascii", "replace") if isinstance(code, bytes) else code
        if code not in _NUMERIC and code not in ("O8", "O4", "O"):
            raise UnsafePickleError(f"pickle holds an array of dtype {code!r}, only numeric ones are read")
        self.code: str = code
        self.order = "="

    def __setstate__(self, state: Any) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
        order = order.decode("ascii", "replace") if isinstance(order, bytes) else order
        if order not in ("<", ">", "=", "|"):
            raise UnsafePickleError(f"pickle holds a dtype of byte order {order!r}")
        self.order = order

    @property
    def is_object(self) -> bool:
        return self.code.startswith("O")

    def numpy(self) -> np.dtype[Any]:
        return np.dtype(self.code).newbyteorder(self.order)  # type: ignore[arg-type]


class _Array:
    """Stand-in for numpy.ndarray: checks shape against data when its state arrives."""

    value: NDArray[Any]

    def __init__(self, *_args: Any) -> None:
        self.value = np.zeros(0)

    def __setstate__(self, state: Any) -> None:
        if not (isinstance(state, tuple) and len(state) == 5):
            raise UnsafePickleError("pickle holds an array with an unknown state")
        _version, shape, dtype, fortran, data = state
        if (
            not isinstance(shape, tuple)
            or not all(type(n) is int and n >= 0 for n in shape)
            or len(shape) > 8
        ):
            raise UnsafePickleError(f"pickle holds an array of shape {shape!r}")
        if not isinstance(dtype, _Dtype):
            raise UnsafePickleError("pickle holds an array without a dtype")
        count = int(np.prod(shape, dtype=object))
        if dtype.is_object:
            if not isinstance(data, list) or len(data) != count:
                raise UnsafePickleError("pickle holds an object array whose size is not its shape's")
            flat: NDArray[Any] = np.empty(count, dtype=object)
            for i, item in enumerate(data):
                flat[i] = _resolve(item)
        else:
            flat = np.frombuffer(_as_bytes(data), dtype=dtype.numpy()).copy()
            if len(flat) != count:
                raise UnsafePickleError(f"pickle holds {len(flat)} values for an array of shape {shape}")
        self.value = flat.reshape(shape, order="F" if fortran else "C")


def _as_bytes(data: Any) -> bytes:
    """Array bytes; a Python 2 pickle read as latin1 holds them as text."""
    try:
        return data.encode("latin1") if isinstance(data, str) else bytes(memoryview(data))
    except (TypeError, UnicodeEncodeError):
        raise UnsafePickleError("pickle holds an array whose data are not bytes") from None


def _resolve(item: Any) -> Any:
    """A plain value out of a stand-in."""
    if isinstance(item, _Array):
        return item.value
    if item is None or isinstance(item, (bool, int, float, str, bytes, np.generic)):
        return item
    if isinstance(item, (list, tuple)):
        return type(item)(_resolve(i) for i in item)
    if isinstance(item, dict):
        return {_resolve(k): _resolve(v) for k, v in item.items()}
    raise UnsafePickleError(f"pickle holds a {type(item).__name__}, only numeric arrays are read")


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


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise UnsafePickleError(f"pickle asks for {module}.{name}, only numeric numpy arrays are read")
        return _ADMITTED[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise UnsafePickleError("pickle refers to a persistent object")


def load_arrays(data: bytes) -> Any:
    """What the pickle `data` holds: numeric arrays and scalars, plain values, and containers of these.

    Raises UnsafePickleError where it asks for anything else, pickle.UnpicklingError where it is broken.
    """
    try:
        return _resolve(_ArrayUnpickler(io.BytesIO(data), encoding="latin1").load())
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # a broken pickle may raise anything from its stack machine
        raise pickle.UnpicklingError(f"pickle is broken: {type(error).__name__}: {error}") from error


def load_npy(data: bytes) -> NDArray[Any]:
    """The array of an `.npy` file's bytes; object arrays through `load_arrays`.

    Raises UnsafePickleError as `load_arrays`, ValueError for a broken file.
    """
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read_header:
        raise ValueError(f"npy version {version} is not read")
    _shape, _fortran, dtype = read_header[version](stream)
    if not dtype.hasobject:
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
