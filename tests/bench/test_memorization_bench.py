"""The memorization bench on a small decoder: both ways come to the same verdicts."""

from rlhf_jax.bench import memorization as bench
from rlhf_jax.models import TransformerConfig

SMALL = TransformerConfig(
    vocab_size=61, layers=1, width=16, heads=2, kv_heads=1, head_dim=8, ffn=24, context=128, tie_embeddings=False
)


def test_half_of_the_secrets_come_back_either_way(monkeypatch):
    monkeypatch.setattr(bench, "workload_w", lambda tie_embeddings: SMALL)
    found = bench.memorization(1, secrets=20)
    assert found["same_verdicts"] and found["memorized"] == 10 and found["secrets"] == 20
    assert [len(each) for each in found["seconds_all"].values()] == [1, 1] and found["ratio"] > 0
