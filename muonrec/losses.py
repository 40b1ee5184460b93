"""Losses over next items: full softmax, sampled softmax with logQ correction, binary cross-entropy, and over tokens."""

# T = targets of this rank's share, C = candidates, M = negatives of one target, D = width

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

if TYPE_CHECKING:
    from muonrec.batch import SequenceBatch

NextItem = Literal["full_softmax", "sampled_softmax", "in_batch_softmax", "bce"]
Loss = Literal[NextItem, "token_softmax"]
NEXT_ITEM_LOSSES: tuple[NextItem, ...] = get_args(NextItem)


class NextItemLoss(nn.Module):
    """Mean loss in nats over the targets of the *global* batch, so that any number of ranks follows one gradient.

    The value returned is this rank's sum times ``num_ranks / targets of all ranks``: the mean over ranks that DDP,
    FSDP2 and TorchRec's tables take of the gradients is then the gradient of the global mean. Of a micro-batch it is
    its part of that mean (`SequenceBatch.num_step_targets`): the parts of a step add up, and so do their gradients.

    Args:
        kind: ``full_softmax``: cross-entropy over all items. ``sampled_softmax``: over the target and shared negatives,
            every logit corrected by the log of its sampling probability (Bengio & Senecal 2008; a constant, hence
            nothing, for uniform ones). ``in_batch_softmax``: the negatives are the other targets of the rank's share,
            corrected by their frequency (Yi et al. 2019). ``bce``: binary, each target against its own negatives
            (Kang & McAuley 2018), summed over them.
            A negative equal to the target counts for nothing in all of them.
        temperature: logits are divided by it.
    """

    def __init__(self, kind: NextItem, *, temperature: float = 1.0) -> None:
        super().__init__()
        self.kind = kind
        self.temperature = temperature

    def forward(
        self, hidden_TD: torch.Tensor, targets_TD: torch.Tensor, candidates_CD: torch.Tensor, batch: SequenceBatch
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """The loss to differentiate, and ``{"loss_nats", "num_targets"}`` of all ranks. Every rank must call it.

        Args:
            hidden_TD: hidden states, one per target.
            targets_TD: rows of the targets; unused by the full softmax.
            candidates_CD: rows of the candidates (``bce``: M for each target, ``[T * M, D]``).
            batch: the labels, the candidates' ids and the sampling probabilities.

        Raises:
            FloatingPointError: a rank's loss is not finite; on every rank, before any gradient exists.
        """
        hidden_TD = hidden_TD / self.temperature
        candidate_ids = batch.features["candidates"].values()
        if self.kind == "full_softmax":
            nats_T = full_softmax(hidden_TD, candidates_CD, batch.labels)
        elif self.kind == "sampled_softmax":
            nats_T = sampled_softmax(hidden_TD, targets_TD, candidates_CD, batch.labels, candidate_ids, batch.log_q)
        elif self.kind == "in_batch_softmax":
            log_q = batch.log_q.repeat(2)
            nats_T = sampled_softmax(hidden_TD, targets_TD, targets_TD, batch.labels, batch.labels, log_q)
        else:
            nats_T = binary_cross_entropy(hidden_TD, targets_TD, candidates_CD, batch.labels, candidate_ids)
        return global_mean(nats_T, batch)


class TokenLoss(nn.Module):
    """Mean nats over the targets of the global batch (`NextItemLoss`), each item written as one code per level.

    The nats of an item are those of its codes, summed: minus the log of its probability among all that can be written.
    """

    def forward(self, logits: list[torch.Tensor], batch: SequenceBatch) -> tuple[torch.Tensor, dict[str, float]]:
        """As `NextItemLoss`.

        Args:
            logits: of each level, ``[T, codes of the level]``.
            batch: its feature ``targets`` holds the tokens of each target, codes offset by the levels before.
        """
        tokens_TL = batch.features["targets"].values().view(-1, len(logits))
        return global_mean(token_softmax(logits, tokens_TL), batch)


def token_softmax(logits: list[torch.Tensor], tokens_TL: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats ``[T]``, summed over the levels; a token is its code offset by the levels before."""
    nats, first = [], 0
    for level, logits_TC in enumerate(logits):
        nats.append(F.cross_entropy(_wide(logits_TC), tokens_TL[:, level] - first, reduction="none"))
        first += logits_TC.size(1)
    return torch.stack(nats).sum(0)


def full_softmax(hidden_TD: torch.Tensor, items_CD: torch.Tensor, labels_T: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats ``[T]`` of the label among all items."""
    return F.cross_entropy(_wide(hidden_TD @ items_CD.T), labels_T, reduction="none")


def sampled_softmax(
    hidden_TD: torch.Tensor,
    targets_TD: torch.Tensor,
    candidates_CD: torch.Tensor,
    labels_T: torch.Tensor,
    candidate_ids_C: torch.Tensor,
    log_q: torch.Tensor,
) -> torch.Tensor:
    """Cross-entropy in nats ``[T]`` of the target among itself and the candidates.

    Args:
        hidden_TD: hidden states.
        targets_TD: row of each target.
        candidates_CD: rows that all targets compete with.
        labels_T: id of each target.
        candidate_ids_C: ids of the candidates; one equal to the target is left out.
        log_q: log sampling probability of targets, then candidates, ``[T + C]``; empty when uniform.
    """
    target_T = _wide((hidden_TD * targets_TD).sum(-1))
    candidate_TC = _wide(hidden_TD @ candidates_CD.T)
    if log_q.numel():
        log_q_T, log_q_C = log_q.split([target_T.numel(), candidate_ids_C.numel()])
        target_T = target_T - log_q_T
        candidate_TC = candidate_TC - log_q_C
    candidate_TC = candidate_TC.masked_fill(candidate_ids_C == labels_T[:, None], -torch.inf)
    return torch.logsumexp(torch.cat([target_T[:, None], candidate_TC], dim=1), dim=1) - target_T


def binary_cross_entropy(
    hidden_TD: torch.Tensor,
    targets_TD: torch.Tensor,
    negatives_CD: torch.Tensor,
    labels_T: torch.Tensor,
    negative_ids_C: torch.Tensor,
) -> torch.Tensor:
    """Binary cross-entropy in nats ``[T]``: the target as 1, each of its M negatives (``C = T * M``) as 0."""
    num_targets, width = targets_TD.shape
    target_T = _wide((hidden_TD * targets_TD).sum(-1))
    negatives_TMD = negatives_CD.reshape(num_targets, -1, width) if num_targets else negatives_CD.reshape(0, 0, width)
    negative_TM = _wide(torch.einsum("td,tmd->tm", hidden_TD, negatives_TMD))
    is_negative_TM = negative_ids_C.reshape(negative_TM.shape) != labels_T[:, None]
    return F.softplus(-target_T) + (F.softplus(negative_TM) * is_negative_TM).sum(1)


def _wide(logits: torch.Tensor) -> torch.Tensor:
    """At least float32: autocast on a CPU would take the exponentials in bfloat16."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def global_mean(nats_T: torch.Tensor, batch: SequenceBatch) -> tuple[torch.Tensor, dict[str, float]]:
    """The mean that `NextItemLoss` speaks of, of nats ``[T]``, and its statistics. Every rank must call it."""
    local_sum = nats_T.sum()
    first_user = batch.user_ids[:1].double().sum()
    num_targets = nats_T.numel()
    step_targets = num_targets if batch.num_step_targets is None else batch.num_step_targets
    mine = torch.stack([local_sum.detach().double(), *first_user.new_tensor([num_targets, step_targets]), first_user])
    num_ranks = dist.get_world_size() if dist.is_initialized() else 1
    everyone = mine[None]
    if num_ranks > 1:
        everyone = mine.new_empty(num_ranks, 4)
        dist.all_gather_into_tensor(everyone, mine[None])
    # After backward the fused tables have already swallowed a bad gradient, so this is the last place to stop.
    shares = everyone.tolist()
    for rank, (loss, num_targets, _, user) in enumerate(shares):
        if loss != loss or abs(loss) == float("inf"):
            raise FloatingPointError(
                f"the loss of step {batch.step} is {loss} on rank {rank}, whose share of the batch has "
                f"{int(num_targets)} targets and starts with user {int(user)}; it updated nothing. Lower "
                "the learning rates, or look at that batch; the last checkpoint is intact"
            )
    losses, counts, step_counts, _ = (sum(column) for column in zip(*shares))
    total = max(step_counts, 1.0)
    return local_sum * (num_ranks / total), {"loss_nats": losses / total, "num_targets": counts}
