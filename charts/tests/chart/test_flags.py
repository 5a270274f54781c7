"""The rendered commands in the parsers of the real programs: flags that they know, with values that they take."""

import argparse
import itertools
import json

import pytest
from chart_tools import CHART, of_kind, render

FILES = sorted(path.name.removesuffix("-values.yaml") for path in (CHART / "ci").glob("*-values.yaml"))
ENGINE = json.loads((CHART / "values.schema.json").read_text())["properties"]["engine"]["properties"]
MODEL = json.loads((CHART / "values.schema.json").read_text())["properties"]["model"]["properties"]
# every value that becomes a flag, beside what the parametrised tests change
ALL_FLAGS = {
    "model.preset": "ic-1b",
    "model.path": "/models/own",
    "model.loraAdapters": [{"name": "a", "path": "/a"}, {"name": "b", "path": "/b"}],
    "engine.maxModelLen": 131072,
    "engine.quantization": "fp8",
    "engine.kvCacheDtype": "fp8",
    "engine.tensorParallelSize": 2,
    "engine.pipelineParallelSize": 2,
    "engine.maxNumSeqs": 32,
    "engine.maxNumBatchedTokens": 4096,
    "engine.maxNumQueuedReqs": 64,
    "engine.extraArgs": ["--seed", "0"],
    "gpu.memoryGib": 24,
    "batch.enabled": True,
    "batch.chatTemplate": "{{ messages[0].content }}",
}


@pytest.fixture(scope="module")
def serve_parser():
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser(exit_on_error=False))


@pytest.fixture(scope="module")
def batch_parser():
    from vllm.entrypoints.launchers.run_batch import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser(exit_on_error=False))


def commands(objects):
    """The `vllm serve` and `vllm run-batch` commands of a release, without those two words."""
    serve, batch = [], []
    for item in objects:
        if item["kind"] not in ("Deployment", "Job", "CronJob"):
            continue
        spec = item["spec"]["jobTemplate"]["spec"] if item["kind"] == "CronJob" else item["spec"]
        for container in spec["template"]["spec"]["containers"]:
            words = [*container.get("command", []), *container.get("args", [])]
            if container["name"] == "vllm":
                assert words[:2] == ["vllm", "serve"]
                serve.append(words[2:])
            elif container["name"] == "run-batch":
                batch.append(words[words.index("run-batch") + 1 :])
    return serve, batch


def parse(objects, serve_parser, batch_parser):
    serve, batch = commands(objects)
    found = [serve_parser.parse_args(words) for words in serve]
    return found + [batch_parser.parse_args([*words, "-i", "in", "-o", "out"]) for words in batch]


@pytest.mark.parametrize("name", FILES)
def test_vllm_knows_every_flag_of_the_values_files(name, serve_parser, batch_parser):
    assert parse(render([name]), serve_parser, batch_parser)


def test_vllm_gets_every_value(serve_parser, batch_parser):
    serve, batch = parse(render(set=ALL_FLAGS), serve_parser, batch_parser)
    for options in (serve, batch):
        assert options.max_model_len == 131072
        assert options.quantization == "fp8" and options.kv_cache_dtype == "fp8"
        assert (options.tensor_parallel_size, options.pipeline_parallel_size) == (2, 2)
        assert (options.max_num_seqs, options.max_num_batched_tokens) == (32, 4096)
        assert options.enable_lora and options.max_lora_rank == 16
        assert options.gpu_memory_utilization == 0.9 and options.seed == 0
        assert options.served_model_name == ["infinite-context"]
    assert [(adapter.name, adapter.path) for adapter in serve.lora_modules] == [("a", "/a"), ("b", "/b")]
    assert serve.max_num_queued_reqs == 64 and serve.shutdown_timeout == 120
    assert batch.enable_metrics and batch.port == 8001
    assert batch.chat_template == "{{ messages[0].content }}"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *itertools.product(["engine.dtype"], ENGINE["dtype"]["enum"]),
        *itertools.product(["engine.quantization"], filter(None, ENGINE["quantization"]["enum"])),
        *itertools.product(["engine.kvCacheDtype"], ENGINE["kvCacheDtype"]["enum"]),
        *itertools.product(["model.loraMaxRank"], MODEL["loraMaxRank"]["enum"]),
    ],
)
def test_vllm_takes_every_choice_that_the_schema_offers(key, value, serve_parser):
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    (options,) = parse(render(set={**ALL_FLAGS, "batch.enabled": False, key: value}), serve_parser, None)
    # the parser takes any method; the engine does not
    assert options.quantization in QUANTIZATION_METHODS


def test_a_flag_that_vllm_does_not_know_is_seen_here(serve_parser):
    objects = render(set={"engine.extraArgs": ["--max-modle-len", "7"]})
    with pytest.raises((argparse.ArgumentError, SystemExit)):
        parse(objects, serve_parser, None)


def evaluation(**values):
    """The Job's command, the program's name left out."""
    (job,) = of_kind(render(set={"evaluation.enabled": True, **values}), "Job")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    words = [*container["command"], *container["args"]]
    assert words[0] == "ic-train"
    return words[1:]


def test_the_evaluations_command_measures_the_embedded_model(tmp_path):
    """For real; the length and the folder are this machine's."""
    from ic_train import cli

    few = ["--context-tokens", "256", "--contexts", "1", "--keys-per-context", "1"]
    words = evaluation(**{"gpu.enabled": False, "engine.maxModelLen": 4096, "evaluation.args": few})
    places = {"/models/ic-nano": "ic-nano", "/results": str(tmp_path)}
    assert places.keys() <= set(words)
    assert cli.main([places.get(word, word) for word in words]) == 0
    (result,) = tmp_path.glob("*/result.json")
    (row,) = json.loads(result.read_text())["rows"]
    assert (row["context_tokens"], row["total"]) == (256, 1)


def test_the_default_evaluation_is_a_command_that_ic_train_knows():
    from ic_train import cli

    words = evaluation()
    assert words[:2] == ["evaluate", "passkey"]
    command = " ".join(words[:2])
    options = cli._parser([command]).parse_args([command, *words[2:]])
    assert options.model == "/models/ic-nano" and options.context_tokens == [16384]
