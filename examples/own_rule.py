"""An aggregation rule of one's own beside the shipped one.

python examples/own_rule.py             # both rules on the built-in world, some two minutes on two cores
fedit run --plugin examples/own_rule.py -o aggregation.name=sign-election
"""

import sys
from collections.abc import Iterable
from typing import ClassVar

import numpy as np
import torch

import fedit
from fedit.interfaces import Adapter, Aggregate, Aggregation, ClientUpdate


class SignElection(Aggregation):
    """Of every number, average the updates that go the way of their sum (the election of signs of TIES, 2306.01708).

    Clients that know nothing of a number do not dilute those who agree on it; weights all clients alike.
    """

    name: ClassVar[str] = "sign-election"

    def aggregate(self, adapter: Adapter, updates: Iterable[ClientUpdate], rng: np.random.Generator) -> Aggregate:
        received = list(updates)
        delta = {}
        for name in adapter.tensors:
            values = torch.stack([each.update.tensors[name].double() for each in received])
            agree = values.sign() == values.sum(dim=0).sign()
            delta[name] = (values * agree).sum(dim=0) / agree.sum(dim=0).clamp(min=1)
        return Aggregate(delta)


if __name__ == "__main__":
    recipe = sys.argv[1] if len(sys.argv) > 1 else "default"
    settings = ["rounds=8", "server_optimizer=fedavg", "evaluation.baselines=false"]
    for rule in ("fedit", "sign-election"):
        run = fedit.run(recipe, [f"aggregation.name={rule}", *settings], plugin_files=[__file__])
        loss = run.evaluation["models"]["federated"]["response_loss"]["all"]
        print(f"{rule}: held-out loss {loss:.3f}, see {run.path / 'report.html'}")
