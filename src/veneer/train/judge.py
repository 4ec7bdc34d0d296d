"""A model as a judge: which of two answers is better, or how good one is.

A judge is asked for one letter or digit, and its probabilities are read, so that a verdict never has to be found in a
text. Two answers are shown in both orders: only where both say the same does the verdict count, because judges like
what stands first (or last) whatever it says.
"""

from __future__ import annotations

import json
import math
import os
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from veneer.train.evaluate import Session

CRITERIA = "Which answer is more correct, more helpful and clearer?"
COMPARE = """You compare two answers to a request. {criteria}

Request:
{prompt}

Answer A:
{a}

Answer B:
{b}

Which answer is better? Say only A or B."""
RATE = """You rate an answer to a request from 1 (very bad) to 5 (very good). {criteria}

Request:
{prompt}

Answer:
{answer}

How good is the answer? Say only a number from 1 to 5."""


class Asked(Protocol):
    """Whoever answers a question with one of several words."""

    def choose(self, question: str, words: Sequence[str]) -> list[float]:
        """The probability of each word, adding up to one."""
        ...


class Local:
    """A model of one's own.

    Args:
        model: a folder or hub id.
        adapter: a folder, for a judge that was trained.
        options: further ``model`` settings.
    """

    def __init__(self, model: str | None, adapter: str | None = None, **options: Any):
        self.session = Session(model, adapter, options)
        self.session.model.eval()

    @torch.inference_mode()
    def choose(self, question: str, words: Sequence[str]) -> list[float]:
        """From the probabilities of the words' first tokens."""
        session = self.session
        text = session.render([{"role": "user", "content": question}])
        gap = "" if session.template == "chat" or text[-1:].isspace() else " "
        ids = session.tokenizer(text, add_special_tokens=False)["input_ids"]
        if session.bos is not None and ids[:1] != [session.bos]:
            ids = [session.bos, *ids]
        firsts = [session.tokenizer(gap + word, add_special_tokens=False)["input_ids"][0] for word in words]
        if len(set(firsts)) < len(words):
            raise ValueError(f"The judge's tokenizer cannot tell {', '.join(words)} apart by their first tokens.")
        device = next(session.model.parameters()).device
        logits = session.model(torch.tensor([ids], device=device)).logits[0, -1].float()
        return logits[firsts].softmax(0).tolist()


class Endpoint:
    """A server that speaks OpenAI's chat completions; the key is read from ``OPENAI_API_KEY``.

    Args:
        url: up to ``/v1``.
        model: the name it knows the model by.
        timeout: seconds to wait for an answer.
    """

    def __init__(self, url: str, model: str, timeout: float = 60.0):
        self.url, self.model, self.timeout = url.rstrip("/") + "/chat/completions", model, timeout

    def choose(self, question: str, words: Sequence[str]) -> list[float]:
        """All on the word that its answer begins with, or spread evenly if it begins with none.

        Raises:
            OSError: the server cannot be reached, or refuses.
        """
        body = {"model": self.model, "temperature": 0, "max_tokens": 8}
        body["messages"] = [{"role": "user", "content": question}]
        headers = {
            "Content-Type": "application/json",
            "Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', '')}",
        }
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                said = json.load(reply)["choices"][0]["message"]["content"].strip().lstrip("*\"'( ")
        except OSError as error:
            raise OSError(f"The judge at {self.url} gave no answer: {error}.") from None
        found = [said.upper().startswith(word.upper()) for word in words]
        return [float(one) for one in found] if sum(found) == 1 else [1 / len(words)] * len(words)


@dataclass(frozen=True)
class Verdict:
    """What a judge says of two answers.

    Attributes:
        better: 0 or 1, the number of the better answer; None where the two orders disagree.
        first: how probable it is that the first answer is the better one, over both orders.
    """

    better: int | None
    first: float


class Judge:
    """Asks a model about answers.

    Args:
        asked: who is asked.
        criteria: what is looked at, in a sentence or two.
    """

    def __init__(self, asked: Asked, criteria: str = CRITERIA):
        self.asked, self.criteria = asked, criteria

    def compare(self, prompt: str, first: str, second: str) -> Verdict:
        """Which answer is better, asked in both orders."""
        ahead = self._prefers_a(prompt, first, second)
        behind = 1 - self._prefers_a(prompt, second, first)
        consistent = (ahead - 0.5) * (behind - 0.5) > 0
        return Verdict((0 if ahead > 0.5 else 1) if consistent else None, (ahead + behind) / 2)

    def _prefers_a(self, prompt: str, a: str, b: str) -> float:
        question = COMPARE.format(criteria=self.criteria, prompt=prompt, a=a, b=b)
        return self.asked.choose(question, ("A", "B"))[0]

    def rate(self, prompt: str, answer: str) -> float:
        """How good an answer is, from 0 to 1: the expected mark."""
        question = RATE.format(criteria=self.criteria, prompt=prompt, answer=answer)
        marks = self.asked.choose(question, ("1", "2", "3", "4", "5"))
        return sum(mark * share for mark, share in enumerate(marks)) / 4


def make(
    model: str | None = None,
    adapter: str | None = None,
    url: str | None = None,
    criteria: str = CRITERIA,
    **options: Any,
) -> Judge:
    """A judge: a local model, or with ``url`` a server's.

    Raises:
        ValueError: no model is named.
    """
    if url is not None:
        if model is None:
            raise ValueError("A judge behind a url needs the name of its model too.")
        return Judge(Endpoint(url, model), criteria)
    return Judge(Local(model, adapter, **options), criteria)


def scorer(**options: Any) -> Any:
    """The judge's marks as a reward function."""
    judge = make(**options)

    def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return [judge.rate(prompt, said) for prompt, said in zip(prompts, completions, strict=True)]

    return reward


@dataclass
class Tally:
    """What came of many comparisons."""

    wins: list[int]
    """How often each answer's place in its row won, consistently."""
    inconsistent: int = 0
    alike: int = 0
    """Rows whose answers are the same, which are not asked about."""

    @property
    def asked(self) -> int:
        """Comparisons that were made."""
        return sum(self.wins) + self.inconsistent

    def share(self) -> tuple[float, float, float]:
        """How often the second of two answers won, with its 95 % interval (Wilson 1927)."""
        n, z = sum(self.wins), 1.96
        if not n:
            return math.nan, 0.0, 1.0
        p = self.wins[1] / n
        middle, width = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return p, (middle - width) / (1 + z * z / n), (middle + width) / (1 + z * z / n)


def label(judge: Judge, rows: Sequence[dict[str, Any]], say: Any = None) -> tuple[list[dict[str, Any]], Tally]:
    """Preference pairs from answers.

    Args:
        judge: who decides.
        rows: {prompt, answers: [two or more]}; of more than two each is compared with the best one so far.
        say: called with the number of rows done.

    Returns:
        {prompt, chosen, rejected, sure} for each consistent verdict, and the tally.
    """
    tally = Tally([0] * max((len(row["answers"]) for row in rows), default=2))
    pairs = []
    for number, row in enumerate(rows, 1):
        best = 0
        for other in range(1, len(row["answers"])):
            one, two = row["answers"][best], row["answers"][other]
            if one.strip() == two.strip():
                tally.alike += 1
                continue
            verdict = judge.compare(row["prompt"], one, two)
            if verdict.better is None:
                tally.inconsistent += 1
                continue
            winner, loser = (best, other) if verdict.better == 0 else (other, best)
            tally.wins[winner] += 1
            sure = round(max(verdict.first, 1 - verdict.first), 4)
            sides = {"chosen": row["answers"][winner], "rejected": row["answers"][loser]}
            pairs.append({"prompt": row["prompt"], **sides, "sure": sure})
            best = winner
        if say:
            say(number)
    return pairs, tally
