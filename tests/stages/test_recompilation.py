"""A sweep compiles once: stages of other names, learning rates, KL coefficients or betas share all their programs."""

from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from test_memorization_stage import write

from rlhf_jax import pipeline, reporting
from rlhf_jax.config import experiment, stage
from rlhf_jax.distributed import make_mesh
from rlhf_jax.stages.context import Context

TOKENIZER = str(Path(__file__).parents[1] / "data" / "fixtures" / "qwen")
SHAPE = dict(layers=1, width=16, heads=2, kv_heads=1, head_dim=8, ffn=24, context=64)
REWARD = """
def brevity(prompts, completions):
    return [-len(text) for text in completions]
"""
EVERYTHING = {  # every program is kept on disk, however small or soon compiled
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


def sweep(folder):
    """An experiment of two stages of each kind that differ in what a sweep varies."""
    tasks = [{"prompt": f"count to {i}", "completion": f" {i}"} for i in range(8)]
    answers = write(folder / "answers.jsonl", tasks)
    pairs = [{"prompt": t["prompt"], "chosen": t["completion"], "rejected": " no"} for t in tasks]
    pairs = write(folder / "pairs.jsonl", pairs)
    (folder / "rewards.py").write_text(REWARD)
    config = experiment(seed=0)
    config.logging.update(every=1, tensorboard=False)
    model = dict(init="scratch", tokenizer=TOKENIZER, model=SHAPE)
    learning = dict(init="sft_1", data=pairs, loss="simpo", evaluation=dict(data=pairs))
    rollouts = dict(init="sft_1", data=answers, iterations=1, epochs=1, minibatches=1, samples=2)
    rollouts |= dict(reward=f"{folder / 'rewards.py'}:brevity", estimator="rloo", max_new_tokens=2)
    for i in range(2):
        common = dict(batch_size=8, optimizer=dict(learning_rate=(1e-3, 3e-3)[i]))
        sft = stage("sft", data=answers, sequence_length=32, **model, **common)
        numbers = dict(beta=(2.0, 2.5)[i], margin=(0.5, 0.3)[i])
        preference = stage("preference", sequence_length=32, **numbers, **learning, **common)
        ppo = stage("ppo", kl_coef=(0.05, 0.2)[i], **rollouts, **common)
        config.stages.update({f"sft_{i + 1}": sft, f"preference_{i + 1}": preference, f"ppo_{i + 1}": ppo})
    return config


@pytest.fixture(scope="module")
def missed(tmp_path_factory):
    """{stage: how many of its programs were not in JAX's cache on disk}, which was empty before the first one."""
    folder, counts, events = tmp_path_factory.mktemp("sweep"), {}, []
    run_stage = pipeline._run_stage

    def counted(context):
        events.clear()
        run_stage(context)
        counts[context.name] = events.count("/jax/compilation_cache/cache_misses")

    def note(event, **_):
        events.append(event)

    settings = {"jax_compilation_cache_dir": str(folder / "compiled"), **EVERYTHING}
    before = {name: getattr(jax.config, name) for name in settings}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "_run_stage", counted)
        patch.setattr(reporting, "write_report", lambda workdir: workdir / "none")
        patch.setattr(Context, "mesh", lambda context: make_mesh(devices=jax.devices()[:1]))
        jax.monitoring.register_event_listener(note)
        try:
            for name, value in settings.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()
            pipeline.run(sweep(folder), folder / "work")
        finally:
            jax.monitoring.unregister_event_listener(note)
            for name, value in before.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()
    return counts


@pytest.mark.parametrize("kind", ["sft", "preference", "ppo"])
def test_a_second_stage_of_other_coefficients_compiles_nothing(missed, kind):
    assert missed[f"{kind}_1"] > 0
    assert missed[f"{kind}_2"] == 0
