"""Run folder -> model cards: the ``README.md`` of an exported model, as the Hugging Face Hub reads it.

A card is a function of the run's files alone, and names no path of this machine: a local model or data set is called by
the last part of its path.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from fedit.config import RunConfig, load_plugins
from fedit.data.reading import is_hub_name
from fedit.files import write_atomically
from fedit.interfaces import plugins
from fedit.report import format as formats
from fedit.report.folder import RunFolder
from fedit.report.leaks import sentences

Kind = Literal["adapter", "merged"]
UNKNOWN = "unknown"
_METRICS = {"response_loss": "loss", "exact_match": "exact_match", "rouge_l": "rouge"}
"""What the Hub calls them"""


def write_cards(run: RunFolder) -> None:
    """Write the card into the folder of every adapter that the run has exported by now."""
    own = "personal" if (run.path / "adapter").is_dir() else "federated"
    folders = {run.path / "adapter": "federated"}
    folders |= {folder: f"{own}/{unquote(folder.name)}" for folder in sorted((run.path / "adapters").glob("*"))}
    for folder, model in folders.items():
        if (folder / "adapter_config.json").is_file():
            write_card(run, model, "adapter", folder)


def write_card(run: RunFolder, model: str, kind: Kind, folder: Path, licence: str = UNKNOWN) -> None:
    """Write the card of `model` (``federated``, ``central``, ``local/<client>``, ...) into the folder that holds it."""
    write_atomically(folder / "README.md", model_card(run, model, kind, folder, licence).encode())


def model_card(run: RunFolder, model: str, kind: Kind, folder: Path, licence: str = UNKNOWN) -> str:
    """Return the card of a model whose files lie in `folder`; what is not known of it is said to be unknown."""
    run = replace(run, config={**run.config, "config": _settings(run)})
    environment = Environment(
        loader=PackageLoader("fedit", "report"),
        autoescape=False,  # Markdown
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["formats"] = formats
    template = run.run["data"]["template"]["name"]
    renders = plugins("template").get(template)
    return environment.get_template("model_card.md.j2").render(
        metadata=_metadata(run, model, kind, licence).to_yaml(),
        run=run,
        config=run.run,
        what=_what(model),
        model=model,
        kind=kind,
        title=_title(run, model),
        base=name_of(run, "model"),
        base_is_on_hub=on_hub(run, "model") is not None,
        data=name_of(run, "data"),
        licence=licence,
        categories=_categories(run),
        is_across_sites=run.is_across_sites,
        evaluated=(lines := _evaluated(run, model)),
        metrics=[name for name in formats.METRIC_LABELS if any(name in found for _, found, _ in lines)],
        template=template,
        template_says=("" if renders is None else renders.__doc__ or "").strip().partition("\n")[0],
        has_chat_template=(folder / "chat_template.jinja").is_file(),
        has_side=(folder / "side").is_dir(),
        audit=sentences(run.audit) if run.audit else [],
        rank=(rank := RunConfig.model_validate({"adapter": run.run["adapter"]}).adapter.max_rank),
        vllm_rank=formats.vllm_rank(rank),
    )


def on_hub(run: RunFolder, table: str) -> str | None:
    """Return the name on the Hub of the run's ``model`` or ``data``; None: it was a file or folder, came with fedit, or
    the rows were the sites' own. Of what an older fedit made, the form of the name decides.
    """
    path = run.run[table]["path"]
    if table == "data" and run.is_across_sites:
        return None
    noted = run.config.get("on_hub")
    return path if (noted[table] if noted else is_hub_name(path)) else None


def name_of(run: RunFolder, table: str) -> str:
    """Return the name that may be told of the run's ``model`` or ``data``: that on the Hub, or its path's last part."""
    if table == "data" and run.is_across_sites:
        return "the sites' own rows"
    return on_hub(run, table) or formats.short_name(run.run[table]["path"])


def measured(run: RunFolder, model: str) -> Mapping[str, Any] | None:
    """Return what ``evaluation.json`` says of a model; None: nothing."""
    kind, _, client = model.partition("/")
    found = run.evaluation.get("models", {}).get(kind)
    return found if found is None or not client else found.get("per_client", {}).get(client)


def _settings(run: RunFolder) -> dict[str, Any]:
    """Return the configuration, with the defaults of keys that an older fedit did not have."""
    load_plugins()
    settings = RunConfig().to_json()
    for key, value in run.run.items():
        is_table = isinstance(value, Mapping) and isinstance(settings.get(key), Mapping) and "name" not in value
        settings[key] = {**settings[key], **value} if is_table else value
    return settings


def _what(model: str) -> str:
    kind, _, client = model.partition("/")
    return {
        "base": "the base as it was, untuned",
        "central": "tuned on the rows of all clients in one place, for comparison with the federation",
        "local": f"tuned by client {client} alone on its own rows, for comparison with the federation",
        "federated": "tuned by federated learning" + (f", with factors of client {client}'s own" if client else ""),
        "personal": f"client {client}'s own, tuned beside the federation's and drawn to it",
    }[kind]


def _title(run: RunFolder, model: str) -> str:
    base, data = (name_of(run, table).rpartition("/")[2] for table in ("model", "data"))
    return f"{base}-{'sites' if run.is_across_sites else data}-{model.replace('/', '-')}"


def _categories(run: RunFolder) -> Mapping[str, int]:
    """Return the training rows of each category, the largest first; those that are only held out, too."""
    total = Counter[str](dict.fromkeys(run.partition.get("test", {}), 0))
    for holding in run.partition.get("clients", {}).values():
        total.update(holding["categories"])
    return dict(total.most_common())


def _evaluated(run: RunFolder, model: str) -> list[tuple[str, Mapping[str, Any], bool]]:
    """Return a label, the metrics, and whether it is this card's model, of each line of the table."""
    models = run.evaluation.get("models", {})
    lines = []
    for name, found in models.items():
        label = str(formats.MODEL_LABELS.get(name, name))
        label += f", mean of {len(found['per_client'])}" if "per_client" in found else ""
        lines.append((label, found, name == model))
    own = measured(run, model)
    if own is not None and "/" in model:
        lines.append((model, own, True))
    return lines


def _metadata(run: RunFolder, model: str, kind: Kind, licence: str) -> ModelCardData:
    """Return the front matter; what is no name on the Hub is left out, because the Hub refuses it."""
    base, data = (on_hub(run, table) for table in ("model", "data"))
    more: dict[str, Any] = {}
    if base is not None:
        more = {"base_model": base, "base_model_relation": "adapter" if kind == "adapter" else "finetune"}
    found = measured(run, model) or {}
    return ModelCardData(
        license=licence,
        library_name="peft" if kind == "adapter" else "transformers",
        pipeline_tag="text-generation",
        tags=["federated-learning", "instruction-tuning", "lora", "fedit"],
        datasets=None if data is None else [data],
        model_name=_title(run, model),
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type=data or name_of(run, "data"),
                dataset_name=f"{name_of(run, 'data')}, held-out rows",
                metric_type=type_,
                metric_name=formats.METRIC_LABELS[name],
                metric_value=round(found[name]["all"], 6),
            )
            for name, type_ in _METRICS.items()
            if found.get(name, {}).get("all") is not None
        ],
        **more,
    )
