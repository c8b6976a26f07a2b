"""Secure aggregation: the server learns the weighted sum of the clients' updates, and no single one."""

from strategies.secagg.phase import MaskedPhase, masked_phase

__all__ = ["MaskedPhase", "masked_phase"]
