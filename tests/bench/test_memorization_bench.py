"""The memorization bench on a small decoder: both ways come to the same verdicts."""

from rlhf_jax.bench import memorization as bench
from rlhf_jax.models import TransformerConfig

SMALL = TransformerConfig(
    vocab_size=61, layers=1, width=16, heads=2, kv_heads=1, head_dim=8, ffn=24, context=128, tie_embeddings=False
)


def test_half_of_the_secrets_come_back_either_way(monkeypatch):
    monkeypatch.setattr(bench, "workload_w", lambda tie_embeddings: SMALL)
    monkeypatch.setattr(bench, "SETTINGS", {20: 16})
    found = bench.memorization(1)
    assert list(found) == ["50 + 20"]
    found = found["50 + 20"]
    assert found["same_verdicts"] and (found["memorized"], found["secrets"]) == (8, 16)
    middle = {name: seconds for name, (seconds,) in found["seconds_all"].items()}
    assert set(middle) == {"everything", "reading", "behind drafts"}
    assert found["ratio_decoding"] == middle["everything"] / middle["behind drafts"] > found["ratio_whole"]
