"""The Zarr v3 data type `bfloat16`, which zarr-python 3.1 does not bring, over ml_dtypes.

The name is registered at https://github.com/zarr-developers/zarr-extensions; other readers
(tensorstore among them) know it already. Importing this module makes zarr-python know it too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import ml_dtypes
import numpy as np
from zarr.dtype import DataTypeValidationError, Float16, data_type_registry

_NATIVE = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True, kw_only=True)
class BFloat16(Float16):
    """A two-byte float with the exponent of float32.

    It is a `Float16` in all that Zarr asks of one (width, byte orders, JSON of its scalars) but the
    name and the NumPy type. The byte order it inherits matters: without `HasEndianness` zarr-python
    leaves `endian` out of the bytes codec, and tensorstore refuses the array.
    """

    dtype_cls = type(_NATIVE)  # pyright: ignore[reportAssignmentType]
    _zarr_v3_name = "bfloat16"  # pyright: ignore[reportAssignmentType]
    _zarr_v2_names: ClassVar[tuple[str, ...]] = ()  # pyright: ignore[reportIncompatibleVariableOverride]

    @classmethod
    def from_native_dtype(cls, dtype: np.dtype) -> Self:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Wrap the ml_dtypes type; raises DataTypeValidationError for any other."""
        if dtype != _NATIVE:
            raise DataTypeValidationError(f"expected bfloat16, got {dtype}")
        return cls()

    def to_native_dtype(self) -> np.dtype:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Give the ml_dtypes type in this byte order."""
        return _NATIVE if self.endianness == "little" else _NATIVE.newbyteorder(">")


data_type_registry.register("bfloat16", BFloat16)
