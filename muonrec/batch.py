"""SequenceBatch: what the loader hands to a model, as TorchRec's train pipelines want it."""

# B = users of the batch, T = events of all users, C = candidates

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

HISTORY, TARGETS, CANDIDATES, USER = "history", "targets", "candidates", "user"


@dataclasses.dataclass
class SequenceBatch(Pipelineable):
    """Users' histories, packed, with what is to be predicted.

    Args:
        features: stride B (1 when there are no users), keys ``history`` (the input events of each user), ``targets``
            (the items to be predicted whose rows the loss looks up; empty when it needs none) and ``candidates`` (the
            items they compete with, all in the first user's slot). All are features of the table ``item``; ids int64.
            Tokenized, see `muonrec.data.semantic_ids.Tokenizer`: of the table ``token``, several ids for each item;
            and ``user``, the users' own tokens.
        labels: int64. Training: ``[T]``, the item that follows each event of the history. Evaluation: ``[B]``, the one
            held-out item of each user.
        log_q: float32 ``[T + C]``, log sampling probability of the labels and of the candidates; empty when uniform.
        user_ids: int64 ``[B]``, rows of the user vocabulary.
        groups: on the host, for users in order of falling history: ``(users, events, longest history)`` of each group
            of like length, so that attention pads little and asks the device nothing.
        step: the global batch this is a share of, counted from the start of training; for messages.
        num_step_targets: targets of this rank in the whole global batch, where this is one of its micro-batches; None
            where it is all of it.
        timestamps_s: int64 ``[T]``, when the events of the history were; empty where the model does not ask.
    """

    features: KeyedJaggedTensor
    labels: torch.Tensor
    log_q: torch.Tensor
    user_ids: torch.Tensor
    groups: list[tuple[int, int, int]]
    step: int = 0
    num_step_targets: int | None = None
    timestamps_s: torch.Tensor = dataclasses.field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    def to(self, device: torch.device, non_blocking: bool = False) -> SequenceBatch:
        return self._map(lambda part: part.to(device=device, non_blocking=non_blocking))

    def pin_memory(self) -> SequenceBatch:
        return self._map(lambda part: part.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        for part in (self.features, self.labels, self.log_q, self.user_ids, self.timestamps_s):
            part.record_stream(stream)

    def _map(self, change: Callable[[Any], Any]) -> SequenceBatch:
        return dataclasses.replace(
            self,
            features=change(self.features),
            labels=change(self.labels),
            log_q=change(self.log_q),
            user_ids=change(self.user_ids),
            timestamps_s=change(self.timestamps_s),
        )
