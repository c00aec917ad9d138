"""The cache's reader against raw boto3 GETs of the same objects from the same server, in one run.

Usage: ``python -m benchmarks.cache_io [--quick] [--shards 64] [--shard-megabytes 12]``

The server is moto, in a process of its own, unless ``DRAFTLINE_BENCH_S3_ENDPOINT`` names one (credentials from
``AWS_ACCESS_KEY_ID`` and ``AWS_SECRET_ACCESS_KEY``). Both sides use the same number of connections. The reader does
what training has it do: it announces a step ahead, checks every byte, decodes and hands out samples in shuffled order.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection

import torch

from benchmarks.timing import with_allocator_settings
from draftline.cache.hidden import SegmentRows, encode_hidden_states, segment_laws, split_samples
from draftline.cache.manifest import KIND, Manifest, ShardInfo, shard_name
from draftline.cache.prefixes import plan_prefixes
from draftline.cache.reader import CacheReader, ReadOptions
from draftline.cache.shards import decode_shard, encode_shard
from draftline.spec import CacheSpec
from draftline.storage import open_store
from draftline.storage.s3 import S3Store

TAPS, HIDDEN, SAMPLE_TOKENS, STEP_SAMPLES = 5, 576, 192, 16
CODECS = ("bf16", "fp8", "int4")


def main() -> None:
    """Print medians and ratios."""
    with_allocator_settings()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few small shards: shows that it runs")
    parser.add_argument("--shards", type=int, default=64, help="16 are mixed, so opened, at a time")
    parser.add_argument("--shard-megabytes", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.shards, arguments.shard_megabytes, arguments.repeats = 5, 2, 3
    with running_server():
        store = open_store(f"s3://draftline-bench/{uuid.uuid4().hex}", create=True)
        assert isinstance(store, S3Store)
        try:
            for codec in CODECS:
                manifest = write_cache(store, codec, arguments.shards, arguments.shard_megabytes << 20)
                compare(store, codec, manifest, arguments.repeats)
        finally:
            for info in list(store.list()):
                store.delete(info.key)


def compare(store: S3Store, codec: str, manifest: Manifest, repeats: int) -> None:
    """One codec's line: MB/s of raw GETs, of the reader, and what a worker of eight moves."""
    size_bytes = sum(shard.size_bytes for shard in manifest.shards)
    contenders: dict[str, Callable[[], object]] = {
        "raw": lambda: raw_gets(store, codec, manifest),
        "reader": lambda: read_epoch(store, codec, manifest),
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(repeats + 1):
        for name, run in contenders.items():
            started = time.perf_counter()
            run()
            if number > 0:
                times[name].append(time.perf_counter() - started)
    rates = {name: size_bytes / 1e6 / statistics.median(values) for name, values in times.items()}
    counted = Counting(store)
    read_epoch(counted, codec, manifest, share=1 / 8)
    print(
        f"{codec:5} {len(manifest.shards)} shards, {size_bytes / 1e6:6.0f} MB: raw GETs {rates['raw']:6.0f} MB/s, "
        f"reader {rates['reader']:6.0f} MB/s: {100 * rates['reader'] / rates['raw']:4.0f} % of raw; "
        f"a worker of eight moves {100 * counted.num_bytes / size_bytes:3.0f} % of the bytes",
        flush=True,
    )


def raw_gets(store: S3Store, codec: str, manifest: Manifest) -> int:
    """Every object by ``get_object``, as many at a time as the reader has threads."""
    client, config = store._s3(), store.config

    def get(info: ShardInfo) -> int:
        key = f"{config.prefix}/{codec}/{info.name}"
        return len(client.get_object(Bucket=config.bucket, Key=key)["Body"].read())

    with ThreadPoolExecutor(CacheSpec().prefetch_threads) as pool:
        return sum(pool.map(get, manifest.shards))


def read_epoch(store: S3Store | Counting, codec: str, manifest: Manifest, share: float = 1.0) -> int:
    """One epoch as a worker reads it: its share of every step, announced one step ahead."""
    reader = CacheReader(store, codec, manifest, "train", 0, ReadOptions(CacheSpec(), share))  # type: ignore[arg-type]
    own = max(1, int(STEP_SAMPLES * share))
    num_tokens = 0
    starts = range(0, reader.num_samples - own + 1, STEP_SAMPLES)
    reader.announce(range(own))
    for start in starts:
        for position in range(start, min(start + own, reader.num_samples)):
            num_tokens += len(reader.at(position).taps_TLD)
        following = start + STEP_SAMPLES
        if following < reader.num_samples:
            reader.announce(range(following, min(following + own, reader.num_samples)))
    reader.close()
    return num_tokens


class Counting:
    """A store that adds up what is read."""

    def __init__(self, store: S3Store) -> None:
        self._store = store
        self.num_bytes = 0

    def get(self, key: str) -> bytes:
        """See ``ObjectStore``."""
        data = self._store.get(key)
        self.num_bytes += len(data)
        return data

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """See ``ObjectStore``."""
        data = self._store.get_range(key, start, length)
        self.num_bytes += len(data)
        return data


def write_cache(store: S3Store, codec: str, num_shards: int, shard_bytes: int) -> Manifest:
    """Shards of random states in SmolLM2's shape, nothing shared."""
    generator = torch.Generator().manual_seed(0)
    per_sample = SAMPLE_TOKENS * (TAPS + 0.5) * HIDDEN * {"bf16": 2.0, "fp8": 1.0, "int4": 0.56}[codec]
    num_samples = max(2, int(shard_bytes / per_sample))
    infos = []
    for number in range(num_shards):
        ids = torch.randint(0, 49152, (num_samples * SAMPLE_TOKENS,), dtype=torch.int32, generator=generator)
        mask = (torch.arange(len(ids)) % SAMPLE_TOKENS >= SAMPLE_TOKENS // 2).to(torch.uint8)
        cuts = torch.arange(num_samples + 1) * SAMPLE_TOKENS
        metadata = {"kind": "tokens", "ids": [f"{number}-{n}" for n in range(num_samples)], "target": "bench"}
        data = encode_shard({"input_ids": ids, "loss_mask": mask, "cu_seqlens": cuts}, metadata)
        tokens = decode_shard(data, origin="tokens")
        sample_ids, masks = split_samples(tokens)
        plan = plan_prefixes(sample_ids)
        rows = [
            SegmentRows(
                torch.randn(len(law), TAPS, HIDDEN, generator=generator),
                torch.randn(int(law.sum()), HIDDEN, generator=generator),
                torch.zeros(int(law.sum())),
            )
            for law in segment_laws(plan, masks)
        ]
        shard = encode_hidden_states(tokens, plan, rows, range(TAPS), codec)
        name = shard_name("train", number)
        store.put(f"{codec}/{name}", shard)
        infos.append(ShardInfo.of(name, "train", num_samples, len(ids), shard))
    return Manifest(KIND, "bench", tuple(infos), codec, tuple(range(TAPS)), HIDDEN)


@contextmanager
def running_server() -> Iterator[None]:
    """The environment's endpoint, or moto in a child process."""
    endpoint = os.environ.get("DRAFTLINE_BENCH_S3_ENDPOINT")
    if endpoint:
        os.environ["AWS_ENDPOINT_URL_S3"] = endpoint
        print(f"server: {endpoint}")
        yield
        return
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=_serve, args=(theirs,), daemon=True)
    server.start()
    os.environ.update(AWS_ENDPOINT_URL_S3=ours.recv(), AWS_ACCESS_KEY_ID="bench", AWS_SECRET_ACCESS_KEY="bench")
    print("server: moto, in a process of its own")
    try:
        yield
    finally:
        server.terminate()
        server.join()


def _serve(connection: Connection) -> None:
    """Serve moto until terminated; tells its address."""
    import logging

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    connection.send(f"http://{host}:{port}")
    while True:
        time.sleep(3600)


if __name__ == "__main__":
    main()
