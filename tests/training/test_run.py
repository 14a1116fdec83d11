from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vlm2vec import Embedder, UserError
from vlm2vec.models.verification.golden import golden_inputs, verify_golden
from vlm2vec.training.config import Recipe, dump_recipe, load_recipe
from vlm2vec.training.resume import ORDER, changed_pairs
from vlm2vec.training.run import build_embedder, check_images, last_checkpoint, read_sets, train
from vlm2vec.training.trainer import ContrastiveTrainer, recipe_weights


def with_changes(values: dict[str, object], **changes: object) -> Recipe:
    """The fixture's recipe with some keys of its sections changed: `train={"steps": 3}`."""
    merged = json.loads(json.dumps(values))
    for section, change in changes.items():
        merged[section] = {**merged[section], **change} if isinstance(change, dict) else change
    return Recipe.model_validate(merged)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter_model.safetensors")


def assert_same_weights(one: Path, other: Path, **tolerance: float) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(
            first[name], second[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_a_run_lowers_the_loss_and_its_folder_loads_with_equal_vectors(recipe_values: dict[str, object]) -> None:
    folder = train(with_changes(recipe_values, data={"sets": ["Color"]}, train={"steps": 30, "learning_rate": 3e-3}))
    log = json.loads((folder / "log.json").read_text())
    assert log[-1]["loss"] < 0.7 * log[0]["loss"]
    loaded = Embedder.from_pretrained(folder, dtype=torch.float32)
    assert verify_golden(loaded, folder).min() > 0.99999
    again = folder.with_name("again")
    loaded.save_pretrained(again)
    inputs = golden_inputs()
    np.testing.assert_array_equal(
        Embedder.from_pretrained(again, dtype=torch.float32).encode(inputs), loaded.encode(inputs)
    )
    facts = json.loads((folder / "provenance.json").read_text())
    assert facts["pairs"] == {"Color": 16}
    assert load_recipe(folder / "recipe.yaml").train.steps == 30


def test_a_run_resumed_at_step_three_equals_the_uninterrupted_one(recipe_values: dict[str, object]) -> None:
    whole = train(with_changes(recipe_values))
    resumed = whole.with_name("resumed")
    stopped = resumed / "checkpoints" / "checkpoint-3"
    shutil.copytree(whole / "checkpoints" / "checkpoint-3", stopped)
    assert last_checkpoint(resumed) == stopped
    train(with_changes(recipe_values, output=str(resumed)), resume=True)
    assert_same_weights(whole, resumed, rtol=0, atol=0)
    logs = [json.loads((run / "log.json").read_text()) for run in (whole, resumed)]
    assert [entry["loss"] for entry in logs[0]] == [entry["loss"] for entry in logs[1]]


def kill_while_saving(recipe: Recipe, step: int) -> None:
    """Runs the recipe in a forked process that is killed in the middle of writing the checkpoint of a step."""
    child = os.fork()
    if child == 0:
        save = ContrastiveTrainer._save_rng_state

        def save_or_die(trainer: ContrastiveTrainer, folder: str) -> None:
            if trainer.state.global_step == step:
                os.kill(os.getpid(), signal.SIGKILL)
            save(trainer, folder)

        ContrastiveTrainer._save_rng_state = save_or_die
        train(recipe)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL


def test_a_run_killed_while_it_writes_a_checkpoint_goes_on_and_equals_the_uninterrupted_one(
    recipe_values: dict[str, object],
) -> None:
    changes = {"steps": 5, "save_steps": 2, "ema_decay": 0.8}
    more = {"train": changes, "loss": {"learn_temperature": True, "directions": "both"}}
    whole = train(with_changes({**recipe_values, "loss": {}}, **more))
    killed = with_changes({**recipe_values, "loss": {}}, **more, output=f"{whole}-killed")
    kill_while_saving(killed, step=4)
    checkpoints = killed.output / "checkpoints"
    assert (checkpoints / ".writing" / "checkpoint-4").is_dir()
    assert [path.name for path in checkpoints.glob("checkpoint-*")] == ["checkpoint-2"]
    train(killed, resume=True)
    assert_same_weights(whole, killed.output, rtol=0, atol=0)
    logs = [json.loads((run / "log.json").read_text()) for run in (whole, killed.output)]
    assert [entry["loss"] for entry in logs[0]] == [entry["loss"] for entry in logs[1]]
    assert not (checkpoints / ".writing").exists()
    last = weights(checkpoints / "checkpoint-5")  # the averaged weights are others than the last ones
    assert any(not torch.equal(last[name], value) for name, value in weights(whole).items())


def test_a_run_whose_loss_is_no_number_stops_with_the_step_and_the_rows(recipe_values: dict[str, object]) -> None:
    with pytest.raises(UserError, match=r"step \d+: .*original-00000-of-00001.parquet, row \d+"):
        train(with_changes(recipe_values, train={"learning_rate": 1e30, "max_grad_norm": 1e30, "warmup_steps": 0}))


def test_batches_do_not_depend_on_the_number_of_workers(recipe_values: dict[str, object], tmp_path: Path) -> None:
    found = []
    for num_workers in (0, 2):
        recipe = with_changes(recipe_values, data={"num_workers": num_workers})
        embedder, sets = build_embedder(recipe), read_sets(recipe)
        check_images(embedder, sets, "stop")  # workers inherit the features
        loader = ContrastiveTrainer(embedder, recipe, sets, tmp_path / "steps").get_train_dataloader()
        found.append([batch["pairs"] for batch in loader])
    assert len(found[0]) == 6
    for one, other in zip(*found, strict=True):
        assert one.origins == other.origins
        assert torch.equal(one.target_keys, other.target_keys)
        assert all(torch.equal(one.inputs[name], other.inputs[name]) for name in one.inputs.tensors)


def test_capped_sets_are_drawn_by_their_size_after_the_cap(recipe_values: dict[str, object]) -> None:
    sets = {"Color": {"max_pairs": 5}, "Find": {"weight": 2.0}}
    recipe = with_changes(recipe_values, data={"sets": sets, "max_pairs": 9})
    found = read_sets(recipe)
    assert {name: len(examples) for name, examples in found.items()} == {"Color": 5, "Find": 9}
    assert recipe_weights(recipe, {"Color": 5, "Find": 9}) == {"Color": 5.0, "Find": 2.0}


def test_the_same_seed_is_the_same_run_and_another_seed_is_not(recipe_values: dict[str, object]) -> None:
    output = Path(str(recipe_values["output"]))
    runs = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        runs[name] = train(with_changes(recipe_values, train={"seed": seed, "steps": 2}, output=f"{output}-{name}"))
    assert_same_weights(runs["a"], runs["b"], rtol=0, atol=0)
    with pytest.raises(AssertionError):
        assert_same_weights(runs["a"], runs["c"])


@pytest.mark.slow
def test_two_processes_see_and_learn_what_one_does(
    recipe_values: dict[str, object], tmp_path: Path, tiny_qwen2_vl: str
) -> None:
    # Without dropout, whose masks are drawn by each process for itself; the built-in model has some of its own.
    same = {"model": {"base": tiny_qwen2_vl, "options": {}}, "lora": {"dropout": 0.0}}
    same |= {"train": {"steps": 3, "save_steps": 100}, "data": {"sub_batch_size": 4}}
    alone = with_changes(recipe_values, **same, output=str(tmp_path / "alone"))
    pair = with_changes(recipe_values, **same, output=str(tmp_path / "pair"))
    train(alone)
    (tmp_path / "pair.yaml").write_text(dump_recipe(pair))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command += ["-m", "vlm2vec.cli", "train", str(tmp_path / "pair.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    logs = [json.loads((recipe.output / "log.json").read_text()) for recipe in (alone, pair)]
    np.testing.assert_allclose([e["loss"] for e in logs[1]], [e["loss"] for e in logs[0]], rtol=1e-4)
    np.testing.assert_allclose([e["grad_norm"] for e in logs[1]], [e["grad_norm"] for e in logs[0]], rtol=1e-3)
    assert_same_weights(alone.output, pair.output, rtol=1e-2, atol=1e-4)


def test_a_run_goes_on_from_the_adapter_of_another(recipe_values: dict[str, object]) -> None:
    first = train(with_changes(recipe_values))
    vectors = Embedder.from_pretrained(first, dtype=torch.float32).encode(golden_inputs())
    second = with_changes(recipe_values, model={"base": str(first)}, output=str(first.with_name("second")))
    np.testing.assert_allclose(build_embedder(second).eval().encode(golden_inputs()), vectors, atol=1e-6)
    loaded = Embedder.from_pretrained(train(second), dtype=torch.float32)
    assert verify_golden(loaded, second.output).min() > 0.99999
    assert weights(second.output).keys() == weights(first).keys()
    assert not np.allclose(loaded.encode(golden_inputs()), vectors, atol=1e-3)
    with pytest.raises(UserError, match=r"training continues it: set lora.rank=\d+ lora.alpha"):
        build_embedder(with_changes(recipe_values, model={"base": str(first)}, lora={"rank": 3}))
    with pytest.raises(UserError, match="has an adapter; merge it first"):
        build_embedder(with_changes(recipe_values, model={"base": str(first)}, lora=None))


def test_full_tuning_saves_all_weights_and_loads_them(recipe_values: dict[str, object]) -> None:
    folder = train(with_changes(recipe_values, lora=None, train={"steps": 2}))
    assert (folder / "model.safetensors").is_file()
    assert not (folder / "adapter_config.json").exists()
    assert verify_golden(Embedder.from_pretrained(folder, dtype=torch.float32), folder).min() > 0.99999


def test_the_dual_encoder_trains_by_the_same_recipe(recipe_values: dict[str, object]) -> None:
    model = {"base": "compact-dual", "options": {"num_layers": 1, "visual_tokens": 4, "image_size": 64}}
    changes = {"data": {"sets": ["Color"]}, "train": {"steps": 20, "learning_rate": 3e-3}}
    folder = train(with_changes(recipe_values, model=model, **changes))
    log = json.loads((folder / "log.json").read_text())
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]
    assert verify_golden(Embedder.from_pretrained(folder, dtype=torch.float32), folder).min() > 0.99999


def test_a_truncated_image_stops_the_run_before_the_first_step(
    recipe_values: dict[str, object], train_root: Path
) -> None:
    damaged = train_root / "images/Color/Train/green_5.png"
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(UserError, match=r"original-00000-of-00001.parquet, row 5, field qry_image_path: .*green_5.png"):
        train(with_changes(recipe_values))
    assert not Path(str(recipe_values["output"])).exists()


def test_skipped_images_are_counted_and_their_pairs_left_out(
    recipe_values: dict[str, object], train_root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (train_root / "images/Color/Train/green_5.png").unlink()
    folder = train(with_changes(recipe_values, data={"on_bad_image": "skip"}, train={"steps": 2}))
    assert "Color: 1 pairs left out" in caplog.text and "green_5.png" in caplog.text
    assert json.loads((folder / "provenance.json").read_text())["pairs"] == {"Color": 15, "Find": 15}


def test_a_second_run_into_the_same_folder_is_refused(recipe_values: dict[str, object]) -> None:
    recipe = with_changes(recipe_values, train={"steps": 2})
    train(recipe)
    with pytest.raises(UserError, match="already holds a run"):
        train(recipe)


def test_an_adapter_with_a_tensor_too_many_or_too_few_is_refused_by_name(recipe_values: dict[str, object]) -> None:
    from safetensors.torch import save_file

    folder = train(with_changes(recipe_values, train={"steps": 2}))
    state = weights(folder)
    name = sorted(state)[0]
    save_file({**state, "other.lora_A.weight": torch.zeros(2, 2)}, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"other\.lora_A\.weight was not used"):
        Embedder.from_pretrained(folder)
    save_file({key: value for key, value in state.items() if key != name}, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"is missing|was not used"):
        Embedder.from_pretrained(folder)


def test_a_streamed_set_trains_as_the_same_pairs_in_the_mmeb_layout(
    recipe_values: dict[str, object], tmp_path: Path
) -> None:
    root = tmp_path / "records"
    root.mkdir()
    whole = with_changes(recipe_values, data={"sets": ["Color"]}, train={"steps": 3}, output=str(tmp_path / "whole"))
    rows = []
    for example in read_sets(whole)["Color"]:
        sides = [
            {"text": item.text or "", "images": [str(image.path) for image in item.images]}
            for item in (example.query, example.target, *example.negatives)
        ]
        rows.append(json.dumps({"query": sides[0], "target": sides[1], "negatives": sides[2:]}))
    (root / "Color.jsonl").write_text("\n".join(rows))
    streamed = with_changes(
        recipe_values,
        data={"root": str(root), "num_workers": 1},
        train={"steps": 3},
        output=str(tmp_path / "streamed"),
    )
    train(whole)
    train(streamed)
    logs = [[e["loss"] for e in json.loads((r.output / "log.json").read_text())] for r in (whole, streamed)]
    np.testing.assert_allclose(logs[1], logs[0], rtol=1e-5)
    with pytest.raises(UserError, match="skip does not support streamed sets"):
        train(with_changes(recipe_values, data={"root": str(root), "on_bad_image": "skip"}))


def test_resuming_says_what_changed_and_takes_the_new_learning_rate(
    recipe_values: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    run = train(with_changes(recipe_values, train={"steps": 3}))
    train(with_changes(recipe_values, train={"steps": 5, "learning_rate": 5e-4, "batch_size": 4}), resume=True)
    assert "train.batch_size 8 -> 4" in caplog.text and "train.learning_rate 0.001 -> 0.0005" in caplog.text
    assert "this changes the order of the examples" in caplog.text
    log = json.loads((run / "log.json").read_text())
    assert [entry["step"] for entry in log] == [1, 2, 3, 4, 5]
    assert log[3]["learning_rate"] == pytest.approx(5e-4 * 2 / 4)  # linear to zero, one step of warmup


def test_resuming_with_equal_settings_says_nothing(
    recipe_values: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    recipe = with_changes(recipe_values, train={"steps": 3})
    train(recipe)
    last = last_checkpoint(recipe.output)
    assert last and all(json.loads((last / "pairs.json").read_text()).values())
    train(recipe, resume=True)
    assert "resuming with other" not in caplog.text


def test_resuming_says_which_sets_have_other_pairs(tmp_path: Path) -> None:
    (tmp_path / "pairs.json").write_text('{"a": 3, "b": 2}')
    said = changed_pairs(tmp_path, {"a": range(3), "b": range(5), "new": range(1)})
    assert said == ["b had 2 pairs and has 5", ORDER]
    assert changed_pairs(tmp_path, {"a": range(3)}) == changed_pairs(tmp_path / "earlier", {"a": range(3)}) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": {"rank": 2}}, r"checkpoint-2: cannot resume with lora.rank 4 -> 2; restore"),
        ({"lora": None}, r"cannot resume with .*lora.rank 4 -> None"),
        ({"model": {"pooling": "mean"}}, r"cannot resume with model.pooling None -> mean"),
        ({"train": {"ema_decay": 0.9}}, r"cannot resume with train.ema_decay None -> 0.9"),
        ({"train": {"steps": 1, "warmup_steps": 0}}, r"already trained for 2 steps, train.steps is 1; raise"),
    ],
)
def test_what_cannot_be_resumed_is_one_line(
    recipe_values: dict[str, object], changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "run/checkpoints/checkpoint-2"
    checkpoint.mkdir(parents=True)
    (checkpoint / "recipe.yaml").write_text(dump_recipe(with_changes(recipe_values, train={"steps": 2})))
    with pytest.raises(UserError, match=message) as caught:
        train(with_changes(recipe_values, **{"train": {"steps": 4}, **changes}), resume=True)
    assert "\n" not in str(caught.value)
