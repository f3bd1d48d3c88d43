"""Local data files: every task's columns, right and wrong."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from griffin_evals.tasks import TASKS, local_task
from griffin_evals.tasks.data import file_of, read
from griffin_evals.tasks.errors import BadDataFile, EvaluationError
from griffin_evals.tasks.windows import CONTEXT_WORDS, SCORED_WORDS
from tests.unit.evals.files import GOOD, write, write_text

LAYOUTS = [(task, number) for task, layouts in GOOD.items() for number in range(len(layouts))]


def test_every_task_with_columns_has_a_file_here_for_each_layout() -> None:
    assert {task.name for task in TASKS if task.rows} == GOOD.keys()
    assert all(len(GOOD[task.name]) >= len(task.rows) for task in TASKS if task.rows)


@pytest.mark.parametrize(("task", "layout"), LAYOUTS)
def test_each_layout_becomes_documents(task: str, layout: int, tmp_path: Path) -> None:
    path = write(tmp_path, task, GOOD[task][layout])
    data = read(local_task(task), path)
    assert data.documents


def documents(task: str, layout: int, tmp_path: Path) -> list[Mapping[str, Any]]:
    return list(read(local_task(task), write(tmp_path, task, GOOD[task][layout])).documents)


@pytest.mark.parametrize(
    ("task", "layout", "expected"),
    [
        (
            "piqa",
            0,
            {
                "query": "Question: How does Ada open a tin?\nAnswer:",
                "choices": ["With a tin opener.", "With a feather."],
                "gold": 0,
            },
        ),
        (
            "piqa",
            1,
            {
                "query": "Question: Open a tin.\nAnswer:",
                "choices": ["Use an opener.", "Use a feather."],
                "gold": 0,
            },
        ),
        (
            "hellaswag",
            1,
            {
                "query": "Making tea: She fills the kettle. She",
                "choices": ["boils the water.", "eats. it.", "sings.", "flies."],
                "gold": 0,
            },
        ),
        (
            "copa",
            1,
            {
                "query": "It rained therefore",
                "choices": ["the road was wet.", "the road was gold."],
                "gold": 0,
            },
        ),
        (
            "arc_easy",
            1,
            {"query": "Question: What is ice?\nAnswer:", "choices": ["fire", "water"], "gold": 1},
        ),
        (
            "boolq",
            1,
            {
                "query": "Ada cooks.\nQuestion: does ada cook?\nAnswer:",
                "choices": ["no", "yes"],
                "gold": 1,
            },
        ),
        (
            "lambada",
            0,
            {"context": "She took the boat and rowed to the old", "continuation": " harbour"},
        ),
        (
            "coqa",
            0,
            {
                "prompt": "Ada has a red boat.\n\nQ: Who has a boat?\n\nA: Ada\n\n"
                "Q: Which colour is it?\n\nA:",
                "references": ["Red"],
            },
        ),
        (
            "xsum",
            1,
            {
                "prompt": "###\nArticle: Snow fell all day in the hills.\n\n"
                "Summarize the above article in 1 sentence.\nIt snowed.\n\n"
                "###\nArticle: The old bridge was opened again.\n\n"
                "Summarize the above article in 1 sentence.",
                "references": ["A bridge is open."],
            },
        ),
    ],
)
def test_documents_read_as_lm_eval_writes_them(
    task: str, layout: int, expected: Mapping[str, Any], tmp_path: Path
) -> None:
    assert documents(task, layout, tmp_path)[0] == expected


def test_the_first_lines_of_gsm8k_are_solved_examples_and_are_not_evaluated(tmp_path: Path) -> None:
    made = documents("gsm8k", 0, tmp_path)
    assert [each["references"] for each in made] == [["12"], ["14"]]
    assert made[0]["prompt"].count("####") == 5
    assert made[0]["prompt"].endswith("Question: 6 boats and 6 boats?\nAnswer:")


def test_the_answers_of_a_conversation_count_once_whatever_their_case(tmp_path: Path) -> None:
    assert documents("coqa", 1, tmp_path)[0]["references"] == ["red", "A red one"]


def test_a_paper_gives_a_document_for_each_question_that_has_an_answer(tmp_path: Path) -> None:
    made = documents("qasper", 1, tmp_path)
    assert [each["references"] for each in made] == [["boats", "red boats, old boats"], ["No"]]


def test_a_program_is_checked_by_the_function_that_it_defines(tmp_path: Path) -> None:
    assert documents("human_eval", 0, tmp_path)[0]["tests"].endswith("check(double)\n")


def test_a_text_is_cut_into_windows_of_words(tmp_path: Path) -> None:
    made = read(local_task("wikitext"), write_text(tmp_path)).documents
    assert len(made) > 2
    for document in made:
        assert len(document["context"].split()) == CONTEXT_WORDS
        assert len(document["continuation"].split()) == SCORED_WORDS
        assert document["continuation"][0].isspace()
        assert not document["context"][-1].isspace()
    assert "@,@" not in made[0]["context"]


CHOICES = {"query": "a", "choices": ["b", "c"], "gold": 0}
PIQA = dict(GOOD["piqa"][1][0])


@pytest.mark.parametrize(
    ("task", "row", "words"),
    [
        ("piqa", {**CHOICES, "gold": 2}, ["column gold: found 2", "index of the 2 choices"]),
        ("piqa", {**CHOICES, "gold": -1}, ["column gold: found -1", "greater than or equal to 0"]),
        ("piqa", {**CHOICES, "gold": True}, ["column gold: found True", "valid integer"]),
        ("piqa", {**CHOICES, "query": " "}, ["column query", "not blank"]),
        ("piqa", {**CHOICES, "choices": ["b"]}, ["column choices", "at least 2 items"]),
        ("piqa", {**CHOICES, "choices": ["b", 3]}, ["column choices.1: found 3", "valid string"]),
        ("piqa", {"query": "a", "gold": 0}, ["column choices is missing", "query, choices, gold"]),
        ("hellaswag", {**GOOD["hellaswag"][1][0], "label": "9"}, ["query is missing"]),
        ("boolq", {**CHOICES, "choices": "yes"}, ["column choices: found yes", "valid list"]),
        ("lambada", {"text": "alone"}, ["column text: found alone", "two words"]),
        ("gsm8k", {"question": "a", "answer": "12"}, ["column answer: found 12", '"#### "']),
        ("xsum", {"article": "a", "summary_gt": 3}, ["column summary_gt: found 3"]),
        (
            "coqa",
            {"story": "a", "questions": ["b", "c"], "answers": {"input_text": ["d"]}},
            ["column answers", "each of the 2 questions"],
        ),
        (
            "qasper",
            {"title": "a", "abstract": "b", "question": "c", "answer": []},
            ["column answer: found []"],
        ),
        (
            "human_eval",
            {**GOOD["human_eval"][0][0], "entry_point": "a b"},
            ["column entry_point: found a b"],
        ),
        (
            "human_eval",
            {**GOOD["human_eval"][0][0], "test": "assert True"},
            ["column test", "check(candidate)"],
        ),
    ],
)
def test_a_wrong_line_is_refused_by_file_line_and_column(
    task: str, row: Mapping[str, Any], words: list[str], tmp_path: Path
) -> None:
    path = write(tmp_path, task, [*GOOD[task][0], row])
    line = len(GOOD[task][0]) + 1
    with pytest.raises(BadDataFile) as error:
        read(local_task(task), path)
    for word in (f"{path.name}, line {line}, ", *words):
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("task", "row", "words"),
    [
        ("hellaswag", {**GOOD["hellaswag"][1][0], "label": "4"}, ["column label: found 4"]),
        ("piqa", {**PIQA, "label": 2}, ["column label: found 2", "less than or equal to 1"]),
        ("copa", {**GOOD["copa"][1][0], "question": "why"}, ["column question: found why"]),
        ("arc_easy", {**GOOD["arc_easy"][1][0], "answerKey": "E"}, ["answerKey: found E", "A, B"]),
        ("boolq", {**GOOD["boolq"][1][0], "answer": "yes"}, ["column answer: found yes"]),
        ("boolq", {"passage": "a"}, ["found columns passage", "passage, question, answer; or"]),
        ("cnn_dailymail", {}, ["found columns none", "article, highlights"]),
    ],
)
def test_a_wrong_first_line_is_refused_too(
    task: str, row: Mapping[str, Any], words: list[str], tmp_path: Path
) -> None:
    with pytest.raises(BadDataFile) as error:
        read(local_task(task), write(tmp_path, task, [row]))
    for word in (", line 1", *words):
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "found no line"),
        (b"\n\n", "found no line"),
        (b'{"query": "a"\n', "line 1: found"),
        (b"[1]\n", "line 1: found [1]; allowed: one JSON object a line"),
        (b'{"query": "\xff"}\n', "line 1: found byte 0xff at 11; allowed: UTF-8"),
        (b'{"query": "\\ud800"}\n', "surrogates not allowed"),
        (b'{"gold": ' + b"1" * 5000 + b"}\n", "line 1: found {"),
        (b"[" * 100_000 + b"\n", "line 1: found [[["),
    ],
)
def test_what_is_no_json_lines_is_refused(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "piqa.jsonl"
    path.write_bytes(content)
    with pytest.raises(BadDataFile, match=r"piqa\.jsonl") as error:
        read(local_task("piqa"), path)
    assert words in str(error.value)


def test_a_mark_of_byte_order_and_other_ends_of_lines_are_read_over(tmp_path: Path) -> None:
    path = write(tmp_path, "piqa", GOOD["piqa"][0])
    expected = read(local_task("piqa"), path).documents
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n\r\n"))
    assert read(local_task("piqa"), path).documents == expected


def test_examples_alone_are_nothing_to_evaluate(tmp_path: Path) -> None:
    with pytest.raises(BadDataFile, match="at least one line after the 5 that are its examples"):
        read(local_task("gsm8k"), write(tmp_path, "gsm8k", GOOD["gsm8k"][0][:5]))


def test_a_text_without_a_whole_window_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadDataFile, match="found 100 words; allowed: at least 384"):
        read(local_task("wikitext"), write_text(tmp_path, "word " * 100))


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("piqa.jsonl", "piqa"),
        ("ARC-Easy_test.jsonl", "arc_easy"),
        ("arc_c.jsonl", "arc_challenge"),
        ("humaneval.jsonl", "human_eval"),
        ("CNN-dailymail.jsonl", "cnn_dailymail"),
        ("lambada_openai.jsonl", "lambada"),
        ("wikitext2.valid.txt", "wikitext"),
    ],
)
def test_a_file_is_found_by_how_its_name_begins(name: str, task: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("")
    assert file_of(local_task(task), tmp_path).name == name


def test_no_file_and_two_files_of_a_task_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadDataFile, match=r"piqa: found none in .*; allowed: one file piqa\*"):
        file_of(local_task("piqa"), tmp_path)
    for name in ("piqa_a.jsonl", "piqa_b.jsonl", "piqa.txt"):
        (tmp_path / name).write_text("")
    with pytest.raises(BadDataFile, match=r"found piqa_a.jsonl, piqa_b.jsonl"):
        file_of(local_task("piqa"), tmp_path)


def test_an_unknown_task_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(EvaluationError, match="got 'sudoku'; allowed with --data: hella"):
        local_task("sudoku")
