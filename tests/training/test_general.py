"""From a target that transformers runs to a trained draft: captured, trained and verified."""

from __future__ import annotations

import pytest

from draftline.spec import TargetSpec
from draftline.target.general import GeneralModel
from draftline.target.load import Target, load_target
from tests.target.test_general import family_config
from tests.target.test_lean import save_model
from tests.training.test_gemma import (
    laws,
    test_a_draft_that_thinks_as_the_target_is_always_accepted,
    test_a_trained_draft_is_verified_without_changing_a_token,
    test_the_cache_holds_log_normalisers_of_capped_logits,
)

__all__ = [
    "laws",
    "test_a_draft_that_thinks_as_the_target_is_always_accepted",
    "test_a_trained_draft_is_verified_without_changing_a_token",
    "test_the_cache_holds_log_normalisers_of_capped_logits",
]


@pytest.fixture(scope="module", params=["qwen2", "granite", "gemma2", "gpt_neox"])
def gemma(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Target:
    """No Gemma: plain, scaled and capped logits, and a LayerNorm."""
    folder = tmp_path_factory.mktemp("general")
    save_model(family_config(request.param), folder)
    target = load_target(TargetSpec(source=str(folder)), dtype="fp32")
    assert isinstance(target.model, GeneralModel)
    return target
