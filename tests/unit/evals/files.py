"""Small data files of every task and layout, written for these tests."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]

PEOPLE = ("Ada", "Ben", "Cleo", "Dov", "Eve", "Finn", "Gia", "Hal")

# task -> layouts, each the rows of a good file
GOOD: dict[str, list[list[Row]]] = {
    "hellaswag": [
        [{"query": "Making tea: She", "choices": ["boils water.", "eats a chair."], "gold": 0}],
        [
            {
                "activity_label": "Making tea",
                "ctx": "She fills the kettle. [step] She",
                "endings": ["boils the water.", "eats [title] it.", "sings.", "flies."],
                "label": "0",
            }
        ],
    ],
    "piqa": [
        [
            {
                "query": f"Question: How does {name} open a tin?\n",
                "choices": ["With a tin opener.", "With a feather."],
                "gold": index % 2,
            }
            for index, name in enumerate(PEOPLE)
        ],
        [{"goal": "Open a tin.", "sol1": "Use an opener.", "sol2": "Use a feather.", "label": 0}],
    ],
    "copa": [
        [{"query": "It rained, therefore", "choices": ["the road was wet."] * 2, "gold": 1}],
        [
            {
                "premise": "It rained.",
                "choice1": "The road was wet.",
                "choice2": "The road was gold.",
                "question": "effect",
                "label": 0,
            }
        ],
    ],
    "arc_easy": [
        [{"query": "Question: What is ice?", "choices": ["water", "fire", "sand"], "gold": 0}],
        [
            {
                "question": "What is ice?",
                "choices": {"text": ["fire", "water"], "label": ["A", "B"]},
                "answerKey": "B",
            }
        ],
    ],
    "arc_challenge": [
        [{"query": "Question: Why is it dark?", "choices": ["night", "noon"], "gold": 0}],
        [
            {
                "question": "Why is it dark?",
                "choices": {"text": ["noon", "night"], "label": ["1", "2"]},
                "answerKey": "2",
            }
        ],
    ],
    "boolq": [
        [
            {
                "query": f"Passage: {name} is a cook.\nQuestion: is {name} a cook?",
                "choices": ["no", "yes"],
                "gold": 1,
            }
            for name in PEOPLE
        ],
        [{"passage": "Ada cooks.", "question": "does ada cook", "answer": True}],
        [{"passage": "Ada cooks.", "question": "does ada cook", "label": 1}],
    ],
    "xsum": [
        [{"article": "Article: Rain fell.\nSummarize it in 1 sentence.", "summary_gt": "Rain."}],
        [
            {"document": "Snow fell all day in the hills.", "summary": "It snowed."},
            {"document": "The old bridge was opened again.", "summary": "A bridge is open."},
        ],
    ],
    "cnn_dailymail": [
        [{"article": "Article: Rain fell.\nSummarize it.", "summary_gt": "Rain."}],
        [
            {"article": "Snow fell all day in the hills.", "highlights": "It snowed."},
            {"article": "The old bridge was opened again.", "highlights": "A bridge is open."},
        ],
    ],
    "coqa": [
        [
            {
                "story": "Ada has a red boat.",
                "questions": ["Who has a boat?", "Which colour is it?"],
                "answers": {"input_text": ["Ada", "Red"], "answer_start": [0, 10]},
            }
        ],
        [
            {
                "story": "Ada has a red boat.",
                "questions": {"input_text": ["Which colour is it?"], "turn_id": [1]},
                "answers": {"input_text": ["Red"]},
                "additional_answers": {
                    "0": {"input_text": ["red"]},
                    "1": {"input_text": ["A red one"]},
                },
            }
        ],
    ],
    "qasper": [
        [{"title": "Boats", "abstract": "On boats.", "question": "On what?", "answer": "boats"}],
        [
            {
                "title": "Boats",
                "abstract": "On boats.",
                "qas": {
                    "question": ["On what?", "Why?", "Is it new?"],
                    "answers": [
                        {
                            "answer": [
                                {"free_form_answer": "boats", "yes_no": None},
                                {"extractive_spans": ["red boats", "old boats"]},
                            ]
                        },
                        {"answer": [{"unanswerable": True}]},
                        {"answer": [{"yes_no": False}]},
                    ],
                },
            }
        ],
    ],
    "lambada": [[{"text": "She took the boat and rowed to the old harbour"}]],
    "gsm8k": [
        [
            {"question": f"{n} boats and {n} boats?", "answer": f"It is {n} + {n}.\n#### {2 * n}"}
            for n in range(1, 8)
        ]
    ],
    "human_eval": [
        [
            {
                "task_id": "Boats/0",
                "prompt": 'def double(x):\n    """Twice x."""\n',
                "entry_point": "double",
                "test": "def check(candidate):\n    assert candidate(3) == 6\n",
                "canonical_solution": "    return 2 * x\n",
            }
        ]
    ],
}

TEXT = " ".join(
    f"= Boat {n} = \n\n {name} rowed boat {n} to the harbour , past {n} @,@ 000 old stones ."
    for n in range(40)
    for name in PEOPLE
)


def write(directory: Path, task: str, rows: Sequence[Row]) -> Path:
    """A file of JSON lines."""
    path = directory / f"{task}_small.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_text(directory: Path, text: str = TEXT) -> Path:
    path = directory / "wikitext_small.txt"
    path.write_text(text, encoding="utf-8")
    return path
