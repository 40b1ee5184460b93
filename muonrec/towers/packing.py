"""Packing: padded views of packed events, a group of users of like length at a time."""

# T = events of all users, B = users, L = longest history of a group, D = width

from __future__ import annotations

import dataclasses
import functools

import torch
import torch.nn.functional as F

Groups = list[tuple[int, int, int]]


@dataclasses.dataclass(frozen=True)
class PackedLayout:
    """Where the events of each user lie, and how to lay a group of users out as a rectangle and back.

    Args:
        position_T: int64, place of each event in its user's history, 0 the oldest.
        from_end_T: int64, the same counted from the latest event, which is 0.
        groups: per group: slice of the events, ``pad_BL`` (row within the slice of each cell, 0 where there is no
            event) and ``unpad`` (cell of each event).
    """

    position_T: torch.Tensor
    from_end_T: torch.Tensor
    groups: list[tuple[slice, torch.Tensor, torch.Tensor]]

    @classmethod
    def of(cls, lengths_B: torch.Tensor, groups: Groups) -> PackedLayout:
        """Lay out users in order of falling length, ``groups`` as in `SequenceBatch`; asks the device nothing."""
        num_events = sum(events for _, events, _ in groups)
        ends_B = torch.cumsum(lengths_B, 0)
        starts_B = ends_B - lengths_B
        user_T = torch.repeat_interleave(lengths_B, output_size=num_events)  # row of the user of each event
        position_T = torch.arange(num_events, device=lengths_B.device) - starts_B[user_T]
        layouts = []
        first_user = first_event = 0
        for users, events, longest in groups:
            in_group = slice(first_event, first_event + events)
            rows = slice(first_user, first_user + users)
            start_of = starts_B[rows, None] - first_event
            column_L = torch.arange(longest, device=lengths_B.device)
            inside_BL = column_L < lengths_B[rows, None]
            pad_BL = torch.where(inside_BL, start_of + column_L, 0)
            unpad = (user_T[in_group] - first_user) * longest + position_T[in_group]
            if events:  # users without a history have no row to pad from
                layouts.append((in_group, pad_BL, unpad))
            first_user, first_event = first_user + users, first_event + events
        return cls(
            position_T=position_T,
            from_end_T=lengths_B[user_T] - 1 - position_T,
            groups=layouts,
        )

    @functools.cached_property
    def inside(self) -> list[torch.Tensor]:
        """Bool ``[B, L]`` of each group: whether the cell holds an event."""
        masks = []
        for _, pad_BL, unpad_T in self.groups:
            inside = torch.zeros(pad_BL.numel(), dtype=torch.bool, device=pad_BL.device)
            masks.append(inside.index_fill_(0, unpad_T, True).view_as(pad_BL))
        return masks


def pad(x_TD: torch.Tensor, pad_BL: torch.Tensor) -> torch.Tensor:
    """``[B, L, D]`` from the packed rows of one group. `F.embedding`, since the backward of indexing sorts."""
    return F.embedding(pad_BL, x_TD)


def unpad(x_BLD: torch.Tensor, unpad_T: torch.Tensor) -> torch.Tensor:
    """The packed rows ``[T, D]`` of one group again."""
    return F.embedding(unpad_T, x_BLD.flatten(0, 1))
