"""From (sequence id, view) to the row that holds it."""

from __future__ import annotations

import numpy as np


class RowIndex:
    """Looks rows up by binary search in the sorted sequence ids of a view.

    Attributes:
        sequence_id: int64 `[rows]`.
        view: int32 `[rows]`.
    """

    def __init__(self, sequence_id: np.ndarray, view: np.ndarray) -> None:
        """Sort the rows of every view by sequence id.

        Args:
            sequence_id: Integers `[rows]`.
            view: Integers `[rows]`.

        Raises:
            ValueError: The lengths differ, or a (sequence id, view) has two rows.
        """
        if sequence_id.ndim != 1 or sequence_id.shape != view.shape:
            raise ValueError(f"sequence_id {sequence_id.shape} and view {view.shape} must be [rows] both")
        self.sequence_id = sequence_id = sequence_id.astype(np.int64, copy=False)
        self.view = view = view.astype(np.int32, copy=False)
        # view -> (its sequence ids, ascending; the row of each)
        self._rows_of_view: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for value in np.unique(view).tolist():
            rows = np.flatnonzero(view == value)
            rows = rows[np.argsort(sequence_id[rows], kind="stable")]
            ids = sequence_id[rows]
            if (twice := ids[1:] == ids[:-1]).any():
                raise ValueError(f"sequence {ids[twice.argmax()]}, view {value} has more than one row")
            self._rows_of_view[value] = ids, rows

    def find(self, sequence_ids: np.ndarray, view: int) -> np.ndarray:
        """Rows of some sequences in one view, in the order asked for.

        Args:
            sequence_ids: int64 `[B]`.
            view: The view.

        Returns:
            int64 `[B]`.

        Raises:
            KeyError: A sequence is not there in that view; the message names the first such.
        """
        if view not in self._rows_of_view:
            raise KeyError(f"view {view}; the views are {sorted(self._rows_of_view)}")
        ids, rows = self._rows_of_view[view]
        places = np.searchsorted(ids, sequence_ids)
        # An id past the last one gets the place after it: any place will do to see that it differs.
        found = ids[np.minimum(places, len(ids) - 1)] == sequence_ids
        if not found.all():
            raise KeyError(f"sequence {sequence_ids[found.argmin()]}, view {view}")
        return rows[places]
