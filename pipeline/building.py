"""What a config of the train stage names, built: data, model with its loss, and batches as the model reads them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from muonrec.batch import SequenceBatch
from muonrec.data.loader import Part
from muonrec.data.semantic_ids import SemanticIds, Tokenizer, load_semantic_ids
from muonrec.data.shards import Sequences, load_sequences
from muonrec.losses import NextItemLoss, TokenLoss
from muonrec.models import MODELS, HSTUConfig, ShardedDecoder, TigerConfig
from pipeline.train_config import TrainConfig


def semantic_ids_of(config: TrainConfig) -> SemanticIds | None:
    """The codes of the data set's items where the model writes them; None where it does not.

    Raises:
        ValueError: the config names none, or they are not there, or of other items or settings.
    """
    if not isinstance(config.model, TigerConfig):
        return None
    section = config.data.semantic_ids
    if section is None:
        raise ValueError(
            "model tiger writes semantic IDs, and the config says nothing of them; add data.semantic_ids, as "
            "configs/amazon-beauty/tiger.yaml does, and run python -m pipeline.data with it"
        )
    return load_semantic_ids(section.place(config.data.output), dataset=config.data.output, config=section)


def load_data(config: TrainConfig) -> Sequences:
    """The data set, with the times of its events where the model wants them."""
    wants_times = isinstance(config.model, HSTUConfig) and config.model.time_bias is not False
    return load_sequences(config.data.output, timestamps=wants_times)


def build_model(config: TrainConfig, *, num_items: int, ids: SemanticIds | None, has_times: bool = True) -> nn.Module:
    """The model on one device, its tables on meta; ``ids`` as `semantic_ids_of` gives them.

    Raises:
        ValueError: the model wants times, and the data set has none.
    """
    build, settings = MODELS[config.model.name], config.model
    if ids is not None:
        return build(settings, semantic_ids=ids, loss=TokenLoss())
    if isinstance(settings, HSTUConfig):
        settings = settings.on_data(has_times=has_times)
    assert config.loss.name != "token_softmax", "TrainConfig lets no such config through"
    loss = NextItemLoss(config.loss.name, temperature=config.loss.temperature)
    return build(settings, num_items=num_items, loss=loss)


def make_tokenizer(config: TrainConfig, ids: SemanticIds) -> Tokenizer:
    """What writes training batches in the codes of ``ids``."""
    assert isinstance(config.model, TigerConfig)
    return Tokenizer(ids, num_user_tokens=config.model.num_user_tokens)


def as_read_by(
    scorer: object, batches: Iterable[SequenceBatch], sequences: Sequences, part: Part
) -> Iterator[SequenceBatch]:
    """Evaluation batches of ``part``, in codes for a scorer that reads those."""
    for batch in batches:
        if isinstance(scorer, ShardedDecoder):
            users, _ = sequences.locate(batch.user_ids.numpy(), part)
            batch = scorer.tokenizer.for_decoding(batch, sequences.user_ids[users])
        yield batch
