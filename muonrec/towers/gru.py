"""The recurrent tower: gated recurrent units over packed events."""

# T = events of all users, B = users, D = width, H = width of the hidden states

from __future__ import annotations

import torch
from torch import nn

from muonrec.towers.packing import Groups, PackedLayout, pad, unpad


class GRUTower(nn.Module):
    """GRU4Rec's layers (Hidasi et al. 2016) on packed events.

    The recurrence is `nn.GRU` on groups of like length: users stand in order of falling length, so little is padded,
    and the device is asked nothing.

    Args:
        embedding_dim: width of the events and of the hidden states that come out, D.
        hidden_dim: width of the recurrence; where it is not D, a linear layer leads back.
        num_layers: recurrent layers.
        dropout: of the embedded events.
        hidden_dropout: of the hidden states, between layers and of the last.
    """

    def __init__(
        self, *, embedding_dim: int, hidden_dim: int, num_layers: int, dropout: float, hidden_dropout: float
    ) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        # torch warns of a dropout between layers where there is one layer.
        between = hidden_dropout if num_layers > 1 else 0.0
        self.gru = nn.GRU(embedding_dim, hidden_dim, num_layers, batch_first=True, dropout=between)
        self.hidden_dropout = nn.Dropout(hidden_dropout)
        self.output = nn.Identity() if hidden_dim == embedding_dim else nn.Linear(hidden_dim, embedding_dim)

    def forward(self, x_TD: torch.Tensor, lengths_B: torch.Tensor, groups: Groups) -> torch.Tensor:
        """Hidden states ``[T, D]`` of packed events; row t knows its user's events up to t.

        Args:
            x_TD: embedded events, users in order of falling length.
            lengths_B: int64, events of each user.
            groups: `SequenceBatch.groups`.
        """
        x_TD = self.dropout(x_TD)
        # Padding stands to the right of every event, where no state that is kept has seen it.
        hidden = [
            unpad(self._recur(pad(x_TD[events], pad_BL)), unpad_T)
            for events, pad_BL, unpad_T in PackedLayout.of(lengths_B, groups).groups
        ]
        # No events at all: every gate still takes part, since DDP waits for its gradient.
        hidden_TH = torch.cat(hidden) if hidden else self._recur(x_TD.new_zeros(1, 1, x_TD.shape[1]))[0, :0]
        return self.output(self.hidden_dropout(hidden_TH))

    def _recur(self, x_BLD: torch.Tensor) -> torch.Tensor:
        # Under autocast cuDNN's recurrence runs in float16 whatever dtype is asked for, and gradients vanish there.
        with torch.autocast(x_BLD.device.type, enabled=False):
            return self.gru(x_BLD.to(next(self.gru.parameters()).dtype))[0]
