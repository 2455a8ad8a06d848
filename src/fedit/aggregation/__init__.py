"""Many updates -> one: the aggregation rules and the server optimizers.

Read `lowrank` (the operators), `combine` (one pass over the updates), then the rules, one file each.
"""

from fedit.aggregation.fedit import FedIT
from fedit.aggregation.flexlora import FlexLoRA
from fedit.aggregation.lowrank import LowRank
from fedit.aggregation.server_optimizers import FedAvg, FedAvgM

__all__ = ["FedAvg", "FedAvgM", "FedIT", "FlexLoRA", "LowRank"]
