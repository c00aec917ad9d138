"""Hidden-state shards: an index of segments, and one contiguous record for each; see FORMAT.md.

Dimension letters: T tokens of a sample, N rows of a segment, K those of them
that have a law to learn, L taps, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from isal import isal_zlib
from numpy.typing import NDArray
from torch import Tensor

from draftline.cache.codecs import CODECS, MAX_MAGNITUDE, Codec, RowFormat, channel_scale
from draftline.cache.container import RECORDS, Header, read_header
from draftline.cache.manifest import KIND
from draftline.cache.prefixes import PrefixPlan
from draftline.cache.sample import CachedSample
from draftline.cache.shards import Shard, decode_head, decode_shard, encode_shard
from draftline.errors import FormatError, TargetError


@dataclass(frozen=True)
class SegmentRows:
    """Hidden states of one segment, in the target's own floats.

    Attributes:
        taps_NLD: Of all its rows.
        last_hidden_KD: After the final norm, of the rows that :func:`segment_laws` marks.
        log_normaliser_K: Of the last hidden state as it is stored (see :func:`as_stored`), over the whole vocabulary;
            fp32.
    """

    taps_NLD: Tensor
    last_hidden_KD: Tensor
    log_normaliser_K: Tensor


def as_stored(last_hidden_KD: Tensor, codec_name: str) -> Tensor:
    """What a reader will get for a last hidden state; fp32.

    The normaliser must be that of these numbers. With the normaliser of the
    exact ones, ``exp(logits - normaliser)`` no longer sums to one, and that
    error is several times that of the rounding itself.
    """
    row_format = CODECS[codec_name].last_hidden
    if not len(last_hidden_KD):
        return last_hidden_KD.float()
    stored = row_format.encode(last_hidden_KD[:, None], None)
    return row_format.decode(stored, last_hidden_KD.shape[-1], None).squeeze(1).float()


def law_positions(loss_mask_T: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Where the target's law is stored: at produced tokens and at the token before each run of them.

    Nothing is trained towards what the target thinks inside a prompt.
    """
    positions = loss_mask_T.copy()
    positions[:-1] |= loss_mask_T[1:]
    return positions


def segment_laws(plan: PrefixPlan, loss_masks: Sequence[NDArray[np.bool_]]) -> list[NDArray[np.bool_]]:
    """For each segment, the rows whose law some sample on it needs."""
    laws = [np.zeros(len(segment), dtype=np.bool_) for segment in plan.segments]
    for path, mask in zip(plan.paths, loss_masks, strict=True):
        needed = law_positions(mask)
        for number in path:
            segment = plan.segments[number]
            laws[number] |= needed[segment.start : segment.end]
    return laws


def split_samples(tokens: Shard) -> tuple[list[NDArray[np.int32]], list[NDArray[np.bool_]]]:
    """Token ids and loss masks of every sample."""
    cuts = tokens.tensors["cu_seqlens"][1:-1].tolist()
    ids: list[NDArray[np.int32]] = np.split(tokens.tensors["input_ids"].numpy(), cuts)
    masks: list[NDArray[np.bool_]] = np.split(tokens.tensors["loss_mask"].numpy().astype(np.bool_), cuts)
    return ids, masks


def encode_hidden_states(
    tokens: Shard, plan: PrefixPlan, rows: Sequence[SegmentRows], tap_ids: Sequence[int], codec_name: str
) -> bytes:
    """Shard bytes; a pure function of its arguments, the same for every number of threads.

    Args:
        tokens: The token shard.
        plan: How its samples share rows.
        rows: Of each segment of the plan, in its order.
        tap_ids: Tapped layers, ascending.
        codec_name: Key of :data:`draftline.cache.codecs.CODECS`.

    Raises:
        TargetError: a hidden state is NaN, infinite or beyond what the codecs hold; names the sample.
    """
    for segment, part in zip(plan.segments, rows, strict=True):
        _check_values(part, tokens.ids[segment.sample])
    codec = CODECS[codec_name]
    tap_scale_LD = _tap_scale(codec, rows)
    records = [_encode_record(codec, part, tap_scale_LD) for part in rows]
    _, masks = split_samples(tokens)
    laws = segment_laws(plan, masks)
    lengths = [len(segment) for segment in plan.segments]
    tensors = {
        "input_ids": tokens.tensors["input_ids"],
        "loss_mask": tokens.tensors["loss_mask"],
        "cu_seqlens": tokens.tensors["cu_seqlens"],
        "cu_rows": torch.tensor([0, *lengths]).cumsum(0),
        "has_law": torch.from_numpy(np.concatenate(laws).astype(np.uint8)),
        "path": torch.tensor([number for path in plan.paths for number in path], dtype=torch.int32),
        "cu_paths": torch.tensor([0, *(len(path) for path in plan.paths)]).cumsum(0),
        "record_crc32": torch.tensor([isal_zlib.crc32(record.numpy().data) for record in records]),
        RECORDS: torch.cat(records),
    }
    if tap_scale_LD is not None:
        tensors["tap_scale"] = tap_scale_LD.cpu()
    metadata = {
        "kind": KIND,
        "ids": list(tokens.ids),
        "target": tokens.metadata["target"],
        "tap_ids": list(tap_ids),
        "codec": codec_name,
        "hidden_size": rows[0].taps_NLD.shape[-1],
        "num_rows": sum(lengths),
    }
    data = encode_shard(tensors, metadata)
    header = read_header(data, origin="the new shard")
    assert list(header.tensors)[-1] == RECORDS, "the head must be one range"
    return data


@dataclass(frozen=True)
class _StoredRows:
    """Views of a record's parts, as :class:`SegmentRows` has them, still encoded; and which rows have a law."""

    taps_NLB: NDArray[np.uint8]
    last_hidden_K1B: NDArray[np.uint8]
    log_normaliser_K: NDArray[np.float32]
    has_law_N: NDArray[np.bool_]


class HiddenIndex:
    """The head of a hidden-state shard: which records make a sample, where they lie, and how to decode them.

    Args:
        head: The shard's tensors without the records.
        header: Its header.
        origin: Named in errors.

    Raises:
        FormatError: an unknown codec.
    """

    def __init__(self, head: Shard, header: Header, origin: str) -> None:
        self._head = head
        self._origin = origin
        try:
            self.ids = head.ids
            self.num_taps = len(head.metadata["tap_ids"])
            self.hidden_size = int(head.metadata["hidden_size"])
            name = head.metadata["codec"]
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"the metadata of {origin} lack {error}", remedy="Run its step again") from None
        if name not in CODECS:
            raise FormatError(
                f"{origin} has an unknown codec", got=name, expected=f"one of {sorted(CODECS)}", remedy="Upgrade"
            )
        self._codec = CODECS[name]
        self._checksums: list[int] = head.tensors["record_crc32"].tolist()
        self._rows: NDArray[np.int64] = head.tensors["cu_rows"].numpy()
        self._laws = np.concatenate([[0], np.cumsum(head.tensors["has_law"].numpy(), dtype=np.int64)])[self._rows]
        token_bytes = self._codec.token_bytes(self.num_taps, self.hidden_size)
        law_bytes = self._codec.law_bytes(self.hidden_size)
        self._offsets = header.head_bytes + self._rows * token_bytes + self._laws * law_bytes
        if self._offsets[-1] != header.size_bytes:
            raise FormatError(
                f"{origin} does not fit its own index", got=header.size_bytes, expected=str(int(self._offsets[-1]))
            )

    @classmethod
    def of(cls, data: bytes | memoryview, *, origin: str) -> HiddenIndex:
        """Read the head from a shard or from its first ``head_bytes``.

        Raises:
            FormatError: foreign, damaged, of another kind, version or codec.
        """
        header = read_header(data, origin=origin, kind=KIND)
        if len(data) < header.head_bytes:
            raise FormatError(f"{origin} is truncated", got=f"{len(data)} bytes", expected=f"{header.head_bytes}")
        return cls(decode_head(data, header), header, origin)

    @cached_property
    def is_shared(self) -> NDArray[np.bool_]:
        """For each segment, whether several samples read it."""
        counts = np.bincount(self._head.tensors["path"].numpy(), minlength=len(self._rows) - 1)
        return counts > 1

    def segments(self, sample: int) -> tuple[int, ...]:
        """The segments that make a sample, in order."""
        start, end = self._head.tensors["cu_paths"][sample : sample + 2].tolist()
        return tuple(self._head.tensors["path"][start:end].tolist())

    def record_range(self, segment: int) -> tuple[int, int]:
        """First byte of a record in the file, and its length."""
        start, end = int(self._offsets[segment]), int(self._offsets[segment + 1])
        return start, end - start

    def check_record(self, segment: int, record: bytes | memoryview) -> None:
        """Compare a record with its length and its checksum in the head.

        Raises:
            FormatError: it is damaged or truncated.
        """
        expected, (_, size_bytes) = self._checksums[segment], self.record_range(segment)
        if len(record) != size_bytes or isal_zlib.crc32(record) != expected:
            raise FormatError(
                f"record {segment} of {self._origin} is damaged",
                got=f"{len(record)} bytes, crc32 {isal_zlib.crc32(record):08x}",
                expected=f"{size_bytes} bytes, crc32 {expected:08x}",
                remedy="Delete the shard and its step's result.json, then run again: only this shard is computed anew",
            )

    def check_all(self, whole: bytes | memoryview) -> None:
        """Compare every record of a whole shard; errors as :meth:`check_record`."""
        view = memoryview(whole)
        for segment in range(len(self._checksums)):
            start, size = self.record_range(segment)
            self.check_record(segment, view[start : start + size])

    def sample(self, index: int, records: Mapping[int, bytes | memoryview]) -> CachedSample:
        """Decode a sample.

        Args:
            index: Its place in the shard.
            records: Checked records of at least its segments.
        """
        start, end = self._head.bounds(index)
        mask_T = self._head.tensors["loss_mask"][start:end].bool()
        needed_T = law_positions(mask_T.numpy())
        codec, width = self._codec, self.hidden_size
        taps_TLD = torch.empty(end - start, self.num_taps, width, dtype=codec.taps.decoded_dtype)
        hidden_T1D = _zeros(end - start, width, codec.last_hidden.decoded_dtype)[:, None]
        normaliser_T = np.zeros(end - start, dtype=np.float32)
        place = 0
        for segment in self.segments(index):
            stored = self._stored(segment, records[segment])
            following = place + len(stored.taps_NLB)
            codec.taps.decode_into(stored.taps_NLB, self._head.tensors.get("tap_scale"), taps_TLD[place:following])
            # Another sample on the segment may have needed more laws; what this one gets must not depend on that.
            wanted_N = stored.has_law_N & needed_T[place:following]
            law_N = np.cumsum(stored.has_law_N) - 1
            for first, last in _runs(wanted_N):
                laws, rows = slice(law_N[first], law_N[last - 1] + 1), slice(place + first, place + last)
                codec.last_hidden.decode_into(stored.last_hidden_K1B[laws], None, hidden_T1D[rows])
                normaliser_T[rows] = stored.log_normaliser_K[laws]
            place = following
        assert place == end - start
        ids_T = self._head.tensors["input_ids"][start:end].long()
        return CachedSample(
            self.ids[index], ids_T, mask_T, taps_TLD, hidden_T1D.squeeze(1), torch.from_numpy(normaliser_T)
        )

    def _stored(self, segment: int, record: bytes | memoryview) -> _StoredRows:
        """The parts of a record."""
        first, last = self._rows[segment : segment + 2].tolist()
        num_laws = int(self._laws[segment + 1] - self._laws[segment])
        flat = np.frombuffer(record, dtype=np.uint8)
        taps_end = (last - first) * self._codec.token_bytes(self.num_taps, self.hidden_size)
        hidden_end = taps_end + num_laws * self._codec.last_hidden.row_bytes(self.hidden_size)
        return _StoredRows(
            flat[:taps_end].reshape(last - first, self.num_taps, -1),
            flat[taps_end:hidden_end].reshape(num_laws, 1, self._codec.last_hidden.row_bytes(self.hidden_size)),
            # Copied: a record's bytes need not be aligned.
            flat[hidden_end:].copy().view(np.float32),
            self._head.tensors["has_law"][first:last].numpy().astype(np.bool_),
        )


def decode_samples(data: bytes, *, origin: str) -> list[CachedSample]:
    """All samples of a whole shard.

    Raises:
        FormatError: it cannot be read.
    """
    decode_shard(data, origin=origin)
    index = HiddenIndex.of(data, origin=origin)
    whole = memoryview(data)
    found = []
    for place in range(len(index.ids)):
        ranges = {segment: index.record_range(segment) for segment in index.segments(place)}
        found.append(index.sample(place, {s: whole[start : start + size] for s, (start, size) in ranges.items()}))
    return found


def _zeros(num_rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """By numpy: torch would have a team of threads fill it, and a reader's threads would wait for one another."""
    return torch.from_numpy(np.zeros((num_rows, width * dtype.itemsize), dtype=np.uint8)).view(dtype)


def _runs(wanted_N: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """First place, and the one after the last, of each run of true values."""
    edges = np.flatnonzero(np.diff(wanted_N, prepend=False, append=False))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def _tap_scale(codec: Codec, rows: Sequence[SegmentRows]) -> Tensor | None:
    """Scales per tap and channel, over all rows that the shard stores, for a format that uses them."""
    if not codec.taps.uses_channel_scale:
        return None
    num_taps = rows[0].taps_NLD.shape[1]
    # Tap by tap: a copy of all of them at once would double the memory.
    per_tap = [channel_scale(torch.cat([r.taps_NLD[:, tap] for r in rows])[:, None]) for tap in range(num_taps)]
    return torch.cat(per_tap)


def _encode_record(codec: Codec, rows: SegmentRows, tap_scale_LD: Tensor | None) -> Tensor:
    def encoded(row_format: RowFormat, vectors_NWD: Tensor, scale_WD: Tensor | None) -> Tensor:
        if not len(vectors_NWD):
            return torch.empty(0, dtype=torch.uint8)
        return row_format.encode(vectors_NWD, scale_WD).cpu().flatten()

    return torch.cat(
        [
            encoded(codec.taps, rows.taps_NLD, tap_scale_LD),
            encoded(codec.last_hidden, rows.last_hidden_KD[:, None], None),
            rows.log_normaliser_K.float().cpu().contiguous().view(torch.uint8),
        ]
    )


def _check_values(rows: SegmentRows, sample_id: str) -> None:
    for name, values in (
        ("a tap", rows.taps_NLD),
        ("the last hidden state", rows.last_hidden_KD),
        ("the log-normaliser", rows.log_normaliser_K),
    ):
        # NaN compares false, so it fails the test too.
        if not bool((values.abs() < MAX_MAGNITUDE).all()):
            raise TargetError(
                f"the target's hidden states of sample {sample_id!r} cannot be stored",
                got=f"NaN, an infinity or a value beyond {MAX_MAGNITUDE:g} in {name}",
                expected="finite values",
                remedy="Set target.dtype to fp32, or take this prompt out",
            )
