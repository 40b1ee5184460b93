"""Seeded interaction logs of any size from a known law, so that the best possible metrics are known too.

A user has a latent taste, one of ``num_clusters`` clusters of items, which drifts as a Markov chain. Each event is,
with stated probabilities, a *transition* (a successor of the last one or two items, given by a seeded hash), a *taste*
event (an item of the current cluster) or a *popular* one (any item); inside a cluster and overall, items follow a
long-tailed law. Since the taste is the only thing unseen, ``P(next item | history)`` follows exactly from the forward
algorithm of hidden Markov models (Baum et al., 1970).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pydantic

from muonrec.config import Config
from muonrec.data.events import EVENT_SCHEMA
from muonrec.data.manifest import BestPossible

# A chunk's users depend on the seed and the number of the chunk alone; changing this changes every data set.
CHUNK_USERS = 8192

_SCORES_BYTES = 2**27
_TOP_K = 10


class SyntheticSource(Config):
    """Parameters of the generator. Its metrics say how well a model learns this law, nothing about people.

    Attributes:
        seed: of the law and of the users.
        num_users, num_items: of the log; some items may have no event.
        num_clusters: groups of items; a user's taste is for one at a time.
        events_per_user, min_events_per_user: mean and least; lengths are the least plus a geometric number, cut at ten
            times the mean.
        transition_probability, taste_probability: shares of the two kinds of events; the rest is popular items. The
            first event has no item before it: its transition share goes to the other two in proportion.
        transition_order: 1 or 2 items that a transition depends on. With 2 there are num_items^2 contexts to learn.
        num_successors: candidates of one transition.
        successor_decay: the next successor is this much less likely than the one before.
        taste_persistence: probability to keep the cluster from one event to the next; else any cluster, uniformly.
        popularity_exponent, popularity_shift: an item's weight is ``(rank + shift) ** -exponent`` (Zipf-Mandelbrot).
        start_s, window_days, gap_hours: users begin uniformly within the window; mean gap between their events.
    """

    format: Literal["synthetic"]
    seed: int = pydantic.Field(default=0, ge=0)
    num_users: int = pydantic.Field(default=3000, ge=1)
    num_items: int = pydantic.Field(default=1000, ge=2)
    num_clusters: int = pydantic.Field(default=20, ge=1)
    events_per_user: float = pydantic.Field(default=20.0, ge=3)
    min_events_per_user: int = pydantic.Field(default=5, ge=3)
    transition_probability: float = pydantic.Field(default=0.4, ge=0, lt=1)
    taste_probability: float = pydantic.Field(default=0.5, ge=0, le=1)
    transition_order: Literal[1, 2] = 1
    num_successors: int = pydantic.Field(default=4, ge=1)
    successor_decay: Annotated[float, pydantic.Field(gt=0, le=1)] = 0.5
    taste_persistence: float = pydantic.Field(default=0.95, ge=0, le=1)
    popularity_exponent: float = pydantic.Field(default=0.8, ge=0)
    popularity_shift: float = pydantic.Field(default=20.0, ge=0)
    start_s: int = pydantic.Field(default=1_600_000_000, ge=0)
    window_days: float = pydantic.Field(default=365.0, gt=0)
    gap_hours: float = pydantic.Field(default=24.0, gt=0)

    @pydantic.model_validator(mode="after")
    def _check(self) -> SyntheticSource:
        if self.transition_probability + self.taste_probability > 1:
            raise ValueError(
                f"transition_probability {self.transition_probability:g} + taste_probability "
                f"{self.taste_probability:g} exceed 1; the rest is the share of popular items"
            )
        if self.num_clusters > self.num_items:
            raise ValueError(
                f"num_clusters {self.num_clusters} exceeds num_items {self.num_items}; every cluster needs an item"
            )
        if self.events_per_user < self.min_events_per_user:
            raise ValueError(
                f"events_per_user {self.events_per_user:g} is below min_events_per_user "
                f"{self.min_events_per_user}; raise it"
            )
        return self

    @property
    def num_events_expected(self) -> int:
        """About how many events will come."""
        return round(self.num_users * self.events_per_user)


def read_synthetic(source: SyntheticSource) -> pa.RecordBatchReader:
    """Stream the events, a chunk of users at a time, a user's events in order of time."""

    def batches() -> Iterator[pa.RecordBatch]:
        generator = SyntheticLog(source)
        num_rows = 0
        for chunk in range(generator.num_chunks):
            items_UT, times_UT, lengths_U = generator.chunk(chunk)
            present_UT = np.arange(items_UT.shape[1]) < lengths_U[:, None]
            user_rows = np.repeat(np.arange(len(lengths_U)) + chunk * CHUNK_USERS, lengths_U)
            source_row = np.arange(num_rows, num_rows + len(user_rows))
            num_rows += len(user_rows)
            columns = [
                _names("u", user_rows, source.num_users),
                _names("i", generator.public_item[items_UT[present_UT]], source.num_items),
                pa.array(times_UT[present_UT]),
                pa.array(source_row),
            ]
            yield pa.RecordBatch.from_arrays(columns, schema=EVENT_SCHEMA)

    return pa.RecordBatchReader.from_batches(EVENT_SCHEMA, batches())


def best_possible(source: SyntheticSource, *, max_users: int = 5000) -> BestPossible:
    """NDCG@10 and recall@10 of ranking all items by the true probability of each user's last event.

    Items with equal probability are ranked at random; the metric is its expectation. Items met before stay
    in the ranking.

    Args:
        source: the law.
        max_users: the first so many users are evaluated.
    """
    generator = SyntheticLog(source)
    gains_K = 1 / np.log2(np.arange(_TOP_K) + 2)
    ndcg, hits, num_users = 0.0, 0.0, 0
    for chunk in range(generator.num_chunks):
        items_UT, _, lengths_U = generator.chunk(chunk)
        for start in range(
            0, min(len(lengths_U), max_users - num_users), rows := max(1, _SCORES_BYTES // 8 // source.num_items)
        ):
            users = slice(start, min(start + rows, max_users - num_users + start))
            histories_U = lengths_U[users] - 1
            scores_UM = generator.predict(items_UT[users], histories_U)
            target_U = items_UT[users][np.arange(len(histories_U)), histories_U]
            gain_U, hit_U = _expected_metrics(scores_UM, target_U, gains_K)
            ndcg, hits, num_users = ndcg + gain_U.sum(), hits + hit_U.sum(), num_users + len(histories_U)
        if num_users >= max_users:
            break
    return BestPossible(ndcg_at_10=ndcg / num_users, recall_at_10=hits / num_users, num_users=num_users)


class SyntheticLog:
    """The law, and what follows from it: sampled users and the exact prediction of their next item.

    Items are numbered by popularity here, 0 first; `public_item` maps them to the numbers that a log shows, so that
    no order of ids gives the popularity away.
    """

    # Legend: U = users of a chunk, T = places in a sequence, M = items, C = clusters, S = successors

    def __init__(self, source: SyntheticSource) -> None:
        self.source = source
        generator = np.random.default_rng([source.seed, 0])
        self.public_item = generator.permutation(source.num_items)
        popularity_M = (np.arange(source.num_items) + 1 + source.popularity_shift) ** -source.popularity_exponent
        self.popularity_M = popularity_M / popularity_M.sum()
        # Every cluster gets an item of each stratum of popularity: clusters of like size and weight.
        strata = np.arange(source.num_items) // source.num_clusters
        self.cluster_M = np.lexsort((generator.random(source.num_items), strata)).argsort() % source.num_clusters
        self._by_cluster_M = np.argsort(self.cluster_M, kind="stable")
        self._cluster_mass_C = np.bincount(self.cluster_M, self.popularity_M, minlength=source.num_clusters)
        self._taste_cdf_M = np.cumsum(self.popularity_M[self._by_cluster_M])
        self._popularity_cdf_M = np.cumsum(self.popularity_M)
        weights_S = source.successor_decay ** np.arange(source.num_successors)
        self.successor_weights_S = weights_S / weights_S.sum()
        # P(item | taste event in the item's own cluster)
        self.taste_M = self.popularity_M / self._cluster_mass_C[self.cluster_M]

    @property
    def num_chunks(self) -> int:
        """How many chunks the users make."""
        return -(-self.source.num_users // CHUNK_USERS)

    def shares(self, *, first: bool) -> tuple[float, float, float]:
        """Probabilities of transition, taste and popular event; without a history there is no transition."""
        transition, taste = self.source.transition_probability, self.source.taste_probability
        if first:
            return 0.0, taste / (1 - transition), (1 - transition - taste) / (1 - transition)
        return transition, taste, 1 - transition - taste

    def chunk(self, chunk: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sample the users of one chunk.

        Returns:
            items int64 ``[U, T]`` by popularity, times int64 ``[U, T]`` strictly ascending, lengths int64 ``[U]``;
            places from a user's length on are undefined.
        """
        source = self.source
        generator = np.random.default_rng([source.seed, 1, chunk])
        num_users = min(CHUNK_USERS, source.num_users - chunk * CHUNK_USERS)
        extra = source.events_per_user - source.min_events_per_user
        lengths_U = source.min_events_per_user + generator.geometric(1 / (1 + extra), num_users) - 1
        lengths_U = np.minimum(lengths_U, max(source.min_events_per_user, int(10 * source.events_per_user)))

        items_UT = np.zeros((num_users, lengths_U.max()), dtype=np.int64)
        taste_U = generator.integers(source.num_clusters, size=num_users)
        for place in range(items_UT.shape[1]):
            # Users that ended draw no numbers: the longest of a chunk may be ten times the mean.
            users = np.flatnonzero(lengths_U > place)
            if place:
                drifts = generator.random(len(users)) >= source.taste_persistence
                taste_U[users[drifts]] = generator.integers(source.num_clusters, size=drifts.sum())
            items_UT[users, place] = self._sample_items(generator, items_UT[users, :place], taste_U[users])

        start_U1 = source.start_s + generator.integers(max(1, int(source.window_days * 86400)), size=(num_users, 1))
        gaps_UT = 1 + np.asarray(generator.exponential(source.gap_hours * 3600, items_UT.shape)).astype(np.int64)
        return items_UT, start_U1 + np.cumsum(gaps_UT, axis=1), lengths_U

    def successors(self, last_U: np.ndarray, before_last_U: np.ndarray) -> np.ndarray:
        """The candidates of a transition, most likely first: int64 ``[U, S]``, possibly with repetitions.

        Args:
            last_U: the last item.
            before_last_U: the item before it, -1 where there is none; without effect at order 1.
        """
        state_U = _mix(last_U.astype(np.uint64) + _mix(np.uint64(self.source.seed)))
        if self.source.transition_order == 2:
            state_U = _mix(state_U ^ _mix((before_last_U + 2).astype(np.uint64)))
        state_US = _mix(state_U[:, None] + np.arange(self.source.num_successors, dtype=np.uint64))
        # 53 bits: what a float64 holds.
        return self._item_at((state_US >> np.uint64(11)) * 2.0**-53)

    def predict(self, items_UT: np.ndarray, lengths_U: np.ndarray) -> np.ndarray:
        """``P(item at place lengths_U | the items before it)``, float64 ``[U, M]``; each row sums to 1.

        Args:
            items_UT: items by popularity.
            lengths_U: events of the history, at least 1.
        """
        source = self.source
        users = np.arange(len(lengths_U))
        # belief_UC = P(taste of the next event | history so far); the chain starts and jumps uniformly.
        belief_UC = np.full((len(users), source.num_clusters), 1 / source.num_clusters)
        for place in range(lengths_U.max()):
            item_U = items_UT[:, place]
            transition, taste, popular = self.shares(first=place == 0)
            likelihood_UC = np.repeat(popular * self.popularity_M[item_U][:, None], source.num_clusters, axis=1)
            likelihood_UC[users, self.cluster_M[item_U]] += taste * self.taste_M[item_U]
            if place:
                successors_US = self.successors(*_last_two(items_UT[:, :place]))
                likelihood_UC += transition * ((successors_US == item_U[:, None]) @ self.successor_weights_S)[:, None]
            # Floored: with popular share 0, events past a user's end can be impossible; they are not used below.
            posterior_UC = belief_UC * likelihood_UC
            posterior_UC /= np.maximum(posterior_UC.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)
            moved_UC = source.taste_persistence * posterior_UC + (1 - source.taste_persistence) / source.num_clusters
            belief_UC = np.where((place < lengths_U)[:, None], moved_UC, belief_UC)

        transition, taste, popular = self.shares(first=False)
        scores_UM = belief_UC[:, self.cluster_M] * (taste * self.taste_M) + popular * self.popularity_M
        last_U = items_UT[users, lengths_U - 1]
        before_last_U = np.where(lengths_U > 1, items_UT[users, lengths_U - 2], -1)
        np.add.at(
            scores_UM, (users[:, None], self.successors(last_U, before_last_U)), transition * self.successor_weights_S
        )
        return scores_UM

    def _sample_items(self, generator: np.random.Generator, history_UT: np.ndarray, taste_U: np.ndarray) -> np.ndarray:
        first = history_UT.shape[1] == 0
        transition, taste, _ = self.shares(first=first)
        kind_U, place_U = generator.random((2, len(taste_U)))
        mass_U = self._cluster_mass_C[taste_U]
        end_U = np.cumsum(self._cluster_mass_C)[taste_U]
        # One uniform number per user stands for the place in whichever law applies.
        item_U = self._item_at(place_U)
        from_taste_U = kind_U < transition + taste
        slot_U = np.searchsorted(self._taste_cdf_M, end_U - mass_U * (1 - place_U), side="right")
        first_C = np.searchsorted(self.cluster_M[self._by_cluster_M], np.arange(self.source.num_clusters + 1))
        slot_U = np.clip(slot_U, first_C[taste_U], first_C[taste_U + 1] - 1)
        item_U = np.where(from_taste_U, self._by_cluster_M[slot_U], item_U)
        if not first:
            rank_U = np.searchsorted(np.cumsum(self.successor_weights_S), place_U, side="right")
            rank_U = np.minimum(rank_U, self.source.num_successors - 1)
            successor_U = self.successors(*_last_two(history_UT))[np.arange(len(rank_U)), rank_U]
            item_U = np.where(kind_U < transition, successor_U, item_U)
        return item_U

    def _item_at(self, quantile: np.ndarray) -> np.ndarray:
        return np.minimum(np.searchsorted(self._popularity_cdf_M, quantile, side="right"), self.source.num_items - 1)


def _last_two(history_UT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    before_last = history_UT[:, -2] if history_UT.shape[1] > 1 else np.full(len(history_UT), -1)
    return history_UT[:, -1], before_last


def _mix(state: np.ndarray | np.uint64) -> np.ndarray:
    """One step of splitmix64 (Steele, Lea, Flood 2014)."""
    with np.errstate(over="ignore"):
        state = state + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(state ^ (state >> np.uint64(31)))


def _expected_metrics(
    scores_UM: np.ndarray, target_U: np.ndarray, gains_K: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """NDCG and recall of one relevant item each, expected over random orders of equal scores."""
    score_U1 = np.take_along_axis(scores_UM, target_U[:, None], axis=1)
    num_above_U = (scores_UM > score_U1).sum(axis=1)
    num_equal_U = (scores_UM == score_U1).sum(axis=1)

    def expected(gains_K: np.ndarray) -> np.ndarray:
        total = np.concatenate([[0.0], np.cumsum(gains_K)])
        first, last = np.minimum(num_above_U, len(gains_K)), np.minimum(num_above_U + num_equal_U, len(gains_K))
        return (total[last] - total[first]) / num_equal_U

    return expected(gains_K), expected(np.ones_like(gains_K))


def _names(prefix: str, numbers: np.ndarray, num_names: int) -> pa.Array:
    """``u000042``: padded, so that the order of the text is the order of the numbers."""
    digits = pc.utf8_lpad(pa.array(numbers).cast(pa.string()), width=len(str(num_names - 1)), padding="0")
    return pc.binary_join_element_wise(prefix, digits, "")
