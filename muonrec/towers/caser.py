"""The convolutional tower: Caser's horizontal and vertical convolutions over the latest events."""

# T = events of all users, B = users, D = width, S = rows with the gaps between users, W = events of a window

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from muonrec.towers.packing import Groups


class CaserTower(nn.Module):
    """Caser's convolutions (Tang & Wang 2018) over each event's window of latest events, on packed events.

    All windows are computed in one pass over all users, between whom stand as many zero rows as a window can look
    back: the horizontal kernels slide over the rows and a sliding maximum stands for the pooling within each window.
    Memory grows with the events, not with their windows.

    Args:
        embedding_dim: width of the events and of the hidden states that come out, D.
        window: events an event knows, itself included; the paper's L. Zero rows stand before a user's first.
        num_horizontal: horizontal kernels of each height from 1 to ``window``; each sees whole rows.
        num_vertical: vertical kernels; each is a weighted sum of the window's rows.
        dropout: of the features that the convolutions give.
    """

    def __init__(
        self, *, embedding_dim: int, window: int, num_horizontal: int, num_vertical: int, dropout: float
    ) -> None:
        super().__init__()
        self.window = window
        self.horizontal = nn.ModuleList(
            nn.Conv1d(embedding_dim, num_horizontal, height) for height in range(1, window + 1)
        )
        self.vertical = nn.Conv1d(1, num_vertical, window)
        self.dropout = nn.Dropout(dropout)
        self.hidden = nn.Linear(window * num_horizontal + num_vertical * embedding_dim, embedding_dim)
        # Instead of the paper's second table: hidden states that a ReLU has left positive meet the rows they are
        # scored by in the space of the one table there is.
        self.output = nn.Linear(embedding_dim, embedding_dim)

    def forward(self, x_TD: torch.Tensor, lengths_B: torch.Tensor, groups: Groups) -> torch.Tensor:
        """Hidden states ``[T, D]`` of packed events; row t knows the ``window`` latest of its user's events up to t.

        Args:
            x_TD: embedded events.
            lengths_B: int64, events of each user.
            groups: not needed; the device is asked nothing without them.
        """
        num_events, gap = x_TD.shape[0], self.window - 1
        user_T = torch.repeat_interleave(lengths_B, output_size=num_events)
        # Where the window of each event starts: rows have a gap before each user, and a window for no events at all.
        start_T = torch.arange(num_events, device=x_TD.device) + user_T * gap
        num_rows = num_events + lengths_B.numel() * gap + self.window
        rows_SD = x_TD.new_zeros(num_rows, x_TD.shape[1]).index_copy(0, start_T + gap, x_TD)
        rows_DS = rows_SD.T

        horizontal = [
            F.max_pool1d(F.relu(conv(rows_DS[None])), self.window - height + 1, stride=1)[0]
            for height, conv in enumerate(self.horizontal, start=1)
        ]
        vertical = self.vertical(rows_DS[:, None]).flatten(0, 1)
        # F.embedding, since the backward of indexing sorts.
        features = F.embedding(start_T, torch.cat([*horizontal, vertical]).T)
        return self.output(self.dropout(F.relu(self.hidden(self.dropout(features)))))
