"""builtin:pasture: reproducible, verifiable, and split without overlap."""

import hashlib
import itertools
import json
import re
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedit.builtin import CRIA_FOLDER
from fedit.builtin.pasture import CATEGORIES, corpus, generate, probes
from fedit.builtin.pasture.world import ANIMALS, FODDER, PRODUCTS, RELATIONS, TOOLS, TRAVELLERS, WORLD
from fedit.evaluation.checks import passes

SEEDS = (0, 1, 2)


def test_same_seed_same_rows_other_seed_other_rows() -> None:
    assert generate(7, num_train=80, num_test=16) == generate(7, num_train=80, num_test=16)
    assert generate(7, num_train=80, num_test=16) != generate(8, num_train=80, num_test=16)


def test_the_world_is_the_one_the_base_learned() -> None:
    facts = json.dumps([(fact.relation, fact.subject, fact.value) for fact in WORLD.facts])
    assert hashlib.sha256(facts.encode()).hexdigest()[:16] == "539fc48bd95284d2", (
        "the facts changed: pre-train builtin:cria again (scripts/pretrain_cria.py), then update this digest"
    )


def test_the_corpus_is_the_one_the_base_read() -> None:
    digest = hashlib.sha256("\n\n".join(corpus(500, seed=0)).encode()).hexdigest()[:16]
    assert digest == "1c4f9383fd3fa054", (
        "the corpus changed: pre-train builtin:cria again (scripts/pretrain_cria.py), then update this digest"
    )


def test_the_base_knows_the_facts_and_reads_scenes_but_follows_no_instruction() -> None:
    tokenizer, base = AutoTokenizer.from_pretrained(CRIA_FOLDER), AutoModelForCausalLM.from_pretrained(CRIA_FOLDER)

    def continues(text: str, continuation: str) -> bool:
        """Whether every token of the continuation is the most likely one."""
        before, after = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (text, continuation))
        with torch.no_grad():
            logits = base(input_ids=torch.tensor([[tokenizer.bos_token_id, *before, *after]])).logits[0]
        return logits[-len(after) - 1 : -1].argmax(-1).tolist() == after

    known = [continues(text, continuation) for _, text, continuation in list(probes(2, seed=5))[::5]]
    assert len(known) > 100
    assert sum(known) / len(known) > 0.98
    _, rows = generate(0, num_test=40)
    prompt = "### Instruction:\n{instruction}\n\n### Response:\n"
    assert sum(continues(prompt.format(**row), row["response"]) for row in rows if not row["context"]) == 0


def test_every_relation_gives_every_subject_one_value() -> None:
    for relation, (subjects, values) in RELATIONS.items():
        assert {WORLD.value(relation, subject) for subject in subjects} <= set(values)


@pytest.mark.parametrize("num_rows", [8, 20, 83])
def test_sizes_and_categories(num_rows: int) -> None:
    train, test = generate(0, num_train=num_rows, num_test=num_rows)
    for rows in (train, test):
        counts = Counter(row["category"] for row in rows)
        assert sum(counts.values()) == num_rows
        assert set(counts) == set(CATEGORIES)
        assert max(counts.values()) - min(counts.values()) <= 1


def test_rows_are_json_and_complete() -> None:
    train, test = generate(0, num_train=80, num_test=80)
    for row in train + test:
        assert json.loads(json.dumps(row)) == row
        assert list(row) == ["instruction", "context", "response", "category", "checks"]
        assert row["instruction"]
        reads_context = row["category"] in {"closed_qa", "information_extraction", "summarization"}
        assert bool(row["context"]) == reads_context


@pytest.mark.parametrize("seed", SEEDS)
def test_responses_pass_their_own_checks(seed: int) -> None:
    train, test = generate(seed)
    for row in train + test:
        assert passes(row["checks"], row["response"]), row


@pytest.mark.parametrize("category", CATEGORIES)
def test_checks_reject_wrong_answers(category: str) -> None:
    _, test = generate(0)
    for row in (row for row in test if row["category"] == category):
        response = row["response"]
        others = [other["response"] for other in test if other["checks"] != row["checks"]]
        accepted = [other for other in others if passes(row["checks"], other)]
        assert len(accepted) <= 0.05 * len(others), (row, accepted)  # two topics or scenes may share an answer
        for wrong in ("", "wool", row["context"] or "no", f"{response} {response}", response[: len(response) // 3]):
            assert not passes(row["checks"], wrong), (row, wrong)


@pytest.mark.parametrize("seed", SEEDS)
def test_training_and_test_do_not_overlap(seed: int) -> None:
    train, test = generate(seed)
    seen = {_composition(row) for row in train}
    assert not seen & {_composition(row) for row in test}


def _composition(row: dict) -> str:
    """What answering needs, worked out from the row alone."""
    words = set(row["instruction"].replace("?", " ").replace(".", " ").replace(",", " ").split())
    match row["category"]:
        case "open_qa":
            facts = [fact for fact in WORLD.facts if fact.subject in words and fact.value == row["response"]]
            return f"{facts}"
        case "general_qa":
            return f"{sorted(words & set(ANIMALS + PRODUCTS + FODDER))} {'eat' in row['instruction']}"
        case "classification":
            return f"{sorted(row['checks']['labels'])}"
        case "brainstorming":
            return f"{sorted(row['checks']['list']['allowed'])}"
        case "creative_writing":
            return f"{row['checks']['mentions']}"
    return row["context"]


def test_a_part_of_the_test_wordings_is_new() -> None:
    train, test = generate(0)
    known = {_wording(row) for row in train}
    new = [row for row in test if _wording(row) not in known]
    assert 0.15 < len(new) / len(test) < 0.6


def _wording(row: dict) -> str:
    """The instruction without the words that make it this task and no other."""
    names = {*itertools.chain.from_iterable(s + v for s, v in RELATIONS.values()), *TOOLS, *TRAVELLERS}
    words = re.findall(r"\w+", row["instruction"])
    return " ".join(word for word in words if word not in names)


def test_corpus_is_reproducible_and_never_instructs() -> None:
    documents = list(corpus(3000, seed=1))
    assert documents[:100] == list(corpus(100, seed=1))
    assert documents[:100] != list(corpus(100, seed=2))
    text = "\n".join(documents)
    assert "?" not in text
    assert "###" not in text
    for word in ("Instruction", "Response", "Question", "Answer"):
        assert word.lower() not in text.lower().split()


def test_corpus_states_every_fact() -> None:
    sentences = [sentence for document in corpus(6000, seed=0) for sentence in document.split(".")]
    words_of = [set(sentence.split()) for sentence in sentences]
    for fact in WORLD.facts:
        assert any({fact.subject, fact.value} <= words for words in words_of), fact
