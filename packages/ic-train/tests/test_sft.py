"""The trainer as people start it, `accelerate launch -m ic_train.sft --config RECIPE`, on the CPU."""

import json
import subprocess
import sys
from pathlib import Path

import ic_model
import pytest
import torch
from ic_model.presets import preset
from ic_model.testing import assert_close, compare
from transformers import AutoModelForCausalLM, AutoTokenizer

from ic_train import sft

RECIPE = Path(__file__).parent / "recipes" / "toy.yaml"


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu"]
    return subprocess.run(
        [*command, "-m", "ic_train.sft", "--config", str(RECIPE), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def steps_of(folder: Path) -> list[dict[str, float]]:
    record = json.loads((folder / sft.RECORD_FILE).read_text())
    return [line for line in record["log"] if "loss" in line]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("run") / "ic-nano"
    finished = launch("--output_dir", str(folder))
    assert finished.returncode == 0, finished.stderr[-3000:]
    return folder, finished.stdout + finished.stderr


def test_the_log_shows_progress_accuracy_speed_and_stage(trained: tuple[Path, str]) -> None:
    folder, output = trained
    assert "4/4" in output  # the progress bar's end
    steps = steps_of(folder)
    assert [step["stage"] for step in steps] == ["short", "short", "skip", "skip"]
    assert all(step["tokens_per_s"] > 0 and 0 <= step["answer_accuracy"] <= 1 for step in steps)
    assert [step["learning_rate"] for step in steps] == pytest.approx([0.5e-3, 1e-3, 1e-3, 0.5e-3])


def test_the_checkpoint_loads_and_its_record_says_how_it_came_to_be(trained: tuple[Path, str]) -> None:
    folder, _ = trained
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert model.config.use_cache
    assert model.config.architectures == ["InfiniteContextForCausalLM"]
    assert AutoTokenizer.from_pretrained(folder)("é").input_ids == list("é".encode())
    record = json.loads((folder / sft.RECORD_FILE).read_text())
    assert record["seed"] == 7
    assert record["commit"] is None or len(record["commit"]) == 40
    assert record["parameters"] == model.num_parameters()
    assert record["corpus"]["bytes"] == 1_000_000
    assert {"torch", "transformers", "accelerate", "python"} <= set(record["versions"])
    assert record["command"].startswith("accelerate launch -m ic_train.sft --config")


def test_a_resumed_run_repeats_the_uninterrupted_one_exactly(
    trained: tuple[Path, str], tmp_path: Path
) -> None:
    folder, _ = trained
    resumed = launch(
        *("--output_dir", str(tmp_path)),
        *("--resume_from_checkpoint", str(folder / "checkpoint-2")),
        *("--final_score_factor", "2.0"),
    )
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    whole, rest = steps_of(folder)[2:], steps_of(tmp_path)[-2:]
    for name in ("loss", "grad_norm", "learning_rate", "answer_accuracy"):
        assert [step[name] for step in whole] == [step[name] for step in rest], name
    same = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for name, value in AutoModelForCausalLM.from_pretrained(tmp_path).state_dict().items():
        # a power of two is exact in bfloat16; the factor reaches the queries and nothing else
        assert torch.equal(value, same[name] * (2 if name.endswith("q_proj.weight") else 1)), name
    assert json.loads((tmp_path / sft.RECORD_FILE).read_text())["final_score_factor"] == 2.0


@pytest.mark.parametrize("q_lora_rank", [None, 64])
def test_scaling_the_scores_scales_every_softmax(q_lora_rank: int | None) -> None:
    config = preset("ic-nano")
    config.num_hidden_layers, config.q_lora_rank, config.initializer_range = 2, q_lora_rank, 0.2
    model = ic_model.ICForCausalLM(config).eval()
    token_ids = torch.randint(256, (1, 100))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.scaling *= 2
        expected = model(token_ids).logits
        for layer in model.model.layers:
            layer.self_attn.scaling /= 2
        assert compare(model(token_ids).logits, expected).relative_norm > 1e-3
        sft.scale_scores(model, 2.0)
        assert_close(model(token_ids).logits, expected, "fp32_peer")


def test_a_stage_below_its_bar_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = RECIPE.read_text().replace("max_questions: 2}", "max_questions: 2, min_answer_accuracy: 0.5}")
    (tmp_path / "recipe.yaml").write_text(recipe)
    with pytest.raises(RuntimeError, match=r"stage 'short' ended at step 2 with 0\.0% .* asks for 50\.0%"):
        sft.main(["--config", str(tmp_path / "recipe.yaml"), "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out" / sft.RECORD_FILE).exists()


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (None, r"config .*recipe.yaml cannot be read: .*No such file"),
        ("stages: [", r"config .*recipe.yaml cannot be read: while parsing"),
        ("- a", r"config .*recipe.yaml holds list; accepted: lines of"),
        ("presett: ic-nano", r"config .*recipe.yaml has unknown keys \['presett'\]"),
        ("task: chess", "task is 'chess'; accepted: 'passkey', 'text'"),
    ],
)
def test_a_recipe_that_cannot_be_read_is_refused_by_its_name(
    recipe: str | None, message: str, tmp_path: Path
) -> None:
    if recipe is not None:
        (tmp_path / "recipe.yaml").write_text(recipe)
    with pytest.raises(SystemExit, match=f"error: {message}"):
        sft.main(["--config", str(tmp_path / "recipe.yaml"), "--output_dir", str(tmp_path / "out")])


def test_resume_auto_goes_on_from_the_last_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    monkeypatch.setattr(sft, "train", lambda config, arguments, *_, **__: found.append(arguments))
    command = ["--config", str(RECIPE), "--output_dir", str(tmp_path)]
    sft.main([*command, "--resume", "auto"])
    for number in (9, 10, 11):
        (tmp_path / f"checkpoint-{number}").mkdir()
        if number != 11:
            (tmp_path / f"checkpoint-{number}" / "trainer_state.json").write_text("{}")
    sft.main([*command, "--resume", "auto"])
    # as in slurm/job.sh, whose own flag comes first
    sft.main([*command, "--resume", "auto", "--resume", str(tmp_path / "checkpoint-9")])
    sft.main([*command, "--resume_from_checkpoint", "elsewhere"])
    resumed = [one.resume_from_checkpoint for one in found]
    assert resumed == [None, str(tmp_path / "checkpoint-10"), str(tmp_path / "checkpoint-9"), "elsewhere"]
    with pytest.raises(SystemExit, match=r"resume is .*checkpoint-11', which has no trainer_state.json"):
        sft.main([*command, "--resume", str(tmp_path / "checkpoint-11")])
    with pytest.raises(SystemExit, match="resume_from_checkpoint is 'x' and resume is 'auto'; give one"):
        sft.main([*command, "--resume", "auto", "--resume_from_checkpoint", "x"])


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path) -> None:
    hot = [
        "--hidden_matrices",
        "optim",
        "--learning_rate",
        "1e30",
        "--max_grad_norm",
        "0",
        "--warmup_steps",
        "0",
    ]
    with pytest.raises(
        SystemExit, match="error: the loss or its gradient became infinite or no number after"
    ):
        sft.main(["--config", str(RECIPE), "--output_dir", str(tmp_path), *hot])
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max_steps", "10"], "max_steps is 10; the stages have 4 steps"),
        (["--per_device_train_batch_size", "8"], "per_device_train_batch_size is 8; it must be 1"),
        (["--gradient_accumulation_steps", "2"], "gradient_accumulation_steps is 2; it must be 1"),
        (["--lr_scheduler_type", "cosine"], "lr_scheduler_type is .*cosine.*; leave it out"),
        (["--corpus_paths", "/no/such/folder"], "corpus paths .*/no/such/folder.* do not exist"),
        (["--preset", "ic-nona"], "ic-nona"),
        (["--final_score_factor", "0"], "final_score_factor is 0.0; it must be a positive"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match=message):
        sft.main(["--config", str(RECIPE), "--output_dir", str(tmp_path), *arguments])
