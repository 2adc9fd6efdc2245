"""Poisson batches: every record's own coin, the cut, and that a batch is a function of (words, step)."""

import numpy as np
import pytest
from scipy import stats

from rlhf_jax.data.poisson import PoissonBatches, recommended_batch
from rlhf_jax.errors import UserError

WORDS = (0x01234567, 0x89ABCDEF)
RECORDS, RATE, STEPS = 200, 0.1, 4000


def drawn(batches, step):
    rows, present = batches.batch(step)
    assert rows.shape == present.shape == (batches.physical_batch,)
    assert (rows[~present] == 0).all()
    members = rows[present]
    assert len(np.unique(members)) == len(members) and (members >= 0).all() and (members < batches.records).all()
    return members


def inclusions(batches, steps=STEPS):
    """(steps, records) bool: who is in which batch."""
    table = np.zeros((steps, batches.records), bool)
    for step in range(steps):
        table[step, drawn(batches, step)] = True
    return table


@pytest.fixture(scope="module")
def table():
    return inclusions(PoissonBatches(RECORDS, RATE, RECORDS, WORDS))


def test_every_record_enters_with_the_sampling_rate(table):
    assert stats.binomtest(int(table.sum()), table.size, RATE).pvalue > 0.01
    each = [stats.binomtest(int(count), STEPS, RATE).pvalue for count in table.sum(0)]
    assert min(each) > 0.01 / RECORDS  # Bonferroni


def test_batch_sizes_are_binomial(table):
    sizes = table.sum(1)
    expected = stats.binom(RECORDS, RATE)
    edges = np.array([0, 12, 14, 16, 18, 20, 22, 24, 26, 28, RECORDS + 1])
    chances = np.diff(expected.cdf(edges - 1))
    assert stats.chisquare(np.histogram(sizes, edges)[0], STEPS * chances / chances.sum()).pvalue > 0.01


def test_records_and_steps_are_independent(table):
    pairs = RECORDS * (RECORDS - 1) / 2
    over_steps = np.corrcoef(table.T)[np.triu_indices(RECORDS, 1)]
    limit = stats.norm.isf(0.005 / pairs) / np.sqrt(STEPS)
    assert np.abs(over_steps).max() < limit
    assert over_steps.std() == pytest.approx(1 / np.sqrt(STEPS), rel=0.05)
    followed = np.corrcoef(table[:-1].ravel(), table[1:].ravel())[0, 1]
    assert abs(followed) < 3 / np.sqrt(table.size)


def test_a_batch_is_a_function_of_the_words_and_the_step(table):
    again = PoissonBatches(RECORDS, RATE, RECORDS, WORDS)
    for step in (3999, 17, 0, 17):
        np.testing.assert_array_equal(np.flatnonzero(table[step]), drawn(again, step))
    assert not np.array_equal(table[0], table[1])
    for other in ((WORDS[0], WORDS[1] ^ 1), (WORDS[0] ^ 1, WORDS[1]), WORDS[::-1], (*WORDS, 0)):
        there = inclusions(PoissonBatches(RECORDS, RATE, RECORDS, other), 200)
        assert abs(np.corrcoef(table[:200].ravel(), there.ravel())[0, 1]) < 3 / np.sqrt(there.size)


def test_a_further_record_changes_no_other_s_coin():
    few, more = (PoissonBatches(n, RATE, n, WORDS) for n in (RECORDS, RECORDS + 1))
    for step in range(100):
        members = drawn(more, step)
        np.testing.assert_array_equal(members[members < RECORDS], drawn(few, step))


def test_a_batch_that_is_too_large_is_cut_evenly(table):
    cut = inclusions(PoissonBatches(RECORDS, RATE, 16, WORDS))
    assert not (cut & ~table).any()
    np.testing.assert_array_equal(cut.sum(1), np.minimum(table.sum(1), 16))
    # of the records that were drawn into batches of 20, each place in their order stays as often as another
    ranks = np.stack([cut[step][table[step]] for step in range(STEPS) if table[step].sum() == 20])
    assert len(ranks) > 300
    assert stats.chisquare(ranks.sum(0)).pvalue > 0.01


def test_a_batch_may_be_empty():
    batches = PoissonBatches(20, 0.02, 4, WORDS)
    sizes = np.array([len(drawn(batches, step)) for step in range(1000)])
    assert stats.binomtest(int((sizes == 0).sum()), 1000, 0.98**20).pvalue > 0.01


def test_at_rate_one_everybody_is_present():
    rows, present = PoissonBatches(7, 1.0, 7, WORDS).batch(0)
    np.testing.assert_array_equal(rows, np.arange(7))
    assert present.all()


def test_padding_fills_whole_microbatches():
    """Row i is of microbatch i mod 4: 25 present rows of 40 leave the last microbatch without one."""
    batches = PoissonBatches(RECORDS, RATE, 40, WORDS, accumulation=4)
    plain = PoissonBatches(RECORDS, RATE, 40, WORDS)
    for step in range(50):
        rows, present = batches.batch(step)
        np.testing.assert_array_equal(np.sort(rows[present]), drawn(plain, step))
        counts = present.reshape(-1, 4).sum(0)
        full, rest = divmod(present.sum(), 10)
        np.testing.assert_array_equal(counts, ([10] * full + [rest] + [0] * 4)[:4])


def test_the_accountant_is_told_what_was_sampled():
    from rlhf_jax.privacy.accounting import Mechanism

    event = PoissonBatches(RECORDS, RATE, 40, WORDS).event()
    assert event == {"sampling_rate": RATE, "physical_batch": 40, "records": RECORDS}
    assert Mechanism(noise_multiplier=1.0, steps=10, **event).truncated


def test_the_recommended_batch_holds_four_deviations():
    assert recommended_batch(12500, 256 / 12500) == 320  # 256 + 4 * 15.84
    assert recommended_batch(12500, 256 / 12500, multiple=64) == 320
    assert recommended_batch(12500, 256 / 12500, multiple=48) == 336
    assert recommended_batch(10, 0.9) == 10
    size = recommended_batch(RECORDS, RATE)
    assert stats.binom(RECORDS, RATE).sf(size) < 1e-4


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((0, 0.1, 4), "records is 0 and physical_batch is 4: give at least 1"),
        ((10, 0.1, 0), "physical_batch is 0: give at least 1"),
        ((10, 0.0, 4), "sampling_rate is 0: give a rate"),
        ((10, 1.5, 4), "sampling_rate is 1.5: give a rate"),
        ((10, 0.1, 10, WORDS, 4), "physical_batch is 10, which 4 microbatches do not divide"),
    ],
)
def test_numbers_out_of_range_are_refused(numbers, message):
    with pytest.raises(UserError, match=message):
        PoissonBatches(*numbers, *(() if len(numbers) > 3 else (WORDS,)))
