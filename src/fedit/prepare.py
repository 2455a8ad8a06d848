"""From the configured rows to the clients of a federation and its held-out rows, encoded; the base ready to tune."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from fedit.base import context_length, load_base, load_tokenizer, resolve_device, tokenizer_digest, weights_digest
from fedit.cohort import check_clients, most_rounds, never_sampled
from fedit.config import RunConfig
from fedit.data import EncodingReport, encode_all, load_examples
from fedit.data.cleaning import Cleaned, clean
from fedit.evaluation.checks import passes
from fedit.evaluation.heldout import with_reference_margins
from fedit.interfaces import Adapter, ConfigError, DataError, EncodedExample, Example, derive_rng, did_you_mean
from fedit.memory import fit_memory
from fedit.model import StackedModel
from fedit.own_privacy import OwnPrivacy
from fedit.partition import partition_statistics
from fedit.privacy import Mechanism

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase


UNSEEN_ROWS = 20
"""Of a client that never takes part, measured at most"""


@dataclass(frozen=True, eq=False)
class FederatedData:
    """The rows of every client and the held-out rows, encoded; `summary` is the content of partition.json."""

    clients: Mapping[str, Sequence[EncodedExample]]
    test: Sequence[EncodedExample]
    summary: Mapping[str, Any]
    probes: Sequence[EncodedExample] = ()
    """Held-out rows with the response that an attack wants."""
    unseen: Mapping[str, Sequence[EncodedExample]] = field(default_factory=dict)
    """Rows of clients that never take part, which are measured only."""

    @property
    def pooled(self) -> list[EncodedExample]:
        """All clients' rows, in client order: what centralised tuning sees."""
        return [example for examples in self.clients.values() for example in examples]


def prepare_data(config: RunConfig) -> FederatedData:
    """Load, encode and partition the rows.

    Raises:
        DataError, EngineError: the data, the model or the tokenizer cannot be used.
        ConfigError: the configuration asks for more than the data or the model have.
    """
    cleaned, rows, train_report, test, test_report = _encoded(config)
    pairs = config.objective.preferences
    tokenizer = load_tokenizer(config.model.path)
    named, left = ({example.client for example in examples} for examples in (cleaned.train, [r.example for r in rows]))
    owners = config.partition.split([row.example for row in rows], derive_rng(config.seed, "partition"))
    unseen = _unseen_clients(config, rows, owners)
    owners = {client: indices for client, indices in owners.items() if client not in unseen}
    clients = {client: [rows[index] for index in indices] for client, indices in owners.items()}
    malicious = [] if config.attack is None else config.attack.malicious(list(clients), config.seed)
    for client in malicious:
        poisoned = _poison(config, client, [row.example for row in clients[client]])
        if poisoned is not None:
            clients[client], _ = encode_all(poisoned, config.data, tokenizer, pairs=pairs)
    sizes = {client: len(examples) for client, examples in clients.items()}
    check_clients(config, sizes)
    summary = partition_statistics([row.example for row in rows], owners)
    for client, examples in clients.items():
        summary["clients"][client]["tokens"] = sum(example.num_trained for example in examples)
    categories = [example.example.category for example in test]
    summary["test"] = {category: categories.count(category) for category in dict.fromkeys(categories)}
    for category in config.evaluation.unseen_categories:
        if category not in summary["test"]:
            raise ConfigError(
                f"[evaluation] unseen_categories: no held-out row has the category {category!r}. "
                f"{did_you_mean(category, summary['test'])}"
            )
    if "all" in summary["test"]:
        raise DataError("A category is named 'all', which stands for the whole test set. Rename it in the data.")
    summary["cleaning"] = cleaned.summary
    summary["encoding"] = {"train": _counts(train_report), "test": _counts(test_report)}
    summary["clients_without_rows"] = sorted(str(client) for client in named - left)
    summary["never_sampled"] = never_sampled(config, sizes)
    if malicious:
        summary["malicious"] = malicious
    if config.privacy is not None:
        summary["privacy"] = _statement(config, sizes)
    measured = {f"\x1funseen/{client}": own for client, own in unseen.items()}
    summary["fingerprint"] = _fingerprint({**clients, "\x1ftest": test, **measured})
    if unseen:
        summary["unseen_clients"] = {client: len(own) for client, own in unseen.items()}
    return FederatedData(clients, test, summary, _probes(config, test, tokenizer), unseen)


def _unseen_clients(
    config: RunConfig, rows: Sequence[EncodedExample], owners: Mapping[str, np.ndarray]
) -> dict[str, list[EncodedExample]]:
    """Return the clients that never take part, in client order, with those of their rows that are measured."""
    share, names = config.evaluation.unseen_clients, list(owners)
    count = round(share * len(names))
    if share and not 0 < count < len(names):
        what = "nobody" if not count else "everybody"
        raise ConfigError(f"[evaluation] unseen_clients = {share} of {len(names)} clients is {what}. Change it.")
    rng = derive_rng(config.seed, "unseen")
    drawn = {names[index] for index in rng.choice(len(names), count, replace=False).tolist()}
    return {
        client: [rows[index] for index in sorted(rng.permutation(owners[client])[:UNSEEN_ROWS].tolist())]
        for client in names
        if client in drawn
    }


def _statement(config: RunConfig, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Return what the run promises its clients; where each adds its own noise, what it promises the worst of them."""
    seeded = "seeded, so that the simulation can be repeated: no protection itself"
    if (mechanism := Mechanism.of(config, len(sizes))) is not None:
        return mechanism.statement(seeded, most_rounds(config, sizes))
    own = [privacy for rows in set(sizes.values()) if (privacy := OwnPrivacy.of(config, rows)) is not None]
    return max((privacy.statement(seeded) for privacy in own), key=lambda statement: statement["epsilon"])


def prepare_site(config: RunConfig, called: Callable[[Sequence[str | None]], Sequence[str]]) -> FederatedData:
    """Load and encode the rows of a real site. Its clients are those that its rows name, and one for rows that name
    none; `called` returns what the server is told that they are called.

    Raises:
        DataError, EngineError, ConfigError: as `prepare_data`.
    """
    cleaned, rows, _, test, _ = _encoded(config)
    clients: dict[str | None, list[EncodedExample]] = {}
    for row in rows:
        clients.setdefault(row.example.client, []).append(row)
    return FederatedData(
        dict(zip(called(list(clients)), clients.values(), strict=True)), test, {"cleaning": cleaned.summary}
    )


def _encoded(
    config: RunConfig,
) -> tuple[Cleaned, list[EncodedExample], EncodingReport, list[EncodedExample], EncodingReport]:
    """Return the cleaned examples, the training ones that can be used, encoded, and the held-out ones, with reports."""
    context = context_length(config.model.path)
    if context is not None and config.data.max_length > context:
        raise ConfigError(
            f"[data] max_length = {config.data.max_length} is more than the {context} positions of [model] path = "
            f"{config.model.path!r}. Lower it: -o data.max_length={context}."
        )
    tokenizer = load_tokenizer(config.model.path)
    train, held_out = load_examples(config.data, config.seed)
    seen = [example for example in train if example.category not in config.evaluation.unseen_categories]
    if not seen:
        raise ConfigError("[evaluation] unseen_categories are all categories: no row is left to train on. Name fewer.")
    cleaned = clean(seen, held_out, config.data)
    pairs = config.objective.preferences
    rows, train_report = encode_all(cleaned.train, config.data, tokenizer, pairs=pairs)
    test, test_report = encode_all(cleaned.test, config.data, tokenizer, pairs=pairs)
    _try_checks(test)
    return cleaned, rows, train_report, test, test_report


def _poison(config: RunConfig, client: str, examples: Sequence[Example]) -> Sequence[Example] | None:
    """Return what a malicious client trains on, or None where the attack leaves its rows alone."""
    assert config.attack is not None
    poisoned = config.attack.poison(examples, derive_rng(config.seed, "poison", client))
    return None if poisoned is examples else poisoned


def _probes(
    config: RunConfig, test: Sequence[EncodedExample], tokenizer: PreTrainedTokenizerBase
) -> Sequence[EncodedExample]:
    probes = () if config.attack is None else config.attack.probes([row.example for row in test])
    return encode_all(probes, config.data, tokenizer)[0] if probes else ()


def _try_checks(rows: Sequence[EncodedExample]) -> None:
    """Raise DataError for a malformed `checks` now, not after the training that its answer would judge."""
    for row in rows:
        if row.example.checks is not None:
            try:
                passes(row.example.checks, "an answer")
            except DataError as error:
                raise DataError(f"{row.example.source}: {error}") from error


def _counts(report: EncodingReport) -> dict[str, Any]:
    return {**asdict(report), "dropped": report.dropped}


def _fingerprint(parts: Mapping[str, Sequence[EncodedExample]]) -> str:
    """Return a hash of all rows and their owners: a resumed run must train and be judged on the same data."""
    digest = hashlib.sha256()
    for name, part in parts.items():
        digest.update(json.dumps([name, len(part)]).encode())
        for example in part:
            digest.update(example.input_ids.tobytes() + example.supervised.tobytes())
            if example.rejected is not None:
                digest.update(example.rejected.input_ids.tobytes())
            judged = [example.example.category, example.example.response, example.example.checks]
            digest.update(json.dumps(judged, sort_keys=True, default=str).encode())
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------------------- the base


@dataclass(frozen=True, eq=False)
class PreparedModel:
    """The resident base with its adapters' layers."""

    model: StackedModel
    initial: Adapter
    """The untrained adapter that the first round starts from."""
    weights_sha256: str
    tokenizer_sha256: str

    def with_margins(self, config: RunConfig, data: FederatedData) -> FederatedData:
        """Return the same rows; preferences among them know what the base prefers."""
        if not config.objective.preferences:
            return data
        clients = {client: with_reference_margins(self.model, rows) for client, rows in data.clients.items()}
        return replace(data, clients=clients, test=with_reference_margins(self.model, data.test))


def prepare_model(config: RunConfig, clients: Sequence[Sequence[EncodedExample]] = ()) -> PreparedModel:
    """Load the base; where there are `clients` to tune, fit slots and batches to the memory.

    Raises:
        EngineError: it cannot be loaded, or the memory does not hold it.
    """
    base = load_base(config.model, resolve_device(config.engine.device))
    digest = weights_digest(base)
    tokenizer = load_tokenizer(config.model.path)
    model = StackedModel(base, tokenizer, config.adapter)
    if clients:
        objective = config.objective
        more = bool(objective.pull or objective.personal_pull) + objective.control_variates
        fit_memory(model, config.engine, config.client, clients, more)
    fresh = model.fresh_adapter(derive_rng(config.seed, "adapter"))
    initial = config.aggregation.initial(fresh, model.weight, derive_rng(config.seed, "initial"))
    return PreparedModel(model, initial, digest, tokenizer_digest(tokenizer))
