import numpy as np
import pytest

from rlhf_jax.data.order import in_batches


@pytest.mark.parametrize("records", [1, 4, 5, 12])
def test_all_records_once_in_order_and_then_the_filling(records):
    for fill in (-1, 0):
        rows = in_batches(records, 4, fill)
        assert rows.shape == (-(-records // 4), 4)
        np.testing.assert_array_equal(rows.ravel()[:records], np.arange(records))
        assert (rows.ravel()[records:] == fill).all()
