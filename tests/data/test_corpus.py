import random
import sysconfig
from pathlib import Path

import pytest

from rlhf_jax.data import (
    completion_tasks,
    folder_files,
    keyed_generator,
    load_tokenizer,
    python_stdlib_files,
    remove_duplicates,
    split_files,
    train_tokenizer,
)
from rlhf_jax.errors import UserError


def words(seed, count):
    generator = random.Random(seed)
    return [f"w{generator.randrange(10_000)}" for _ in range(count)]


def test_stdlib_files_are_source_without_tests_and_tables():
    paths = [path for path, _ in python_stdlib_files()]
    assert paths == sorted(paths)
    assert {"argparse.py", "json/decoder.py"} <= set(paths)
    folders = {part for path in paths for part in Path(path).parts[:-1]}
    assert folders.isdisjoint({"test", "tests", "site-packages", "idlelib", "encodings", "pydoc_data", "__pycache__"})


def test_folder_files_leave_out_what_is_no_usable_source(tmp_path):
    for name, content in {
        "b/one.py": b"x = 1\n",
        "a.py": "s = 'é'\r\n".encode(),
        "latin.py": b"s = '\xe9'\n",
        "blank.py": b" \n",
        "large.py": b"#" * 200_001,
        "notes.txt": b"text\n",
        "__pycache__/c.py": b"x\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert folder_files(tmp_path) == [("a.py", "s = 'é'\r\n"), ("b/one.py", "x = 1\n")]
    with pytest.raises(UserError, match="no .c file"):
        folder_files(tmp_path, suffix=".c")
    with pytest.raises(UserError, match="absent: no such folder"):
        folder_files(tmp_path / "absent")


def test_split_puts_each_file_in_one_set_whatever_other_files_exist():
    files = [(f"f{i}.py", str(i)) for i in range(2000)]
    fractions = {"pretrain": 0.7, "sft": 0.2, "heldout": 0.1}
    sets = split_files(files, fractions, seed=0)
    assert sorted(file for members in sets.values() for file in members) == sorted(files)
    for name, share in fractions.items():  # five standard deviations of a binomial share
        assert abs(len(sets[name]) / 2000 - share) < 5 * (share * (1 - share) / 2000) ** 0.5
    fewer = split_files(files[::3], fractions, seed=0)
    assert all(set(fewer[name]) <= set(sets[name]) for name in fractions)
    assert split_files(files, fractions, seed=1) != sets
    with pytest.raises(UserError, match="sum to 0.9"):
        split_files(files, {"a": 0.5, "b": 0.4}, seed=0)
    with pytest.raises(UserError, match="positive"):
        split_files(files, {"a": 1.5, "b": -0.5}, seed=0)


def exact_jaccard(a, b):
    first, second = ({tuple(x[i : i + 5]) for i in range(len(x) - 4)} for x in (a, b))
    return len(first & second) / len(first | second)


def test_duplicates_leave_the_later_set_and_distinct_texts_stay():
    original = words(0, 300)
    near = [*original[:150], "changed", *original[151:]]
    far = original[:150] + words(1, 150)
    assert exact_jaccard(original, near) > 0.9 and 0.2 < exact_jaccard(original, far) < 0.4
    sets = {
        "heldout": [("kept", " ".join(original)), ("same set", " ".join(original))],
        "sft": [("exact", "\n ".join(original)), ("near", " ".join(near)), ("far", " ".join(far))],
        "pretrain": [("other", " ".join(words(2, 300))), ("far again", " ".join(far)), ("short", "x y")],
    }
    kept, counts = remove_duplicates(sets, threshold=0.7)
    assert {name: [item for item, _ in members] for name, members in kept.items()} == {
        "heldout": ["kept", "same set"],
        "sft": ["far"],
        "pretrain": ["other", "short"],
    }
    assert counts == {"exact": 2, "near": 1}


@pytest.mark.parametrize("side", ["below", "above"])
def test_near_duplicates_are_judged_by_the_exact_jaccard(side):
    a, b = words(0, 400), words(0, 400)
    for position in (50, 120, 190, 260, 330):
        b[position] = f"changed{position}"
    similarity = exact_jaccard(a, b)  # five changes alter 25 of 396 shingles
    assert similarity == pytest.approx((396 - 25) / (396 + 25))
    threshold = similarity + (0.001 if side == "below" else -0.001)
    _, counts = remove_duplicates({"a": [(0, " ".join(a))], "b": [(1, " ".join(b))]}, threshold)
    assert counts["near"] == (side == "above")


def test_keyed_generator_depends_on_every_key():
    draws = {
        tuple(keyed_generator(*key).integers(2**40, size=2)) for key in [(0, "a"), (1, "a"), (0, "b"), (0, "a", "")]
    }
    assert len(draws) == 4
    assert keyed_generator(0, "a").integers(2**40) == keyed_generator(0, "a").integers(2**40)


@pytest.fixture(scope="module")
def files():
    root = Path(sysconfig.get_path("stdlib"))
    return [(name, (root / name).read_text()) for name in ("argparse.py", "inspect.py", "ast.py")]


@pytest.fixture(scope="module")
def tokenizer(files, tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "tokenizer.model"
    train_tokenizer([text for _, text in files], path, 1024)
    return load_tokenizer(path)


def test_completion_tasks_are_whole_lines_within_the_token_limits(files, tokenizer):
    tasks = completion_tasks(files, tokenizer, seed=0, count=300, prompt_tokens=64, completion_tokens=32)
    assert len(tasks) == 300
    source = dict(files)
    covered = set()
    for task in tasks:
        path, line = task["id"].split(":")
        lines = source[path].splitlines(keepends=True)
        prompt, completion = (task[field].splitlines(keepends=True) for field in ("prompt", "completion"))
        cut = int(line) - 1
        assert lines[cut - len(prompt) : cut] == prompt and lines[cut : cut + len(completion)] == completion
        assert 16 <= len(tokenizer.encode(task["prompt"])) <= 63
        assert 4 <= len(tokenizer.encode(task["completion"])) <= 31
        assert 1 <= len(completion) <= 3 and all(x.strip() for x in completion)
        assert any(not x.strip().startswith("#") for x in prompt if x.strip())
        own = {(path, n) for n in range(cut - len(prompt), cut + len(completion))}
        assert covered.isdisjoint(own)
        covered |= own
    assert {len(task["completion"].splitlines()) for task in tasks} == {1, 2, 3}


def test_completion_tasks_do_not_depend_on_count_or_other_files(files, tokenizer):
    limits = {"prompt_tokens": 64, "completion_tokens": 32}
    many = completion_tasks(files, tokenizer, seed=0, count=30, **limits)
    assert completion_tasks(files, tokenizer, seed=0, count=7, **limits) == many[:7]
    alone = completion_tasks(files[1:2], tokenizer, seed=0, count=10, **limits)
    assert alone == [task for task in many if task["id"].startswith("inspect.py")]
    assert completion_tasks(files, tokenizer, seed=1, count=30, **limits) != many


def test_comments_and_docstrings_alone_make_no_task(tokenizer):
    text = (
        '"""Title\n' + "A long sentence about what this module does and why.\n" * 30 + '"""\n' + "# comment here\n" * 30
    )
    limits = {"prompt_tokens": 64, "completion_tokens": 32}
    assert completion_tasks([("doc.py", text)], tokenizer, seed=0, count=9, **limits) == []
    code = "value = compute(first, second, third)\n" * 30
    assert completion_tasks([("code.py", code)], tokenizer, seed=0, count=9, **limits)
