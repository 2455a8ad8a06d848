"""The report of a made-up run: what it says, what it must not contain, and how it copes with what is missing."""

from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from fedit.evaluation.metrics import Prediction, summarise
from fedit.interfaces import ConfigError, DataError
from fedit.report import RunFolder, write_report
from fedit.report import format as formats
from fedit.report.finding import state_finding, state_sites
from fedit.report.samples import choose_samples
from fedit.report.terminal import final_table, preflight_table

CATEGORIES = ("describe", "list", "label", "count", "open_qa", "closed_qa", "rewrite", "summarise")
SKILL = {"base": 0.02, "local": 0.33, "central": 0.63, "federated": 0.6}
LOSS = {"base": 3.1, "local": 1.8, "central": 1.12, "federated": 1.17}
HOSTILE = "<script>alert('&')</script> $x^2$ </svg>"


def make_run(
    folder: Path, *, num_clients=6, num_rounds=6, rows_per_category=5, skill=None, loss=None, generate=True, **changes
) -> Path:
    """Write a run folder with plausible numbers; `changes` are keys of the configuration."""
    rng = np.random.default_rng(0)
    clients = [f"client_{index:03d}" for index in range(num_clients)]
    config = {
        "seed": 7,
        "rounds": num_rounds,
        "model": {"path": "builtin:cria", "dtype": "auto"},
        "data": {"path": "builtin:pasture", "columns": {}},
        "client": {"local_epochs": 1, "learning_rate": 0.001},
        **changes,
    }
    record = {
        "config": config,
        "recipe": "quickstart",
        "versions": {"fedit": "0.1.0", "torch": "2.9.0"},
        "hardware": {"device": "cpu", "cpu_count": 2, "dtype": "float32"},
        "model": {"parameters": 3_215_000, "adapter_parameters": 61_440},
    }
    write_json(folder / "config.json", record)
    holdings = {client: make_holding(rng) for client in clients}
    cohorts = [sorted(rng.choice(clients, max(1, min(num_clients // 2, 20)), replace=False)) for _ in range(num_rounds)]
    sampled = {client for cohort in cohorts for client in cohort}
    partition = {
        "clients": holdings,
        "test": dict.fromkeys(CATEGORIES, rows_per_category),
        "encoding": {"train": make_counts(1000), "test": make_counts(80)},
        "never_sampled": [client for client in clients if client not in sampled],
    }
    write_json(folder / "partition.json", partition)
    write_rounds(folder, cohorts, rng)
    models = make_predictions(
        clients, rows_per_category, {**SKILL, **(skill or {})}, {**LOSS, **(loss or {})}, generate
    )
    lines = [dataclasses.asdict(row) for rows in models.values() for row in rows]
    write_lines(folder / "answers.jsonl", lines)
    tokens = {name: 0 if name == "base" else 40_000 if name.startswith("local") else 400_000 for name in models}
    write_json(folder / "evaluation.json", summarise(models, tokens, seed=7))
    return folder


def make_holding(rng):
    kinds = rng.choice(CATEGORIES, rng.integers(1, 4), replace=False)
    categories = {str(kind): int(rng.integers(5, 120)) for kind in kinds}
    return {"rows": sum(categories.values()), "tokens": 70 * sum(categories.values()), "categories": categories}


def make_counts(rows):
    zeros = {"truncated": 3, "dropped": 1, "all_masked": 0, "dropped_sources": ["rows.jsonl:7: too long"]}
    return {"rows": rows, "tokens": 70 * rows, "supervised_tokens": 20 * rows, **zeros}


def write_rounds(folder, cohorts, rng):
    lines, timings = [], []
    for index, cohort in enumerate(cohorts, start=1):
        loss = 1.1 + 1.9 * np.exp(-index / 4)
        failures = {cohort[0]: f"non-finite update {HOSTILE}"} if index == 3 else {}
        line = {"round": index, "cohort": cohort, "failures": failures, "tokens": 20_000}
        losses = {"train_loss": loss + rng.normal(0, 0.04), "test_loss": loss + 0.06 if index % 2 == 0 else None}
        size = {"bytes_up": 245_760 * (len(cohort) - len(failures)), "bytes_down": 245_760 * len(cohort)}
        lines.append({**line, **losses, "aggregation_loss": 0.2 + 0.1 / index, "update_norm": 2 / index, **size})
        timings.append({"round": index, "seconds": 8.1, "tokens_per_second": 2469.0, "cpu_seconds": 15.0})
    phases = [
        {"phase": name, "seconds": 161.0, "cpu_seconds": 300.0, "tokens": 400_000} for name in ("local", "central")
    ]
    write_lines(folder / "rounds.jsonl", lines)
    write_lines(folder / "timings.jsonl", [*timings, *phases])


def make_predictions(clients, rows_per_category, skill, loss, generate):
    rng = np.random.default_rng(1)
    num_rows = rows_per_category * len(CATEGORIES)
    num_tokens = rng.integers(5, 40, num_rows)
    hardness = rng.gamma(20, 1 / 20, num_rows)
    luck = rng.random(num_rows)
    models = {}
    for name in ("base", *(f"local/{client}" for client in clients), "central", "federated"):
        kind = name.partition("/")[0]
        talent = 1 + (rng.normal(0, 0.12) if kind == "local" else 0)
        passed = luck < skill[kind] * (2 - talent)
        losses = num_tokens * hardness * loss[kind] * talent * rng.gamma(200, 1 / 200, num_rows)
        models[name] = [
            Prediction(
                model=name,
                index=index,
                category=CATEGORIES[index % len(CATEGORIES)],
                instruction=f"Question {index}: what does a brell give? Answer in one sentence. {HOSTILE}",
                context="A brell is kept in the hills for its wool." if index % 3 == 0 else "",
                reference="A brell gives wool.",
                answer=("A brell gives wool." if passed[index] else f"It gives {kind} {HOSTILE}") if generate else None,
                passed=bool(passed[index]) if generate else None,
                rouge_l=(0.9 if passed[index] else 0.3) if generate else None,
                nll=float(losses[index]),
                num_tokens=int(num_tokens[index]),
            )
            for index in range(num_rows)
        ]
    return models


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_lines(path, lines):
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")


class Page(HTMLParser):
    """Every tag with its attributes, and the visible text; raises where tags do not close in order."""

    VOID = ("meta", "br", "img", "link", "input", "hr")

    def __init__(self, html):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data

    def attributes(self, name):
        return [attrs[name] for _, attrs in self.tags if name in attrs]


def report(folder):
    html = write_report(folder).read_text(encoding="utf-8")
    return html, Page(html)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = make_run(tmp_path_factory.mktemp("finished"))
    return (folder, *report(folder))


def test_needs_nothing_but_a_browser(finished):
    _, html, page = finished
    assert "http:" not in html
    assert "https:" not in html
    assert {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "base"} == set()
    references = page.attributes("src") + page.attributes("href") + re.findall(r"url\(([^)]*)\)", html)
    assert [each for each in references if not each.startswith(("#", "data:image/png;base64,"))] == []
    assert "@import" not in html


def test_ids_are_unique_and_references_resolve(finished):
    _, html, page = finished
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    references = [href for href in page.attributes("href") if href.startswith("#")] + re.findall(
        r"url\((#[^)]*)\)", html
    )
    assert {reference[1:] for reference in references} <= set(ids)


def test_any_text_is_escaped(finished):
    _, html, page = finished
    assert "<script" not in html
    assert f"It gives base {HOSTILE}" in page.text
    assert f"non-finite update {HOSTILE}" in page.text


def test_finding_table_and_sections(finished):
    folder, _, page = finished
    evaluation = RunFolder.read(folder).evaluation
    assert "Federated tuning reaches" in page.text
    assert "Federated instruction tuning of cria on pasture" in page.text
    assert state_finding(evaluation, 6, 6) in page.text
    for model in evaluation["models"].values():
        assert formats.metric("response_loss", model["response_loss"]["all"]) in page.text
        assert formats.metric("exact_match", model["exact_match"]["all"]) in page.text
    assert set(page.attributes("id")) >= {"models", "clients", "rounds", "partition", "answers", "cost", "setup"}
    assert f"({evaluation['worst_client']['client']}) reaches response loss" in page.text
    assert "client.learning_rate" in page.text


def test_tables_have_headers_and_figures_have_captions_and_labels(finished):
    _, _, page = finished
    tags = [tag for tag, _ in page.tags]
    assert tags.count("table") == tags.count("thead") == tags.count("tbody")
    assert all(attrs.get("scope") in ("row", "col") for tag, attrs in page.tags if tag == "th")
    assert tags.count("figure") == tags.count("figcaption") == tags.count("svg") == 6
    assert all(attrs["role"] == "img" and attrs["aria-label"] for tag, attrs in page.tags if tag == "svg")


def test_same_folder_same_page(finished):
    folder, html, _ = finished
    assert write_report(folder).read_text(encoding="utf-8") == html
    assert not list(folder.glob("*.partial"))


def test_plain_colours_are_all_replaced_by_those_of_the_page(finished):
    _, html, _ = finished
    assert "#0101" not in html
    assert "var(--federated)" in html


@pytest.mark.parametrize(
    ("skill", "loss", "says", "never_says"),
    [
        ({"federated": 0.1}, {"federated": 2.4}, "does worse than training alone", "Federated tuning reaches"),
        ({"federated": 0.34}, {"federated": 1.79}, "cannot be told apart", "times that of"),
        ({"federated": 0.001}, {"federated": 3.6}, "is worse than the untuned base model", "times that of"),
        ({}, {"federated": 1.9}, "closes nothing of the loss gap", "closes all"),
        ({}, {"federated": 1.0}, "goes beyond", "closes nothing"),
        (dict.fromkeys(SKILL, 0), {}, "No answer of any model is an exact match", "In exact match"),
        (dict.fromkeys(SKILL, 0), {}, "reaches a response loss of", "In exact match"),
        ({}, {"central": 1.9}, "undefined (centralised training is no better", "It closes"),
    ],
)
def test_finding_is_honest(tmp_path, skill, loss, says, never_says):
    run = RunFolder.read(make_run(tmp_path, num_clients=4, skill=skill, loss=loss, rows_per_category=25))
    finding = state_finding(run.evaluation, 20, 20)
    assert says in finding
    assert never_says not in finding


def test_finding_by_hand():
    def model(loss, match):
        return {"response_loss": {"all": loss}, "exact_match": {"all": match}, "confidence": {}}

    evaluation = {
        "models": {
            "base": model(3.0, 0.0),
            "local": model(2.0, 0.3),
            "central": model(1.0, 0.6),
            "federated": model(1.1, 0.57),
        },
        "differences": {"federated_minus_local": {"confidence": {"exact_match": {"all": [0.2, 0.34]}}}},
        "gap_closed": 0.9,
        "gap_closed_confidence": [0.85, 0.95],
    }
    assert state_finding(evaluation, 5, 5) == (
        "Federated tuning reaches 57.0% exact match, 1.9 times that of the mean local-only model (30.0%) and 95% of "
        "centralised training (60.0%). It closes 90% of the loss gap between local-only and centralised training "
        "(95% interval 85.0–95.0%)."
    )


def test_losses_only(tmp_path):
    _, page = report(make_run(tmp_path, generate=False))
    assert "a response loss of" in page.text
    assert "ROUGE" not in page.text
    assert "Exact match" not in page.text
    assert "answers" not in page.attributes("id")


def test_without_baselines(tmp_path):
    folder = make_run(tmp_path)
    run = RunFolder.read(folder)
    models = {name: run.evaluation["models"][name] for name in ("base", "federated")}
    kept = {"models": models, "num_test_rows": run.evaluation["num_test_rows"], "differences": {}, "gap_closed": None}
    write_json(folder / "evaluation.json", kept)
    _, page = report(folder)
    assert "this run cannot say what federation adds" in page.text
    assert "clients" not in page.attributes("id")


def test_a_diverged_model_is_shown_as_such(tmp_path):
    folder = make_run(tmp_path, generate=False, loss={"central": np.nan})
    _, page = report(folder)
    assert "not finite, so they cannot be compared: central" in page.text


def test_free_answers_are_drawn_by_rouge(tmp_path):
    _, page = report(make_run(tmp_path, num_clients=2, skill=dict.fromkeys(SKILL, 0)))
    labels = [attrs["aria-label"] for tag, attrs in page.tags if tag == "svg"]
    assert labels[0].startswith("ROUGE-L by category")
    assert "ROUGE-L by category, longer is better" in page.text


def test_what_failed_and_what_was_exact_is_said(tmp_path):
    folder = make_run(tmp_path, num_clients=2)
    evaluation = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    write_json(folder / "evaluation.json", evaluation | {"failures": {"local/x": "the loss became <nan>"}})
    rounds = [{**entry, "failures": {}, "aggregation_loss": 1e-16} for entry in RunFolder.read(folder).rounds]
    write_lines(folder / "rounds.jsonl", rounds)
    _, page = report(folder)
    assert "in none of the numbers above: local/x: the loss became <nan>." in page.text
    assert "no aggregation loss in any round" in page.text
    assert "No client failed" in page.text


@pytest.mark.parametrize("missing", range(5))
def test_an_unfinished_run_shows_what_is_there(tmp_path, missing):
    folder = make_run(tmp_path, num_clients=2)
    files = ["evaluation.json", "answers.jsonl", "timings.jsonl", "rounds.jsonl", "partition.json"]
    for name in files[: missing + 1]:
        (folder / name).unlink()
    _, page = report(folder)
    assert f"{6 if missing < 3 else 0} of 6 rounds are done, and nothing is evaluated" in page.text
    assert ("cost" in page.attributes("id")) == (missing < 3)
    assert ("answers" in page.attributes("id")) == (missing < 1)


def test_an_incomplete_last_line_is_left_out(tmp_path):
    folder = make_run(tmp_path, num_clients=2)
    path = folder / "rounds.jsonl"
    path.write_bytes(path.read_bytes()[:-40])
    assert [entry["round"] for entry in RunFolder.read(folder).rounds] == [1, 2, 3, 4, 5]


def test_damage_is_named(tmp_path):
    folder = make_run(tmp_path, num_clients=2)
    path = folder / "rounds.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([lines[0], "[1, 2]", *lines[2:]]), encoding="utf-8")
    with pytest.raises(DataError, match=r"rounds\.jsonl:2 is damaged: expected a JSON object, got list"):
        write_report(folder)
    (folder / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=r"config\.json is damaged"):
        write_report(folder)


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"is not a run: it holds no config\.json"):
        write_report(tmp_path)
    with pytest.raises(ConfigError, match="is not a run: it is no folder"):
        write_report(tmp_path / "nowhere")


def test_a_thousand_clients(tmp_path):
    folder = make_run(tmp_path, num_clients=1000, num_rounds=40, rows_per_category=1)
    html, page = report(folder)
    assert len(html) < 3_000_000
    assert "The 10 worst of 1,000 clients" in page.text
    assert "1,000 clients, sorted by largest category" in page.text
    assert "more." in page.text  # clients never sampled


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("builtin:cria", "cria"),
        ("some/model-1.5B", "model-1.5B"),
        ("/data/rows.v2.jsonl", "rows.v2"),
        ("/data/dolly15k/10", "dolly15k/10"),
        (".", ""),
    ],
)
def test_models_and_data_have_short_names(path, name):
    assert formats.short_name(path) == name


@pytest.mark.parametrize("num_clients", [1, 2])
def test_few_clients(tmp_path, num_clients):
    report(make_run(tmp_path, num_clients=num_clients, num_rounds=1, rows_per_category=1))


def test_names_of_any_length_and_script(tmp_path):
    folder = make_run(tmp_path)
    for name in ("partition.json", "rounds.jsonl", "evaluation.json", "answers.jsonl"):
        path = folder / name
        text = (
            path.read_text(encoding="utf-8")
            .replace("closed_qa", "质问 " + "long " * 30)
            .replace("client_001", "$<&>$ 医院")
        )
        path.write_text(text, encoding="utf-8")
    html, page = report(folder)
    assert "$&lt;&amp;&gt;$ 医院" in html
    assert "质问" in page.text


def test_samples_are_the_first_row_of_each_category_and_the_median_client(tmp_path):
    run = RunFolder.read(make_run(tmp_path))
    samples = choose_samples(run)
    assert [sample.row["index"] for sample in samples.rows] == list(range(8))
    assert [sample.row["category"] for sample in samples.rows] == list(CATEGORIES)
    assert list(samples.rows[0].answers) == ["base", "local", "central", "federated"]
    losses = {
        client: model["response_loss"]["all"]
        for client, model in run.evaluation["models"]["local"]["per_client"].items()
    }
    assert samples.local_client == sorted(losses, key=losses.__getitem__)[2]


def printed(renderable):
    console = Console(width=120)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def test_terminal_tables(tmp_path):
    run = RunFolder.read(make_run(tmp_path))
    text = printed(final_table(run.evaluation)) + printed(preflight_table(run.partition))
    for words in (
        "Local-only",
        "Federated",
        "ROUGE-L",
        "Loss gap closed",
        "client_005",
        "truncated context",
        "all masked",
        "First row dropped of train: ",
        "rows.jsonl:7",
        "Clients never sampled",
    ):
        assert words in text


def test_preflight_summarises_many_clients(tmp_path):
    run = RunFolder.read(make_run(tmp_path, num_clients=100, rows_per_category=1))
    text = printed(preflight_table(run.partition))
    assert "100 clients" in text
    assert "Median" in text
    assert "client_009" not in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (formats.count(999_999), "999,999"),
        (formats.count(1_236_000), "1.24 M"),
        (formats.count(0), "0"),
        (formats.size(999), "999 B"),
        (formats.size(12_345), "12.3 kB"),
        (formats.size(0), "0 B"),
        (formats.duration(8.06), "8.1 s"),
        (formats.duration(192), "3 min 12 s"),
        (formats.duration(3_840), "1 h 04 min"),
        (formats.number(float("nan")), "–"),
        (formats.percent(-0.056), "−5.6%"),
        (formats.signed("exact_match", 0.056), "+5.6"),
        (formats.signed("response_loss", -0.05), "−0.050"),
        (formats.signed("response_loss", -0.0001), "0.000"),
        (formats.interval("exact_match", [0.1, 0.2]), "10.0–20.0%"),
        (formats.interval("exact_match", [-0.1, 0.2]), "−10.0% to 20.0%"),
        (formats.clip("abcdef", 4), "abc…"),
    ],
)
def test_formats(text, expected):
    assert text == expected


def test_a_run_across_sites_states_what_they_measured() -> None:
    rounds = [
        {"round": 1, "test_loss": 3.5, "site_losses": {"a": 3.4, "b": 3.6}},
        {"round": 2, "test_loss": 3.25, "site_losses": {"a": 3.0, "b": 3.5}},
        {"round": 3, "test_loss": None},
    ]
    assert state_sites(rounds, 4) == (
        "After 2 of 4 rounds the sites measured a held-out loss of 3.250 nats per response token; the worst of 2 is b "
        "with 3.500."
    )
    assert state_sites([{"round": 1, "test_loss": 3.5}], 4) is None


def test_privacy_has_a_section_and_a_real_run_with_it_tells_no_names(tmp_path: Path) -> None:
    statement = {
        "epsilon": 3.0, "delta": 0.01, "unit": "all rows of a client", "adjacency": "one client added or removed",
        "sampling": "Poisson, probability 0.5 a round", "rounds": 2, "noise_multiplier": 1.2, "clip_norm": 0.5,
        "clipping": "fixed", "trust": "the server sees single updates and adds the noise", "accountant": "a 1.0",
        "noise": "the operating system's",
    }  # fmt: skip
    withheld = {
        "cohort": [], "failures": {}, "train_loss": None, "test_loss": None, "update_norm": 0.0,
        "aggregation_loss": None,
        "bytes_up": 0, "bytes_down": 0, "tokens": 0, "ranks": {}, "clip_norm": 0.5,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({"config": {"rounds": 2, "privacy": {"target_epsilon": 3.0}}}))
    clients = {"north": {"rows": 1, "categories": {}}, "south": {"rows": 1, "categories": {}}}
    (tmp_path / "partition.json").write_text(json.dumps({"clients": clients, "privacy": statement}))
    lines = [{"round": number, "epsilon": 1.5 * number, **withheld} for number in (1, 2)]
    (tmp_path / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = write_report(tmp_path).read_text()
    assert "(3.000, 0.01)-differential privacy hides all rows of a client" in page
    assert "Who took part, training losses and counts are withheld." in page
    assert "Bytes, times and failures are withheld" in page
    assert "privacy has cost an epsilon of 3.000" in page
