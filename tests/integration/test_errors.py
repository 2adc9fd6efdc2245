"""What a user can mend ends with status 2 and one line that says where and how, before anything is overwritten."""

import json
import shutil
import subprocess
import sys

import pytest
from sentencepiece import sentencepiece_model_pb2
from tiny import ROOT, copy_stages, files, run_main, tiny_config, write_config

from rlhf_jax import pipeline
from rlhf_jax.errors import UserError

EIGHT = {"JAX_NUM_CPU_DEVICES": "8"}


def refused(config, workdir, *flags, **environment):
    """The one line of a refused command; nothing was written into the work directory."""
    before = files(workdir) if workdir.exists() else None
    done = run_main(config, workdir, *flags, environment=environment)
    lines = done.stderr.splitlines()
    assert done.status == 2, done.stderr[-3000:]
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr[-3000:]
    assert (files(workdir) if workdir.exists() else None) == before
    return lines[0]


# ------------------------------------------------ by the real command ------------------------------------------------


def test_help_tells_how_it_is_called_and_every_flag():
    command = [sys.executable, "-m", "rlhf_jax.main", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--config=FILE" in done.stdout and done.stderr == ""
    assert all(f"--{flag}" in done.stdout for flag in ("workdir", "[no]dry_run", "topology", "coordinator"))


def test_an_unknown_field_in_the_file_names_the_nearest(source, tmp_path):
    extra = 'config.stages.sft = stage("sft", init="pretrain", data="prepare/sft.jsonl", bach_size=8)'
    line = refused(write_config(tmp_path / "typo.py", source, extra=extra), tmp_path / "work")
    assert "sft.bach_size" in line and 'did you mean "batch_size"?' in line


@pytest.mark.parametrize(
    "flag, nearest",
    [
        ("--config.stages.sft.bach_size=1", "batch_size"),
        ("--config.stages.sft.optimizer.lerning_rate=1", "learning_rate"),
        ("--config.sede=1", "seed"),
    ],
)
def test_an_unknown_field_on_the_command_line_names_the_nearest(config_file, tmp_path, flag, nearest):
    line = refused(config_file, tmp_path / "work", flag)
    assert flag.split("=")[0].removeprefix("--config.") in line
    assert nearest in line


def test_a_value_of_another_type_names_the_field(config_file, tmp_path):
    line = refused(config_file, tmp_path / "work", "--config.stages.sft.batch_size=eight")
    assert "stages.sft.batch_size" in line and "eight" in line


def test_a_missing_config_file_is_named(tmp_path):
    line = refused(tmp_path / "nowhere.py", tmp_path / "work")
    assert str(tmp_path / "nowhere.py") in line


@pytest.mark.parametrize(
    "text, what",
    [
        ("def get_config(:\n", "broken.py, line 1"),
        ("import a_module_that_is_not_there\n", "a_module_that_is_not_there"),
        ("config = 1\n", "get_config"),
    ],
)
def test_a_broken_config_file_is_named_with_what_is_wrong(tmp_path, text, what):
    (tmp_path / "broken.py").write_text(text)
    assert what in refused(tmp_path / "broken.py", tmp_path / "work")


def test_the_work_directory_must_be_given(config_file, tmp_path):
    assert "--workdir" in refused(config_file, tmp_path / "work", "--workdir=")


def test_an_argument_that_is_no_flag_is_named(config_file, tmp_path):
    assert '"stray"' in refused(config_file, tmp_path / "work", "stray")


def test_a_batch_that_does_not_divide_over_the_mesh_names_both_numbers(config_file, tmp_path):
    line = refused(config_file, tmp_path / "work", "--config.stages.sft.batch_size=12", **EIGHT)
    assert "stages.sft" in line and "12 rows" in line and "8 devices" in line


def test_a_mesh_that_does_not_fill_the_devices_names_both_numbers(config_file, tmp_path):
    flags = ("--config.stages.reward.mesh.data=2", "--config.stages.reward.mesh.fsdp=3")
    line = refused(config_file, tmp_path / "work", *flags, **EIGHT)
    assert "data 2, fsdp 3, tensor 1" in line and "8 devices" in line


def test_a_malformed_record_is_named_by_file_and_line(source, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion"\n')
    config = write_config(tmp_path / "mine.py", source, extra=f"config.stages.sft.data = {str(path)!r}")
    line = refused(config, tmp_path / "work")
    assert f"{path}:2: malformed JSON" in line


def test_a_changed_stage_is_refused_by_name_with_both_values(finished, source, config_file, tmp_path):
    old = tiny_config(str(source)).stages.pretrain.optimizer.learning_rate
    workdir = copy_stages(finished[0], tmp_path / "work", ("prepare", "pretrain", "sft"))
    shutil.copy(finished[0] / "config.json", workdir)
    line = refused(config_file, workdir, "--config.stages.pretrain.optimizer.learning_rate=0.5")
    assert "stage pretrain" in line
    assert f"optimizer.learning_rate was {old} and is now 0.5" in line


# ----------------------------------------------------- in process -----------------------------------------------------


@pytest.fixture
def config(source):
    """The tiny job, its batches wide enough for the eight devices of the tests' process."""
    config = tiny_config(str(source))
    config.stages.ppo.batch_size = 16
    return config


def refused_run(config, workdir):
    """The message of a run that is refused; nothing was written into the work directory."""
    before = files(workdir) if workdir.exists() else None
    with pytest.raises(UserError) as caught:
        pipeline.run(config, workdir)
    assert (files(workdir) if workdir.exists() else None) == before
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_changed_seed_is_refused_with_both_values(finished, config, tmp_path):
    workdir = copy_stages(finished[0], tmp_path / "work", ("prepare",))
    config.seed = 7
    assert "seed was 0 and is now 7" in refused_run(config, workdir)


def test_an_unknown_field_of_the_experiment_is_refused(config, tmp_path):
    config.sede = 1
    assert 'did you mean "seed"?' in refused_run(config, tmp_path / "work")


def test_an_unknown_field_of_logging_is_refused(config, tmp_path):
    config.logging.evry = 5
    assert 'did you mean "every"?' in refused_run(config, tmp_path / "work")


@pytest.mark.parametrize("field", ["logging.every", "stages.sft.checkpoint.every", "stages.ppo.evaluation.every"])
def test_a_period_of_zero_is_refused(config, tmp_path, field):
    config.update_from_flattened_dict({field: 0})
    message = refused_run(config, tmp_path / "work")
    assert field in message and "0" in message


def test_a_reference_to_no_stage_names_the_nearest(config, tmp_path):
    config.stages.ppo.reward = "rewrd"
    message = refused_run(config, tmp_path / "work")
    assert "stages.ppo.reward" in message and 'did you mean "reward"?' in message


def test_a_data_file_of_no_stage_is_refused_before_anything_runs(config, tmp_path):
    config.stages.sft.data = "prepaer/sft.jsonl"
    assert "prepaer/sft.jsonl" in refused_run(config, tmp_path / "work")


def test_a_file_that_its_stage_does_not_make_is_refused_before_anything_runs(config, tmp_path):
    config.stages.sft.data = "prepare/stf.jsonl"
    assert "prepare/stf.jsonl" in refused_run(config, tmp_path / "work")


def test_circular_references_are_refused_with_the_stages_in_them(config, tmp_path):
    config.stages.pretrain.update(init="sft", schema="completion", loss_on="all")
    message = refused_run(config, tmp_path / "work")
    assert "circle" in message and "pretrain" in message and "sft" in message


@pytest.mark.parametrize("field, value", [("top_k", 5), ("top_p", 0.9)])
def test_training_on_a_truncated_support_is_refused(config, tmp_path, field, value):
    config.stages.ppo[field] = value
    message = refused_run(config, tmp_path / "work")
    assert "stages.ppo" in message and f"{field} {value}" in message


def test_an_empty_data_file_is_refused(config, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    config.stages.reward.data = str(tmp_path / "empty.jsonl")
    assert f"{tmp_path / 'empty.jsonl'}: no record" in refused_run(config, tmp_path / "work")


def test_a_missing_data_file_is_refused(config, tmp_path):
    config.stages.sft.evaluation.data = str(tmp_path / "nowhere.jsonl")
    assert f"{tmp_path / 'nowhere.jsonl'}: no such file" in refused_run(config, tmp_path / "work")


def test_minibatches_that_do_not_divide_name_both_numbers(config, tmp_path):
    config.stages.ppo.update(batch_size=8, minibatches=3)
    message = refused_run(config, tmp_path / "work")
    assert "batch_size 8" in message and "3 minibatches" in message


def only(config, *names):
    for name in [name for name in config.stages if name not in names]:
        del config.stages[name]


def fails(config, workdir):
    """The message of a run that fails when the stage is reached."""
    with pytest.raises(UserError) as caught:
        pipeline.run(config, workdir)
    return str(caught.value)


def test_a_tokenizer_whose_pad_is_its_eos_is_refused(finished, config, tmp_path):
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString((finished[0] / "prepare" / "tokenizer.model").read_bytes())
    model.trainer_spec.pad_piece = model.trainer_spec.eos_piece
    (tmp_path / "pad_is_eos.model").write_bytes(model.SerializeToString())
    only(config, "prepare", "pretrain")
    config.stages.pretrain.tokenizer = str(tmp_path / "pad_is_eos.model")
    workdir = copy_stages(finished[0], tmp_path / "work", ("prepare",))
    message = fails(config, workdir)
    assert "pad, bos and eos must be three different ids, got pad=2 bos=1 eos=2" in message


def test_a_prompt_longer_than_the_context_is_refused(finished, config, tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"prompt": "a" * 3}) + "\n" + json.dumps({"prompt": "q" * 500}) + "\n")
    only(config, "prepare", "pretrain", "sft", "reward", "ppo")
    config.stages.ppo.data = str(path)
    workdir = copy_stages(finished[0], tmp_path / "work", ("prepare", "pretrain", "sft", "reward"))
    message = fails(config, workdir)
    assert f"{path}: prompt 2 has" in message and "context 112" in message


def test_a_record_longer_than_the_sequence_is_refused(finished, config, tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"prompt": "q" * 500, "completion": "a"}) + "\n")
    only(config, "prepare", "pretrain", "sft")
    config.stages.sft.data = str(path)
    workdir = copy_stages(finished[0], tmp_path / "work", ("prepare", "pretrain"))
    message = fails(config, workdir)
    assert f"{path}: record 1 has" in message and "sequence_length 112" in message


@pytest.fixture
def one_more(finished, config, tmp_path):
    """A config and a work directory where sft is next and reads the model of pretrain."""
    only(config, "prepare", "pretrain", "sft")
    return config, copy_stages(finished[0], tmp_path / "work", ("prepare", "pretrain"))


def change_info(workdir, change):
    path = workdir / "pretrain" / "model.json"
    info = json.loads(path.read_text())
    change(info)
    path.write_text(json.dumps(info))


def test_weights_of_another_shape_than_their_description_are_refused(one_more):
    config, workdir = one_more
    change_info(workdir, lambda info: info["model"].update(ffn=128))
    assert "holds another model than its model.json says" in fails(config, workdir)


def test_weights_that_are_not_the_described_ones_are_refused(one_more):
    config, workdir = one_more
    change_info(workdir, lambda info: info["fingerprints"].update(base="0" * 16))
    message = fails(config, workdir)
    assert "pretrain/model" in message and "0" * 16 in message


def test_a_missing_model_is_refused(one_more):
    config, workdir = one_more
    shutil.rmtree(workdir / "pretrain" / "model")
    assert "pretrain/model is missing" in fails(config, workdir)


def test_a_checkpoint_of_another_shape_is_refused(finished, one_more):
    config, workdir = one_more
    shutil.copytree(finished[0] / "reward" / "checkpoints", workdir / "sft" / "checkpoints")
    assert "checkpoint" in fails(config, workdir)


def test_a_checkpoint_of_another_stage_is_refused(finished, one_more):
    config, workdir = one_more
    shutil.copytree(finished[0] / "sft_control" / "checkpoints", workdir / "sft" / "checkpoints")
    assert "sft/checkpoints/latest holds a checkpoint of another stage" in fails(config, workdir)
