"""The models of a finished run, by name: the base, every client alone, centralised, federated."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from fedit.baselines import CENTRAL, saved_adapters, trained_baselines
from fedit.config import RunConfig, load_plugins, recorded_config
from fedit.data import encode_prompt
from fedit.evaluation.heldout import together
from fedit.evaluation.metrics import FEDERATED_PREFIX, LOCAL_PREFIX, PERSONAL_PREFIX
from fedit.export import load_adapter
from fedit.files import folder_name
from fedit.generation import GREEDY, Continuation, Sampling, stream
from fedit.interfaces import Adapter, ConfigError, DataError, EngineError, Example, Turn, did_you_mean
from fedit.model import StackedModel
from fedit.prepare import prepare_model
from fedit.report import RunFolder

if TYPE_CHECKING:
    import numpy as np

BASE, FEDERATED, LOCAL = "base", "federated", "local"


def model_names(folder: Path) -> list[str]:
    """Return the models of the run in `folder` that can be opened, in the order of its report: ``base``,
    ``local/<client>``, ``central``, ``federated``; ``federated/<client>`` or ``personal/<client>``, where the run left
    each client its own.

    Raises:
        ConfigError: `folder` is no run, or its rounds are not done.
    """
    run, config = _described(folder)
    baselines = trained_baselines(config, folder / "baselines")
    own = sorted(unquote(item.name) for item in (folder / "adapters").glob("*"))
    prefix = PERSONAL_PREFIX if (folder / "adapter").is_dir() else FEDERATED_PREFIX
    local = [name for name in baselines if name.startswith(LOCAL_PREFIX)]
    central = [CENTRAL] if CENTRAL in baselines else []
    federated = [FEDERATED] if (folder / "adapter").is_dir() else []
    names = [BASE, *local, *central, *federated, *(prefix + client for client in own)]
    if not federated and not own:
        raise ConfigError(
            f"{folder} has no model yet: {len(run.rounds)} of {config.rounds} rounds are done. Finish it with "
            f"`{run.go_on}`."
        )
    return names


def resolve_names(folder: Path, wanted: Sequence[str]) -> list[str]:
    """Return the names of models; ``local``, and ``federated`` where each client has its own, are those of the median
    client by response loss.

    Raises:
        ConfigError: as `model_names`; the run has no such model.
    """
    known = model_names(folder)
    names = []
    for name in wanted:
        exact = name if name in known else median_model(folder, name) or name
        if exact not in known:
            raise ConfigError(f"{folder} has no model {name!r}. {_what_it_has(name, known)}")
        names.append(exact)
    return list(dict.fromkeys(names))


@dataclass(frozen=True, eq=False)
class RunModels:
    """Models of one run on its resident base, to be asked together."""

    folder: Path
    config: RunConfig
    model: StackedModel
    initial: Adapter
    """The untrained adapter that all of them started from"""
    adapters: Mapping[str, Adapter | None]
    """By name; None: the base itself"""

    @classmethod
    def open(cls, folder: Path | str, wanted: Sequence[str] = (FEDERATED,)) -> RunModels:
        """Load the base of the run in `folder` and the adapters of the `wanted` models (`resolve_names`).

        Raises:
            ConfigError: as `resolve_names`.
            EngineError: the base cannot be loaded, or is another than the run's.
        """
        folder = Path(folder)
        names = resolve_names(folder, wanted)
        run, config = _described(folder)
        prepared = prepare_model(config)
        expected = run.config["model"]["weights_sha256"]
        if prepared.weights_sha256 != expected:
            raise EngineError(
                f"{folder} was run on another base: the weights of [model] path = {config.model.path!r} are "
                f"{prepared.weights_sha256[:12]}... here, expected {expected[:12]}... Restore the model."
            )
        return cls(folder, config, prepared.model, prepared.initial, {}).with_models(names)

    def with_models(self, wanted: Sequence[str]) -> RunModels:
        """Return the same base with the adapters of more models (`resolve_names`).

        Raises:
            ConfigError: as `resolve_names`.
        """
        if all(name in self.adapters for name in wanted):
            return self
        names = [name for name in resolve_names(self.folder, wanted) if name not in self.adapters]
        holdings = RunFolder.read(self.folder).partition.get("clients", {})
        clients = {client: holding["rows"] for client, holding in holdings.items()}
        adapters = saved_adapters(self.config, clients, self.initial, self.folder / "baselines", names)
        found: dict[str, Adapter | None] = {BASE: None, **adapters}
        for name in names:
            if name not in found:
                kind, _, client = name.partition("/")
                assert kind in {"federated", "personal"}
                place = self.folder / "adapters" / folder_name(client) if client else self.folder / "adapter"
                found[name] = load_adapter(place, self.config)
        return replace(self, adapters={**self.adapters, **{name: found[name] for name in names}})

    def ask(self, question: str, max_new_tokens: int = 64, sampling: Sampling = GREEDY) -> dict[str, str]:
        """Return, by model, the answer to a question that no turn came before.

        Raises:
            DataError: it is too long.
        """
        asked = dict.fromkeys(self.adapters, Example((Turn(question, ""),)))
        *_, answers = self.answer(asked, max_new_tokens, sampling)
        return answers

    def answer(
        self, conversations: Mapping[str, Example], max_new_tokens: int, sampling: Sampling = GREEDY
    ) -> Generator[dict[str, str]]:
        """Yield, by model, the answer so far to its conversation, whose last response is empty.

        Models that can share a pass through the base answer together, the others after them. Where the context would
        leave no room for an answer, the oldest turns are not shown.

        Raises:
            DataError: a last question alone is too long.
        """
        asked = [(name, self.prompt(conversation, max_new_tokens)) for name, conversation in conversations.items()]
        for answers in self.stream(asked, max_new_tokens, sampling):
            yield {name: answer.text.strip() for (name, _), answer in zip(asked, answers, strict=True)}

    def stream(
        self,
        asked: Sequence[tuple[str, np.ndarray]],
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        is_unwanted: Callable[[int], bool] = lambda row: False,
    ) -> Iterator[list[Continuation]]:
        """Yield what follows each pair of a model and a prompt (`encode_prompt`) so far (`fedit.generation.stream`)."""
        adapters = {name: self.adapters[name] for name, _ in asked}
        so_far = [Continuation() for _ in asked]
        for names in together(adapters, len(adapters)):
            self.model.fill([adapters[name] for name in names])
            rows = [row for row, (name, _) in enumerate(asked) if name in names]
            prompts, slots = [asked[row][1] for row in rows], [names.index(asked[row][0]) for row in rows]
            unwanted = lambda place, rows=rows: is_unwanted(rows[place])
            for continued in stream(self.model, prompts, slots, max_new_tokens, sampling, unwanted):
                for row, continuation in zip(rows, continued, strict=True):
                    so_far[row] = continuation
                yield list(so_far)

    def prompt(self, conversation: Example, max_new_tokens: int) -> np.ndarray:
        """Return the ids (int32 [T]) that ask for the last response of a conversation.

        The oldest turns are left out while fewer than `max_new_tokens`, and a quarter of the context, are left.

        Raises:
            DataError: the last question alone is too long.
        """
        while True:
            prompt = encode_prompt(conversation, self.config.data.template, self.model.tokenizer)
            context = len(prompt) + self.model.room(len(prompt))
            if len(prompt) + min(max_new_tokens, context / 4) <= context:
                return prompt
            if len(conversation.turns) == 1:
                raise DataError(f"The question has {len(prompt)} tokens; the model's context is {context}. Shorten it.")
            conversation = replace(conversation, turns=conversation.turns[1:])


def _described(folder: Path) -> tuple[RunFolder, RunConfig]:
    run = RunFolder.read(folder)
    if "weights_sha256" not in run.config.get("model", {}):
        raise ConfigError(
            f"{folder} was written by an older version of fedit, which cannot be read any more. Run it again."
        )
    load_plugins([Path(file) for file in run.config.get("plugin_files", [])])
    return run, recorded_config(run.config, folder)


def median_model(folder: Path, kind: str) -> str | None:
    """Return the model of the (lower) median client by response loss, of those of a kind, such as ``local``.

    None: there is none, or the run is not evaluated.
    """
    per_client = RunFolder.read(folder).evaluation.get("models", {}).get(kind, {}).get("per_client", {})
    losses = {client: own["response_loss"]["all"] for client, own in per_client.items()}
    by_loss = sorted(losses, key=lambda client: math.inf if losses[client] is None else losses[client])
    return f"{kind}/{by_loss[(len(by_loss) - 1) // 2]}" if by_loss else None


def _what_it_has(name: str, known: Sequence[str]) -> str:
    is_baseline = name.partition("/")[0] in {LOCAL, CENTRAL}
    if is_baseline and not any(other.startswith(LOCAL_PREFIX) for other in known):
        return "It was run without baselines (evaluation.baselines = false)."
    if of_kind := [other for other in known if other.startswith(f"{name}/")]:
        return (
            "It is not evaluated, so the median client is not known: finish it with `fedit run --resume`, or name a "
            f"client: {of_kind[0]}, for example."
        )
    return did_you_mean(name, known)
