"""From the hidden states of a signal block to what a decoder is conditioned on.

The layout (names and shapes of all parameters) is that of NExT-GPT's released checkpoint, so that its
three ``gen_text_hidden_fcs*.0`` modules load unchanged.

A copy gate may stand beside it: one number that says whether no medium like the last is wanted, but that very
one. What a caption cannot say of a picture, its shade and its spot, need not be drawn again then.

A decoder may want more than one tensor (a pooled vector besides the text states, say). Then the queries of
all of them go through one transformer, and each tensor has a last layer of its own.

Shape letters in this file:
    B batch   K signal tokens   D LLM width   Q query tokens   W hidden width   O output width
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from decoders.condition import ConditionSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputProjectionConfig:
    """Sizes of an :class:`OutputProjection`. Immutable; checked when it is made.

    ``named`` are the tensors that the decoder takes besides the first: name to (tokens, width).
    ``copy_gate`` is whether there is one.
    """

    llm_width: int
    out_width: int
    num_queries: int
    hidden_width: int = 512
    num_encoder_layers: int = 4
    num_decoder_layers: int = 4
    num_heads: int = 4
    ffn_width: int = 2048
    named: dict[str, tuple[int, int]] = field(default_factory=dict)
    copy_gate: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "named", {name: tuple(sizes) for name, sizes in self.named.items()})
        others = ("named", "copy_gate")
        numbers = {name: value for name, value in asdict(self).items() if name not in others}
        for name, sizes in self.named.items():
            if len(sizes) != 2 or "." in name:
                raise ValueError(f"named has {name!r}: {sizes!r}; expected a name and (tokens, width).")
            numbers |= {f"tokens of {name}": sizes[0], f"width of {name}": sizes[1]}
        for name, value in numbers.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1.")
        if self.hidden_width % self.num_heads:
            raise ValueError(
                f"hidden_width ({self.hidden_width}) is not a multiple of num_heads ({self.num_heads}). "
                f"Pick num_heads from the divisors of hidden_width."
            )

    @classmethod
    def for_decoder(
        cls, specs: Mapping[str, ConditionSpec], llm_width: int, **sizes: Any
    ) -> "OutputProjectionConfig":
        """Return the configuration of a projection to what a decoder takes; the first spec is the main."""
        (_, first), *rest = specs.items()
        return cls(
            llm_width=llm_width,
            out_width=first.width,
            num_queries=first.tokens,
            named={name: (spec.tokens, spec.width) for name, spec in rest},
            **sizes,
        )

    def to_json(self) -> dict[str, object]:
        """Return plain values, without those of what is not there."""
        return {name: value for name, value in asdict(self).items() if value}


class OutputProjection(nn.Module):
    """Learned queries read a signal block through a small encoder-decoder transformer.

    Source: TextFcLayer in "transformer" mode, NExT-GPT (arXiv 2309.05519) section 4 and its 2023 code.
    The queries start as standard normal noise, as there; equal queries would stay equal.
    """

    def __init__(self, config: OutputProjectionConfig) -> None:
        super().__init__()
        self.config = config
        width, heads, ffn = config.hidden_width, config.num_heads, config.ffn_width
        encoder_layer = nn.TransformerEncoderLayer(
            width, heads, ffn, dropout=0.0, norm_first=True, batch_first=True
        )
        decoder_layer = nn.TransformerDecoderLayer(
            width, heads, ffn, dropout=0.0, norm_first=True, batch_first=True
        )
        self.fc = nn.Linear(config.llm_width, width)
        self.tfm = nn.Transformer(
            width,
            heads,
            custom_encoder=nn.TransformerEncoder(
                encoder_layer, config.num_encoder_layers, nn.LayerNorm(width), enable_nested_tensor=False
            ),
            custom_decoder=nn.TransformerDecoder(
                decoder_layer, config.num_decoder_layers, nn.LayerNorm(width)
            ),
            batch_first=True,
        )
        self.model = nn.Linear(width, config.out_width)
        self.query_embs = nn.Parameter(torch.randn(1, config.num_queries, width))
        self.named_query_embs = nn.ParameterDict()
        self.named_models = nn.ModuleDict()
        for name, (tokens, out_width) in config.named.items():
            self.named_query_embs[name] = nn.Parameter(torch.randn(1, tokens, width))
            self.named_models[name] = nn.Linear(width, out_width)
        if config.copy_gate:
            self.copy_gate = nn.Linear(config.llm_width, 1)
            nn.init.zeros_(self.copy_gate.weight)

    def forward(self, hidden: Tensor, input_embeddings: Tensor) -> Tensor:
        """Project signal blocks to the main tensor of their conditions; see :meth:`project`."""
        return self.project(hidden, input_embeddings)[0]

    def project(self, hidden: Tensor, input_embeddings: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Project signal blocks to conditions.

        Args:
            hidden: ``(B, K, D)`` final hidden states at the signal tokens.
            input_embeddings: ``(B, K, D)`` input embeddings of the same tokens.

        Returns:
            The main tensor ``(B, Q, O)`` and the others by name, ``(B, tokens, width)`` each. Not normalised;
            a decoder that wants a unit vector normalises.

        Raises:
            ValueError: shapes that differ, or a last dimension that is not ``llm_width``.

        """
        if hidden.ndim != 3 or hidden.shape != input_embeddings.shape:
            raise ValueError(
                f"hidden has shape {tuple(hidden.shape)} and input_embeddings "
                f"{tuple(input_embeddings.shape)}; expected the same (B, K, D) twice."
            )
        if hidden.shape[2] != self.config.llm_width:
            raise ValueError(
                f"hidden is {hidden.shape[2]} wide; this projection was made for an LLM of width "
                f"{self.config.llm_width}. Use the projection that belongs to the LLM."
            )
        source = self.fc(hidden + input_embeddings)  # (B, K, W)
        all_queries = [self.query_embs, *(self.named_query_embs[name] for name in self.config.named)]
        queries = torch.cat(all_queries, dim=1).expand(len(source), -1, -1)  # (B, sum of Q, W)
        main, *others = self.tfm(source, queries).split([q.shape[1] for q in all_queries], dim=1)
        named = {
            name: self.named_models[name](states)  # (B, tokens, width)
            for name, states in zip(self.config.named, others, strict=True)
        }
        return self.model(main), named  # (B, Q, O)

    def copy_logits(self, hidden: Tensor) -> Tensor:
        """Return how clearly signal blocks ask for the very medium that was there last.

        Args:
            hidden: ``(B, K, D)`` final hidden states at the signal tokens.

        Returns:
            Log-odds ``(B,)``, above 0 where a copy is wanted; minus infinity where there is no gate.

        """
        if not self.config.copy_gate:
            return hidden.new_full((len(hidden),), -torch.inf)
        logits: Tensor = self.copy_gate(hidden.mean(dim=1))[:, 0]
        return logits

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors`` into ``folder``, in this module's dtype."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config.to_json(), indent=2) + "\n")
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        save_file(tensors, folder / "model.safetensors")

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str = "cpu") -> "OutputProjection":
        """Read what :meth:`save_pretrained` wrote, as float32, in evaluation mode.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged, or the weights do not fit the configuration.

        """
        folder = Path(folder)
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"{folder / name} is missing; an output projection is config.json and "
                    f"model.safetensors. Copy the complete folder."
                )
        try:
            config = OutputProjectionConfig(**json.loads((folder / "config.json").read_text()))
            tensors = load_file(folder / "model.safetensors")
        except (TypeError, ValueError, SafetensorError) as error:
            raise ValueError(f"{folder} cannot be read ({error}). Copy the folder again.") from None
        projection = cls(config)
        try:
            projection.load_state_dict(tensors)
        except RuntimeError as error:
            raise ValueError(f"{folder}/model.safetensors does not fit its config.json: {error}") from None
        return projection.to(device).eval()
