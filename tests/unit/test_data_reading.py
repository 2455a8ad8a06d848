"""What each kind of file, folder or Hub dataset gives, and how a bad one is named."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedit.config import DataConfig
from fedit.data import load_examples
from fedit.data.reading import read_path
from fedit.interfaces import DataError, Example, Turn

ROWS: list[dict[str, object]] = [
    {"instruction": f"Ask {i}?", "context": "", "response": f"Answer {i}", "category": "ab"[i % 2]} for i in range(8)
]


def write_lines(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def load(path: object, **config: object) -> tuple[list[Example], list[Example]]:
    return load_examples(DataConfig.model_validate({"path": str(path), "test_per_category": 1, **config}), seed=0)


def refusal(path: object, **config: object) -> str:
    with pytest.raises(DataError) as caught:
        load(path, **config)
    return str(caught.value)


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "rows.jsonl", ROWS)


def as_json(path: Path) -> Path:
    path.write_text(json.dumps(ROWS, indent=1))
    return path


def as_csv(path: Path) -> Path:
    cells = [",".join(f'"{value}"' for value in row.values()) for row in ROWS]
    path.write_text("\n".join([",".join(ROWS[0]), *cells]) + "\n")
    return path


def as_parquet(path: Path) -> Path:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist(ROWS), path)
    return path


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("rows.jsonl", lambda path: write_lines(path, ROWS)),
        ("lines.json", lambda path: write_lines(path, ROWS)),
        ("list.json", as_json),
        ("rows.csv", as_csv),
        ("rows.parquet", as_parquet),
    ],
)
def test_every_format_gives_the_same_rows(tmp_path: Path, name, write) -> None:
    rows = read_path(str(write(tmp_path / name)), seed=0)
    assert [dict(row.values) for row in rows.train] == ROWS
    assert rows.test is None
    assert {row.source.partition(name)[0] for row in rows.train} == {f"{tmp_path}/"}


def test_sources_are_lines_or_row_numbers(tmp_path: Path, lines: Path) -> None:
    assert read_path(str(lines), 0).train[2].source == f"{lines}:3"
    path = as_json(tmp_path / "list.json")
    assert read_path(str(path), 0).train[2].source == f"{path} row 3"
    path = tmp_path / "rows.csv"
    path.write_text('instruction,response\n"two\nlines",yes\n\nlast,no\n')
    assert [row.source for row in read_path(str(path), 0).train] == [f"{path}:2", f"{path}:5"]


def test_csv_cells_stay_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("instruction,response\nHow many?,42\nWhich country is NA?,NA\nWhich is true?,true\n")
    (train, test) = load(path)
    assert {example.response for example in train + test} == {"42", "NA", "true"}


def test_a_byte_order_mark_and_a_line_separator_inside_a_string(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    row = '{"instruction": "one\u2028two", "response": "yes"}\r\n'
    path.write_bytes(("\ufeff" + row * 2).encode())
    assert [row.values["instruction"] for row in read_path(str(path), 0).train] == ["one\u2028two"] * 2


@pytest.mark.parametrize("name", ["absent.jsonl", "absent", "./no/where", "folder/absent.json"])
def test_missing_file(name: str) -> None:
    assert f"'{name}': no such file or folder" in refusal(name)


@pytest.mark.parametrize("name", ["empty.jsonl", "empty.json", "list.json", "empty.csv", "header.csv"])
def test_empty_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text({"list.json": "[]", "header.csv": "instruction,response\n"}.get(name, "\n"))
    assert refusal(tmp_path / name) == f"{tmp_path / name}: the file has no rows."


@pytest.mark.parametrize(
    ("name", "text", "where"),
    [
        (
            "rows.jsonl",
            '{"instruction": "a", "response": "b"}\n\n{"instruction": "a",\n',
            "rows.jsonl:3: not valid JSON",
        ),
        ("rows.json", '[{"instruction": "a"},\n {"instruction": }]', "rows.json:2: not valid JSON at column 18"),
        ("rows.jsonl", '{"a": "b"}\n["a"]\n', "rows.jsonl:2: expected an object with named columns, got list"),
        ("rows.json", '[{"a": "b"}, 3]', "rows.json row 2: expected an object with named columns, got int"),
        (
            "rows.csv",
            "instruction,response\na,b\na,b,c\n",
            "rows.csv:3: expected 2 cells (instruction, response), got 3",
        ),
        ("rows.csv", 'instruction,response\na,"b\n', "rows.csv:2: not valid CSV"),
        ("rows.csv", "a,a\n1,2\n", "rows.csv:1: two columns have the same name"),
        ("rows.parquet", "PAR0", "rows.parquet: not a valid Parquet file"),
        ("rows.txt", "hello", "rows.txt: cannot read .txt. Use .jsonl, .json, .csv, .parquet"),
    ],
)
def test_a_malformed_file_is_named_with_its_line(tmp_path: Path, name: str, text: str, where: str) -> None:
    (tmp_path / name).write_text(text)
    assert where in refusal(tmp_path / name)


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"instruction": "caf\xe9"}')
    assert "byte 20 is not UTF-8" in refusal(path)


# --------------------------------------------------------------------------------------------------------- folders


@pytest.fixture
def clients(tmp_path: Path) -> Path:
    folder = tmp_path / "clients"
    folder.mkdir()
    for k in (0, 2, 10):
        rows = [{"instruction": f"Ask {k}.{i}?", "response": "yes", "category": f"c{k}"} for i in range(3)]
        (folder / f"local_training_{k}.json").write_text(json.dumps(rows))
    (folder / "README.md").write_text("Three clients.")
    return folder


def test_folder_of_client_files(clients: Path) -> None:
    (clients / "global_test.json").write_text(json.dumps([{"instruction": "Ask?", "response": "yes"}]))
    train, test = load(clients)
    assert [example.client for example in train] == ["0"] * 3 + ["2"] * 3 + ["10"] * 3
    assert [(example.client, example.turns[0].instruction) for example in test] == [(None, "Ask?")]
    assert train[-1].source == f"{clients / 'local_training_10.json'} row 3"


def test_folder_without_test_file_holds_rows_out(clients: Path) -> None:
    train, test = load(clients)
    assert len(train) == 6
    assert sorted(example.category for example in test) == ["c0", "c10", "c2"]


def test_folder_with_named_client_files(tmp_path: Path) -> None:
    write_lines(tmp_path / "latest.jsonl", ROWS[:2])
    write_lines(tmp_path / "oslo.jsonl", [dict(row, client="port") for row in ROWS[2:4]])
    write_lines(tmp_path / "test.jsonl", ROWS[4:])
    train, test = load(tmp_path)
    assert {example.client for example in train} == {"latest", "port"}  # a column says more than a file's name
    assert len(test) == 4


def test_two_files_of_one_client(clients: Path) -> None:
    write_lines(clients / "local_training_2.jsonl", ROWS)
    assert "local_training_2.json and local_training_2.jsonl both hold client '2'" in refusal(clients)


def test_a_client_file_without_rows(clients: Path) -> None:
    (clients / "local_training_3.json").write_text("[]")
    assert "local_training_3.json: the file has no rows" in refusal(clients)


def test_two_test_files(clients: Path) -> None:
    for name in ("test.jsonl", "global_test.json"):
        write_lines(clients / name, ROWS)
    assert "2 files look like the test set: test.jsonl, global_test.json" in refusal(clients)


def test_a_folder_without_client_files(tmp_path: Path) -> None:
    assert "no client file" in refusal(tmp_path)


# ------------------------------------------------------------------------------------------------------- test rows


def test_missing_held_out_rows_are_named_as_such(lines: Path) -> None:
    with pytest.raises(DataError, match=r"\[data\] test_path = 'absent.jsonl': no such file"):
        load_examples(DataConfig(path=str(lines), test_path="absent.jsonl"), 0)


def test_a_client_whose_rows_are_all_held_out_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"instruction": f"{n}?", "response": "yes", "client": "a", "category": "x"} for n in range(5)]
    rows.append({"instruction": "0?", "response": "no", "client": "lost", "category": "x"})
    (tmp_path / "test.json").write_text(json.dumps(rows[-1:]))
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    load_examples(DataConfig(path=str(tmp_path / "rows.json"), test_path=str(tmp_path / "test.json")), 0)
    assert "none is left to train on: lost." in caplog.text


def test_rows_are_held_out_by_category_and_seed(lines: Path) -> None:
    train, test = load(lines, test_per_category=2)
    assert sorted(example.category for example in test) == ["a", "a", "b", "b"]
    assert {example.source for example in train}.isdisjoint(example.source for example in test)
    assert len(train) == 4
    assert load(lines, test_per_category=2) == (train, test)
    config = DataConfig(path=str(lines), test_per_category=2)
    draws = {tuple(example.source for example in load_examples(config, seed)[1]) for seed in range(10)}
    assert len(draws) > 1


def test_a_category_must_keep_training_rows(lines: Path) -> None:
    assert "Category 'a' has 4 rows: holding out 4 leaves none" in refusal(lines, test_per_category=4)


def test_test_path_wins(lines: Path, clients: Path) -> None:
    (clients / "global_test.json").write_text(json.dumps([{"instruction": "Ask?", "response": "yes"}]))
    train, test = load(clients, test_path=str(lines))
    assert (len(train), len(test)) == (9, 8)
    assert load(lines, test_path=str(clients))[1][0].turns == (Turn("Ask?", "yes"),)


def test_training_rows_that_are_test_rows_are_removed(
    tmp_path: Path, lines: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other_response = dict(ROWS[2], response="Another answer")
    test_file = write_lines(tmp_path / "held_out.jsonl", [ROWS[0], ROWS[1], other_response])
    with caplog.at_level(logging.WARNING):
        train, test = load(lines, test_path=str(test_file))
    assert (len(train), len(test)) == (6, 3)
    assert "2 training rows removed" in caplog.text
    assert "All 8 training rows are also test rows" in refusal(lines, test_path=str(lines))


# ------------------------------------------------------------------------------------------------- Hub and builtin


def test_hub_dataset_with_a_test_split(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = datasets.Dataset.from_list(ROWS)
    splits = datasets.DatasetDict({"train": rows.select(range(6)), "test": rows.select(range(6, 8))})
    monkeypatch.setattr(datasets, "load_dataset", lambda name: {"owner/rows": splits}[name])
    train, test = load("owner/rows")
    assert (len(train), len(test)) == (6, 2)
    assert train[1].source == "owner/rows train row 2"


def test_hub_dataset_without_test_split(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    splits = datasets.DatasetDict({"all": datasets.Dataset.from_list(ROWS)})
    monkeypatch.setattr(datasets, "load_dataset", lambda name: splits)
    train, test = load("owner/rows")
    assert (len(train), len(test)) == (6, 2)


def test_hub_failure_says_what_to_do() -> None:
    message = refusal("nobody/has-this-dataset")
    assert "'nobody/has-this-dataset' is no file or folder here" in message
    assert "HF_HUB_OFFLINE=1" in message


def test_builtin(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = []

    def generate(seed: int) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
        seeds.append(seed)
        return [dict(row, checks={"answer": ["x"]}) for row in ROWS[:6]], ROWS[6:]

    monkeypatch.setitem(sys.modules, "fedit.builtin.pasture", SimpleNamespace(generate=generate))
    train, test = load_examples(DataConfig(path="builtin:pasture"), seed=3)
    assert (len(train), len(test), seeds) == (6, 2, [3])
    assert train[0].checks == {"answer": ["x"]}
    assert "Did you mean 'builtin:pasture'?" in refusal("builtin:pastures")


def test_shared_dolly(shared: Path) -> None:
    train, test = load(shared / "data" / "dolly15k" / "10")
    assert len(train) + len(test) == 15_011
    assert list(dict.fromkeys(example.client for example in train)) == [str(k) for k in range(10)]
    assert len({example.category for example in train}) == 8
