"""The language model: any Hugging Face causal LM, its new rows, LoRA and projectors.

The base is never forked and its tables never grow. Ids from ``base_vocabulary`` up have rows of their
own, beside the base's, and only these are trained.

Shape letters in this file:
    B rows   T positions   D LLM width   V vocabulary   N signal blocks   k tokens of a block
    M positions that predict a trained token   P prompt tokens
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from encoders.media import Modality
from llm import checkpoint
from llm.adapters import LMAdapter, Step, adapter_parameters, bound, install_adapters, is_adapter_name
from llm.batch import IGNORED, Batch, collate_rows
from llm.lora import LoraOptions, load_lora, put_lora, save_lora
from llm.projectors import Projector, ProjectorConfig, Prompt, build_projector
from llm.tables import Scaling, Tables
from llm.template import Dialogue, LossOn, MediaSlot, MediaTokens, Row, encode_dialogue
from llm.tokenizer import ConversationTokenizer

ModelPart = Literal["base", "lora", "adapters", "signal_rows", "projectors"]


@dataclass(frozen=True, eq=False, slots=True)
class Output:
    """What a training step sees.

    ``hidden`` ``(B, T, D)`` after the final norm, the tensor that feeds the head; ``embeddings``
    ``(B, T, D)`` the inputs; ``logits`` ``(M, V)`` float32 and ``targets`` ``(M,)`` at the positions whose
    next token is trained; ``loss`` their mean cross-entropy, 0 where nothing is trained.
    """

    hidden: Tensor
    embeddings: Tensor
    logits: Tensor
    targets: Tensor
    loss: Tensor


def mean_loss(outputs: Sequence[Output]) -> Tensor:
    """Return the mean cross-entropy over all trained tokens of several batches."""
    count = sum(len(output.targets) for output in outputs)
    return torch.stack([output.loss * len(output.targets) for output in outputs]).sum() / max(count, 1)


@dataclass(frozen=True, eq=False, slots=True)
class SignalStates:
    """All blocks of one modality in a batch, in the order of :attr:`Batch.signals`.

    ``hidden`` and ``embeddings`` ``(N, k, D)`` float32 are taken at the signal tokens; ``rows`` says in
    which row of the batch each block is, ``copied`` of which a copy is wanted.
    """

    hidden: Tensor
    embeddings: Tensor
    captions: list[str]
    rows: list[int]
    copied: list[bool]


class SignalRows(nn.Module):
    """Rows of the added tokens: ``embedding`` and ``head``, each ``(added tokens, D)``.

    Born as the mean of the base's rows, with noise that lets equal tokens grow apart.
    """

    def __init__(self, num_tokens: int, embedding_table: Tensor, head_table: Tensor) -> None:
        super().__init__()
        self.embedding = nn.Parameter(_like_rows(embedding_table, num_tokens, 1.0))
        self.head = nn.Parameter(_like_rows(head_table, num_tokens, 0.1))


def _like_rows(table: Tensor, count: int, spread: float) -> Tensor:
    rows = table.detach().float()
    noise = torch.randn(count, rows.shape[1], device=rows.device)
    return rows.mean(dim=0) + spread * rows.std(dim=0) * noise


class LanguageModel(nn.Module):
    """A causal LM that reads media through projectors and asks for media with signals.

    Args:
        base: any ``AutoModelForCausalLM``; it is frozen.
        tokenizer: the base's tokenizer with control tokens.
        projectors: one per modality that the model can read.
        adapters: installed into the base in order.

    Raises:
        ValueError: the widths of base and projectors disagree, or the tokenizer has more base
            tokens than the base has rows.

    """

    def __init__(
        self,
        base: PreTrainedModel,
        tokenizer: ConversationTokenizer,
        projectors: Mapping[Modality, ProjectorConfig],
        adapters: Sequence[LMAdapter] = (),
    ) -> None:
        super().__init__()
        self.base: nn.Module = base  # a PeftModel around it once there is LoRA
        self.tokenizer = tokenizer
        self.has_base_tables = False  # whether rows of the base itself came from beside it
        embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
        embedding_table, head_table = cast(Tensor, embedding.weight), cast(Tensor, head.weight)
        if embedding_table.shape[1] != head_table.shape[1]:
            raise ValueError(
                f"The base embeds tokens in {embedding_table.shape[1]} and reads them from "
                f"{head_table.shape[1]} channels; expected one width, as signals add the two up."
            )
        if len(embedding_table) < tokenizer.base_vocabulary:
            raise ValueError(
                f"The base has {len(embedding_table)} embedding rows and its tokenizer "
                f"{tokenizer.base_vocabulary} tokens. Use the tokenizer that belongs to the base."
            )
        self.adapters = tuple(adapters)
        install_adapters(base, adapters)
        self.requires_grad_(False)
        self._scaling = Scaling.of(base.config.get_text_config())

        n = tokenizer.base_vocabulary
        self.signal_rows = SignalRows(len(tokenizer.added_tokens), embedding_table[:n], head_table[:n])
        self.projector_configs: dict[Modality, ProjectorConfig] = {}
        self.projectors = nn.ModuleDict()
        self.add_projectors(projectors)

    # --- sizes -----------------------------------------------------------------------------------

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The Hugging Face model, with LoRA inside where there is some."""
        base = self.base.get_base_model() if isinstance(self.base, PeftModel) else self.base
        return cast(PreTrainedModel, base)

    @property
    def width(self) -> int:
        """Width of embeddings and hidden states."""
        return int(self.signal_rows.embedding.shape[1])

    @property
    def context_length(self) -> int:
        """The most positions that the base can see."""
        return int(self.causal_lm.config.get_text_config().max_position_embeddings)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.signal_rows.embedding.device

    @property
    def readable(self) -> tuple[Modality, ...]:
        """The modalities that have a projector."""
        return tuple(self.projector_configs)

    # --- embeddings in, logits out ----------------------------------------------------------------

    def tables(self) -> Tables:
        """Return the tables as they are now; who changes the base, with LoRA for instance, asks again."""
        lm = self.causal_lm
        return Tables(
            embedding=lm.get_input_embeddings(),
            head=cast(nn.Module, lm.get_output_embeddings()),
            num_old=self.tokenizer.base_vocabulary,
            new_embedding=self.signal_rows.embedding,
            new_head=self.signal_rows.head,
            scaling=self._scaling,
        )

    def embed(self, ids: Tensor) -> Tensor:
        """Return input embeddings ``(..., D)`` float32 of ``ids`` ``(...)``, base rows and new rows alike."""
        return self.tables().embed(ids)

    def run(self, embeddings: Tensor, present: Tensor | None = None, media: Tensor | None = None) -> Tensor:
        """Return the last hidden states ``(B, T, D)``, after the final norm, of ``embeddings`` ``(B, T, D)``.

        ``present`` ``(B, T)`` bool masks padding at the right. ``media`` ``(B, T)`` bool tells adapters where
        tokens of media lie, by default nowhere.
        """
        lm = self.causal_lm
        with self.step(embeddings, media):
            output = lm.base_model(
                inputs_embeds=embeddings.to(lm.dtype),
                attention_mask=None if present is None else present.long(),
                use_cache=False,
            )
        return cast(Tensor, output.last_hidden_state)

    def step(self, embeddings: Tensor, media: Tensor | None = None) -> AbstractContextManager[None]:
        """Tell the adapters about one pass of ``embeddings`` ``(B, T, D)``, while the context lasts."""
        if not self.adapters:
            return nullcontext()
        if media is None:
            media = torch.zeros(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device)
        return bound(self.adapters, Step(media))

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits ``(..., V)`` float32 over base and added tokens for ``hidden`` ``(..., D)``."""
        return self.tables().logits(hidden)

    def forward_embeddings(self, embeddings: Tensor, present: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return logits ``(B, T, V)`` and last hidden states ``(B, T, D)``."""
        hidden = self.run(embeddings, present)
        return self.logits(hidden), hidden

    # --- conversations ----------------------------------------------------------------------------

    def slot_length(self, media: MediaTokens) -> int:
        """Return how many positions ``media`` takes.

        Raises:
            ValueError: there is no projector for its modality, or its width is another.

        """
        if media.modality not in self.projector_configs:
            raise ValueError(
                f"This model cannot read {media.modality}; it reads "
                f"{', '.join(('text', *self.projector_configs))}."
            )
        projector = self._projector(media.modality)
        source = _source(media, projector)
        expected = self.projector_configs[media.modality].encoder_width
        if source.shape[1] != expected:
            raise ValueError(
                f"{media.modality} features are {source.shape[1]} wide; this model's projector expects "
                f"{expected}. Use the encoder that it was trained with."
            )
        return projector.num_slots(len(source))

    def encode(self, dialogue: Dialogue, *, loss_on: LossOn = "assistant", open_reply: bool = False) -> Row:
        """Lay out one dialogue; see :func:`llm.template.encode_dialogue`."""
        return encode_dialogue(
            dialogue, self.tokenizer, self.slot_length, loss_on=loss_on, open_reply=open_reply
        )

    def collate(self, dialogues: Sequence[Dialogue], loss_on: LossOn = "assistant") -> Batch:
        """Lay out ``dialogues`` and pad them at the right into one batch, on the CPU."""
        return collate_rows([self.encode(d, loss_on=loss_on) for d in dialogues], self.tokenizer.pad_id)

    def collate_by_length(self, dialogues: Sequence[Dialogue], groups: int = 2) -> list[Batch]:
        """Lay out ``dialogues`` in up to ``groups`` batches, short rows apart from long ones.

        Half of a batch of both is padding, which costs as much as words.
        """
        rows = sorted((self.encode(d, loss_on="assistant") for d in dialogues), key=lambda row: len(row.ids))
        size = -(-len(rows) // groups)
        pad_id = self.tokenizer.pad_id
        return [collate_rows(rows[start : start + size], pad_id) for start in range(0, len(rows), size)]

    def embed_batch(self, batch: Batch) -> Tensor:
        """Return the input embeddings ``(B, T, D)`` of ``batch``, projected media in their slots."""
        embeddings = self.embed(batch.ids)
        for modality in dict.fromkeys(slot.media.modality for _, slot in batch.media):
            placed = [(row, slot) for row, slot in batch.media if slot.media.modality == modality]
            projected = self._project(modality, [slot for _, slot in placed])
            values = torch.cat([projected[i, : slot.length] for i, (_, slot) in enumerate(placed)])
            where = [(row, slot.start + i) for row, slot in placed for i in range(slot.length)]
            rows, positions = torch.tensor(where, device=embeddings.device).unbind(dim=1)
            embeddings = embeddings.index_put((rows, positions), values.to(embeddings.dtype))
        return embeddings

    def forward(self, batch: Batch) -> Output:
        """Run one training batch. Move it to the model's device first."""
        embeddings = self.embed_batch(batch)
        hidden = self.run(embeddings, batch.present, batch.media_places())
        following = F.pad(batch.labels[:, 1:], (0, 1), value=IGNORED)  # (B, T)
        trained = following != IGNORED
        targets = following[trained]  # (M,)
        logits = self.logits(hidden[trained])  # (M, V)
        loss = F.cross_entropy(logits, targets, reduction="sum") / max(len(targets), 1)
        return Output(hidden, embeddings, logits, targets, loss)

    def signal_states(self, output: Output, batch: Batch) -> dict[Modality, SignalStates]:
        """Return the states at the signal tokens of ``batch``, by modality; only modalities that occur."""
        states = {}
        for modality in dict.fromkeys(span.modality for _, span in batch.signals):
            placed = [(row, span) for row, span in batch.signals if span.modality == modality]
            rows = torch.tensor([row for row, _ in placed], device=batch.ids.device)[:, None]  # (N, 1)
            starts = torch.tensor([span.start for _, span in placed], device=batch.ids.device)[:, None]
            steps = torch.arange(self.tokenizer.signals.count(modality), device=batch.ids.device)
            states[modality] = SignalStates(
                hidden=output.hidden[rows, starts + steps].float(),  # (N, k, D)
                embeddings=output.embeddings[rows, starts + steps],  # (N, k, D)
                captions=[span.caption for _, span in placed],
                rows=[row for row, _ in placed],
                copied=[span.copied for _, span in placed],
            )
        return states

    def reads_prompt(self, modality: Modality) -> bool:
        """Whether the words beside a medium of ``modality`` change how it is projected."""
        return self._projector(modality).needs_prompt

    def reads_pooled(self, modality: Modality) -> bool:
        """Whether of a medium of ``modality`` only its global vector is read."""
        return self._projector(modality).reads_pooled

    def project_slot(self, slot: MediaSlot) -> Tensor:
        """Return what goes into ``slot``, ``(slot.length, D)``."""
        return self._project(slot.media.modality, [slot])[0, : slot.length]

    def _projector(self, modality: Modality) -> Projector:
        return cast(Projector, self.projectors[str(modality)])

    def _project(self, modality: Modality, slots: list[MediaSlot]) -> Tensor:
        projector = self._projector(modality)
        sources = [_source(slot.media, projector).to(self.device, torch.float32) for slot in slots]
        tokens = pad_sequence(sources, batch_first=True)
        present = _present([len(source) for source in sources], self.device)
        prompt = None
        if projector.needs_prompt:
            ids = [torch.tensor(slot.prompt_ids, dtype=torch.long, device=self.device) for slot in slots]
            prompt = Prompt(  # (B, P, D) and (B, P)
                self.embed(pad_sequence(ids, batch_first=True, padding_value=self.tokenizer.pad_id)),
                _present([len(row) for row in ids], self.device),
            )
        return projector(tokens, present, prompt)

    # --- training ---------------------------------------------------------------------------------

    def add_projectors(self, configs: Mapping[Modality, ProjectorConfig]) -> None:
        """Put fresh projectors in, in place of those that there were for the same modalities.

        Raises:
            ValueError: a projector is not as wide as the base.

        """
        for modality, config in configs.items():
            if config.llm_width != self.width:
                raise ValueError(
                    f"The {modality} projector has llm_width {config.llm_width}; the base has {self.width}."
                )
            self.projector_configs[modality] = config
            self.projectors[str(modality)] = build_projector(config).to(self.device)

    def add_lora(self, options: LoraOptions) -> None:
        """Put fresh LoRA on the base; the logits do not change.

        Raises:
            ValueError: there is LoRA already, or a target is no module of the base.

        """
        if isinstance(self.base, PeftModel):
            raise ValueError("This model has LoRA already; merge it first with merge_adapter().")
        self.base = put_lora(self.causal_lm, options)

    def merge_adapter(self) -> None:
        """Add LoRA into the base's own weights, for speed; nothing happens without LoRA."""
        if isinstance(self.base, PeftModel):
            self.base = cast(nn.Module, self.base.merge_and_unload())

    def parameters_of(self, part: ModelPart) -> dict[str, nn.Parameter]:
        """Return the parameters of one part, by their name in this module."""
        return {name: p for name, p in self.named_parameters() if _part_of(name) == part}

    def train_only(self, parts: Iterable[ModelPart]) -> None:
        """Let exactly ``parts`` have gradients.

        Raises:
            ValueError: an unknown part.

        """
        wanted = set(parts)
        if unknown := wanted - set(get_args(ModelPart)):
            raise ValueError(
                f"Unknown parts {', '.join(sorted(unknown))}; there are {', '.join(get_args(ModelPart))}."
            )
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(_part_of(name) in wanted)

    # --- files ------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write the folder that :meth:`from_pretrained` reads, floats in ``dtype``. LoRA stays apart."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.save_base(self.causal_lm, folder / checkpoint.BASE, dtype)
        self.tokenizer.save(folder / checkpoint.BASE)
        if isinstance(self.base, PeftModel):
            save_lora(self.base, folder / checkpoint.ADAPTER, dtype)
        checkpoint.save_tensors(self._bridge(), folder / checkpoint.BRIDGE, dtype)
        self._save_manifest(folder, folder / checkpoint.BASE)

    def save_bridge(self, folder: Path, base: Path) -> None:
        """Write the ``bridge`` of :meth:`from_pretrained`: all that was trained for a base, not LoRA."""
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.save_tensors(self._bridge(), folder / checkpoint.BRIDGE, torch.float32)
        self._save_manifest(folder, base, self.has_base_tables)

    def _save_manifest(self, folder: Path, base: Path, base_tables: bool = False) -> None:
        manifest = checkpoint.Manifest(
            base_config_sha256=checkpoint.config_digest(base),
            llm_width=self.width,
            base_vocabulary=self.tokenizer.base_vocabulary,
            added_tokens=list(self.tokenizer.added_tokens),
            signals={str(m): self.tokenizer.signals.count(m) for m in Modality if m != Modality.TEXT},
            projectors=checkpoint.Manifest.describe(self.projector_configs),
            lora=isinstance(self.base, PeftModel),
            base_tables=base_tables,
            role_words=self.tokenizer.role_words,
        )
        (folder / checkpoint.MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n")

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: torch.device | str = "cpu",
        adapters: Sequence[LMAdapter] = (),
        dtype: torch.dtype | None = None,
        *,
        base: Path | None = None,
        bridge: Path | None = None,
    ) -> LanguageModel:
        """Read a folder written by :meth:`save_pretrained` or converted from a release, in evaluation mode.

        The base is in ``dtype``; None stands for float32 on the CPU and bfloat16 elsewhere, whatever the
        files hold. The bridge is float32. ``adapters`` are the ones that the model was saved with. ``base``
        and ``bridge`` are folders that take the place of the base and of the bridge in ``folder``.

        Raises:
            ValueError: a file is missing (named), was written for another base, or holds a tensor of
                another shape (tensor, given, expected).

        """
        folder = Path(folder)
        base_folder, bridge_folder = base or folder / checkpoint.BASE, bridge or folder
        manifest = checkpoint.read_manifest(bridge_folder, base_folder)
        if dtype is None:
            dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
        tokenizer = ConversationTokenizer.load(base_folder, manifest.signal_vocabulary, manifest.role_words)
        n, added = tokenizer.base_vocabulary, list(tokenizer.added_tokens)
        if (n, added) != (manifest.base_vocabulary, manifest.added_tokens):
            raise ValueError(
                f"{base_folder / 'tokenizer.json'} has {n} base tokens and adds {added}; "
                f"the manifest expects {manifest.base_vocabulary} and {manifest.added_tokens}."
            )
        causal_lm = checkpoint.load_base(base_folder, dtype)
        if manifest.base_tables:
            checkpoint.replace_tables(causal_lm, folder / checkpoint.TABLES, n)
        model = cls(causal_lm, tokenizer, manifest.projector_configs, adapters)
        model.has_base_tables = manifest.base_tables
        if manifest.lora:
            model.base = load_lora(causal_lm, folder / checkpoint.ADAPTER)
            model.base.requires_grad_(False)
        trained = model._bridge()
        tensors = checkpoint.load_tensors(bridge_folder / checkpoint.BRIDGE, trained)
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(tensors[name])
        return model.to(device).eval()

    def _bridge(self) -> dict[str, Tensor]:
        parts = {f"projectors.{name}": p for name, p in self.projectors.named_parameters()}
        parts |= {f"signal_rows.{name}": p for name, p in self.signal_rows.named_parameters()}
        return parts | {f"lm.{name}": p for name, p in adapter_parameters(self.causal_lm)}


def _part_of(name: str) -> ModelPart:
    if name.startswith("projectors."):
        return "projectors"
    if name.startswith("signal_rows."):
        return "signal_rows"
    if is_adapter_name(name):
        return "adapters"
    return "lora" if ".lora_" in name else "base"


def _source(media: MediaTokens, projector: Projector) -> Tensor:
    if not projector.reads_pooled:
        return media.tokens
    if media.pooled is None:
        raise ValueError(
            f"The {media.modality} features have no pooled vector, which this model's projector reads. Those "
            f"of pictures that are cut have none: leave `tiling` out of the preset, or train a projector "
            f"that reads tokens."
        )
    return media.pooled[None]


def _present(lengths: list[int], device: torch.device) -> Tensor:
    """Return ``(len(lengths), max)`` bool, True for the first ``length`` of each row."""
    return torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]
