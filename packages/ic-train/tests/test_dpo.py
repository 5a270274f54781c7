"""`ic_train.dpo` on toy pairs: losses against the formulas, shards, adapters, resuming, refusals."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from ic_model import ICForCausalLM
from ic_model.byte_tokenizer import build_byte_tokenizer
from safetensors.torch import load_file
from training_runs import PATIENT, Run, flags_of, launch_all, make_toys, steps_of, toy_config, values

from ic_train import dpo
from ic_train.checkpoints import export
from ic_train.checkpoints.folders import COMPLETE
from ic_train.data.packing import PackedText
from ic_train.data.text import RECORD_FILE, load_token_corpus
from ic_train.long_context.models import check_sources, fingerprints
from ic_train.preferences.store import Writer, load_preferences, write_record

pytestmark = PATIENT

NUM_PAIRS, BETA, ALIGNMENT, SGD_RATE = 8, 0.5, 0.7, 0.2
TEXT_WEIGHT, TEXT_TOKENS, SEED = 0.3, 48, 7
# all pairs in every step, so that their order does not matter, and steps that a loop of ten lines can take, too
BY_HAND = [
    *("--optim", "sgd", "--learning_rate", str(SGD_RATE), "--lr_scheduler_type", "constant"),
    *("--max_grad_norm", "0", "--weight_decay", "0", "--warmup_steps", "0", "--max_steps", "4"),
    *("--per_device_train_batch_size", str(NUM_PAIRS), "--gradient_accumulation_steps", "1"),
    *("--beta", str(BETA), "--save_strategy", "no"),
]
LORA = ["--lora_rank", "4", "--lora_alpha", "8", "--save_strategy", "no"]


def make_pairs(folder: Path, per_context: int = 1) -> Path:
    """Pairs of random letters with random numbers as answers."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    with Writer(folder, 264) as writer:
        for number in range(NUM_PAIRS):
            if number % per_context == 0:
                context = draw.integers(97, 123, int(draw.integers(40, 100)))
                extent = writer.add_tokens(context)
            right, wrong = (list(b" %03d" % draw.integers(1000)) + [256] for _ in range(2))
            line = {
                "id": f"pair-{number}",
                "kind": ("distractors", "absent")[number % 2],
                "context_tokens": 128,
                "depth": 0.5,
                "context": extent,
                "short_context": writer.add_tokens(context[: len(context) // 3]),
                "question_ids": list(b" k is"),
                "chosen_ids": right,
                # answers of different lengths are padded
                "rejected_ids": wrong[: 3 + number % 3],
                "rejected_source": "made",
            }
            writer.add_pair(line)
        record = {"dtype": writer.dtype.str, "tokens": writer.tokens}
    write_record(folder, {**record, "pairs": NUM_PAIRS, "largest_token_id": 256})
    return folder


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = make_toys(tmp_path_factory.mktemp("dpo"))
    root = made["runs"].parent
    return made | {"preferences": make_pairs(root / "pairs"), "shared": make_pairs(root / "shared", 4)}


def preference_run(name: str, *flags: str) -> Run:
    return Run(name, list(flags), module="dpo")


@pytest.fixture(scope="module")
def runs(toys: dict[str, Path]) -> dict[str, Any]:
    mixed = ["--text_weight", str(TEXT_WEIGHT), "--text_tokens", str(TEXT_TOKENS)]
    objectives = [
        preference_run(f"by-hand-{name}", "--objective", name.removesuffix("-text"), *BY_HAND, *more)
        for name, more in (
            ("dpo", ()),
            ("solopo", ("--alignment_weight", str(ALIGNMENT))),
            ("longpo", ()),
            ("dpo-text", ("--text_corpora", str(toys["corpora"]), *mixed)),
        )
    ]
    halved = ["--gradient_accumulation_steps", "2"]
    resumed = ["--resume", str(toys["runs"] / "two" / "checkpoint-3"), "--save_strategy", "no"]
    validated = ["--preferences", str(toys["shared"]), "--validation_pairs", "2", "--eval_strategy", "steps"]
    launches = [
        (2, [preference_run("two", *halved), preference_run("lora-two", *LORA, *halved)]),
        (
            1,
            [
                *objectives,
                preference_run("whole", "--save_strategy", "no"),
                preference_run("resumed", *resumed),
                preference_run("lora", *LORA, "--gradient_checkpointing", "true"),
                preference_run(
                    "validated", *validated, "--eval_steps", "2", "--max_steps", "2", "--save_strategy", "no"
                ),
                preference_run(
                    "hot", "--learning_rate", "1e30", "--max_grad_norm", "0", "--warmup_steps", "0"
                ),
            ],
        ),
    ]
    return {"errors": launch_all(toys, launches), "folder": toys["runs"]}


def summed_logps(model: ICForCausalLM, prompt: np.ndarray, answer: np.ndarray) -> torch.Tensor:
    """Of one answer, from the logits of one unpadded row."""
    ids = torch.from_numpy(np.concatenate((prompt, answer)))[None]
    logps = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return logps[len(prompt) - 1 :].sum()


def rewards(model: ICForCausalLM, reference: ICForCausalLM, pair: Any, objective: str) -> torch.Tensor:
    """Of the chosen and the rejected answer behind what is learnt on, and of the chosen behind the long prompt."""
    learnt = pair.short_prompt_ids if objective == "solopo" else pair.prompt_ids
    held = pair.short_prompt_ids if objective == "longpo" else learnt
    found = []
    for seen, known, answer in (
        (learnt, held, pair.chosen_ids),
        (learnt, held, pair.rejected_ids),
        (pair.prompt_ids, pair.prompt_ids, pair.chosen_ids),
    ):
        with torch.no_grad():
            before = summed_logps(reference, known, answer)
        found.append(BETA * (summed_logps(model, seen, answer) - before))
    return torch.stack(found)


def text_losses(model: ICForCausalLM, corpus: Path) -> torch.Tensor:
    """Mean over the sequences that come with all pairs, which have the pairs' numbers."""
    text = PackedText([load_token_corpus(corpus)], tokens_per_sequence=TEXT_TOKENS, seed=SEED)
    ids = torch.stack([text[number]["input_ids"] for number in range(NUM_PAIRS)])
    return model(ids, labels=ids).loss


@pytest.mark.parametrize("name", ["dpo", "solopo", "longpo", "dpo-text"])
def test_losses_are_those_of_the_papers(runs: dict[str, Any], toys: dict[str, Path], name: str) -> None:
    objective = name.removesuffix("-text")
    name = f"by-hand-{name}"
    assert name not in runs["errors"], runs["errors"][name]
    pairs = load_preferences(toys["preferences"], 264)
    model, reference = (ICForCausalLM.from_pretrained(toys["model"], dtype=torch.float32) for _ in range(2))
    expected = []
    for _ in range(4):
        found = torch.stack([rewards(model, reference, pair, objective) for pair in pairs])
        chosen, rejected, long = found.unbind(1)
        loss = -torch.nn.functional.logsigmoid(chosen - rejected).mean()
        if objective == "solopo":
            loss = loss + ALIGNMENT * (long - chosen).abs().mean()
        if name.endswith("text"):
            loss = loss + TEXT_WEIGHT * text_losses(model, toys["corpora"])
        model.zero_grad()
        loss.backward()
        expected.append(loss.item())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= SGD_RATE * parameter.grad
    assert values(runs["folder"] / name, "loss") == pytest.approx(expected, rel=2e-4)
    # the steps have moved it
    assert abs(expected[-1] - expected[0]) > 0.02
    if name in ("by-hand-dpo", "by-hand-solopo"):
        assert expected[0] == pytest.approx(math.log(2), abs=1e-5)


def test_shards_and_resumes_as_one_process(runs: dict[str, Any]) -> None:
    folder = runs["folder"]
    for name in ("two", "whole", "resumed"):
        assert name not in runs["errors"], runs["errors"][name]
    whole = values(folder / "whole", "loss")
    assert len(whole) == 6
    assert values(folder / "two", "loss") == pytest.approx(whole, rel=1e-4)
    # on one process instead of two
    assert values(folder / "resumed", "loss") == pytest.approx(whole[3:], rel=1e-4)
    one, other = (load_file(folder / name / "model.safetensors") for name in ("two", "resumed"))
    for name, weight in one.items():
        torch.testing.assert_close(weight, other[name], rtol=2e-2, atol=2e-3)


def test_adapters_train_alone_and_are_merged(runs: dict[str, Any], toys: dict[str, Path]) -> None:
    for name in ("lora", "lora-two"):
        assert name not in runs["errors"], runs["errors"][name]
    losses = values(runs["folder"] / "lora", "loss")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[-1] < losses[0]
    assert values(runs["folder"] / "lora-two", "loss") == pytest.approx(losses, rel=1e-4)
    before = load_file(toys["model"] / "model.safetensors")
    after = load_file(runs["folder"] / "lora" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name].bfloat16(), after[name])}
    assert changed
    assert all("proj" in name and "kv_b_proj" not in name and "mlp" not in name for name in changed)


def test_rewards_are_logged_by_kind_and_the_run_is_on_record(runs: dict[str, Any]) -> None:
    last = steps_of(runs["folder"] / "whole")[-1]
    assert last["rewards/accuracies/absent"] == last["rewards/accuracies/distractors"] == 1.0
    record = json.loads((runs["folder"] / "whole" / "training.json").read_text())
    assert record["identity"]["objective"] == "dpo"
    assert record["pairs_by_kind"] == {"absent": 4, "distractors": 4}
    assert record["command"].startswith("accelerate launch -m ic_train.dpo")
    assert build_byte_tokenizer().get_vocab().keys() == (
        dpo.AutoTokenizer.from_pretrained(runs["folder"] / "whole").get_vocab().keys()
    )


def test_contexts_are_held_out(runs: dict[str, Any], toys: dict[str, Path]) -> None:
    assert "validated" not in runs["errors"], runs["errors"]["validated"]
    lines = [
        json.loads(line) for line in (runs["folder"] / "validated" / "metrics.jsonl").read_text().splitlines()
    ]
    measured = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in measured] == [2]
    assert "eval_rewards/accuracies" in measured[0]
    record = json.loads((runs["folder"] / "validated" / "training.json").read_text())
    # all of a context
    assert record["identity"]["training_pairs"] == record["validation_pairs"] == 4
    assert record["identity"]["validation_contexts"] == 1
    parts = [
        datasets.load_from_disk(folder)["pair"]
        for folder in (runs["folder"] / "validated" / "reference").iterdir()
    ]
    assert sorted(sorted(numbers) for numbers in parts) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    flags = ["--preferences", str(toys["shared"]), "--validation_pairs", "5", "--eval_strategy", "steps"]
    assert "there are 8 pairs in 2 contexts" in refused(toys, *flags, "--eval_steps", "1")


def test_a_checkpoint_becomes_a_model(runs: dict[str, Any], tmp_path: Path) -> None:
    export.export(runs["folder"] / "two" / "checkpoint-6", tmp_path / "model")
    ours = load_file(tmp_path / "model" / "model.safetensors")
    for name, weight in load_file(runs["folder"] / "two" / "model.safetensors").items():
        assert torch.equal(weight, ours[name])


def test_a_loss_that_is_no_number_ends_the_run(runs: dict[str, Any]) -> None:
    assert "became infinite or no number" in runs["errors"]["hot"]


def refused(toys: dict[str, Path], *flags: str) -> str:
    with pytest.raises(SystemExit) as error:
        dpo.main(flags_of(toys, preference_run("refused", *flags)))
    return str(error.value.code)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_length", "64"], "max_length is 64; "),
        (["--objective", "ppo"], "objective is 'ppo'; accepted: dpo, solopo, longpo"),
        (["--alignment_weight", "-1"], "alignment_weight is -1.0; it must be at least 0"),
        (["--alignment_weight", "2"], "alignment_weight is 2.0; it has no effect with objective 'dpo'"),
        (["--text_weight", "0"], "text_weight is 0.0; it must be above 0"),
        (["--text_weight", "2"], "text_weight is 2.0; it has no effect without text_corpora"),
        (["--text_tokens", "1"], "text_tokens is 1; it must be at least 2"),
        (["--text_corpora", "nowhere", "--text_tokens", "64"], "nowhere is no corpus"),
        (["--text_corpora", "nowhere"], "text_tokens is 1024; the model takes 512"),
        (["--validation_pairs", "2"], "set both or neither"),
        (["--validation_pairs", "8", "--eval_strategy", "steps", "--eval_steps", "1"], "there are 8 pairs"),
        (["--padding_free", "true"], "padding_free is True; it must be False, or left out"),
        (["--precompute_ref_log_probs", "false"], "precompute_ref_log_probs is False; it must be True"),
        (["--objective", "solopo", "--ld_alpha", "0.5"], "ld_alpha is 0.5"),
        (["--model", "ic-nano"], "model is 'ic-nano'; accepted: a checkpoint's folder"),
        (
            ["--preferences", ""],
            "preferences is ''; accepted: a folder that `ic-train data preferences` made",
        ),
        (["--preferences", "nowhere"], "nowhere holds no preferences"),
        (["--resume", "nowhere"], "resume is 'nowhere'"),
        (["--lora_rank", "4", "--lora_target_modules", "nothing"], "lora_target_modules is ['nothing']"),
    ],
)
def test_what_would_be_ignored_or_lost_is_refused(
    toys: dict[str, Path], flags: list[str], message: str
) -> None:
    assert message in refused(toys, *flags)


def test_pairs_that_would_be_cut_are_counted(toys: dict[str, Path]) -> None:
    pairs = load_preferences(toys["preferences"], 264)
    lengths = [len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs]
    limit = sorted(lengths)[-4]
    said = refused(toys, "--max_length", str(limit))
    assert f"3 of 8 pairs of {toys['preferences']} are longer" in said
    assert f"the longest has {max(lengths)} tokens" in said


def test_pairs_beyond_the_models_positions_are_refused(toys: dict[str, Path], tmp_path: Path) -> None:
    model = ICForCausalLM.from_pretrained(toys["model"])
    model.config.max_position_embeddings = 32
    model.save_pretrained(tmp_path / "short")
    build_byte_tokenizer().save_pretrained(tmp_path / "short")
    said = refused(toys, "--model", str(tmp_path / "short"))
    assert "max_position_embeddings of short is 32; 8 of 8 pairs" in said


def test_another_runs_checkpoint_is_refused(runs: dict[str, Any], toys: dict[str, Path]) -> None:
    checkpoint = str(runs["folder"] / "two" / "checkpoint-3")
    assert "objective is longpo" in refused(toys, "--resume", checkpoint, "--objective", "longpo")


def test_another_model_or_text_of_the_same_name_is_refused(
    runs: dict[str, Any], toys: dict[str, Path], tmp_path: Path
) -> None:
    assert "two" not in runs["errors"], runs["errors"]["two"]
    checkpoint = runs["folder"] / "two" / "checkpoint-3"
    other = tmp_path / toys["model"].name
    ICForCausalLM(toy_config()).save_pretrained(other)
    build_byte_tokenizer().save_pretrained(other)
    said = refused(toys, "--model", str(other), "--resume", str(checkpoint))
    assert f"model is {other}; the run of {checkpoint} began with something else" in said
    corpus = tmp_path / "corpus"
    shutil.copytree(toys["corpora"], corpus)
    sources = {"text_corpora": [str(corpus)]}
    (tmp_path / COMPLETE).write_text(json.dumps({"sources": fingerprints(sources)}))
    check_sources(tmp_path, sources)
    record = json.loads((corpus / RECORD_FILE).read_text())
    record["sources"][0]["sha256"] = "0" * 64
    (corpus / RECORD_FILE).write_text(json.dumps(record))
    with pytest.raises(ValueError, match=f"text_corpora is {corpus}; the run of"):
        check_sources(tmp_path, sources)


def test_checkpoints_that_do_not_say_what_they_began_with_are_let_through(
    toys: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / COMPLETE).write_text("{}")
    check_sources(tmp_path, {"model": [str(toys["model"])], "text_corpora": []})
    assert "does not say what its run began with: ['model', 'text_corpora'] not compared" in caplog.text
    assert 0 <= dpo.WallTime({}, tmp_path).wall_s < 1000
    assert "does not say how long its run took" in caplog.text


def test_time_adds_up_over_starts(runs: dict[str, Any], tmp_path: Path) -> None:
    first = json.loads((runs["folder"] / "two" / "checkpoint-3" / COMPLETE).read_text())["wall_s"]
    resumed = json.loads((runs["folder"] / "resumed" / "training.json").read_text())["wall_s"]
    assert first <= resumed
    (tmp_path / COMPLETE).write_text(json.dumps({"wall_s": 86_400.0}))
    record: dict[str, Any] = {}
    clock = dpo.WallTime(record, tmp_path)
    clock.on_step_end(None, None, None)
    assert 86_400 <= record["wall_s"] <= clock.wall_s
