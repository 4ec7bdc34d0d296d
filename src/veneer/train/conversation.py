"""A chat: turns that are remembered, and commands that switch adapters while it goes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from veneer.train import adapters
from veneer.train.evaluate import Session
from veneer.train.rows import Row

HELP = """/base            answer by the bare base, or by the adapter again
/adapter NAME    switch to another adapter; without a name: list them
/system TEXT     set the system message and start anew
/reset           forget the conversation
/quit            end"""


class Conversation:
    """Turns with a session's model.

    Args:
        session: model, tokenizer and the first adapter.
        folders: the adapters' folders; the first is loaded already, under the name ``default``.
        system: a system message.
        options: how answers are generated.
    """

    def __init__(self, session: Session, folders: list[str], system: str | None, options: dict[str, Any]):
        self.session, self.system, self.options = session, system, options
        self.turns: list[Row] = []
        self.bare = self.over = False
        self.names: dict[str, str] = {}
        for index, folder in enumerate(folders):
            name = Path(folder).name or folder
            while name in self.names:
                name += "_"
            self.names[name] = "default" if index == 0 else f"adapter{index}"
            if index:
                adapters.add(session.model, folder, self.names[name])
        self.active = next(iter(self.names), None)
        if self.active:
            session.model.set_adapter("default")

    def greeting(self) -> str:
        """What one talks with."""
        return (
            f"{self.session.settings.path}" + (f" with {self.active}" if self.active else "") + "; /help for commands."
        )

    def say(self, line: str) -> Iterator[str]:
        """The answer to one line, piece by piece, or a command's reply."""
        if line.startswith("/"):
            yield self._command(line)
            return
        if not line.strip():
            return
        self.turns.append({"role": "user", "content": line})
        messages = [{"role": "system", "content": self.system}, *self.turns] if self.system else self.turns
        written: list[str] = []
        try:
            with self.session.model.disable_adapter() if self.bare else nullcontext():
                for piece in self.session.stream(messages, **self.options):
                    written.append(piece)
                    yield piece
        finally:
            self.turns.append({"role": "assistant", "content": "".join(written)})

    def _command(self, line: str) -> str:
        word, _, rest = line[1:].partition(" ")
        if word in ("quit", "exit", "q"):
            self.over = True
            return ""
        if word == "reset":
            self.turns.clear()
            return "The conversation is forgotten."
        if word == "system":
            self.system = rest.strip() or None
            self.turns.clear()
            return "The system message is set." if self.system else "There is no system message now."
        if word == "base":
            return self._toggle()
        if word == "adapter":
            return self._switch(rest.strip())
        return HELP

    def _toggle(self) -> str:
        if not self.active:
            return "There is no adapter to switch off."
        self.bare = not self.bare
        return "Answers come from the bare base." if self.bare else f"Answers come from {self.active}."

    def _switch(self, name: str) -> str:
        if name not in self.names:
            return f"Adapters: {', '.join(self.names) or 'none'}."
        self.active, self.bare = name, False
        self.session.model.set_adapter(self.names[name])
        return f"Answers come from {name}."
