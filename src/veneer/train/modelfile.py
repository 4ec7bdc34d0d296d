"""Ollama's Modelfile: FROM, ADAPTER, and the chat template in Go's template language.

A tokenizer's Jinja template is not translated but observed: conversations of known texts are rendered, what stands
between the texts becomes the Go template, and it is taken only if it renders the same conversations the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SYSTEM, USER, ANSWER, AGAIN = "[[the system]]", "[[the user]]", "[[the answer]]", "[[the user again]]"


@dataclass(frozen=True)
class Turns:
    """What a chat template puts around the texts, and the system message it brings of its own."""

    before_system: str
    after_system: str
    before_user: str
    after_user: str
    after_answer: str
    default: str | None = None

    def render(self, messages: list[dict[str, str]]) -> str:
        """The prompt for an answer to ``messages``."""
        if self.default is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.default}, *messages]
        around = {
            "system": (self.before_system, self.after_system),
            "user": (self.before_user, self.after_user),
            "assistant": ("", self.after_answer),
        }
        return "".join(around[m["role"]][0] + m["content"] + around[m["role"]][1] for m in messages)

    def go(self) -> str:
        """The same in Go's template language, over Ollama's ``.Messages``."""
        return (
            "{{- range .Messages }}"
            f'{{{{ if eq .Role "system" }}}}{self.before_system}{{{{ .Content }}}}{self.after_system}'
            f'{{{{ else if eq .Role "user" }}}}{self.before_user}{{{{ .Content }}}}{self.after_user}'
            f'{{{{ else if eq .Role "assistant" }}}}{{{{ .Content }}}}{self.after_answer}'
            "{{ end }}{{ end }}"
        )


def observe(tokenizer: Any) -> Turns | None:
    """How ``tokenizer`` renders conversations, or None if that depends on more than each turn's role."""
    conversation = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": USER},
        {"role": "assistant", "content": ANSWER},
        {"role": "user", "content": AGAIN},
    ]
    try:
        whole, bare = _render(tokenizer, conversation), _render(tokenizer, conversation[1:2])
        found = _turns(whole, bare)
        same = all(found.render(one) == _render(tokenizer, one) for one in (conversation, conversation[:2]))
        same = same and all(
            found.render(one) == _render(tokenizer, one) for one in (conversation[1:2], conversation[1:])
        )
    except Exception:  # templates raise what they like about turns that they do not take
        return None
    texts = [found.before_system, found.after_system, found.before_user, found.after_user, found.after_answer]
    return found if same and not any("{{" in text or '"""' in text for text in texts) else None


def _turns(whole: str, bare: str) -> Turns:
    before_system, rest = whole.split(SYSTEM)
    system_to_user, rest = rest.split(USER)
    after_user, rest = rest.split(ANSWER)
    answer_to_user, _ = rest.split(AGAIN)
    opening = bare.split(USER)[0]
    if system_to_user.endswith(opening) and answer_to_user.endswith(opening):
        before_user, default = opening, None
    else:  # the template brings a system message of its own
        before_user = _common_end(system_to_user, answer_to_user)
        default = opening.removeprefix(before_system).removesuffix(system_to_user)
    return Turns(
        before_system,
        system_to_user.removesuffix(before_user),
        before_user,
        after_user,
        answer_to_user.removesuffix(before_user),
        default,
    )


def _render(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """Without a first token that Ollama puts there itself."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text.removeprefix(tokenizer.bos_token or "") if getattr(tokenizer, "add_bos_token", False) else text


def _common_end(a: str, b: str) -> str:
    count = 0
    while count < min(len(a), len(b)) and a[-1 - count] == b[-1 - count]:
        count += 1
    return a[len(a) - count :]


def write(base: str, adapter: str | None, template: str | None, system: str | None, stops: list[str]) -> str:
    """The Modelfile's text.

    Args:
        base: a GGUF file, or the name of a model that Ollama has.
        adapter: a GGUF adapter's file.
        template: in Go's template language.
        system: the system message that the model was trained with.
        stops: texts that end an answer.
    """
    lines = [f"FROM {base}"]
    if adapter:
        lines.append(f"ADAPTER {adapter}")
    if template:
        lines.append(f'TEMPLATE """{template}"""')
    if system:
        lines.append(f'SYSTEM """{system}"""')
    lines += [f'PARAMETER stop "{stop}"' for stop in dict.fromkeys(stops)]
    return "\n".join(lines) + "\n"
