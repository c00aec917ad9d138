"""Faults while training reads and writes: what passes is waited out, what stays is named, and nothing is lost.

After every fault the same run goes on to the same draft and history as one that was never disturbed.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from draftline.cache.order import sample_order
from draftline.cache.verification import REPAIRABLE
from draftline.errors import DraftlineError, FormatError, NoSpace, ObjectNotFound, StorageError
from draftline.spec import derive
from draftline.storage import ObjectStore, open_store
from draftline.target.load import Target
from draftline.training.loop import DraftTrainer, TrainingInputs
from tests.full_disk import full_disk
from tests.servers.faulty_s3 import Fault, FaultyS3, running_faulty_s3
from tests.servers.s3 import BUCKET, S3_SERVERS, S3Server, named_server
from tests.training.cases import SPEC, conversations, deterministic, make_inputs, train

NUM_SHARDS = 24
ONE_EPOCH = derive(
    SPEC,
    {
        "train.steps": 6,
        "train.samples_per_step": 4,
        "train.checkpoint_every_steps": 1,
        # So that a sample is read when its step comes, and not before.
        "cache.reader_memory_bytes": 1,
        "cache.prefetch_samples": 0,
    },
)
AHEAD = {"cache.reader_memory_bytes": 1 << 30, "cache.prefetch_samples": 8}
QUOTA = Fault("status", 403, "QuotaExceeded")
OVERLOADED = Fault("status", 503, "SlowDown")


@pytest.fixture(autouse=True)
def _as_the_job_runs() -> Iterator[None]:
    with deterministic():
        yield


@pytest.fixture(scope="module")
def base(loaded_target: Target, tmp_path_factory: pytest.TempPathFactory) -> TrainingInputs:
    """A cache of many shards of one sample, so that reading goes on all the time."""
    found = conversations(loaded_target, NUM_SHARDS)
    splits = {"train": [[sample] for sample in found], "validation": [conversations(loaded_target, 3, seed=9)]}
    return make_inputs(loaded_target, tmp_path_factory.mktemp("cache"), splits, ONE_EPOCH)


@pytest.fixture(scope="module")
def undisturbed(base: TrainingInputs, loaded_target: Target) -> tuple[dict[str, bytes], bytes]:
    with deterministic():
        return train(replace(base, prefix="undisturbed"), loaded_target)


@pytest.fixture
def inputs(base: TrainingInputs, tmp_path: Path) -> TrainingInputs:
    """The same cache in a directory of its own, which a test may damage."""
    return copied(base, open_store(str(tmp_path / "own"), create=True))


def copied(base: TrainingInputs, store: ObjectStore) -> TrainingInputs:
    for info in base.store.list("cache/"):
        store.put(info.key, base.store.get(info.key))
    return replace(base, store=store)


def shard_of_step(step: int) -> str:
    """The shard of the last sample of a step."""
    order = sample_order([1] * NUM_SHARDS, 0, SPEC.seed)
    return f"cache/train-{order[4 * step + 3][0]:05d}.safetensors"


def test_the_step_meant_lies_beyond_the_first_window() -> None:
    assert len({shard_of_step(step) for step in range(6)}) == 6


DAMAGES: dict[str, tuple[type[DraftlineError], Callable[[ObjectStore, str], None]]] = {
    "deleted": (ObjectNotFound, lambda store, key: store.delete(key)),
    "truncated": (FormatError, lambda store, key: store.put(key, store.get(key)[:-7])),
    "flipped": (
        FormatError,
        lambda store, key: store.put(key, bytes([*(d := store.get(key))[:-9], d[-9] ^ 4, *d[-8:]])),
    ),
}


@pytest.mark.parametrize(("error", "damage"), DAMAGES.values(), ids=DAMAGES)
def test_damage_in_mid_epoch_is_named_and_training_goes_on_after_it_is_repaired(
    inputs: TrainingInputs,
    loaded_target: Target,
    undisturbed: tuple[dict[str, bytes], bytes],
    error: type[DraftlineError],
    damage: Callable[[ObjectStore, str], None],
) -> None:
    key = shard_of_step(5)
    whole = inputs.store.get(key)

    def damage_after_the_first_step(done: int, figures: dict[str, float]) -> None:
        if done == 1:
            damage(inputs.store, key)

    with pytest.raises(error, match="training step 6 cannot read its samples") as caught:
        DraftTrainer(inputs, loaded_target, on_step=damage_after_the_first_step).run()
    assert type(caught.value) is error
    assert key.removeprefix("cache/") in str(caught.value)
    assert "draftline cache verify" in str(caught.value) and "--repair" in str(caught.value)
    checkpoints = [info.key for info in inputs.store.list("draft/run/scratch/")]
    assert checkpoints[-1].endswith("step-00000005.safetensors"), "the steps before are kept"
    inputs.store.put(key, whole)
    assert train(inputs, loaded_target) == undisturbed


def test_all_damage_that_training_names_is_repairable() -> None:
    assert {"truncated", "flipped", "missing"} == REPAIRABLE


PASSING = {
    "503": OVERLOADED,
    "reset": Fault("reset"),
    "cut body": Fault("cut_body"),
    "slow": Fault("slow", pause_s=0.01),
}


@pytest.fixture(params=S3_SERVERS)
def behind(request: pytest.FixtureRequest, moto_server: S3Server) -> S3Server:
    return named_server(request.param, moto_server)


@pytest.fixture
def through_proxy(
    base: TrainingInputs, behind: S3Server, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[TrainingInputs, FaultyS3]]:
    """The cache on an S3 server, reached through a proxy that misbehaves on command."""
    behind.use(monkeypatch)
    uri = f"s3://{BUCKET}/faults-{uuid.uuid4().hex}"
    direct = open_store(uri, create=True)
    copied(base, direct)
    with running_faulty_s3(behind.endpoint_url) as proxy:
        S3Server(proxy.endpoint_url, behind.access_key, behind.secret_key).use(monkeypatch)
        yield replace(base, store=open_store(uri)), proxy
    for info in list(direct.list()):
        direct.delete(info.key)


@pytest.mark.slow
@pytest.mark.parametrize("is_ahead", [False, True], ids=["as needed", "ahead"])
@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING)
def test_passing_faults_change_nothing(
    through_proxy: tuple[TrainingInputs, FaultyS3],
    loaded_target: Target,
    undisturbed: tuple[dict[str, bytes], bytes],
    fault: Fault,
    is_ahead: bool,
) -> None:
    """The first request for every object, to read or to write it, meets the fault."""
    inputs, proxy = through_proxy
    inputs = replace(inputs, spec=derive(inputs.spec, AHEAD if is_ahead else {}))
    met: set[tuple[str, str]] = set()

    def first_time(method: str, path: str, query: str) -> Fault | None:
        if "list-type" in query or (method, path) in met:
            return None
        met.add((method, path))
        return None if method != "GET" and fault.kind in ("cut_body", "slow") else fault

    proxy.chosen = first_time
    assert train(inputs, loaded_target) == undisturbed
    assert sum(path.endswith(".safetensors") and "/cache/" in path for _, path in met) >= NUM_SHARDS


@pytest.mark.slow
def test_a_server_that_stays_down_is_told_and_training_goes_on_when_it_is_back(
    through_proxy: tuple[TrainingInputs, FaultyS3],
    loaded_target: Target,
    undisturbed: tuple[dict[str, bytes], bytes],
) -> None:
    inputs, proxy = through_proxy
    name = shard_of_step(5)

    def down_from_the_first_step_on(done: int, figures: dict[str, float]) -> None:
        proxy.chosen = lambda method, path, query: OVERLOADED if path.endswith(name) else None

    with pytest.raises(StorageError, match=r"step 6 cannot read.*HTTP 503 SlowDown.*look at its log") as caught:
        DraftTrainer(inputs, loaded_target, on_step=down_from_the_first_step_on).run()
    assert type(caught.value) is StorageError
    proxy.chosen = lambda method, path, query: None
    assert train(inputs, loaded_target) == undisturbed


@pytest.mark.slow
def test_a_full_quota_is_told_and_training_goes_on_from_the_last_checkpoint(
    through_proxy: tuple[TrainingInputs, FaultyS3],
    loaded_target: Target,
    undisturbed: tuple[dict[str, bytes], bytes],
) -> None:
    inputs, proxy = through_proxy
    proxy.chosen = lambda method, path, query: QUOTA if method == "PUT" and "step-00000003" in path else None
    with pytest.raises(NoSpace, match=r"QuotaExceeded.*Free some space"):
        train(inputs, loaded_target)
    names = [info.key for info in inputs.store.list("draft/run/scratch/")]
    assert [name[-20:] for name in names] == ["00000001.safetensors", "00000002.safetensors"]
    proxy.chosen = lambda method, path, query: None
    assert train(inputs, loaded_target) == undisturbed


def test_a_full_disk_is_told_and_training_goes_on_from_the_last_checkpoint(
    inputs: TrainingInputs,
    loaded_target: Target,
    undisturbed: tuple[dict[str, bytes], bytes],
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stop_after_two(done: int, figures: dict[str, float]) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        DraftTrainer(inputs, loaded_target, on_step=stop_after_two).run()
    before = [(info.key, info.size_bytes) for info in inputs.store.list("draft/")]
    with full_disk(1000), pytest.raises(NoSpace, match="Free some space"):
        train(inputs, loaded_target)
    assert [(info.key, info.size_bytes) for info in inputs.store.list("draft/")] == before
    assert train(inputs, loaded_target) == undisturbed
