"""What a request for one medium leaves open, the language model fills in, as it does in a conversation.

A decoder that learnt from captions in which everything is said makes what it likes of a few words. The
language model knows what is meant by them, and its signal says the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import aclosing

from encoders.media import Modality
from services.boxes import GenerateBox, PromptMessage, SpeechOptions, SpokenSignal
from services.messages import Role
from services.presets import GenerationDefaults


class Prompting:
    """Asks the language model for one medium, in the wordings of the preset."""

    def __init__(self, generate: GenerateBox, generation: GenerationDefaults) -> None:
        self.generate = generate
        self.generation = generation
        self.wordings: Mapping[Modality, str] = generation.prompts

    def asks_for(self, modality: Modality) -> bool:
        """Whether the language model is asked for media of this kind, or their decoder reads the words."""
        return modality in self.wordings

    async def signal(self, modality: Modality, prompt: str, *, seed: int, user: str) -> SpokenSignal:
        """Return what a medium is to be made from: the words themselves where nobody makes more of them.

        Raises:
            ServiceError: the language model cannot read the prompt, or has too much to do.

        """
        words = SpokenSignal.of_words(modality, prompt)
        if not self.asks_for(modality):
            return words
        asked = self.wordings[modality].replace("{prompt}", prompt.strip())
        options = SpeechOptions(
            allowed=frozenset({modality}),
            max_signals=1,
            max_new_tokens=self.generation.max_new_tokens,
            temperature=self.generation.temperature,
            top_p=self.generation.top_p,
            top_k=self.generation.top_k,
            repetition_penalty=self.generation.repetition_penalty,
            seed=seed,
            user=user,
        )
        async with aclosing(self.generate.generate([PromptMessage(Role.USER, (asked,))], options)) as said:
            async for part in said:
                if isinstance(part, SpokenSignal):
                    return part
        return words
