"""Some consecutive layers of a model: a stage of a pipeline, under the names that its parts have in the whole model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from k2kernels._backend import UnsupportedError
from k2kernels.model.config import K2Config
from k2kernels.model.layer import DecoderLayer
from k2kernels.model.model import K2Model
from k2kernels.model.trunk import Layers


class _Part(K2Model):
    """What a part of a model cannot do."""

    def generate(self, *args: Any, **options: Any) -> Any:
        """Raises UnsupportedError: the layers before or after are elsewhere."""
        raise UnsupportedError("generate: the model must be whole, got a part of it; pipelines train")

    def save_pretrained(self, *args: Any, **options: Any) -> None:
        """Raises UnsupportedError: the other layers are elsewhere."""
        raise UnsupportedError(
            "save_pretrained: the model must be whole, got a part of it; save parts by "
            "k2kernels.parallel.save_checkpoint, and load that into a model of parallelize"
        )

    @classmethod
    def from_pretrained(cls, *args: Any, **options: Any) -> Any:
        """Raises UnsupportedError."""
        raise UnsupportedError(
            f"{cls.__name__}.from_pretrained: a part of a model must be made from its config; load_pretrained fills it "
            "from files of the whole model"
        )

    def whole_on_meta(self) -> K2Model:
        """The model that this is a part of, without data: its names and shapes."""
        with torch.device("meta"):
            return K2Model(self.config)

    def load_whole(self, state_dict: dict[str, Tensor]) -> None:
        """Takes what is here of a whole model's `state_dict()`; that of parameters that are whole here.

        Raises:
            RuntimeError: something is missing, or of another shape.
        """
        self.load_state_dict({name: state_dict[name] for name in self.state_dict() if name in state_dict})


class K2Stage(_Part):
    """The layers `layers` of a `K2Model`, and what belongs to them.

    The first stage has the embedding; the last one has the final norm, the head and the MTP layers. Parameters and
    buffers have the names of the whole model, so that state dicts, optimizers, `max_logits` and `expert_load` of all
    stages fit together. Weights are random until loaded.

    MTP layers need the embedding of the tokens: where the configuration has them, it accompanies the hidden states
    through all stages, and its gradient comes back to the first. No weight is then in two stages.

    Args:
        config: of the whole model.
        layers: at least one, of range(config.num_hidden_layers).

    Raises:
        ValueError: for other layers, or embedding and head in one matrix.
    """

    def __init__(self, config: K2Config, layers: range):
        count = config.num_hidden_layers
        if not (isinstance(layers, range) and layers.step == 1 and 0 <= layers.start < layers.stop <= count):
            raise ValueError(f"K2Stage: layers must be a range within 0 to {count}, not empty, got {layers!r}")
        if config.tie_word_embeddings and len(layers) < count:
            raise ValueError("K2Stage: tie_word_embeddings must be False: one matrix would be in two stages")
        super().__init__(config, layers)
        self.layers = layers

    @property
    def is_first(self) -> bool:
        return self.layers.start == 0

    @property
    def is_last(self) -> bool:
        return self.layers.stop == self.config.num_hidden_layers

    def forward(self, x: Tensor, embedded: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:
        """What the next stage takes, or the logits; differentiable.

        Args:
            x: ids [B, T] in the first stage, else hidden states [B, T, hidden].
            embedded: [B, T, hidden], the embedding of the ids, in a later stage of a model with MTP layers.

        Returns:
            Hidden states, with MTP layers (those, embedded). Of the last stage: float32 logits [B, T, vocab], with MTP
            layers (those, `mtp_logits`...).
        """
        if self.is_first:
            self.check_ids("K2Stage", x)
            x = embedded = self.model.embed_tokens(x)
        elif self.config.num_nextn_predict_layers and not self.is_last:
            embedded = embedded.clone()  # an output must be neither an input nor a view
        self._records()
        x = self.model(x, self._steps(*x.shape[:2]))
        if not self.is_last:
            return (x, embedded) if self.config.num_nextn_predict_layers else x
        logits = self._logits(x)
        return (logits, *self._mtp_logits(x, lambda first: embedded[:, first:])) if self.mtp_layers else logits


class K2Stages(_Part):
    """Several stages of one model as one: their parameters, statistics and state dicts. It shares their modules.

    It has no forward pass: each stage has its own. An optimizer, `k2kernels.parallel.Layout` and
    torch.distributed.checkpoint take it for the model of this rank.
    """

    def __init__(self, stages: Sequence[K2Stage]):
        nn.Module.__init__(self)
        self.config, self.rope = stages[0].config, stages[0].rope
        self.stages = tuple(stages)
        for stage in stages:
            stage.rope = self.rope
        parts = sorted(stages, key=lambda stage: stage.layers.start)
        layers: list[DecoderLayer] = [layer for stage in parts for layer in stage.model.layers]
        self.model = nn.Module()
        self.model.depth = sum(stage.model.depth for stage in parts)
        self.model.embed_tokens = parts[0].model.embed_tokens
        self.model.layers = Layers(layers)
        self.model.norm, self.lm_head = parts[-1].model.norm, parts[-1].lm_head

    @property
    def ranks(self) -> Any:
        return self.stages[0].ranks

    @ranks.setter
    def ranks(self, ranks: Any) -> None:
        for stage in self.stages:
            stage.ranks = ranks

    @property
    def statistics_reduced(self) -> bool:
        return all(stage.statistics_reduced for stage in self.stages)

    @statistics_reduced.setter
    def statistics_reduced(self, reduced: bool) -> None:
        for stage in self.stages:
            stage.statistics_reduced = reduced

    def train(self, mode: bool = True) -> K2Stages:
        super().train(mode)
        for stage in self.stages:
            stage.train(mode)
        return self

    def forward(self, *args: Any, **options: Any) -> Any:
        """Raises UnsupportedError."""
        raise UnsupportedError("K2Stages: call its stages, which are a pipeline's; it has no forward pass of its own")
