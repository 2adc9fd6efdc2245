"""A reward function of the user's: called as it asks to be, and refused in one line for anything but finite numbers."""

import numpy as np
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.rollout.functions import function_identity, load_function, score_answers

PROMPTS = ["ab", [{"role": "user", "content": "cd"}]]
ANSWERS = ["x" * 60, "yy"]
RECORDS = [{"prompt": "ab", "answer": 3}, {"prompt": PROMPTS[1], "answer": 4}]


def written(folder, body, name="score"):
    path = folder / "rewards.py"
    path.write_text(body)
    return f"{path}:{name}"


def scored(folder, body):
    return score_answers(load_function(written(folder, body)), PROMPTS, ANSWERS, RECORDS)


@pytest.mark.parametrize(
    "body, expected",
    [
        ("def score(prompts, completions): return [len(c) for c in completions]", [60, 2]),
        ("def score(prompts, completions): return [len(p[0]) for p in prompts]", [1, 2]),
        ("def score(prompts, completions, records): return [r['answer'] for r in records]", [3, 4]),
        ("def score(prompts, completions, **fields): return [r['answer'] for r in fields['records']]", [3, 4]),
        ("def score(a, b, scale=2.0): return (len(b[0]) * scale, True)", [120, 1]),
        ("import numpy as np\ndef score(p, c): return np.asarray([0.1, 7], np.float64)", [np.float32(0.1), 7]),
        ("class Score:\n    def __call__(self, p, c): return [0, False]\nscore = Score()", [0, 0]),
    ],
)
def test_a_function_gets_what_its_signature_takes(tmp_path, body, expected):
    scores = scored(tmp_path, body)
    assert scores.dtype == np.float32
    np.testing.assert_array_equal(scores, expected)


def test_what_a_function_does_to_its_arguments_stays_with_it(tmp_path):
    body = "def score(p, c, records):\n    p.clear(); c.clear()\n    return [r.pop('answer') for r in records]"
    assert scored(tmp_path, body).tolist() == [3, 4]
    assert scored(tmp_path, body).tolist() == [3, 4]


@pytest.mark.parametrize(
    "result, told",
    [
        ("[1.0]", "returned 1 scores for 2 answers"),
        ("[1.0, 2.0, 3.0]", "returned 3 scores for 2 answers"),
        ("None", "returned None, a NoneType"),
        ("'12'", "returned '12', a str"),
        ("(x for x in (1, 2))", "a generator"),
        ("{'a': 1, 'b': 2}", "a dict"),
        ("[1, 'good']", "returned 'good', a str, for answer 2 ('yy')"),
        ("[None, 1]", f"returned None, a NoneType, for answer 1 ('{'x' * 40}')"),
        ("[[1], [2]]", "returned [1], a list, for answer 1"),
        ("np.zeros((2, 1))", "returned an array of shape (2, 1) for 2 answers"),
        ("np.float32(1)", "returned np.float32(1.0), a float32"),
        ("[0, float('nan')]", "returned nan for answer 2 ('yy')"),
        ("[float('-inf'), 0]", f"returned -inf for answer 1 ('{'x' * 40}')"),
        ("[0, 1e300]", "returned 1e+300 for answer 2"),
        ("[0, 1j]", "a complex, for answer 2"),
    ],
)
def test_anything_but_one_finite_number_an_answer_is_refused(tmp_path, result, told):
    with pytest.raises(UserError) as error:
        scored(tmp_path, f"import numpy as np\ndef score(p, c): return {result}")
    message = str(error.value)
    assert told in message and f"{tmp_path / 'rewards.py'}:score" in message
    assert message.endswith(": return one finite number for each answer")


def test_an_exception_is_told_with_the_line_of_the_users_file(tmp_path):
    with pytest.raises(UserError, match=rf"raised ValueError: invalid literal.*\({tmp_path}/rewards.py:3\)"):
        scored(tmp_path, "def score(p, c):\n    # not a number\n    return [int(x) for x in c]")
    with pytest.raises(UserError, match="raised SystemExit: 3"):
        scored(tmp_path, "def score(p, c): raise SystemExit(3)")
    with pytest.raises(UserError, match=rf"raised JSONDecodeError.*\({tmp_path}/rewards.py:2\)"):
        scored(tmp_path, "import json\ndef score(p, c): return [json.loads(x) for x in c]")


@pytest.mark.parametrize(
    "body, name, told",
    [
        ("import no_such_module", "score", r"raised ModuleNotFoundError: .*\(.*rewards.py:1\): mend it"),
        ("x = 1\ndef score(:", "score", r"raised SyntaxError: .*rewards.py:2\)"),
        ("def reward(p, c): pass", "score", 'has no function "score", it has: reward'),
        ("score = 3", "score", 'has no function "score", it has: none'),
        ("def score(texts): pass", "score", r"its arguments are \(texts\)"),
        ("def score(p, c, *, scale): pass", "score", "missing a required argument: 'scale'"),
        ("", "", "is no function's name"),
    ],
)
def test_a_function_that_can_not_be_called_is_refused_when_loaded(tmp_path, body, name, told):
    with pytest.raises(UserError, match=told):
        load_function(written(tmp_path, body, name))


def test_a_missing_file_is_refused_wherever_it_is_asked(tmp_path):
    for ask in (load_function, function_identity):
        with pytest.raises(UserError, match="there is no file"):
            ask(f"{tmp_path}/none.py:score")


def test_identity_is_the_files_content_wherever_it_lies(tmp_path):
    (tmp_path / "other").mkdir()
    here, there = (written(folder, "def score(p, c): return 0") for folder in (tmp_path, tmp_path / "other"))
    assert function_identity(here) == function_identity(there)
    written(tmp_path, "def score(p, c): return 1")
    assert function_identity(here) != function_identity(there)
