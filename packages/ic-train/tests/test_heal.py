"""Healing as people start it, `accelerate launch -m ic_train.heal --config RECIPE`, on the CPU, and its losses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from converted_models import converted, source_folder, source_model, text_file, token_ids
from ic_model import ICForCausalLM
from torch.nn import functional as F
from transformers import AutoTokenizer

from ic_train import heal
from ic_train.data.text import write_corpus
from ic_train.trainers import distillation_loss
from ic_train.trainers.distillation_loss import (
    IGNORED,
    DistillationWeights,
    hidden_distance,
    token_losses,
)

RECIPE = Path(__file__).parent / "recipes" / "heal.yaml"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("heal")
    source = source_folder(root / "source", "qwen2")
    converted(source, root / "converted", rank=20, rope=8)
    tokenizer = AutoTokenizer.from_pretrained(source)
    write_corpus(root / "corpus", [(text_file(), "public-domain")], tokenizer, tokenizer_name="bytes")
    return {name: root / name for name in ("source", "converted", "corpus")}


def arguments_of(folders: dict[str, Path], out: Path, *more: str) -> list[str]:
    return [
        *("--config", str(RECIPE), "--model", str(folders["converted"]), "--teacher", str(folders["source"])),
        *("--corpora", str(folders["corpus"]), "--output_dir", str(out), "--use_cpu", "true", *more),
    ]


def steps_of(folder: Path) -> list[dict[str, float]]:
    return [line for line in json.loads((folder / heal.RECORD_FILE).read_text())["log"] if "loss" in line]


def launch(*arguments: str) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu"]
    finished = subprocess.run(
        [*command, "-m", "ic_train.heal", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]


@pytest.fixture(scope="module")
def healed(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("healed") / "out"
    launch(*arguments_of(folders, out))
    return out


def test_healing_brings_the_student_nearer_to_its_teacher(healed: Path) -> None:
    steps = steps_of(healed)
    assert len(steps) == 6
    assert steps[-1]["distillation_loss"] < 0.9 * steps[0]["distillation_loss"]
    assert steps[-1]["hidden_loss"] < steps[0]["hidden_loss"]
    for step in steps:
        parts = 0.5 * step["text_loss"] + step["distillation_loss"] + 0.1 * step["hidden_loss"]
        assert step["loss"] == pytest.approx(parts, rel=1e-3)
        assert step["tokens_per_s"] > 0


def test_the_checkpoint_is_whole_and_says_how_it_came_to_be(healed: Path, folders: dict[str, Path]) -> None:
    model = ICForCausalLM.from_pretrained(healed)
    assert model.dtype == torch.bfloat16 and model.config.use_cache
    assert AutoTokenizer.from_pretrained(healed).chat_template
    record = json.loads((healed / heal.RECORD_FILE).read_text())
    assert record["tokens"] == 6 * 4 * 64
    assert record["teacher"] == "source" and record["model"] == "converted"
    assert record["corpora"][0]["sources"][0]["licence"] == "public-domain"
    assert (healed / "conversion.json").read_text() == (folders["converted"] / "conversion.json").read_text()


def test_a_resumed_run_repeats_the_uninterrupted_one(
    healed: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    checkpoint = str(healed / "checkpoint-3")
    # a process like the first: what tests before have done to this one changes last bits
    launch(*arguments_of(folders, tmp_path / "out", "--resume_from_checkpoint", checkpoint))
    whole, rest = steps_of(healed)[3:], steps_of(tmp_path / "out")[-3:]
    for name in ("loss", "learning_rate", "text_loss", "distillation_loss"):
        assert [step[name] for step in whole] == [step[name] for step in rest], name
    assert json.loads((tmp_path / "out" / heal.RECORD_FILE).read_text())["tokens"] == 6 * 4 * 64


def test_a_time_limit_ends_the_run_and_the_learning_rate_with_it(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    more = ("--max_seconds", "10", "--max_steps", "100000", "--save_strategy", "no", "--warmup_steps", "0")
    heal.main(arguments_of(folders, tmp_path / "out", *more))
    steps = steps_of(tmp_path / "out")
    assert 1 < len(steps) < 100_000
    rates = [step["learning_rate"] for step in steps]
    assert rates == sorted(rates, reverse=True) and rates[-1] < 0.2 * rates[0]
    assert json.loads((tmp_path / "out" / heal.RECORD_FILE).read_text())["wall_s"] < 30


def test_a_loss_that_is_no_number_ends_the_run(folders: dict[str, Path], tmp_path: Path) -> None:
    hot = ("--learning_rate", "1e30", "--max_grad_norm", "0", "--warmup_steps", "0", "--logging_steps", "100")
    with pytest.raises(
        SystemExit, match="error: the loss or its gradient became infinite or no number after"
    ):
        heal.main(arguments_of(folders, tmp_path / "out", *hot, "--save_strategy", "no"))
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_damaged_model_is_refused_by_its_name(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["converted"], tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(SystemExit, match=r"error: model .*cut cannot be read: "):
        heal.main(arguments_of(folders, tmp_path / "out", "--model", str(tmp_path / "cut")))


def test_text_alone_needs_no_teacher(folders: dict[str, Path], tmp_path: Path) -> None:
    more = ("--teacher", "", "--distillation_weight", "0", "--hidden_weight", "0", "--max_steps", "2")
    heal.main(arguments_of(folders, tmp_path / "out", *more))
    assert "distillation_loss" not in steps_of(tmp_path / "out")[-1]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_losses_and_gradients_against_plain_formulas(
    temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distillation_loss, "CHUNK_TOKENS", 4)
    torch.manual_seed(0)
    student, teacher, head, other = (torch.randn(*shape) for shape in ((9, 6), (9, 6), (11, 6), (11, 6)))
    student.requires_grad_()
    head.requires_grad_()
    labels = torch.randint(11, (9,))
    labels[3] = IGNORED
    weights = DistillationWeights(text=0.3, logits=0.7, temperature=temperature)
    total, text, kl = token_losses(student, head, labels, teacher, other, weights)
    found, wanted = student @ head.T, teacher @ other.T
    expected_text = F.cross_entropy(found, labels)
    p, q = (wanted / temperature).softmax(-1), (found / temperature).softmax(-1)
    divergences = temperature**2 * (p * (p / q).log()).sum(-1)
    expected_kl = divergences[labels != IGNORED].mean()
    torch.testing.assert_close(text, expected_text.detach())
    torch.testing.assert_close(kl, expected_kl.detach())
    own = torch.autograd.grad(2 * total, (student, head))
    plain = torch.autograd.grad(2 * (0.3 * expected_text + 0.7 * expected_kl), (student, head))
    torch.testing.assert_close(own, plain)
    assert total.item() == pytest.approx(0.3 * text.item() + 0.7 * kl.item())
    alone, text, kl = token_losses(student, head, labels, None, None, DistillationWeights())
    assert alone.item() == text.item() and kl.item() == 0


def test_distance_of_hidden_states() -> None:
    same = [torch.ones(1, 2, 3), torch.full((1, 2, 3), 2.0)]
    assert hidden_distance(same, same).item() == 0
    assert hidden_distance([torch.zeros(1, 2, 3)], [torch.full((1, 2, 3), 2.0)]).item() == 1


def test_a_lossless_student_has_no_distance_to_its_teacher(tmp_path: Path) -> None:
    source = source_folder(tmp_path / "source")
    converted(source, tmp_path / "out", rank=32, rope=32)
    student = ICForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    teacher, ids = source_model("llama, grouped"), token_ids(1, 50)
    with torch.no_grad():
        own, other = (
            model(ids, output_hidden_states=True, use_cache=False).hidden_states
            for model in (student, teacher)
        )
    assert len(own) == len(other) == 4
    assert float(hidden_distance(own, other)) < 1e-8


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--teacher", ""), "distillation_weight or hidden_weight is above 0; that needs a teacher"),
        (("--distillation_weight", "0", "--hidden_weight", "0"), "teacher is given; distillation_weight or"),
        (("--temperature", "0"), "temperature is 0.0; it must be above 0"),
        (("--text_weight", "-1"), "text_weight is -1.0; it must be at least 0"),
        (("--model", "no-folder"), "model is 'no-folder'; it must be the folder"),
        (("--corpora", "no-folder"), "no-folder is no corpus: it has no corpus.json"),
        (("--tokens_per_sequence", "100000"), "tokens_per_sequence is 100000; a corpus of 30300 tokens"),
        (("--corpus_weights", "1", "2"), r"corpus_weights is \[1.0, 2.0\]; it must have a number above 0"),
        (
            ("--max_seconds", "5", "--lr_scheduler_type", "constant"),
            "lr_scheduler_type is 'constant'; with max",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(
    more: tuple[str, ...], message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match=message):
        heal.main(arguments_of(folders, tmp_path / "out", *more))


def test_an_unknown_key_of_a_recipe_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("modle: x\n")
    with pytest.raises(SystemExit, match=r"unknown keys \['modle'\]"):
        heal.main(["--config", str(tmp_path / "recipe.yaml"), "--output_dir", str(tmp_path)])
