"""What holds for the images before anybody builds one."""

from __future__ import annotations

import re

import pytest

from tests.images.dockerfile import ROOT, TARGETS, lineage, read_dockerfile

ARGUMENTS, STAGES = read_dockerfile()


def test_every_stage_starts_from_the_one_base_or_from_a_stage() -> None:
    assert {stage.parent for stage in STAGES.values()} - set(STAGES) == {"${BASE}"}


def test_the_base_is_named_to_the_patch_version() -> None:
    assert re.fullmatch(r"docker\.io/library/python:3\.1[12]\.\d+-slim-[a-z]+", ARGUMENTS["BASE"])


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_runs_as_a_fixed_user_that_is_not_root(target: str) -> None:
    keyword, rest = STAGES[target].instructions[-1]
    assert (keyword, rest) == ("USER", "10001:10001")


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_writes_below_tmp_alone_and_leaves_probes_to_kubernetes(target: str) -> None:
    chain = lineage(STAGES, target)
    environment = " ".join(rest for stage in chain for rest in stage.all("ENV"))
    assert re.search(r"\bHOME=/tmp\b", environment)
    assert "PYTHONDONTWRITEBYTECODE=1" in environment
    assert next(iter(rest for stage in chain for rest in stage.all("WORKDIR"))) == "/tmp"
    assert not any(stage.all("VOLUME") or stage.all("HEALTHCHECK") for stage in chain)


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_says_what_it_is(target: str) -> None:
    labels = STAGES[target].labels
    assert labels["version"] == "${VERSION}"
    assert labels["revision"] == "${REVISION}"
    assert labels["licenses"] == "MIT"
    assert labels["title"].startswith("draftline-")


@pytest.mark.parametrize("target", TARGETS)
def test_no_tool_of_the_build_reaches_an_image(target: str) -> None:
    chain = lineage(STAGES, target)
    assert "tools" not in {stage.name for stage in chain}
    installed = " ".join(rest for stage in chain for rest in stage.all("RUN"))
    assert "g++" not in installed and "pip" not in installed.replace("pipefail", "")
    sources = {rest.split()[1] for stage in chain for rest in stage.all("COPY") if rest.startswith("--from=")}
    assert sources == {"/opt/draftline", "/stage/opt/draftline"}


def test_no_secret_is_an_argument_or_a_variable() -> None:
    words = re.compile(r"pass|token|secret|credential|key", re.IGNORECASE)
    for stage in STAGES.values():
        for keyword in ("ARG", "ENV", "LABEL"):
            assert not any(words.search(rest) for rest in stage.all(keyword)), stage.name


def test_steps_that_ask_an_index_are_given_its_settings_as_secrets() -> None:
    asking = [
        rest
        for stage in STAGES.values()
        for rest in stage.all("RUN")
        if re.search(r"image-packages\.sh (tools|install|application)", rest)
    ]
    assert len(asking) == 5
    for rest in asking:
        assert "--mount=type=secret,id=pip_conf" in rest and "--mount=type=secret,id=ca_bundle" in rest


def test_apt_leaves_no_recommendations_and_no_lists() -> None:
    for stage in STAGES.values():
        for rest in stage.all("RUN"):
            assert rest.count("apt-get install") == rest.count("--no-install-recommends")
            if "apt-get" in rest and stage.name.startswith("runtime"):
                assert rest.endswith("image-packages.sh clean")


def test_the_context_holds_what_is_copied_and_nothing_else() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    allowed = {line[1:] for line in ignored if line.startswith("!")}
    copied = {
        source
        for stage in STAGES.values()
        for rest in stage.all("COPY")
        if not rest.startswith("--from=")
        for source in rest.split()[:-1]
    }
    assert "*" in ignored
    assert allowed == copied
    assert all((ROOT / source).exists() for source in copied)
