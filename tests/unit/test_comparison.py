"""Runs beside each other: what is paired, what is refused, and what the table, CSV, LaTeX and page say."""

from __future__ import annotations

import csv
import io
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedit.comparison import Comparison, compare, group_runs, measure_run, write_comparison
from fedit.comparison.finding import state_differences
from fedit.comparison.pairing import Pair, paired_interval
from fedit.comparison.tables import escape, table, to_csv, to_latex, to_markdown
from fedit.evaluation.metrics import NUM_RESAMPLES, Prediction, summarise
from fedit.interfaces import ConfigError, DataError, derive_rng
from fedit.report import RunFolder

HOSTILE = "<script>alert('&')</script> 100% $x_1^2$ \\ {~}"


def write_run(
    folder: Path,
    losses: Mapping[str, Sequence[float]],
    *,
    seed: int = 0,
    num_tokens: tuple[int, ...] = (2, 2, 4),
    texts: str = "row",
    answered: bool = False,
    **config: Any,
) -> Path:
    """Write a finished run whose models have these losses, each the sum over a row's tokens; `config` are its keys."""
    models = {
        model: [
            Prediction(
                model=model,
                index=index,
                category="ab"[index % 2],
                instruction=f"{texts} {index}",
                context="",
                reference="Answer.",
                answer="Answer." if answered else None,
                passed=loss < 3 if answered else None,
                rouge_l=1 / (1 + loss) if answered else None,
                nll=loss,
                num_tokens=num_tokens[index],
            )
            for index, loss in enumerate(rows)
        ]
        for model, rows in losses.items()
    }
    folder.mkdir(parents=True)
    described = {
        "config": {"seed": seed, "rounds": 2, **config},
        "recipe": "quickstart",
        "command": f"fedit run {seed}",
    }
    (folder / "config.json").write_text(json.dumps(described))
    line = {
        "cohort": ["a", "b"],
        "failures": {"b": "lost"},
        "aggregation_loss": None,
        "bytes_up": 100,
        "bytes_down": 300,
    }
    rounds = [{"round": number, "train_loss": 2.0, "test_loss": 3.0 - number, **line} for number in (1, 2)]
    write_lines(folder / "rounds.jsonl", rounds)
    write_lines(folder / "answers.jsonl", [asdict(row) for rows in models.values() for row in rows])
    evaluation = summarise(models, dict.fromkeys(models, 40), seed)
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    (folder / "report.html").write_text("")
    return folder


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def compared(*folders: Path) -> Comparison:
    return compare("Comparison", group_runs(folders))


@pytest.fixture
def two_rules(tmp_path: Path) -> Comparison:
    """Two seeds of two rules; in seed 1 the test rows are others."""
    folders = []
    for rule, losses in (("fedit", ([2, 3, 5], [4, 2, 6])), ("flora", ([2, 2, 4], [3, 2, 5]))):
        for seed in (0, 1):
            models = {"federated": losses[seed]}
            if rule == "fedit":
                models |= {"local/x": [4, 4, 8], "local/y": [8, 8, 16], "central": [1, 1, 2]}
            config = {"aggregation": {"name": rule}, "evaluation": {"baselines": rule == "fedit"}}
            texts = f"row of {seed}"
            folders.append(write_run(tmp_path / f"{rule}-{seed}", models, seed=seed, texts=texts, **config))
    return compared(*folders)


# ------------------------------------------------------------------------------------------------------ the estimate


def test_means_deviations_and_differences_by_hand(two_rules):
    fedit, flora, local, central = two_rules.groups
    assert [group.label for group in two_rules.trained] == ["aggregation.name=fedit", "aggregation.name=flora"]
    assert [group.label for group in (local, central)] == ["Local-only", "Centralised"]
    assert fedit.measured("response_loss") == [10 / 8, 12 / 8]
    assert fedit.mean("response_loss") == 11 / 8
    assert flora.difference is not None
    found = flora.difference.metrics["response_loss"]
    assert found["seeds"] == [0, 1]
    assert found["by_seed"] == [-2 / 8, -2 / 8]
    assert found["mean"] == -0.25
    assert found["deviation"] == 0
    low, high = found["interval"]
    assert -0.5 <= low <= -0.25 <= high <= 0
    assert flora.measured("gap_closed") == [pytest.approx((3 - 1) / (3 - 0.5)), pytest.approx((3 - 1.25) / (3 - 0.5))]
    assert local.difference is not None
    assert local.difference.metrics["response_loss"]["by_seed"] == [24 / 8 - 10 / 8, 24 / 8 - 12 / 8]
    assert local.measured("worst_client") == [4.0, 4.0]
    assert central.measured("response_loss") == [0.5, 0.5]
    assert fedit.difference is None


def test_bytes_are_per_client_and_round(two_rules):
    values = two_rules.groups[0].runs[0].values
    assert (values["bytes"], values["bytes_up"], values["bytes_down"]) == (800, 200 / 2, 600 / 4)
    assert values["curve"] == {"round": [1, 2], "train_loss": [2.0, 2.0], "test_loss": [2.0, 1.0]}
    assert values["by_category"]["response_loss"] == {"a": 7 / 6, "b": 3 / 2}


def pairs_of(rng: np.random.Generator, num_rows: int, seeds: int, pool: int) -> list[Pair]:
    """Test rows drawn from a pool, so that seeds have some in common."""
    chosen = [rng.choice(pool, num_rows, replace=False) for _ in range(seeds)]
    hardness = rng.normal(0, 2, pool)
    return [
        Pair(
            [str(row).encode() for row in rows],
            hardness[rows] + rng.normal(0.3, 1, num_rows),
            rng.integers(1, 9, num_rows).astype(float),
        )
        for rows in chosen
    ]


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), num_rows=st.integers(14, 20), seeds=st.integers(1, 3), extra=st.integers(0, 10))
def test_the_interval_is_that_of_a_plain_loop(seed, num_rows, seeds, extra):
    pairs = pairs_of(np.random.default_rng(seed), num_rows, seeds, num_rows + extra)
    rows = list(dict.fromkeys(row for pair in pairs for row in pair.rows))
    rng = derive_rng(0, "bootstrap", "comparison")
    draws = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=NUM_RESAMPLES)
    means = []
    for draw in draws:
        times = dict(zip(rows, draw, strict=True))
        ratios = []
        for pair in pairs:
            top = sum(times[row] * each for row, each in zip(pair.rows, pair.differences, strict=True))
            bottom = sum(times[row] * each for row, each in zip(pair.rows, pair.sizes, strict=True))
            ratios.append(top / bottom)
        means.append(np.mean(ratios))
    found = paired_interval(pairs)
    assert found == pytest.approx(np.percentile(means, [2.5, 97.5]))


def test_a_draw_without_rows_of_a_seed_is_drawn_again():
    """Two seeds of one row each: what is left are the draws that have either row once."""
    pairs = [Pair([row], np.array([each]), np.ones(1)) for row, each in ((b"x", 1.0), (b"y", 2.0))]
    assert paired_interval(pairs) == [1.5, 1.5]
    assert paired_interval(pairs[:1]) is None


def test_the_interval_covers_the_truth():
    """Rows differ by 0.3 per token on average; 95 of 100 intervals should hold that, for any overlap of test sets."""
    rng = np.random.default_rng(0)
    for share in ("same rows", "own rows"):
        covered = 0
        for _ in range(100):
            pool = rng.integers(1, 9, 90).astype(float)
            noise = rng.normal(0, 1, 90)
            pairs = []
            for seed in range(3):
                rows = np.arange(30) if share == "same rows" else np.arange(30 * seed, 30 * seed + 30)
                differences = pool[rows] * (0.3 + noise[rows])
                pairs.append(Pair([str(row).encode() for row in rows], differences, pool[rows]))
            low, high = paired_interval(pairs) or [0, 0]
            covered += low <= 0.3 <= high
        assert 87 <= covered <= 99, share  # the same rows drawn anew for each seed would cover it in three of four


def test_seeds_with_the_same_rows_make_the_interval_no_narrower():
    rng = np.random.default_rng(1)
    differences, sizes = rng.normal(1, 1, 50), np.ones(50)
    rows = [[str(index + 50 * seed).encode() for index in range(50)] for seed in range(3)]
    one = paired_interval([Pair(rows[0], differences, sizes)])
    same = paired_interval([Pair(rows[0], differences, sizes)] * 3)
    own = paired_interval([Pair(each, differences, sizes) for each in rows])
    assert one is not None
    assert own is not None
    assert same == pytest.approx(one)
    assert own[1] - own[0] == pytest.approx((one[1] - one[0]) / 3**0.5, rel=0.15)


def test_one_seed_agrees_with_the_run_s_own_evaluation(tmp_path):
    rng = np.random.default_rng(2)
    num_tokens = tuple(int(each) for each in rng.integers(3, 30, 60))
    losses = {name: [float(each) for each in rng.gamma(9, 1, 60)] for name in ("local/x", "central", "federated")}
    folder = write_run(tmp_path / "run", losses, num_tokens=num_tokens)
    theirs = RunFolder.read(folder).evaluation["differences"]["federated_minus_local"]
    found = compared(folder).groups[1].difference
    assert found is not None
    ours = found.metrics["response_loss"]
    assert ours["mean"] == pytest.approx(-theirs["response_loss"]["all"])
    low, high = theirs["confidence"]["response_loss"]["all"]
    assert ours["interval"] == pytest.approx([-high, -low], abs=0.1 * (high - low))


# -------------------------------------------------------------------------------------------------------- the groups


def test_groups_differ_by_more_than_the_seed_and_are_named_by_what_distinguishes_them(tmp_path):
    losses = {"federated": [1.0, 1.0, 1.0]}
    keys = ((8, 1e-3), (8, 1e-2), (4, 1e-2))
    folders = [
        write_run(tmp_path / f"{rank}-{rate}-{seed}", losses, seed=seed, adapter={"rank": rank}, client={"rate": rate})
        for rank, rate in keys
        for seed in (1, 0)
    ]
    groups = group_runs(folders)
    assert [group.seeds for group in groups] == [[0, 1]] * 3
    assert [group.label for group in groups] == [
        "adapter.rank=8, client.rate=0.001", "adapter.rank=8, client.rate=0.01", "adapter.rank=4, client.rate=0.01"
    ]  # fmt: skip
    assert [group.label for group in group_runs(folders[:4])] == ["client.rate=0.001", "client.rate=0.01"]
    assert [group.label for group in group_runs(folders[:2])] == ["quickstart"]


def test_what_cannot_be_compared_is_refused(tmp_path):
    losses = {"federated": [1.0, 1.0, 1.0]}
    one, again = (write_run(tmp_path / name, losses) for name in ("one", "again"))
    with pytest.raises(ConfigError, match="one is given twice"):
        group_runs([one, tmp_path / "again" / ".." / "one"])
    with pytest.raises(ConfigError, match=r"again and .*one are runs of the same configuration and seed"):
        group_runs([one, again])
    with pytest.raises(ConfigError, match="is not a run: it is no folder"):
        group_runs([tmp_path / "nowhere"])
    (again / "evaluation.json").unlink()
    with pytest.raises(ConfigError, match=r"again is not evaluated: 2 of 2 rounds are done\. Go on with `fedit run"):
        group_runs([again])
    (again / "partition.json").write_text('{"run": "x", "clients": {}}')
    with pytest.raises(ConfigError, match="again is a run across sites"):
        group_runs([again])


def test_runs_on_other_rows_or_of_another_tokenizer_have_no_difference(tmp_path):
    def run(name: str, **changes: Any) -> Path:
        losses = changes.pop("losses", {"federated": [2.0, 3.0, 5.0]})
        return write_run(tmp_path / name, losses, answered=True, adapter={"rank": name}, **changes)

    changes: dict[str, dict[str, Any]] = {
        "others": {"texts": "else"},
        "tokens": {"num_tokens": (1, 2, 4)},
        "diverged": {"losses": {"federated": [2.0, np.inf, 5.0]}},
        "seed": {"seed": 1},
    }
    found = compared(run("one"), *(run(name, **keys) for name, keys in changes.items()))
    differences = {group.choices["adapter.rank"]: group.difference for group in found.groups[1:]}
    assert {name: None if each is None else each.notes for name, each in differences.items()} == {
        "others": ["other test rows (seed 0)"],
        "tokens": ["another tokenizer, so losses per token do not compare (seed 0)"],
        "diverged": ["a loss is not finite (seed 0)"],
        "seed": ["the reference has no such seed (seed 1)"],
    }
    paired = {name: set() if each is None else set(each.metrics) for name, each in differences.items()}
    assert paired["others"] == paired["seed"] == set()
    assert paired["tokens"] == paired["diverged"] == {"exact_match", "rouge_l"}
    assert all("difference" not in run.values for group in found.groups for run in group.runs)
    assert "adapter.rank=others cannot be compared" in state_differences(found)
    assert "Difference, other test rows (seed 0): adapter.rank=others." in to_markdown(found)


def test_rows_that_are_not_known_are_not_compared(tmp_path):
    """Of whichever run the answers are gone; a run's own baselines answered the same rows in any case."""
    folders = [
        write_run(
            tmp_path / name, {"federated": [2, 3, 5], "central": [1, 1, 2]}, texts=name, aggregation={"name": name}
        )
        for name in ("fedit", "flora")
    ]
    for gone in (folders[1:], folders):
        for folder in gone:
            (folder / "answers.jsonl").unlink(missing_ok=True)
        found = compared(*folders)
        other = found.groups[1].difference
        assert other is not None
        assert dict(other.metrics) == {}
        assert other.notes == ["answers are gone, so the test rows are not known (seed 0)"]
        assert found.groups[1].measured("difference") == []
        assert found.groups[2].difference is not None
        assert found.groups[2].difference.metrics["response_loss"]["mean"] == -6 / 8


def test_runs_keep_their_own_baselines(tmp_path):
    """Those of the reference stand in only where a run has none."""
    first = write_run(tmp_path / "a", {"federated": [2, 2, 4], "local/x": [8, 8, 16], "central": [1, 1, 2]})
    own = {"federated": [2, 2, 4], "local/x": [3, 3, 6], "central": [1, 1, 2]}
    second = write_run(tmp_path / "b", own, partition={"name": "iid"})
    third = write_run(tmp_path / "c", {"federated": [2, 2, 4]}, rounds=3)
    shares = [group.mean("gap_closed") for group in compared(first, second, third).trained]
    assert shares == pytest.approx([6 / 7, 1 / 2, 6 / 7])


def test_settings_in_another_order_are_the_same(tmp_path):
    columns = {"instruction": "q", "response": "a"}
    folders = [
        write_run(tmp_path / str(seed), {"federated": [2, 2, 4]}, seed=seed, data={"columns": dict(own)})
        for seed, own in enumerate((columns.items(), reversed(columns.items())))
    ]
    (group,) = compared(*folders).groups
    assert group.seeds == [0, 1]


def test_an_interval_that_is_known_is_that_of_the_same_numbers(two_rules):
    groups = [group for group in two_rules.groups if not group.is_baseline]
    for run in groups[1].runs:
        (run.folder / "answers.jsonl").unlink()
    changed = [replace(run, values={**run.values, "response_loss": 9.0}) for run in groups[1].runs]
    known = {(groups[1].label, "federated"): groups[1].difference}
    found = compare("Comparison", [groups[0], replace(groups[1], runs=changed)], known).groups[1].difference
    assert found is not None
    assert found.metrics["response_loss"]["interval"] is None


def test_answers_that_are_gone_leave_no_interval_but_what_was_known(two_rules):
    flora = two_rules.groups[1]
    for run in flora.runs:
        (run.folder / "answers.jsonl").unlink()
    groups = [group for group in two_rules.groups if not group.is_baseline]
    again = compare("Comparison", groups).groups[1].difference
    assert again is not None
    assert again.metrics["response_loss"]["mean"] == -0.25
    assert again.metrics["response_loss"]["interval"] is None
    assert again.notes == ["no interval, for answers are gone (seed 0, 1)"]
    assert again.direction == 0
    assert flora.difference is not None
    known = compare("Comparison", groups, {(flora.label, "federated"): flora.difference}).groups[1].difference
    assert known == flora.difference


def test_a_model_that_answered_other_rows_is_damage(tmp_path):
    folder = write_run(tmp_path / "run", {"central": [1.0, 1.0, 1.0], "federated": [1.0, 1.0, 1.0]})
    lines = (folder / "answers.jsonl").read_text().splitlines()
    (folder / "answers.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(DataError, match="federated did not answer the rows of the others"):
        compared(folder)


def test_a_difference_is_claimed_only_where_interval_and_seeds_agree(tmp_path):
    def group(rank: int, shift: list[float]) -> list[Path]:
        rows = [[3.0 + by, 4.0 + by, 8.0 + 1.1 * by] for by in shift]
        return [
            write_run(tmp_path / f"{rank}-{seed}", {"federated": each}, seed=seed, adapter={"rank": rank})
            for seed, each in enumerate(rows)
        ]

    found = compared(*group(1, [0, 0]), *group(2, [-1, -2]), *group(3, [1, 2]), *group(4, [1, -0.5]))
    assert [each.difference.direction for each in found.groups if each.difference] == [-1, 1, 0]
    text = state_differences(found)
    assert re.search(r"adapter\.rank=2 is lower by 0\.\d+ \(95% interval", text)
    assert re.search(r"adapter\.rank=3 is higher by 0\.\d+ \(95% interval", text)
    assert "adapter.rank=4 cannot be told apart (95% interval" in text


def test_models_of_clients_count_by_their_mean_and_their_worst(tmp_path):
    losses = {"federated/x": [2.0, 2.0, 4.0], "federated/y": [4.0, 4.0, 8.0]}
    values = measure_run(RunFolder.read(write_run(tmp_path / "run", losses)))
    assert (values["response_loss"], values["worst_client"]) == (1.5, 2.0)


# -------------------------------------------------------------------------------------------------------- the output


def test_the_table_and_its_markdown(two_rules):
    headings, lines = table(two_rules)
    assert headings[:4] == ["aggregation.name", "Seeds", "Response loss", "Difference"]
    deviation = statistics.stdev([10 / 8, 12 / 8])
    assert lines[0][:4] == ["fedit", "2", f"1.375 ± {deviation:.3f}", "–"]
    assert re.fullmatch(r"−0\.2500 \(−0\.\d{4} to −?0\.\d{4}\)", lines[1][3])
    assert [line[0] for line in lines[2:]] == ["Local-only", "Centralised"]
    assert to_markdown(two_rules).splitlines()[2].startswith("| fedit | 2 | 1.375")
    narrow, _ = table(two_rules, details=False)
    assert set(headings) - set(narrow) == {"Worst client", "Training tokens", "Down"}


def test_of_how_many_runs_a_mean_is(tmp_path):
    losses = ([2.0, 2.0, 4.0], [2.0, np.nan, 4.0])
    found = compared(
        *(write_run(tmp_path / str(seed), {"federated": each}, seed=seed) for seed, each in enumerate(losses))
    )
    assert table(found)[1][0][2] == "1.000 (1 of 2)"
    assert "$1.000$ (1 of 2)" in to_latex(found)


def test_csv_has_a_line_for_each_run(two_rules):
    lines = list(csv.DictReader(io.StringIO(to_csv(two_rules))))
    assert [(line["aggregation.name"], line["seed"]) for line in lines] == [
        ("fedit", "0"), ("fedit", "1"), ("flora", "0"), ("flora", "1")
    ]  # fmt: skip
    assert float(lines[2]["response_loss"]) == 1.0
    assert float(lines[2]["difference"]) == -0.25
    assert (lines[0]["local"], lines[2]["local"], lines[2]["bytes"]) == ("3.0", "3.0", "800")
    assert (lines[3]["folder"], lines[3]["command"]) == (str(two_rules.groups[1].runs[1].folder), "fedit run 1")


def test_latex_is_escaped_and_its_rows_are_whole(tmp_path):
    losses = {"federated": [2.0, 2.0, 4.0]}
    names = ("plain", HOSTILE, "two\nlines")
    found = compared(*(write_run(tmp_path / str(i), losses, data={"path": each}) for i, each in enumerate(names)))
    text = to_latex(found)
    assert escape(HOSTILE) == (
        r"\textless{}script\textgreater{}alert('\&')\textless{}/script\textgreater{} 100\% \$x\_1\textasciicircum{}2\$ "
        r"\textbackslash{} \{\textasciitilde{}\}"
    )
    assert escape(HOSTILE) in text
    body = text[text.index("\\toprule") : text.index("\\bottomrule")]
    rows = [line for line in body.splitlines() if not line.startswith("\\")]
    columns = re.search(r"\\begin\{tabular\}\{([lr]+)\}", text)
    assert columns is not None
    assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {len(columns[1]) - 1}
    assert all(row.endswith(r" \\") for row in rows)
    after = text[text.index("\\end{tabular}") :].splitlines()[1:]
    assert len(after) >= 3
    assert all(line.startswith("% ") for line in after)


def test_no_row_of_latex_begins_as_an_argument_of_the_line_before(tmp_path):
    losses = {"federated": [2.0, 2.0, 4.0]}
    layers = (["q_proj"], "all-linear")
    found = compared(*(write_run(tmp_path / each[0], losses, adapter={"target_modules": each}) for each in layers))
    rows = [line for line in to_latex(found).splitlines() if "proj" in line and not line.startswith("%")]
    assert [row[:4] for row in rows] == ['{}["']


def test_latex_has_the_best_in_bold(two_rules):
    rows = [line for line in to_latex(two_rules).splitlines() if line.startswith(("fedit", "flora", "Centralised"))]
    assert r"$1.375 \pm 0.177$" in rows[0]
    assert r"$\mathbf{1.125} \pm 0.177$" in rows[1]
    assert r"$-0.2500$ {\scriptsize [$-0." in rows[1]
    assert "mathbf" not in rows[2]


def test_the_page_needs_nothing_and_leads_to_runs_and_commands(two_rules, tmp_path):
    out = tmp_path / "a b" / "out"
    page = write_comparison(two_rules, out, "compare").read_text()
    assert {path.name for path in out.iterdir()} == {"compare.html", "compare.csv", "compare.tex"}
    assert "http:" not in page
    assert "https:" not in page
    assert "<script" not in page
    links = re.findall(r'href="([^"]*)"', page)
    assert "../../fedit-0/report.html" in links
    for link in links:
        assert f'id="{link[1:]}"' in page if link.startswith("#") else (out / link).is_file()
    ids = re.findall(r' id="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert page.count("<code>fedit run 0</code>") == 2
    assert page.count("<svg") == page.count("<figcaption>") == 3
    assert 'class="number best" href="#group-1">1.125</a>' in page
    assert "#0101" not in page


def test_the_page_has_a_difference_and_its_interval_in_the_same_digits(tmp_path):
    losses = ([2.0, 3.0, 5.0], [2.0, 3.0, 5.001])
    folders = [
        write_run(tmp_path / str(i), {"federated": each}, answered=True, adapter={"rank": i})
        for i, each in enumerate(losses)
    ]
    page = write_comparison(compared(*folders), tmp_path / "out", "compare").read_text()
    paired = page[page.index("Paired differences in all metrics") :]
    numbers = re.findall(r"(?<![\d.])[−-]?0\.0\d+", paired[: paired.index("</table>")])
    assert "0.0001" in numbers


def test_the_page_escapes_any_text_and_says_what_is_gone(tmp_path):
    losses = {"federated": [2.0, 2.0, 4.0]}
    folders = [write_run(tmp_path / str(i), losses, data={"path": each}) for i, each in enumerate(("plain", HOSTILE))]
    found = compared(*folders)
    (folders[1] / "report.html").unlink()
    page = write_comparison(found, tmp_path, "compare").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert f"{folders[1]} (gone)" in page


def test_many_groups_and_runs_of_an_older_fedit(tmp_path):
    folders = []
    for rank in range(1, 13):
        folders.append(write_run(tmp_path / str(rank), {"federated": [1.0 + rank, 2.0, 4.0]}, adapter={"rank": rank}))
        described = json.loads((folders[-1] / "config.json").read_text())
        del described["command"]
        (folders[-1] / "config.json").write_text(json.dumps(described))
    found = compared(*folders)
    page = write_comparison(found, tmp_path, "compare").read_text()
    assert "Of 11 others, 0 have a lower loss than adapter.rank=1" in page
    assert "Grey: 4 more groups." in page
    assert "No command is recorded" in page
