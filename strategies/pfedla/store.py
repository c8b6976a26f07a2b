"""The models of all clients, held once, unit by unit."""

from collections.abc import Sequence

import torch
from torch import Tensor

from task.units import Layout

COLUMNS = 1 << 14
"""Values of each client that are worked on at once."""


class ModelStore:
    """theta_j of every client j, as one matrix [clients, dim] for each unit.

    Parameters
    ----------
    layout : Layout
        Index of a client's flat array.
    initial : Tensor, float32, [n]
        What every client starts from.
    dtype : torch.dtype
        How values are held, float32 or float16; arithmetic is in float32.
    """

    def __init__(self, layout: Layout, initial: Tensor, dtype: torch.dtype = torch.float32) -> None:
        self.layout, self.initial, self.dtype = layout, initial.clone(), dtype
        self.units = {unit: torch.empty(0, part.stop - part.start, dtype=dtype) for unit, part in layout.slices.items()}

    def __len__(self) -> int:
        """Return the number of clients."""
        return len(next(iter(self.units.values())))

    def grow(self, num_clients: int) -> None:
        """Make room for more clients, which start from the initial model."""
        added = num_clients - len(self)
        if added > 0:
            for unit, part in self.layout.slices.items():
                row = self.initial[part].to(self.dtype).expand(added, -1)
                self.units[unit] = torch.cat([self.units[unit], row])

    def mixed(self, alpha: Tensor) -> Tensor:
        """Aggregate some clients' models: bar_theta_i^l = sum_j alpha_i[l,j] theta_j^l.

        Parameters
        ----------
        alpha : Tensor, float32, [k, units, clients]
            The clients' weights; a row that is one at a single client gives that client's unit to the bit.

        Returns
        -------
        Tensor, float32, [k, n]
            bar_theta.
        """
        flat = torch.empty(len(alpha), self.layout.size)
        for number, (unit, part) in enumerate(self.layout.slices.items()):
            flat[:, part] = mixed_unit(alpha[:, number], self.units[unit])
        return flat

    def mean(self, among: Tensor | None = None) -> Tensor:
        """Average all clients' models, or those that a bool tensor [clients] names; float32 [n]."""
        flat = torch.empty(self.layout.size)
        for unit, part in self.layout.slices.items():
            rows = self.units[unit]
            flat[part] = (rows if among is None else rows[among]).mean(0, dtype=torch.float32)
        return flat


def mixed_unit(alpha: Tensor, rows: Tensor) -> Tensor:
    """Aggregate a unit for several clients, alpha [k, clients] times rows [clients, dim], float32 [k, dim].

    One-hot rows of alpha take the client's values as they are: no product is to round them.
    """
    found = alpha @ rows.float()
    for number in torch.nonzero(alpha.amax(1) == 1.0).flatten().tolist():
        found[number] = rows[alpha[number].argmax()]
    return found


def exchange_unit(
    rows: Tensor, new: Sequence[Tensor], chosen: Sequence[int], alpha: Tensor, cosine: bool = False
) -> Tensor:
    """Put new values of a unit into the store and return what the old ones say of them: G[i,j] = <theta_j, Delta_i>.

    Delta_i = theta_i_new - bar_theta_i, with bar_theta_i = sum_j alpha[i,j] theta_j of the store as it was. Some
    columns at a time, two matrix products each, so that nothing of the store's size is made.

    Parameters
    ----------
    rows : Tensor, [clients, dim]
        The unit's values of all clients; the rows ``chosen`` are overwritten.
    new : Sequence[Tensor], float32, each [dim]
        theta_i_new of the selected clients.
    chosen : Sequence[int]
        Their rows, distinct.
    alpha : Tensor, float32, [k, clients]
        Their weights.
    cosine : bool
        Divide by ||theta_j|| ||Delta_i||.

    Returns
    -------
    Tensor, float32, [k, clients]
        G.

    References
    ----------
    Ma et al. 2022 (pFedLA), Eq. 8 and 9, of which only these inner products are needed.
    """
    gain, delta_squares, row_squares = torch.zeros(alpha.shape), torch.zeros(len(alpha), 1), torch.zeros(1, len(rows))
    for start in range(0, rows.shape[1], COLUMNS):
        part = rows[:, start : start + COLUMNS]
        old, values = part.float(), torch.stack([one[start : start + COLUMNS] for one in new])
        delta = values - mixed_unit(alpha, old)
        gain.addmm_(delta, old.T)
        if cosine:
            delta_squares += delta.square().sum(1)[:, None]
            row_squares += old.square().sum(1)[None]
        part[chosen] = values.to(rows.dtype)
    if cosine:
        gain /= (delta_squares.sqrt() * row_squares.sqrt()).clamp_min(torch.finfo(torch.float32).tiny)
    return gain
