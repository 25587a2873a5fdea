"""The sparse form of a tile: its entries above the threshold as (row, column, drop), and sums over them.

Finding them must cost less than a pass over the scores. Columns are put in strided groups (column c belongs to group c mod S), whose
maxima one vectorised pass computes. Maxima are scores of the row, so their threshold bounds the row's from below; groups whose maximum
is below it hold nothing.

Sums over entries are ``embedding_bag``s: rows of a matrix, gathered, weighted and summed per bag, with no intermediate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(eq=False, slots=True)
class Entries:
    """Entries of R rows, in row order. ``row``, ``column`` int64 (nnz,), ``drop`` (nnz,), ``offsets`` int64 (R + 1,)."""

    row: torch.Tensor
    column: torch.Tensor
    drop: torch.Tensor
    offsets: torch.Tensor

    @property
    def counts(self) -> torch.Tensor:
        """Entries of each row, int64 (R,)."""
        return self.offsets.diff()

    def padded(self) -> torch.Tensor:
        """Drops as (R, most entries of a row), filled up with inf."""
        rows, width = len(self.offsets) - 1, int(self.counts.max()) if len(self.offsets) > 1 else 0
        table = self.drop.new_full((rows, width), torch.inf)
        place = torch.arange(len(self.row)) - self.offsets[self.row]
        table.view(-1)[place.add_(self.row, alpha=width)] = self.drop
        return table

    def select(self, keep: torch.Tensor) -> Entries:
        """The entries where ``keep`` (nnz,) is not 0."""
        index = keep.nonzero().squeeze(1)
        row = self.row[index]
        return Entries(row, self.column[index], self.drop[index], _offsets(row, len(self.offsets) - 1))

    def row_sums(self, values: torch.Tensor) -> torch.Tensor:
        """Sums of ``values`` (nnz,) over each row: (R,)."""
        return values.new_zeros(len(self.offsets) - 1).index_add_(0, self.row, values)

    def matmul(self, values: torch.Tensor, matrix: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        """Row sums of ``values`` times rows ``column`` of ``matrix`` (K, D): (R, D)."""
        return _bag(column, matrix, self.offsets, values)

    def dot(self, left: torch.Tensor, matrix: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        """Row ``row`` of ``left`` (R, D) times row ``column`` of ``matrix`` (K, D) for each entry: (nnz,)."""
        # This is the derivative of matmul with respect to its values.
        derivative = torch.ops.aten._embedding_bag_per_sample_weights_backward
        products: torch.Tensor = derivative(left, matrix, column, self.offsets[:-1], self.row, 0)
        return products


def find_entries(
    scores: torch.Tensor, row_max: torch.Tensor, group_max: torch.Tensor, reach: torch.Tensor, dense_above: float
) -> Entries | None:
    """Entries with row_max - score < reach, or None if more than ``dense_above`` of the groups may hold one.

    ``scores`` (R, groups' size * S) contiguous, ``group_max`` (R, S), ``row_max`` and ``reach`` (R, 1), with row_max finite.
    """
    rows = len(scores)
    groups = group_max.shape[1]
    # Rounding of row_max - reach must not lose an entry: the exact test is on drop < reach, below.
    # Rounding of row_max - reach must not lose an entry: the exact test is on drop < reach, below.
    margin = 4 * torch.finfo(scores.dtype).eps * (row_max.abs() + reach)
    hot = (group_max > row_max - reach - margin).view(-1).nonzero().squeeze(1)
    if len(hot) > dense_above * group_max.numel():
        return None
    hot_row = hot // groups
    hot_group = hot - hot_row * groups
    drop = row_max[hot_row] - scores.view(rows, -1, groups)[hot_row, :, hot_group]  # (hot groups, group size)
    inside = (drop < reach[hot_row]).view(-1).nonzero().squeeze(1)
    size = drop.shape[1]
    which = inside // size
    row = hot_row[which]
    column = hot_group[which] + (inside - which * size) * groups
    return Entries(row, column, drop.view(-1)[inside], _offsets(row, rows))


def _offsets(row: torch.Tensor, rows: int) -> torch.Tensor:
    offsets = row.new_zeros(rows + 1)
    torch.cumsum(torch.bincount(row, minlength=rows), 0, out=offsets[1:])
    return offsets


class Transposed:
    """The same entries in column order, for sums over the rows of each column."""

    def __init__(self, row: torch.Tensor, column: torch.Tensor, columns: int) -> None:
        narrow = column.to(torch.int32) if columns < 2**31 else column  # radix sort: half the bytes, half the time
        self._order = torch.sort(narrow, stable=True).indices
        self._row = row[self._order]
        self._offsets = _offsets(column, columns)

    def matmul(self, values: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        """Column sums of ``values`` (nnz,) times rows of ``matrix`` (R, D): (columns, D)."""
        return _bag(self._row, matrix, self._offsets, values[self._order])


def _bag(index: torch.Tensor, matrix: torch.Tensor, offsets: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return torch.embedding_bag(matrix, index, offsets, False, 0, False, values, True, None)[0]
