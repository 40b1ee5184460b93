"""Plans what of one bucket of matrices travels between which ranks in a step; every rank works out its own share."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from muonrec.optim.exchange import Broadcast, Exchange, Parcel, should_deal_out
from muonrec.optim.layout import Layout, Part
from muonrec.optim.update import Split


@dataclass(frozen=True, eq=False)
class Matrix:
    """One parameter in the plan; the same on every rank, but for the tensor."""

    name: str
    param: Tensor
    group_index: int
    shape: tuple[int, int]
    layout: Layout
    split: Split
    owner: int
    bucket: int
    turn: int  # counts the matrices, so that the holders of copies take turns in sending

    @property
    def is_replicated(self) -> bool:
        """Every rank holds the whole parameter; its owner alone keeps the momentum."""
        return self.layout.is_replicated


@dataclass(frozen=True, eq=False)
class ToOwners:
    """One rank's share in bringing what is to be orthogonalized to the owners.

    Attributes:
        advanced: matrices whose momentum this rank moves on by a gradient of its own, or by zero.
        borrowed: those whose momentum it moves on by another rank's gradient, in the order in which these arrive.
        lent: those of which it sends its gradient to such a rank.
        sent: those of which it sends its part to the owner.
        arriving: the parts that arrive here, at the owner.
        owned: matrices that this rank orthogonalizes, with the part that it contributes itself, or None.
        exchange: of ``lent``, then ``sent``; it brings ``borrowed``, then ``arriving``. None where nothing travels.
    """

    advanced: list[Matrix]
    borrowed: list[Matrix]
    lent: list[Matrix]
    sent: list[Matrix]
    arriving: list[tuple[Matrix, Part]]
    owned: list[tuple[Matrix, Part | None]]
    exchange: Exchange | None


@dataclass(frozen=True, eq=False)
class FromOwners:
    """One rank's share in bringing the orthogonalized updates to all who hold a part.

    Attributes:
        sent: matrices that this rank owns, with the part to be sent, once for each parcel.
        arriving: matrices of which this rank's part arrives, in order.
        kept: matrices that this rank owns, with its own part, where that does not travel.
        exchange: of ``sent``; it brings ``arriving``. None where nothing travels.
    """

    sent: list[tuple[Matrix, Part]]
    arriving: list[Matrix]
    kept: list[tuple[Matrix, Part]]
    exchange: Exchange | Broadcast | None


def plan_to_owners(
    bucket: Sequence[Matrix],
    having: Mapping[str, Set[int] | None],
    wire_dtypes: Mapping[str, torch.dtype],
    *,
    rank: int,
    num_ranks: int,
) -> ToOwners:
    """Work out this rank's share, in time that grows with the matrices, and with the ranks for owned ones alone.

    Args:
        bucket: the matrices to update, in the same order on every rank.
        having: by name, the ranks that have a gradient; None for all of them.
        wire_dtypes: by name, what parts are packed as; lent gradients travel as they are.
        rank: this one.
        num_ranks: of the group.
    """
    plan = ToOwners([], [], [], [], [], [], None)
    lent, sent, borrowed, arriving = [], [], [], []
    for m in bucket:
        present, own = having[m.name], None
        for part, holders in _parts_of_concern(m, rank):
            keepers = [m.owner] if m.is_replicated else holders
            lenders = [] if present is None else [r for r in holders if r in present]
            # Copies must not drift apart: where one lacks the gradient, that of another counts.
            borrowers = [r for r in keepers if r not in lenders] if lenders else []
            for borrower in borrowers:
                lender = lenders[m.turn % len(lenders)]
                if rank == lender:
                    plan.lent.append(m)
                    lent.append(Parcel(borrower, part.shape, m.param.dtype))
                if rank == borrower:
                    plan.borrowed.append(m)
                    borrowed.append(Parcel(lender, part.shape, m.param.dtype))
            if rank in keepers and rank not in borrowers:
                plan.advanced.append(m)

            # One of the copies is enough, best the owner's, but none that still waits for a gradient.
            senders = [r for r in keepers if r not in borrowers] or keepers
            sender = m.owner if m.owner in senders else senders[m.turn % len(senders)]
            if sender == m.owner:
                own = part if rank == m.owner else None
            elif rank == sender:
                plan.sent.append(m)
                sent.append(Parcel(m.owner, part.shape, wire_dtypes[m.name]))
            elif rank == m.owner:
                plan.arriving.append((m, part))
                arriving.append(Parcel(sender, part.shape, wire_dtypes[m.name]))
        if rank == m.owner:
            plan.owned.append((m, own))

    # Decided from what every rank knows: a rank that skipped a collective alone would hang the others.
    if num_ranks > 1 and any(_travels_to_its_owner(m, having[m.name]) for m in bucket):
        return replace(plan, exchange=Exchange(lent + sent, borrowed + arriving, num_ranks))
    return plan


def plan_from_owners(
    bucket: Sequence[Matrix], wire_dtypes: Mapping[str, torch.dtype], *, rank: int, num_ranks: int
) -> FromOwners:
    """Work out this rank's share; arguments as of `plan_to_owners`."""
    if num_ranks > 1 and all(m.is_replicated for m in bucket):
        whole = [Parcel(m.owner, m.shape, wire_dtypes[m.name]) for m in bucket]
        loads = [0] * num_ranks
        for parcel in whole:
            loads[parcel.rank] += parcel.num_bytes
        if should_deal_out(loads):
            owned = [(m, m.layout.part(rank)) for m in bucket if m.owner == rank]
            return FromOwners(owned, list(bucket), [], Broadcast(whole, rank, num_ranks))

    plan = FromOwners([], [], [], None)
    sent, arriving = [], []
    for m in bucket:
        own = m.layout.part(rank)
        if m.owner == rank:
            plan.kept.append((m, own))
            for part, holders in m.layout.parts():
                others = [r for r in holders if r != rank]
                plan.sent.extend([(m, part)] * len(others))
                sent += [Parcel(r, part.shape, wire_dtypes[m.name]) for r in others]
        elif not own.is_empty:
            plan.arriving.append(m)
            arriving.append(Parcel(m.owner, own.shape, wire_dtypes[m.name]))
    return plan if num_ranks == 1 else replace(plan, exchange=Exchange(sent, arriving, num_ranks))


def _parts_of_concern(m: Matrix, rank: int) -> list[tuple[Part, list[int]]]:
    if m.owner == rank:
        return m.layout.parts()
    part = m.layout.part(rank)
    return [] if part.is_empty else [(part, m.layout.holders(rank))]


def _travels_to_its_owner(m: Matrix, present: Set[int] | None) -> bool:
    return not m.is_replicated or (present is not None and m.owner not in present)
