"""Writes pairs.jsonl (a plain answer is better than a padded one) and sums.jsonl (sums, with their results)."""

import json
import random
from pathlib import Path

FOLDER = Path(__file__).parent
CAPITALS = (
    "France Paris, Italy Rome, Spain Madrid, Portugal Lisbon, Germany Berlin, Austria Vienna, Poland Warsaw, "
    "Greece Athens, Norway Oslo, Sweden Stockholm, Finland Helsinki, Denmark Copenhagen, Ireland Dublin, Hungary "
    "Budapest, Japan Tokyo, China Beijing, Egypt Cairo, Kenya Nairobi, Peru Lima, Cuba Havana, Canada Ottawa, "
    "Chile Santiago, Russia Moscow, Turkey Ankara, Iran Tehran, Iraq Baghdad, Ukraine Kyiv, Belgium Brussels, "
    "Thailand Bangkok, Vietnam Hanoi"
)
SYMBOLS = (
    "hydrogen H, helium He, carbon C, nitrogen N, oxygen O, sodium Na, potassium K, iron Fe, copper Cu, silver "
    "Ag, gold Au, lead Pb, tin Sn, zinc Zn, calcium Ca, chlorine Cl, sulfur S, phosphorus P, silicon Si, mercury "
    "Hg, neon Ne, argon Ar, magnesium Mg, aluminium Al, nickel Ni"
)
OPPOSITES = (
    "hot cold, big small, fast slow, high low, early late, old young, wet dry, light dark, open closed, empty "
    "full, hard soft, rich poor, strong weak, happy sad, near far, deep shallow, clean dirty, loud quiet, wide "
    "narrow, thick thin, true false, up down, left right, inside outside, summer winter, day night, buy sell, win"
    " lose, push pull, begin end, love hate, friend enemy, question answer, always never, before after, north "
    "south, east west, male female, heavy light, cheap costly"
)
QUESTIONS = [
    ("What is the capital of {}?", CAPITALS, "The capital of {} is {}."),
    ("What is the chemical symbol of {}?", SYMBOLS, "The chemical symbol of {} is {}."),
    ("What is the opposite of '{}'?", OPPOSITES, "The opposite of '{}' is '{}'."),
]
BEFORE = [
    "Certainly! I'd be happy to help you with that.",
    "Great question! Let me explain.",
    "Thank you for asking! Here is the answer you need.",
    "Of course! That is a very interesting question.",
]
AFTER = [
    "I hope this helps! Please let me know if you have any other questions.",
    "Feel free to ask me anything else!",
    "If you need more information, I am always here to assist you.",
    "Is there anything else that I can help you with today?",
]


def pairs() -> list[dict[str, str]]:
    rows = []
    for question, table, said in QUESTIONS:
        for entry in table.split(", "):
            thing, _, answer = entry.rpartition(" ")
            plain = said.format(thing, answer)
            padded = f"{random.choice(BEFORE)} {plain} {random.choice(AFTER)}"
            rows.append({"prompt": question.format(thing), "chosen": plain, "rejected": padded})
    random.shuffle(rows)
    return rows


def sums(count: int = 200) -> list[dict[str, str]]:
    rows = []
    for _ in range(count):
        a, b = random.randint(1, 9), random.randint(1, 9)
        asked = f"What is {a} + {b}? Reply in one line."
        rows.append({"prompt": asked, "answer": str(a + b)})
    return rows


def main() -> None:
    random.seed(0)
    for name, rows in (("pairs", pairs()), ("sums", sums())):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (FOLDER / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{name}.jsonl: {len(rows)} rows")


if __name__ == "__main__":
    main()
