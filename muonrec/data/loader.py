"""Batches: global batch t as a function of seed and t alone, dealt out to any number of ranks."""

# B = users of the rank's share, T = events of its histories, S = virtual streams

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from muonrec.batch import CANDIDATES, HISTORY, TARGETS, SequenceBatch
from muonrec.data.candidates import CandidateSampler
from muonrec.data.shards import Sequences
from muonrec.mesh import Ranks

Part = Literal["valid", "test"]
Samples = Literal["users", "prefixes"]


class TrainingBatches:
    """The rank's shares of global batches ``start_step`` .. ``num_steps``, in order.

    A sample is a user with all of its training events, or with ``prefixes`` one of them and those before it: the first
    predict every event, the second the last alone. Samples of users with at least two training events are dealt to
    ``num_streams`` virtual streams (their row modulo the number of streams); each stream is shuffled anew every epoch;
    global batch t takes the next ``batch_size / num_streams`` of every stream; stream s is served by rank
    ``s % num_ranks``. So a batch depends on the seed and on t, never on the number of ranks or on where an earlier run
    stopped. The last batch of an epoch holds what is left.

    Args:
        sequences: the data set.
        batch_size: samples of a *global* batch, a multiple of ``num_streams``.
        max_length: events of a history that are kept, the latest ones.
        sampler: draws the candidates.
        needs_targets: whether the loss looks up the rows of the targets.
        seed: of the order.
        ranks: this rank among the others.
        num_streams: virtual streams, at least the number of ranks.
        samples: ``users`` or ``prefixes``.
        finish: what is done last to every batch, in the background thread.

    Raises:
        ValueError: sizes that do not fit together, or no user with two training events.
    """

    def __init__(
        self,
        sequences: Sequences,
        *,
        batch_size: int,
        max_length: int,
        sampler: CandidateSampler,
        needs_targets: bool,
        seed: int,
        ranks: Ranks,
        num_streams: int = 32,
        samples: Samples = "users",
        finish: Callable[[SequenceBatch], SequenceBatch] | None = None,
    ) -> None:
        if batch_size % num_streams:
            raise ValueError(
                f"batch_size {batch_size} is not a multiple of num_streams {num_streams}; "
                f"take batch_size {batch_size // num_streams * num_streams or num_streams} or another num_streams"
            )
        if ranks.num_ranks > num_streams:
            raise ValueError(f"{ranks.num_ranks} ranks cannot share {num_streams} streams; raise num_streams")
        self._sequences = sequences
        self._max_length = max_length
        self._sampler = sampler
        self._needs_targets = needs_targets
        self._seed = seed
        self._samples = samples
        self._finish = finish
        self._samples_per_stream = batch_size // num_streams
        self._num_streams = num_streams
        self._my_streams = range(ranks.rank, num_streams, ranks.num_ranks)

        trainable = np.flatnonzero(sequences.num_train >= 2)
        if trainable.size == 0:
            raise ValueError(
                "no user has two training events, so there is nothing to learn; check the data set's split"
            )
        # A sample is the index in ``values`` of its last target.
        last = sequences.offsets[trainable] + sequences.num_train[trainable] - 1
        if samples == "prefixes":
            last = _ranges(sequences.offsets[trainable] + 1, sequences.num_train[trainable].astype(np.int64) - 1)
        self._streams = [last[stream::num_streams] for stream in range(num_streams)]
        self.steps_per_epoch = -(-self._streams[0].size // self._samples_per_stream)
        self._order: dict[int, np.ndarray] = {}
        self._order_epoch = -1

    def iterate(self, start_step: int, num_steps: int, *, prefetch: int = 4) -> Iterator[SequenceBatch]:
        """Yield the batches of steps ``start_step`` to ``num_steps``, assembled by a background thread."""
        return prefetched(lambda: (self.share(step) for step in range(start_step, num_steps)), depth=prefetch)

    def samples(self, step: int) -> np.ndarray:
        """Samples of this rank's share of global batch ``step``, int64, in the order of the streams.

        Each by the place in `Sequences.values` of its last event, which names its user as well.
        """
        return np.concatenate(self._samples_by_stream(step))

    def share(self, step: int) -> SequenceBatch:
        """This rank's share of global batch ``step``."""
        slices = self._samples_by_stream(step)
        last = np.concatenate(slices)
        streams = np.repeat(np.fromiter(self._my_streams, np.int64), [len(part) for part in slices])

        # The last event is only ever a target, so a sample brings one event less than it has.
        users = np.searchsorted(self._sequences.offsets, last, side="right") - 1
        lengths = np.minimum(last - self._sequences.offsets[users], self._max_length)
        by_length = np.argsort(-lengths, kind="stable")
        num_targets = lengths if self._samples == "users" else np.ones_like(lengths)
        candidates = self._candidates(step, streams, num_targets, by_length)
        last, users, lengths = last[by_length], users[by_length], lengths[by_length]
        at = _ranges(last - lengths, lengths)
        labels = self._sequences.values[at + 1 if self._samples == "users" else last].astype(np.int64)

        batch = make_batch(
            history=self._sequences.values[at].astype(np.int64),
            lengths=lengths,
            labels=labels,
            targets=labels if self._needs_targets else labels[:0],
            candidates=candidates,
            log_q=np.concatenate([self._sampler.log_q(labels), self._sampler.log_q(candidates)]),
            user_ids=self._sequences.user_ids[users],
            num_items=self._sequences.num_items,
            step=step,
            num_targets=num_targets[by_length],
            timestamps_s=timestamps_at(self._sequences, at),
        )
        return batch if self._finish is None else self._finish(batch)

    def _samples_by_stream(self, step: int) -> list[np.ndarray]:
        epoch, index = divmod(step, self.steps_per_epoch)
        self._shuffle(epoch)
        first = index * self._samples_per_stream
        return [self._order[stream][first : first + self._samples_per_stream] for stream in self._my_streams]

    def _candidates(self, step: int, streams: np.ndarray, counts: np.ndarray, by_length: np.ndarray) -> np.ndarray:
        if self._sampler.kind != "per_target":
            return self._sampler.shared(step)
        # Drawn in the order of the streams, then brought into the order of the batch's rows.
        negatives = [self._sampler.per_target(step, s, int(counts[streams == s].sum())) for s in self._my_streams]
        starts = np.cumsum(counts) - counts
        return np.concatenate(negatives)[_ranges(starts[by_length], counts[by_length])].reshape(-1)

    def _shuffle(self, epoch: int) -> None:
        if epoch == self._order_epoch:
            return
        for stream in self._my_streams:
            key = np.random.SeedSequence([self._seed, 0x0DE2, epoch, stream])
            generator = np.random.Generator(np.random.Philox(key))
            self._order[stream] = generator.permutation(self._streams[stream])
        self._order_epoch = epoch


def evaluation_batches(
    sequences: Sequences,
    part: Part,
    *,
    max_length: int,
    batch_size: int,
    ranks: Ranks,
    max_users: int | None = None,
) -> Iterator[SequenceBatch]:
    """Yield this rank's evaluation batches: every target's history, and the held-out item as the label.

    Batch j of a fixed division of the targets goes to rank ``j % num_ranks``; ranks that run out yield empty batches,
    so every rank yields the same number and what is computed does not depend on the number of ranks.

    Args:
        sequences: the data set.
        part: ``valid`` or ``test``; a history is all that the user did before, whatever the part.
        max_length: events of a history that are kept, the latest ones.
        batch_size: targets of one batch, on one rank.
        ranks: this rank among the others.
        max_users: evaluate an evenly spaced subset of this many targets, one per user in most splits; None for all.

    Yields:
        SequenceBatch: ``labels`` ``[B]``; no targets and no candidates; ``user_ids`` are `Sequences.target_ids`, the
        users' own unless the split gives a user several targets.
    """
    ids = evaluation_targets(sequences, part, max_targets=max_users)
    rows, places = sequences.locate(ids, part)  # a target stands where its history ends
    num_batches = -(-ids.size // batch_size)
    num_rounds = -(-num_batches // ranks.num_ranks)
    # Histories of like length travel together: less padding, and the division is still fixed.
    order = np.argsort(-np.minimum(places, max_length), kind="stable")
    for round_ in range(num_rounds):
        first = (round_ * ranks.num_ranks + ranks.rank) * batch_size
        mine = order[first : first + batch_size]
        ends = sequences.offsets[rows[mine]] + places[mine]
        lengths = np.minimum(places[mine], max_length)
        at = _ranges(ends - lengths, lengths)
        none = np.empty(0, dtype=np.int64)
        yield make_batch(
            history=sequences.values[at].astype(np.int64),
            lengths=lengths,
            labels=sequences.values[ends].astype(np.int64),
            targets=none,
            candidates=none,
            log_q=np.empty(0, dtype=np.float32),
            user_ids=ids[mine],
            num_items=sequences.num_items,
            step=round_,
            timestamps_s=timestamps_at(sequences, at),
        )


def evaluation_targets(sequences: Sequences, part: Part, *, max_targets: int | None = None) -> np.ndarray:
    """`Sequences.target_ids`, or an evenly spaced subset of ``max_targets``.

    Raises:
        ValueError: there are none.
    """
    ids = sequences.target_ids(part)
    if ids.size == 0:
        raise ValueError(f"no user has a history and a {part} event; check the data set's split")
    if max_targets is not None and ids.size > max_targets:
        ids = ids[np.linspace(0, ids.size - 1, max_targets).round().astype(np.int64)]
    return ids


def seen_items(sequences: Sequences, target_ids: np.ndarray, part: Part) -> tuple[np.ndarray, np.ndarray]:
    """The whole history of each target of ``part``: ids int64 ``[sum of lengths]`` and lengths int64 ``[B]``."""
    rows, lengths = sequences.locate(target_ids, part)
    return sequences.values[_ranges(sequences.offsets[rows], lengths)].astype(np.int64), lengths


def make_batch(
    *,
    history: np.ndarray,
    lengths: np.ndarray,
    labels: np.ndarray,
    targets: np.ndarray,
    candidates: np.ndarray,
    log_q: np.ndarray,
    user_ids: np.ndarray,
    num_items: int,
    step: int,
    num_targets: np.ndarray | None = None,
    timestamps_s: np.ndarray | None = None,
) -> SequenceBatch:
    """Assemble one SequenceBatch from arrays, rows in order of falling length.

    Users bring a target for each event of the history, or ``num_targets``; any rows of them that the loss looks up are
    ``targets``.

    Raises:
        ValueError: an id is outside the item table; names table, feature and id.
    """
    # TorchRec cannot redistribute a batch of no users, so a rank without any brings one without a history.
    stride = max(len(lengths), 1)
    lengths_of = np.zeros((3, stride), dtype=np.int64)
    lengths_of[0, : len(lengths)] = lengths
    if targets.size:
        lengths_of[1, : len(lengths)] = lengths if num_targets is None else num_targets
    lengths_of[2, 0] = candidates.size
    for feature, ids in ((HISTORY, history), (TARGETS, labels), (CANDIDATES, candidates)):
        check_ids(ids, table="item", feature=feature, num_embeddings=num_items)
    features = KeyedJaggedTensor(
        keys=[HISTORY, TARGETS, CANDIDATES],
        values=torch.from_numpy(np.concatenate([history, targets, candidates])),
        lengths=torch.from_numpy(lengths_of.reshape(-1)),
        stride=stride,
    )
    return SequenceBatch(
        features=features,
        labels=torch.from_numpy(labels),
        log_q=torch.from_numpy(log_q),
        user_ids=torch.from_numpy(np.asarray(user_ids, dtype=np.int64)),
        groups=length_groups(lengths),
        step=step,
        timestamps_s=torch.from_numpy(np.empty(0, np.int64) if timestamps_s is None else timestamps_s),
    )


def timestamps_at(sequences: Sequences, places: np.ndarray) -> np.ndarray | None:
    """Times of the events at ``places`` of `Sequences.values`, int64 seconds; None unless the times were loaded."""
    return None if sequences.timestamps_s is None else sequences.timestamps_s[places]


def check_ids(ids: np.ndarray, *, table: str, feature: str, num_embeddings: int) -> None:
    """Refuse ids outside ``[0, num_embeddings)``: FBGEMM would warn and read row 0, or read past the end."""
    if ids.size == 0:
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= num_embeddings:
        raise ValueError(
            f"feature {feature!r} holds id {low if low < 0 else high}, but table {table!r} has rows 0 to "
            f"{num_embeddings - 1}; rerun python -m pipeline.data, or build the model for this data set"
        )


def length_groups(lengths: np.ndarray) -> list[tuple[int, int, int]]:
    """Cut rows of falling length where the length halves: ``(users, events, longest)`` of each group.

    Attention pads a user to the longest of its group, so it computes on less than twice the events there are.
    """
    groups = []
    first = 0
    while first < len(lengths):
        longest = max(int(lengths[first]), 1)
        # lengths fall, so the first row at or below the bound ends the group; short ones are not worth cutting
        bound = longest // 2 if longest > 8 else 0
        last = first + int(np.searchsorted(-lengths[first:], -bound, side="left"))
        if bound == 0:
            last = len(lengths)
        groups.append((last - first, int(lengths[first:last].sum()), longest))
        first = last
    return groups


def prefetched(make: Callable[[], Iterator[SequenceBatch]], *, depth: int) -> Iterator[SequenceBatch]:
    """Run an iterator in a background thread, ``depth`` items ahead; its exception is raised at the consumer's side."""
    items: queue.Queue = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(item: object) -> bool:
        while not stop.is_set():
            try:
                items.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def produce() -> None:
        try:
            for item in make():
                if not put((item, None)):
                    return
            put((None, StopIteration()))
        except BaseException as error:  # handed to the consumer, where it is raised
            put((None, error))

    thread = threading.Thread(target=produce, name="muonrec-loader", daemon=True)
    thread.start()
    try:
        while True:
            item, error = items.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        stop.set()
        thread.join()


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The concatenation of ``range(start, start + length)``, int64."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(total)
