"""The Zarr v3 data types `bfloat16` and `float8_e4m3fn`, which zarr-python 3.1 lacks, built on ml_dtypes.

The name bfloat16 is registered at https://github.com/zarr-developers/zarr-extensions, and other readers such as
tensorstore know it. tensorstore also reads and writes float8_e4m3fn under this name
(https://google.github.io/tensorstore/python/api/); the registry has related types (`float8_e4m3`, `float8_e4m3fnuz`,
...), whose bits mean other numbers. Importing this module registers both with zarr-python.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import ml_dtypes
import numpy as np
from zarr.dtype import DataTypeValidationError, Float16, data_type_registry


@dataclass(frozen=True, kw_only=True)
class BFloat16(Float16):
    """A two-byte float with the exponent of float32.

    Zarr treats it as a `Float16` (width, byte order, JSON of scalars) with another name and NumPy type. The byte order
    matters: without `HasEndianness` zarr-python leaves `endian` out of the bytes codec, and tensorstore refuses the
    array.
    """

    native: ClassVar[np.dtype] = np.dtype(ml_dtypes.bfloat16)
    dtype_cls = type(native)  # pyright: ignore[reportAssignmentType]
    _zarr_v3_name = "bfloat16"  # pyright: ignore[reportAssignmentType]
    _zarr_v2_names: ClassVar[tuple[str, ...]] = ()  # pyright: ignore[reportIncompatibleVariableOverride]

    @property
    def item_size(self) -> int:
        """Bytes of a value."""
        return self.native.itemsize

    @classmethod
    def from_native_dtype(cls, dtype: np.dtype) -> Self:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Wrap the ml_dtypes type; raises DataTypeValidationError for any other."""
        if dtype != cls.native:
            raise DataTypeValidationError(f"expected {cls.native}, got {dtype}")
        return cls()

    def to_native_dtype(self) -> np.dtype:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the ml_dtypes type in this byte order."""
        is_plain = self.item_size == 1 or self.endianness == "little"
        return self.native if is_plain else self.native.newbyteorder(">")


@dataclass(frozen=True, kw_only=True)
class Float8E4M3FN(BFloat16):
    """A one-byte float of 4 exponent and 3 mantissa bits: finite up to 448, NaN, no infinity."""

    native: ClassVar[np.dtype] = np.dtype(ml_dtypes.float8_e4m3fn)
    dtype_cls = type(native)  # pyright: ignore[reportAssignmentType]
    _zarr_v3_name = "float8_e4m3fn"  # pyright: ignore[reportAssignmentType]


for _data_type in (BFloat16, Float8E4M3FN):
    data_type_registry.register(_data_type._zarr_v3_name, _data_type)  # pyright: ignore[reportPrivateUsage]
