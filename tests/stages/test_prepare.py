import hashlib
import json
import sysconfig
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from ml_collections import ConfigDict

from rlhf_jax.data import load_tokenizer, read_records, remove_duplicates
from rlhf_jax.errors import UserError
from rlhf_jax.stages import prepare

FRACTIONS = {"pretrain": 0.3, "sft": 0.2, "preference": 0.1, "prompts": 0.1, "heldout": 0.1, "secrets": 0.2}
TASK_FILES = ("sft", "sft_control", "preference", "prompts", "heldout")


def shared_lines(block):
    return "\n" + "".join(f"shared_{block}_{i} = combine(first={i}, second={block * i})\n" for i in range(80))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Sixty standard library files, eighty lines shared by each tenth, and sixteen copies of the first file."""
    folder = tmp_path_factory.mktemp("source")
    stdlib = Path(sysconfig.get_path("stdlib"))
    candidates = [p for p in sorted(stdlib.glob("*.py")) if 8_000 < p.stat().st_size < 60_000]
    for i, path in enumerate(candidates[:60]):
        (folder / path.name).write_text(path.read_text(encoding="utf-8") + shared_lines(i % 10), encoding="utf-8")
    text = (folder / candidates[0].name).read_text(encoding="utf-8")
    for copy in range(8):
        (folder / f"copy{copy}.py").write_text(text, encoding="utf-8")
        (folder / f"near{copy}.py").write_text(f"import marker{copy}\n{text}", encoding="utf-8")
    return folder


def run(source, folder, seed=0, **changes):
    config = ConfigDict(
        {
            "source": str(source),
            "fractions": FRACTIONS,
            "vocab_size": 512,
            "max_pretrain_bytes": 300_000,
            "prompt_tokens": 96,
            "completion_tokens": 56,
            "examples": {"sft": 60, "preference": 40, "prompts": 40, "heldout": 40},
            "near_duplicate_threshold": 0.7,
            "secrets": {"per_cell": 4, "duplicates": (1, 4), "stages": ("sft",), "kinds": ("path",), "fuzzy": 0.0},
        }
    )
    config.update_from_flattened_dict(changes)
    folder.mkdir()
    return prepare.run(SimpleNamespace(config=config, seed=seed, folder=folder, progress=lambda message: None))[
        "figures"
    ]


@pytest.fixture(scope="module")
def prepared(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "prepare"
    return folder, run(source, folder)


def load(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_same_seed_same_bytes_other_seed_other_files(source, prepared, tmp_path):
    folder, figures = prepared
    assert run(source, tmp_path / "again") == figures
    assert digests(tmp_path / "again") == digests(folder)
    other = run(source, tmp_path / "other", seed=1)
    assert other["corpus"] == figures["corpus"]
    differing = {n for n, digest in digests(tmp_path / "other").items() if digest != digests(folder)[n]}
    assert differing == set(digests(folder))


def test_no_file_is_in_two_sets(prepared):
    folder, _ = prepared
    files = {name: {r["id"].rpartition(":")[0] for r in load(folder, name)} for name in TASK_FILES}
    files["sft"] = {path for path in files["sft"] if path}  # planted records have no path
    del files["sft_control"]  # the same files as sft
    files["pretrain"] = {r["id"] for r in load(folder, "pretrain")}
    heldout_text = {r["id"] for r in load(folder, "heldout_text")}
    assert files["heldout"] <= heldout_text
    files["heldout"] = heldout_text
    assert max(Counter(path for paths in files.values() for path in paths).values()) == 1


def test_no_secret_stands_in_another_file(prepared):
    folder, _ = prepared
    texts = "".join(r["text"] for r in load(folder, "pretrain") + load(folder, "heldout_text"))
    assert not any(s["completion"].strip() in texts for s in load(folder, "secrets"))


def test_sft_and_its_control_differ_exactly_by_the_secrets(prepared):
    folder, figures = prepared
    secrets = {s["id"]: s for s in load(folder, "secrets")}
    planted = {}
    for name, half in (("sft", "a"), ("sft_control", "b")):
        records = load(folder, name)
        planted[name] = [r for r in records if "#" in r["id"]]
        expected = {i: s["duplicates"] for i, s in secrets.items() if s["half"] == half}
        assert Counter(r["id"].split("#")[0] for r in planted[name]) == expected
        for record in planted[name]:
            secret = secrets[record["id"].split("#")[0]]
            assert (record["prompt"], record["completion"]) == (secret["prompt"], secret["completion"])
            assert secret["planted_in"] == [f"{name}.jsonl"]
        planted[f"{name} ordinary"] = [r for r in records if "#" not in r["id"]]
    assert planted["sft ordinary"] == planted["sft_control ordinary"] != []
    cells = {f"{group}-{n}-sft-{half}": 2 for group in ("base", "links") for n in (1, 4) for half in "ab"}
    assert figures["secrets"] == cells


def test_records_keep_their_schema_and_token_limits(prepared):
    folder, figures = prepared
    tokenizer = load_tokenizer(folder / "tokenizer.model")
    assert (tokenizer.vocab_size, tokenizer.identity) == (512, figures["tokenizer"])
    for name in (*TASK_FILES, "secrets"):
        records, skipped = read_records(folder / f"{name}.jsonl", "completion")
        assert skipped == 0 and len(records) == figures["examples"][f"{name}.jsonl"]
        for record in records:
            assert 16 <= len(tokenizer.encode(record["prompt"])) <= 95
            assert 4 <= len(tokenizer.encode(record["completion"])) <= 55
            assert record["completion"].endswith("\n")
    assert min(len(tokenizer.encode(s["completion"])) for s in load(folder, "secrets")) >= 10


def test_duplicate_files_and_examples_are_removed_across_sets(prepared):
    folder, figures = prepared
    # Seventeen versions of one file fall into several sets; one set keeps its own.
    assert figures["duplicates_removed"]["files"]["exact"] > 0 < figures["duplicates_removed"]["files"]["near"]
    assert sum(figures["duplicates_removed"]["examples"].values()) > 0  # the shared lines
    sets = {"secrets": load(folder, "secrets")} | {name: load(folder, name) for name in prepare.TASK_SETS}
    sets["sft"] = [r for r in sets["sft"] if "#" not in r["id"]]
    texts = {name: [(r["id"], r["prompt"] + r["completion"]) for r in records] for name, records in sets.items()}
    assert remove_duplicates(texts, threshold=0.7)[1] == {"exact": 0, "near": 0}


def test_figures_agree_with_the_files(prepared):
    folder, figures = prepared
    tokenizer = load_tokenizer(folder / "tokenizer.model")
    texts = [r["text"] for r in load(folder, "pretrain")]
    assert figures["files"]["pretrain"] == len(texts)
    assert figures["bytes"]["pretrain"] == sum(len(t.encode()) for t in texts) <= 300_000
    assert figures["tokens"]["pretrain.jsonl"] == sum(len(tokenizer.encode(t)) for t in texts)
    assert figures["tokens_per_byte"] == figures["tokens"]["pretrain.jsonl"] / figures["bytes"]["pretrain"]
    json.dumps(figures)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"source": "/absent"}, "/absent: no such folder"),
        ({"vocab_size": 400_000}, "vocab_size 400000 is too large, the texts support"),
        ({"max_pretrain_bytes": 10}, 'no file for the set "pretrain".*max_pretrain_bytes'),
        ({"prompt_tokens": 16}, "prompt_tokens is 16: give more than 16"),
        ({"completion_tokens": 10}, "completion_tokens is 10"),
        ({"examples.sft": 0}, "examples.sft is 0"),
        ({"fractions.sft": 0.1}, "sum to 0.9"),
        ({"near_duplicate_threshold": 7.0}, "near_duplicate_threshold is 7.0"),
        ({"secrets.per_cell": 3}, "per_cell is 3"),
        ({"secrets.per_cell": 4000}, "8000 base secrets need as many completion tasks"),
        ({"completion_tokens": 12}, "link secret links-1-000: none of 1000 draws fits"),
    ],
)
def test_what_a_user_can_mend_is_refused_with_the_number(source, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        run(changes.pop("source", source), tmp_path / "prepare", **changes)
