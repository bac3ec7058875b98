"""The Zarr v3 data types `bfloat16` and `float8_e4m3fn`, which zarr-python 3.1 does not bring, over ml_dtypes.

The name bfloat16 is registered at https://github.com/zarr-developers/zarr-extensions; other readers (tensorstore among
them) know it already. tensorstore reads and writes float8_e4m3fn under this name
(https://google.github.io/tensorstore/python/api/); the registry has its relatives (`float8_e4m3`,
`float8_e4m3fnuz`, ...), whose bits mean other numbers. Importing this module makes zarr-python know both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import ml_dtypes
import numpy as np
from zarr.dtype import DataTypeValidationError, Float16, data_type_registry

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True, kw_only=True)
class BFloat16(Float16):
    """A two-byte float with the exponent of float32.

    It is a `Float16` in all that Zarr asks of one (width, byte orders, JSON of its scalars) but the
    name and the NumPy type. The byte order it inherits matters: without `HasEndianness` zarr-python
    leaves `endian` out of the bytes codec, and tensorstore refuses the array.
    """

    dtype_cls = type(_BFLOAT16)  # pyright: ignore[reportAssignmentType]
    _zarr_v3_name = "bfloat16"  # pyright: ignore[reportAssignmentType]
    _zarr_v2_names: ClassVar[tuple[str, ...]] = ()  # pyright: ignore[reportIncompatibleVariableOverride]

    @classmethod
    def from_native_dtype(cls, dtype: np.dtype) -> Self:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Wrap the ml_dtypes type; raises DataTypeValidationError for any other."""
        if dtype != _BFLOAT16:
            raise DataTypeValidationError(f"expected bfloat16, got {dtype}")
        return cls()

    def to_native_dtype(self) -> np.dtype:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Give the ml_dtypes type in this byte order."""
        return _BFLOAT16 if self.endianness == "little" else _BFLOAT16.newbyteorder(">")


data_type_registry.register("bfloat16", BFloat16)


_FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)


@dataclass(frozen=True, kw_only=True)
class Float8E4M3FN(Float16):
    """A one-byte float of 4 exponent and 3 mantissa bits: finite up to 448, NaN, no infinity.

    It is a `Float16` in what Zarr asks of one but its width, its name and the NumPy type. The byte order
    that it inherits has no effect.
    """

    dtype_cls = type(_FLOAT8)  # pyright: ignore[reportAssignmentType]
    _zarr_v3_name = "float8_e4m3fn"  # pyright: ignore[reportAssignmentType]
    _zarr_v2_names: ClassVar[tuple[str, ...]] = ()  # pyright: ignore[reportIncompatibleVariableOverride]

    @property
    def item_size(self) -> int:
        """One byte."""
        return _FLOAT8.itemsize

    @classmethod
    def from_native_dtype(cls, dtype: np.dtype) -> Self:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Wrap the ml_dtypes type; raises DataTypeValidationError for any other."""
        if dtype != _FLOAT8:
            raise DataTypeValidationError(f"expected float8_e4m3fn, got {dtype}")
        return cls()

    def to_native_dtype(self) -> np.dtype:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Give the ml_dtypes type."""
        return _FLOAT8


data_type_registry.register("float8_e4m3fn", Float8E4M3FN)
