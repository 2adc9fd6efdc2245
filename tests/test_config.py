"""The experiment's language: defaults, references and the order they give, and refusals that name the remedy."""

import itertools

import pytest
from ml_collections import ConfigDict

from rlhf_jax.config import LORA, OPTIMIZER, STAGES, experiment, references, stage, stage_order, upstream
from rlhf_jax.errors import UserError
from rlhf_jax.validation import validate


def job(seed=0, **stages):
    config = experiment(seed)
    for name, fields in stages.items():
        config.stages[name] = fields
    return config


def chain():
    """Stages by name, each after those it refers to."""
    return {
        "prepare": stage("prepare"),
        "base": stage("sft", init="scratch", tokenizer="prepare/tokenizer.model", data="prepare/pretrain.jsonl"),
        "sft": stage("sft", init="base", data="prepare/sft.jsonl"),
        "reward": stage("reward", init="sft", data="prepare/preference.jsonl"),
        "ppo": stage("ppo", init="sft", reward="reward", data="prepare/prompts.jsonl"),
        "memorization": stage("memorization", subjects=("sft", "ppo")),
    }


def refused(*args, call=validate, **kwargs):
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


# ------------------------------------------------- stage() and fields ------------------------------------------------


@pytest.mark.parametrize("kind", STAGES)
def test_a_stage_has_the_defaults_of_its_kind_in_their_order(kind):
    built = stage(kind)
    assert built.kind == kind
    assert list(built.keys()) == ["kind", *STAGES[kind]]
    assert {name: value for name, value in built.to_dict().items() if name != "kind"} == STAGES[kind]


@pytest.mark.parametrize("kind", ["sft", "reward", "ppo"])
def test_trainable_stages_share_the_same_groups(kind):
    built = stage(kind)
    assert set(built.lora.keys()) == set(LORA)
    assert set(built.optimizer.keys()) == set(OPTIMIZER)
    assert set(built.mesh.keys()) == {"data", "fsdp", "tensor"}
    assert set(built.checkpoint.keys()) == {"every", "keep", "keep_every"}


def test_fields_given_replace_defaults_and_leave_the_rest_of_their_group():
    built = stage("sft", batch_size=4, optimizer=dict(learning_rate=0.5))
    assert built.batch_size == 4
    assert built.optimizer.learning_rate == 0.5
    assert built.optimizer.b1 == OPTIMIZER["b1"]


def test_two_stages_do_not_share_their_fields():
    first, second = stage("sft"), stage("sft")
    first.optimizer.learning_rate = 9.0
    first.model.layers = 99
    assert second.optimizer.learning_rate == OPTIMIZER["learning_rate"]
    assert stage("sft").model.layers == STAGES["sft"]["model"]["layers"] != 99


def test_a_list_becomes_a_tuple():
    assert stage("memorization", subjects=["a", "b"]).subjects == ("a", "b")


def test_an_unknown_kind_names_the_nearest():
    assert 'unknown stage kind "rewrd": did you mean "reward"?' in refused("rewrd", call=stage)


def test_an_unknown_kind_near_to_none_names_all():
    message = refused("zzzz", call=stage)
    assert all(kind in message for kind in STAGES)


def test_an_unknown_field_names_the_nearest():
    assert 'unknown field sft.bach_size: did you mean "batch_size"?' in refused("sft", bach_size=1, call=stage)


def test_an_unknown_field_of_a_group_names_the_nearest():
    message = refused("ppo", optimizer=dict(lerning_rate=1.0), call=stage)
    assert 'unknown field ppo.optimizer.lerning_rate: did you mean "learning_rate"?' in message


def test_a_group_must_be_given_as_one():
    assert "sft.optimizer is a group of fields" in refused("sft", optimizer=0.1, call=stage)


@pytest.mark.parametrize(
    "kind, fields, where",
    [
        ("sft", dict(batch_size="eight"), "sft.batch_size"),
        ("sft", dict(init=3), "sft.init"),
        ("ppo", dict(optimizer=dict(learning_rate="fast")), "ppo.optimizer.learning_rate"),
        ("memorization", dict(subjects="sft"), "memorization.subjects"),
    ],
)
def test_a_value_of_another_type_names_its_field(kind, fields, where):
    assert where in refused(kind, call=stage, **fields)


def test_a_whole_number_may_stand_for_a_float():
    assert stage("sft", epochs=2).epochs == 2.0


# ----------------------------------------------------- references ----------------------------------------------------


def test_stages_run_after_what_they_refer_to_in_whatever_order_they_are_written():
    stages = job(**chain()).stages
    assert sorted(validate(job(**chain()))) == sorted(stages)
    for names in itertools.islice(itertools.permutations(list(stages)), 0, None, 29):
        order = stage_order({name: stages[name] for name in names})
        assert sorted(order) == sorted(stages)
        for name in order:
            assert all(order.index(before) < order.index(name) for before in upstream(stages, name))


def test_where_references_leave_a_choice_the_order_written_stays():
    config = job(b=stage("prepare"), c=stage("prepare"), a=stage("prepare"))
    assert stage_order(config.stages) == ["b", "c", "a"]


def test_upstream_names_every_stage_referred_to_once():
    config = job(**chain())
    assert upstream(config.stages, "prepare") == []
    assert set(upstream(config.stages, "base")) == {"prepare"}
    assert set(upstream(config.stages, "ppo")) == {"sft", "reward", "prepare"}
    assert set(upstream(config.stages, "memorization")) == {"sft", "ppo", "prepare"}


def test_evaluation_data_control_and_policy_are_references():
    stages = chain()
    stages["sft"].evaluation.data = "prepare/heldout.jsonl"
    stages["reward"].policy = "base"
    stages["memorization"].controls = ConfigDict({"sft": "base"})
    config = job(**stages)
    assert ("evaluation.data", "prepare/heldout.jsonl") in list(references(config.stages.sft))
    assert "base" in upstream(config.stages, "reward")
    assert "base" in upstream(config.stages, "memorization")


def test_a_circle_is_refused_with_the_stages_in_it():
    stages = chain()
    stages["base"] = stage("sft", init="sft", data="prepare/sft.jsonl")
    message = refused(job(**stages))
    assert "circle" in message and "base" in message and "sft" in message
    assert "prepare" not in message


def test_a_stage_that_starts_from_itself_is_refused():
    assert "circle" in refused(job(sft=stage("sft", init="sft", data="x.jsonl")))


@pytest.mark.parametrize(
    "name, field, value, words",
    [
        ("ppo", "reward", "rewrd", ['stages.ppo.reward is "rewrd"', 'did you mean "reward"?']),
        ("sft", "init", "bsae", ['stages.sft.init is "bsae"', 'did you mean "base"?']),
        ("ppo", "reward", "sft", ["a sft stage", "reward"]),
        ("reward", "init", "prepare", ["a prepare stage", "sft"]),
        ("reward", "policy", "reward", ["a reward stage", "sft, ppo"]),
    ],
)
def test_a_reference_to_no_stage_or_to_one_of_another_kind_is_refused(name, field, value, words):
    stages = chain()
    stages[name][field] = value
    message = refused(job(**stages))
    assert all(word in message for word in words), message


def test_a_memorization_subject_must_be_a_language_model():
    stages = chain()
    stages["memorization"].subjects = ("reward",)
    assert 'stages.memorization asks "reward"' in refused(job(**stages))


# ------------------------------------------------------ validate -----------------------------------------------------


def test_a_field_without_default_must_be_set():
    stages = chain()
    stages["reward"] = stage("reward", init="sft")
    assert "stages.reward.data is not set: a reward stage needs it" in refused(job(**stages))


def test_an_experiment_without_stages_is_refused():
    assert "config.stages is empty" in refused(experiment())


def test_a_stage_that_stage_did_not_build_is_refused():
    config = experiment()
    config.stages.sft = ConfigDict({"init": "scratch"})
    assert "stages.sft has no kind" in refused(config)


def test_a_field_set_by_hand_is_checked_like_one_given_to_stage():
    stages = chain()
    stages["sft"].bach_size = 4
    assert 'unknown field stages.sft.bach_size: did you mean "batch_size"?' in refused(job(**stages))


@pytest.mark.parametrize(
    "where, nearest",
    [("sede", "seed"), ("loging", "logging"), ("logging.evry", "every"), ("logging.tensorbord", "tensorboard")],
)
def test_an_unknown_field_of_the_experiment_names_the_nearest(where, nearest):
    config = job(**chain())
    *groups, name = where.split(".")
    target = config
    for group in groups:
        target = target[group]
    target[name] = 1
    message = refused(config)
    assert where in message and f'did you mean "{nearest}"?' in message


@pytest.mark.parametrize(
    "name, changes, words",
    [
        ("sft", {"batch_size": 0}, ["stages.sft.batch_size is 0"]),
        ("sft", {"epochs": -1.0}, ["stages.sft.epochs is -1.0"]),
        ("sft", {"sequence_length": 0}, ["stages.sft.sequence_length is 0"]),
        ("sft", {"batch_size": 8, "accumulation": 3}, ["batch_size 8", "3 microbatches"]),
        ("sft", {"schema": "chat"}, ['stages.sft.schema is "chat"']),
        ("sft", {"schema": "text"}, ['set loss_on="all"']),
        ("sft", {"loss_on": "prompt"}, ['stages.sft.loss_on is "prompt"']),
        ("sft", {"on_error": "ignore"}, ['stages.sft.on_error is "ignore"']),
        ("sft", {"optimizer.schedule": "step"}, ['stages.sft.optimizer.schedule is "step"']),
        ("sft", {"checkpoint.every": 0}, ["stages.sft.checkpoint.every is 0"]),
        ("sft", {"checkpoint.keep": 0}, ["stages.sft.checkpoint.keep is 0"]),
        ("sft", {"checkpoint.keep_every": -1}, ["stages.sft.checkpoint.keep_every is -1"]),
        ("sft", {"checkpoint.keep_every": 150}, ["stages.sft.checkpoint.keep_every is 150 and every is 100"]),
        ("sft", {"evaluation.every": 0}, ["stages.sft.evaluation.every is 0"]),
        ("sft", {"lora.rank": 2, "lora.targets": ("q", "gat")}, ["stages.sft.lora.targets", 'did you mean "gate"?']),
        ("base", {"lora.rank": 2}, ["stages.base", "lora.rank=0"]),
        ("base", {"tokenizer": ""}, ["stages.base.tokenizer is not set"]),
        ("reward", {"temperature": 0.0}, ["stages.reward.temperature is 0.0"]),
        ("ppo", {"top_k": 5}, ["stages.ppo", "top_k 5"]),
        ("ppo", {"top_p": 0.5}, ["stages.ppo", "top_p 0.5"]),
        ("ppo", {"batch_size": 10, "minibatches": 4}, ["batch_size 10", "4 minibatches"]),
        ("memorization", {"subjects": ()}, ["stages.memorization.subjects is empty"]),
        ("memorization", {"conditions": ("sft",)}, ["conditions has 'sft': give (name, (subject, ...)) each"]),
        ("memorization", {"conditions": (("a", ("sftt",)),)}, ['"a" has "sftt", which is no subject', 'mean "sft"']),
    ],
)
def test_a_value_that_cannot_work_is_refused_with_field_and_value(name, changes, words):
    stages = chain()
    stages[name].update_from_flattened_dict(changes)
    message = refused(job(**stages))
    assert all(word in message for word in words), message


def test_what_is_valid_stays_as_it_is():
    config = job(**chain())
    before = config.to_json()
    validate(config)
    assert config.to_json() == before
