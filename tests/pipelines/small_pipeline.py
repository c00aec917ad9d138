"""A pipeline with the training DAG's control flow and nothing else: fan-out, collect, condition."""

from kfp import dsl
from kfp.dsl import Artifact, Dataset, Input, Metrics, Output


@dsl.component(base_image="python", install_kfp_package=False)
def plan(text: str, result: Output[Dataset]):
    with open(result.path, "w") as handle:
        handle.write(text)
    result.metadata["length"] = len(text)


@dsl.component(base_image="python", install_kfp_package=False)
def measure(text: str, suite: str, plan: Input[Dataset], result: Output[Artifact], metrics: Output[Metrics]):
    import json
    import time

    begin = time.time()
    time.sleep(0.3)
    with open(metrics.path, "w") as handle:
        handle.write("{}")
    metrics.log_metric("length", plan.metadata["length"])
    with open(plan.path) as handle, open(result.path, "w") as output:
        json.dump({"suite": suite, "text": text, "plan": handle.read(), "begin": begin, "end": time.time()}, output)


@dsl.component(base_image="python", install_kfp_package=False)
def collect(measured: Input[list[Artifact]], result: Output[Artifact]):
    import json

    with open(result.path, "w") as output:
        json.dump([json.load(open(artifact.path)) for artifact in measured], output)


@dsl.component(base_image="python", install_kfp_package=False)
def judge(passes: bool, collected: Input[Artifact], result: Output[Artifact]) -> bool:
    with open(result.path, "w") as output:
        output.write("judged")
    return passes


@dsl.component(base_image="python", install_kfp_package=False)
def act(judged: Input[Artifact], collected: Input[Artifact], result: Output[Artifact]):
    with open(result.path, "w") as output:
        output.write(open(judged.path).read() + open(collected.path).read())


@dsl.pipeline(name="small")
def small(text: str, suites: list[str], passes: bool):
    plan_task = plan(text=text).set_caching_options(False)
    with dsl.ParallelFor(suites, parallelism=1) as suite:
        measured = measure(text=text, suite=suite, plan=plan_task.outputs["result"])
    collected = collect(measured=dsl.Collected(measured.outputs["result"]))
    judged = judge(passes=passes, collected=collected.outputs["result"])
    with dsl.If(judged.outputs["Output"] == True):  # noqa: E712 - builds a KFP condition
        act(judged=judged.outputs["result"], collected=collected.outputs["result"])


if __name__ == "__main__":
    import sys

    from kfp import local

    local.init(runner=local.SubprocessRunner(use_venv=False), pipeline_root=sys.argv[1], enable_caching=False)
    small(text="words", suites=["a", "b", "c"], passes=sys.argv[2] == "passes")
