"""Federated LoRA tuning on Flower's simulation as its users write it; the other side of `versus_flower.py`.

Runs in an environment of its own, with `flwr[simulation]`, torch, transformers and PEFT, and reads what the benchmark
prepared: `rows.npz` and `setting.json` in the folder that ``FLOWER_PEFT_FOLDER`` names. Each client sets the received
adapter, trains one pass over its rows with plain PEFT and AdamW on padded batches, and sends the adapter back; Flower's
FedAvg averages. Kinder to Flower than its tutorials: a worker process loads the base once, not once for each client.
"""

from __future__ import annotations

import functools
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModelForCausalLM

FOLDER = Path(os.environ["FLOWER_PEFT_FOLDER"])
client_app, server_app = ClientApp(), ServerApp()


@functools.cache
def setting() -> dict:
    return json.loads((FOLDER / "setting.json").read_text(encoding="utf-8"))


@functools.cache
def model() -> PeftModel:
    """The base with one adapter: one for each worker process."""
    torch.set_num_threads(setting()["threads"])
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(setting()["model"], dtype=getattr(torch, setting()["dtype"]))
    rank = setting()["rank"]
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(base, lora)


@functools.cache
def rows() -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """The token ids and labels of each client's rows."""
    arrays = np.load(FOLDER / "rows.npz")
    ends, clients = arrays["ends"], arrays["clients"]
    ids = np.split(arrays["input_ids"].astype(np.int64), ends[:-1])
    labels = np.split(np.where(arrays["supervised"], arrays["input_ids"], -100).astype(np.int64), ends[:-1])
    pairs = [(torch.from_numpy(i), torch.from_numpy(label)) for i, label in zip(ids, labels, strict=True)]
    return [[pairs[i] for i in np.flatnonzero(clients == client)] for client in range(clients.max() + 1)]


@client_app.train()
def train(message: Message, context: Context) -> Message:
    tuned = model()
    set_peft_model_state_dict(tuned, message.content["arrays"].to_torch_state_dict())
    own = rows()[int(context.node_config["partition-id"])]
    parameters = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=setting()["learning_rate"], weight_decay=0.0)
    tuned.train()
    by_length = sorted(own, key=lambda pair: len(pair[0]))
    size = setting()["batch_size"]
    starts = np.random.default_rng(0).permutation(np.arange(0, len(own), size))
    for start in starts:
        batch = by_length[start : start + size]
        padded = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
        ids = padded([ids for ids, _ in batch])
        labels = padded([labels for _, labels in batch], padding_value=-100)
        mask = padded([torch.ones_like(ids) for ids, _ in batch])
        with torch.autocast("cpu", torch.bfloat16, enabled=setting()["dtype"] == "bfloat16"):
            loss = tuned(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, setting()["clip_norm"])
        optimizer.step()
        optimizer.zero_grad()
    content = {
        "arrays": ArrayRecord(get_peft_model_state_dict(tuned)),
        "metrics": MetricRecord({"num-examples": len(own)}),
    }
    return Message(content=RecordDict(content), reply_to=message)


@server_app.main()
def main(grid: Grid, _context: Context) -> None:
    clients = setting()["clients"]
    strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients)

    def note_end_of_round(*_: object) -> None:
        with (FOLDER / "rounds.txt").open("a", encoding="utf-8") as file:
            file.write(f"{time.time()}\n")

    strategy.start(
        grid,
        ArrayRecord(get_peft_model_state_dict(model())),
        num_rounds=setting()["rounds"],
        evaluate_fn=note_end_of_round,
    )


if __name__ == "__main__":
    # Imported by its name, as the workers import it: so each of them keeps its model between clients.
    import flower_peft

    run_simulation(
        server_app=flower_peft.server_app,
        client_app=flower_peft.client_app,
        num_supernodes=setting()["clients"],
        backend_config={
            "init_args": {"num_cpus": os.cpu_count(), "include_dashboard": False},
            "client_resources": {"num_cpus": setting()["threads"], "num_gpus": 0.0},
        },
    )
