"""Start, reuse, failure, kill and stop, on fake services."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from draftline.errors import PlatformError
from pipelines.embedded.platform import Health, down, status, up
from pipelines.embedded.ports import choose_ports
from pipelines.embedded.processes import ProcessId, is_alive
from pipelines.embedded.state import Layout, ServiceRecord, load_state, locked, save_state
from tests.pipelines.embedded.fakes import (
    DYING,
    SERVER_WITH_HIDDEN_WORKER,
    SILENT,
    FakeHome,
    eventually,
    fake_state,
    http_server_here,
    marked_processes,
)

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[3]


def states(home: FakeHome) -> dict[str, Health]:
    return {service.name: service.health for service in status(home.layout.home).services}


def recorded(home: FakeHome) -> tuple[ServiceRecord, ...]:
    state = load_state(home.layout)
    return () if state is None else state.services


def test_up_runs_both_and_down_leaves_nothing(fake_home: FakeHome) -> None:
    platform = fake_home.up(back=SERVER_WITH_HIDDEN_WORKER)

    assert states(fake_home) == {"front": Health.RUNNING, "back": Health.RUNNING}
    assert not platform.is_reused
    assert fake_home.temp_dir.is_dir()
    assert len(marked_processes(fake_home.layout)) == 5  # two supervisors, two servers, the hidden worker

    stopped = down(fake_home.layout.home)

    assert stopped == [f"back (pid {platform.pids['back']})", f"front (pid {platform.pids['front']})"]
    assert marked_processes(fake_home.layout) == []
    assert not fake_home.temp_dir.exists()
    assert not fake_home.layout.state_file.exists()
    assert down(fake_home.layout.home) == []


def test_second_up_reuses_the_first(fake_home: FakeHome) -> None:
    first, second = fake_home.up(), fake_home.up()

    assert second.is_reused
    assert second.pids == first.pids
    assert len(fake_home.plans) == 1


def test_a_reuse_that_is_refused_leaves_the_platform_alone(fake_home: FakeHome) -> None:
    fake_home.up()

    def refuse(_: object) -> None:
        raise PlatformError("not that one")

    with pytest.raises(PlatformError, match="not that one"):
        fake_home.up(check_reuse=refuse)
    assert states(fake_home) == {"front": Health.RUNNING, "back": Health.RUNNING}


def test_up_replaces_a_platform_of_which_a_part_died(fake_home: FakeHome) -> None:
    first = fake_home.up()
    for child in psutil.Process(first.pids["front"]).children():
        child.kill()
    assert eventually(lambda: states(fake_home)["front"] is Health.STOPPED)

    second = fake_home.up()

    assert not second.is_reused
    assert ProcessId.of(second.pids["front"]).find() is not None
    assert not set(first.pids.values()) & set(second.pids.values())
    assert len(marked_processes(fake_home.layout)) == 4


def test_a_reused_pid_is_not_taken_for_ours(fake_home: FakeHome, bystander: subprocess.Popen[bytes]) -> None:
    fake_home.up()
    state = load_state(fake_home.layout)
    assert state is not None
    down(fake_home.layout.home)
    stale = [record.model_copy(update={"pid": bystander.pid}) for record in state.services]
    older = [record.model_copy(update={"create_time_s": record.create_time_s - 100}) for record in stale]
    save_state(fake_home.layout, state.model_copy(update={"services": tuple(older)}))

    assert set(states(fake_home).values()) == {Health.STOPPED}
    assert not fake_home.up().is_reused
    assert bystander.poll() is None


def test_a_service_that_dies_at_start_shows_its_last_words(fake_home: FakeHome) -> None:
    with pytest.raises(PlatformError, match="front ended while starting") as caught:
        fake_home.up(front=DYING)

    message = str(caught.value)
    assert "  | no such table: kittens\n" in message
    assert "exit code 3" in message
    assert str(fake_home.layout.logs / "front.log") in message
    assert marked_processes(fake_home.layout) == []
    assert not fake_home.temp_dir.exists()


def test_a_service_that_never_gets_healthy_is_stopped(fake_home: FakeHome) -> None:
    with pytest.raises(PlatformError, match=r"(?s)back is not healthy after 1\.5 s.*\| thinking"):
        fake_home.up(back=SILENT, timeout_s=1.5)
    assert marked_processes(fake_home.layout) == []


def test_another_server_on_our_port_is_not_taken_for_the_service(fake_home: FakeHome) -> None:
    with http_server_here(lambda _: 200) as fake_home.port, pytest.raises(PlatformError, match="front is not healthy"):
        fake_home.up(front=SILENT, timeout_s=1.5)


def test_a_taken_port_is_named_with_its_holder(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", choose_ports(1)[0]))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(PlatformError) as caught:
            up(tmp_path / "home", mlflow_port=port)

    message = str(caught.value)
    assert f"127.0.0.1:{port}" in message
    assert f"(pid {os.getpid()})" in message
    assert "mlflow_port" in message
    assert "\n" not in message
    assert not Layout(tmp_path / "home").state_file.exists()


def test_services_end_when_their_owner_is_killed(fake_home: FakeHome, bystander: subprocess.Popen[bytes]) -> None:
    fake_home.up(back=SERVER_WITH_HIDDEN_WORKER, owner_pid=bystander.pid)
    assert status(fake_home.layout.home).owner_pid == bystander.pid
    assert len(marked_processes(fake_home.layout)) == 5

    # Not waited for: the owner stays a zombie, as under a parent that never reaps.
    os.kill(bystander.pid, signal.SIGKILL)

    assert eventually(lambda: marked_processes(fake_home.layout) == [], timeout_s=8.0)
    assert set(states(fake_home).values()) == {Health.STOPPED}
    assert not fake_home.up().is_reused


def test_down_finds_what_a_killed_supervisor_left(fake_home: FakeHome) -> None:
    platform = fake_home.up(back=SERVER_WITH_HIDDEN_WORKER)
    os.kill(platform.pids["back"], signal.SIGKILL)
    # The kernel ends the server; the hidden worker is an orphan now.
    assert eventually(lambda: len(marked_processes(fake_home.layout)) == 3)

    stopped = down(fake_home.layout.home)

    assert "1 leftover process" in stopped
    assert marked_processes(fake_home.layout) == []


def test_down_finds_processes_without_a_record(fake_home: FakeHome) -> None:
    fake_home.up()
    fake_home.layout.state_file.unlink()

    assert down(fake_home.layout.home) == ["4 leftover processes"]
    assert marked_processes(fake_home.layout) == []
    assert not fake_home.temp_dir.exists()


def test_up_killed_in_the_middle_is_cleaned_up_by_the_next(fake_home: FakeHome) -> None:
    script = (
        "import sys; from pathlib import Path; from tests.pipelines.embedded.fakes import SILENT, FakeHome\n"
        "FakeHome(Path(sys.argv[1])).up(back=SILENT, timeout_s=60)\n"
    )
    starter = subprocess.Popen([sys.executable, "-c", script, str(fake_home.layout.home)], cwd=REPOSITORY)
    assert eventually(lambda: len(recorded(fake_home)) == 2, timeout_s=20.0)
    starter.kill()
    starter.wait()
    left = marked_processes(fake_home.layout)
    state = load_state(fake_home.layout)
    assert len(left) >= 4 and state is not None and state.temp_dir is not None

    platform = fake_home.up()

    assert not platform.is_reused
    assert not any(is_alive(process) for process in left)
    assert not Path(state.temp_dir).exists()


def test_a_service_that_hangs_is_unhealthy(fake_home: FakeHome) -> None:
    platform = fake_home.up()
    server = psutil.Process(platform.pids["front"]).children()[0]
    server.suspend()

    assert states(fake_home) == {"front": Health.UNHEALTHY, "back": Health.RUNNING}
    server.resume()


def test_only_one_command_at_a_time_changes_a_platform(fake_home: FakeHome) -> None:
    heard: list[str] = []
    with locked(fake_home.layout, heard.append, timeout_s=1.0):
        started_s = time.monotonic()
        with (
            pytest.raises(PlatformError, match="Another Draftline command"),
            locked(fake_home.layout, heard.append, timeout_s=0.3),
        ):
            pass
        assert time.monotonic() - started_s < 2.0
    assert len(heard) == 1
    with locked(fake_home.layout, heard.append, timeout_s=0.0):
        assert len(heard) == 1


@pytest.mark.parametrize(("text", "expected"), [("{", "file"), (json.dumps({"version": 2}), "version")])
def test_a_damaged_or_newer_record_is_refused(fake_home: FakeHome, text: str, expected: str) -> None:
    fake_home.layout.state_file.write_text(text)
    with pytest.raises(PlatformError, match=rf"platform\.json cannot be read; got {expected}: "):
        status(fake_home.layout.home)
    fake_home.layout.state_file.unlink()


def test_the_record_survives_a_round_trip(fake_home: FakeHome) -> None:
    state = fake_state(None, ProcessId.of(os.getpid()))
    save_state(fake_home.layout, state)
    assert load_state(fake_home.layout) == state
    assert fake_home.layout.state_file.stat().st_mode & 0o777 == 0o600
    fake_home.layout.state_file.unlink()
