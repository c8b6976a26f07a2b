"""pFedLA and HeurpFedLA: layer-wise weights of all clients' models, from a hypernetwork for each client."""

from strategies.pfedla.hypernetwork import HypernetworkBank
from strategies.pfedla.store import ModelStore
from strategies.pfedla.strategy import PFedLa, PFedLaConfig

__all__ = ["HypernetworkBank", "ModelStore", "PFedLa", "PFedLaConfig"]
