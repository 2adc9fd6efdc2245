"""The refill bench on a small decoder: both ways give the same answers, and refilling runs fewer steps."""

from rlhf_jax.bench import refill as bench
from rlhf_jax.models import TransformerConfig

SMALL = TransformerConfig(
    vocab_size=61, layers=1, width=16, heads=2, kv_heads=1, head_dim=8, ffn=24, context=320, tie_embeddings=False
)


def test_both_ways_give_the_same_answers(monkeypatch):
    monkeypatch.setattr(bench, "workload_w", lambda tie_embeddings: SMALL)
    monkeypatch.setattr(bench, "PROMPTS", 24)
    monkeypatch.setattr(bench, "SLOTS", 8)
    found = bench.refill(1)
    static, refilled = (found["seconds_all"][name][0] for name in ("static", "refilled"))
    assert found["ratio"] == static / refilled
    assert found["equal_rows"] == 1.0
    steps, dead = found["steps"], found["dead_steps"]
    assert steps["refilled"] < steps["static"]
    alive = {name: (1 - dead[name]) * 8 * steps[name] for name in steps}  # tokens that decoding gave, either way
    assert abs(alive["static"] - alive["refilled"]) < 0.01


def test_the_lengths_are_a_distribution():
    assert len(bench.PERCENTILES) == 100 and list(bench.PERCENTILES) == sorted(bench.PERCENTILES)
