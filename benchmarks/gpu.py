"""What has to be seen on a GPU: correctness, speed against Trainer and PEFT, what limits it, quantised bases.

    python benchmarks/gpu.py STEP... [--shape llama-1b] [--rows 32] [--output results.jsonl]

Steps, each of which can be run alone; every result is a line of JSON, written as soon as it is known:

- machine: versions, what plain bfloat16 products and copies reach here, which attention packed rows get;
- parity: clients tuned together against PEFT and torch's AdamW one by one, float32 on the device; 1, 3 and 8 slots;
  flash attention and the fused adapter products against the plain ones;
- versus: one federated round of 16 clients on a shape of random weights, against one Trainer on all rows (A) and a
  fresh Trainer for each client (B), in turn in one process on the same weights;
- profile: the kernels of a federated round, and how long the GPU was busy;
- lora: the adapters' products for a ragged batch of many clients, in four ways;
- quantised: NF4 and int8 bases, loaded from a folder: parity with PEFT, falling loss, a federated round;
- clients: the same rows at few and at very many clients, and where the time of each client goes.
"""

from __future__ import annotations

import argparse
import copy
import cProfile
import functools
import gc
import json
import logging
import math
import pstats
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import versus_trainer
from torch import Tensor, nn

from fedit import attention, lora
from fedit.base import load_base, load_tokenizer, resolve_device
from fedit.bench import Workload, load_shape, make_clients, model_flops, peak_flops
from fedit.config import AdapterConfig, ClientConfig, ModelConfig, RunConfig, load_config
from fedit.engines.client_store import ClientStore
from fedit.engines.simulation import Simulation
from fedit.head import FrozenHeadLoss
from fedit.interfaces import Adapter, EncodedExample, derive_rng
from fedit.memory import fit_memory
from fedit.model import StackedModel
from fedit.server import RoundRecord, ServerState, run_round
from fedit.tuning import TuningTask, batch_indices, tune

Clients = Mapping[str, Sequence[EncodedExample]]


def main() -> None:
    arguments = parse_arguments()
    device = resolve_device(arguments.device)
    torch.backends.cuda.matmul.allow_tf32 = False
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for name in arguments.steps:
        try:
            STEPS[name](Report(name, arguments.output, time.perf_counter()), arguments, device)
        except Exception as error:
            Report(name, arguments.output, time.perf_counter())(error=f"{type(error).__name__}: {error}"[:2000])
            if arguments.fail:
                raise


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="+", choices=STEPS)
    parser.add_argument("--output", type=Path, help="file to add the lines to; they are printed in any case")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--shape", default="llama-1b", help="of `fedit bench`")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--rows", type=int, default=16, help="of each client; of all together in the step clients")
    parser.add_argument("--length", type=int, default=100, help="median tokens of a row")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--counts", default="10,1000", help="of clients in the step clients")
    parser.add_argument("--formats", default="nf4,int8", help="of the step quantised")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="of the step quantised")
    parser.add_argument("--fail", action="store_true", help="end with the first step that fails")
    return parser.parse_args()


class Report:
    """Prints the findings of a step and adds them to a file, a line each."""

    def __init__(self, step: str, output: Path | None, started: float) -> None:
        self._step, self._output, self._started = step, output, started

    def __call__(self, **findings: Any) -> None:
        after = round(time.perf_counter() - self._started, 1)
        line = json.dumps({"step": self._step, "after_s": after, **findings}, default=str)
        print(line, flush=True)
        if self._output is not None:
            with self._output.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


def forget(device: torch.device) -> None:
    """Give back the memory of what was run before, and begin to watch the peak."""
    gc.collect()
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_ms(device: torch.device, run: Callable[[], object], repetitions: int = 10) -> float:
    """Return the milliseconds of `run`, the median after three calls that do not count."""
    times = []
    for _ in range(repetitions + 3):
        synchronize(device)
        started = time.perf_counter()
        run()
        synchronize(device)
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times[3:])


def run_config(arguments: argparse.Namespace, **more: str) -> RunConfig:
    return load_config(
        "default",
        [
            "model.path=builtin:cria",
            "model.dtype=bfloat16",
            f"adapter.rank={arguments.rank}",
            f"adapter.alpha={2 * arguments.rank}",
            "client.local_steps=none",
            "client.local_epochs=1",
            "client.moments=reset",
            "client.learning_rate=1e-3",
            "server_optimizer.learning_rate=1",
            f"client.batch_size={arguments.batch_size}",
            f"engine.device={arguments.device}",
            "rounds=1",
            *(f"{name.replace('__', '.')}={value}" for name, value in more.items()),
        ],
    )


def workload(arguments: argparse.Namespace, base: nn.Module, clients: int, rows: int) -> Clients:
    made = Workload(clients=clients, rows=rows, length=arguments.length, max_length=arguments.max_length)
    return {f"client {i}": client for i, client in enumerate(make_clients(made, base.config.vocab_size))}


def federated_round(
    config: RunConfig, model: StackedModel, clients: Clients, start: Adapter | None = None
) -> tuple[Adapter, RoundRecord]:
    start = model.fresh_adapter(derive_rng(0, "adapter")) if start is None else start
    with tempfile.TemporaryDirectory() as folder:
        engine = Simulation(config, model, clients, ClientStore(Path(folder)))
        state, record = run_round(config, engine, ServerState(0, start))
    return state.adapter, record


# --------------------------------------------------------------------------------------------------------- machine


def machine(report: Report, _arguments: argparse.Namespace, device: torch.device) -> None:
    """Versions, the rates of plain products and copies, and what packed rows are attended to with."""
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "python": sys.version.split()[0]}
    report(device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu", **versions)
    source = torch.randn(2**28 if device.type == "cuda" else 2**22, device=device)
    target = torch.empty_like(source)
    ms = median_ms(device, functools.partial(target.copy_, source))
    report(copy_gb_per_s=2 * 4 * source.numel() / ms / 1e6)
    del source, target
    report(bf16_tflops=peak_flops(device, torch.bfloat16) / 1e12)
    found = attention._varlen_attention()
    report(varlen_attention=found is not None, varlen_gqa=found is not None and found[1])


# ---------------------------------------------------------------------------------------------------------- parity


def parity(report: Report, arguments: argparse.Namespace, device: torch.device) -> None:
    """Tuning in float32 on the device against PEFT, slot counts against each other, fast paths against plain ones."""
    base = load_shape("llama-3m", "float32", device)
    plain = copy.deepcopy(base)
    model = StackedModel(base, load_tokenizer("builtin:cria"), AdapterConfig(rank=8, alpha=16))
    report(longest_packed=model.longest_packed, dtype="float32")
    clients = workload(arguments, base, 8, 10)
    config = ClientConfig(local_steps=4, batch_size=4, learning_rate=5e-4, schedule="linear", clip_norm=0.5)
    tasks = [
        TuningTask(name, rows[: 3 + index], trained_adapter(model, index), 0, 4, 4, index)
        for index, (name, rows) in enumerate(clients.items())
    ]
    by_slots = {}
    for num_slots in (1, 3, 8):
        results = tune(model, tasks, config, num_slots)
        by_slots[num_slots] = {result.task.name: result.adapter.tensors for result in results}
    for num_slots in (3, 8):
        errors = [distance(by_slots[num_slots][task.name], by_slots[1][task.name]) for task in tasks]
        report(slots=num_slots, against_one_slot=max(errors), ok=max(errors) < 1e-4)
    errors = [
        distance(by_slots[8][task.name], peft_client(plain, task, config, device, torch.float32)) for task in tasks
    ]
    report(against_peft=max(errors), ok=max(errors) < 1e-4)
    fast_paths(report, device)
    check_head(report, device)
    for shape in ("llama-3m", "llama-135m"):
        base = load_shape(shape, "bfloat16", device)
        model = StackedModel(base, load_tokenizer("builtin:cria"), AdapterConfig(rank=8, alpha=16))
        report(shape=shape, longest_packed=model.longest_packed, dtype="bfloat16")
        del base, model


def check_head(report: Report, device: torch.device) -> None:
    """The head's loss in chunks against torch's, and the gradient, at a large vocabulary."""
    torch.manual_seed(0)
    tokens, width, vocabulary = (3000, 256, 128256) if device.type == "cuda" else (30, 32, 5000)
    weight = torch.randn(vocabulary, width, device=device) / width**0.5
    hidden = torch.randn(tokens, width, device=device)
    targets = torch.randint(vocabulary, (tokens,), device=device)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        given = hidden.detach().to(dtype).requires_grad_()
        losses = FrozenHeadLoss.apply(given, weight.to(dtype), None, targets)
        losses.sum().backward()
        found.append([losses.detach(), given.grad])
    given = hidden.detach().requires_grad_()
    losses = nn.functional.cross_entropy(given @ weight.T, targets, reduction="none")
    losses.sum().backward()
    for dtype, tolerance, got in zip(("float32", "bfloat16"), (1e-4, 2e-2), found, strict=True):
        pairs = zip(got, (losses.detach(), given.grad), strict=True)
        errors = [float((p.double() - q.double()).norm() / q.double().norm()) for p, q in pairs]
        report(head=vocabulary, dtype=dtype, errors=errors, ok=max(errors) < tolerance)


def trained_adapter(model: StackedModel, seed: int) -> Adapter:
    """An adapter whose B are not zero."""
    adapter, rng = model.fresh_adapter(derive_rng(seed, "adapter")), np.random.default_rng(seed)
    tensors = {
        name: torch.from_numpy(rng.normal(0, 0.02, tensor.shape)).float() if "lora_B" in name else tensor
        for name, tensor in adapter.tensors.items()
    }
    return adapter.with_tensors(tensors)


def distance(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Return the relative error over all tensors."""
    squares = [
        (((got[name].cpu().double() - tensor.cpu().double()) ** 2).sum(), (tensor.double() ** 2).sum().cpu())
        for name, tensor in expected.items()
    ]
    return math.sqrt(sum(float(error) for error, _ in squares) / sum(float(size) for _, size in squares))


def padded_loss(model: nn.Module, rows: Sequence[EncodedExample], device: torch.device) -> Tensor:
    """The mean loss per response token of one padded batch, by transformers."""
    length = max(len(row) for row in rows)
    ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.long)
    labels = torch.full((len(rows), length), -100)
    for i, row in enumerate(rows):
        own = torch.from_numpy(row.input_ids.astype(np.int64))
        ids[i, : len(row)], mask[i, : len(row)] = own, 1
        labels[i, : len(row)] = torch.where(torch.from_numpy(row.supervised), own, torch.tensor(-100))
    return model(input_ids=ids.to(device), attention_mask=mask.to(device), labels=labels.to(device)).loss


def peft_of(base: nn.Module, adapter: Adapter, dtype: torch.dtype | None) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """Return `base` (which is changed) with an adapter in PEFT, and its tensors by their names here."""
    from peft import LoraConfig, get_peft_model

    base.set_attn_implementation("sdpa")
    targets = {"r": adapter.rank, "lora_alpha": int(adapter.lora_alpha), "target_modules": "all-linear"}
    model = get_peft_model(base, LoraConfig(**targets, task_type="CAUSAL_LM"))
    trained = {
        name.removeprefix("base_model.model.").replace(".default", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    with torch.no_grad():
        for name, parameter in trained.items():
            if dtype is not None:
                parameter.data = parameter.data.to(dtype)
            parameter.copy_(adapter.tensors[name])
    return model, trained


def peft_client(
    plain: nn.Module, task: TuningTask, config: ClientConfig, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return a task's adapter after PEFT and torch tuned it alone."""
    model, trained = peft_of(copy.deepcopy(plain), task.adapter, dtype)
    optimizer = torch.optim.AdamW(trained.values(), lr=config.learning_rate, weight_decay=config.weight_decay)
    for step in range(task.num_steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * (1 - step / task.total_steps)
        chosen = batch_indices(len(task.examples), config.batch_size, step, task.seed)
        optimizer.zero_grad()
        padded_loss(model, [task.examples[i] for i in chosen], device).backward()
        torch.nn.utils.clip_grad_norm_(list(trained.values()), config.clip_norm or math.inf)
        optimizer.step()
    return {name: parameter.detach().clone() for name, parameter in trained.items()}


def fast_paths(report: Report, device: torch.device) -> None:
    """Flash attention on packed rows, and one node for both products, against float64 and the plain ways."""
    torch.manual_seed(0)
    lengths, heads, shared, width = [70, 1, 300, 17, 512], 8, 2, 64
    starts = [0, 70, 80, 380, 400]
    rows = attention.PackedRows(starts, lengths, 920, device)
    inputs = [torch.randn(1, count, 920, width, device=device) for count in (heads, shared, shared)]
    real = torch.cat([torch.arange(start, start + length) for start, length in zip(starts, lengths, strict=True)])
    upstream = torch.zeros(1, 920, heads, width, device=device)
    upstream[:, real] = torch.randn(1, len(real), heads, width, device=device)

    def results(attend: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        given = [x.detach().to(dtype).requires_grad_() for x in inputs]
        output = attend(*given)
        output.backward(upstream.to(dtype))
        return [output.detach()[:, real], *(x.grad[:, :, real] for x in given if x.grad is not None)]

    grouped = lambda q, k, v: attention._attend_packed(q, k, v, width**-0.5, rows.groups)
    flash = lambda q, k, v: attention._attend_flash(q, k, v, width**-0.5, *rows.bounds)
    exact = results(grouped, torch.float32)
    ways = {"groups": grouped} | ({"flash": flash} if attention._has_flash(inputs[0].bfloat16(), inputs[2]) else {})
    for name, attend in ways.items():
        got = results(attend, torch.bfloat16)
        errors = [float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(got, exact, strict=True)]
        report(attention=name, errors=errors, ok=max(errors) < 2e-2)

    base = nn.Linear(256, 512, bias=False, device=device).requires_grad_(False)
    slots = [0, 0, 2, 3, 3, 3, 1]
    a, b = (torch.randn(4, *shape, device=device) / 16 for shape in ((8, 256), (512, 8)))
    x, of_output = torch.randn(1, 7 * 32, 256, device=device), torch.randn(1, 7 * 32, 512, device=device)

    def layer_results(fused: set[str], dtype: torch.dtype) -> list[Tensor]:
        lora.FUSED_ON = fused
        routing = lora.Routing(lora.Pieces.of(slots, slots, 4, device), num_tokens=7 * 32)
        layer = lora.StackedLora("layer", copy.deepcopy(base).to(dtype), routing, 0.0)
        layer.lora_A, layer.lora_B = nn.Parameter(a.to(dtype)), nn.Parameter(b.to(dtype))
        layer.gradient_A, layer.gradient_B = torch.zeros_like(a), torch.zeros_like(b)
        given = x.detach().to(dtype).requires_grad_()
        output = layer(given)
        output.backward(of_output.to(dtype))
        assert given.grad is not None
        return [output.detach(), given.grad, layer.gradient_A, layer.gradient_B]

    before = lora.FUSED_ON
    exact = layer_results(set(), torch.float32)
    cases = [(set[str](), torch.bfloat16), ({device.type}, torch.float32), ({device.type}, torch.bfloat16)]
    for fused, dtype in cases:
        got = layer_results(fused, dtype)
        errors = [float((p.double() - q.double()).norm() / q.double().norm()) for p, q in zip(got, exact, strict=True)]
        report(adapted_layer="fused" if fused else "plain", dtype=str(dtype), errors=errors, ok=max(errors) < 2e-2)
    lora.FUSED_ON = before


# ---------------------------------------------------------------------------------------------- versus and profile


def versus(report: Report, arguments: argparse.Namespace, device: torch.device) -> None:
    """fedit, A and B in turn, then the profile of a round of fedit, if it is asked for too."""
    config = run_config(arguments)
    base = load_shape(arguments.shape, "bfloat16", device)
    synchronize(device)
    report(shape=arguments.shape, parameters=sum(p.numel() for p in base.parameters()), loaded=True)
    # The same weights under PEFT: the structure is copied, the tensors are not.
    tensors = [*base.parameters(), *base.buffers()]
    other = copy.deepcopy(base, {id(tensor): tensor for tensor in tensors})
    clients = workload(arguments, base, arguments.clients, arguments.rows)
    tokens = sum(len(row) for rows in clients.values() for row in rows)
    model = StackedModel(base, load_tokenizer("builtin:cria"), config.adapter)
    started = time.perf_counter()
    fit_memory(model, config.engine, config.client, list(clients.values()))
    report(
        fit_memory_s=time.perf_counter() - started,
        max_slots=model.max_slots,
        batch_tokens=model.batch_tokens,
        checkpointing=model.checkpointing,
        longest_packed=model.longest_packed,
        slot_bytes=model.slot_bytes,
    )
    peak = peak_flops(device, torch.bfloat16)
    flops = model_flops(model, list(clients.values()))

    def of_fedit(some: Clients) -> None:
        _, record = federated_round(config, model, some)
        model.allocate(1, ())
        report(aggregation_s=record.aggregation_s)

    tuned = tune_only(config, model)
    other.set_attn_implementation("sdpa")
    other.train()
    ways: dict[str, Callable[[Clients], object]] = {"fedit": of_fedit, "fedit, tuning alone": tuned}
    if "profile" not in arguments.steps or len(arguments.steps) > 1:
        trainers = versus_trainer.run_sequential(config, other)
        # One PEFT model does for both: A goes on from wherever B left it, which costs the same.
        peft = next(cell.cell_contents for cell in trainers.__closure__ if isinstance(cell.cell_contents, nn.Module))
        ways["A: central"] = lambda some: versus_trainer.train(
            config, peft, [r for rows in some.values() for r in rows]
        )
        ways["B: sequential"] = trainers
    few = {name: rows[: arguments.batch_size] for name, rows in list(clients.items())[:2]}
    seconds = defaultdict[str, list[float]](list)
    for repetition in range(arguments.repetitions + 1):
        for way, run in ways.items():
            forget(device)
            cpu, wall = time.process_time(), time.perf_counter()
            # Unmeasured first: fedit a whole round, whose memory is taken and shapes are met then; a Trainer two steps.
            run(clients if repetition or way.startswith("fedit") else few)
            synchronize(device)
            taken = time.perf_counter() - wall
            if not repetition:
                report(way=way, warm_up_s=taken)
                continue
            seconds[way].append(taken)
            memory = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
            report(
                way=way,
                repetition=repetition,
                seconds=taken,
                cpu_seconds=time.process_time() - cpu,
                tokens=tokens,
                tokens_per_s=tokens / taken,
                model_tflops=flops / taken / 1e12,
                utilisation=flops / taken / peak,
                peak_memory_gb=memory,
            )
    medians = {way: statistics.median(values) for way, values in seconds.items()}
    report(
        shape=arguments.shape,
        clients=arguments.clients,
        rows=arguments.rows,
        tokens=tokens,
        peak_tflops=peak / 1e12,
        padding=1 - tokens * (2 * arguments.repetitions + 2) / max(1, model.processed_tokens),
        seconds=medians,
        tokens_per_s={way: tokens / value for way, value in medians.items()},
        utilisation={way: flops / value / peak for way, value in medians.items()},
        times_fedit={way: value / medians["fedit"] for way, value in medians.items()},
    )
    if "profile" in arguments.steps:
        profile(report, model, tuned, clients, medians["fedit, tuning alone"], device)


def tune_only(config: RunConfig, model: StackedModel) -> Callable[[Clients], None]:
    def run(clients: Clients) -> None:
        start = model.fresh_adapter(derive_rng(0, "adapter"))
        steps = {name: config.client.num_steps(len(rows)) for name, rows in clients.items()}
        tasks = [TuningTask(name, rows, start, 0, steps[name], steps[name], 0) for name, rows in clients.items()]
        for _ in tune(model, tasks, config.client, min(len(tasks), model.max_slots), keep_moments=False):
            pass
        model.allocate(1, ())

    return run


def profile(
    report: Report,
    model: StackedModel,
    run: Callable[[Clients], None],
    clients: Clients,
    unprofiled_s: float,
    device: torch.device,
) -> None:
    """The kernels of the tuning of one round by the time they took, and how long any of them ran."""
    from torch.profiler import ProfilerActivity

    activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    before = model.processed_tokens
    with torch.profiler.profile(activities=[activity]) as profiler:
        started = time.perf_counter()
        run(clients)
        synchronize(device)
        wall = time.perf_counter() - started
    name_of_time = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    averages = sorted(profiler.key_averages(), key=lambda each: -getattr(each, name_of_time))
    total = sum(getattr(each, name_of_time) for each in averages) / 1e6
    report(
        profiled_wall_s=wall,
        unprofiled_wall_s=unprofiled_s,
        kernels_s=total,
        busy_share=total / unprofiled_s,
        num_kernels=sum(each.count for each in averages),
        processed_tokens=model.processed_tokens - before,
    )
    for each in averages[:20]:
        own = getattr(each, name_of_time) / 1e6
        report(kernel=each.key[:160], ms=round(1e3 * own, 2), share=round(own / total, 4), count=each.count)
    kinds = defaultdict[str, float](float)
    for each in averages:
        kinds[kernel_kind(each.key)] += getattr(each, name_of_time) / 1e6 / total
    report(kinds=dict(sorted(kinds.items(), key=lambda item: -item[1])))


def kernel_kind(name: str) -> str:
    """Return a word for what a kernel is, by its name."""
    words = {
        "flash": "attention",
        "fmha": "attention",
        "softmax": "softmax",
        "EmbeddingBag": "sums of pieces",
        "gemm": "product",
        "nvjet": "product",
        "cutlass": "product",
        "gemv": "product",
        "mm": "product",
        "splitK": "product",
        "Memcpy": "copy",
        "Memset": "copy",
        "index": "index",
        "reduce": "reduction",
        "Cat": "concatenation",
        "elementwise": "elementwise",
    }
    return next((kind for word, kind in words.items() if word.lower() in name.lower()), "other")


def profile_alone(report: Report, arguments: argparse.Namespace, device: torch.device) -> None:
    """Beside `versus` its profile is taken there; alone, with no Trainers around it."""
    if "versus" not in arguments.steps:
        versus(report, arguments, device)


# ------------------------------------------------------------------------------------------------------------ lora


def lora_products(report: Report, arguments: argparse.Namespace, device: torch.device) -> None:
    """Forward and backward of the adapters of one layer, ragged slots, in four ways, beside the frozen product's."""
    on_gpu = device.type == "cuda"
    for tokens in (4096, 8192, 16384) if on_gpu else (2048,):
        for n, m in ((4096, 4096), (4096, 11008), (11008, 4096)) if on_gpu else ((128, 256),):
            for num_slots, piece in ((4, 64), (16, 64), (16, 32)):
                one_layer(report, tokens, n, m, num_slots, piece, arguments.rank, device)


def one_layer(  # noqa: PLR0915 (four ways beside each other)
    report: Report, tokens: int, n: int, m: int, num_slots: int, piece: int, rank: int, device: torch.device
) -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    pieces_of_slot = rng.multinomial(tokens // piece - num_slots, rng.dirichlet(np.full(num_slots, 5.0))) + 1
    slots = np.repeat(np.arange(num_slots), pieces_of_slot)
    make = lambda *shape: torch.randn(*shape, device=device, dtype=torch.bfloat16)
    x, of_output, weight = make(tokens, n), make(tokens, m), make(m, n) / n**0.5
    a, b = make(num_slots, rank, n) / n**0.5, make(num_slots, m, rank)
    output, of_x = make(tokens, m), make(tokens, n)
    into_a, into_b = torch.zeros_like(a, dtype=torch.float32), torch.zeros_like(b, dtype=torch.float32)
    pieces = lora.Pieces.of(slots.tolist(), slots.tolist(), num_slots, device)
    ends = torch.from_numpy(np.cumsum(pieces_of_slot * piece).astype(np.int32)).to(device)
    slot_of_token = torch.from_numpy(np.repeat(slots, piece)).to(device)
    own = slot_of_token[:, None] == torch.arange(num_slots, device=device).repeat_interleave(rank)[None]

    def frozen() -> Tensor:
        return (x @ weight.T)[0, 0] + (of_output @ weight)[0, 0]

    def by_pieces() -> tuple[Tensor, ...]:
        xs, outs, gs, of_xs = (t.view(len(slots), piece, -1) for t in (x, output, of_output, of_x))
        at, bt = pieces.take(a), pieces.take(b)
        inner = xs @ at.mT
        outs.baddbmm_(inner, bt.mT)
        of_inner = gs @ bt
        pieces.add(of_inner.mT @ xs, into_a)
        pieces.add(gs.mT @ inner, into_b)
        of_xs.baddbmm_(of_inner, at)
        return inner.view(tokens, rank), of_inner.view(tokens, rank)

    def by_pieces_with_copies() -> None:
        xs, outs, gs = (t.view(len(slots), piece, -1) for t in (x, output, of_output))
        at, bt = pieces.take(a), pieces.take(b)
        inner = xs @ at.mT
        torch.baddbmm(outs, inner, bt.mT)
        of_inner = gs @ bt
        pieces.add(of_inner.mT @ xs, into_a)
        pieces.add(gs.mT @ inner, into_b)
        of_x.add_((of_inner @ at).view(tokens, n))

    def by_grouped_mm() -> tuple[Tensor, ...]:
        grouped = torch.nn.functional.grouped_mm
        inner = grouped(x, a.mT, offs=ends)
        output.add_(grouped(inner, b.mT, offs=ends))
        of_inner = grouped(of_output, b, offs=ends)
        into_a.add_(grouped(of_inner.T, x, offs=ends))
        into_b.add_(grouped(of_output.T, inner, offs=ends))
        of_x.add_(grouped(of_inner, a, offs=ends))
        return inner, of_inner

    def by_one_product() -> tuple[Tensor, ...]:
        """All slots' factors side by side, a token's products with others' set to zero: spreads what is not finite."""
        all_a, all_b = a.view(-1, n), b.transpose(0, 1).reshape(m, -1)
        inner = (x @ all_a.T).mul_(own)
        output.addmm_(inner, all_b.T)
        of_inner = (of_output @ all_b).mul_(own)
        into_a.add_((of_inner.T @ x).view_as(into_a))
        into_b.add_((of_output.T @ inner).view(m, num_slots, rank).transpose(0, 1))
        of_x.addmm_(of_inner, all_a)
        return inner, of_inner

    ways = {
        "pieces": by_pieces,
        "pieces, with copies": by_pieces_with_copies,
        "grouped_mm": by_grouped_mm,
        "one product": by_one_product,
    }
    shape = {"tokens": tokens, "n": n, "m": m, "slots": num_slots, "piece": piece}
    times: dict[str, Any] = {}
    repetitions = 10 if device.type == "cuda" else 2
    expected: tuple[Tensor, ...] | None = None
    for name, way in ways.items():
        try:
            got = way()
            if expected is None:
                expected = got
            elif got is not None:
                # Of one product, each token's own columns.
                got = [each if each.shape[1] == rank else each[own].view(tokens, rank) for each in got]
                errors = [float((p - q).float().norm() / q.float().norm()) for p, q in zip(got, expected, strict=True)]
                times[f"{name}, error"] = max(errors)
            times[name] = median_ms(device, way, repetitions)
        except (RuntimeError, AttributeError) as error:
            times[name] = f"{type(error).__name__}: {error}"[:200]
    # Each of x, the output and their gradients that is read or written once: what a node of its own cannot go below.
    bytes_moved = 2 * tokens * (4 * n + 4 * m)
    report(**shape, ms=times, frozen_ms=median_ms(device, frozen, repetitions), gigabytes=bytes_moved / 1e9)


# ------------------------------------------------------------------------------------------------------- quantised


def quantised(report: Report, arguments: argparse.Namespace, device: torch.device) -> None:
    """Load, tune and aggregate on NF4 and int8 bases; one gradient against PEFT's on the same base."""
    with tempfile.TemporaryDirectory() as folder:
        load_shape(arguments.shape, "bfloat16", device).save_pretrained(folder)
        load_tokenizer("builtin:cria").save_pretrained(folder)
        for quantization in arguments.formats.split(","):
            for dtype in arguments.dtypes.split(","):
                try:
                    one_quantised(report, arguments, device, folder, quantization, dtype)
                except Exception as error:  # noqa: BLE001 (the others are worth having)
                    report(quantization=quantization, dtype=dtype, error=f"{type(error).__name__}: {error}"[:1500])


def one_quantised(
    report: Report, arguments: argparse.Namespace, device: torch.device, folder: str, quantization: str, dtype: str
) -> None:
    forget(device)
    of_model = ModelConfig.model_validate({"path": folder, "quantization": quantization, "dtype": dtype})
    started = time.perf_counter()
    base = load_base(of_model, device)
    synchronize(device)
    named = {"quantization": quantization, "dtype": dtype, "shape": arguments.shape}
    weights = sum(p.numel() * p.element_size() for p in base.parameters())
    report(**named, load_s=time.perf_counter() - started, weights_gb=weights / 1e9)
    config = run_config(arguments, model__path=folder, model__dtype=dtype, model__quantization=quantization)
    model = StackedModel(base, load_tokenizer("builtin:cria"), config.adapter)
    clients = workload(arguments, base, 4, 8)
    fit_memory(model, config.engine, config.client, list(clients.values()))
    report(**named, longest_packed=model.longest_packed, batch_tokens=model.batch_tokens)

    rows, adapter = clients["client 0"], trained_adapter(model, 0)
    model.allocate(1)
    model.write(0, adapter)
    loss_sum, supervised = 0.0, sum(row.num_supervised for row in rows)
    for _, batch in model.batches(rows, [0] * len(rows)):
        losses, _ = model.token_losses(batch)
        (losses.sum() / supervised).backward()
        loss_sum += float(losses.detach().double().sum()) / supervised
    flat = model.take_gradients()
    gradients = {}
    for layer, (of_a, of_b) in model.views(flat):
        gradients[f"{layer.name}.lora_A.weight"] = of_a[0].clone()
        gradients[f"{layer.name}.lora_B.weight"] = of_b[0].clone()
    model.allocate(1, ())

    start, losses_of_rounds = model.fresh_adapter(derive_rng(0, "adapter")), list[float]()
    began = time.perf_counter()
    for _ in range(4):
        start, record = federated_round(config, model, clients, start)
        losses_of_rounds.append(record.train_loss)
    synchronize(device)
    tokens = 4 * sum(len(row) for rows in clients.values() for row in rows)
    report(
        **named,
        losses=losses_of_rounds,
        ok=all(map(math.isfinite, losses_of_rounds)) and losses_of_rounds[-1] < losses_of_rounds[0],
        tokens_per_s=tokens / (time.perf_counter() - began),
        peak_memory_gb=torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None,
    )
    # Afterwards, for PEFT puts its layers into a base loaded anew, in which only the weights are the same.
    del model, base
    plain, trained = peft_of(load_base(of_model, device), adapter, None)
    loss = padded_loss(plain, rows, device)
    loss.backward()
    theirs = {name: parameter.grad for name, parameter in trained.items() if parameter.grad is not None}
    tolerance = {("nf4", "float32"): 1e-3}.get((quantization, dtype), 0.1)
    error = distance(gradients, theirs)
    report(**named, loss=loss_sum, loss_of_peft=float(loss), gradient_error=error, ok=error < tolerance)


# --------------------------------------------------------------------------------------------------------- clients


def many_clients(report: Report, arguments: argparse.Namespace, device: torch.device) -> None:
    """The same rows at few and at many clients, a round each; and which functions the many cost."""
    config = run_config(arguments)
    base = load_shape(arguments.shape, "bfloat16", device)
    model = StackedModel(base, load_tokenizer("builtin:cria"), config.adapter)
    (rows,) = workload(arguments, base, 1, arguments.rows).values()
    tokens = sum(len(row) for row in rows)
    counts = [int(count) for count in arguments.counts.split(",")]

    def share(count: int) -> Clients:
        each = len(rows) // count
        return {f"client {i}": rows[i * each : (i + 1) * each] for i in range(count)}

    some = min(100, counts[-1])
    clients = dict(list(share(counts[-1]).items())[:some])
    fit_memory(model, config.engine, config.client, list(clients.values()))
    federated_round(config, model, clients)  # not counted
    profiler = cProfile.Profile()
    profiler.runcall(federated_round, config, model, clients)
    statistic = pstats.Stats(profiler).stats  # pyright: ignore[reportAttributeAccessIssue]
    by_own = sorted(statistic.items(), key=lambda item: -item[1][2])[:15]
    of_fedit = [item for item in statistic.items() if "/fedit/" in item[0][0]]
    by_total = sorted(of_fedit, key=lambda item: -item[1][3])[:25]
    for title, items in (("own", by_own), ("total", by_total)):
        functions = {
            f"{Path(file).name}:{line} {name}": [calls, round(1e3 * own, 1), round(1e3 * total, 1)]
            for (file, line, name), (_, calls, own, total, _) in items
        }
        report(profiled_clients=some, functions_by=title, calls_own_ms_total_ms=functions)
    for count in counts:
        clients = share(count)
        fit_memory(model, config.engine, config.client, list(clients.values()))
        synchronize(device)
        cpu, wall = time.process_time(), time.perf_counter()
        federated_round(config, model, clients)
        synchronize(device)
        taken, cpu = time.perf_counter() - wall, time.process_time() - cpu
        wall = time.perf_counter()
        tune_only(config, model)(clients)
        synchronize(device)
        tuning = time.perf_counter() - wall
        times = {"seconds": taken, "cpu_seconds": cpu, "tuning_alone_s": tuning, "tokens_per_s": tokens / taken}
        report(shape=arguments.shape, clients=count, rows=len(rows) // count, tokens=tokens, **times)


STEPS: dict[str, Callable[[Report, argparse.Namespace, torch.device], None]] = {
    "machine": machine,
    "parity": parity,
    "versus": versus,
    "profile": profile_alone,
    "lora": lora_products,
    "quantised": quantised,
    "clients": many_clients,
}

if __name__ == "__main__":
    main()
