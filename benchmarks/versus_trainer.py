"""Local tuning of one federated round: fedit against Hugging Face's Trainer with PEFT, on the same rows and steps.

    python benchmarks/versus_trainer.py --model MODEL --data DATA [--clients 10 --rows 150] [--shape llama-15m]

Three ways to train on the same tokens, each in a process of its own, in turn, `--repetitions` times:

- fedit: all clients stacked (`fedit.tuning`), the update of each taken back, one aggregation;
- central: one Trainer on the rows of all clients (benchmark A);
- sequential: a fresh Trainer for each client, adapter set and read back (benchmark B), as simulations usually do.

All sides get the same rows as token ids, prepared beforehand and not timed, the same LoRA (every linear layer of the
blocks), batch size, AdamW and clip; the Trainer groups rows by length and pads each batch to its longest row. Prints
medians and ratios as a table, and with --json everything.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

WAYS = ("fedit", "central", "sequential")


def main() -> None:
    arguments = parse_arguments()
    if arguments.only:
        print(json.dumps(measure(arguments.only, arguments)))
        return
    results: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for repetition in range(arguments.repetitions):
        for way in WAYS:
            command = [sys.executable, *sys.argv, "--only", way]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            results[way].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"repetition {repetition + 1} {way}: {results[way][-1]}", file=sys.stderr, flush=True)
    medians = {
        way: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for way, runs in results.items()
    }
    if arguments.json:
        print(json.dumps({"arguments": vars(arguments), "runs": results, "medians": medians}, indent=2, default=str))
        return
    print(f"| Way | Tokens | Seconds | CPU s | Tokens/s | Tokens per CPU s | Peak memory, MB |\n|{'---|' * 7}")
    for way, median in medians.items():
        rates = median["tokens"] / median["seconds"], median["tokens"] / median["cpu_seconds"]
        print(
            f"| {way} | {median['tokens']:,.0f} | {median['seconds']:.1f} | {median['cpu_seconds']:.1f} "
            f"| {rates[0]:,.0f} | {rates[1]:,.0f} | {median['peak_memory_bytes'] / 1e6:,.0f} |"
        )
    for way in WAYS[1:]:
        ratios = [
            statistics.median(
                theirs[key] / ours[key] for ours, theirs in zip(results["fedit"], results[way], strict=True)
            )
            for key in ("seconds", "cpu_seconds")
        ]
        print(f"\nfedit against {way}: {ratios[0]:.2f} x the tokens per second, {ratios[1]:.2f} x per CPU second")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:cria", help="folder or Hub name; its tokenizer encodes the rows")
    parser.add_argument("--shape", help="random weights of a shape of `fedit bench` in place of the model's")
    parser.add_argument("--data", default="builtin:pasture")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--rows", type=int, default=150, help="of each client")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--attention", default="sdpa", help="of the Trainer: sdpa (its default) or eager")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", choices=WAYS, help=argparse.SUPPRESS)
    parser.set_defaults(rounds=1)
    return parser.parse_args()


def measure(way: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Prepare, train one round once unmeasured on a few rows, then measured on all."""
    import torch

    from fedit.base import load_base, resolve_device
    from fedit.bench import load_shape

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    config, clients = load_rows(arguments)
    device = resolve_device(arguments.device)
    shape = arguments.shape
    base = load_shape(shape, arguments.dtype, device) if shape else load_base(config.model, device)
    if way != "fedit":
        base.set_attn_implementation(arguments.attention)
        base.train()
    run = {"fedit": run_fedit, "central": run_central, "sequential": run_sequential}[way]
    few = {name: rows[: arguments.batch_size] for name, rows in clients.items()}
    round_of = run(config, base)
    round_of(dict(list(few.items())[:2]))
    wall, cpu = time.perf_counter(), time.process_time()
    round_of(clients)
    if device.type == "cuda":
        torch.cuda.synchronize()
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "tokens": sum(len(row) for rows in clients.values() for row in rows),
        "peak_memory_bytes": torch.cuda.max_memory_allocated()
        if device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
    }


def load_rows(arguments: argparse.Namespace):
    """Return the configuration and the first rows of each client, encoded."""
    from fedit.config import load_config
    from fedit.prepare import prepare_data

    overrides = [
        f"model.path={arguments.model}",
        f"model.dtype={arguments.dtype}",
        f"data.path={arguments.data}",
        f"data.max_length={arguments.max_length}",
        f"partition.num_clients={arguments.clients}",
        f"adapter.rank={arguments.rank}",
        f"adapter.alpha={2 * arguments.rank}",
        "client.local_steps=none",
        "client.local_epochs=1",
        "client.moments=reset",
        "server_optimizer.learning_rate=1",
        f"client.batch_size={arguments.batch_size}",
        f"engine.device={arguments.device}",
        f"rounds={arguments.rounds}",
    ]
    config = load_config("default", overrides)
    return config, {name: list(rows)[: arguments.rows] for name, rows in prepare_data(config).clients.items()}


def run_fedit(config, base):
    import tempfile

    from fedit.base import load_tokenizer
    from fedit.engines.client_store import ClientStore
    from fedit.engines.simulation import Simulation
    from fedit.interfaces import derive_rng
    from fedit.memory import fit_memory
    from fedit.model import StackedModel
    from fedit.server import ServerState, run_round

    model = StackedModel(base, load_tokenizer(config.model.path), config.adapter)
    initial = model.fresh_adapter(derive_rng(0, "adapter"))
    store = ClientStore(Path(tempfile.mkdtemp()))

    def round_of(clients):
        fit_memory(model, config.engine, config.client, list(clients.values()))
        return run_round(config, Simulation(config, model, clients, store), ServerState(0, initial))

    return round_of


def run_central(config, base):
    model = with_lora(config, base)
    return lambda clients: train(config, model, [row for rows in clients.values() for row in rows])


def run_sequential(config, base):
    import torch
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    model = with_lora(config, base)
    received = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}

    def round_of(clients):
        total = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in received.items()}
        for rows in clients.values():
            set_peft_model_state_dict(model, received)
            train(config, model, rows)
            for name, tensor in get_peft_model_state_dict(model).items():
                total[name] += tensor.double() * len(rows) / sum(map(len, clients.values()))
        return total

    return round_of


def with_lora(config, base):
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=config.adapter.rank, lora_alpha=int(config.adapter.alpha), target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(base, lora)


def train(config, model, rows) -> None:
    """One pass over `rows` with a fresh Trainer."""
    import tempfile

    import torch
    from transformers import Trainer, TrainingArguments

    dataset = [
        {
            "input_ids": row.input_ids.tolist(),
            "labels": [int(i) if s else -100 for i, s in zip(row.input_ids, row.supervised, strict=True)],
            "length": len(row),
        }
        for row in rows
    ]

    def collate(batch):
        length = max(len(item["input_ids"]) for item in batch)
        pad = lambda values, filler: values + [filler] * (length - len(values))
        return {
            "input_ids": torch.tensor([pad(item["input_ids"], 0) for item in batch]),
            "labels": torch.tensor([pad(item["labels"], -100) for item in batch]),
            "attention_mask": torch.tensor([pad([1] * len(item["input_ids"]), 0) for item in batch]),
        }

    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=config.client.batch_size,
        num_train_epochs=1,
        learning_rate=config.client.learning_rate,
        max_grad_norm=config.client.clip_norm,
        train_sampling_strategy="group_by_length",
        bf16=config.model.dtype == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    Trainer(model, arguments, train_dataset=dataset, data_collator=collate).train()


if __name__ == "__main__":
    main()
