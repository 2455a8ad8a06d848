"""How fast local tuning is on this machine: tokens, FLOPs and memory of rounds of made-up rows on any base.

Model FLOPs are counted as a frozen base needs them: 2 for each weight of the blocks and token forward and 2 backward,
the same for the head at supervised positions only, 6 for each adapter weight, and 6 d T^2 for the causal attention of
each layer over a row of T tokens. Utilisation is that, over what plain products of the same type reach here.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from fedit.base import load_base, load_tokenizer, prepare_base, resolve_device, resolve_dtype
from fedit.config import AdapterConfig, ClientConfig, DType, EngineConfig, ModelConfig
from fedit.interfaces import ConfigError, EncodedExample, Example, Turn, derive_rng, did_you_mean
from fedit.memory import fit_memory
from fedit.model import StackedModel
from fedit.report.format import size
from fedit.tuning import TuningTask, tune

SHAPES: dict[str, dict[str, int | bool]] = {
    "llama-3m": {"hidden": 192, "intermediate": 512, "layers": 6, "heads": 6, "groups": 2, "vocabulary": 4096},
    "llama-15m": {"hidden": 288, "intermediate": 768, "layers": 6, "heads": 6, "groups": 6, "vocabulary": 32000},
    "llama-135m": {"hidden": 576, "intermediate": 1536, "layers": 30, "heads": 9, "groups": 3, "vocabulary": 49152},
    "llama-1b": {"hidden": 2048, "intermediate": 8192, "layers": 16, "heads": 32, "groups": 8, "vocabulary": 128256},
    "llama-7b": {"hidden": 4096, "intermediate": 11008, "layers": 32, "heads": 32, "groups": 32, "vocabulary": 32000},
}
"""Random weights in the shape of well-known models; embeddings are tied below 7 B parameters."""


@dataclass(frozen=True)
class Workload:
    """What is tuned: clients that pass once over rows whose lengths are spread as those of instructions are."""

    clients: int = 10
    rows: int = 30
    """Of each client."""
    length: int = 100
    """Median tokens of a row; lengths are log-normal with a deviation of 0.7."""
    max_length: int = 512
    batch_size: int = 4
    rank: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"clients": 1, "rows": 1, "length": 1, "max_length": 8, "batch_size": 1, "rank": 1}
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise ConfigError(f"{name} = {getattr(self, name)}: expected at least {minimum}.")


@dataclass(frozen=True)
class Measurement:
    """Medians over the repetitions."""

    model: str
    device: str
    dtype: str
    parameters: int
    slots: int
    tokens: int
    """Of one repetition, without padding."""
    seconds: float
    cpu_seconds: float
    tokens_per_second: float
    tokens_per_cpu_second: float
    padding_fraction: float
    """Of the tokens that went through the base."""
    teraflops_per_second: float
    peak_teraflops_per_second: float
    model_flops_utilisation: float
    peak_memory_bytes: int
    """Of the process on a CPU, of the allocator on a GPU."""


def measure(
    path: str, shape: str | None, workload: Workload, slots: int | str, dtype: DType, device: str, repetitions: int
) -> Measurement:
    """Tune `workload` on the model at `path`, or on random weights of a `shape`, and return what it took.

    One repetition more than asked for is run first and not counted.

    Raises:
        ConfigError: a count is not positive, no shape has this name, or rows are longer than the model's context.
    """
    if repetitions < 1 or (isinstance(slots, int) and slots < 1):
        raise ConfigError(f"repetitions = {repetitions}, slots = {slots}: expected at least 1.")
    place = resolve_device(device)
    # The rows are made of ids, so for a shape any tokenizer will do.
    tokenizer = load_tokenizer("builtin:cria" if shape else path)
    base = load_shape(shape, dtype, place) if shape else load_base(ModelConfig(path=path, dtype=dtype), place)
    context = getattr(base.config, "max_position_embeddings", None)
    if context is not None and workload.max_length > context:
        raise ConfigError(
            f"max_length = {workload.max_length} is more than the {context} positions of {shape or path}."
        )
    model = StackedModel(base, tokenizer, AdapterConfig(rank=workload.rank, alpha=2.0 * workload.rank))
    clients = make_clients(workload, base.config.vocab_size)
    adapter = model.fresh_adapter(derive_rng(workload.seed, "adapter"))
    config = ClientConfig(local_epochs=1, batch_size=workload.batch_size)
    num_steps = config.num_steps(workload.rows)
    tasks = [
        TuningTask(f"client {index}", rows, adapter, 0, num_steps, num_steps, index)
        for index, rows in enumerate(clients)
    ]
    fit_memory(model, EngineConfig.model_validate({"slots": slots}), config, clients)
    num_slots = min(len(tasks), model.max_slots)
    seconds, cpu_seconds, tokens = [], [], 0
    for _ in range(repetitions + 1):
        model.processed_tokens = 0
        wall, cpu = time.perf_counter(), time.process_time()
        tokens = sum(result.num_tokens for result in tune(model, tasks, config, num_slots))
        if place.type == "cuda":
            torch.cuda.synchronize(place)
        seconds.append(time.perf_counter() - wall)
        cpu_seconds.append(time.process_time() - cpu)
    wall, cpu = statistics.median(seconds[1:]), statistics.median(cpu_seconds[1:])
    achieved = model_flops(model, clients) / wall / 1e12
    peak = peak_flops(place, base.dtype) / 1e12
    return Measurement(
        model=shape or path,
        device=torch.cuda.get_device_name(place) if place.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        dtype=str(base.dtype).removeprefix("torch."),
        parameters=sum(p.numel() for p in base.parameters() if not p.requires_grad),
        slots=num_slots,
        tokens=tokens,
        seconds=wall,
        cpu_seconds=cpu,
        tokens_per_second=tokens / wall,
        tokens_per_cpu_second=tokens / cpu,
        padding_fraction=1 - tokens / model.processed_tokens,
        teraflops_per_second=achieved,
        peak_teraflops_per_second=peak,
        model_flops_utilisation=achieved / peak,
        peak_memory_bytes=_peak_memory(place),
    )


def describe(measured: Measurement) -> list[tuple[str, str]]:
    """Return the lines of a table: label and value."""
    peak = f"{measured.peak_teraflops_per_second:.3g}"
    return [
        ("Base", f"{measured.model}, {measured.parameters:,} parameters, {measured.dtype}"),
        ("Device", measured.device),
        ("Clients at a time", str(measured.slots)),
        ("Tokens", f"{measured.tokens:,} in {measured.seconds:.2f} s ({measured.cpu_seconds:.2f} CPU s)"),
        ("Tokens/s", f"{measured.tokens_per_second:,.0f} ({measured.tokens_per_cpu_second:,.0f} per CPU s)"),
        ("Padding", f"{measured.padding_fraction:.1%} of the processed tokens"),
        ("Model FLOPs", f"{measured.teraflops_per_second:.3g} TFLOP/s"),
        ("Utilisation", f"{measured.model_flops_utilisation:.1%} of the {peak} TFLOP/s of plain products here"),
        ("Peak memory", size(measured.peak_memory_bytes)),
    ]


def load_shape(name: str, dtype: DType, device: torch.device) -> PreTrainedModel:
    """Return a base of random weights, made on `device` in its final type.

    Raises:
        ConfigError: no shape has this name.
    """
    if name not in SHAPES:
        raise ConfigError(f"--shape {name}: unknown. {did_you_mean(name, SHAPES)}")
    shape = SHAPES[name]
    config = LlamaConfig(
        vocab_size=int(shape["vocabulary"]),
        hidden_size=int(shape["hidden"]),
        intermediate_size=int(shape["intermediate"]),
        num_hidden_layers=int(shape["layers"]),
        num_attention_heads=int(shape["heads"]),
        num_key_value_heads=int(shape["groups"]),
        max_position_embeddings=4096,
        tie_word_embeddings=name != "llama-7b",
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(resolve_dtype(dtype, device))
    try:
        with device:
            base = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return prepare_base(base, device)


def make_clients(workload: Workload, vocabulary: int) -> list[list[EncodedExample]]:
    """Return rows of random tokens, the last 45% of each supervised (as in databricks-dolly-15k, in the mean)."""
    clients = []
    for client in range(workload.clients):
        rng = derive_rng(workload.seed, "bench", client)
        lengths = rng.lognormal(np.log(workload.length), 0.7, workload.rows).astype(int).clip(8, workload.max_length)
        rows = []
        for length in lengths:
            ids = rng.integers(3, vocabulary, length).astype(np.int32)
            rows.append(EncodedExample(ids, np.arange(length) >= round(0.55 * length), Example((Turn("", ""),))))
        clients.append(rows)
    return clients


def model_flops(model: StackedModel, clients: Sequence[Sequence[EncodedExample]]) -> float:
    """Return the model FLOPs of one pass over all rows, as the module's docstring counts them."""
    config = model.base.config
    head = config.hidden_size * config.vocab_size
    weights = sum(layer.num_inputs * layer.num_outputs for layer in model.layers)
    adapter = model.num_parameters
    width = config.num_attention_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    rows = [row for client in clients for row in client]
    tokens = sum(len(row) for row in rows)
    return (
        (4 * weights + 6 * adapter) * tokens
        + 4 * head * sum(row.num_supervised for row in rows)
        + 6 * config.num_hidden_layers * width * sum(len(row) ** 2 for row in rows)
    )


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return what a plain product of large square matrices reaches: the best of ten."""
    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        torch.mm(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
