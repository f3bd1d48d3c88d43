"""The columns of data files: a class for each layout checks a line and turns it into a document.

A task runs on documents, which do not depend on the layout of the file:

=============  ====================================================================
kind           fields
=============  ====================================================================
choices        query, choices (each scored after a space), gold (index)
continuation   context, continuation
generation     prompt, references (allowed answers), name, tests (programs only)
=============  ====================================================================
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
)

Document = dict[str, Any]


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("a text that is not blank")
    return text


def _whole_number(value: object) -> object:
    """Converts a label to an integer: some data sets have strings of digits."""
    return int(value) if isinstance(value, str) and re.fullmatch(r"[0-9]+", value) else value


Text = Annotated[str, AfterValidator(_not_blank)]
Texts = Annotated[list[Text], Field(min_length=2)]
Label = Annotated[int, BeforeValidator(_whole_number), Field(ge=0)]


class Row(BaseModel):
    """One line of a file. Columns that a layout does not name are ignored.

    Attributes:
        examples: the number of first lines that are shown, solved, before every other line. They
            are not evaluated themselves.
    """

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)
    examples: ClassVar[int] = 0

    def document(self, examples: Sequence[Self]) -> Document:
        """Returns the document to evaluate, after these solved examples."""
        raise NotImplementedError

    def documents(self, examples: Sequence[Self]) -> list[Document]:
        """Does the same as ``document`` for lines that hold several documents."""
        return [self.document(examples)]

    @classmethod
    def columns(cls) -> tuple[str, ...]:
        """Returns the names of the columns that a line must have."""
        return tuple(name for name, field in cls.model_fields.items() if field.is_required())


def _within(gold: int, choices: Sequence[object]) -> int:
    if gold >= len(choices):
        raise ValueError(f"an index of the {len(choices)} choices, from 0")
    return gold


class Choices(Row):
    """A question with its choices, ready to be scored one after the other."""

    ending: ClassVar[str] = ""

    query: Text
    choices: Texts
    gold: Label

    @field_validator("gold")
    @classmethod
    def _is_a_choice(cls, gold: int, info: ValidationInfo) -> int:
        return _within(gold, info.data.get("choices", [None] * (gold + 1)))

    def document(self, examples: Sequence[Self]) -> Document:
        query = self.query.rstrip()
        if not query.endswith(self.ending.strip()):
            query += self.ending
        return {"query": query, "choices": [c.strip() for c in self.choices], "gold": self.gold}


class QuestionChoices(Choices):
    """The same as ``Choices``, with ``Answer:`` after the query."""

    ending: ClassVar[str] = "\nAnswer:"


def _choices(query: str, choices: Sequence[str], gold: int) -> Document:
    return {"query": query, "choices": list(choices), "gold": gold}


class Piqa(Row):
    goal: Text
    sol1: Text
    sol2: Text
    label: Annotated[Label, Field(le=1)]

    def document(self, examples: Sequence[Self]) -> Document:
        return _choices(f"Question: {self.goal}\nAnswer:", [self.sol1, self.sol2], self.label)


class HellaSwag(Row):
    """The prompt as lm-eval makes it: the activity, then the context, without WikiHow's markup."""

    ctx: Text
    endings: Texts
    label: Label
    activity_label: str = ""

    @field_validator("label")
    @classmethod
    def _is_an_ending(cls, label: int, info: ValidationInfo) -> int:
        return _within(label, info.data.get("endings", [None] * (label + 1)))

    def document(self, examples: Sequence[Self]) -> Document:
        about = f"{self.activity_label}: " if self.activity_label else ""
        return _choices(_plain(about + self.ctx), [_plain(e) for e in self.endings], self.label)


def _plain(text: str) -> str:
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ").strip()


class Copa(Row):
    premise: Text
    choice1: Text
    choice2: Text
    question: Literal["cause", "effect"]
    label: Annotated[Label, Field(le=1)]

    def document(self, examples: Sequence[Self]) -> Document:
        because = {"cause": "because", "effect": "therefore"}[self.question]
        choices = [c[0].lower() + c[1:] for c in (self.choice1.strip(), self.choice2.strip())]
        return _choices(f"{self.premise.strip().rstrip('.')} {because}", choices, self.label)


class _ArcChoices(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)
    text: Texts
    label: Annotated[list[str], Field(min_length=2)]

    @field_validator("label")
    @classmethod
    def _one_each(cls, label: list[str], info: ValidationInfo) -> list[str]:
        if len(label) != len(info.data.get("text", label)):
            raise ValueError("as many labels as texts")
        return label


class Arc(Row):
    question: Text
    choices: _ArcChoices
    answerKey: Text  # its name on the hub

    @field_validator("answerKey")
    @classmethod
    def _is_a_label(cls, key: str, info: ValidationInfo) -> str:
        choices = info.data.get("choices")
        if choices is not None and key not in choices.label:
            raise ValueError(f"one of {', '.join(choices.label)}")
        return key

    def document(self, examples: Sequence[Self]) -> Document:
        gold = self.choices.label.index(self.answerKey)
        return _choices(f"Question: {self.question}\nAnswer:", self.choices.text, gold)


class BoolQ(Row):
    passage: Text
    question: Text
    answer: bool

    def document(self, examples: Sequence[Self]) -> Document:
        return _boolq(self.passage, self.question, int(self.answer))


class BoolQLabel(Row):
    passage: Text
    question: Text
    label: Annotated[Label, Field(le=1)]

    def document(self, examples: Sequence[Self]) -> Document:
        return _boolq(self.passage, self.question, self.label)


def _boolq(passage: str, question: str, gold: int) -> Document:
    asked = question.rstrip("?")
    return _choices(f"{passage}\nQuestion: {asked}?\nAnswer:", ["no", "yes"], gold)


def _generation(prompt: str, references: Sequence[str]) -> Document:
    return {"prompt": prompt, "references": list(references)}


class SummaryPrompt(Row):
    """A prompt that holds its example, and the article, and asks for the summary."""

    article: Text
    summary_gt: Text

    def document(self, examples: Sequence[Self]) -> Document:
        return _generation(self.article, [self.summary_gt])


def _summaries(articles: Sequence[str], summaries: Sequence[str], length: str) -> str:
    """Articles with their summaries; the last article has none yet."""
    asked = f"\n\nSummarize the above article in {length}.\n"
    parts = [f"###\nArticle: {article}{asked}" for article in articles]
    solved = [f"{part}{text}\n\n" for part, text in zip(parts, summaries, strict=False)]
    return "".join([*solved, *parts[len(summaries) :]]).rstrip("\n")


class XSum(Row):
    examples: ClassVar[int] = 1
    document_: Text = Field(alias="document")
    summary: Text

    @classmethod
    def columns(cls) -> tuple[str, ...]:
        return ("document", "summary")

    def document(self, examples: Sequence[Self]) -> Document:
        articles = [each.document_ for each in [*examples, self]]
        prompt = _summaries(articles, [each.summary for each in examples], "1 sentence")
        return _generation(prompt, [self.summary])


class CnnDailyMail(Row):
    examples: ClassVar[int] = 1
    article: Text
    highlights: Text

    def document(self, examples: Sequence[Self]) -> Document:
        articles = [each.article for each in [*examples, self]]
        prompt = _summaries(articles, [each.highlights for each in examples], "3 sentences")
        return _generation(prompt, [self.highlights])


class _Answers(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)
    input_text: Annotated[list[Text], Field(min_length=1)]


class CoQA(Row):
    """A story with the turns of a conversation about it; the last question is evaluated."""

    story: Text
    questions: Annotated[list[Text], Field(min_length=1)]
    answers: _Answers
    additional_answers: dict[str, _Answers] | None = None

    @field_validator("questions", mode="before")
    @classmethod
    def _unwrapped(cls, questions: object) -> object:
        return questions.get("input_text") if isinstance(questions, Mapping) else questions

    @field_validator("answers", "additional_answers")
    @classmethod
    def _one_each(cls, answers: Any, info: ValidationInfo) -> Any:
        count = len(info.data.get("questions", ()))
        of = answers.values() if isinstance(answers, dict) else [answers] if answers else []
        if count and any(len(each.input_text) != count for each in of):
            raise ValueError(f"an answer for each of the {count} questions")
        return answers

    def document(self, examples: Sequence[Self]) -> Document:
        turns = "".join(
            f"Q: {question}\n\nA: {answer}\n\n"
            for question, answer in zip(self.questions, self.answers.input_text[:-1], strict=False)
        )
        prompt = f"{self.story}\n\n{turns}Q: {self.questions[-1]}\n\nA:"
        others = (self.additional_answers or {}).values()
        given = [self.answers, *others]
        references = {each.input_text[-1].lower(): each.input_text[-1] for each in given}
        return _generation(prompt, list(references.values()))


class Qasper(Row):
    """A question about a paper, of which title and abstract are shown, with its answers."""

    title: Text
    abstract: Text
    question: Text
    answer: Annotated[list[Text], Field(min_length=1)]

    @field_validator("answer", mode="before")
    @classmethod
    def _listed(cls, answer: object) -> object:
        return [answer] if isinstance(answer, str) else answer

    def document(self, examples: Sequence[Self]) -> Document:
        prompt = f"TITLE: {self.title}\nABSTRACT: {self.abstract}\n\nQ: {self.question}\n\nA:"
        return _generation(prompt, self.answer)


class _QasperAnswer(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)
    unanswerable: bool = False
    extractive_spans: list[str] = []
    yes_no: bool | None = None
    free_form_answer: str = ""

    @property
    def text(self) -> str:
        """The answer; empty if there is none."""
        if self.yes_no is not None:
            return "Yes" if self.yes_no else "No"
        return self.free_form_answer or ", ".join(self.extractive_spans)


class _QasperAnswers(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)
    answer: list[_QasperAnswer]


class _QasperQuestions(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)
    question: list[Text]
    answers: list[_QasperAnswers]

    @field_validator("answers")
    @classmethod
    def _one_each(cls, answers: list[Any], info: ValidationInfo) -> list[Any]:
        if len(answers) != len(info.data.get("question", answers)):
            raise ValueError("answers for each question")
        return answers


class QasperPaper(Row):
    """A paper with all its questions; unanswerable ones are left out."""

    title: Text
    abstract: Text
    qas: _QasperQuestions

    def documents(self, examples: Sequence[Self]) -> list[Document]:
        rows = []
        for question, answers in zip(self.qas.question, self.qas.answers, strict=True):
            if given := [each.text for each in answers.answer if each.text.strip()]:
                row = {"title": self.title, "abstract": self.abstract, "question": question}
                rows.append(Qasper.model_validate({**row, "answer": given}).document([]))
        return rows


class Lambada(Row):
    text: Text

    @field_validator("text")
    @classmethod
    def _has_two_words(cls, text: str) -> str:
        if len(text.split()) < 2:
            raise ValueError("at least two words, the last of which is evaluated")
        return text

    def document(self, examples: Sequence[Self]) -> Document:
        context, word = self.text.rstrip().rsplit(maxsplit=1)
        return {"context": context, "continuation": f" {word}"}


ANSWER = re.compile(r"####\s*(-?[0-9][0-9,.]*)")
"""The final answer at the end of a GSM8K solution."""


def number(text: str) -> str | None:
    """The final answer of a solution; None if it has none."""
    found = ANSWER.search(text)
    return found[1].replace(",", "").rstrip(".") if found else None


class Gsm8k(Row):
    examples: ClassVar[int] = 5
    question: Text
    answer: Text

    @field_validator("answer")
    @classmethod
    def _has_a_number(cls, answer: str) -> str:
        if number(answer) is None:
            raise ValueError('a solution that ends in "#### " and a number')
        return answer

    def document(self, examples: Sequence[Self]) -> Document:
        solved = "".join(f"Question: {e.question}\nAnswer: {e.answer}\n\n" for e in examples)
        answer = number(self.answer)
        assert answer is not None
        return _generation(f"{solved}Question: {self.question}\nAnswer:", [answer])


class HumanEval(Row):
    task_id: Text
    prompt: Text
    entry_point: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
    test: Text

    @field_validator("test")
    @classmethod
    def _checks(cls, test: str) -> str:
        if "def check(" not in test:
            raise ValueError("a program that defines check(candidate)")
        return test

    def document(self, examples: Sequence[Self]) -> Document:
        tests = f"{self.test}\ncheck({self.entry_point})\n"
        return {"prompt": self.prompt, "references": [], "name": self.task_id, "tests": tests}
