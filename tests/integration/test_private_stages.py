"""Private stages by the real command: what they write, cut and taken up again, and what is refused."""

import json
import shutil
import signal

import pytest
from tiny import Command, copy_stages, metrics, model_info, reached, result, run_main, status_name, write_config

STAGES = ("private_sft", "private_reward", "private_ppo", "private_dpo")
JOB = """
from rlhf_jax.config import experiment
whole, config = config, experiment(seed=0)
config.logging.update(every=1, tensorboard=False)
for name in ("prepare", "pretrain"):
    config.stages[name] = whole.stages[name]
config.privacy.update(public=("prepare",))
shared = dict(batch_size=8, accumulation=2, checkpoint=dict(every=2))
lora = dict(rank=2, targets=("q", "v"))
calibrated = dict(epsilon=8.0, delta=1e-3)
privacy = dict(**calibrated, noise_multiplier=2.0)
config.stages.private_sft = stage(
    "sft", init="pretrain", data={tasks!r}, packing=False, sequence_length=112, **shared, lora=lora,
    privacy=dict(**calibrated, unit="author", contribution=2, released_share=0.1),
    evaluation=dict(data="prepare/heldout.jsonl", records=8, every=3),
)
config.stages.private_reward = stage(
    "reward", init="pretrain", data={pairs!r}, schema="preference", **shared, max_new_tokens=8,
    rollout_batch_size=8, calibration_prompts=8, privacy=privacy,
    evaluation=dict(data={public_pairs!r}, records=8, every=3),
)
config.stages.private_ppo = stage(
    "ppo", init="private_sft", reward="private_reward", data={prompts!r}, iterations=3, batch_size=16, samples=2,
    minibatches=2, epochs=2, max_new_tokens=8, estimator="rloo", kl_controller="adaptive", lora=lora,
    missing_end="add", checkpoint=dict(every=1), privacy=dict(**privacy, released_share=0.2),
    evaluation=dict(data="prepare/heldout.jsonl", records=8, every=2),
)
config.stages.private_dpo = stage(
    "preference", init="pretrain", data={others!r}, **shared, lora=lora, privacy=privacy,
    evaluation=dict(data={public_pairs!r}, records=8, every=3, metric=""),
)
"""


@pytest.fixture(scope="module")
def config(finished, source, tmp_path_factory):
    """The config file of a job whose four private stages read records of four disjoint files."""
    folder = tmp_path_factory.mktemp("private")
    lines = (finished[0] / "prepare" / "preference.jsonl").read_text().splitlines()
    tasks = [json.loads(line) for line in lines]
    for number, task in enumerate(tasks):
        task |= {"prompt": f"# {number}\n{task['prompt'][:40]}", "author": f"author {number % 9}"}
    pairs = [{"prompt": t["prompt"], "chosen": t["completion"], "rejected": t["completion"][::-1]} for t in tasks]
    files = {
        "tasks": tasks[:12] + [{**tasks[0], "author": "author 3"}],
        "pairs": pairs[12:24],
        "others": pairs[24:36],
        "prompts": tasks[36:44],
        "public_pairs": pairs[44:],
    }
    paths = {name: str(folder / f"{name}.jsonl") for name in files}
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    extra = JOB.format(**paths) + f"config.privacy.public = ('prepare', {paths['public_pairs']!r})"
    return write_config(folder / "job.py", source, extra=extra, stages=("prepare", "pretrain"))


@pytest.fixture(scope="module")
def whole(config, finished, tmp_path_factory):
    """The work directory of the job without a cut."""
    workdir = copy_stages(finished[0], tmp_path_factory.mktemp("whole") / "work", ("prepare", "pretrain"))
    done = run_main(config, workdir)
    assert done.status == 0, done.stderr[-3000:]
    return workdir


@pytest.fixture(scope="module")
def cut(config, whole, tmp_path_factory):
    """The work directory of the same run, with its secret root, killed in private_ppo."""
    workdir = copy_stages(whole, tmp_path_factory.mktemp("cut") / "work", ("prepare", "pretrain", *STAGES))
    restart(whole, workdir, "private_ppo")
    kill_in(config, workdir, "private_ppo", 4)
    assert run_main(config, workdir).status == 0
    return workdir


def restart(whole, workdir, name):
    """A stage as it was before its first step: its run has a root, a nonce and a claim, and nothing else."""
    shutil.copy2(whole / "privacy.key", workdir)
    shutil.rmtree(workdir / name)
    (workdir / name).mkdir()
    shutil.copy(whole / name / "private.json", workdir / name)


def kill_in(config, workdir, name, step):
    done = Command(config, workdir).signal_when(reached(workdir, name, step), signal.SIGKILL)
    assert status_name(done.status) == "SIGKILL", done.stderr[-3000:]
    assert not (workdir / name / "result.json").exists()
    runs = json.loads((workdir / "privacy.json").read_text())["runs"]  # what it drew counts, be its folder deleted now
    assert {run["stage"]: run["state"] for run in runs.values()}[name] == "begun"


def assert_same(workdir, whole, name):
    """The same batches, noise and spending: else weights and logs would differ."""
    assert model_info(workdir, name)["fingerprints"] == model_info(whole, name)["fingerprints"]
    assert metrics(workdir, name) == metrics(whole, name)
    assert result(workdir, name)["figures"] == result(whole, name)["figures"]


def test_a_killed_private_stage_ends_as_an_uncut_one(cut, whole):
    assert_same(cut, whole, "private_ppo")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["private_sft", "private_reward", "private_dpo"])
def test_every_other_private_stage_too(config, whole, tmp_path, name):
    workdir = copy_stages(whole, tmp_path / "work", ("prepare", "pretrain", *STAGES))
    restart(whole, workdir, name)
    kill_in(config, workdir, name, 1)
    assert run_main(config, workdir).status == 0
    assert_same(workdir, whole, name)


def test_a_cut_run_is_in_the_ledger_once(cut, whole):
    def ledger(workdir):
        return json.loads((workdir / "privacy.json").read_text())

    assert ledger(cut)["claim"] == ledger(whole)["claim"]
    assert {run["state"] for run in ledger(cut)["runs"].values()} == {"finished"}
    assert [run["stage"] for run in ledger(cut)["runs"].values()] == list(STAGES)


def test_disjoint_stages_claim_the_dearest_one(whole):
    ledger = json.loads((whole / "privacy.json").read_text())
    spent = [run["claim"]["epsilon"] for run in ledger["runs"].values()]
    assert ledger["claim"]["epsilon"] == max(spent) == spent[0] and 7.9 < spent[0] <= 8.0
    assert all(0 < epsilon < 7.9 for epsilon in spent[1:])
    assert ledger["stages"]["private_ppo"] == "private" and ledger["stages"]["pretrain"] == "public"


def test_logs_hold_only_what_was_released(whole):
    allowed = {"step", "loss/train", "objective/kl", "objective/scores", "objective/kl_coef", "privacy/epsilon"}
    for name in STAGES:
        for row in metrics(whole, name):
            kept = {key for key in row if not key.startswith(("optimizer/", "eval/")) and not key.endswith("/eval")}
            assert kept <= allowed
    assert "loss/train" in metrics(whole, "private_sft")[1]
    assert "loss/train" not in metrics(whole, "private_reward")[1]
    assert "filled" not in result(whole, "private_sft")["figures"]


def test_epsilon_grows_to_the_claim(whole):
    for name in STAGES:
        told = [row["privacy/epsilon"] for row in metrics(whole, name) if "privacy/epsilon" in row]
        assert told == sorted(told) and told[-1] == result(whole, name)["figures"]["privacy"]["epsilon"]


def test_units_are_authors_with_so_many_records_each(whole):
    assert result(whole, "private_sft")["figures"]["privacy"]["units"] == 9
    assert json.loads((whole / "private_sft" / "private.json").read_text())["data"]["unit"] == "author"


def test_the_coefficient_follows_the_released_kl(whole):
    rows = [row for row in metrics(whole, "private_ppo") if "objective/kl_coef" in row]
    for before, after in zip(rows, rows[1:], strict=False):
        error = min(max(before["objective/kl"] / 6.0 - 1, -0.2), 0.2)
        assert after["objective/kl_coef"] == pytest.approx(before["objective/kl_coef"] * (1 + error * 16 / 10_000))


def test_the_root_is_secret_and_in_nothing_that_is_shown(whole):
    assert (whole / "privacy.key").stat().st_mode & 0o777 == 0o600
    words = (whole / "privacy.key").read_text().split()
    for name in ("config.json", "privacy.json", "summary.json", "report.html"):
        assert not any(word in (whole / name).read_text() for word in words)


def test_the_report_says_what_is_covered_and_what_is_not(whole):
    page = (whole / "report.html").read_text()
    assert "Covered: the models of private_sft, private_reward, private_ppo, private_dpo" in page
    assert "Not covered, declared public: " in page


def refused(config, workdir, *flags):
    done = run_main(config, workdir, *flags)
    assert done.status == 2, done.stdout[-2000:]
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    return line


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("stages.private_sft.privacy.unit=writer", 'record 1 has no field "writer"'),
        ("stages.private_sft.packing=True", "set packing=False"),
        ("stages.private_dpo.privacy.delta=0.1", "stages.private_dpo.privacy.delta 0.1 is not below 1/12"),
        ("stages.private_reward.privacy.epsilon=0.0", "delta 0.001: give the epsilon"),
        ("stages.private_ppo.privacy.released_share=0.0", 'set it to "fixed"'),
    ],
)
def test_what_cannot_be_private_is_refused_before_anything_runs(config, tmp_path, flag, said):
    assert said in refused(config, tmp_path / "work", f"--config.{flag}")  # and with no work directory made
    assert not (tmp_path / "work").exists()


def test_other_data_at_resume_is_refused(config, whole, tmp_path):
    """The same noise over two data sets would show their difference."""
    workdir = copy_stages(whole, tmp_path / "work", ("prepare", "pretrain", *STAGES))
    shutil.copy2(whole / "privacy.key", workdir)
    (workdir / "private_ppo" / "result.json").unlink()
    claim = json.loads((workdir / "private_ppo" / "private.json").read_text())
    claim["data"]["digest"] = claim["data"]["digest"][::-1]
    (workdir / "private_ppo" / "private.json").write_text(json.dumps(claim))
    assert "private_ppo: the training data is not what this private stage was begun with" in refused(config, workdir)


@pytest.mark.slow  # the ledger's own test is in tests/stages/test_provenance.py
def test_a_deleted_stage_still_counts(config, whole, tmp_path):
    workdir = copy_stages(whole, tmp_path / "work", ("prepare", "pretrain", *STAGES))
    for name in ("privacy.key", "privacy.json"):
        shutil.copy2(whole / name, workdir)
    shutil.rmtree(workdir / "private_dpo")
    assert run_main(config, workdir).status == 0
    ledger = json.loads((workdir / "privacy.json").read_text())
    states = [run["state"] for run in ledger["runs"].values() if run["stage"] == "private_dpo"]
    assert sorted(states) == ["deleted", "finished"]
    groups = {tuple(group["stages"]): group["runs"] for group in ledger["claim"]["groups"]}
    assert groups["private_dpo",] == 2
    assert "1 earlier run" in " ".join(ledger["statement"])


@pytest.mark.slow
def test_private_stages_and_their_audit_on_a_mesh_are_those_of_one_device(config, whole, tmp_path):
    """Four devices, two ways of sharding: the same batches and noise, and so the same run up to rounding.

    An audit draws noise of its own, whose size it tells from 180 idle coordinates: to 5 % or so.
    """
    audited = tmp_path / "audited.py"
    kind = 'stage("audit", subject="private_sft", canaries=20, idle=90)'
    audited.write_text(
        f"import runpy\nfrom rlhf_jax.config import stage\ndef get_config():\n"
        f"    config = runpy.run_path({str(config)!r})['get_config']()\n"
        f"    config.stages.audit = {kind}\n    return config\n"
    )
    alone = copy_stages(whole, tmp_path / "alone", ("prepare", "pretrain", *STAGES))
    for name in STAGES:
        restart(whole, alone, name)
    spread = tmp_path / "spread"
    shutil.copytree(alone, spread)
    flags = [f"--config.stages.{name}.mesh.{axis}=2" for name in STAGES for axis in ("data", "fsdp")]
    flags += ["--config.stages.audit.mesh.data=2", "--config.stages.audit.mesh.fsdp=2"]
    assert run_main(audited, alone).status == 0
    done = run_main(audited, spread, *flags, environment={"JAX_NUM_CPU_DEVICES": "4"})
    assert done.status == 0, done.stderr[-3000:]
    for name in STAGES:
        for one, other in zip(metrics(alone, name), metrics(spread, name), strict=True):
            for row in (one, other):
                row.pop("accuracy/eval", None)  # of eight pairs, some of them ties but for rounding
            assert one == pytest.approx(other, rel=2e-3, abs=2e-4)
    one, other = (result(workdir, "audit")["figures"] for workdir in (alone, spread))
    assert one["noise"]["stddev"] == pytest.approx(other["noise"]["stddev"], rel=0.3)
    for name in ("subject", "canaries", "noisy_steps", "epsilon_claimed", "delta"):
        assert one[name] == other[name]
