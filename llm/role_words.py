"""Roles that are marked with words, for models that know no role tokens.

    <s> ### Human:  draw a bell\\n### Assistant:  here is a bell [IMG0]..[IMG3] ###  Human: ...

Words can be said by anybody. So the mark never stands in what a person, a file or an earlier reply says,
and a reply ends where the model says it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class RoleWords:
    """What stands around the turns of a conversation.

    ``first`` is before the first user turn and tokenised apart, ``user`` before the later ones, ``reply``
    after a user turn and ``end`` after a reply.
    """

    first: str
    user: str
    reply: str
    end: str

    def __post_init__(self) -> None:
        if len(self.mark) < 2:
            raise ValueError(f"end is {self.end!r}; expected two characters or more besides white space.")

    @property
    def mark(self) -> str:
        """The end, less white space: what tells a role's words from all others."""
        return self.end.strip()

    def quoted(self, text: str) -> str:
        """Return ``text`` with a space in every mark, so that it holds none."""
        while self.mark in text:
            text = text.replace(self.mark, self.mark[:1] + " " + self.mark[1:])
        return text


VICUNA_V0 = RoleWords(first="### Human: ", user="Human: ", reply="\n### Assistant: ", end="\n###")
"""What ``nextgpt_7b_tiva_v0`` was trained with: FastChat's first template, less its system words.

Source: ``prompt_wrap`` and ``build_one_instance_stage_3`` of NExT-GPT's 2023 code.
"""


class EndOfReply:
    """Lets the text of a reply through up to the mark, and holds back what may be its beginning."""

    def __init__(self, words: RoleWords) -> None:
        self._mark = words.mark
        self._held = ""
        self.reached = False

    def push(self, delta: str) -> str:
        """Take a piece of text; return what is certain to come before an end, perhaps nothing."""
        if self.reached:
            return ""
        self._held += delta
        before, mark, _ = self._held.partition(self._mark)
        if mark:
            self.reached, self._held = True, ""
            return before.rstrip()
        body = self._held
        for length in range(len(self._mark) - 1, 0, -1):
            if body.endswith(self._mark[:length]):
                body = body[:-length]
                break
        body = body.rstrip()
        self._held = self._held[len(body) :]
        return body

    def flush(self) -> str:
        """Return what was held back, as it stands, and begin anew."""
        held, self._held, self.reached = self._held, "", False
        return held
