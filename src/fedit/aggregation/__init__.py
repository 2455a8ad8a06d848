"""Many updates -> one: the aggregation rules and the server optimizers.

Read `combine` (one pass over the updates, and the pieces that rules are made of), then `factor_means` (rules that add
up what the clients train), `linear` (where that is exact), `products` (rules that average what the adapters do) and
`robust` (rules that malicious clients cannot steer).
"""

from fedit.aggregation.factor_means import FedIT, FedRotLoRA, FedSALoRA, HetLoRA, LoRAFAIR
from fedit.aggregation.linear import FedKSeed, FedSB, FFALoRA, LoRAA2, RoLoRA, TinyLoRA
from fedit.aggregation.products import FedExLoRA, FedITPlus, FedMomentum, FedSVD, FlexLoRA, FLoRA, RaFLoRA
from fedit.aggregation.robust import RFA, Krum, Median, MultiKrum, NormClipping, TrimmedMean
from fedit.aggregation.server_optimizers import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedYogi, Nesterov

__all__ = [
    "RFA",
    "FFALoRA",
    "FLoRA",
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedExLoRA",
    "FedIT",
    "FedITPlus",
    "FedKSeed",
    "FedMomentum",
    "FedRotLoRA",
    "FedSALoRA",
    "FedSB",
    "FedSVD",
    "FedYogi",
    "FlexLoRA",
    "HetLoRA",
    "Krum",
    "LoRAA2",
    "LoRAFAIR",
    "Median",
    "MultiKrum",
    "Nesterov",
    "NormClipping",
    "RaFLoRA",
    "RoLoRA",
    "TinyLoRA",
    "TrimmedMean",
]
