"""The Zarr v3 data type `float8_e4m3fn`, which zarr-python 3.1 does not bring, over ml_dtypes.

tensorstore reads and writes it under this name: https://google.github.io/tensorstore/python/api/
The registry at https://github.com/zarr-developers/zarr-extensions has its relatives (`float8_e4m3`,
`float8_e4m3fnuz`, ...), whose bits mean other numbers. Importing this module makes zarr-python know it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import ml_dtypes
import numpy as np
from zarr.dtype import DataTypeValidationError, Float16, data_type_registry

_NATIVE = np.dtype(ml_dtypes.float8_e4m3fn)


@dataclass(frozen=True, kw_only=True)
class Float8E4M3FN(Float16):
    """A one-byte float of 4 exponent and 3 mantissa bits: finite up to 448, NaN, no infinity.

    It is a `Float16` in what Zarr asks of one but its width, its name and the NumPy type. The byte order
    that it inherits has no effect.
    """

    dtype_cls = type(_NATIVE)  # pyright: ignore[reportAssignmentType]
    _zarr_v3_name = "float8_e4m3fn"  # pyright: ignore[reportAssignmentType]
    _zarr_v2_names: ClassVar[tuple[str, ...]] = ()  # pyright: ignore[reportIncompatibleVariableOverride]

    @property
    def item_size(self) -> int:
        """One byte."""
        return _NATIVE.itemsize

    @classmethod
    def from_native_dtype(cls, dtype: np.dtype) -> Self:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Wrap the ml_dtypes type; raises DataTypeValidationError for any other."""
        if dtype != _NATIVE:
            raise DataTypeValidationError(f"expected float8_e4m3fn, got {dtype}")
        return cls()

    def to_native_dtype(self) -> np.dtype:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Give the ml_dtypes type."""
        return _NATIVE


data_type_registry.register("float8_e4m3fn", Float8E4M3FN)
