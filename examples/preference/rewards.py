"""A reward of one's own: called with the prompts, the answers, and every column of the data by its name."""

import re


def result(prompts: list[str], completions: list[str], answer: list[str], **columns: list) -> list[float]:
    """1 where the number after '=' is the right one."""
    found = [re.search(r"=\s*(\d+)", said) for said in completions]
    return [float(one is not None and one.group(1) == right) for one, right in zip(found, answer, strict=True)]
