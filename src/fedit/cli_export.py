"""The command that gives a run's models to others."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from fedit.console import console, quiet, say
from fedit.interfaces import ConfigError

export_app = App(name="export")


@export_app.default
def export(
    folder: Path,
    /,
    *,
    model: Annotated[
        str,
        Parameter(
            help='"federated", "central", "local/CLIENT", or a client\'s own, "federated/CLIENT"; '
            "without the client, the median one's"
        ),
    ] = "federated",
    adapter: Annotated[Path | None, Parameter(help="Write the PEFT folder of the model here")] = None,
    merged: Annotated[Path | None, Parameter(help="Write base + adapter as one ordinary model here")] = None,
    gguf: Annotated[Path | None, Parameter(help="Write the merged model to this GGUF file")] = None,
    gguf_adapter: Annotated[Path | None, Parameter(help="Write the adapter to this GGUF file")] = None,
    llama_cpp: Annotated[
        Path | None,
        Parameter(env_var="LLAMA_CPP", help="llama.cpp's folder, for GGUF; by default its programs on the PATH"),
    ] = None,
    push_to_hub: Annotated[
        str | None,
        Parameter(help="Upload to this NAMESPACE/NAME: the merged model with --merged, the adapter otherwise"),
    ] = None,
    public: Annotated[bool, Parameter(negative="", help="Let everybody see it; otherwise it is private")] = False,
    licence: Annotated[
        str, Parameter(name="--license", help="The model's licence on its card, as the Hub spells it: apache-2.0, ...")
    ] = "unknown",
) -> None:
    """Write one of a run's models in the formats that others load, each with a model card.

    The federated adapter is in FOLDER/adapter already. What is written here names no path of this machine.
    """
    _refuse(adapter, merged, gguf, gguf_adapter, llama_cpp, push_to_hub, public)
    quiet()
    from fedit import publish

    address = None
    with tempfile.TemporaryDirectory() as temporary, console.status("Exporting") as status:
        whole, peft = merged or Path(temporary) / "merged", adapter or Path(temporary) / "adapter"
        if merged or gguf:
            model = publish.export_merged(folder, model, whole, licence)
        if adapter or gguf_adapter or (push_to_hub and not merged):
            model = publish.export_adapter(folder, model, peft, licence)
        if gguf is not None:
            publish.convert_merged(whole, gguf, llama_cpp)
        if gguf_adapter is not None:
            publish.convert_adapter(folder, peft, gguf_adapter, llama_cpp)
        if push_to_hub is not None:
            status.update("Uploading")
            address = publish.push_to_hub(whole if merged else peft, push_to_hub, public=public)
    if "/" in model:
        say(f"Model: {model}")
    places = {"Adapter": adapter, "Merged model": merged, "GGUF": gguf, "GGUF adapter": gguf_adapter}
    for what, place in {**places, f"Uploaded, {'public' if public else 'private'}": address}.items():
        if place is not None:
            say(f"{what}: {place}")


def _refuse(
    adapter: Path | None,
    merged: Path | None,
    gguf: Path | None,
    gguf_adapter: Path | None,
    llama_cpp: Path | None,
    push_to_hub: str | None,
    public: bool,
) -> None:
    """Refuse what cannot be done before anything is loaded."""
    from fedit import publish

    if not (adapter or merged or gguf or gguf_adapter or push_to_hub):
        raise ConfigError("Say what to export: --adapter, --merged, --gguf, --gguf-adapter or --push-to-hub.")
    if public and push_to_hub is None:
        raise ConfigError("--public is for --push-to-hub, which was not asked for.")
    if push_to_hub is not None:
        publish.check_hub(push_to_hub)
    for file, program in ((gguf, publish.MODEL_CONVERTER), (gguf_adapter, publish.ADAPTER_CONVERTER)):
        if file is not None:
            publish.find_converter(program, llama_cpp)
            publish.check_new_file(file)
