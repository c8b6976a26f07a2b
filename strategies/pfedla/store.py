"""The models of all clients, held once, unit by unit."""

from collections.abc import Sequence

import torch
from torch import Tensor

from task.units import Layout


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

    def mean(self) -> Tensor:
        """Average all clients' models, float32 [n]."""
        flat = torch.empty(self.layout.size)
        for unit, part in self.layout.slices.items():
            flat[part] = self.units[unit].mean(0, dtype=torch.float32)
        return flat


def mixed_unit(alpha: Tensor, rows: Tensor) -> Tensor:
    """Aggregate a unit for several clients, alpha [k, clients] times rows [clients, dim], float32 [k, dim].

    One-hot rows of alpha take the client's values as they are: no product is to round them.
    """
    found = alpha @ rows.float()
    for number in torch.nonzero(alpha.amax(1) == 1.0).flatten().tolist():
        found[number] = rows[alpha[number].argmax()]
    return found


def unit_gain(new: Tensor, received: Tensor, rows: Tensor, cosine: bool) -> Tensor:
    """Take G[i,j] = <theta_j, Delta_i> of a unit, Delta_i = theta_i_new - bar_theta_i, by one matrix product.

    Parameters
    ----------
    new : Tensor, float32, [k, dim]
        The selected clients' values after local training.
    received : Tensor, float32, [k, dim]
        bar_theta_i; is overwritten.
    rows : Tensor, [clients, dim]
        The store that bar_theta came from.
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
    delta = torch.sub(new, received, out=received)
    values = rows.float()
    gain = delta @ values.T
    if cosine:
        tiny = torch.finfo(torch.float32).tiny
        gain /= (delta.norm(dim=1)[:, None] * values.norm(dim=1)[None]).clamp_min(tiny)
    return gain


def stacked(vectors: Sequence[Tensor], part: slice) -> Tensor:
    """Stack a range of several flat arrays, [k, dim]."""
    return torch.stack([vector[part] for vector in vectors])
