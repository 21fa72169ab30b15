"""`cache.codec` through stage 1, as its user sets it."""

import numpy as np
import pytest
import toys

from cache_schema.errors import FingerprintMismatch
from cache_schema.reader import CacheReader
from cache_schema.verify import verify
from stage1_teacher.__main__ import main as stage1


def test_small_is_another_cache_of_the_same_logits(tmp_path, capsys):
    recipe = str(toys.tiny_recipe(tmp_path, cache={"step": 2**-10}))
    assert stage1(["--recipe", recipe]) == 0
    small = tmp_path / "small"
    assert stage1(["--recipe", recipe, "--set", "cache.codec=small", "--set", f"cache.dir={small}"]) == 0
    readers = [CacheReader.open(folder) for folder in (tmp_path / "cache", small)]
    assert [reader.manifest.codec for reader in readers] == ["fine", "small"]
    assert readers[0].totals().codec_error_max <= 2**-11 and readers[1].totals().codec_error_max <= 2**-8
    for fine, coarse in zip(readers[0].rows(), readers[1].rows(), strict=True):
        np.testing.assert_array_equal(fine.top_logit, coarse.top_logit)
        np.testing.assert_allclose(fine.logits, coarse.logits, rtol=0, atol=4.5 * 2**-10)
    assert verify(small).good
    with pytest.raises(FingerprintMismatch, match=r"cache\.codec +cache: \"small\" +asked for: \"fine\""):
        CacheReader.open(small, expect=readers[0].manifest.identity)
    capsys.readouterr()
